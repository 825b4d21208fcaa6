//! What a volume may hold: for every cell of 256 bytes, the writes that count, and those of which nobody knows whether they do.
//! Must not know the system under test.
//!
//! A cell is the same number again and again, and no two writes use the same one, so that every byte tells who wrote it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The grain of the model: half a sector, so that torn sectors are seen.
pub const CELL: usize = 256;

const UNDER_WAY: u64 = u64::MAX;

/// See the module.
#[derive(Clone)]
pub struct Model {
    /// What cells hold that are not in `hot`.
    base: Vec<u8>,
    hot: BTreeMap<usize, Cell>,
    /// Counts beginnings and ends.
    clock: u64,
    /// When the reads that are under way began.
    reads: BTreeSet<u64>,
    /// When what never arrived was given up last.
    forgotten: u64,
}

#[derive(Clone, Default)]
struct Cell {
    /// What it may have held before `writes`: one value, unless a power loss left several possible. Empty once a durable write
    /// counts instead.
    base: Vec<u64>,
    writes: Vec<Write>,
    /// What was read when nothing was under way: it must not change by itself.
    seen: Option<u64>,
}

#[derive(Clone, Copy)]
struct Write {
    op: u64,
    tag: u64,
    begin: u64,
    end: u64,
    is_acknowledged: bool,
    is_durable: bool,
}

/// A write that was begun.
pub struct Begun {
    op: u64,
    cells: Range<usize>,
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Acknowledged,
    /// Acknowledged as durable.
    Durable,
    /// It failed: it may have happened in part.
    Unknown,
    /// It was refused: it has not happened.
    Refused,
}

/// How a site crashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The daemon was killed: the kernel has everything that was acknowledged.
    Killed,
    /// The daemon was restarted after its disk had failed to sync: of what was not flushed any part may be lost, now or later.
    DiskGaveUp,
    /// Of what was not flushed any part may be lost; what is there stays.
    PowerLoss,
}

/// Bytes of cells that hold a number.
pub fn fill(tag: u64, len_bytes: usize) -> Vec<u8> {
    tag.to_le_bytes().repeat(len_bytes / 8)
}

fn tag_of(cell: &[u8]) -> Option<u64> {
    let tag = u64::from_le_bytes(cell[..8].try_into().ok()?);
    (cell[..cell.len() - 8] == cell[8..]).then_some(tag)
}

fn cells_of(offset: u64, len_bytes: u64) -> Range<usize> {
    offset as usize / CELL..(offset + len_bytes) as usize / CELL
}

impl Cell {
    /// Whether a write that counts has replaced what was there up to `end`, before `at`.
    fn is_replaced(&self, end: u64, at: u64) -> bool {
        self.writes.iter().any(|other| other.is_acknowledged && other.begin > end && other.end < at)
    }

    /// What a read that began at `at` may find.
    fn allowed(&self, at: u64) -> Vec<u64> {
        let writes = self.writes.iter().filter(|write| !self.is_replaced(write.end, at)).map(|write| write.tag);
        if self.is_replaced(0, at) { writes.collect() } else { self.base.iter().copied().chain(writes).collect() }
    }

    /// Drops what can come back by no power loss, and be found by no read that began at `oldest_read` or later.
    fn settle(&mut self, oldest_read: u64) {
        let counts = |write: &&Write| write.is_durable && write.end < oldest_read;
        let Some(last) = self.writes.iter().filter(counts).map(|write| write.begin).max() else { return };
        self.base.clear();
        self.writes.retain(|write| write.end >= last);
        if let [only] = self.writes[..]
            && only.is_durable
        {
            self.base = vec![only.tag];
            self.writes.clear();
        }
    }
}

impl Model {
    pub fn new(content: Vec<u8>) -> Model {
        Model { base: content, hot: BTreeMap::new(), clock: 1, reads: BTreeSet::new(), forgotten: 0 }
    }

    pub fn size_bytes(&self) -> u64 {
        self.base.len() as u64
    }

    /// A moment, to be given to [`Model::flushed`].
    pub fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A read begins: to be given to [`Model::check_read`] and in the end to [`Model::end_read`].
    pub fn begin_read(&mut self) -> u64 {
        let now = self.now();
        self.reads.insert(now);
        now
    }

    pub fn end_read(&mut self, began: u64) {
        self.reads.remove(&began);
    }

    pub fn begin_write(&mut self, offset: u64, len_bytes: u64, tag: u64) -> Begun {
        let begin = self.now();
        let cells = cells_of(offset, len_bytes);
        let write = Write { op: begin, tag, begin, end: UNDER_WAY, is_acknowledged: false, is_durable: false };
        for at in cells.clone() {
            let base = &self.base;
            let cell = self.hot.entry(at).or_insert_with(|| Cell {
                base: vec![tag_of(&base[at * CELL..(at + 1) * CELL]).unwrap_or_default()],
                ..Cell::default()
            });
            cell.seen = None;
            cell.writes.push(write);
        }
        Begun { op: begin, cells }
    }

    pub fn end_write(&mut self, begun: Begun, outcome: Outcome) {
        let end = self.now();
        for (_, cell) in self.hot.range_mut(begun.cells) {
            if outcome == Outcome::Refused {
                cell.writes.retain(|write| write.op != begun.op);
                continue;
            }
            // A crash has settled it already, if there is none.
            if let Some(write) = cell.writes.iter_mut().find(|write| write.op == begun.op) {
                write.end = end;
                write.is_acknowledged = outcome != Outcome::Unknown;
                write.is_durable = outcome == Outcome::Durable;
            }
        }
    }

    /// A flush that was begun at `began` has been acknowledged.
    pub fn flushed(&mut self, began: u64) {
        self.hot.values_mut().for_each(|cell| {
            for write in cell.writes.iter_mut().filter(|write| write.is_acknowledged && write.end < began) {
                write.is_durable = true;
            }
        });
        self.cool();
    }

    fn cool(&mut self) {
        let base = &mut self.base;
        let oldest_read = self.reads.first().copied().unwrap_or(u64::MAX);
        self.hot.retain(|at, cell| {
            cell.settle(oldest_read);
            let [only] = cell.base[..] else { return true };
            if !cell.writes.is_empty() {
                return true;
            }
            base[at * CELL..(at + 1) * CELL].copy_from_slice(&fill(only, CELL));
            false
        });
    }

    /// The site that has it has crashed.
    pub fn crash(&mut self, crash: Crash) {
        let now = self.now();
        self.reads.clear();
        for cell in self.hot.values_mut() {
            cell.seen = None;
            for write in cell.writes.iter_mut().filter(|write| write.end == UNDER_WAY) {
                write.end = now;
            }
            cell.settle(u64::MAX);
            if crash == Crash::DiskGaveUp {
                cell.writes
                    .iter_mut()
                    .filter(|write| !write.is_durable)
                    .for_each(|write| write.is_acknowledged = false);
            }
            if crash == Crash::PowerLoss {
                let tags: Vec<u64> = cell.writes.drain(..).map(|write| write.tag).collect();
                cell.base.extend(tags);
                cell.base.sort_unstable();
                cell.base.dedup();
            }
        }
        self.cool();
    }

    /// It has moved to another site: what it may hold is what it may have held when it was let go of, and nothing is under way.
    pub fn moved(&mut self) {
        let now = self.now();
        self.reads.clear();
        for cell in self.hot.values_mut() {
            cell.base = cell.allowed(now);
            cell.base.sort_unstable();
            cell.base.dedup();
            cell.writes.clear();
        }
        self.cool();
    }

    /// What never arrived was given up: it reads as zeros, or as what it was if it did arrive.
    pub fn forget_absent(&mut self) {
        self.forgotten = self.now();
        for at in 0..self.base.len() / CELL {
            let tag = tag_of(&self.base[at * CELL..(at + 1) * CELL]).unwrap_or_default();
            if tag == 0 && !self.hot.contains_key(&at) {
                continue;
            }
            let cell = self.hot.entry(at).or_insert_with(|| Cell { base: vec![tag], ..Cell::default() });
            if !cell.base.is_empty() && !cell.base.contains(&0) {
                cell.base.push(0);
            }
            // Who read it may have read what had come and could not be put into the file.
            cell.seen = None;
        }
    }

    /// Whether a read that began at `began` may have found this.
    pub fn check_read(&mut self, offset: u64, data: &[u8], began: u64) -> Result<(), String> {
        let cells = cells_of(offset, data.len() as u64);
        if cells.end * CELL > self.base.len() {
            return Err(format!("byte {offset} is behind the end of what is known of it"));
        }
        let first = cells.start;
        let mut at = cells.start;
        let mut cooled = Vec::new();
        let part = |cells: Range<usize>| &data[(cells.start - first) * CELL..(cells.end - first) * CELL];
        for (hot, cell) in self.hot.range_mut(cells.clone()) {
            check_cold(&self.base, at, part(at..*hot))?;
            at = hot + 1;
            let found = tag_of(part(*hot..at));
            let allowed = cell.allowed(began);
            let Some(found) = found.filter(|found| allowed.contains(found)) else {
                return Err(format!(
                    "byte {}: {} was read, {} allowed",
                    hot * CELL,
                    shown(part(*hot..at)),
                    allowed.iter().map(|tag| format!("{tag:#x}")).collect::<Vec<_>>().join(" or ")
                ));
            };
            // A read that began before may have found what came and was not kept.
            if self.forgotten < began && cell.writes.iter().all(|write| write.end < began) {
                if let Some(seen) = cell.seen.filter(|seen| *seen != found) {
                    let at = hot * CELL;
                    return Err(format!("byte {at}: {seen:#x} was read before, {found:#x} now, and nobody wrote"));
                }
                cell.seen = Some(found);
                if cell.writes.is_empty() {
                    cell.base = vec![found];
                    cooled.push(*hot);
                }
            }
        }
        check_cold(&self.base, at, part(at..cells.end))?;
        for hot in cooled {
            if let Some(cell) = self.hot.remove(&hot) {
                self.base[hot * CELL..(hot + 1) * CELL].copy_from_slice(&fill(cell.base[0], CELL));
            }
        }
        Ok(())
    }

    /// Whether a range may be said to read as zeros by a question that was asked at `began`.
    pub fn check_zero(&self, offset: u64, len_bytes: u64, began: u64) -> Result<(), String> {
        for at in cells_of(offset, len_bytes) {
            let may_be_zero = match self.hot.get(&at) {
                Some(cell) => cell.allowed(began).contains(&0),
                None => self.base[at * CELL..(at + 1) * CELL] == [0; CELL],
            };
            if !may_be_zero {
                return Err(format!("byte {} is said to be zero, and is not", at * CELL));
            }
        }
        Ok(())
    }
}

fn check_cold(base: &[u8], at: usize, data: &[u8]) -> Result<(), String> {
    let expected = &base[at * CELL..][..data.len()];
    if expected == data {
        return Ok(());
    }
    let wrong =
        expected.chunks(CELL).zip(data.chunks(CELL)).position(|(expected, found)| expected != found).unwrap_or(0);
    let bytes = wrong * CELL..(wrong + 1) * CELL;
    Err(format!(
        "byte {}: {} was read, {} is there",
        at * CELL + bytes.start,
        shown(&data[bytes.clone()]),
        shown(&expected[bytes])
    ))
}

fn shown(cell: &[u8]) -> String {
    match tag_of(cell) {
        Some(0) => "zero".into(),
        Some(tag) => format!("{tag:#x}"),
        None => format!("a torn cell {cell:02x?}"),
    }
}
