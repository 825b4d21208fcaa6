//! Threads for blocking work (read, hash, compress): some for what guests wait for, the rest, at low priority, for bulk.
//! Must not know what the work is.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select};
use tokio::sync::oneshot;

/// Which threads do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A guest waits.
    Urgent,
    /// A guest waits for a change: on threads of its own, so that no read stands behind queued writes.
    Change,
    /// A guest has its answer already: before bulk, on bulk's threads.
    Soon,
    /// Bulk: runs at a lower CPU priority, so that a demand read overtakes at the CPU, too.
    Background,
}

/// A piece of blocking work.
pub type Job = Box<dyn FnOnce() + Send>;

/// Who runs jobs where there are to be no threads: a simulation, which decides itself what is done when.
pub trait Executor: Send + Sync + 'static {
    /// Runs `job` some time later, or drops it. No `urgency`: work that may take seconds, apart from everything else.
    fn execute(&self, urgency: Option<Urgency>, job: Job);
}

/// A fixed set of threads, which end when the last handle is dropped; or an [`Executor`].
#[derive(Clone)]
pub struct Workers(How);

#[derive(Clone)]
enum How {
    Threads(Lanes),
    Executor(Arc<dyn Executor>),
}

#[derive(Clone)]
struct Lanes {
    urgent: Sender<Job>,
    change: Sender<Job>,
    soon: Sender<Job>,
    background: Sender<Job>,
}

/// Jobs that wait in a queue before whoever brings one more has to wait, too.
const QUEUED_JOBS: usize = 1024;

impl Workers {
    /// Starts `urgent` threads for reads, as many for changes, and `background` threads, named after `name`.
    pub fn start(name: &str, urgent: usize, background: usize) -> std::io::Result<Workers> {
        let spawn = |label: String, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(format!("{name}-{label}")).spawn(run).map(drop)
        };
        let (urgent_jobs, urgent_queue) = bounded::<Job>(QUEUED_JOBS);
        let (change_jobs, change_queue) = bounded::<Job>(QUEUED_JOBS);
        for nth in 0..urgent.max(1) {
            for (label, queue) in [("u", urgent_queue.clone()), ("c", change_queue.clone())] {
                let run = move || {
                    run_soon();
                    queue.iter().for_each(|job| job());
                };
                spawn(format!("{label}{nth}"), Box::new(run))?;
            }
        }
        let (soon_jobs, soon_queue) = bounded::<Job>(QUEUED_JOBS);
        let (background_jobs, background_queue) = bounded::<Job>(QUEUED_JOBS);
        for nth in 0..background.max(1) {
            let (soon, background) = (soon_queue.clone(), background_queue.clone());
            spawn(format!("b{nth}"), Box::new(move || run_in_background(&soon, &background)))?;
        }
        let lanes = Lanes { urgent: urgent_jobs, change: change_jobs, soon: soon_jobs, background: background_jobs };
        Ok(Workers(How::Threads(lanes)))
    }

    /// No threads: `executor` runs every job.
    pub fn over(executor: Arc<dyn Executor>) -> Workers {
        Workers(How::Executor(executor))
    }

    /// Runs `work` on a thread of its urgency. None only when the threads are gone or the work panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        urgency: Urgency,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move || {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            match done {
                Ok(value) => drop(reply.send(value)),
                Err(_) => tracing::error!("a worker's job panicked; its request is answered with an error"),
            }
        });
        let lanes = match &self.0 {
            How::Threads(lanes) => lanes,
            How::Executor(executor) => {
                executor.execute(Some(urgency), job);
                return answer.await.ok();
            }
        };
        let jobs = match urgency {
            Urgency::Urgent => &lanes.urgent,
            Urgency::Change => &lanes.change,
            Urgency::Soon => &lanes.soon,
            Urgency::Background => &lanes.background,
        };
        if let Err(refused) = jobs.try_send(job) {
            let jobs = jobs.clone();
            // More than a thousand jobs wait: let the caller wait for a place without holding up its thread.
            tokio::task::spawn_blocking(move || jobs.send(refused.into_inner())).await.ok()?.ok()?;
        }
        answer.await.ok()
    }

    /// Runs `work`, which may take seconds, on a thread that nobody else needs.
    pub async fn run_apart<T: Send + 'static>(
        &self,
        runtime: &tokio::runtime::Handle,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unfinished> {
        match &self.0 {
            How::Threads(_) => {
                let done = runtime.spawn_blocking(work).await;
                done.map_err(|ended| Unfinished { has_panicked: ended.is_panic() })
            }
            How::Executor(executor) => executed(&**executor, None, work).await,
        }
    }

    /// As [`Workers::run_apart`], for work that takes locks which a write holds, or waits for writes.
    pub async fn run_after_writes<T: Send + 'static>(
        &self,
        runtime: &tokio::runtime::Handle,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unfinished> {
        match &self.0 {
            How::Threads(_) => self.run_apart(runtime, work).await,
            // On one thread it would wait for ever if it ran in the middle of a write.
            How::Executor(executor) => executed(&**executor, Some(Urgency::Background), work).await,
        }
    }
}

async fn executed<T: Send + 'static>(
    executor: &dyn Executor,
    urgency: Option<Urgency>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    let (reply, answer) = oneshot::channel();
    executor.execute(urgency, Box::new(move || drop(reply.send(work()))));
    answer.await.map_err(|_| Unfinished { has_panicked: false })
}

/// Work that was begun, perhaps, and did not come to its end.
#[derive(Clone, Copy, Debug)]
pub struct Unfinished {
    /// It panicked; otherwise the runtime has ended.
    pub has_panicked: bool,
}

/// Takes from `soon` first, until both have no more senders.
fn run_in_background(soon: &Receiver<Job>, background: &Receiver<Job>) {
    yield_to_guests();
    loop {
        let job = match soon.try_recv() {
            Ok(job) => Ok(job),
            Err(TryRecvError::Disconnected) => background.recv(),
            Err(TryRecvError::Empty) => select! {
                recv(soon) -> job => job.or_else(|_| background.recv()),
                recv(background) -> job => job.or_else(|_| soon.recv()),
            },
        };
        let Ok(job) = job else { return };
        job();
    }
}

/// How much lower the CPU priority of background work is, as a niceness.
const BACKGROUND_NICE: i32 = 10;
/// The time slice of threads that a guest waits for: with a short one, a thread that wakes up runs before those that compute.
const URGENT_SLICE_NS: u64 = 200_000;

/// Lowers the calling thread's CPU priority. On Linux, niceness and time slice are a thread's own.
pub fn yield_to_guests() {
    schedule(BACKGROUND_NICE, 0);
}

/// Lets the calling thread run soon after it wakes up, however busy the machine is: it asks for a short time slice (Linux 6.12 and
/// later; earlier kernels ignore it).
pub fn run_soon() {
    schedule(0, URGENT_SLICE_NS);
}

/// `struct sched_attr`, version 0, of sched_setattr(2).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

fn schedule(more_nice: i32, slice_ns: u64) {
    // SAFETY: getpriority takes plain integers; the process's own niceness, which whoever started the daemon chose.
    let nice = unsafe { nix::libc::getpriority(nix::libc::PRIO_PROCESS, std::process::id()) };
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: nix::libc::SCHED_OTHER as u32,
        flags: 0,
        nice: (nice + more_nice).min(19),
        priority: 0,
        runtime_ns: slice_ns,
        deadline_ns: 0,
        period_ns: 0,
    };
    // SAFETY: the kernel reads `size` bytes of `attr`, which outlives the call; 0 means the calling thread. A refusal (a sandbox) leaves
    // everything as it was, which is slower and not wrong.
    unsafe {
        nix::libc::syscall(nix::libc::SYS_sched_setattr, 0, &raw const attr, 0);
    }
}
