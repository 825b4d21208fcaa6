//! The background copy of one volume: page after page, zero blocks by their flag, the rest through the fetcher.
//! Must not know peers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::relocation::{Relocation, land};
use super::{Volume, VolumeError};
use crate::core::ids::{BlockIndex, Class};
use crate::core::manifest::{Page, PageIndex};
use crate::core::wire::Refusal;
use crate::fetch::FetchError;
use crate::seeded_bugs::{Bug, is_planted};
use crate::workers::Urgency;

/// Wants of one volume that the fetcher holds at a time: more than any bandwidth-delay product needs in blocks.
const OPEN_WANTS: usize = 2048;
/// Pages loaded ahead of the copy.
const PAGES_AHEAD: u64 = 8;
/// How often residency becomes durable when no guest flushes: what a crash may fetch again.
const CHECKPOINT: Duration = Duration::from_secs(1);
/// How long the copy rests after the disk was full or a block was refused.
const REST: Duration = Duration::from_secs(2);

/// The switches of a background copy, and what it says of itself.
#[derive(Debug, Default)]
pub struct BulkControl {
    is_paused: AtomicBool,
    limit_bytes_per_s: AtomicU64,
    changed: Notify,
    state: Mutex<BulkState>,
}

/// How a background copy fares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BulkState {
    /// It was not asked for.
    #[default]
    Off,
    /// It runs, or waits for the link.
    Running,
    /// It waits, and tries again by itself: the disk is full.
    Waiting(String),
    /// The peer will not give what is missing.
    Failed(String),
    /// Everything is here.
    Done,
}

impl BulkControl {
    /// Whether somebody paused it.
    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Acquire)
    }

    /// The most wire bytes per second; None: no limit.
    pub fn limit_bytes_per_s(&self) -> Option<u64> {
        Some(self.limit_bytes_per_s.load(Ordering::Acquire)).filter(|limit| *limit > 0)
    }

    /// Pauses or resumes; [`Relocation::apply_pace`] tells the fetcher.
    pub fn set_paused(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Limits, or lifts the limit.
    pub fn set_limit(&self, bytes_per_s: Option<u64>) {
        self.limit_bytes_per_s.store(bytes_per_s.unwrap_or(0), Ordering::Release);
    }

    /// How it fares.
    pub fn state(&self) -> BulkState {
        self.state.lock().clone()
    }

    pub(super) fn set_state(&self, state: BulkState) {
        *self.state.lock() = state;
    }

    async fn until_running(&self) {
        super::gate::until(&self.changed, || !self.is_paused()).await;
    }
}

/// Watches a volume until every block is in its file and durably known to be; copies the absent ones if `with_bulk`. Returns an
/// error only when going on makes no sense; a full disk and a lost link are waited out.
pub async fn run_bulk(volume: Arc<Volume>, with_bulk: bool) -> Result<(), VolumeError> {
    let run = run_while_open(&volume, with_bulk);
    tokio::select! {
        biased;
        done = run => done,
        () = volume.closing() => Err(volume.life.is_over()),
    }
}

async fn run_while_open(volume: &Arc<Volume>, with_bulk: bool) -> Result<(), VolumeError> {
    let relocation = volume.relocation().ok_or(FetchError::Gone)?;
    let copied = async {
        if !with_bulk {
            return std::future::pending().await;
        }
        copy_until_done(volume, &relocation).await
    };
    let checkpoints = async {
        loop {
            tokio::time::sleep(CHECKPOINT).await;
            if volume.disk.bits().absent() == 0 {
                return;
            }
            if volume.needs_checkpoint()
                && let Err(error) = volume.flush().await
            {
                tracing::warn!(volume = %volume.name, %error, "residency could not be made durable");
            }
        }
    };
    tokio::select! {
        biased;
        copied = copied => copied?,
        () = checkpoints => {}
    }
    // The last blocks become durable before anybody is told that they are here.
    while !is_planted(Bug::CompleteBeforeSync) {
        match volume.flush().await {
            Ok(()) => break,
            Err(error @ (VolumeError::SyncFailed { .. } | VolumeError::ShuttingDown | VolumeError::Closed { .. })) => {
                return Err(error);
            }
            Err(error) => {
                relocation.bulk.set_state(BulkState::Waiting(error.to_string()));
                tokio::time::sleep(REST).await;
            }
        }
    }
    relocation.bulk.set_state(BulkState::Done);
    volume.finish();
    Ok(())
}

async fn copy_until_done(volume: &Arc<Volume>, relocation: &Arc<Relocation>) -> Result<(), VolumeError> {
    loop {
        relocation.bulk.set_state(BulkState::Running);
        match copy_once(volume, relocation).await {
            Ok(()) if volume.disk.bits().absent() == 0 => return Ok(()),
            // Something is still on its way to a guest, or was dropped under it.
            Ok(()) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) if error.is_no_space() => {
                tracing::warn!(volume = %volume.name, %error, "the disk is full; the copy waits for room");
                let why = format!("the disk is full: make room for {}", volume.image().path().display());
                relocation.bulk.set_state(BulkState::Waiting(why));
                tokio::time::sleep(REST).await;
            }
            Err(VolumeError::Fetch(FetchError::Gone)) => return Err(FetchError::Gone.into()),
            Err(error @ (VolumeError::ShuttingDown | VolumeError::Closed { .. })) => return Err(error),
            Err(error) => {
                if let VolumeError::Fetch(FetchError::Refused { refusal: Refusal::ImageChanged, .. }) = &error {
                    relocation.pages.forget_doubtful();
                }
                tracing::error!(volume = %volume.name, %error, "the copy cannot go on now; trying again");
                relocation.bulk.set_state(BulkState::Failed(error.to_string()));
                tokio::time::sleep(REST).await;
            }
        }
    }
}

/// One pass over what is absent.
async fn copy_once(volume: &Arc<Volume>, relocation: &Arc<Relocation>) -> Result<(), VolumeError> {
    let geometry = volume.geometry;
    let bits = volume.disk.bits();
    let control = &relocation.bulk;
    let mut under_way = FuturesUnordered::new();
    let mut ahead = PageIndex(0);
    for page in (0..geometry.pages()).map(PageIndex) {
        let blocks = page.blocks(geometry.blocks());
        if bits.first_absent(blocks.clone()).is_none() {
            continue;
        }
        until_running(control, &mut under_way).await?;
        while ahead.0 < (page.0 + PAGES_AHEAD).min(geometry.pages()) {
            ahead.0 = ahead.0.max(page.0);
            if bits.first_absent(ahead.blocks(geometry.blocks())).is_some() {
                let (pages, next) = (Arc::clone(&relocation.pages), ahead);
                tokio::spawn(async move { pages.load(next).await });
            }
            ahead.0 += 1;
        }
        // What is under way goes on while the page is loaded.
        let ids = {
            let load = relocation.pages.load(page);
            tokio::pin!(load);
            loop {
                tokio::select! {
                    biased;
                    ids = &mut load => break ids?,
                    Some(landed) = under_way.next(), if !under_way.is_empty() => landed?,
                }
            }
        };
        land_zeros(volume, page, &ids).await?;
        let mut from = blocks.start;
        while let Some(block) = bits.first_absent(from..blocks.end) {
            from = block.0 + 1;
            let Some(id) = ids.id_of(block).filter(|id| !id.is_zero()) else { continue };
            while under_way.len() >= OPEN_WANTS {
                if let Some(landed) = under_way.next().await {
                    landed?;
                }
            }
            until_running(control, &mut under_way).await?;
            let len_bytes = geometry.len_of(block);
            let wanted = relocation.fetch.want(relocation.key, block, Some(id), Class::Bulk, len_bytes);
            under_way.push(fetch_one(Arc::clone(volume), block, wanted));
        }
    }
    while let Some(landed) = under_way.next().await {
        landed?;
    }
    Ok(())
}

/// Waits while the copy is paused. What is under way lands meanwhile: it holds memory that other volumes' bulk waits
/// for.
async fn until_running<F: Future<Output = Result<(), VolumeError>>>(
    control: &BulkControl,
    under_way: &mut FuturesUnordered<F>,
) -> Result<(), VolumeError> {
    let running = control.until_running();
    tokio::pin!(running);
    loop {
        tokio::select! {
            biased;
            () = &mut running => return Ok(()),
            Some(landed) = under_way.next(), if !under_way.is_empty() => landed?,
        }
    }
}

async fn fetch_one(volume: Arc<Volume>, block: BlockIndex, wanted: crate::fetch::Wanted) -> Result<(), VolumeError> {
    let fetched = wanted.await?;
    volume.stats.count_arrived(&fetched);
    let (disk, stats) = (Arc::clone(&volume.disk), Arc::clone(&volume.stats));
    match volume.workers.run(Urgency::Background, move || land(&disk, &stats, block, &fetched)).await {
        Some(landed) => landed,
        None => Err(VolumeError::ShuttingDown),
    }
}

/// Marks the zero blocks of a page.
async fn land_zeros(volume: &Arc<Volume>, page: PageIndex, ids: &Arc<Page>) -> Result<(), VolumeError> {
    let zeros: Vec<BlockIndex> = page
        .blocks(volume.geometry.blocks())
        .zip(ids.ids())
        .filter(|(_, id)| id.is_zero())
        .map(|(block, _)| BlockIndex(block))
        .filter(|block| !volume.disk.bits().is_resident(*block))
        .collect();
    if zeros.is_empty() {
        return Ok(());
    }
    let (disk, stats) = (Arc::clone(&volume.disk), Arc::clone(&volume.stats));
    let landed = volume.workers.run(Urgency::Background, move || disk.land_zeros(&zeros)).await;
    stats.count_zero_landed(landed.ok_or(VolumeError::ShuttingDown)??);
    Ok(())
}

impl Volume {
    /// Every block is here, durably, or what is not was given up by a decision that is journalled: nothing of the relocation is looked at
    /// any more. Guests' writes go past the residency from then on: a landing that came after one of them would undo it.
    pub fn finish(&self) {
        self.disk.give_up_absent();
        self.is_complete.store(true, Ordering::Release);
    }

    /// Drops the residency rows of a volume whose completion is recorded elsewhere. Whether a guest has written stays noted: see
    /// [`Volume::arrived`].
    pub fn forget_journal(&self) -> Result<(), VolumeError> {
        Ok(self.journal.forget_residency()?)
    }
}
