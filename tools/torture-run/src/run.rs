//! The run, from the image to the tally: what goes wrong when, and what is looked at afterwards.
//! Must not know how sites, clients and checks do their work.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blockferry_lab::images::{self, Wanted, copy_sparse};
use blockferry_lab::process::{catch_signals, check_interrupt};
use blockferry_lab::random::Random;
use blockferry_lab::run_dir::{RunDir, home_dir, require_room};
use blockferry_lab::site::{Programs, Relay, Site};
use blockferry_wan::units::Rate;

use crate::cli::Cli;
use crate::cycle::Kind;
use crate::relocation::{Place, Relocation};
use crate::report::{FoundLoss, Report};
use crate::sites::{NAME, PATIENCE, Sites, Stuck};
use crate::terabyte;
use crate::verb::Deck;

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
        "{cycles} times something is killed or cut while a disk of {} MiB moves between three sites under its clients; seed {}.",
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
    report.stuck = outcome.as_ref().err().map_or(0, |error| u64::from(error.chain().any(|cause| cause.is::<Stuck>())));
    report.panics = panics(run_dir.path());
    report.seconds = clock.0.elapsed().as_secs_f64();
    if outcome.is_err() || !report.is_right() {
        run_dir.keep();
    }
    println!("\n{}{}", report.table(), report.losses());
    cli.run.write_json(&report)?;
    outcome.with_context(|| format!("seed {}, cycle {}", cli.seed, report.all_cycles()))?;
    let verdict = if report.is_right() { "PASS: 0 lost, 0 foreign bytes" } else { "FAIL" };
    println!("{verdict} ({:.0} s).", report.seconds);
    Ok(report.is_right())
}

/// A run under way.
pub struct Torture<'a> {
    pub(crate) sites: Sites,
    pub(crate) relocation: Relocation,
    pub(crate) random: Random,
    pub(crate) rate: Rate,
    pub(crate) report: &'a mut Report,
    clock: &'a Clock,
    deck: Deck,
    /// Pauses last up to so long.
    pause_ms: u64,
    /// How much of the disk was there when that last changed.
    moved: (u64, Instant),
    /// Restarts with a large volume that are measured.
    restarts: u64,
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
        let mut c = Site::init(programs, run_dir, "c")?;
        let lines = format!("idle_timeout = \"{IDLE_TIMEOUT_MS}ms\"\n");
        // A relay has to be told where its site is, and a site where the relays to its peers are.
        a.configure_for(&[(&b, None), (&c, None)], &lines)?;
        b.configure_for(&[(&a, None), (&c, None)], &lines)?;
        c.configure_for(&[(&a, None), (&b, None)], &lines)?;
        let relay = |site: &mut Site, name: &str| {
            site.start()?;
            let relay = Relay::start(programs, run_dir, name, site.peer_address(), cli.rate, cli.rtt)?;
            site.stop()?;
            anyhow::Ok(relay)
        };
        let (to_a, to_b) = (relay(&mut a, "wan-to-a")?, relay(&mut b, "wan-to-b")?);
        let to_c = relay(&mut c, "wan-to-c")?;
        let [at_a, at_b, at_c] = [&to_a, &to_b, &to_c].map(|relay| Some(relay.address.as_str()));
        a.configure_for(&[(&b, at_b), (&c, at_c)], &lines)?;
        b.configure_for(&[(&a, at_a), (&c, at_c)], &lines)?;
        c.configure_for(&[(&a, at_a), (&b, at_b)], &lines)?;
        let mut sites = Sites::new([a, b, c], [to_a, to_b, to_c]);
        for site in &mut sites.sites {
            site.start()?;
        }
        let relocation = Relocation::new(&mut sites, image)?;
        Ok(Torture {
            sites,
            relocation,
            random: Random::new(cli.seed),
            report,
            clock,
            rate: cli.rate,
            deck: Deck::default(),
            pause_ms: if cli.quick { 300 } else { 1200 },
            moved: (0, Instant::now()),
            restarts: if cli.quick { 2 } else { 5 },
            last: "start",
        })
    }

    fn run(mut self, cycles: u64, folder: &Path) -> Result<()> {
        let done = self.run_cycles(cycles, folder);
        self.collect();
        self.report.done = self.relocation.done();
        (self.report.refusals, self.report.probes) = (self.sites.refusals, self.sites.probes);
        self.report.kills = self.sites.kills;
        done?;
        self.report.wan_bytes = self.sites.wan_bytes()?;
        let Sites { mut sites, relays, .. } = self.sites;
        sites.iter_mut().try_for_each(Site::stop)?;
        relays.into_iter().try_for_each(Relay::stop)
    }

    fn run_cycles(&mut self, cycles: u64, folder: &Path) -> Result<()> {
        let mut faults = 0;
        while self.report.all_cycles() < cycles && self.report.losses.is_empty() {
            check_interrupt()?;
            if let Place::Home(_) = self.relocation.place {
                self.operator()?;
                if let Place::Home(at) = self.relocation.place {
                    self.begin(at)?;
                }
                continue;
            }
            let kind = Kind::draw(&mut self.random);
            self.pause(150);
            self.count(kind);
            let done = self.cycle(kind).with_context(|| kind.words());
            self.collect();
            done?;
            self.relocation.check_guest()?;
            let (here, is_complete) = self.relocation.progress(&mut self.sites)?;
            self.say(&format!("{}; {here} % is here", kind.words()));
            faults += 1;
            if here != self.moved.0 {
                self.moved = (here, Instant::now());
            } else if !is_complete && self.moved.1.elapsed() > PATIENCE {
                // Each fault is over within seconds, and something arrives between two of them.
                let what = format!("{here} % has been here for {} s", PATIENCE.as_secs());
                bail!(Stuck(format!("{what}\n{}", self.sites.describe())));
            }
            if is_complete {
                let is_kept = self.random.below(2) == 0;
                self.finish(is_kept)?;
            } else if faults % 2 == 0 {
                self.operator()?;
            }
        }
        if let Place::Moving { .. } = self.relocation.place
            && self.report.losses.is_empty()
        {
            self.sites.set_rate(self.fast())?;
            self.relocation.wait_complete(&mut self.sites)?;
            self.finish(false)?;
        }
        if self.report.losses.is_empty() {
            self.clock.say("a sparse volume of 1 TiB, killed half-way");
            self.sites.set_rate(self.fast())?;
            match terabyte::measure(&mut self.sites, folder, self.restarts)? {
                Ok(times) => self.report.terabyte_ready = times,
                Err(why) => self.report.terabyte_skipped = Some(why),
            }
        }
        Ok(())
    }

    /// An operator does something.
    fn operator(&mut self) -> Result<()> {
        let is_under_way = matches!(self.relocation.place, Place::Moving { .. });
        let verb = self.deck.draw(&mut self.random, is_under_way);
        self.last = verb.words();
        let done = self.operate(verb).with_context(|| verb.words());
        self.collect();
        let outcome = done?;
        self.moved.1 = Instant::now();
        *self.report.verbs.entry(verb).or_default().entry(outcome).or_default() += 1;
        self.say(&format!("{}: {outcome}", verb.words()));
        Ok(())
    }

    fn count(&mut self, kind: Kind) {
        *self.report.cycles.entry(kind).or_default() += 1;
        self.last = kind.words();
    }

    /// The clients work at the source for a moment; then the disk is handed over, mostly not in peace.
    fn begin(&mut self, source: usize) -> Result<()> {
        self.start_guest();
        self.pause(100);
        if self.random.below(4) == 0 {
            self.count(Kind::OwnerKilled);
            self.kill_destination()?;
            self.start_source()?;
            self.check_home()?;
            self.say("owner killed, all of the disk compared");
            self.start_guest();
            self.pause(100);
        }
        let to = self.free_site(source)?;
        let third = 3 - source - to;
        self.report.hops += u64::from(self.relocation.images[third].is_some());
        let is_taken = self.random.below(3) == 0;
        if is_taken && !self.sites.is_asked_for(to) {
            let remote = format!("{}/{NAME}", self.sites.name(source));
            let why = self.sites.refused(to, &["relocate", &remote])?;
            if !why.contains("--take") {
                bail!("a volume in use is refused without saying what to do: {}", why.trim());
            }
            self.relocation.check_guest()?;
        } else if !is_taken {
            self.relocation.stop_guest()?;
        }
        // Where the disk was two relocations ago is not needed for this one.
        let is_third_down = self.relocation.images[third].is_some() && self.random.below(2) == 0;
        if is_third_down {
            self.sites.kill(third)?;
        }
        let is_killed = self.random.below(4) > 0;
        if is_killed {
            self.count(Kind::HandOverKilled);
            let delay_ms = self.random.below(250);
            let (victims, first) = (1 + self.random.below(3), self.random.below(2) as usize);
            let ends = [source, to];
            let mut go_wrong = |sites: &mut Sites| -> Result<()> {
                thread::sleep(Duration::from_millis(delay_ms));
                let places = [first, 1 - first].into_iter().filter(|end| victims & 1 << end != 0).map(|end| ends[end]);
                for place in places.clone() {
                    sites.kill(place)?;
                }
                for place in places {
                    sites.sites[place].start()?;
                }
                Ok(())
            };
            let handed = self.relocation.hand_over(&mut self.sites, to, Some(&mut go_wrong));
            handed.context("killed during the hand-over")?;
        } else {
            self.relocation.hand_over(&mut self.sites, to, None).context("the hand-over")?;
        }
        self.collect();
        if is_third_down {
            self.sites.sites[third].start()?;
            self.sites.probe(&[to])?;
        }
        let (from, to) = (self.sites.name(source), self.sites.name(to));
        let how = if is_taken { ", taken from its clients" } else { "" };
        let killed = if is_killed { ", killed meanwhile" } else { "" };
        self.moved = (0, Instant::now());
        self.say(&format!("relocation from {from} to {to}{how}{killed}"));
        self.start_guest();
        Ok(())
    }

    fn cycle(&mut self, kind: Kind) -> Result<()> {
        match kind {
            Kind::DestinationKilled => self.restart_destination(true)?,
            Kind::DestinationStopped => self.restart_destination(false)?,
            Kind::DestinationKilledTwice => {
                self.kill_destination()?;
                let destination = self.relocation.place.owner();
                self.sites.sites[destination].begin()?;
                thread::sleep(Duration::from_millis(self.random.below(200)));
                self.sites.kill(destination)?;
                self.start_destination(true)?;
                self.start_guest();
            }
            Kind::StoreLost => {
                self.kill_destination()?;
                self.sites.lose_store(self.relocation.place.owner())?;
                self.start_destination(true)?;
                self.start_guest();
            }
            Kind::SourceKilled => {
                self.sites.kill(self.source())?;
                thread::sleep(Duration::from_millis(self.random.below(self.pause_ms)));
                self.start_source()?;
            }
            Kind::BothKilled => {
                let source = self.source();
                if self.random.below(2) == 0 {
                    self.kill_destination()?;
                    self.sites.kill(source)?;
                    self.start_source()?;
                    self.start_destination(true)?;
                } else {
                    self.sites.kill(source)?;
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
            Kind::BystanderKilled => {
                let third = 3 - self.source() - self.relocation.place.owner();
                self.sites.kill(third)?;
                self.sites.sites[third].start()?;
            }
            // These need that nothing is under way.
            Kind::HandOverKilled | Kind::OwnerKilled => {}
        }
        Ok(())
    }

    fn restart_destination(&mut self, is_killed: bool) -> Result<()> {
        if is_killed {
            self.kill_destination()?;
        } else {
            self.relocation.expect_the_end();
            self.sites.sites[self.relocation.place.owner()].stop()?;
            self.relocation.bury_guest()?;
        }
        self.start_destination(true)?;
        self.start_guest();
        Ok(())
    }

    /// The site that the disk comes from; the owner, where nothing is under way.
    fn source(&self) -> usize {
        match self.relocation.place {
            Place::Moving { from, .. } => from,
            Place::Home(at) => at,
        }
    }

    /// What the link may take when there is no time.
    pub(crate) fn fast(&self) -> Option<Rate> {
        Rate::from_bits_per_second(FAST_BITS_PER_S)
    }

    /// Kills the owner under its clients.
    pub(crate) fn kill_destination(&mut self) -> Result<()> {
        self.relocation.expect_the_end();
        self.sites.kill(self.relocation.place.owner())?;
        self.relocation.bury_guest()
    }

    /// Starts the owner.
    pub(crate) fn start_destination(&mut self, is_source_there: bool) -> Result<()> {
        let took = self.sites.sites[self.relocation.place.owner()].start()?;
        self.report.destination_ready.add(took.as_secs_f64());
        self.check(is_source_there)
    }

    /// Starts the source.
    pub(crate) fn start_source(&mut self) -> Result<()> {
        let source = self.source();
        let took = self.sites.sites[source].start()?;
        self.report.source_ready.add(took.as_secs_f64());
        Ok(())
    }

    /// Lets clients work at the owner.
    pub(crate) fn start_guest(&mut self) {
        self.relocation.start_guest(&self.sites, &mut self.random);
    }

    /// Compares all of a disk that is not under way.
    pub(crate) fn check_home(&mut self) -> Result<()> {
        let sectors = self.relocation.check_whole(&self.sites)?;
        self.note_checked(sectors);
        Ok(())
    }

    fn note_checked(&mut self, sectors: u64) {
        let checked = self.relocation.disk.model().note_checked(sectors);
        self.report.checked.writes += checked.writes;
        self.report.checked.flushed_writes += checked.flushed_writes;
        self.report.checked.sectors += checked.sectors;
    }

    /// Looks for everything acknowledged.
    pub(crate) fn check(&mut self, is_source_there: bool) -> Result<()> {
        let (sectors, blocks) = self.relocation.check(&self.sites, is_source_there, &mut self.random)?;
        self.note_checked(sectors);
        self.report.untouched_blocks += blocks;
        Ok(())
    }

    /// All of it is there: the end of a relocation. `is_kept`: the site that it came from still knows the volume.
    pub(crate) fn finish(&mut self, is_kept: bool) -> Result<()> {
        let is_killed = self.random.below(2) == 0;
        let source = self.source();
        let finished = self.relocation.finish(&mut self.sites, is_killed, is_kept);
        self.sites.kills += u64::from(is_killed);
        self.collect();
        finished.context("the end of a relocation")?;
        self.report.relocations += 1;
        // Where the disk was before: mostly that site loses what it knew of its bytes.
        if self.random.below(4) > 0 {
            self.sites.sites[source].stop()?;
            self.sites.lose_store(source)?;
            self.sites.sites[source].start()?;
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

    /// Lets everything go on for a moment.
    pub(crate) fn pause(&mut self, at_least_ms: u64) {
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
    ["a", "b", "c"].into_iter().map(count).sum()
}

struct Clock(Instant);

impl Clock {
    fn say(&self, what: &str) {
        println!("[{:4.0}s] {what}", self.0.elapsed().as_secs_f64());
    }
}
