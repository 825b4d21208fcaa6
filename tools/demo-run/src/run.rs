//! The demo, from the images to the verdict.
//! Must not know how sites, relay and client do their work.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::bound::{Known, MustMove};
use crate::cli::Cli;
use crate::guest::{Guest, Task};
use crate::process::{self, catch_signals, check_interrupt};
use crate::report::{self, DEMAND_SLACK_MS, Report, mib};
use crate::site::{Programs, Relay, Site, VolumeStatus, parse};

const BLOCK_BYTES: u64 = 64 << 10;
/// A relocation in which nothing has arrived for so long has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(200);
const SAY_EVERY: Duration = Duration::from_secs(4);

/// Runs the demo; whether all was as it must be.
///
/// # Errors
/// When it could not be run to its end.
pub fn run(cli: &Cli) -> Result<bool> {
    catch_signals()?;
    let clock = Clock(Instant::now());
    let programs = Programs::find(&programs_dir(cli)?)?;
    let home = demo_dir(cli)?;
    let size_bytes = cli.size.unwrap_or(if cli.quick { 64 << 20 } else { 1 << 30 });
    println!("Three similar disks move between two sites: {}, round trip {} ms.", cli.rate, rtt_ms(cli));

    let images = make_images(cli, &programs, &home, size_bytes, &clock)?;
    let run_dir = RunDir::make(&home, cli.keep)?;
    let outcome = relocate_all(cli, &programs, &images, &run_dir.path, &clock);
    // Whatever else failed, failed because of it.
    check_interrupt()?;
    if outcome.is_err() && !cli.keep {
        eprintln!("demo: run it again with --keep to have the logs of both sites");
    }
    let report = outcome?;
    println!("\n{}", report.tables());
    if let Some(path) = &cli.json {
        let json = serde_json::to_vec_pretty(&report).context("cannot write the report")?;
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let verdict = match (report.is_right(), report.is_frugal()) {
        (true, true) => "PASS: every byte is right",
        (true, false) => "FAIL: every byte is right, but more crossed the WAN than may",
        (false, _) => "FAIL: there are wrong bytes",
    };
    println!("{verdict} ({:.0} s).", clock.0.elapsed().as_secs_f64());
    Ok(report.is_right() && report.is_frugal())
}

struct Image {
    name: String,
    source: PathBuf,
}

fn make_images(cli: &Cli, programs: &Programs, home: &Path, size_bytes: u64, clock: &Clock) -> Result<Vec<Image>> {
    #[derive(Deserialize)]
    struct Fleet {
        images: Vec<FleetImage>,
    }
    #[derive(Deserialize)]
    struct FleetImage {
        path: PathBuf,
        profile: Option<String>,
    }
    let from_host = cli.quick || size_bytes < 1 << 30;
    let out = home.join(format!("images-{}MiB{}", size_bytes >> 20, if from_host { "-host" } else { "" }));
    clock.say(&format!("images: {}", out.display()));
    require_room(home, size_bytes * if out.join("fleet.json").exists() { 6 } else { 10 })?;
    let mut fleet = process::command(&programs.fleet);
    fleet.args(["--json", "--vms", "3", "--size", &size_bytes.to_string(), "--out"]).arg(&out);
    if from_host {
        fleet.args(["--from-host", "--data-mb", &(size_bytes >> 24).clamp(1, 32).to_string()]);
    }
    let fleet: Fleet = parse(&process::output(&mut fleet, true)?)?;
    let clones = fleet.images.into_iter().filter(|image| image.profile.is_some());
    let images: Vec<_> = (1..)
        .zip(clones)
        .map(|(place, image)| {
            let profile = image.profile.unwrap_or_default();
            clock.say(&format!("  vm{place:02}: {} ({profile})", mib_of(size_bytes)));
            Image { name: format!("vm{place:02}"), source: image.path }
        })
        .collect();
    if images.len() != 3 {
        bail!("the fleet has {} virtual machines instead of 3", images.len());
    }
    Ok(images)
}

fn relocate_all(cli: &Cli, programs: &Programs, images: &[Image], run_dir: &Path, clock: &Clock) -> Result<Report> {
    clock.say("what should have to move: blockferry analyze");
    println!("\n{}", analyze(cli, programs, images, false)?.trim_end());
    println!();
    clock.say("the same, counted without it");
    let must_move = count(cli, programs, images, clock)?;

    clock.say("copying the images, to have something to compare with in the end");
    let before = images.iter().map(|image| modified(&image.source)).collect::<Result<Vec<_>>>()?;
    for image in images {
        let mut copy = process::command("cp");
        copy.args(["--sparse=always", "--reflink=auto"]).arg(&image.source).arg(expected(run_dir, &image.name));
        process::output(&mut copy, false)?;
    }

    let mut a = Site::init(programs, run_dir, "a")?;
    let mut b = Site::init(programs, run_dir, "b")?;
    a.start(&b, None)?;
    let mut relay = Relay::start(programs, run_dir, a.peer_address(), cli.rate, cli.rtt)?;
    b.start(&a, Some(&relay.address))?;
    clock.say(&format!("sites a and b are up; a owns the images; the WAN is at {}", relay.address));
    for image in images {
        let path = image.source.to_string_lossy().into_owned();
        a.ask(&["volume", "add", &image.name, "--image", &path])?;
    }

    let mut report = Report {
        rate_bits_per_s: cli.rate.bits_per_second(),
        rtt_ms: rtt_ms(cli),
        demand_bound_ms: rtt_ms(cli) + cli.rate.time_for(BLOCK_BYTES).as_secs_f64() * 1e3 + DEMAND_SLACK_MS,
        ratio_is_judged: !cli.quick
            && cli.size.is_none_or(|size| size >= 1 << 30)
            && cli.rate.bits_per_second() <= 100_000_000,
        ..Report::default()
    };
    let mut show_status = true;
    // One after the other, so that the relay's count is each image's own.
    for (images, must_move) in images.chunks(1).zip(must_move.chunks(1)) {
        let mut phase = Phase { cli, a: &mut a, b: &mut b, relay: &mut relay, clock, run_dir };
        report.phases.push(phase.relocate(images, must_move, &mut show_status)?);
    }

    clock.say("comparing the exports with what they have to be: qemu-img compare");
    for volume in report.phases.iter_mut().flat_map(|phase| &mut phase.volumes) {
        let export = format!("nbd+unix:///{}?socket={}", volume.name, b.nbd_socket().display());
        let mut compare = process::command("qemu-img");
        compare.args(["compare", "-f", "raw", "-F", "raw"]).arg(expected(run_dir, &volume.name)).arg(export);
        match process::output(&mut compare, false) {
            Ok(_) => volume.export_is_right = true,
            Err(error) => eprintln!("demo: {}: {error:#}", volume.name),
        }
    }
    report.peak_memory_bytes = [a.peak_memory_bytes(), b.peak_memory_bytes()];

    clock.say("stopping both sites and comparing the raw files");
    b.stop()?;
    a.stop()?;
    relay.stop()?;
    for volume in report.phases.iter_mut().flat_map(|phase| &mut phase.volumes) {
        match first_difference(&volume.status.image, &expected(run_dir, &volume.name))? {
            None => volume.file_is_right = true,
            Some(place) => eprintln!("demo: {}: the raw file is wrong: {place}", volume.name),
        }
    }
    for (image, before) in images.iter().zip(before) {
        if modified(&image.source)? != before {
            bail!("{}: the source image was written to", image.source.display());
        }
    }
    Ok(report)
}

/// What has to move of each image when they are relocated in order; `blockferry analyze` has to find the same.
fn count(cli: &Cli, programs: &Programs, images: &[Image], clock: &Clock) -> Result<Vec<MustMove>> {
    #[derive(Deserialize)]
    struct Analysis {
        block_sizes: Vec<OfSize>,
    }
    #[derive(Deserialize)]
    struct OfSize {
        images: Vec<OfImage>,
    }
    #[derive(Deserialize)]
    struct OfImage {
        unique_blocks: u64,
        compressed_bytes: u64,
    }
    let mut known = Known::default();
    let counted =
        images.iter().map(|image| known.add(&image.source, BLOCK_BYTES)).collect::<Result<Vec<MustMove>>>()?;
    let analysis: Analysis = parse(&analyze(cli, programs, images, true)?)?;
    let said = analysis.block_sizes.first().map_or(&[][..], |size| &size.images);
    for (image, (counted, said)) in images.iter().zip(counted.iter().zip(said)) {
        clock.say(&format!(
            "  {}: {} blocks, {} compressed",
            image.name,
            counted.blocks,
            mib_of(counted.compressed_bytes)
        ));
        if counted.blocks != said.unique_blocks {
            bail!("{}: blockferry analyze finds {} unique blocks", image.name, said.unique_blocks);
        }
        let difference = counted.compressed_bytes.abs_diff(said.compressed_bytes);
        if difference * 200 > counted.compressed_bytes {
            bail!("{}: blockferry analyze finds {} compressed", image.name, mib_of(said.compressed_bytes));
        }
    }
    Ok(counted)
}

fn analyze(cli: &Cli, programs: &Programs, images: &[Image], json: bool) -> Result<String> {
    let mut analyze = process::command(&programs.blockferry);
    analyze.args(["analyze", "--block-size", "64KiB", "--link", &cli.rate.to_string()]);
    analyze.args(["--rtt", &rtt_ms(cli).to_string()]);
    if json {
        analyze.arg("--json");
    }
    process::output(analyze.args(images.iter().map(|image| &image.source)), false)
}

/// What is relocated with one command.
struct Phase<'a> {
    cli: &'a Cli,
    a: &'a mut Site,
    b: &'a mut Site,
    relay: &'a mut Relay,
    clock: &'a Clock,
    run_dir: &'a Path,
}

impl Phase<'_> {
    fn relocate(&mut self, images: &[Image], must_move: &[MustMove], show_status: &mut bool) -> Result<report::Phase> {
        let sources: Vec<_> = images.iter().map(|image| format!("a/{}", image.name)).collect();
        println!();
        self.clock.say(&format!("$ blockferry relocate {}", sources.join(" ")));
        self.relay.reset()?;
        let started = Instant::now();
        let guests: Vec<_> = (1..).zip(images).map(|(seed, image)| Guest::start(&self.task(image, seed))).collect();
        let mut command = vec!["relocate"];
        command.extend(sources.iter().map(String::as_str));
        self.b.ask(&command)?;
        let arrivals = self.follow(images, &guests, started, show_status);
        let guests: Vec<_> = guests.into_iter().map(Guest::finish).collect();
        // What the client found wrong explains more than what followed from it.
        let guests = guests.into_iter().collect::<Result<Vec<_>>>()?;
        let seconds = arrivals?;
        let wan = self.relay.stats()?;
        let volumes = self.volumes(images)?.into_iter().zip(guests).zip(must_move).zip(seconds);
        let volumes = volumes.map(|(((status, guest), must_move), seconds)| report::Volume {
            name: status.name.clone(),
            must_move: *must_move,
            seconds,
            status,
            guest,
            export_is_right: false,
            file_is_right: false,
        });
        Ok(report::Phase {
            volumes: volumes.collect(),
            relay_down_bytes: wan.down.wire_bytes,
            relay_up_bytes: wan.up.wire_bytes,
            relay_dropped_packets: wan.down.dropped_queue + wan.up.dropped_queue,
            relay_late_packets: wan.down.dropped_relay + wan.up.dropped_relay,
        })
    }

    fn task(&self, image: &Image, seed: u64) -> Task {
        Task {
            export: image.name.clone(),
            socket: self.b.nbd_socket(),
            expected: expected(self.run_dir, &image.name),
            block_bytes: BLOCK_BYTES,
            rtt: self.cli.rtt.0,
            seed,
        }
    }

    /// Waits until all have arrived and the source knows; the seconds that each took.
    fn follow(
        &mut self,
        images: &[Image],
        guests: &[Guest],
        started: Instant,
        show_status: &mut bool,
    ) -> Result<Vec<f64>> {
        let mut seconds = vec![None; images.len()];
        let (mut said, mut progressed, mut absent_before) = (Instant::now(), Instant::now(), u64::MAX);
        loop {
            check_interrupt()?;
            thread::sleep(LOOK_EVERY);
            self.a.check()?;
            if guests.iter().any(Guest::has_ended) {
                bail!("a client has ended too early");
            }
            let volumes = self.volumes(images)?;
            for (volume, seconds) in volumes.iter().zip(&mut seconds) {
                if volume.phase == "failed" {
                    bail!("{} has failed: {}", volume.name, volume.phase_reason);
                }
                let arrived =
                    volume.blocks.absent == 0 && matches!(&*volume.phase, "complete" | "released_from_source");
                if arrived && seconds.is_none() {
                    *seconds = Some(started.elapsed().as_secs_f64());
                    self.clock.say(&format!("{} has arrived", volume.name));
                }
            }
            if volumes.iter().all(|volume| volume.phase == "released_from_source") {
                return Ok(seconds.into_iter().map(|seconds| seconds.unwrap_or_default()).collect());
            }
            let absent = volumes.iter().map(|volume| volume.blocks.absent).sum();
            if absent < absent_before {
                (absent_before, progressed) = (absent, Instant::now());
            } else if progressed.elapsed() > PATIENCE {
                let all = self.b.ask(&["status"])?;
                bail!("nothing has arrived for {} s\n{all}", PATIENCE.as_secs());
            }
            let total: u64 = volumes.iter().map(|volume| volume.blocks.total).sum();
            if *show_status && images.len() > 1 && absent * 2 < total {
                *show_status = false;
                self.clock.say("$ blockferry status\n");
                println!("{}", self.b.ask(&["status"])?);
            } else if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                volumes.iter().filter(|volume| volume.phase == "copying").for_each(|volume| self.say_progress(volume));
            }
        }
    }

    fn say_progress(&self, volume: &VolumeStatus) {
        let (blocks, moved) = (&volume.blocks, &volume.moved);
        let here = (blocks.total - blocks.absent) * 100 / blocks.total.max(1);
        let left = volume.eta_s.map_or(String::new(), |eta_s| format!(", {eta_s:.0} s left"));
        let (zero, wire) = (mib(moved.zero_bytes), mib(moved.wire_raw_bytes));
        let store = mib(moved.store_bytes + moved.joined_bytes);
        self.clock.say(&format!("{} {here:>3} %: zero {zero}, store {store}, wire {wire} MiB{left}", volume.name));
    }

    fn volumes(&mut self, images: &[Image]) -> Result<Vec<VolumeStatus>> {
        let status = self.b.status()?;
        let find = |image: &Image| status.volumes.iter().find(|volume| volume.name == image.name).cloned();
        let found = images.iter().map(|image| find(image).with_context(|| format!("site b has no {}", image.name)));
        found.collect()
    }
}

/// A run's files; gone in the end, unless they are to be kept.
struct RunDir {
    path: PathBuf,
    keep: bool,
}

impl RunDir {
    fn make(home: &Path, keep: bool) -> Result<RunDir> {
        sweep(home);
        let path = home.join(format!("run-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        if keep {
            let kept = home.join(format!("kept-{}", std::process::id()));
            fs::rename(&path, &kept).with_context(|| format!("cannot make {}", kept.display()))?;
            return Ok(RunDir { path: kept, keep });
        }
        Ok(RunDir { path, keep })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.keep {
            println!("Images, logs and configurations of this run are in {}", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("demo: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes what runs left that were killed.
fn sweep(home: &Path) {
    let Ok(entries) = fs::read_dir(home) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("run-")).and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // It takes room, no more: the next run tries again.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

struct Clock(Instant);

impl Clock {
    fn say(&self, what: &str) {
        println!("[{:4.0}s] {what}", self.0.elapsed().as_secs_f64());
    }
}

fn programs_dir(cli: &Cli) -> Result<PathBuf> {
    match &cli.programs {
        Some(dir) => Ok(dir.clone()),
        None => {
            let me = std::env::current_exe().context("where is this program?")?;
            Ok(me.parent().unwrap_or(Path::new(".")).to_owned())
        }
    }
}

fn demo_dir(cli: &Cli) -> Result<PathBuf> {
    let dir = match (&cli.dir, std::env::var_os("HOME")) {
        (Some(dir), _) => dir.clone(),
        (None, Some(home)) => Path::new(&home).join(".cache/blockferry/demo"),
        (None, None) => bail!("HOME is not set: say --dir DIR"),
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let dir = fs::canonicalize(&dir).with_context(|| format!("cannot find {}", dir.display()))?;
    // run-PID/a/control.sock has to fit a socket's address, 107 bytes.
    if dir.as_os_str().len() > 75 {
        bail!("{} is too long for sockets in it: say --dir DIR with a shorter path", dir.display());
    }
    Ok(dir)
}

fn require_room(dir: &Path, needed_bytes: u64) -> Result<()> {
    let stats = nix::sys::statvfs::statvfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let free = stats.blocks_available() as u64 * stats.fragment_size() as u64;
    if free < needed_bytes {
        let (free, needed, dir) = (mib_of(free), mib_of(needed_bytes), dir.display());
        bail!("{dir} has room for {free}, the demo needs {needed}: say --dir DIR, or --quick");
    }
    Ok(())
}

fn expected(run_dir: &Path, name: &str) -> PathBuf {
    run_dir.join(format!("{name}.expected"))
}

fn modified(path: &Path) -> Result<(i64, i64, u64)> {
    let meta = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    Ok((meta.mtime(), meta.mtime_nsec(), meta.len()))
}

/// Where two files differ first, in words; `None`: nowhere.
fn first_difference(is: &Path, should: &Path) -> Result<Option<String>> {
    let open = |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let (is_file, should_file) = (open(is)?, open(should)?);
    let (is_length, length) = (is_file.metadata()?.len(), should_file.metadata()?.len());
    if is_length != length {
        return Ok(Some(format!("{is_length} bytes instead of {length}")));
    }
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for offset in (0..length).step_by(1 << 20) {
        let count = (length - offset).min(1 << 20) as usize;
        is_file.read_exact_at(&mut a[..count], offset).with_context(|| format!("cannot read {}", is.display()))?;
        should_file.read_exact_at(&mut b[..count], offset).context("cannot read the expected image")?;
        if let Some(at) = (0..count).find(|at| a[*at] != b[*at]) {
            let byte = offset + at as u64;
            return Ok(Some(format!("byte {byte} is {:#04x} and should be {:#04x}", a[at], b[at])));
        }
    }
    Ok(None)
}

fn rtt_ms(cli: &Cli) -> f64 {
    cli.rtt.0.as_secs_f64() * 1000.0
}

fn mib_of(bytes: u64) -> String {
    format!("{} MiB", mib(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let one = file("one", b"abc");
        assert_eq!(first_difference(&one, &file("same", b"abc")).unwrap(), None);
        let other = first_difference(&one, &file("other", b"abd")).unwrap().unwrap();
        assert!(other.starts_with("byte 2 is 0x63"), "{other}");
        let longer = first_difference(&one, &file("longer", b"abcd")).unwrap().unwrap();
        assert!(longer.starts_with("3 bytes instead of 4"), "{longer}");
    }

    #[test]
    fn only_what_dead_runs_left_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let mine = format!("run-{}", std::process::id());
        // Above the largest process id that Linux gives.
        for name in [mine.as_str(), "run-4194305", "kept-4194305", "images"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        sweep(dir.path());
        let left = |name: &str| dir.path().join(name).exists();
        assert_eq!([left(&mine), left("run-4194305"), left("kept-4194305"), left("images")], [true, false, true, true]);
    }
}
