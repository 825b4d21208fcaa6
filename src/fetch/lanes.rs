//! The threads that read and write the store: look-ups that a guest waits for never queue behind bulk's, and all
//! of bulk's are batched. Must not know peers.

use std::sync::Arc;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, unbounded};
use tokio::sync::mpsc::{UnboundedSender, WeakUnboundedSender};
use tokio::sync::{Semaphore, oneshot};

use super::{BULK_BUDGET_KIB, Budgeted, Command};
use crate::core::frame::Frame;
use crate::core::ids::{BlockId, Class};
use crate::core::scheduler::FlightId;
use crate::store::Store;

/// Look-ups and writes in one call: enough to amortise, few enough that an answer does not wait long.
const BATCH: usize = 32;

enum LookUp {
    Flight(FlightId, BlockId, u32),
    Direct(BlockId, oneshot::Sender<Option<Bytes>>),
}

struct Put {
    id: BlockId,
    frame: Frame,
    /// Held until the block is in the store: bounds what waits to be written.
    _budget: Budgeted,
}

#[derive(Clone)]
pub(super) struct StoreLanes {
    urgent: Sender<LookUp>,
    bulk: Sender<LookUp>,
    puts: Sender<Put>,
}

impl StoreLanes {
    pub(super) fn start(
        store: Arc<dyn Store>,
        budget: Arc<Semaphore>,
        commands: WeakUnboundedSender<Command>,
    ) -> std::io::Result<StoreLanes> {
        let (urgent, urgent_queue) = unbounded();
        let (bulk, bulk_queue) = unbounded();
        let (puts, put_queue) = unbounded();
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
        };
        for (name, queue, budget) in [("store-urgent", urgent_queue, None), ("store-bulk", bulk_queue, Some(budget))] {
            let (store, commands) = (Arc::clone(&store), commands.clone());
            let run = move || {
                match &budget {
                    Some(_) => crate::workers::yield_to_guests(),
                    None => crate::workers::run_soon(),
                }
                look_up(&*store, &queue, budget.as_ref(), &commands);
            };
            spawn(name, Box::new(run))?;
        }
        spawn("store-put", Box::new(move || put(&*store, &put_queue, &commands)))?;
        Ok(StoreLanes { urgent, bulk, puts })
    }

    pub(super) fn look_up(&self, flight: FlightId, id: BlockId, class: Class, len_bytes: u32) {
        let lane = if class == Class::Bulk { &self.bulk } else { &self.urgent };
        let _ = lane.send(LookUp::Flight(flight, id, len_bytes));
    }

    pub(super) async fn get(&self, id: BlockId) -> Option<Bytes> {
        let (reply, answer) = oneshot::channel();
        self.urgent.send(LookUp::Direct(id, reply)).ok()?;
        answer.await.ok().flatten()
    }

    pub(super) fn put(&self, id: BlockId, frame: Frame, budget: Budgeted) {
        let _ = self.puts.send(Put { id, frame, _budget: budget });
    }
}

fn take_batch<T>(queue: &Receiver<T>) -> Option<Vec<T>> {
    let mut batch = vec![queue.recv().ok()?];
    batch.extend(queue.try_iter().take(BATCH - 1));
    Some(batch)
}

fn look_up(
    store: &dyn Store,
    queue: &Receiver<LookUp>,
    budget: Option<&Arc<Semaphore>>,
    commands: &WeakUnboundedSender<Command>,
) {
    while let Some(batch) = take_batch(queue) {
        let mut ids = Vec::with_capacity(batch.len());
        let mut kib = 0;
        for job in &batch {
            match job {
                LookUp::Flight(_, id, len_bytes) => {
                    ids.push(*id);
                    kib += *len_bytes as usize / 1024;
                }
                LookUp::Direct(id, _) => ids.push(*id),
            }
        }
        // The disk may be slower than the store: hits wait here until earlier ones have landed.
        let budget: Budgeted = budget.and_then(|budget| {
            let kib = kib.min(BULK_BUDGET_KIB) as u32;
            futures::executor::block_on(Arc::clone(budget).acquire_many_owned(kib)).ok().map(Arc::new)
        });
        let hits = store.get(&ids).unwrap_or_else(|error| {
            // The store is a cache: without it blocks come over the wire.
            tracing::warn!(%error, "the store cannot be read; blocks come from the peer");
            vec![None; ids.len()]
        });
        let Some(commands) = commands.upgrade() else { return };
        for (job, hit) in batch.into_iter().zip(hits) {
            match job {
                LookUp::Flight(flight, ..) => {
                    let budget = if hit.is_some() { budget.clone() } else { None };
                    send(&commands, Command::LookedUp { flight, hit, budget });
                }
                LookUp::Direct(_, reply) => drop(reply.send(hit)),
            }
        }
    }
}

fn put(store: &dyn Store, queue: &Receiver<Put>, commands: &WeakUnboundedSender<Command>) {
    while let Some(batch) = take_batch(queue) {
        let (blocks, budgets): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|put| ((put.id, put.frame), put._budget)).unzip();
        if let Err(error) = store.put(&blocks) {
            tracing::warn!(%error, "the store cannot be written; this block may be fetched again for another volume");
        }
        drop(budgets);
        let Some(commands) = commands.upgrade() else { return };
        send(&commands, Command::Stored { ids: blocks.into_iter().map(|(id, _)| id).collect() });
    }
}

fn send(commands: &UnboundedSender<Command>, command: Command) {
    let _ = commands.send(command);
}
