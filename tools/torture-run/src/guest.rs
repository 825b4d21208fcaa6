//! The clients: several connections that read and write the volume at the same time, each with one request under way, and
//! never two of them for the same bytes. They go on until they are told to stop, or the server dies under them.
//! Must not know sites, or why the server dies.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use blockferry_lab::nbd::{NbdClient, NbdError};
use blockferry_lab::process::check_interrupt;
use blockferry_lab::random::Random;

use crate::model::{Change, Loss, Model, Originals};
use crate::record::{self, SECTOR_BYTES};

/// Connections.
const CLIENTS: usize = 4;
const BLOCK_BYTES: u64 = 64 << 10;
/// The longest read or write: over several blocks.
const LONGEST_BYTES: u64 = 300 << 10;
/// The longest pause between two requests of a client.
const LONGEST_PAUSE_MS: u64 = 12;
/// How long an export may take to be there after the server is.
const PATIENCE: Duration = Duration::from_secs(30);
/// So many losses are listed.
const MOST_LOSSES: usize = 20;

/// A disk and what has become of it: outlives its clients.
pub struct Disk {
    number: u64,
    model: Mutex<Model>,
    sequence: AtomicU64,
    losses: Mutex<Vec<Loss>>,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
}

/// What the clients of a disk did, as far as it was acknowledged.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Done {
    /// Reads, each compared.
    pub reads: u64,
    /// Writes, WRITE_ZEROES and TRIM among them.
    pub writes: u64,
    /// FLUSHes.
    pub flushes: u64,
}

impl std::ops::Add for Done {
    type Output = Done;
    fn add(self, other: Done) -> Done {
        Done {
            reads: self.reads + other.reads,
            writes: self.writes + other.writes,
            flushes: self.flushes + other.flushes,
        }
    }
}

impl Disk {
    /// The disk of this number, with these bytes; `others`: what an earlier disk held.
    pub fn new(number: u64, bytes: Vec<u8>, others: Option<Originals>) -> Arc<Disk> {
        Arc::new(Disk {
            number,
            model: Mutex::new(Model::new(number, bytes, others)),
            sequence: AtomicU64::new(0),
            losses: Mutex::default(),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        })
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The number of the next write to it.
    pub fn next_sequence(&self) -> u64 {
        record::sequence(self.number, self.sequence.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// What its bytes have to be.
    pub fn model(&self) -> MutexGuard<'_, Model> {
        locked(&self.model)
    }

    /// Notes bytes that are wrong.
    pub fn note(&self, checked: Result<(), Loss>) {
        if let Err(loss) = checked {
            let mut losses = locked(&self.losses);
            if losses.len() < MOST_LOSSES {
                losses.push(loss);
            }
        }
    }

    /// What was wrong so far; taken out.
    pub fn take_losses(&self) -> Vec<Loss> {
        std::mem::take(&mut locked(&self.losses))
    }

    /// What was done so far.
    pub fn done(&self) -> Done {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        Done { reads: count(&self.reads), writes: count(&self.writes), flushes: count(&self.flushes) }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Clients at work.
pub struct Guest {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Result<Option<Change>>>>,
}

struct Shared {
    disk: Arc<Disk>,
    socket: PathBuf,
    export: String,
    stop: AtomicBool,
    /// The server is about to be killed: lost connections are what is wanted.
    is_end_near: AtomicBool,
    busy: Mutex<[Range<u64>; CLIENTS]>,
}

impl Guest {
    /// Starts them. All that they do depends on `seed` and on how fast they are answered.
    pub fn start(disk: &Arc<Disk>, socket: PathBuf, export: &str, seed: u64) -> Guest {
        let shared = Arc::new(Shared {
            disk: Arc::clone(disk),
            socket,
            export: export.to_owned(),
            stop: AtomicBool::new(false),
            is_end_near: AtomicBool::new(false),
            busy: Mutex::default(),
        });
        let clients = (0..CLIENTS)
            .map(|place| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let random = Random::new(seed.wrapping_mul(CLIENTS as u64).wrapping_add(place as u64));
                    Client { shared: &shared, place, random }.work()
                })
            })
            .collect();
        Guest { shared, clients }
    }

    /// Whether one of them has ended, which none should while the server lives.
    pub fn has_ended(&self) -> bool {
        self.clients.iter().any(JoinHandle::is_finished)
    }

    /// The server is going to be killed: whoever loses it is not at fault from here on.
    pub fn expect_the_end(&self) {
        self.shared.is_end_near.store(true, Ordering::SeqCst);
    }

    /// They end after their requests under way.
    pub fn ask_to_stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for their end; the changes that were under way and never acknowledged.
    ///
    /// # Errors
    /// When one was refused something, or lost the server although it lived.
    pub fn end(self) -> Result<Vec<Change>> {
        let ends: Vec<_> = self.clients.into_iter().map(JoinHandle::join).collect();
        let mut open = Vec::new();
        for end in ends {
            open.extend(end.map_err(|_| anyhow!("a client panicked"))??);
        }
        Ok(open)
    }
}

struct Client<'a> {
    shared: &'a Shared,
    place: usize,
    random: Random,
}

/// What a client asks for next.
enum Request {
    Read(Range<u64>),
    Change { change: Change, is_fua: bool, is_trim: bool },
    Flush,
}

impl Client<'_> {
    fn work(mut self) -> Result<Option<Change>> {
        let mut nbd = match self.open() {
            Ok(nbd) => nbd,
            Err(_) if self.shared.is_end_near.load(Ordering::SeqCst) => return Ok(None),
            Err(error) => return Err(error),
        };
        while !self.shared.stop.load(Ordering::Relaxed) {
            check_interrupt()?;
            let Some(request) = self.choose(nbd.size_bytes()) else { continue };
            if let Err(error) = self.ask(&mut nbd, &request) {
                // An answer that is an error is no lost connection; only a server that is told to end may give one.
                let is_lost = !error.get_ref().is_some_and(|inner| inner.is::<NbdError>());
                if !self.shared.is_end_near.load(Ordering::SeqCst) {
                    let what = if is_lost { "the server hung up" } else { "the server refused" };
                    return Err(error).context(format!("{what}: {}", describe(&request)));
                }
                return Ok(match request {
                    Request::Change { change, .. } => Some(change),
                    Request::Read(_) | Request::Flush => None,
                });
            }
            locked(&self.shared.busy)[self.place] = 0..0;
            let pause_ms = self.random.below(LONGEST_PAUSE_MS + 1);
            thread::sleep(Duration::from_millis(pause_ms));
        }
        // Where it fails the server is gone, which does no harm here.
        let _ = nbd.disconnect();
        Ok(None)
    }

    fn open(&self) -> Result<NbdClient> {
        let begun = Instant::now();
        loop {
            check_interrupt()?;
            match NbdClient::open(&self.shared.socket, &self.shared.export) {
                Ok(nbd) => return Ok(nbd),
                Err(error) if begun.elapsed() > PATIENCE || self.shared.is_end_near.load(Ordering::SeqCst) => {
                    return Err(error).with_context(|| format!("the export {} is not there", self.shared.export));
                }
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn choose(&mut self, size_bytes: u64) -> Option<Request> {
        let kind = self.random.below(100);
        if kind < 6 {
            return Some(Request::Flush);
        }
        let unit = match self.random.below(10) {
            0..3 => 4096,
            3..8 => SECTOR_BYTES,
            8 => BLOCK_BYTES,
            // Begins and ends anywhere.
            _ => 1,
        };
        // TRIM promises nothing about the torn edges of blocks.
        let unit = if (52..56).contains(&kind) { unit.max(SECTOR_BYTES) } else { unit };
        let longest = match self.random.below(8) {
            0 => LONGEST_BYTES,
            1..4 => 32 << 10,
            _ => 4096,
        };
        let length = (1 + self.random.below(longest.div_ceil(unit))) * unit;
        let length = length.min(size_bytes);
        // Half of all requests fall on an eighth of the disk, so that writes meet older ones.
        let end = size_bytes - length + 1;
        let offset =
            if self.random.below(2) == 0 { self.random.below(end.div_ceil(8)) } else { self.random.below(end) };
        let range = offset / unit * unit..offset / unit * unit + length;
        let mut busy = locked(&self.shared.busy);
        let clashes = |other: &Range<u64>| other.start < widened(&range).end && widened(&range).start < other.end;
        if busy.iter().any(clashes) {
            return None;
        }
        busy[self.place] = widened(&range);
        drop(busy);
        if kind < 45 {
            return Some(Request::Read(range));
        }
        let sequence = self.shared.disk.next_sequence();
        let change = Change { sequence, range, is_zeros: kind < 56 };
        Some(Request::Change { change, is_fua: self.random.below(12) == 0, is_trim: (52..56).contains(&kind) })
    }

    fn ask(&mut self, nbd: &mut NbdClient, request: &Request) -> std::io::Result<()> {
        let disk = &self.shared.disk;
        match request {
            Request::Read(range) => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                nbd.read(range.start, &mut bytes)?;
                disk.note(disk.model().check(range.start, &bytes));
                disk.reads.fetch_add(1, Ordering::Relaxed);
            }
            Request::Change { change, is_fua, is_trim } => {
                let (offset, length) = (change.range.start, (change.range.end - change.range.start) as u32);
                if *is_trim {
                    nbd.trim(offset, length)?;
                } else if change.is_zeros {
                    nbd.write_zeroes(offset, length, *is_fua)?;
                } else {
                    let mut bytes = vec![0; length as usize];
                    change.fill(offset, &mut bytes);
                    nbd.write(offset, &bytes, *is_fua)?;
                }
                disk.model().acknowledge(change, *is_fua && !is_trim);
                disk.writes.fetch_add(1, Ordering::Relaxed);
            }
            Request::Flush => {
                let covers = disk.model().begin_flush();
                nbd.flush()?;
                disk.model().end_flush(covers);
                disk.flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// Two writes within one sector would be told apart by nobody.
fn widened(range: &Range<u64>) -> Range<u64> {
    range.start / SECTOR_BYTES * SECTOR_BYTES..range.end.next_multiple_of(SECTOR_BYTES)
}

fn describe(request: &Request) -> String {
    match request {
        Request::Read(range) => format!("READ of bytes {range:?}"),
        Request::Change { change, is_trim: true, .. } => format!("TRIM of bytes {:?}", change.range),
        Request::Change { change, .. } if change.is_zeros => format!("WRITE_ZEROES of bytes {:?}", change.range),
        Request::Change { change, .. } => format!("write {} of bytes {:?}", change.sequence, change.range),
        Request::Flush => "FLUSH".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_in_the_disk_and_apart_from_each_other() {
        let disk = Disk::new(1, vec![0; (1 << 20) + 700], None);
        let shared = Shared {
            disk,
            socket: PathBuf::new(),
            export: String::new(),
            stop: AtomicBool::new(false),
            is_end_near: AtomicBool::new(false),
            busy: Mutex::default(),
        };
        let mut client = Client { shared: &shared, place: 0, random: Random::new(3) };
        locked(&shared.busy)[1] = 4096..8192;
        let (mut misaligned, mut trims) = (0, 0);
        for _ in 0..3000 {
            locked(&shared.busy)[0] = 0..0;
            let range = match client.choose((1 << 20) + 700) {
                Some(Request::Read(range)) => range,
                Some(Request::Change { change, is_trim, .. }) => {
                    trims += u64::from(is_trim);
                    assert!(!is_trim || change.range.start % SECTOR_BYTES == 0);
                    change.range
                }
                Some(Request::Flush) | None => continue,
            };
            assert!(range.start < range.end && range.end <= (1 << 20) + 700, "{range:?}");
            assert!(range.end <= 4096 || range.start >= 8192, "{range:?}");
            misaligned += u64::from(range.start % SECTOR_BYTES != 0);
        }
        assert!(misaligned > 50 && trims > 50, "{misaligned} {trims}");
    }
}
