//! The client that reads and writes a volume while it moves, and knows what every byte has to be: the source image's, or
//! what it wrote last. That knowledge is a file of its own, so that the whole disk can be compared afterwards.
//! Must not know sites, or how far the volume is.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;

use blockferry_lab::nbd::NbdClient;
use blockferry_lab::process::check_interrupt;
use blockferry_lab::random::Random;

/// Connections, each with one request at a time.
const WORKERS: usize = 2;
/// The longest read or write.
const LONGEST_BYTES: u64 = 64 << 10;
/// The longest pause between two requests of a connection.
const LONGEST_PAUSE_MS: u64 = 24;
/// So many slow reads are listed.
const SLOWEST: usize = 12;
/// How long the export may take to be there at all.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a client is to do.
#[derive(Clone)]
pub struct Task {
    /// The volume's name.
    pub export: String,
    /// The destination's NBD socket.
    pub socket: PathBuf,
    /// A copy of the source image, into which the client writes what it wrote to the volume.
    pub expected: PathBuf,
    /// The volume's block size.
    pub block_bytes: u64,
    /// No shorter read can have crossed the WAN.
    pub rtt: Duration,
    /// Decides what is read and written.
    pub seed: u64,
}

/// A client at work.
pub struct Guest {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<Result<Record>>>,
}

/// What a client did. All that it read was right.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GuestReport {
    /// From the start to the first answered read.
    pub first_read_s: f64,
    /// Reads, each compared with what it had to be.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes, WRITE_ZEROES included.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Writes with FUA.
    pub fua_writes: u64,
    /// FLUSHes.
    pub flushes: u64,
    /// Reads inside one block that took a round trip or more: those that crossed the WAN.
    pub wan_reads: Latency,
    /// Reads over the edge of a block that took a round trip or more: two blocks may have had to come.
    pub wan_reads_of_two: Latency,
    /// All other reads.
    pub local_reads: Latency,
    /// Writes.
    pub write_latency: Latency,
    /// The slowest of `wan_reads`, to see whether they come together: when, after the start, and how long.
    pub slowest: Vec<SlowRead>,
}

/// A read, as [`GuestReport::slowest`] lists it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SlowRead {
    /// When it was asked, since the start.
    pub at_s: f64,
    /// How long it took.
    pub took_ms: f64,
    /// The block.
    pub block: u64,
}

/// A distribution of times in milliseconds; all 0 where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// How many.
    pub count: usize,
    /// The median.
    pub p50_ms: f64,
    /// 99 of 100 took no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Latency {
    fn of(mut times: Vec<Duration>) -> Latency {
        times.sort_unstable();
        // Nearest rank.
        let at = |percent: usize| (times.len() * percent).div_ceil(100).saturating_sub(1);
        let ms = |place: usize| times.get(place).map_or(0.0, |time| time.as_secs_f64() * 1000.0);
        Latency { count: times.len(), p50_ms: ms(at(50)), p99_ms: ms(at(99)), max_ms: ms(times.len().wrapping_sub(1)) }
    }
}

impl Guest {
    /// Starts the client; it tries to open the export until it is there.
    pub fn start(task: &Task) -> Guest {
        let (stop, busy) = (Arc::new(AtomicBool::new(false)), Arc::new(Busy::default()));
        let workers = (0..WORKERS)
            .map(|place| {
                let (task, stop, busy) = (task.clone(), stop.clone(), busy.clone());
                let started = Instant::now();
                thread::spawn(move || {
                    let worked = work(&task, place, started, &stop, &busy);
                    worked.with_context(|| format!("{}: the NBD client failed", task.export))
                })
            })
            .collect();
        Guest { stop, workers }
    }

    /// Fails when the client has failed.
    pub fn has_ended(&self) -> bool {
        self.workers.iter().any(JoinHandle::is_finished)
    }

    /// Ends the client after a FLUSH.
    ///
    /// # Errors
    /// The first thing that went wrong while it worked: a wrong byte, a refused request, a lost connection.
    pub fn finish(self) -> Result<GuestReport> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Record::default();
        let mut first_read = Duration::MAX;
        for worker in self.workers {
            let record = worker.join().map_err(|_| anyhow!("the NBD client panicked"))??;
            first_read = first_read.min(record.first_read.unwrap_or(Duration::MAX));
            all.add(record);
        }
        let mut report = all.report;
        report.first_read_s = first_read.as_secs_f64();
        all.wan.sort_by_key(|read| std::cmp::Reverse(read.took));
        report.slowest = all.wan.iter().take(SLOWEST).map(Read::as_slow).collect();
        report.wan_reads = Latency::of(all.wan.iter().map(|read| read.took).collect());
        report.wan_reads_of_two = Latency::of(all.wan_of_two);
        report.local_reads = Latency::of(all.local);
        report.write_latency = Latency::of(all.writes);
        Ok(report)
    }
}

#[derive(Default)]
struct Record {
    first_read: Option<Duration>,
    report: GuestReport,
    wan: Vec<Read>,
    wan_of_two: Vec<Duration>,
    local: Vec<Duration>,
    writes: Vec<Duration>,
}

struct Read {
    at: Duration,
    took: Duration,
    block: u64,
}

impl Read {
    fn as_slow(&self) -> SlowRead {
        SlowRead { at_s: self.at.as_secs_f64(), took_ms: self.took.as_secs_f64() * 1000.0, block: self.block }
    }
}

impl Record {
    fn add(&mut self, other: Record) {
        self.report.reads += other.report.reads;
        self.report.read_bytes += other.report.read_bytes;
        self.report.writes += other.report.writes;
        self.report.written_bytes += other.report.written_bytes;
        self.report.fua_writes += other.report.fua_writes;
        self.report.flushes += other.report.flushes;
        self.wan.extend(other.wan);
        self.wan_of_two.extend(other.wan_of_two);
        self.local.extend(other.local);
        self.writes.extend(other.writes);
    }
}

/// What each connection is about to read or write: no two at once, or nobody could say what a read has to give.
#[derive(Default)]
struct Busy(Mutex<[Range<u64>; WORKERS]>);

impl Busy {
    fn take(&self, place: usize, wanted: &Range<u64>) -> bool {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let clash = |other: &Range<u64>| other.start < wanted.end && wanted.start < other.end;
        let free = !ranges.iter().enumerate().any(|(at, other)| at != place && clash(other));
        ranges[place] = if free { wanted.clone() } else { 0..0 };
        free
    }
}

fn work(task: &Task, place: usize, started: Instant, stop: &AtomicBool, busy: &Busy) -> Result<Record> {
    let mut nbd = open(task, started)?;
    let expected = open_expected(&task.expected, nbd.size_bytes())?;
    let mut random = Random::new(task.seed.wrapping_mul(WORKERS as u64).wrapping_add(place as u64));
    let mut record = Record::default();
    let mut bytes = vec![0; LONGEST_BYTES as usize];
    let mut wanted = vec![0; LONGEST_BYTES as usize];
    while !stop.load(Ordering::Relaxed) {
        check_interrupt()?;
        let range = choose(&mut random, nbd.size_bytes(), task.block_bytes);
        if !busy.take(place, &range) {
            continue;
        }
        let (offset, length) = (range.start, (range.end - range.start) as usize);
        let bytes = &mut bytes[..length];
        // The first request is a read: it tells when the volume was there.
        let kind = if record.report.reads == 0 { 0 } else { random.below(100) };
        let began = Instant::now();
        match kind {
            0..60 => {
                nbd.read(offset, bytes).with_context(|| format!("reading {length} bytes at {offset}"))?;
                let took = began.elapsed();
                expected.read_exact_at(&mut wanted[..length], offset).context("reading the expected image")?;
                if let Some(at) = (0..length).find(|at| bytes[*at] != wanted[*at]) {
                    let (is, should) = (bytes[at], wanted[at]);
                    let byte = offset + at as u64;
                    bail!(
                        "WRONG DATA: byte {byte} is {is:#04x} and should be {should:#04x} (read of {length} at {offset})"
                    );
                }
                record.first_read.get_or_insert_with(|| started.elapsed());
                record.report.reads += 1;
                record.report.read_bytes += length as u64;
                let block = offset / task.block_bytes;
                match (took >= task.rtt, block == (range.end - 1) / task.block_bytes) {
                    (true, true) => record.wan.push(Read { at: began - started, took, block }),
                    (true, false) => record.wan_of_two.push(took),
                    (false, _) => record.local.push(took),
                }
            }
            60..97 => {
                let (zero, fua) = (random.below(20) == 0, random.below(10) == 0);
                let context = || format!("writing {length} bytes at {offset}");
                if zero {
                    bytes.fill(0);
                    nbd.write_zeroes(offset, length as u32, false).with_context(context)?;
                } else {
                    random.fill(bytes);
                    nbd.write(offset, bytes, fua).with_context(context)?;
                    record.report.fua_writes += u64::from(fua);
                }
                record.writes.push(began.elapsed());
                expected.write_all_at(bytes, offset).context("writing the expected image")?;
                record.report.writes += 1;
                record.report.written_bytes += length as u64;
            }
            _ => {
                nbd.flush().context("FLUSH")?;
                record.report.flushes += 1;
            }
        }
        thread::sleep(Duration::from_millis(random.below(LONGEST_PAUSE_MS + 1)));
    }
    nbd.flush().context("FLUSH")?;
    record.report.flushes += 1;
    nbd.disconnect().context("taking leave")?;
    Ok(record)
}

/// 4 KiB to 64 KiB: half of it as file systems ask, whole pages inside one block; half at any sector.
fn choose(random: &mut Random, size_bytes: u64, block_bytes: u64) -> Range<u64> {
    let whole_pages = random.below(2) == 0;
    let unit = if whole_pages { 4096 } else { 512 };
    let length = (4096 + random.below((LONGEST_BYTES - 4096) / unit + 1) * unit).min(size_bytes).min(block_bytes);
    let mut offset = random.below((size_bytes - length) / unit + 1) * unit;
    if whole_pages {
        let block = offset / block_bytes * block_bytes;
        offset = offset.min(block + block_bytes - length);
    }
    offset..offset + length
}

fn open(task: &Task, started: Instant) -> Result<NbdClient> {
    loop {
        check_interrupt()?;
        match NbdClient::open(&task.socket, &task.export) {
            Ok(nbd) => return Ok(nbd),
            Err(error) if started.elapsed() > PATIENCE => {
                let patience = PATIENCE.as_secs();
                return Err(error).context(format!("the export is not there after {patience} s"));
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn open_expected(path: &Path, size_bytes: u64) -> Result<File> {
    let context = || format!("cannot open {}", path.display());
    let file = File::options().read(true).write(true).open(path).with_context(context)?;
    let length = file.metadata().with_context(context)?.len();
    if length != size_bytes {
        bail!("the export has {size_bytes} bytes, the image {length}");
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_in_the_disk_and_half_of_them_in_one_block() {
        let mut random = Random::new(1);
        let (size, block) = (1 << 20, 65_536);
        let mut within = 0;
        for _ in 0..1000 {
            let range = choose(&mut random, size, block);
            let length = range.end - range.start;
            assert!(
                range.end <= size && (4096..=65_536).contains(&length) && range.start.is_multiple_of(512),
                "{range:?}"
            );
            within += usize::from(range.start / block == (range.end - 1) / block);
        }
        assert!((500..900).contains(&within), "{within}");
        let range = choose(&mut random, 4096, block);
        assert_eq!(range, 0..4096);
    }

    #[test]
    fn overlapping_requests_are_not_made_at_once() {
        let busy = Busy::default();
        assert!(busy.take(0, &(0..10)));
        assert!(!busy.take(1, &(9..11)));
        assert!(busy.take(1, &(10..11)));
        assert!(busy.take(0, &(0..10)));
    }

    #[test]
    fn percentiles_are_the_nearest_rank() {
        let times = (1..=200).map(Duration::from_millis).collect();
        let latency = Latency::of(times);
        assert_eq!((latency.count, latency.p50_ms, latency.p99_ms, latency.max_ms), (200, 100.0, 198.0, 200.0));
        assert_eq!(Latency::of(Vec::new()), Latency::default());
    }
}
