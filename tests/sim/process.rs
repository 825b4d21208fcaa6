//! One life of a site's daemon: it runs jobs in an order of chance, and dies at a moment of chance, after which nothing that it still
//! does has any effect. Must not know what jobs are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use blockferry::workers::{Executor, Job, Urgency, Workers};
use parking_lot::Mutex;

use crate::world::{Flag, Shared, Side};

/// See the module.
pub struct Process {
    pub world: Shared,
    pub side: Side,
    pub life: u64,
    pub death: Flag,
    /// Somebody must look after it: its disk failed to sync.
    pub needs_operator: Flag,
    /// Effects on disk or database until it dies.
    effects_left: AtomicI64,
    jobs: Mutex<BTreeMap<u64, (Option<Urgency>, Job)>>,
    next_job: AtomicU64,
    depth: AtomicUsize,
    is_starting: AtomicBool,
}

impl Process {
    pub fn new(world: &Shared, side: Side, life: u64) -> Arc<Process> {
        Arc::new(Process {
            world: Arc::clone(world),
            side,
            life,
            death: Flag::default(),
            needs_operator: Flag::default(),
            effects_left: AtomicI64::new(i64::MAX),
            jobs: Mutex::default(),
            next_job: AtomicU64::new(0),
            depth: AtomicUsize::new(0),
            is_starting: AtomicBool::new(true),
        })
    }

    pub fn is_alive(&self) -> bool {
        !self.death.is_set()
    }

    /// While it starts, it meets a disk that works: an operator sees to that.
    pub fn is_starting(&self) -> bool {
        self.is_starting.load(Ordering::Relaxed)
    }

    pub fn has_started(&self) {
        self.is_starting.store(false, Ordering::Relaxed);
    }

    /// Ends it at once. What it had handed to the kernel is there, what it was about to do is not.
    pub fn die(&self) {
        if self.death.set() {
            self.world.note("dies", [self.side as u64, self.life, 0]);
            let jobs = std::mem::take(&mut *self.jobs.lock());
            drop(jobs);
        }
    }

    /// Lets it die just before so many more effects.
    pub fn die_after(&self, effects: u64) {
        self.effects_left.store(effects as i64, Ordering::Relaxed);
    }

    /// Takes [`Process::die_after`] back.
    pub fn live_on(&self) {
        self.effects_left.store(i64::MAX, Ordering::Relaxed);
    }

    /// To be asked before every effect that would outlive the process.
    pub fn may_act(&self) -> bool {
        if !self.is_alive() {
            return false;
        }
        if self.effects_left.fetch_sub(1, Ordering::Relaxed) <= 0 {
            self.die();
            return false;
        }
        true
    }

    /// What threads would do: while one job is in the middle of its work on the disk, a read or a sync is done beside it. Only such
    /// jobs, as they take none of the locks that a job may hold meanwhile.
    pub fn let_others_run(&self) {
        if self.depth.load(Ordering::Relaxed) != 1 || !self.world.percent(30) {
            return;
        }
        let picked = {
            let mut jobs = self.jobs.lock();
            let may = |urgency: &Option<Urgency>| matches!(urgency, None | Some(Urgency::Urgent));
            let waiting: Vec<u64> =
                jobs.iter().filter(|(_, (urgency, _))| may(urgency)).map(|(number, _)| *number).collect();
            let number = waiting.get(self.world.below(waiting.len() as u64) as usize).copied();
            number.and_then(|number| jobs.remove(&number).map(|job| (number, job)))
        };
        if let Some((number, (_, job))) = picked {
            self.world.note("job beside another", [self.side as u64, number, 0]);
            self.run(job);
        }
    }

    fn run(&self, job: Job) {
        self.depth.fetch_add(1, Ordering::Relaxed);
        job();
        self.depth.fetch_sub(1, Ordering::Relaxed);
    }

    pub fn workers(self: &Arc<Self>) -> Workers {
        Workers::over(Arc::new(JobsOf(Arc::clone(self))))
    }
}

struct JobsOf(Arc<Process>);

impl Executor for JobsOf {
    fn execute(&self, urgency: Option<Urgency>, job: Job) {
        let process = &self.0;
        if !process.is_alive() {
            return;
        }
        let number = process.next_job.fetch_add(1, Ordering::Relaxed);
        process.jobs.lock().insert(number, (urgency, job));
        let slowed_ms = process.world.weather.lock().disk_delay_ms;
        let delay_ms = process.world.random(|random| {
            let most_ms = match urgency {
                Some(Urgency::Urgent) => 2,
                Some(_) => 4,
                None => 8,
            };
            // Half of them at once: what is under way at the same time then meets in every order.
            let own_ms = match random.below(100) {
                0..50 => 0,
                50..95 => random.between(1, most_ms),
                _ => random.between(1, 60),
            };
            own_ms + if slowed_ms > 0 { random.below(slowed_ms) } else { 0 }
        });
        let process = Arc::clone(process);
        tokio::spawn(async move {
            if delay_ms > 0 {
                tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            }
            let job = process.jobs.lock().remove(&number);
            if let Some((urgency, job)) = job {
                process.world.note("job", [process.side as u64, number, urgency.map_or(9, |urgency| urgency as u64)]);
                process.run(job);
            }
        });
    }
}
