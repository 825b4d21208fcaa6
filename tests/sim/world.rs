//! What everything in one simulated world shares: chance, the trace, the weather (which faults hold at the moment), and the first
//! violation that was found. Must not know sites.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::random::Random;

/// Which site; of a connection: who answers (`Source`), and who asks (`Destination`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Source,
    Destination,
    /// Only in worlds in which volumes go on from the destination.
    Third,
}

/// How many there may be.
pub const SIDES: usize = 3;

/// What was found to be wrong.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which check found it.
    pub check: &'static str,
    pub what: String,
}

/// Faults that hold at the moment.
#[derive(Clone, Debug, Default)]
pub struct Weather {
    /// No connection can be made.
    pub is_link_down: bool,
    /// Nothing is delivered.
    pub is_link_stalled: bool,
    /// Only what is urgent is delivered, as when guests keep a link busy.
    pub is_bulk_starved: bool,
    /// Milliseconds that are added to every message.
    pub network_delay_ms: u64,
    /// One data message in a hundred so often carries another block than it says.
    pub lies_percent: u64,
    /// Of the destination: no room.
    pub is_disk_full: bool,
    /// Calls of the destination's disk that fail, of a hundred.
    pub disk_errors_percent: u64,
    /// Syncs of the destination's disk that fail, of a hundred.
    pub sync_errors_percent: u64,
    /// Milliseconds that are added to every job, of either site.
    pub disk_delay_ms: u64,
    /// The destination's state database cannot be written.
    pub is_state_failing: bool,
}

/// See the module.
pub struct World {
    random: Mutex<Random>,
    began: Instant,
    trace: Mutex<Trace>,
    pub weather: Mutex<Weather>,
    pub weather_changed: Notify,
    violation: Mutex<Option<Violation>>,
    pub violated: Notify,
    /// Virtual milliseconds when something last was not as it should be.
    trouble_ms: AtomicU64,
    /// Nothing goes wrong in this world, but for bulk being starved: everything must be prompt, and nothing be fetched twice.
    pub is_quiet: bool,
    /// Every volume is relocated once, and nobody changes his mind.
    pub is_plain: bool,
    /// Guests stop.
    pub is_over: AtomicBool,
}

struct Trace {
    hash: u64,
    events: u64,
    log: Option<Vec<String>>,
}

impl World {
    pub fn new(seed: u64, with_log: bool) -> World {
        let mut random = Random::new(seed);
        let is_quiet = random.percent(25);
        let is_plain = is_quiet || random.percent(60);
        World {
            random: Mutex::new(random),
            began: Instant::now(),
            trace: Mutex::new(Trace { hash: 0xcbf2_9ce4_8422_2325, events: 0, log: with_log.then(Vec::new) }),
            weather: Mutex::default(),
            weather_changed: Notify::new(),
            violation: Mutex::default(),
            violated: Notify::new(),
            trouble_ms: AtomicU64::new(0),
            is_quiet,
            is_plain,
            is_over: AtomicBool::new(false),
        }
    }

    /// Virtual milliseconds since the beginning.
    pub fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    pub fn random<T>(&self, draw: impl FnOnce(&mut Random) -> T) -> T {
        draw(&mut self.random.lock())
    }

    pub fn below(&self, bound: u64) -> u64 {
        self.random(|random| random.below(bound))
    }

    pub fn percent(&self, percent: u64) -> bool {
        percent > 0 && self.random(|random| random.percent(percent))
    }

    /// Waits for a random time within these bounds.
    pub async fn rest(&self, least_ms: u64, most_ms: u64) {
        let ms = self.random(|random| random.between(least_ms, most_ms));
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    /// Something happened: part of what two runs of a seed must agree on.
    pub fn note(&self, what: &'static str, numbers: [u64; 3]) {
        let now_ms = self.now_ms();
        let mut trace = self.trace.lock();
        trace.events += 1;
        let mut hash = trace.hash;
        for byte in what.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        for number in [now_ms, numbers[0], numbers[1], numbers[2]] {
            hash = (hash ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
        trace.hash = hash;
        if let Some(log) = &mut trace.log {
            let [a, b, c] = numbers;
            log.push(format!("{now_ms:>7} ms  {what} {a} {b} {c}"));
        }
    }

    /// As [`World::note`], in words, for the log alone.
    pub fn say(&self, words: impl FnOnce() -> String) {
        let now_ms = self.now_ms();
        if let Some(log) = &mut self.trace.lock().log {
            log.push(format!("{now_ms:>7} ms  {}", words()));
        }
    }

    /// The hash over everything that happened, and how much that was.
    pub fn fingerprint(&self) -> (u64, u64) {
        let trace = self.trace.lock();
        (trace.hash, trace.events)
    }

    pub fn take_log(&self) -> Vec<String> {
        self.trace.lock().log.take().unwrap_or_default()
    }

    /// A check failed. The first one counts: what follows may follow from it.
    pub fn fail(&self, check: &'static str, what: String) {
        self.say(|| format!("VIOLATION {check}: {what}"));
        let mut violation = self.violation.lock();
        if violation.is_none() {
            *violation = Some(Violation { check, what });
        }
        drop(violation);
        self.violated.notify_one();
    }

    pub fn violation(&self) -> Option<Violation> {
        self.violation.lock().clone()
    }

    pub fn change_weather(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.weather.lock());
        self.weather_changed.notify_waiters();
    }

    /// Until the weather lets something happen.
    pub async fn until(&self, is_so: impl Fn(&Weather) -> bool) {
        loop {
            let changed = self.weather_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if is_so(&self.weather.lock()) {
                return;
            }
            changed.await;
        }
    }

    /// Something is wrong now, and may have consequences for a while.
    pub fn trouble(&self) {
        self.trouble_ms.store(self.now_ms().max(1), Ordering::Relaxed);
    }

    /// Whether everything has been as it should be, but for bulk, since `ms` before `since_ms`.
    pub fn was_well(&self, since_ms: u64, ms: u64) -> bool {
        let last = self.trouble_ms.load(Ordering::Relaxed);
        let weather = self.weather.lock();
        let is_well = !weather.is_link_down
            && !weather.is_link_stalled
            && weather.lies_percent == 0
            && !weather.is_disk_full
            && weather.disk_errors_percent == 0
            && weather.sync_errors_percent == 0
            && weather.disk_delay_ms == 0
            && weather.network_delay_ms == 0
            && !weather.is_state_failing;
        is_well && (last == 0 || last + ms < since_ms)
    }
}

/// A flag that can be waited for.
#[derive(Default)]
pub struct Flag {
    is_set: AtomicBool,
    changed: Notify,
}

impl Flag {
    /// Whether it was set only now.
    pub fn set(&self) -> bool {
        let was_set = self.is_set.swap(true, Ordering::Relaxed);
        self.changed.notify_waiters();
        !was_set
    }

    pub fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }

    pub async fn wait(&self) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.is_set() {
                return;
            }
            changed.await;
        }
    }
}

/// A shared world.
pub type Shared = Arc<World>;
