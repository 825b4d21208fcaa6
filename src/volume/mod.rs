//! A disk that this site serves: read, write, flush over a raw file and its residency; blocks that are absent are fetched.
//! Must not know QUIC nor NBD.
//!
//! What is flushed survives: [`Volume::flush`] takes the residency that changed, syncs the file, and only then makes the
//! residency durable, in that order, before it is acknowledged.

mod bulk;
mod disk;
mod error;
mod gate;
mod journal;
mod pages;
mod readahead;
mod relocation;
mod stats;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use parking_lot::RwLock;

use crate::core::ids::{BlockIndex, Name, SECTOR_BYTES, is_zero};
use crate::core::manifest::Geometry;
use crate::core::residency::Residency;
use crate::image::{Image, ImageError};
use crate::pipe::Pipe;
use crate::seeded_bugs::{Bug, is_planted};
use crate::store::State;
use crate::workers::{Urgency, Workers};

use disk::Disk;
use gate::{FlushGate, WriteGate};
use journal::Journal;

pub use bulk::{BulkState, run_bulk};
pub use error::VolumeError;
pub use relocation::Relocation;
pub use stats::{Moved, Reads, Snapshot};

/// Told of every write before and after it happens, so that what is known of the content can be forgotten.
pub trait WriteObserver: Send + Sync + 'static {
    /// A write to these bytes is about to happen, or has just happened.
    fn note_write(&self, bytes: Range<u64>) -> Result<(), String>;
}

/// See the module. Shared by every client and by the background copy.
pub struct Volume {
    name: Name,
    geometry: Geometry,
    disk: Arc<Disk>,
    workers: Workers,
    journal: Journal,
    gate: Arc<WriteGate>,
    flushes: FlushGate,
    is_sync_broken: Arc<AtomicBool>,
    /// No block is absent and none ever will be: the path without any trace of relocation.
    is_complete: AtomicBool,
    relocation: RwLock<Option<Arc<Relocation>>>,
    observer: Arc<RwLock<Option<Arc<dyn WriteObserver>>>>,
    guest_wrote: AtomicBool,
    /// Whether the journal says that a guest writes here, or need not say it.
    is_guest_noted: Arc<AtomicBool>,
    stats: Arc<stats::Stats>,
    landing: Arc<tokio::sync::Semaphore>,
    /// Apart from `landing`: what is fetched ahead waits for the peer, what a guest has been answered must not.
    ahead: Arc<tokio::sync::Semaphore>,
    /// Where work goes on that outlives the request which began it: a client's own runtime ends with the client.
    runtime: tokio::runtime::Handle,
}

/// What a volume needs to live.
pub struct VolumeParts {
    /// Its name.
    pub name: Name,
    /// Where its bytes lie.
    pub image: Arc<Image>,
    /// Its shape.
    pub geometry: Geometry,
    /// Where residency is kept.
    pub state: Arc<dyn State>,
    /// Threads for file I/O.
    pub workers: Workers,
    /// Whether guests may write it now.
    pub is_owner: bool,
}

/// Blocks that were answered to a guest and wait to be written to the file. Beyond it, the guest waits for the file.
const LANDING_BLOCKS: usize = 128;
/// Blocks that are fetched ahead at a time.
const AHEAD_BLOCKS: usize = 128;

impl Volume {
    /// A volume all of whose blocks are in its file. Made within the daemon's runtime, which does its background work.
    pub fn complete(parts: VolumeParts) -> Volume {
        let residency = Residency::new(parts.geometry);
        Volume::new(parts, residency, true, false)
    }

    /// A volume whose blocks are (partly) still elsewhere. `is_new` says that the file was just made by [`Image::create`];
    /// otherwise residency is restored from the state database, and absent regions may hold what a crash left.
    pub fn relocating(parts: VolumeParts, is_new: bool) -> Result<Volume, VolumeError> {
        let mut residency = Residency::new(parts.geometry);
        let journal = Journal::new(Arc::clone(&parts.state), parts.name.clone());
        let guest_wrote = if is_new {
            journal.forget()?;
            false
        } else {
            // Also tells of a writeback that failed before this process had the file open.
            let synced = parts.image.sync_data();
            if let Err(error) = &synced {
                tracing::error!(volume = %parts.name, %error, "the file could not be synced: only what was flushed is believed");
            }
            journal.restore(&mut residency, synced.is_ok())?
        };
        let volume = Volume::new(parts, residency, false, !is_new);
        volume.is_guest_noted.store(guest_wrote, Ordering::Release);
        volume.guest_wrote.store(guest_wrote || volume.disk.residency().has_guest_writes(), Ordering::Release);
        Ok(volume)
    }

    fn new(parts: VolumeParts, residency: Residency, is_complete: bool, may_hold_residue: bool) -> Volume {
        Volume {
            disk: Arc::new(Disk::new(parts.image, residency, parts.geometry, may_hold_residue)),
            journal: Journal::new(parts.state, parts.name.clone()),
            name: parts.name,
            geometry: parts.geometry,
            workers: parts.workers,
            gate: Arc::new(WriteGate::new(parts.is_owner)),
            flushes: FlushGate::default(),
            is_sync_broken: Arc::default(),
            is_complete: AtomicBool::new(is_complete),
            relocation: RwLock::new(None),
            observer: Arc::default(),
            guest_wrote: AtomicBool::new(false),
            is_guest_noted: Arc::new(AtomicBool::new(is_complete)),
            stats: Arc::default(),
            landing: Arc::new(tokio::sync::Semaphore::new(LANDING_BLOCKS)),
            ahead: Arc::new(tokio::sync::Semaphore::new(AHEAD_BLOCKS)),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Its shape.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Its file.
    pub fn image(&self) -> &Arc<Image> {
        &self.disk.image
    }

    /// Whether guests may write it now.
    pub fn is_owner(&self) -> bool {
        self.gate.is_open()
    }

    /// Whether every block is in the file and durably known to be.
    pub fn is_complete(&self) -> bool {
        self.is_complete.load(Ordering::Acquire)
    }

    /// Whether a guest wrote anything here since the relocation began.
    pub fn has_guest_writes(&self) -> bool {
        self.guest_wrote.load(Ordering::Acquire)
    }

    /// Where absent blocks come from.
    pub fn set_relocation(&self, relocation: Arc<Relocation>) {
        *self.relocation.write() = Some(relocation);
    }

    /// The relocation under way, if there is one.
    pub fn relocation(&self) -> Option<Arc<Relocation>> {
        self.relocation.read().clone()
    }

    /// Who is told of writes. Returns when every write that it was not told of has ended, which may take as long as a
    /// TRIM of everything takes: blocks.
    pub fn set_observer(&self, observer: Option<Arc<dyn WriteObserver>>) {
        *self.observer.write() = observer;
    }

    /// Admits no write from now on, waits for those under way, and makes everything durable.
    pub async fn fence(&self) -> Result<(), VolumeError> {
        self.gate.close().await;
        self.flush().await
    }

    /// Admits writes: this site is the owner.
    pub fn unfence(&self) {
        self.gate.open();
    }

    /// Counters and gauges, as they stand.
    pub fn snapshot(&self) -> Snapshot {
        let (absent, written, partial) = if self.is_complete() {
            (0, 0, 0)
        } else {
            let bits = self.disk.bits();
            (bits.absent(), bits.written(), self.disk.residency().partial_blocks())
        };
        self.stats.snapshot(self.geometry.blocks(), absent, written, partial)
    }

    /// Reads `len_bytes` from `offset`, which lie within the volume. Absent blocks are fetched; everything else is served
    /// from the file without waiting for them.
    pub async fn read(&self, offset: u64, len_bytes: u32) -> Result<Bytes, VolumeError> {
        if len_bytes == 0 {
            return Ok(Bytes::new());
        }
        self.check_sync()?;
        let blocks = self.disk.blocks_of(offset, u64::from(len_bytes));
        if self.is_complete() || self.disk.bits().are_resident(blocks.clone()) {
            self.stats.count_resident(u64::from(len_bytes));
            let disk = Arc::clone(&self.disk);
            let read = move || {
                let mut buf = BytesMut::zeroed(len_bytes as usize);
                disk.image.read_at(offset, &mut buf)?;
                Ok(buf.freeze())
            };
            return self.on_disk(read).await;
        }
        relocation::read_mixed(self, offset, len_bytes, blocks).await
    }

    /// Reads into `buf` at once if that needs nothing but the page cache; None otherwise.
    pub fn try_read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), VolumeError>> {
        self.read_resident(offset, buf, Image::read_cached_at)
    }

    /// Reads into `buf` on the calling thread, which waits for the disk. None where that would not be all.
    pub fn read_here(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), VolumeError>> {
        self.read_resident(offset, buf, |image, offset, buf| Some(image.read_at(offset, buf)))
    }

    fn read_resident(
        &self,
        offset: u64,
        buf: &mut [u8],
        read: impl FnOnce(&Image, u64, &mut [u8]) -> Option<Result<(), ImageError>>,
    ) -> Option<Result<(), VolumeError>> {
        let len_bytes = buf.len() as u64;
        if !self.is_resident(offset, len_bytes) {
            return None;
        }
        let done = read(&self.disk.image, offset, buf)?;
        self.stats.count_resident(len_bytes);
        Some(done.map_err(VolumeError::from))
    }

    /// Puts the page cache's own pages into an empty pipe, as [`Volume::try_read_now`] reads them. None, and nothing put, where
    /// that would not be all; also where the range begins with zeros: whoever looks at the bytes may find a hole.
    pub fn read_into(&self, offset: u64, len_bytes: u32, pipe: &mut Pipe) -> Option<()> {
        if !self.is_resident(offset, u64::from(len_bytes)) {
            return None;
        }
        let mut begin = [0; SECTOR_BYTES as usize];
        let begin = &mut begin[..SECTOR_BYTES.min(len_bytes) as usize];
        self.disk.image.read_cached_at(offset, begin)?.ok().filter(|()| !is_zero(begin))?;
        self.disk.image.read_cached_into(offset, len_bytes as usize, pipe)?;
        self.stats.count_resident(u64::from(len_bytes));
        Some(())
    }

    /// Whether a range may be read from the file, whatever is fetched meanwhile.
    fn is_resident(&self, offset: u64, len_bytes: u64) -> bool {
        self.check_sync().is_ok()
            && (self.is_complete() || self.disk.bits().are_resident(self.disk.blocks_of(offset, len_bytes)))
    }

    /// Writes `data` at `offset`; with `fua`, returns when it is durable. Waits for the WAN only in one case: a write
    /// that begins or ends within a sector of an absent block.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), VolumeError> {
        let admitted = self.admit()?;
        let range = offset..offset + data.len() as u64;
        if range.is_empty() {
            return Ok(());
        }
        let is_complete = self.is_complete();
        self.guest_writes();
        if !is_complete {
            self.fill_torn_edges(&range).await?;
        }
        let (change, disk) = (self.change(admitted, range), Arc::clone(&self.disk));
        self.on_change_lane(move || change.run(|| put(&disk, is_complete, offset, &data))).await?;
        if fua && !is_planted(Bug::FuaWithoutFlush) { self.flush().await } else { Ok(()) }
    }

    /// As [`Volume::write`], on the calling thread, which waits for the disk if that is slow. None, and nothing done, where
    /// more than the disk has to be waited for: a block of which a part has to be fetched first, a flush of somebody
    /// else's, a hand-over.
    pub fn write_here(&self, offset: u64, data: &[u8], fua: bool) -> Option<Result<(), VolumeError>> {
        let range = offset..offset + data.len() as u64;
        let is_first = !self.is_guest_noted.load(Ordering::Acquire);
        if range.is_empty() || is_first || self.is_sync_broken.load(Ordering::Acquire) {
            return None;
        }
        let admitted = match self.admit() {
            Ok(admitted) => admitted,
            Err(error) => return Some(Err(error)),
        };
        let is_complete = self.is_complete();
        if !is_complete && self.torn_edges(&range).next().is_some() {
            return None;
        }
        let turn = if fua { Some(self.flushes.try_turn()?) } else { None };
        self.guest_writes();
        let done = self.change(admitted, range).try_run(|| put(&self.disk, is_complete, offset, data))?;
        Some(match (done, turn) {
            (Ok(()), Some(turn)) if !is_planted(Bug::FuaWithoutFlush) => self.sync_here(turn),
            (done, _) => done,
        })
    }

    /// Whether [`Volume::write_from`] is worth trying: not before everything is here.
    pub fn takes_pipes(&self) -> bool {
        self.is_complete() && self.is_guest_noted.load(Ordering::Acquire)
    }

    /// Writes the first `len_bytes` (not 0) of a pipe at `offset`, as [`Volume::write_here`] does. None, and nothing taken out,
    /// where that is not possible; after an error, a part may be written.
    pub fn write_from(&self, offset: u64, pipe: &mut Pipe, len_bytes: usize) -> Option<Result<(), VolumeError>> {
        if !self.takes_pipes() || self.is_sync_broken.load(Ordering::Acquire) {
            return None;
        }
        let admitted = match self.admit() {
            Ok(admitted) => admitted,
            Err(error) => return Some(Err(error)),
        };
        self.guest_writes();
        let mut can_write = true;
        let done = self.change(admitted, offset..offset + len_bytes as u64).try_run(|| {
            self.disk.image.write_from(offset, pipe, len_bytes).unwrap_or_else(|| {
                can_write = false;
                Ok(())
            })
        })?;
        can_write.then_some(done)
    }

    /// Makes a range read as zeros. Whole blocks become present without being fetched.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len_bytes: u64,
        may_punch: bool,
        fua: bool,
    ) -> Result<(), VolumeError> {
        let admitted = self.admit()?;
        let range = offset..offset + len_bytes;
        if range.is_empty() {
            return Ok(());
        }
        let is_complete = self.is_complete();
        self.guest_writes();
        if !is_complete {
            self.fill_torn_edges(&range).await?;
        }
        let (change, disk) = (self.change(admitted, range.clone()), Arc::clone(&self.disk));
        let work = move || {
            if is_complete {
                disk.image.write_zeroes(offset, len_bytes, may_punch)
            } else {
                zero(&disk, &range, may_punch)
            }
        };
        self.on_change_lane(move || change.run(work)).await?;
        if fua { self.flush().await } else { Ok(()) }
    }

    /// As [`Volume::write_zeroes`], but only where that takes no writing. False, and nothing done, where it might.
    pub async fn write_zeroes_fast(
        &self,
        offset: u64,
        len_bytes: u64,
        may_punch: bool,
        fua: bool,
    ) -> Result<bool, VolumeError> {
        if !self.is_complete() {
            // Edges of absent blocks are written; a punched range behind the end tells whether holes can be made at all.
            let image = self.image();
            let is_fast = may_punch
                && offset.is_multiple_of(u64::from(self.geometry.block_size.bytes()))
                && len_bytes.is_multiple_of(u64::from(self.geometry.block_size.bytes()))
                && image.write_zeroes_fast(image.size_bytes(), 4096, true)?;
            if is_fast {
                self.write_zeroes(offset, len_bytes, true, fua).await?;
            }
            return Ok(is_fast);
        }
        let admitted = self.admit()?;
        let (change, disk) = (self.change(admitted, offset..offset + len_bytes), Arc::clone(&self.disk));
        self.guest_writes();
        let is_done = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_done);
        let work = move || {
            told.store(disk.image.write_zeroes_fast(offset, len_bytes, may_punch)?, Ordering::Release);
            Ok(())
        };
        self.on_change_lane(move || change.run(work)).await?;
        let is_done = is_done.load(Ordering::Acquire);
        if is_done && fua {
            self.flush().await?;
        }
        Ok(is_done)
    }

    /// Discards a range: as zeros where that is cheap; the torn edges of an absent block stay as they are.
    pub async fn trim(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), VolumeError> {
        if self.is_complete() {
            return self.write_zeroes(offset, len_bytes, true, fua).await;
        }
        let sector = u64::from(SECTOR_BYTES);
        let start = offset.next_multiple_of(sector);
        let end = offset + len_bytes;
        let end = if end == self.geometry.size_bytes { end } else { end - end % sector };
        if start < end {
            self.write_zeroes(start, end - start, true, fua).await
        } else {
            self.admit()?;
            Ok(())
        }
    }

    /// Returns when everything that was acknowledged before the call is durable: data first, then the residency that
    /// protects it.
    pub async fn flush(&self) -> Result<(), VolumeError> {
        self.flushes.flush(async |turn| self.sync(turn).await).await
    }

    /// As [`Volume::flush`], on the calling thread, which waits for the disk. None, and nothing done, where another flush is
    /// under way.
    pub fn flush_here(&self) -> Option<Result<(), VolumeError>> {
        if self.is_sync_broken.load(Ordering::Acquire) {
            return None;
        }
        Some(self.sync_here(self.flushes.try_turn()?))
    }

    /// Whether there is residency that is not durable yet.
    pub fn needs_checkpoint(&self) -> bool {
        !self.is_complete() && (self.disk.residency().is_dirty() || self.journal.is_stopping())
    }

    async fn sync(&self, turn: gate::Turn) -> Result<(), VolumeError> {
        if self.is_sync_broken.load(Ordering::Acquire) && self.journal.is_stopping() {
            let journal = self.journal.clone();
            let dropped = self.workers.run_apart(&self.runtime, move || journal.stop_live()).await;
            if let Ok(Err(error)) = dropped {
                tracing::error!(volume = %self.name, %error, "unsynced residency could still not be dropped: do not restart yet");
            }
        }
        let Some(work) = self.checkpoint(turn)? else { return Ok(()) };
        // Not on the workers: a sync may take seconds, and as many volumes as there are workers would hold up every
        // read.
        self.workers.run_apart(&self.runtime, work).await.unwrap_or_else(|unfinished| {
            // If it panicked, what it took will never be written.
            self.is_sync_broken.fetch_or(unfinished.has_panicked, Ordering::AcqRel);
            Err(VolumeError::ShuttingDown)
        })
    }

    fn sync_here(&self, turn: gate::Turn) -> Result<(), VolumeError> {
        let Some(work) = self.checkpoint(turn)? else { return Ok(()) };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
            // What it took will never be written, as above.
            self.is_sync_broken.store(true, Ordering::Release);
            Err(VolumeError::ShuttingDown)
        })
    }

    /// The work of a flush: data first, then the residency that protects it. None where there is none.
    fn checkpoint(
        &self,
        turn: gate::Turn,
    ) -> Result<Option<impl FnOnce() -> Result<(), VolumeError> + Send + use<>>, VolumeError> {
        if self.is_sync_broken.load(Ordering::Acquire) {
            return Err(VolumeError::SyncFailed { volume: self.name.clone() });
        }
        if !self.disk.image.is_writable() {
            return Ok(None);
        }
        let (disk, journal) = (Arc::clone(&self.disk), self.journal.clone());
        let (is_sync_broken, name) = (Arc::clone(&self.is_sync_broken), self.name.clone());
        let is_complete = self.is_complete();
        Ok(Some(move || -> Result<(), VolumeError> {
            // A local, and so gone before `turn`: whoever has the next turn finds the volume poisoned.
            let _poison = PoisonIfPanicked(Arc::clone(&is_sync_broken));
            // What is set here is in the file already: a bit is set after its bytes.
            let chunks = if is_complete { Default::default() } else { disk.residency().take_dirty_chunks() };
            // One at a time: after a TRIM of everything they are many, and reads look at the masks meanwhile.
            let rows: Vec<_> = chunks.into_iter().map(|chunk| (chunk, disk.residency().chunk_row(chunk))).collect();
            if is_planted(Bug::RowsBeforeSync) {
                journal.write(&rows)?;
            }
            if let Err(error) = disk.image.sync_data() {
                if is_planted(Bug::FailedSyncForgotten) {
                    disk.residency().mark_dirty(rows.into_iter().map(|(chunk, _)| chunk));
                    return Err(error.into());
                }
                // The kernel has dropped what it could not write, and the next sync would succeed: nothing may be marked
                // resident from here on, nor a flush be acknowledged.
                is_sync_broken.store(true, Ordering::Release);
                // Nor may a restart believe what was noted of it without being synced.
                if let Err(error) = journal.stop_live() {
                    tracing::error!(volume = %name, %error, "unsynced residency could not be dropped");
                }
                tracing::error!(volume = %name, %error, "the disk failed to sync; flushes fail until a restart");
                return Err(error.into());
            }
            if is_planted(Bug::FlushWithoutResidency) {
                turn.succeed();
                return Ok(());
            }
            if let Err(error) = journal.write(&rows) {
                if is_planted(Bug::FailedRowsForgotten) {
                    return Err(error.into());
                }
                disk.residency().mark_dirty(rows.into_iter().map(|(chunk, _)| chunk));
                return Err(error.into());
            }
            turn.succeed();
            Ok(())
        }))
    }

    /// After a failed sync the kernel may have dropped blocks that were fetched and not marked yet: read again from the disk they would
    /// be what lay there before, which nobody verified. The restart that mends it fetches them again.
    fn check_sync(&self) -> Result<(), VolumeError> {
        if self.is_sync_broken.load(Ordering::Acquire) && !self.is_complete() {
            return Err(VolumeError::SyncFailed { volume: self.name.clone() });
        }
        Ok(())
    }

    fn guest_writes(&self) {
        if !self.guest_wrote.load(Ordering::Relaxed) {
            self.guest_wrote.store(true, Ordering::Release);
        }
    }

    fn admit(&self) -> Result<gate::Admitted, VolumeError> {
        let admitted = self.gate.admit().ok_or_else(|| VolumeError::NotOwner { volume: self.name.clone() })?;
        if !self.disk.image.is_writable() {
            return Err(VolumeError::ReadOnly { volume: self.name.clone() });
        }
        Ok(admitted)
    }

    /// A write that begins or ends within a sector needs the rest of that sector: its block is fetched first.
    async fn fill_torn_edges(&self, range: &Range<u64>) -> Result<(), VolumeError> {
        for block in self.torn_edges(range) {
            relocation::make_resident(self, block).await?;
        }
        Ok(())
    }

    /// The absent blocks within one of whose sectors a range begins or ends.
    fn torn_edges(&self, range: &Range<u64>) -> impl Iterator<Item = BlockIndex> {
        let len_bytes = range.end - range.start;
        let blocks = self.disk.blocks_of(range.start, len_bytes);
        let (first, last, start) = (blocks.start, blocks.end - 1, range.start);
        std::iter::once(first).chain((last != first).then_some(last)).map(BlockIndex).filter(move |block| {
            let within = self.disk.within(*block, start, len_bytes);
            let is_torn = !self.disk.is_sector_aligned(*block, &within) && !is_planted(Bug::TornEdgesNotFilled);
            is_torn && !self.disk.bits().is_resident(*block)
        })
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        match self.workers.run(Urgency::Urgent, work).await {
            Some(done) => Ok(done?),
            None => Err(VolumeError::ShuttingDown),
        }
    }

    async fn on_change_lane(
        &self,
        work: impl FnOnce() -> Result<(), VolumeError> + Send + 'static,
    ) -> Result<(), VolumeError> {
        self.workers.run(Urgency::Change, work).await.unwrap_or(Err(VolumeError::ShuttingDown))
    }

    fn change(&self, admitted: gate::Admitted, range: Range<u64>) -> Change {
        Change {
            _admitted: admitted,
            range,
            volume: self.name.clone(),
            // What is complete has nothing more to note.
            residency: (!self.is_complete()).then(|| (Arc::clone(&self.disk), self.journal.clone())),
            first: (!self.is_guest_noted.load(Ordering::Acquire))
                .then(|| (self.journal.clone(), Arc::clone(&self.is_guest_noted))),
            observer: Arc::clone(&self.observer),
        }
    }
}

/// Poisons the volume when the flush that holds it panics: what that took will never be written.
struct PoisonIfPanicked(Arc<AtomicBool>);

impl Drop for PoisonIfPanicked {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

/// What goes along with a guest's change of the disk. The change counts as under way until all of this has ended: who
/// fences relies on what the observer was told.
struct Change {
    _admitted: gate::Admitted,
    range: Range<u64>,
    volume: Name,
    residency: Option<(Arc<Disk>, Journal)>,
    /// That a guest writes here is to be noted.
    first: Option<(Journal, Arc<AtomicBool>)>,
    observer: Arc<RwLock<Option<Arc<dyn WriteObserver>>>>,
}

impl Change {
    fn run(self, work: impl FnOnce() -> Result<(), ImageError>) -> Result<(), VolumeError> {
        if let Some((journal, is_guest_noted)) = &self.first {
            // Durable before the first write: whoever cancels after a crash must not take the volume for unwritten.
            journal.note_guest()?;
            is_guest_noted.store(true, Ordering::Release);
        }
        // Held throughout, so that a new observer knows when the writes that it was not told of have ended.
        self.observed(self.observer.read().as_deref(), work)
    }

    /// None, and nothing done, while the observer is being changed.
    fn try_run(self, work: impl FnOnce() -> Result<(), ImageError>) -> Option<Result<(), VolumeError>> {
        let observer = self.observer.try_read()?;
        Some(self.observed(observer.as_deref(), work))
    }

    fn observed(
        &self,
        observer: Option<&dyn WriteObserver>,
        work: impl FnOnce() -> Result<(), ImageError>,
    ) -> Result<(), VolumeError> {
        let work = || -> Result<(), VolumeError> {
            work()?;
            match &self.residency {
                None => Ok(()),
                // What is acknowledged survives the end of this process, flushed or not, as it would on any disk.
                Some((disk, journal)) => {
                    Ok(journal.note_live(disk, disk.blocks_of(self.range.start, self.range.end - self.range.start))?)
                }
            }
        };
        let Some(observer) = observer else { return work() };
        let failed = |why| VolumeError::Observer { volume: self.volume.clone(), why };
        observer.note_write(self.range.clone()).map_err(failed)?;
        let done = work();
        // Also where it failed: a part of it may be in the file.
        observer.note_write(self.range.clone()).map_err(failed)?;
        done
    }
}

/// Writes `data`: through the residency as long as there is any.
fn put(disk: &Disk, is_complete: bool, offset: u64, data: &[u8]) -> Result<(), ImageError> {
    if is_complete {
        return disk.image.write_at(offset, data);
    }
    for block in disk.blocks_of(offset, data.len() as u64) {
        let block = BlockIndex(block);
        let within = disk.within(block, offset, data.len() as u64);
        let from = (disk.geometry.offset_of(block) + u64::from(within.start) - offset) as usize;
        disk.write(block, within.start, &data[from..from + within.len()])?;
    }
    Ok(())
}

/// Zeros over blocks of which some are absent; edges are aligned to sectors or resident.
fn zero(disk: &Disk, range: &Range<u64>, may_punch: bool) -> Result<(), ImageError> {
    let len_bytes = range.end - range.start;
    let blocks = disk.blocks_of(range.start, len_bytes);
    let is_whole = |block: u64| {
        let within = disk.within(BlockIndex(block), range.start, len_bytes);
        within == (0..disk.geometry.len_of(BlockIndex(block)))
    };
    let zero_part = |block: u64| {
        let block = BlockIndex(block);
        let within = disk.within(block, range.start, len_bytes);
        disk.write(block, within.start, &vec![0; within.len()])
    };
    let mut whole = blocks.clone();
    if !is_whole(whole.start) {
        zero_part(whole.start)?;
        whole.start += 1;
    }
    if whole.end > whole.start && !is_whole(whole.end - 1) {
        zero_part(whole.end - 1)?;
        whole.end -= 1;
    }
    // A thousand blocks at a time: reads and landings elsewhere get their turn during the TRIM of a whole disk.
    let mut at = whole.start;
    while at < whole.end {
        let end = (at + 1024).min(whole.end);
        disk.zero_blocks(at..end, may_punch)?;
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
