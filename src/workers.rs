//! Threads for blocking work (read, hash, compress): some for what guests wait for, the rest, at low priority, for bulk.
//! Must not know what the work is.

use crossbeam_channel::{Sender, bounded};
use tokio::sync::oneshot;

/// Which threads do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A guest waits.
    Urgent,
    /// Bulk: runs at a lower CPU priority, so that a demand read overtakes at the CPU, too.
    Background,
}

type Job = Box<dyn FnOnce() + Send>;

/// A fixed set of threads, which end when the last handle is dropped.
#[derive(Clone)]
pub struct Workers {
    urgent: Sender<Job>,
    background: Sender<Job>,
}

impl Workers {
    /// Starts `urgent` and `background` threads named after `name`.
    pub fn start(name: &str, urgent: usize, background: usize) -> std::io::Result<Workers> {
        let spawn = |count: usize, label: &str, is_background: bool| {
            let (jobs, queue) = bounded::<Job>(1024);
            for nth in 0..count {
                let queue = queue.clone();
                std::thread::Builder::new().name(format!("{name}-{label}{nth}")).spawn(move || {
                    if is_background {
                        yield_to_guests();
                    }
                    for job in queue {
                        job();
                    }
                })?;
            }
            Ok::<_, std::io::Error>(jobs)
        };
        Ok(Workers { urgent: spawn(urgent.max(1), "u", false)?, background: spawn(background.max(1), "b", true)? })
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
        let jobs = if urgency == Urgency::Urgent { &self.urgent } else { &self.background };
        if let Err(refused) = jobs.try_send(job) {
            let jobs = jobs.clone();
            // More than a thousand jobs wait: let the caller wait for a place without holding up its thread.
            tokio::task::spawn_blocking(move || jobs.send(refused.into_inner())).await.ok()?.ok()?;
        }
        answer.await.ok()
    }
}

/// Lowers the calling thread's CPU priority (nice 10). On Linux, niceness is a thread's own.
pub fn yield_to_guests() {
    // SAFETY: setpriority takes plain integers; 0 means the calling thread.
    unsafe {
        nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, 10);
    }
}
