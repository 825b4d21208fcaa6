//! Reads of a volume that is still arriving: which blocks to fetch, and what becomes of them.
//! Must not know how blocks are fetched.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use super::pages::Pages;
use super::readahead::Readahead;
use super::{Volume, VolumeError};
use crate::core::ids::{BlockId, BlockIndex, Class};
use crate::core::manifest::{Geometry, PageIndex};
use crate::core::residency::Presence;
use crate::core::wire::Refusal;
use crate::fetch::{Block, Fetch, FetchError, Origin, VolumeKey};
use crate::workers::Urgency;

/// Where a volume's absent blocks come from.
pub struct Relocation {
    pub(super) fetch: Fetch,
    pub(super) key: VolumeKey,
    pub(super) pages: Arc<Pages>,
    /// How long a guest's read waits for a peer that cannot be reached; None: for ever.
    demand_timeout: Option<Duration>,
    readahead: Mutex<Readahead>,
    /// Guests' reads that wait for their blocks.
    demands: AtomicU64,
    /// Why the peer would not give the block that a guest last read.
    refusal: Mutex<Option<String>>,
    pub(super) bulk: super::bulk::BulkControl,
}

impl Relocation {
    /// A volume at a peer, opened or attached to as `key`.
    pub fn new(fetch: Fetch, key: VolumeKey, geometry: Geometry, demand_timeout: Option<Duration>) -> Relocation {
        Relocation {
            pages: Arc::new(Pages::new(fetch.clone(), key, geometry)),
            fetch,
            key,
            demand_timeout,
            readahead: Mutex::default(),
            demands: AtomicU64::new(0),
            refusal: Mutex::default(),
            bulk: super::bulk::BulkControl::default(),
        }
    }

    /// What the fetcher calls it.
    pub fn key(&self) -> VolumeKey {
        self.key
    }

    /// Blocks that guests' reads wait for now.
    pub fn waiting_demands(&self) -> u64 {
        self.demands.load(Ordering::Relaxed)
    }

    /// How long each of them waits before it is an error; None: for ever.
    pub fn demand_timeout(&self) -> Option<Duration> {
        self.demand_timeout
    }

    /// Why the peer would not give the last block that a guest read, if that is so.
    pub fn refusal(&self) -> Option<String> {
        self.refusal.lock().clone()
    }

    /// The background copy's switches and its state.
    pub fn bulk(&self) -> &super::bulk::BulkControl {
        &self.bulk
    }

    /// Applies the switches to the fetcher.
    pub fn apply_pace(&self) {
        self.fetch.pace(self.key, self.bulk.is_paused(), self.bulk.limit_bytes_per_s());
    }
}

/// A read of which some blocks are absent.
pub(super) async fn read_mixed(
    volume: &Volume,
    offset: u64,
    len_bytes: u32,
    blocks: Range<u64>,
) -> Result<Bytes, VolumeError> {
    let disk = Arc::clone(&volume.disk);
    let missing: Vec<BlockIndex> = blocks
        .clone()
        .map(BlockIndex)
        .filter(|block| !disk.is_readable(*block, disk.within(*block, offset, u64::from(len_bytes))))
        .collect();
    look_ahead(volume, &blocks);
    let demanded = missing.into_iter().map(|block| async move {
        match demand(volume, block).await {
            Ok(fetched) => Ok(Some((block, fetched))),
            // It came another way meanwhile: by the guest's own write, or with the last of bulk, after which the source
            // is let go; or it was given up.
            Err(_)
                if volume.is_complete()
                    || volume.disk.is_readable(block, volume.disk.within(block, offset, u64::from(len_bytes))) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    });
    let fetched: Vec<(BlockIndex, Block)> =
        futures::future::try_join_all(demanded).await?.into_iter().flatten().collect();
    count_reads(volume, len_bytes, &blocks, &fetched);
    let bases: Vec<(BlockIndex, Option<Bytes>)> = fetched
        .iter()
        .map(|(block, fetched)| (*block, (!fetched.id.is_zero()).then(|| fetched.bytes.clone())))
        .collect();
    let assemble = move || {
        let mut buf = BytesMut::zeroed(len_bytes as usize);
        let mut bases = bases.iter().peekable();
        for block in blocks.map(BlockIndex) {
            let within = disk.within(block, offset, u64::from(len_bytes));
            let at = disk.geometry.offset_of(block) + u64::from(within.start);
            let from = (at - offset) as usize;
            let out = &mut buf[from..from + within.len()];
            match bases.next_if(|(missing, _)| *missing == block) {
                Some((_, base)) => disk.read_over(block, within, base.as_deref(), out)?,
                None => disk.image.read_at(at, out)?,
            }
        }
        Ok(buf.freeze())
    };
    let answer = volume.on_disk(assemble).await?;
    for (block, fetched) in fetched {
        land_later(volume, block, fetched).await;
    }
    Ok(answer)
}

/// Fetches a block and puts it into the file before it returns.
pub(super) async fn make_resident(volume: &Volume, block: BlockIndex) -> Result<(), VolumeError> {
    let fetched = match demand(volume, block).await {
        Err(_) if volume.is_complete() || volume.disk.bits().is_resident(block) => return Ok(()),
        fetched => fetched?,
    };
    let (disk, stats) = (Arc::clone(&volume.disk), Arc::clone(&volume.stats));
    match volume.workers.run(Urgency::Change, move || land(&disk, &stats, block, &fetched)).await {
        Some(landed) => landed,
        None => Err(VolumeError::ShuttingDown),
    }
}

/// Writes a fetched block into the file. Blocking.
pub(super) fn land(
    disk: &super::disk::Disk,
    stats: &super::stats::Stats,
    block: BlockIndex,
    fetched: &Block,
) -> Result<(), VolumeError> {
    if fetched.id.is_zero() {
        stats.count_zero_landed(disk.land_zeros(&[block])?);
    } else if disk.land(block, &fetched.bytes)? {
        stats.count_landed(fetched);
    }
    Ok(())
}

/// A block that a guest waits for.
async fn demand(volume: &Volume, block: BlockIndex) -> Result<Block, VolumeError> {
    let relocation = volume.relocation().ok_or(FetchError::Gone)?;
    let len_bytes = volume.geometry.len_of(block);
    let id = relocation.pages.id_of(block);
    if id == Some(BlockId::ZERO) {
        let bytes = Bytes::from(vec![0; len_bytes as usize]);
        let (origin, class) = (Origin::Zero, Class::Demand);
        return Ok(Block { id: BlockId::ZERO, bytes, origin, wire_bytes: 0, class, budget: None });
    }
    if id.is_none() {
        // The block comes inline in one round trip; its neighbours' ids come along for the next read.
        let pages = Arc::clone(&relocation.pages);
        volume.runtime.spawn(async move {
            let _ = pages.load(PageIndex::of(block)).await;
        });
    }
    let begun = Instant::now();
    let wanted = relocation.fetch.want(relocation.key, block, id, Class::Demand, len_bytes);
    let waits = Counted::new(&relocation.demands);
    let wanted = async {
        tokio::select! {
            biased;
            fetched = wanted => Ok(fetched),
            // Whoever waits here may hold up those who give the volume up, and waits in vain.
            () = volume.closing() => Err(volume.life.is_over()),
        }
    };
    let fetched = match relocation.demand_timeout {
        Some(after) => match tokio::time::timeout(after, wanted).await {
            Ok(fetched) => fetched?,
            Err(_) => {
                let why = relocation.fetch.waiting().await.remove(&relocation.key);
                let why = why.map_or_else(|| "the peer is connected and does not answer".to_owned(), |w| w.to_string());
                return Err(VolumeError::TimedOut { after, why });
            }
        },
        None => wanted.await?,
    };
    drop(waits);
    match &fetched {
        // What was announced stays: the source may have another image by now.
        Err(
            error @ (FetchError::Refused { .. } | FetchError::Inconsistent { .. } | FetchError::Contradiction { .. }),
        ) => {
            if matches!(error, FetchError::Refused { refusal: Refusal::ImageChanged, .. }) {
                relocation.pages.forget_doubtful();
            }
            *relocation.refusal.lock() = Some(error.to_string());
        }
        Err(FetchError::Gone | FetchError::UnknownPeer) => {}
        Ok(_) => *relocation.refusal.lock() = None,
    }
    let fetched = fetched?;
    if !fetched.id.is_zero() {
        volume.disk.check_len(block, fetched.bytes.len())?;
    }
    volume.stats.count_demand(begun.elapsed());
    volume.stats.count_arrived(&fetched);
    Ok(fetched)
}

/// One more of something, for as long as this lives.
struct Counted<'a>(&'a AtomicU64);

impl Counted<'_> {
    fn new(counter: &AtomicU64) -> Counted<'_> {
        counter.fetch_add(1, Ordering::Relaxed);
        Counted(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The guest has its answer; the file gets the block now. If too many wait for the file already, the guest waits along.
async fn land_later(volume: &Volume, block: BlockIndex, fetched: Block) {
    let Ok(permit) = Arc::clone(&volume.landing).acquire_owned().await else { return };
    let (disk, stats, name) = (Arc::clone(&volume.disk), Arc::clone(&volume.stats), volume.name.clone());
    let workers = volume.workers.clone();
    volume.runtime.spawn(async move {
        let landed = workers.run(Urgency::Soon, move || land(&disk, &stats, block, &fetched)).await;
        if let Some(Err(error)) = landed
            && !matches!(error, VolumeError::Closed { .. })
        {
            // It stays absent and is fetched again when it is needed again.
            tracing::warn!(volume = %name, block = block.0, %error, "a fetched block could not be written");
        }
        drop(permit);
    });
}

/// Absent blocks that one question about extents looks at: milliseconds, where all of a large disk would be seconds of a
/// thread that other guests wait for. Whoever wants to know more asks again from there.
const MAX_LOOKED_AT_BLOCKS: u64 = 1 << 16;

/// Of them, those that are looked at before guests' writes get their turn.
const LOOKED_AT_UNDER_LOCK: usize = 1024;

/// Blocks of one hint that are looked at.
const MAX_HINT_BLOCKS: u64 = 4096;

fn look_ahead(volume: &Volume, blocks: &Range<u64>) {
    let Some(relocation) = volume.relocation() else { return };
    let guess = relocation.readahead.lock().on_read(
        BlockIndex(blocks.start),
        blocks.end - blocks.start,
        volume.geometry.blocks(),
    );
    fetch_ahead(volume, guess);
}

fn fetch_ahead(volume: &Volume, blocks: Range<u64>) {
    let Some(relocation) = volume.relocation() else { return };
    for block in blocks.map(BlockIndex) {
        let id = relocation.pages.id_of(block);
        if volume.disk.bits().is_resident(block) || id == Some(BlockId::ZERO) {
            continue;
        }
        let Ok(permit) = Arc::clone(&volume.ahead).try_acquire_owned() else { return };
        let len_bytes = volume.geometry.len_of(block);
        let wanted = relocation.fetch.want(relocation.key, block, id, Class::Readahead, len_bytes);
        let (disk, stats, workers) = (Arc::clone(&volume.disk), Arc::clone(&volume.stats), volume.workers.clone());
        volume.runtime.spawn(async move {
            if let Ok(fetched) = wanted.await {
                stats.count_arrived(&fetched);
                workers.run(Urgency::Soon, move || land(&disk, &stats, block, &fetched)).await;
            }
            drop(permit);
        });
    }
}

fn count_reads(volume: &Volume, len_bytes: u32, blocks: &Range<u64>, fetched: &[(BlockIndex, Block)]) {
    volume.stats.count_reads(|reads| {
        let mut rest = u64::from(len_bytes);
        for (_, block) in fetched {
            // A read's share of its first and last block is less; the sum is what was read.
            let share = (block.bytes.len() as u64).min(rest);
            rest -= share;
            match block.origin {
                Origin::Zero => reads.zero_bytes += share,
                Origin::Store => reads.store_bytes += share,
                Origin::Wire | Origin::Joined | Origin::Shared => reads.wire_bytes += share,
            }
        }
        let disk = &volume.disk;
        let is_partial = |block: u64| !disk.bits().is_resident(BlockIndex(block));
        if fetched.is_empty() && blocks.clone().any(is_partial) {
            reads.partial_bytes += rest;
        } else {
            reads.resident_bytes += rest;
        }
    });
}

impl Volume {
    /// A hint that a range will be read: absent blocks of it are fetched as readahead, as far as there is room for them.
    pub fn prefetch(&self, offset: u64, len_bytes: u64) {
        if self.is_complete() || len_bytes == 0 || self.life.is_closed() {
            return;
        }
        let blocks = self.disk.blocks_of(offset, len_bytes);
        // There is room for far less; a hint about the whole disk must not be gone through block by block.
        fetch_ahead(self, blocks.start..blocks.end.min(blocks.start + MAX_HINT_BLOCKS));
    }

    /// Runs of a range by where their bytes are. Of a large range only the beginning is looked at: ask again from there.
    pub async fn presence(
        &self,
        offset: u64,
        len_bytes: u64,
        max_runs: usize,
    ) -> Result<Vec<(u64, Presence)>, VolumeError> {
        self.life.check()?;
        let end = offset + len_bytes;
        if self.is_complete() {
            return Ok(vec![(len_bytes, Presence::Present)]);
        }
        let disk = Arc::clone(&self.disk);
        self.on_disk(move || {
            let blocks = disk.blocks_of(offset, end - offset);
            let blocks = blocks.start..blocks.end.min(blocks.start + MAX_LOOKED_AT_BLOCKS);
            let mut runs: Vec<(u64, Presence)> = Vec::new();
            let mut at = offset;
            // The lock is given back now and then: guests' writes want it.
            for first in blocks.clone().step_by(LOOKED_AT_UNDER_LOCK) {
                let residency = disk.residency();
                for block in first..blocks.end.min(first + LOOKED_AT_UNDER_LOCK as u64) {
                    let next = disk.geometry.offset_of(BlockIndex(block + 1)).min(end);
                    let presence = residency.presence(BlockIndex(block));
                    let count = runs.len();
                    match runs.last_mut() {
                        Some((len, last)) if *last == presence => *len += next - at,
                        _ if count == max_runs => return Ok(runs),
                        _ => runs.push((next - at, presence)),
                    }
                    at = next;
                }
            }
            Ok(runs)
        })
        .await
    }

    /// Runs of a range that are known to read as zeros (true) or may hold data (false). Absent blocks count as data unless
    /// their page says that they are zero: absent is never zero.
    pub async fn allocation(
        &self,
        offset: u64,
        len_bytes: u64,
        max_runs: usize,
    ) -> Result<Vec<(u64, bool)>, VolumeError> {
        let runs = self.allocation_while_open(offset, len_bytes, max_runs).await;
        // Last: see `life`.
        self.life.check()?;
        runs
    }

    async fn allocation_while_open(
        &self,
        offset: u64,
        len_bytes: u64,
        max_runs: usize,
    ) -> Result<Vec<(u64, bool)>, VolumeError> {
        let end = offset + len_bytes;
        let is_complete = self.is_complete();
        let pages = self.relocation().map(|relocation| Arc::clone(&relocation.pages));
        let disk = Arc::clone(&self.disk);
        self.on_disk(move || {
            let mut runs: Vec<(u64, bool)> = Vec::new();
            let mut at = offset;
            let mut looked_at = 0;
            // Up to here everything was resident before the file is looked at below. The other way round a block that
            // lands in between would pass for the hole that was there before it.
            let mut resident_to = if is_complete { end } else { offset };
            while at < end && runs.len() <= max_runs && looked_at < MAX_LOOKED_AT_BLOCKS {
                if at >= resident_to {
                    let absent = disk.bits().first_absent(disk.blocks_of(at, end - at));
                    resident_to = absent.map_or(end, |block| disk.geometry.offset_of(block).clamp(at, end));
                }
                let data = disk.image.next_data(at)?.filter(|data| data.start < end);
                let (next, is_hole) = match &data {
                    Some(data) if data.start <= at => (data.end.min(end), false),
                    Some(data) => (data.start, true),
                    None => (end, true),
                };
                if !is_hole || at < resident_to {
                    let next = if is_hole { next.min(resident_to) } else { next };
                    push_run(&mut runs, next - at, is_hole);
                    at = next;
                    continue;
                }
                // A hole of the file where blocks are absent: block by block, up to one that has become resident since.
                while at < next && runs.len() <= max_runs && looked_at < MAX_LOOKED_AT_BLOCKS {
                    looked_at += 1;
                    let block = disk.geometry.block_size.index_of(at);
                    if disk.bits().is_resident(block) {
                        break;
                    }
                    let block_end = disk.geometry.offset_of(BlockIndex(block.0 + 1)).min(next);
                    let is_zero = pages.as_ref().is_some_and(|pages| pages.id_of(block) == Some(BlockId::ZERO));
                    push_run(&mut runs, block_end - at, is_zero);
                    at = block_end;
                }
            }
            runs.truncate(max_runs);
            Ok(runs)
        })
        .await
    }
}

fn push_run(runs: &mut Vec<(u64, bool)>, len_bytes: u64, is_zero: bool) {
    match runs.last_mut() {
        Some((last, state)) if *state == is_zero => *last += len_bytes,
        _ => runs.push((len_bytes, is_zero)),
    }
}
