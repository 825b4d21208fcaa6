//! The run, from the image to the tally: what goes wrong when, and what is looked at afterwards.
//! Must not know how sites, clients and checks do their work.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blockferry_lab::images::{self, Wanted, copy_sparse};
use blockferry_lab::process::{catch_signals, check_interrupt};
use blockferry_lab::random::Random;
use blockferry_lab::run_dir::{RunDir, home_dir, require_room};
use blockferry_lab::site::{Programs, Relay, Site};
use blockferry_wan::units::Rate;

use crate::cli::Cli;
use crate::cycle::Kind;
use crate::relocation::{Relocation, Sites};
use crate::report::{FoundLoss, Report};
use crate::terabyte;

/// A connection that is silent for this long is given up: short, so that a dead link is noticed within a cycle.
const IDLE_TIMEOUT_MS: u64 = 1000;
/// What is left of the link when it stalls.
const STALLED_BITS_PER_S: u64 = 64_000;
/// What the last relocation may take, so that the run comes to an end.
const FAST_BITS_PER_S: u64 = 1_000_000_000;

/// Runs it; whether nothing was lost.
///
/// # Errors
/// When it could not be run to its end.
pub fn run(cli: &Cli) -> Result<bool> {
    catch_signals()?;
    let clock = Clock(Instant::now());
    let programs = Programs::find(cli.run.programs.as_deref())?;
    let home = home_dir(cli.run.dir.as_deref(), "torture")?;
    let size_bytes = cli.size.unwrap_or(if cli.quick { 64 << 20 } else { 256 << 20 });
    let cycles = cli.cycles.unwrap_or(if cli.quick { 20 } else { 200 });
    println!(
        "{cycles} times something is killed or cut while a disk of {} MiB moves back and forth under its clients; seed {}.",
        size_bytes >> 20,
        cli.seed
    );
    require_room(&home, size_bytes * 8 + (512 << 20), "say --dir DIR, or --size")?;
    let wanted = Wanted { count: 1, size_bytes, from_host: size_bytes < 1 << 30 };
    let image = images::make(&programs, &home, &wanted)?.remove(0);
    let mut run_dir = RunDir::make(&home, cli.run.keep)?;
    let mut report = Report {
        seed: cli.seed,
        size_bytes,
        rate_bits_per_s: cli.rate.bits_per_second(),
        rtt_ms: cli.rtt.0.as_secs_f64() * 1e3,
        ..Report::default()
    };
    let first = run_dir.path().join("disk-0-at-a.raw");
    copy_sparse(&image.source, &first)?;
    let outcome = Torture::start(cli, &programs, run_dir.path(), &first, &mut report, &clock)
        .and_then(|torture| torture.run(cycles, run_dir.path()));
    check_interrupt()?;
    report.panics = panics(run_dir.path());
    report.seconds = clock.0.elapsed().as_secs_f64();
    if outcome.is_err() || !report.is_right() {
        run_dir.keep();
    }
    println!("\n{}{}", report.table(), report.losses());
    cli.run.write_json(&report)?;
    outcome.with_context(|| format!("seed {}, cycle {}", cli.seed, report.all_cycles()))?;
    let verdict = if report.is_right() { "PASS: 0 lost" } else { "FAIL" };
    println!("{verdict} ({:.0} s).", report.seconds);
    Ok(report.is_right())
}

struct Torture<'a> {
    sites: Sites,
    relocation: Relocation,
    random: Random,
    report: &'a mut Report,
    clock: &'a Clock,
    rate: Rate,
    /// Pauses last up to so long.
    pause_ms: u64,
    is_under_way: bool,
    last: &'static str,
}

impl<'a> Torture<'a> {
    fn start(
        cli: &Cli,
        programs: &Programs,
        run_dir: &Path,
        image: &Path,
        report: &'a mut Report,
        clock: &'a Clock,
    ) -> Result<Torture<'a>> {
        let mut a = Site::init(programs, run_dir, "a")?;
        let mut b = Site::init(programs, run_dir, "b")?;
        let lines = format!("idle_timeout = \"{IDLE_TIMEOUT_MS}ms\"\n");
        // A relay has to be told where its site is, and a site where the relay to its peer is.
        a.configure(&b, None, &lines)?;
        a.start()?;
        let to_a = Relay::start(programs, run_dir, "wan-to-a", a.peer_address(), cli.rate, cli.rtt)?;
        b.configure(&a, Some(&to_a.address), &lines)?;
        b.start()?;
        let to_b = Relay::start(programs, run_dir, "wan-to-b", b.peer_address(), cli.rate, cli.rtt)?;
        a.stop()?;
        a.configure(&b, Some(&to_b.address), &lines)?;
        a.start()?;
        let mut sites = Sites { sites: [a, b], relays: [to_a, to_b] };
        let relocation = Relocation::new(&mut sites, image)?;
        Ok(Torture {
            sites,
            relocation,
            random: Random::new(cli.seed),
            report,
            clock,
            rate: cli.rate,
            pause_ms: if cli.quick { 500 } else { 1200 },
            is_under_way: false,
            last: "start",
        })
    }

    fn run(mut self, cycles: u64, folder: &Path) -> Result<()> {
        while self.report.all_cycles() < cycles && self.report.losses.is_empty() {
            check_interrupt()?;
            if !self.is_under_way {
                self.begin()?;
                continue;
            }
            let kind = Kind::draw(&mut self.random);
            self.pause(150);
            *self.report.cycles.entry(kind).or_default() += 1;
            self.last = kind.words();
            let done = self.cycle(kind).with_context(|| kind.words());
            self.collect();
            done?;
            self.relocation.check_guest()?;
            let (here, is_complete) = self.relocation.progress(&mut self.sites)?;
            self.say(&format!("{}; {here} % is here", kind.words()));
            if is_complete {
                self.finish()?;
            }
        }
        if self.is_under_way && self.report.losses.is_empty() {
            self.sites.set_rate(Rate::from_bits_per_second(FAST_BITS_PER_S))?;
            self.relocation.wait_complete(&mut self.sites)?;
            self.finish()?;
        }
        self.report.done = self.relocation.disk.done();
        if self.report.losses.is_empty() {
            self.clock.say("a sparse volume of 1 TiB, killed half-way");
            self.sites.set_rate(Rate::from_bits_per_second(FAST_BITS_PER_S))?;
            match terabyte::measure(&mut self.sites, folder)? {
                Ok(times) => self.report.terabyte_ready = times,
                Err(why) => self.report.terabyte_skipped = Some(why),
            }
        }
        self.report.wan_bytes = self.sites.wan_bytes()?;
        let Sites { mut sites, relays } = self.sites;
        sites.iter_mut().try_for_each(Site::stop)?;
        relays.into_iter().try_for_each(Relay::stop)
    }

    /// The clients work at the source for a moment; then the disk is handed over, mostly not in peace.
    fn begin(&mut self) -> Result<()> {
        let source = self.relocation.source;
        self.relocation.start_guest(&self.sites, source, &mut self.random);
        self.pause(100);
        self.relocation.stop_guest()?;
        let mut is_counted = false;
        if self.random.below(4) > 0 {
            is_counted = true;
            *self.report.cycles.entry(Kind::HandOverKilled).or_default() += 1;
            self.last = Kind::HandOverKilled.words();
            let delay_ms = self.random.below(250);
            let (victims, first) = (1 + self.random.below(3), self.random.below(2) as usize);
            let mut go_wrong = |sites: &mut Sites| -> Result<()> {
                thread::sleep(Duration::from_millis(delay_ms));
                let places = [first, 1 - first].into_iter().filter(|place| victims & 1 << place != 0);
                for place in places.clone() {
                    sites.sites[place].kill()?;
                }
                for place in places {
                    sites.sites[place].start()?;
                }
                Ok(())
            };
            self.relocation.hand_over(&mut self.sites, Some(&mut go_wrong)).context("killed during the hand-over")?;
        } else {
            self.relocation.hand_over(&mut self.sites, None).context("the hand-over")?;
        }
        self.is_under_way = true;
        let (from, to) = (self.sites.sites[source].name(), self.sites.sites[self.relocation.destination()].name());
        let how = if is_counted { ", killed meanwhile" } else { "" };
        self.say(&format!("relocation from {from} to {to}{how}"));
        self.start_guest();
        Ok(())
    }

    fn cycle(&mut self, kind: Kind) -> Result<()> {
        match kind {
            Kind::DestinationKilled => self.restart_destination(true)?,
            Kind::DestinationStopped => self.restart_destination(false)?,
            Kind::DestinationKilledTwice => {
                self.kill_destination()?;
                let destination = self.relocation.destination();
                self.sites.sites[destination].begin()?;
                thread::sleep(Duration::from_millis(self.random.below(200)));
                self.sites.sites[destination].kill()?;
                self.start_destination(true)?;
                self.start_guest();
            }
            Kind::StoreLost => {
                self.kill_destination()?;
                self.sites.lose_store(self.relocation.destination())?;
                self.start_destination(true)?;
                self.start_guest();
            }
            Kind::SourceKilled => {
                let source = self.relocation.source;
                self.sites.sites[source].kill()?;
                thread::sleep(Duration::from_millis(self.random.below(self.pause_ms)));
                self.start_source()?;
            }
            Kind::BothKilled => {
                let source = self.relocation.source;
                if self.random.below(2) == 0 {
                    self.kill_destination()?;
                    self.sites.sites[source].kill()?;
                    self.start_source()?;
                    self.start_destination(true)?;
                } else {
                    self.sites.sites[source].kill()?;
                    self.kill_destination()?;
                    self.start_destination(false)?;
                    self.start_source()?;
                    self.check(true)?;
                }
                self.start_guest();
            }
            Kind::LinkCut => {
                self.sites.set_cut(true)?;
                thread::sleep(Duration::from_millis(self.random.below(IDLE_TIMEOUT_MS / 2)));
                self.sites.set_cut(false)?;
            }
            Kind::LinkDead => {
                self.sites.set_cut(true)?;
                thread::sleep(Duration::from_millis(IDLE_TIMEOUT_MS + self.random.below(IDLE_TIMEOUT_MS)));
                self.sites.set_cut(false)?;
            }
            Kind::LinkStalled => {
                self.sites.set_rate(Rate::from_bits_per_second(STALLED_BITS_PER_S))?;
                self.pause(300);
                self.sites.set_rate(Some(self.rate))?;
            }
            Kind::LinkCutDestinationKilled => {
                self.sites.set_cut(true)?;
                self.pause(100);
                self.kill_destination()?;
                self.start_destination(false)?;
                self.sites.set_cut(false)?;
                self.check(true)?;
                self.start_guest();
            }
            Kind::HandOverKilled => {}
        }
        Ok(())
    }

    fn restart_destination(&mut self, is_killed: bool) -> Result<()> {
        if is_killed {
            self.kill_destination()?;
        } else {
            self.relocation.expect_the_end();
            self.sites.sites[self.relocation.destination()].stop()?;
            self.relocation.bury_guest()?;
        }
        self.start_destination(true)?;
        self.start_guest();
        Ok(())
    }

    fn kill_destination(&mut self) -> Result<()> {
        self.relocation.expect_the_end();
        self.sites.sites[self.relocation.destination()].kill()?;
        self.relocation.bury_guest()
    }

    fn start_destination(&mut self, is_source_there: bool) -> Result<()> {
        let took = self.sites.sites[self.relocation.destination()].start()?;
        self.report.destination_ready.add(took.as_secs_f64());
        self.check(is_source_there)
    }

    fn start_source(&mut self) -> Result<()> {
        let took = self.sites.sites[self.relocation.source].start()?;
        self.report.source_ready.add(took.as_secs_f64());
        Ok(())
    }

    fn start_guest(&mut self) {
        let destination = self.relocation.destination();
        self.relocation.start_guest(&self.sites, destination, &mut self.random);
    }

    /// Looks for everything acknowledged.
    fn check(&mut self, is_source_there: bool) -> Result<()> {
        let (sectors, blocks) = self.relocation.check(&self.sites, is_source_there, &mut self.random)?;
        let checked = self.relocation.disk.model().note_checked(sectors);
        self.report.checked.writes += checked.writes;
        self.report.checked.flushed_writes += checked.flushed_writes;
        self.report.checked.sectors += checked.sectors;
        self.report.untouched_blocks += blocks;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let is_killed = self.random.below(2) == 0;
        let finished = self.relocation.finish(&mut self.sites, is_killed).context("the end of a relocation");
        self.collect();
        finished?;
        self.is_under_way = false;
        self.report.relocations += 1;
        // The next destination had the disk before: mostly it has lost what it knew of it.
        let next = self.relocation.destination();
        if self.random.below(4) > 0 {
            self.sites.sites[next].stop()?;
            self.sites.lose_store(next)?;
            self.sites.sites[next].start()?;
        }
        self.say("the relocation is complete, and the raw file compared");
        Ok(())
    }

    /// Takes note of what clients and checks found wrong.
    fn collect(&mut self) {
        let (cycle, after) = (self.report.all_cycles(), self.last);
        let losses = self.relocation.disk.take_losses();
        self.report.losses.extend(losses.into_iter().map(|loss| FoundLoss { cycle, after, loss }));
    }

    fn pause(&mut self, at_least_ms: u64) {
        thread::sleep(Duration::from_millis(at_least_ms + self.random.below(self.pause_ms)));
    }

    fn say(&self, what: &str) {
        self.clock.say(&format!("{:>4} {what}", self.report.all_cycles()));
    }
}

/// Daemons that panic and go on are as little wanted as those that lose something.
fn panics(run_dir: &Path) -> u64 {
    let count = |site: &str| {
        let log = fs::read(run_dir.join(site).join("serve.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).lines().filter(|line| line.contains("panicked at")).count() as u64
    };
    count("a") + count("b")
}

struct Clock(Instant);

impl Clock {
    fn say(&self, what: &str) {
        println!("[{:4.0}s] {what}", self.0.elapsed().as_secs_f64());
    }
}
