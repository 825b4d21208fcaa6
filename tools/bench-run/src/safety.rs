//! What safety costs: 4 KiB written and flushed, again and again, on volumes in relocation, on complete ones, and on
//! qemu-nbd over files of the same file system; each where the file has its room already, and where it is a hole. In turns,
//! so that whatever else the machine does hits all of them.
//! Must not know the results of others.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use blockferry_lab::nbd::NbdClient;
use blockferry_lab::process::{Daemon, catch_signals, check_interrupt};
use blockferry_lab::random::Random;
use blockferry_lab::run_dir::{RunDir, home_dir, require_room};
use blockferry_lab::site::{Programs, Site};
use serde::Serialize;

use crate::figures::{at, mean, middle};
use crate::{SafetyOptions, servers};

const SIZE_BYTES: u64 = 256 << 20;
const PAGE_BYTES: u64 = 4096;
/// Writes of a turn that are not counted.
const WARM_UP: usize = 5;

/// One row of the table.
#[derive(Serialize)]
struct Row {
    /// What was written to.
    what: &'static str,
    /// Of all writes with their flushes.
    mean_us: f64,
    /// The middle one.
    median_us: f64,
    /// 99 of 100 took no longer.
    p99_us: f64,
    /// What it is compared with.
    against: Option<&'static str>,
    /// The middle of the rounds' ratios of means. Not of medians: a sync takes one of two times here and there, a fifth of a
    /// millisecond or a tick of the kernel's clock, and two syncs in a row mostly meet the long one.
    ratio: Option<f64>,
    /// What the ratio should be at most.
    aim: Option<f64>,
}

/// An export under measurement.
struct Target {
    what: &'static str,
    /// The place of what it is compared with, and the aim.
    against: Option<(usize, f64)>,
    nbd: NbdClient,
    /// Bytes of the export that are written to.
    range: std::ops::Range<u64>,
    /// All, in microseconds.
    all: Vec<f64>,
    /// The mean of each round.
    rounds: Vec<f64>,
}

/// Measures, prints a table, writes `safety.json`.
///
/// # Errors
/// When it cannot be run to its end.
pub fn run(options: &SafetyOptions) -> Result<()> {
    catch_signals()?;
    let programs = Programs::find(options.places.programs.as_deref())?;
    let home = home_dir(options.places.dir.as_deref(), "bench")?;
    require_room(&home, SIZE_BYTES * 8, "say --dir DIR")?;
    let run_dir = RunDir::make(&home, false)?;
    let dir = run_dir.path();

    let mut a = Site::init(&programs, dir, "a")?;
    let mut b = Site::init(&programs, dir, "b")?;
    a.configure(&b, None, "")?;
    a.start()?;
    b.configure(&a, Some(a.peer_address()), "")?;
    b.start()?;
    // Of whatever does not shrink to zeros: blocks that are absent, and blocks that have arrived.
    for name in ["absent", "arrived"] {
        let image = filled(dir, &format!("{name}-at-a.raw"))?;
        a.ask(&["volume", "add", name, "--image", &text(&image)])?;
        let arriving = text(&dir.join(format!("{name}-at-b.raw")));
        b.ask(&["relocate", &format!("a/{name}"), "--no-bulk", "--image", &arriving])?;
    }
    let arrived = SIZE_BYTES / 2;
    read_all(&b, "arrived", arrived)?;
    for (name, image) in [("full", filled(dir, "full.raw")?), ("sparse", sparse(dir, "sparse.raw")?)] {
        b.ask(&["volume", "add", name, "--image", &text(&image)])?;
    }
    let _qemu_full = qemu_nbd(dir, "qemu-full", &filled(dir, "qemu-full.raw")?)?;
    let _qemu_sparse = qemu_nbd(dir, "qemu-sparse", &sparse(dir, "qemu-sparse.raw")?)?;

    let whole = 0..arrived;
    let at_b = |name: &str| servers::open(&b.nbd_socket(), name, None);
    let qemu = |name: &str| servers::open(&servers::socket(dir, name), name, None);
    let table: [(&str, _, NbdClient, _); 6] = [
        ("qemu-nbd, allocated", None, qemu("qemu-full")?, whole.clone()),
        ("qemu-nbd, sparse", None, qemu("qemu-sparse")?, whole.clone()),
        ("complete, allocated", Some((0, 1.1)), at_b("full")?, whole.clone()),
        ("complete, sparse", Some((1, 1.1)), at_b("sparse")?, whole.clone()),
        ("in relocation, arrived blocks", Some((2, 2.0)), at_b("arrived")?, whole.clone()),
        ("in relocation, absent blocks", Some((3, 2.0)), at_b("absent")?, whole),
    ];
    let mut targets: Vec<Target> = table
        .into_iter()
        .map(|(what, against, nbd, range)| Target { what, against, nbd, range, all: Vec::new(), rounds: Vec::new() })
        .collect();
    let mut random = Random::new(1);
    for round in 0..options.rounds {
        for place in 0..targets.len() {
            check_interrupt()?;
            // Another one begins each round.
            let place = (place + round) % targets.len();
            targets[place].turn(&mut random, options.writes)?;
        }
    }
    let rows: Vec<Row> = targets.iter().map(|target| target.row(&targets)).collect();
    print(&rows);
    let out = &options.places.out;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let path = out.join("safety.json");
    fs::write(&path, serde_json::to_vec_pretty(&rows)?).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    drop(targets);
    b.stop()?;
    a.stop()
}

impl Target {
    fn turn(&mut self, random: &mut Random, writes: usize) -> Result<()> {
        let mut page = vec![0; PAGE_BYTES as usize];
        let mut times = Vec::with_capacity(writes);
        for nth in 0..writes + WARM_UP {
            random.fill(&mut page);
            let pages = (self.range.end - self.range.start) / PAGE_BYTES;
            let offset = self.range.start + random.below(pages) * PAGE_BYTES;
            let begun = Instant::now();
            self.nbd.write(offset, &page, false).with_context(|| format!("{}: writing", self.what))?;
            self.nbd.flush().with_context(|| format!("{}: flushing", self.what))?;
            if nth >= WARM_UP {
                times.push(begun.elapsed().as_secs_f64() * 1e6);
            }
        }
        self.rounds.push(mean(&times));
        self.all.extend(times);
        Ok(())
    }

    fn row(&self, all: &[Target]) -> Row {
        let ratio = |other: &Target| {
            let ratios: Vec<f64> = self.rounds.iter().zip(&other.rounds).map(|(mine, its)| mine / its).collect();
            middle(&ratios)
        };
        Row {
            what: self.what,
            mean_us: mean(&self.all),
            median_us: middle(&self.all),
            p99_us: at(&self.all, 99),
            against: self.against.map(|(place, _)| all[place].what),
            ratio: self.against.map(|(place, _)| ratio(&all[place])),
            aim: self.against.map(|(_, aim)| aim),
        }
    }
}

fn print(rows: &[Row]) {
    println!("4 KiB write and flush            mean us  median us    p99 us   ratio  aim   against");
    for row in rows {
        let compared = match (row.ratio, row.aim, row.against) {
            (Some(ratio), Some(aim), Some(against)) => format!("{ratio:>6.2}  {aim:>4.1}  {against}"),
            _ => String::new(),
        };
        let Row { what, mean_us, median_us, p99_us, .. } = row;
        println!("{what:<31}{mean_us:>9.0}{median_us:>11.0}{p99_us:>10.0}  {compared}");
    }
}

fn qemu_nbd(dir: &Path, name: &str, image: &Path) -> Result<Daemon> {
    servers::qemu_nbd(dir, name, &["--cache=writeback", "--discard=unmap", "--export-name", name], image)
}

/// A file whose blocks all have their place on the disk.
fn filled(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    let context = || format!("cannot fill {}", path.display());
    let mut file = File::create(&path).with_context(context)?;
    let mut random = Random::new(name.len() as u64);
    let mut bytes = vec![0; 1 << 20];
    for _ in 0..SIZE_BYTES >> 20 {
        random.fill(&mut bytes);
        file.write_all(&bytes).with_context(context)?;
    }
    file.sync_all().with_context(context)?;
    Ok(path)
}

fn sparse(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    let made = File::create(&path).and_then(|file| file.set_len(SIZE_BYTES));
    made.with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

fn read_all(site: &Site, name: &str, bytes: u64) -> Result<()> {
    let mut nbd = servers::open(&site.nbd_socket(), name, None)?;
    let mut some = vec![0; 1 << 20];
    for offset in (0..bytes).step_by(1 << 20) {
        check_interrupt()?;
        nbd.read(offset, &mut some).with_context(|| format!("{name}: reading"))?;
    }
    nbd.flush().with_context(|| format!("{name}: flushing"))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
