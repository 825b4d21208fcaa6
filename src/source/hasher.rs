//! Hashes images in the background, one thread a site: what a peer asks for first, the rest in order.
//! Must not know peers.

use std::sync::{Arc, Weak};

use crossbeam_channel::{Receiver, Sender, unbounded};
use tokio::sync::oneshot;

use super::{SourceError, SourceVolume};
use crate::core::manifest::{Page, PageIndex};

enum Job {
    Page(Arc<SourceVolume>, PageIndex, oneshot::Sender<Result<Page, SourceError>>),
    Background(Weak<SourceVolume>),
}

/// A handle to the thread, which ends when the last handle is dropped.
#[derive(Clone)]
pub struct Hasher {
    jobs: Sender<Job>,
}

impl Hasher {
    /// Starts the thread.
    pub fn start() -> std::io::Result<Hasher> {
        let (jobs, queue) = unbounded();
        std::thread::Builder::new().name("hasher".into()).spawn(move || run(&queue))?;
        Ok(Hasher { jobs })
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

fn run(queue: &Receiver<Job>) {
    crate::workers::yield_to_guests();
    let mut background: Vec<(Weak<SourceVolume>, PageIndex)> = Vec::new();
    loop {
        let job = if background.is_empty() { queue.recv().map_err(|_| ()) } else { queue.try_recv().map_err(|_| ()) };
        match job {
            Ok(Job::Page(volume, page, reply)) => {
                if !reply.is_closed() {
                    let _ = reply.send(volume.manifest.page(page));
                }
            }
            Ok(Job::Background(volume)) => background.push((volume, PageIndex(0))),
            Err(()) if background.is_empty() => return,
            Err(()) => step(&mut background),
        }
    }
}

/// Hashes one page of the first volume that has one to hash.
fn step(background: &mut Vec<(Weak<SourceVolume>, PageIndex)>) {
    let Some((volume, from)) = background.first_mut() else { return };
    let next = volume.upgrade().and_then(|volume| volume.manifest.next_unknown(*from).map(|page| (volume, page)));
    let Some((volume, page)) = next else {
        background.swap_remove(0);
        return;
    };
    *from = PageIndex(page.0 + 1);
    if let Err(error) = volume.manifest.hash_page(page) {
        tracing::warn!(volume = %volume.name, %error, "hashing in the background stops");
        background.swap_remove(0);
    }
}
