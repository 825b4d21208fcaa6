//! The NBD server side by side with qemu-nbd and nbdkit: fio against each, on its own raw file of one file system, filled in
//! the same way. In turns, so that whatever else the machine does hits all of them.
//! Must not know the results of others.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use blockferry_lab::process::{self, Daemon, catch_signals, check_interrupt};
use blockferry_lab::random::Random;
use blockferry_lab::run_dir::{RunDir, home_dir, require_room};
use blockferry_lab::site::{Programs, Site};
use serde::{Deserialize, Serialize};

use crate::figures::{middle, spread_percent};
use crate::{NbdOptions, servers};

const SIZE_BYTES: u64 = 1 << 30;
/// Not counted: connecting, and the first requests of a turn.
const RAMP_TIME: &str = "300ms";
const OURS: usize = 0;

/// What fio does in a turn.
struct Job {
    name: &'static str,
    /// As fio calls it.
    pattern: &'static str,
    block_kib: u64,
    /// Requests in flight.
    depth: u32,
    /// A flush after each write.
    flushed: bool,
    unit: Unit,
}

#[derive(Clone, Copy, Serialize)]
enum Unit {
    /// Requests a second.
    #[serde(rename = "IOPS")]
    Iops,
    #[serde(rename = "MiB/s")]
    MibPerSecond,
}

#[rustfmt::skip]
const JOBS: [Job; 7] = [
    Job { name: "4k randread qd1, IOPS", pattern: "randread", block_kib: 4, depth: 1, flushed: false, unit: Unit::Iops },
    Job { name: "4k randread qd32, IOPS", pattern: "randread", block_kib: 4, depth: 32, flushed: false, unit: Unit::Iops },
    Job { name: "4k randwrite qd1, IOPS", pattern: "randwrite", block_kib: 4, depth: 1, flushed: false, unit: Unit::Iops },
    Job { name: "4k randwrite qd32, IOPS", pattern: "randwrite", block_kib: 4, depth: 32, flushed: false, unit: Unit::Iops },
    Job { name: "4k randwrite+flush, IOPS", pattern: "randwrite", block_kib: 4, depth: 1, flushed: true, unit: Unit::Iops },
    Job { name: "128k read qd8, MiB/s", pattern: "read", block_kib: 128, depth: 8, flushed: false, unit: Unit::MibPerSecond },
    Job { name: "128k write qd8, MiB/s", pattern: "write", block_kib: 128, depth: 8, flushed: false, unit: Unit::MibPerSecond },
];

/// A server under measurement.
struct Target {
    name: &'static str,
    uri: String,
    /// The file behind it.
    image: PathBuf,
}

/// One row of the table.
#[derive(Serialize)]
struct Row {
    job: &'static str,
    unit: Unit,
    servers: Vec<Measured>,
    /// The faster of the others, by its middle.
    against: &'static str,
    /// The middle of the rounds' ratios of ours to it: more than 1 is faster.
    ratio: f64,
    /// The same, round by round.
    ratios: Vec<f64>,
}

/// What one server did in one job.
#[derive(Serialize)]
struct Measured {
    server: &'static str,
    median: f64,
    /// From the least to the most, of the middle.
    spread_percent: f64,
    rounds: Vec<f64>,
    /// A request from fio's point of view, the middle of the rounds' means.
    mean_latency_us: f64,
}

/// Measures, prints a table, writes `nbd.json`.
///
/// # Errors
/// When a program is missing, or it cannot be run to its end.
pub fn run(options: &NbdOptions) -> Result<()> {
    catch_signals()?;
    require_programs()?;
    let programs = Programs::find(options.places.programs.as_deref())?;
    let home = home_dir(options.places.dir.as_deref(), "bench")?;
    require_room(&home, SIZE_BYTES * 5, "say --dir DIR")?;
    let run_dir = RunDir::make(&home, false)?;
    let dir = run_dir.path();

    // A site is configured with a peer; this one never comes.
    let mut site = Site::init(&programs, dir, "a")?;
    let peer = Site::init(&programs, dir, "b")?;
    site.configure(&peer, None, "")?;
    site.start()?;
    let images = ["ours.raw", "qemu-nbd.raw", "nbdkit.raw"].map(|name| dir.join(name));
    for image in &images {
        let made = File::create(image).and_then(|file| file.set_len(SIZE_BYTES));
        made.with_context(|| format!("cannot make {}", image.display()))?;
    }
    let [ours, qemu_image, nbdkit_image] = images;
    site.ask(&["volume", "add", "ours", "--image", &ours.to_string_lossy()])?;
    let mut qemu = servers::qemu_nbd(dir, "qemu-nbd", &["--shared=0"], &qemu_image)?;
    let mut nbdkit = servers::nbdkit(dir, "nbdkit", &nbdkit_image)?;
    let targets = [
        target("blockferry", &site.nbd_socket(), "ours", ours, None)?,
        target("qemu-nbd", &servers::socket(dir, "qemu-nbd"), "", qemu_image, Some(&mut qemu))?,
        target("nbdkit", &servers::socket(dir, "nbdkit"), "", nbdkit_image, Some(&mut nbdkit))?,
    ];
    fill(dir, &targets)?;

    let mut measured: Vec<Vec<Vec<Turn>>> = JOBS.iter().map(|_| targets.iter().map(|_| Vec::new()).collect()).collect();
    for round in 0..options.rounds {
        for (job, of_job) in JOBS.iter().zip(&mut measured) {
            for place in 0..targets.len() {
                // Another one begins each round.
                let place = (place + round as usize) % targets.len();
                of_job[place].push(turn(job, &targets[place], options.seconds)?);
            }
        }
        eprintln!("round {} of {}", round + 1, options.rounds);
    }
    let rows: Vec<Row> = JOBS.iter().zip(&measured).map(|(job, of_job)| row(job, &targets, of_job)).collect();
    print!("{}", table(&rows));
    let out = &options.places.out;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let path = out.join("nbd.json");
    fs::write(&path, serde_json::to_vec_pretty(&rows)?).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    site.stop()
}

fn require_programs() -> Result<()> {
    servers::require("qemu-nbd", &["--version"], "qemu-utils")?;
    servers::require("nbdkit", &["--dump-plugin", "file"], "nbdkit")?;
    servers::require("nbdcopy", &["--version"], "libnbd-bin")?;
    let engines = servers::require("fio", &["--enghelp"], "fio")?;
    if !engines.lines().any(|line| line.trim() == "nbd") {
        bail!("this fio has no engine `nbd` (fio --enghelp lists them): install one built with libnbd, as Debian's is");
    }
    Ok(())
}

fn target(
    name: &'static str,
    socket: &Path,
    export: &str,
    image: PathBuf,
    server: Option<&mut Daemon>,
) -> Result<Target> {
    // Gone again: it says that the server is there.
    drop(servers::open(socket, export, server)?);
    Ok(Target { name, uri: servers::uri(socket, export)?, image })
}

/// Writes the same bytes, none of them sparse, through every server, and down to the disk.
fn fill(dir: &Path, targets: &[Target]) -> Result<()> {
    let path = dir.join("content");
    let context = || format!("cannot fill {}", path.display());
    let mut file = File::create(&path).with_context(context)?;
    let mut random = Random::new(1);
    let mut bytes = vec![0; 1 << 20];
    for _ in 0..SIZE_BYTES >> 20 {
        check_interrupt()?;
        random.fill(&mut bytes);
        file.write_all(&bytes).with_context(context)?;
    }
    drop(file);
    for target in targets {
        let mut copy = process::command("nbdcopy");
        copy.arg("--flush").arg(&path).arg(&target.uri);
        process::output(&mut copy, false).with_context(|| format!("cannot fill {}", target.name))?;
        sync(&target.image)?;
    }
    fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Nobody's turn pays for what another left to be written.
fn sync(image: &Path) -> Result<()> {
    let synced = File::open(image).and_then(|file| file.sync_all());
    synced.with_context(|| format!("cannot sync {}", image.display()))
}

/// One measurement.
struct Turn {
    /// In the job's unit.
    figure: f64,
    latency_us: f64,
}

fn turn(job: &Job, target: &Target, seconds: u64) -> Result<Turn> {
    let mut fio = process::command("fio");
    // A thread: what is killed with fio is all of it.
    fio.args(["--name=turn", "--thread=1", "--ioengine=nbd", "--time_based", "--norandommap=1", "--randrepeat=0"]);
    fio.args(["--output-format=json", &format!("--runtime={seconds}s"), &format!("--ramp_time={RAMP_TIME}")]);
    fio.args([format!("--uri={}", target.uri), format!("--rw={}", job.pattern)]);
    fio.args([format!("--bs={}k", job.block_kib), format!("--iodepth={}", job.depth)]);
    if job.flushed {
        fio.arg("--fsync=1");
    }
    let said = process::output(&mut fio, false).with_context(|| format!("{} on {}", job.name, target.name))?;
    let turn = read_result(&said, job).with_context(|| format!("{} on {}: fio said\n{said}", job.name, target.name))?;
    if job.pattern.ends_with("write") {
        sync(&target.image)?;
    }
    Ok(turn)
}

/// What fio says of one job; it may say something else before.
fn read_result(said: &str, job: &Job) -> Result<Turn> {
    #[derive(Deserialize)]
    struct Said {
        jobs: Vec<SaidJob>,
    }
    #[derive(Deserialize)]
    struct SaidJob {
        error: i64,
        read: Direction,
        write: Direction,
    }
    #[derive(Deserialize)]
    struct Direction {
        iops: f64,
        lat_ns: Latency,
    }
    #[derive(Deserialize)]
    struct Latency {
        mean: f64,
    }
    let begin = said.find('{').ok_or_else(|| anyhow!("no JSON"))?;
    let said: Said = serde_json::from_str(&said[begin..])?;
    let [SaidJob { error: 0, read, write }] = said.jobs.as_slice() else { bail!("not one job without an error") };
    let direction = if job.pattern.ends_with("write") { write } else { read };
    if direction.iops <= 0.0 {
        bail!("nothing was done");
    }
    let figure = match job.unit {
        Unit::Iops => direction.iops,
        Unit::MibPerSecond => direction.iops * job.block_kib as f64 / 1024.0,
    };
    Ok(Turn { figure, latency_us: direction.lat_ns.mean / 1e3 })
}

fn row(job: &Job, targets: &[Target], of_job: &[Vec<Turn>]) -> Row {
    let servers: Vec<Measured> = targets
        .iter()
        .zip(of_job)
        .map(|(target, turns)| {
            let rounds: Vec<f64> = turns.iter().map(|turn| turn.figure).collect();
            let latencies: Vec<f64> = turns.iter().map(|turn| turn.latency_us).collect();
            let (median, spread_percent) = (middle(&rounds), spread_percent(&rounds));
            Measured { server: target.name, median, spread_percent, rounds, mean_latency_us: middle(&latencies) }
        })
        .collect();
    let (ours, others) = (&servers[OURS], &servers[OURS + 1..]);
    let faster = others.iter().fold(&others[0], |best, other| if other.median > best.median { other } else { best });
    let ratios: Vec<f64> = ours.rounds.iter().zip(&faster.rounds).map(|(mine, its)| mine / its).collect();
    let (against, ratio) = (faster.server, middle(&ratios));
    Row { job: job.name, unit: job.unit, servers, against, ratio, ratios }
}

/// The middle of the rounds with their spread, and ours against the faster of the others.
fn table(rows: &[Row]) -> String {
    let mut table = format!("{:<25}{:>14}{:>14}{:>14}  ratio\n", "median, spread", "blockferry", "qemu-nbd", "nbdkit");
    for row in rows {
        table += &format!("{:<25}", row.job);
        for measured in &row.servers {
            table += &format!("{:>9.0} {:>3.0}%", measured.median, measured.spread_percent);
        }
        table += &format!("  {:>5.2}\n", row.ratio);
    }
    table + "ratio: blockferry to the faster of the two; more is better\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(figures: &[f64]) -> Vec<Turn> {
        figures.iter().map(|figure| Turn { figure: *figure, latency_us: 1.0 }).collect()
    }

    #[test]
    fn ours_is_compared_with_the_faster_round_by_round_and_the_table_is_narrow() {
        let targets =
            ["blockferry", "qemu-nbd", "nbdkit"].map(|name| Target { name, uri: String::new(), image: PathBuf::new() });
        let of_job = [turns(&[150e3, 90e3, 400e3]), turns(&[1e3, 500e3, 2e3]), turns(&[100e3, 100e3, 200e3])];
        let rows: Vec<Row> = JOBS.iter().map(|job| row(job, &targets, &of_job)).collect();
        assert_eq!((rows[0].against, rows[0].ratio), ("nbdkit", 1.5));
        assert!(table(&rows).lines().all(|line| line.len() <= 80), "{}", table(&rows));
    }

    #[test]
    fn what_fio_says_is_read_and_an_error_is_one() {
        let said = |error: i32| {
            format!(
                "note: something\n{{\"jobs\": [{{\"error\": {error}, \"read\": {{\"iops\": 80.0, \"lat_ns\": \
                 {{\"mean\": 2000.0}}}}, \"write\": {{\"iops\": 0.0, \"lat_ns\": {{\"mean\": 0.0}}}}}}]}}"
            )
        };
        let read = JOBS.iter().find(|job| job.pattern == "read").unwrap();
        let turn = read_result(&said(0), read).unwrap();
        assert_eq!((turn.figure, turn.latency_us), (10.0, 2.0));
        assert!(read_result(&said(5), read).is_err());
        let write = JOBS.iter().find(|job| job.pattern == "write").unwrap();
        assert!(read_result(&said(0), write).is_err(), "nothing was written");
    }
}
