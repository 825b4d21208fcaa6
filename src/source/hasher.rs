//! Hashes images in the background, one thread a site (or a task): what a peer asks for first, the rest in order.
//! Must not know peers.

use std::sync::{Arc, Weak};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use super::{SourceError, SourceVolume};
use crate::core::manifest::{Page, PageIndex};
use crate::workers::{Urgency, Workers};

enum Job {
    Page(Arc<SourceVolume>, PageIndex, oneshot::Sender<Result<Page, SourceError>>),
    Background(Weak<SourceVolume>),
}

/// A handle to the thread, which ends when the last handle is dropped.
#[derive(Clone)]
pub struct Hasher {
    jobs: UnboundedSender<Job>,
}

impl Hasher {
    /// Starts the thread.
    pub fn start() -> std::io::Result<Hasher> {
        let (jobs, mut queue) = unbounded_channel();
        std::thread::Builder::new().name("hasher".into()).spawn(move || run(&mut queue))?;
        Ok(Hasher { jobs })
    }

    /// The same without a thread: `workers` read and hash.
    pub fn start_in_runtime(workers: Workers) -> Hasher {
        let (jobs, mut queue) = unbounded_channel();
        tokio::spawn(async move {
            let mut background = Vec::new();
            loop {
                let job =
                    if background.is_empty() { queue.recv().await.ok_or(()) } else { queue.try_recv().map_err(|_| ()) };
                // Nobody is left to want anything.
                if job.is_err() && background.is_empty() {
                    return;
                }
                let worked = workers.run(Urgency::Background, move || {
                    turn(job, &mut background);
                    background
                });
                let Some(after) = worked.await else { return };
                background = after;
            }
        });
        Hasher { jobs }
    }

    /// A page, before everything that is hashed in the background.
    pub async fn page(&self, volume: &Arc<SourceVolume>, page: PageIndex) -> Option<Result<Page, SourceError>> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(Job::Page(Arc::clone(volume), page, reply)).ok()?;
        answer.await.ok()
    }

    /// Hashes all of a volume when there is nothing else to do; given up when the volume is dropped.
    pub fn hash_in_background(&self, volume: &Arc<SourceVolume>) {
        let _ = self.jobs.send(Job::Background(Arc::downgrade(volume)));
    }
}

/// Volumes to hash when there is nothing else to do, and from where on.
type Background = Vec<(Weak<SourceVolume>, PageIndex)>;

fn run(queue: &mut UnboundedReceiver<Job>) {
    crate::workers::yield_to_guests();
    let mut background = Background::new();
    loop {
        let job =
            if background.is_empty() { queue.blocking_recv().ok_or(()) } else { queue.try_recv().map_err(|_| ()) };
        if job.is_err() && background.is_empty() {
            return;
        }
        turn(job, &mut background);
    }
}

/// Does what was asked for; without a question, something of the background.
fn turn(job: Result<Job, ()>, background: &mut Background) {
    match job {
        Ok(Job::Page(volume, page, reply)) => {
            if !reply.is_closed() {
                let _ = reply.send(volume.manifest.page(page));
            }
        }
        Ok(Job::Background(volume)) => {
            // A peer that opens it again and again neither makes more work of it nor keeps it from being done.
            match background.iter_mut().find(|(kept, _)| kept.ptr_eq(&volume)) {
                Some((_, from)) => *from = PageIndex(0),
                None => background.push((volume, PageIndex(0))),
            }
        }
        Err(()) => step(background),
    }
}

/// Hashes one page of the first volume that has one to hash.
fn step(background: &mut Background) {
    let Some((volume, from)) = background.first_mut() else { return };
    let next = volume.upgrade().and_then(|volume| volume.manifest.next_unknown(*from).map(|page| (volume, page)));
    let Some((volume, page)) = next else {
        background.swap_remove(0);
        return;
    };
    *from = PageIndex(page.0 + 1);
    if let Err(error) = volume.manifest.hash_page(page) {
        if !matches!(error, SourceError::Gone { .. }) {
            tracing::warn!(volume = %volume.name, %error, "hashing in the background stops");
        }
        background.swap_remove(0);
    }
}
