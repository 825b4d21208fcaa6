//! What every byte of the disk has to be: the image's, or what the last acknowledged write put there. And what a write that
//! was never acknowledged may have left: each sector old or new. Must not know sites, clients or time.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use crate::record::{self, SECTOR_BYTES};

/// The longest piece that is read at once when everything is checked.
const PIECE_BYTES: u64 = 256 << 10;

/// A change of a range of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which disk's, and counts its changes from 1 on: see [`record::sequence`].
    pub sequence: u64,
    /// Where.
    pub range: Range<u64>,
    /// Zeros, by WRITE_ZEROES or TRIM; otherwise a record.
    pub is_zeros: bool,
}

impl Change {
    /// What it puts into these bytes, which lie in its range.
    pub fn fill(&self, offset: u64, into: &mut [u8]) {
        if self.is_zeros { into.fill(0) } else { record::fill(self.sequence, offset, into) }
    }
}

/// Bytes that are not what they have to be: all that is needed to look into it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// The first byte that is wrong.
    pub offset: u64,
    /// The write that has to be there, 0: the image's own bytes.
    pub expected_sequence: u64,
    /// Whether a flush, or FUA, had made that write durable.
    pub was_flushed: bool,
    /// What is there instead, in words.
    pub found: String,
    /// How many sectors of what was read are wrong.
    pub wrong_sectors: u64,
    /// Whether some of them are of another disk.
    pub is_foreign: bool,
}

#[derive(Clone, Copy, Default)]
struct Sector {
    sequence: u64,
    /// The number of the acknowledgement.
    acknowledged: u64,
    is_fua: bool,
}

/// A disk's first bytes, by sector: what another disk must never show.
pub type Originals = Arc<Vec<u64>>;

/// See the module.
pub struct Model {
    /// The number of the disk.
    number: u64,
    /// What an earlier disk held before anybody wrote to it.
    others: Option<Originals>,
    /// What was there at the hand-over, where it was changed since.
    undo: HashMap<usize, (Sector, Vec<u8>)>,
    bytes: Vec<u8>,
    sectors: Vec<Sector>,
    acknowledged: u64,
    flushed: u64,
    /// Acknowledgements up to here were there before this relocation began.
    handed_over: u64,
    /// What was acknowledged since the last check.
    unchecked: Vec<(u64, bool)>,
}

/// What a check after a restart has covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Writes acknowledged since the check before.
    pub writes: u64,
    /// Those of them that a flush or FUA had made durable.
    pub flushed_writes: u64,
    /// Sectors compared, older ones included.
    pub sectors: u64,
}

impl Model {
    /// An image that nobody has written to yet; the bytes of `others` are foreign to it.
    pub fn new(number: u64, bytes: Vec<u8>, others: Option<Originals>) -> Model {
        let sectors = vec![Sector::default(); bytes.len().div_ceil(SECTOR_BYTES as usize)];
        let (unchecked, undo) = (Vec::new(), HashMap::new());
        Model { number, others, undo, bytes, sectors, acknowledged: 0, flushed: 0, handed_over: 0, unchecked }
    }

    /// What it holds, to be told from other disks.
    pub fn originals(&self) -> Originals {
        Arc::new(self.bytes.chunks(SECTOR_BYTES as usize).map(digest).collect())
    }

    /// The disk's size.
    pub fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The disk.
    #[cfg(test)]
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A change was acknowledged.
    pub fn acknowledge(&mut self, change: &Change, is_fua: bool) {
        self.acknowledged += 1;
        self.unchecked.push((self.acknowledged, is_fua));
        self.apply(change, change.range.clone(), is_fua);
    }

    fn apply(&mut self, change: &Change, range: Range<u64>, is_fua: bool) {
        for at in sectors(&range) {
            let (bytes, sector) = (&self.bytes[span(at, self.bytes.len())], self.sectors[at]);
            self.undo.entry(at).or_insert_with(|| (sector, bytes.to_vec()));
        }
        change.fill(range.start, &mut self.bytes[range.start as usize..range.end as usize]);
        let sector = Sector { sequence: change.sequence, acknowledged: self.acknowledged, is_fua };
        self.sectors[sectors(&range)].fill(sector);
    }

    /// What a flush that begins now covers.
    pub fn begin_flush(&self) -> u64 {
        self.acknowledged
    }

    /// The flush that covers so much was acknowledged.
    pub fn end_flush(&mut self, covers: u64) {
        self.flushed = self.flushed.max(covers);
    }

    /// From now on only what is written counts as written here.
    pub fn hand_over(&mut self) {
        self.handed_over = self.acknowledged;
        self.flushed = self.acknowledged;
        self.unchecked.clear();
        self.undo.clear();
    }

    /// Whether something was acknowledged since the hand-over.
    pub fn is_written(&self) -> bool {
        self.acknowledged > self.handed_over
    }

    /// Everything since the hand-over is thrown away: a person said so.
    pub fn roll_back(&mut self) {
        for (at, (sector, bytes)) in std::mem::take(&mut self.undo) {
            let span = span(at, self.bytes.len());
            self.bytes[span].copy_from_slice(&bytes);
            self.sectors[at] = sector;
        }
        self.hand_over();
    }

    /// The source is given up: whole sectors that nobody wrote since the hand-over may read as zeros, and stay so then. How
    /// many bytes became zeros.
    pub fn give_up_absent(&mut self, offset: u64, read: &[u8]) -> (u64, Result<(), Loss>) {
        let (mut gone, mut checked) = (0, Ok(()));
        for at in sectors(&(offset..offset + read.len() as u64)) {
            let span = span(at, self.bytes.len());
            let is = &read[span.start - offset as usize..span.end - offset as usize];
            if is == &self.bytes[span.clone()] {
                continue;
            }
            if self.sectors[at].acknowledged <= self.handed_over && is.iter().all(|byte| *byte == 0) {
                gone += is.len() as u64;
                self.bytes[span].fill(0);
                self.sectors[at].sequence = 0;
            } else if checked.is_ok() {
                checked = self.check(span.start as u64, is);
            }
        }
        (gone, checked)
    }

    /// What was read has to be this.
    pub fn check(&self, offset: u64, read: &[u8]) -> Result<(), Loss> {
        let expected = &self.bytes[offset as usize..offset as usize + read.len()];
        if read == expected {
            return Ok(());
        }
        let wrong = (0..read.len()).filter(|at| read[*at] != expected[*at]);
        let wrong: Vec<u64> = wrong.map(|at| offset + at as u64).collect();
        let mut of: Vec<u64> = wrong.iter().map(|at| at / SECTOR_BYTES).collect();
        of.dedup();
        let first = wrong.first().copied().unwrap_or(offset);
        let sector = self.sectors[(first / SECTOR_BYTES) as usize];
        Err(Loss {
            offset: first,
            expected_sequence: sector.sequence,
            was_flushed: sector.sequence > 0 && (sector.is_fua || sector.acknowledged <= self.flushed),
            found: found(first, offset, read),
            wrong_sectors: of.len() as u64,
            is_foreign: of.iter().any(|at| self.is_foreign(*at as usize, offset, read)),
        })
    }

    /// Whether a sector holds what belongs to another disk.
    fn is_foreign(&self, at: usize, offset: u64, read: &[u8]) -> bool {
        let span = span(at, self.bytes.len());
        let (Some(from), Some(to)) = (span.start.checked_sub(offset as usize), span.end.checked_sub(offset as usize))
        else {
            return false;
        };
        let Some(is) = read.get(from..to).filter(|is| is.iter().any(|byte| *byte != 0)) else { return false };
        match record::read(is) {
            Some((sequence, _)) => record::parts(sequence).0 != self.number,
            None => self.others.as_ref().and_then(|others| others.get(at)) == Some(&digest(is)),
        }
    }

    /// A change that was under way when its client lost the server: what `read` finds in its range, whole sectors from
    /// `offset` on, must be old or new, sector by sector; from now on it has to stay so.
    pub fn settle(&mut self, change: &Change, offset: u64, read: &[u8]) -> Result<(), Loss> {
        for at in sectors(&change.range) {
            let start = (at as u64 * SECTOR_BYTES).max(offset);
            let end = ((at as u64 + 1) * SECTOR_BYTES).min(self.size_bytes());
            let is = &read[(start - offset) as usize..(end - offset) as usize];
            let mut new = self.bytes[start as usize..end as usize].to_vec();
            let within = start.max(change.range.start)..end.min(change.range.end);
            change.fill(within.start, &mut new[(within.start - start) as usize..(within.end - start) as usize]);
            if is == new {
                self.apply(change, within, false);
            } else {
                self.check(start, is)?;
            }
        }
        Ok(())
    }

    /// The pieces that were written since the relocation began: all of them can be read without its source.
    pub fn written(&self) -> Vec<(u64, u32)> {
        let mut pieces: Vec<(u64, u32)> = Vec::new();
        for (at, sector) in self.sectors.iter().enumerate() {
            if sector.acknowledged <= self.handed_over {
                continue;
            }
            let start = at as u64 * SECTOR_BYTES;
            let length = SECTOR_BYTES.min(self.size_bytes() - start);
            match pieces.last_mut() {
                Some((from, so_far)) if *from + u64::from(*so_far) == start && u64::from(*so_far) < PIECE_BYTES => {
                    *so_far += length as u32;
                }
                _ => pieces.push((start, length as u32)),
            }
        }
        pieces
    }

    /// Whether nothing was written there since the relocation began.
    pub fn is_untouched(&self, range: &Range<u64>) -> bool {
        self.sectors[sectors(range)].iter().all(|sector| sector.acknowledged <= self.handed_over)
    }

    /// Everything acknowledged has been checked.
    pub fn note_checked(&mut self, sectors: u64) -> Checked {
        let flushed = self.unchecked.iter().filter(|(number, is_fua)| *is_fua || *number <= self.flushed).count();
        let writes = std::mem::take(&mut self.unchecked).len() as u64;
        Checked { writes, flushed_writes: flushed as u64, sectors }
    }
}

fn sectors(range: &Range<u64>) -> Range<usize> {
    (range.start / SECTOR_BYTES) as usize..range.end.div_ceil(SECTOR_BYTES) as usize
}

fn span(sector: usize, size_bytes: usize) -> Range<usize> {
    let start = sector * SECTOR_BYTES as usize;
    start..(start + SECTOR_BYTES as usize).min(size_bytes)
}

fn digest(bytes: &[u8]) -> u64 {
    blake3::hash(bytes).as_bytes()[..8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// A write's number, for people.
pub fn words(sequence: u64) -> String {
    let (disk, write) = record::parts(sequence);
    if write == 0 { format!("the first bytes of disk {disk}") } else { format!("write {write} of disk {disk}") }
}

fn found(first: u64, offset: u64, read: &[u8]) -> String {
    let start = first / SECTOR_BYTES * SECTOR_BYTES;
    let from = start.max(offset);
    let end = (start + SECTOR_BYTES).min(offset + read.len() as u64);
    let is = &read[(from - offset) as usize..(end - offset) as usize];
    match record::read(is) {
        Some((sequence, place)) if place * SECTOR_BYTES == start => words(sequence),
        Some((sequence, place)) => format!("{}, made for byte {}", words(sequence), place * SECTOR_BYTES),
        None if is.iter().all(|byte| *byte == 0) => "zeros".to_owned(),
        None => {
            let some: Vec<String> = is.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
            format!("no whole record: {} ...", some.join(" "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(sequence: u64, range: Range<u64>) -> Change {
        Change { sequence, range, is_zeros: false }
    }

    fn bytes_of(change: &Change) -> Vec<u8> {
        let mut bytes = vec![0; (change.range.end - change.range.start) as usize];
        change.fill(change.range.start, &mut bytes);
        bytes
    }

    #[test]
    fn a_lost_write_is_named_with_what_is_there_instead() {
        let mut model = Model::new(0, vec![9; 8192], None);
        let (first, second) = (change(1, 1024..4096), change(2, 2048..3072));
        model.acknowledge(&first, false);
        let covers = model.begin_flush();
        model.acknowledge(&second, false);
        model.end_flush(covers);
        let loss = model.check(1024, &bytes_of(&first)).unwrap_err();
        assert_eq!((loss.offset >= 2048, loss.expected_sequence, loss.was_flushed), (true, 2, false));
        assert_eq!((loss.found.as_str(), loss.wrong_sectors), ("write 1 of disk 0", 2));
        let loss = model.check(1024, &[0; 512]).unwrap_err();
        assert_eq!((loss.expected_sequence, loss.was_flushed, loss.found.as_str()), (1, true, "zeros"));
        assert_eq!(model.written(), [(1024, 3072)]);
        assert!(model.is_untouched(&(4096..8192)) && !model.is_untouched(&(4000..8192)));
        assert_eq!(model.note_checked(6), Checked { writes: 2, flushed_writes: 1, sectors: 6 });
        assert_eq!(model.note_checked(6).writes, 0);
    }

    #[test]
    fn what_was_not_acknowledged_is_old_or_new_by_sector_and_nothing_else() {
        let mut model = Model::new(0, vec![9; 4096], None);
        let torn = change(1, 700..2000);
        let mut read = vec![9; 2048 - 512];
        torn.fill(700, &mut read[188..512]);
        model.settle(&torn, 512, &read).unwrap();
        assert_eq!(model.bytes()[512..2048], read, "from now on it has to stay so");
        read[600] ^= 1;
        let loss = model.settle(&torn, 512, &read).unwrap_err();
        assert_eq!(loss.offset, 512 + 600);
    }

    #[test]
    fn what_was_there_before_the_hand_over_is_not_looked_for_at_the_destination() {
        let mut model = Model::new(0, vec![0; 4096], None);
        model.acknowledge(&change(1, 0..512), true);
        model.hand_over();
        assert!(model.written().is_empty() && model.is_untouched(&(0..4096)));
        model.acknowledge(&Change { sequence: 2, range: 512..600, is_zeros: true }, true);
        assert_eq!(model.written(), [(512, 512)]);
        assert_eq!(model.note_checked(1), Checked { writes: 1, flushed_writes: 1, sectors: 1 });
    }

    #[test]
    fn what_is_discarded_is_as_it_was_at_the_hand_over() {
        let mut model = Model::new(0, vec![9; 4096], None);
        model.acknowledge(&change(1, 0..1000), true);
        model.hand_over();
        let before = model.bytes().to_vec();
        model.acknowledge(&change(2, 300..2000), true);
        model.acknowledge(&change(3, 512..600), true);
        assert!(model.is_written());
        model.roll_back();
        assert_eq!(model.bytes(), before);
        assert!(!model.is_written() && model.written().is_empty());
        let loss = model.check(0, &[0; 512]).unwrap_err();
        assert_eq!((loss.expected_sequence, loss.was_flushed), (1, true));
    }

    #[test]
    fn what_never_arrived_may_be_zeros_and_nothing_else() {
        let mut model = Model::new(0, vec![9; 2048], None);
        model.acknowledge(&change(1, 512..1024), true);
        let mut read = vec![0; 2048];
        change(1, 512..1024).fill(512, &mut read[512..1024]);
        let (gone, checked) = model.give_up_absent(0, &read);
        assert_eq!((gone, checked), (1536, Ok(())));
        assert_eq!(model.bytes(), read, "and stays so");
        read[512..1024].fill(0);
        let loss = model.give_up_absent(0, &read).1.unwrap_err();
        assert_eq!((loss.offset, loss.expected_sequence), (512, 1));
    }

    #[test]
    fn bytes_of_another_disk_are_told_from_older_ones() {
        let first = Model::new(1, vec![9; 4096], None);
        let mut model = Model::new(2, vec![5; 4096], Some(first.originals()));
        let write = |disk, write| Change { sequence: record::sequence(disk, write), range: 0..512, is_zeros: false };
        model.acknowledge(&write(2, 8), true);
        let foreign = |read: &[u8]| model.check(0, read).unwrap_err().is_foreign;
        assert!(foreign(&bytes_of(&write(1, 8))), "a write to another disk");
        assert!(foreign(&[9; 512]), "what another disk held");
        assert!(!foreign(&bytes_of(&write(2, 7))) && !foreign(&[5; 512]) && !foreign(&[0; 512]));
    }
}
