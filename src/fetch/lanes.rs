//! The threads that read and write the store: look-ups that a guest waits for never queue behind bulk's, and all
//! of bulk's are batched. Or tasks in their stead, where there are to be no threads. Must not know peers.

use std::sync::Arc;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, unbounded};
use tokio::sync::mpsc::{UnboundedSender, WeakUnboundedSender};
use tokio::sync::{Notify, Semaphore, oneshot};

use super::{BULK_BUDGET_KIB, Budgeted, Command};
use crate::core::frame::Frame;
use crate::core::ids::{BlockId, Class};
use crate::core::scheduler::FlightId;
use crate::store::Store;
use crate::workers::Workers;

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
    /// Tells the tasks, if it is tasks that listen: of urgent look-ups, of bulk's, of writes.
    news: Option<Arc<[Notify; 3]>>,
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
        Ok(StoreLanes { urgent, bulk, puts, news: None })
    }

    /// The same without threads: `workers` run the store's calls. The tasks end with the runtime.
    pub(super) fn start_in_runtime(
        store: Arc<dyn Store>,
        budget: Arc<Semaphore>,
        commands: WeakUnboundedSender<Command>,
        workers: Workers,
    ) -> StoreLanes {
        let (urgent, urgent_queue) = unbounded();
        let (bulk, bulk_queue) = unbounded();
        let (puts, put_queue) = unbounded();
        let news: Arc<[Notify; 3]> = Arc::default();
        for (nth, queue, budget) in [(0, urgent_queue, None), (1, bulk_queue, Some(budget))] {
            let (store, commands, news, workers) =
                (Arc::clone(&store), commands.clone(), Arc::clone(&news), workers.clone());
            tokio::spawn(async move {
                while commands.upgrade().is_some() {
                    news[nth].notified().await;
                    while let Some(batch) = waiting_batch(&queue) {
                        let budget: Budgeted = match &budget {
                            Some(budget) => Arc::clone(budget).acquire_many_owned(kib_of(&batch)).await.ok(),
                            None => None,
                        }
                        .map(Arc::new);
                        let (store, commands) = (Arc::clone(&store), commands.clone());
                        let work = move || answer(&*store, batch, &budget, &commands);
                        let _ = workers.run_apart(&tokio::runtime::Handle::current(), work).await;
                    }
                }
            });
        }
        let puts_news = Arc::clone(&news);
        tokio::spawn(async move {
            while commands.upgrade().is_some() {
                puts_news[2].notified().await;
                while let Some(batch) = waiting_batch(&put_queue) {
                    let (store, commands) = (Arc::clone(&store), commands.clone());
                    let work = move || write(&*store, batch, &commands);
                    let _ = workers.run_apart(&tokio::runtime::Handle::current(), work).await;
                }
            }
        });
        StoreLanes { urgent, bulk, puts, news: Some(news) }
    }

    fn tell(&self, nth: usize) {
        if let Some(news) = &self.news {
            news[nth].notify_one();
        }
    }

    pub(super) fn look_up(&self, flight: FlightId, id: BlockId, class: Class, len_bytes: u32) {
        let lane = if class == Class::Bulk { &self.bulk } else { &self.urgent };
        let _ = lane.send(LookUp::Flight(flight, id, len_bytes));
        self.tell(usize::from(class == Class::Bulk));
    }

    pub(super) async fn get(&self, id: BlockId) -> Option<Bytes> {
        let (reply, answer) = oneshot::channel();
        self.urgent.send(LookUp::Direct(id, reply)).ok()?;
        self.tell(0);
        answer.await.ok().flatten()
    }

    pub(super) fn put(&self, id: BlockId, frame: Frame, budget: Budgeted) {
        let _ = self.puts.send(Put { id, frame, _budget: budget });
        self.tell(2);
    }
}

fn take_batch<T>(queue: &Receiver<T>) -> Option<Vec<T>> {
    let mut batch = vec![queue.recv().ok()?];
    batch.extend(queue.try_iter().take(BATCH - 1));
    Some(batch)
}

fn waiting_batch<T>(queue: &Receiver<T>) -> Option<Vec<T>> {
    let batch: Vec<T> = queue.try_iter().take(BATCH).collect();
    (!batch.is_empty()).then_some(batch)
}

/// What the blocks of a batch need of bulk's memory if they are there.
fn kib_of(batch: &[LookUp]) -> u32 {
    let len_of = |job: &LookUp| match job {
        LookUp::Flight(_, _, len_bytes) => *len_bytes as usize / 1024,
        LookUp::Direct(..) => 0,
    };
    batch.iter().map(len_of).sum::<usize>().min(BULK_BUDGET_KIB) as u32
}

fn look_up(
    store: &dyn Store,
    queue: &Receiver<LookUp>,
    budget: Option<&Arc<Semaphore>>,
    commands: &WeakUnboundedSender<Command>,
) {
    while let Some(batch) = take_batch(queue) {
        // The disk may be slower than the store: hits wait here until earlier ones have landed.
        let budget: Budgeted = budget.and_then(|budget| {
            let kib = kib_of(&batch);
            futures::executor::block_on(Arc::clone(budget).acquire_many_owned(kib)).ok().map(Arc::new)
        });
        if answer(store, batch, &budget, commands).is_none() {
            return;
        }
    }
}

/// Looks a batch up and answers it; None once nobody listens.
fn answer(
    store: &dyn Store,
    batch: Vec<LookUp>,
    budget: &Budgeted,
    commands: &WeakUnboundedSender<Command>,
) -> Option<()> {
    let id_of = |job: &LookUp| match job {
        LookUp::Flight(_, id, _) | LookUp::Direct(id, _) => *id,
    };
    let ids: Vec<BlockId> = batch.iter().map(id_of).collect();
    let hits = store.get(&ids).unwrap_or_else(|error| {
        // The store is a cache: without it blocks come over the wire.
        tracing::warn!(%error, "the store cannot be read; blocks come from the peer");
        vec![None; ids.len()]
    });
    let commands = commands.upgrade()?;
    for (job, hit) in batch.into_iter().zip(hits) {
        match job {
            LookUp::Flight(flight, ..) => {
                let budget = if hit.is_some() { budget.clone() } else { None };
                send(&commands, Command::LookedUp { flight, hit, budget });
            }
            LookUp::Direct(_, reply) => drop(reply.send(hit)),
        }
    }
    Some(())
}

fn put(store: &dyn Store, queue: &Receiver<Put>, commands: &WeakUnboundedSender<Command>) {
    while let Some(batch) = take_batch(queue) {
        if write(store, batch, commands).is_none() {
            return;
        }
    }
}

/// Writes a batch; None once nobody listens.
fn write(store: &dyn Store, batch: Vec<Put>, commands: &WeakUnboundedSender<Command>) -> Option<()> {
    let (blocks, budgets): (Vec<_>, Vec<_>) = batch.into_iter().map(|put| ((put.id, put.frame), put._budget)).unzip();
    if let Err(error) = store.put(&blocks) {
        tracing::warn!(%error, "the store cannot be written; this block may be fetched again for another volume");
    }
    drop(budgets);
    let commands = commands.upgrade()?;
    send(&commands, Command::Stored { ids: blocks.into_iter().map(|(id, _)| id).collect() });
    Some(())
}

fn send(commands: &UnboundedSender<Command>, command: Command) {
    let _ = commands.send(command);
}
