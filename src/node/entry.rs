//! A volume at this site: its record, its disk if that can be opened, and what its ownership machine's outputs mean here. It decides
//! nothing about ownership. Must not know the control API's words.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::inventory::Inventory;
use super::record::{RecordError, VolumeRecord};
use super::status::RateMeter;
use crate::core::ids::Name;
use crate::core::wire::Refusal;
use crate::custody::{Custody, Keeper};
use crate::fetch::{FetchError, VolumeKey};
use crate::handover::{Answer, Epoch, Facts, Held, No, Question, Row, State};
use crate::seeded_bugs::{Bug, is_planted};
use crate::source::{SourceError, SourceVolume};
use crate::volume::{Volume, VolumeError, run_bulk};

/// A write-back that took no longer leaves so little that a fence after it is short.
const SHORT_SYNC: Duration = Duration::from_millis(300);
/// Write-backs after which the fence is shut although they have not become short: a guest that always writes as fast as its disk would
/// keep a hand-over from ever coming about.
const MOST_PRESYNCS: u32 = 30;
/// A write-back that does not become shorter than the one before is not going to.
const SHRINKS_BELOW: f64 = 0.7;
/// Write-backs at least before that counts.
const LEAST_PRESYNCS: u32 = 3;

/// The least and the longest pause between two questions that a peer answers with "not now".
const ASK_AGAIN: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(5)];

/// See the module.
pub struct Entry {
    pub(super) name: Name,
    node: Weak<Inventory>,
    this: Weak<Entry>,
    record: Mutex<VolumeRecord>,
    /// Set, under the record's lock, when nothing of the volume is here any more.
    has_ended: AtomicBool,
    disk: Mutex<Disk>,
    /// What peers fetch from; only for a volume all of which is here.
    pub(super) source: Mutex<Option<Arc<SourceVolume>>>,
    pub(super) clients: Arc<AtomicU32>,
    /// Counts how often another site's decision ended what was served here: whoever uses the volume is hung up on.
    pub(super) withdrawals: watch::Sender<u64>,
    /// Ends the tasks that run for the volume.
    pub(super) stop: watch::Sender<bool>,
    /// Ends the copy that runs now.
    copying: Mutex<Option<watch::Sender<bool>>>,
    /// Held by whoever makes what peers fetch from.
    pub(super) offering: Mutex<()>,
    /// What is wrong, for people.
    pub(super) trouble: Mutex<Option<String>>,
    pub(super) rate: RateMeter,
    /// Whether it is noted what the image holds: gone before the first write.
    pub(super) is_marked: Arc<AtomicBool>,
    custody: OnceLock<Custody>,
}

/// Where a volume's bytes are.
#[derive(Clone)]
pub(super) enum Disk {
    /// Open; the key is what the fetcher calls the volume while blocks are missing.
    Open(Arc<Volume>, Option<VolumeKey>),
    /// It cannot be opened, and why. What is journalled stays, and everything that needs no image goes on.
    Shut(String),
}

impl Entry {
    pub(super) fn new(node: &Arc<Inventory>, record: VolumeRecord, disk: Disk) -> Arc<Entry> {
        if let (Disk::Open(volume, _), true) = (&disk, record.is_read_only) {
            volume.set_read_only();
        }
        Arc::new_cyclic(|this| Entry {
            name: record.name.clone(),
            node: Arc::downgrade(node),
            this: this.clone(),
            record: Mutex::new(record),
            has_ended: AtomicBool::new(false),
            disk: Mutex::new(disk),
            source: Mutex::new(None),
            clients: Arc::default(),
            withdrawals: watch::channel(0).0,
            stop: watch::channel(false).0,
            copying: Mutex::default(),
            offering: Mutex::default(),
            trouble: Mutex::new(None),
            rate: RateMeter::default(),
            is_marked: Arc::default(),
            custody: OnceLock::new(),
        })
    }

    /// Starts the volume's task. Once.
    pub(super) fn start(self: &Arc<Self>, machine: crate::handover::Machine, first: Vec<crate::handover::Output>) {
        let (custody, _) = Custody::start(machine, first, |custody| {
            let _ = self.custody.set(custody.clone());
            Arc::clone(self)
        });
        let _ = self.custody.set(custody);
    }

    /// The volume's task. It is started before anybody else sees the entry.
    pub fn custody(&self) -> &Custody {
        self.custody.get().expect("the task is started before the entry is shared")
    }

    /// What is journalled.
    pub fn record(&self) -> VolumeRecord {
        self.record.lock().clone()
    }

    /// The open volume, or why there is none.
    pub fn volume(&self) -> Result<Arc<Volume>, String> {
        match &*self.disk.lock() {
            Disk::Open(volume, _) => Ok(Arc::clone(volume)),
            Disk::Shut(why) => Err(why.clone()),
        }
    }

    pub(super) fn key(&self) -> Option<VolumeKey> {
        match &*self.disk.lock() {
            Disk::Open(_, key) => *key,
            Disk::Shut(_) => None,
        }
    }

    pub(super) fn clients(&self) -> u32 {
        self.clients.load(Ordering::Relaxed)
    }

    /// Changes what is journalled beside the ownership: durable before it returns. None, and nothing written, if the volume is gone.
    pub(super) fn change_record(&self, change: impl FnOnce(&mut VolumeRecord)) -> Option<Result<(), RecordError>> {
        let node = self.node.upgrade()?;
        let mut record = self.record.lock();
        if self.has_ended.load(Ordering::Acquire) {
            return None;
        }
        let mut next = record.clone();
        change(&mut next);
        let saved = node.records.save(&next);
        if saved.is_ok() {
            *record = next;
        }
        Some(saved)
    }

    /// A change of ownership in the journal, and then in memory. Blocking.
    fn write(&self, row: &Row) -> Result<(), String> {
        let node = self.node.upgrade().ok_or("the site is shutting down")?;
        let mut record = self.record.lock();
        let mut next = record.clone();
        if let Some(held) = &row.held {
            next.held = held.clone();
        }
        if row.is_new_content {
            next.generation = next.generation.next();
        }
        node.records.change(&next, row).map_err(|error| error.to_string())?;
        *record = next;
        self.has_ended.store(row.held.is_none(), Ordering::Release);
        drop(record);
        if let Some(held) = &row.held {
            tracing::info!(volume = %self.name, epoch = %held.epoch, state = ?held.state, "ownership");
        }
        if let Some(Held { state: State::Fenced { .. }, .. }) = row.held {
            self.withdrawals.send_modify(|count| *count += 1);
            // Nothing is fetched for it any more.
            if let Some(key) = self.key() {
                node.fetch.close(key);
            }
        }
        let source = self.source.lock().clone();
        if let (Some(source), Some(State::Owned)) = (source, row.held.as_ref().map(|held| &held.state)) {
            // It rests no more. Before any write is admitted; if it fails, all of this is done again.
            source.manifest.take_back().map_err(|error| error.to_string())?;
        }
        if row.is_new_content && !is_planted(Bug::OpeningOutlivesRelease) {
            node.renew_generation(self);
        }
        if row.owes.is_some() {
            node.debts.wake();
        }
        Ok(())
    }

    fn strong(&self) -> Option<(Arc<Entry>, Arc<Inventory>)> {
        Some((self.this.upgrade()?, self.node.upgrade()?))
    }

    /// Writes back what guests wrote until little of it is left, while they go on.
    async fn write_back(&self) -> Result<(), No> {
        let volume = self.volume().map_err(|_| No::NoImage)?;
        let mut before = Duration::MAX;
        for round in 0..MOST_PRESYNCS {
            let took = volume.presync().await.map_err(|error| No::Failed(Refusal::Internal, error.to_string()))?;
            let shrinks = took.as_secs_f64() < before.as_secs_f64() * SHRINKS_BELOW;
            if took <= SHORT_SYNC || round >= LEAST_PRESYNCS && !shrinks {
                break;
            }
            before = took;
        }
        Ok(())
    }

    /// The gate is shut by now.
    async fn drain(&self, is_for_peer: bool) -> Result<(), No> {
        let volume = match self.volume() {
            Ok(volume) => volume,
            Err(_) if is_for_peer => return Err(No::NoImage),
            // Nothing can be under way.
            Err(_) => return Ok(()),
        };
        let failed = |error: VolumeError| No::Failed(Refusal::Internal, error.to_string());
        volume.drained().await;
        volume.flush().await.map_err(failed)?;
        if !is_for_peer {
            return Ok(());
        }
        let source = self.source.lock().clone().ok_or(No::NoImage)?;
        let Some((entry, node)) = self.strong() else { return Err(No::ShuttingDown) };
        let marking = Arc::clone(&node);
        let rested = node.run_apart(move || {
            source.manifest.release()?;
            // Whoever asked may be gone, and guests be let in again.
            marking.mark(&entry, true, || source.manifest.is_sealed());
            Ok::<(), SourceError>(())
        });
        let rested = rested.await.map_err(|error| No::Failed(Refusal::Internal, error))?;
        rested.map_err(|error| No::Failed(error.refusal(), error.to_string()))
    }

    /// Runs the copy until everything is here, or it is stopped.
    async fn run_copy(self: Arc<Self>, mut stopped: watch::Receiver<bool>) {
        let Ok(volume) = self.volume() else { return };
        let with_bulk = self.record.lock().pace.with_bulk;
        let mut stop = self.stop.subscribe();
        let copied = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => return,
            // Also when the sender is gone: another copy has replaced this one.
            _ = stopped.wait_for(|stopped| *stopped) => return,
            copied = run_bulk(Arc::clone(&volume), with_bulk) => copied,
        };
        match copied {
            Ok(()) => self.custody().arrived(),
            Err(error) => {
                tracing::error!(volume = %self.name, %error, "the copy has ended before it was complete");
                *self.trouble.lock() = Some(error.to_string());
            }
        }
    }

    /// Asks until the answer is one that will not change by itself.
    async fn ask_until_final(self: Arc<Self>, peer: Name, question: Question) -> Answer {
        let mut pause = ASK_AGAIN[0];
        loop {
            let Some(node) = self.node.upgrade() else { return Answer::Refused(None, No::ShuttingDown) };
            let answer = node.ask_peer(&peer, &self.name, &question).await;
            drop(node);
            match answer {
                Some(answer) if !answer.is_passing() => return answer,
                Some(Answer::Refused(_, why)) => *self.trouble.lock() = Some(why.to_string()),
                _ => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(ASK_AGAIN[1]);
        }
    }
}

impl Keeper for Entry {
    fn facts(&self) -> Facts {
        let clients = self.clients();
        match self.volume() {
            Ok(volume) => Facts {
                clients,
                is_written: volume.has_guest_writes(),
                written_bytes: volume.guest_written_bytes(),
                has_image: true,
            },
            Err(_) => {
                let record = self.record.lock().clone();
                let node = self.node.upgrade();
                // What cannot be told counts as written: it is for a person to throw away.
                let is_written = node.is_none_or(|node| node.was_written(&record).unwrap_or(true));
                Facts { clients, is_written, written_bytes: 0, has_image: false }
            }
        }
    }

    fn journal<'a>(&'a self, row: &'a Row) -> BoxFuture<'a, Result<(), String>> {
        let (entry, row) = (self.this.upgrade(), row.clone());
        Box::pin(async move {
            let entry = entry.ok_or("the site is shutting down")?;
            let node = entry.node.upgrade().ok_or("the site is shutting down")?;
            node.run_apart(move || entry.write(&row)).await?
        })
    }

    fn admit(&self) {
        if let Ok(volume) = self.volume() {
            volume.unfence();
        }
    }

    fn bar(&self) {
        if let Ok(volume) = self.volume() {
            volume.bar();
        }
    }

    fn prepare(&self) -> BoxFuture<'static, Result<(), No>> {
        let entry = self.this.upgrade();
        Box::pin(async move {
            match entry {
                Some(entry) => entry.write_back().await,
                None => Err(No::ShuttingDown),
            }
        })
    }

    fn fence(&self, is_for_peer: bool) -> BoxFuture<'static, Result<(), No>> {
        let entry = self.this.upgrade();
        Box::pin(async move {
            match entry {
                Some(entry) => entry.drain(is_for_peer).await,
                None => Err(No::ShuttingDown),
            }
        })
    }

    fn fill(&self) -> BoxFuture<'static, Result<(), No>> {
        let volume = self.volume();
        Box::pin(async move {
            let volume = volume.map_err(|_| No::NoImage)?;
            let filled =
                volume.fill_absent().await.map_err(|error| No::Failed(Refusal::Internal, error.to_string()))?;
            tracing::warn!(volume = %volume.name(), bytes = filled, "what never arrived was given up: it reads as zeros from now on");
            Ok(())
        })
    }

    fn ask(&self, peer: Name, question: Question) -> BoxFuture<'static, Answer> {
        let entry = self.this.upgrade();
        Box::pin(async move {
            match entry {
                Some(entry) => entry.ask_until_final(peer, question).await,
                None => Answer::Refused(None, No::ShuttingDown),
            }
        })
    }

    fn copy(&self) {
        *self.trouble.lock() = None;
        let Some(entry) = self.this.upgrade() else { return };
        let (stop, stopped) = watch::channel(false);
        *self.copying.lock() = Some(stop);
        tokio::spawn(entry.run_copy(stopped));
    }

    fn stop_copy(&self) {
        *self.copying.lock() = None;
    }

    fn offer(&self) {
        let Some((entry, node)) = self.strong() else { return };
        *self.copying.lock() = None;
        // Not awaited: it waits for the writes that nobody noted, which may be a TRIM of everything.
        tokio::spawn(async move {
            let (offering, offered) = (Arc::clone(&node), Arc::clone(&entry));
            if let Err(why) = node.run_apart(move || offering.offer(&offered)).await.and_then(|done| done) {
                tracing::error!(volume = %entry.name, why, "the volume is complete, but no peer can fetch it from here");
                *entry.trouble.lock() = Some(why);
            }
        });
    }

    fn end(&self, with_image: bool) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let _ = self.stop.send(true);
            *self.copying.lock() = None;
            let disk = std::mem::replace(&mut *self.disk.lock(), Disk::Shut("it is gone".into()));
            if let Some(source) = self.source.lock().take() {
                source.manifest.close();
            }
            let Some((entry, node)) = self.strong() else { return };
            let volume = match disk {
                Disk::Open(volume, key) => {
                    // After this, whoever still holds it reads nothing, writes nothing and leaves no row.
                    volume.close();
                    volume.closed().await;
                    if let Some(key) = key {
                        node.fetch.close(key);
                    }
                    Some(volume)
                }
                Disk::Shut(_) => None,
            };
            if with_image && let Some(outside) = node.outside() {
                outside.delete_image(&self.record(), volume.as_deref());
            }
            node.forget(&entry);
            tracing::info!(volume = %self.name, "nothing of the volume is served here any more");
        })
    }
}

/// An answer of the fetcher's, as the machine understands it; None where there was none.
pub(super) fn answer_of(asked: Result<u64, FetchError>) -> Option<Answer> {
    match asked {
        Ok(epoch) => Some(Answer::Done(Epoch(epoch))),
        Err(FetchError::Refused { peer, refusal, epoch, why }) => {
            let holds = Some(Epoch(epoch)).filter(|epoch| epoch.0 > 0);
            Some(Answer::Refused(holds, No::Peer { peer, refusal, why }))
        }
        Err(
            FetchError::Inconsistent { .. }
            | FetchError::Contradiction { .. }
            | FetchError::Gone
            | FetchError::UnknownPeer,
        ) => None,
    }
}
