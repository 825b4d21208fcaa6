//! The demo, from the images to the verdict.
//! Must not know how sites, relay and client do their work.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blockferry_lab::images::{self, Image, Wanted, first_difference};
use blockferry_lab::process::{self, catch_signals, check_interrupt};
use blockferry_lab::run_dir::{RunDir, home_dir, require_room};
use blockferry_lab::site::{Programs, Relay, Site, VolumeStatus, parse};
use serde::Deserialize;

use crate::bound::{Known, MustMove};
use crate::cli::Cli;
use crate::guest::{Guest, Task};
use crate::report::{self, DEMAND_SLACK_MS, Report, mib};

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
    let programs = Programs::find(cli.run.programs.as_deref())?;
    let home = home_dir(cli.run.dir.as_deref(), "demo")?;
    let size_bytes = cli.size.unwrap_or(if cli.quick { 64 << 20 } else { 1 << 30 });
    println!("Three similar disks move between two sites: {}, round trip {} ms.", cli.rate, rtt_ms(cli));

    let images = make_images(cli, &programs, &home, size_bytes, &clock)?;
    let run_dir = RunDir::make(&home, cli.run.keep)?;
    let outcome = relocate_all(cli, &programs, &images, run_dir.path(), &clock);
    // Whatever else failed, failed because of it.
    check_interrupt()?;
    if outcome.is_err() && !cli.run.keep {
        eprintln!("demo: run it again with --keep to have the logs of both sites");
    }
    let report = outcome?;
    println!("\n{}", report.tables());
    cli.run.write_json(&report)?;
    let verdict = match (report.is_right(), report.is_frugal()) {
        (true, true) => "PASS: every byte is right",
        (true, false) => "FAIL: every byte is right, but more crossed the WAN than may",
        (false, _) => "FAIL: there are wrong bytes",
    };
    println!("{verdict} ({:.0} s).", clock.0.elapsed().as_secs_f64());
    Ok(report.is_right() && report.is_frugal())
}

fn make_images(cli: &Cli, programs: &Programs, home: &Path, size_bytes: u64, clock: &Clock) -> Result<Vec<Image>> {
    let wanted = Wanted { count: 3, size_bytes, from_host: cli.quick || size_bytes < 1 << 30 };
    let out = wanted.dir(home);
    clock.say(&format!("images: {}", out.display()));
    let times = if wanted.is_made(home) { 6 } else { 10 };
    require_room(home, size_bytes * times, "say --dir DIR, or --quick")?;
    let images = images::make(programs, home, &wanted)?;
    for image in &images {
        clock.say(&format!("  {}: {} ({})", image.name, mib_of(size_bytes), image.profile));
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
        images::copy_sparse(&image.source, &expected(run_dir, &image.name))?;
    }

    let mut a = Site::init(programs, run_dir, "a")?;
    let mut b = Site::init(programs, run_dir, "b")?;
    a.configure(&b, None, "")?;
    a.start()?;
    let mut relay = Relay::start(programs, run_dir, "wan", a.peer_address(), cli.rate, cli.rtt)?;
    b.configure(&a, Some(&relay.address), "")?;
    b.start()?;
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

struct Clock(Instant);

impl Clock {
    fn say(&self, what: &str) {
        println!("[{:4.0}s] {what}", self.0.elapsed().as_secs_f64());
    }
}

fn expected(run_dir: &Path, name: &str) -> PathBuf {
    run_dir.join(format!("{name}.expected"))
}

fn modified(path: &Path) -> Result<(i64, i64, u64)> {
    let meta = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    Ok((meta.mtime(), meta.mtime_nsec(), meta.len()))
}

fn rtt_ms(cli: &Cli) -> f64 {
    cli.rtt.0.as_secs_f64() * 1000.0
}

fn mib_of(bytes: u64) -> String {
    format!("{} MiB", mib(bytes))
}
