//! A disk that this site serves: read, write, flush over a raw file and its residency; blocks that are absent are fetched.
//! Must not know QUIC nor NBD.
//!
//! What is flushed survives: [`Volume::flush`] takes the residency that changed, syncs the file, and only then makes the
//! residency durable, in that order, before it is acknowledged.

mod bulk;
mod disk;
mod error;
mod gate;
mod guest_note;
mod journal;
mod life;
mod pages;
mod readahead;
mod relocation;
mod stats;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::RwLock;

use crate::core::ids::{BlockIndex, Incarnation, Name, SECTOR_BYTES, is_zero};
use crate::core::manifest::Geometry;
use crate::core::residency::Residency;
use crate::image::{Image, ImageError};
use crate::pipe::Pipe;
use crate::seeded_bugs::{Bug, is_planted};
use crate::store::State;
use crate::workers::{Urgency, Workers};

use disk::Disk;
use gate::{FlushGate, WriteGate};
use guest_note::GuestNote;
use journal::Journal;
use life::Life;

pub use bulk::{BulkState, run_bulk};
pub use error::VolumeError;
pub use journal::{adopt_named, forget_strangers, was_written};
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
    is_read_only: AtomicBool,
    /// No block is absent and none ever will be: the path without any trace of relocation.
    is_complete: AtomicBool,
    relocation: RwLock<Option<Arc<Relocation>>>,
    writes: Arc<Writes>,
    life: Arc<Life>,
    stats: Arc<stats::Stats>,
    landing: Arc<tokio::sync::Semaphore>,
    /// Apart from `landing`: what is fetched ahead waits for the peer, what a guest has been answered must not.
    ahead: Arc<tokio::sync::Semaphore>,
    /// Where work goes on that outlives the request which began it: a client's own runtime ends with the client.
    runtime: tokio::runtime::Handle,
}

/// What guests' writes share: it goes along with each of them.
struct Writes {
    volume: Name,
    observer: RwLock<Option<Arc<dyn WriteObserver>>>,
    guest: GuestNote,
}

/// What a volume needs to live.
pub struct VolumeParts {
    /// Its name.
    pub name: Name,
    /// Under what its residency is kept: another one for each relocation, though name and image be the same.
    pub incarnation: Incarnation,
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
        let journal = Journal::new(Arc::clone(&parts.state), parts.incarnation, Life::new(parts.name.clone()));
        Volume::new(parts, journal, residency, true, false, GuestNote::new(false, 0, false))
    }

    /// As [`Volume::complete`], of a volume that was relocated here and may still be given back: whether a guest has written is remembered from
    /// earlier lives, and noted for later ones.
    pub fn arrived(parts: VolumeParts) -> Result<Volume, VolumeError> {
        let residency = Residency::new(parts.geometry);
        let journal = Journal::new(Arc::clone(&parts.state), parts.incarnation, Life::new(parts.name.clone()));
        let guest = GuestNote::new(journal.is_guest_noted()?, 0, true);
        Ok(Volume::new(parts, journal, residency, true, false, guest))
    }

    /// A volume whose blocks are (partly) still elsewhere. `is_new` says that the file was just made by [`Image::create`];
    /// otherwise residency is restored from the state database, and absent regions may hold what a crash left.
    pub fn relocating(parts: VolumeParts, is_new: bool) -> Result<Volume, VolumeError> {
        let mut residency = Residency::new(parts.geometry);
        let journal = Journal::new(Arc::clone(&parts.state), parts.incarnation, Life::new(parts.name.clone()));
        let has_written = if is_new {
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
        // Not what residency says: that knows of writes that failed in the middle, too.
        let guest = GuestNote::new(has_written, residency.guest_bytes(), true);
        Ok(Volume::new(parts, journal, residency, false, !is_new, guest))
    }

    fn new(
        parts: VolumeParts,
        journal: Journal,
        residency: Residency,
        is_complete: bool,
        may_hold_residue: bool,
        guest: GuestNote,
    ) -> Volume {
        let life = Arc::clone(journal.life());
        Volume {
            disk: Arc::new(Disk::new(parts.image, residency, parts.geometry, Arc::clone(&life), may_hold_residue)),
            journal,
            writes: Arc::new(Writes { volume: parts.name.clone(), observer: RwLock::default(), guest }),
            life,
            name: parts.name,
            geometry: parts.geometry,
            workers: parts.workers,
            gate: Arc::new(WriteGate::new(parts.is_owner)),
            flushes: FlushGate::default(),
            is_sync_broken: Arc::default(),
            is_read_only: AtomicBool::new(false),
            is_complete: AtomicBool::new(is_complete),
            relocation: RwLock::new(None),
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

    /// Guests may only read it, as at the site that it came from. Before anybody opens it.
    pub fn set_read_only(&self) {
        self.is_read_only.store(true, Ordering::Release);
    }

    /// Whether guests may only read it, whoever owns it.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only.load(Ordering::Relaxed) || !self.disk.image.is_writable()
    }

    /// Whether guests may write it now.
    pub fn is_owner(&self) -> bool {
        self.gate.is_open()
    }

    /// Whether every block is in the file and durably known to be.
    pub fn is_complete(&self) -> bool {
        self.is_complete.load(Ordering::Acquire)
    }

    /// Whether a guest's write was acknowledged here since the relocation began. One that failed is no write. Fenced, nothing changes
    /// what this says.
    pub fn has_guest_writes(&self) -> bool {
        self.writes.guest.has_written()
    }

    /// For people: about how many bytes guests wrote since the relocation began, as far as acknowledged. Exact within one life of
    /// the daemon, each rewriting counted again. Of earlier lives only what residency tells is known: blocks that were absent when they were
    /// written count whole once they have arrived, and writes to blocks that had arrived before not at all. It may be 0
    /// although [`Volume::has_guest_writes`] (after a restart); never the other way round.
    pub fn guest_written_bytes(&self) -> u64 {
        self.writes.guest.written_bytes()
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
        *self.writes.observer.write() = observer;
    }

    /// Admits no write from now on, waits for those under way, and makes everything durable.
    pub async fn fence(&self) -> Result<(), VolumeError> {
        self.gate.close().await;
        self.flush().await
    }

    /// Makes everything durable while writes go on, and tells how long that took: about as long as a fence would now hold them up. To be
    /// repeated before a fence until that is short.
    pub async fn presync(&self) -> Result<Duration, VolumeError> {
        let begun = tokio::time::Instant::now();
        self.flush().await?;
        Ok(begun.elapsed())
    }

    /// Admits no write from now on. Those under way may go on: see [`Volume::drained`].
    pub fn bar(&self) {
        self.gate.shut();
    }

    /// Returns when the writes that were admitted have ended. Of use where no more are: see [`Volume::bar`].
    pub async fn drained(&self) {
        self.gate.drained().await;
    }

    /// Makes zeros of what never arrived, under what guests wrote, durably: a person is about to give it up. Returns how many bytes of blocks
    /// these are. They stay absent: if the decision comes to nothing, they are fetched as before. See [`Volume::finish`].
    pub async fn fill_absent(&self) -> Result<u64, VolumeError> {
        let disk = Arc::clone(&self.disk);
        let filled = self.on_change_lane(move || {
            let (mut from, blocks, mut filled) = (0, disk.geometry.blocks(), 0);
            while let Some(block) = disk.bits().first_absent(from..blocks) {
                filled += disk.zero_absent(block)?;
                from = block.0 + 1;
            }
            Ok(filled)
        });
        let filled = filled.await?;
        self.flush().await?;
        Ok(filled)
    }

    /// Admits writes: this site is the owner. Not once it is closed.
    pub fn unfence(&self) {
        self.gate.open();
    }

    /// The volume is gone from this site, for good: whoever still holds it reads and writes nothing any more, its clients are hung up on, and
    /// no row is written. What is under way may go on for a moment: see [`Volume::closed`].
    pub fn close(&self) {
        self.life.close(&self.gate);
    }

    /// Returns when the volume is closed and everything that changes its file or its rows has ended, which may take as long as the disk does: from
    /// then on the file may be deleted, or be somebody else's.
    pub async fn closed(&self) {
        self.life.ended().await;
        self.gate.drained().await;
        self.life.drained().await;
    }

    /// Returns as soon as [`Volume::close`] is called. Does not hold on to the volume.
    pub fn closing(&self) -> impl Future<Output = ()> + Send + 'static {
        self.life.ended()
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
        self.life.check()?;
        let read = self.read_while_open(offset, len_bytes).await;
        // Again, and last: see `life`.
        self.life.check()?;
        read
    }

    async fn read_while_open(&self, offset: u64, len_bytes: u32) -> Result<Bytes, VolumeError> {
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
        // Last: see `life`.
        if let Err(closed) = self.life.check() {
            return Some(Err(closed));
        }
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
        if self.life.is_closed() {
            let _ = pipe.take(&mut BytesMut::new());
            return None;
        }
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
        if !is_complete {
            self.fill_torn_edges(&range).await?;
        }
        // What never arrived may have been given up meanwhile: there are no edges any more.
        let is_complete = is_complete || self.is_complete();
        let (change, disk) = (self.change(admitted, range), Arc::clone(&self.disk));
        let fua = fua && !is_planted(Bug::FuaWithoutFlush);
        self.run_change(change, fua, move || put(&disk, is_complete, offset, &data).map(|()| true)).await.map(drop)
    }

    /// As [`Volume::write`], on the calling thread, which waits for the disk if that is slow. None, and nothing done, where
    /// more than the disk has to be waited for: a block of which a part has to be fetched first, a flush of somebody
    /// else's, a hand-over.
    pub fn write_here(&self, offset: u64, data: &[u8], fua: bool) -> Option<Result<(), VolumeError>> {
        let range = offset..offset + data.len() as u64;
        let is_first = !self.writes.guest.is_noted();
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
        let change = self.change(admitted, range);
        let done = change.try_run(|| put(&self.disk, is_complete, offset, data).map(|()| true))?;
        let acknowledged = done.and_then(|written| {
            if let Some(turn) = turn.filter(|_| !is_planted(Bug::FuaWithoutFlush)) {
                self.sync_here(turn)?;
            }
            written.map_or(Ok(()), Unacknowledged::acknowledge)
        });
        Some(acknowledged)
    }

    /// Whether [`Volume::write_from`] is worth trying: not before everything is here.
    pub fn takes_pipes(&self) -> bool {
        self.is_complete() && self.writes.guest.is_noted()
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
        let change = self.change(admitted, offset..offset + len_bytes as u64);
        let done = change.try_run(|| match self.disk.image.write_from(offset, pipe, len_bytes) {
            Some(done) => done.map(|()| true),
            None => Ok(false),
        })?;
        match done {
            Ok(written) => Some(written?.acknowledge()),
            Err(error) => Some(Err(error)),
        }
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
        if !is_complete {
            self.fill_torn_edges(&range).await?;
        }
        // What never arrived may have been given up meanwhile: there are no edges any more.
        let is_complete = is_complete || self.is_complete();
        let (change, disk) = (self.change(admitted, range.clone()), Arc::clone(&self.disk));
        let work = move || {
            let zeroed = if is_complete {
                disk.image.write_zeroes(offset, len_bytes, may_punch)
            } else {
                zero(&disk, &range, may_punch)
            };
            zeroed.map(|()| true)
        };
        self.run_change(change, fua, work).await.map(drop)
    }

    /// As [`Volume::write_zeroes`], but only where that takes no writing. False, and nothing done, where it might.
    pub async fn write_zeroes_fast(
        &self,
        offset: u64,
        len_bytes: u64,
        may_punch: bool,
        fua: bool,
    ) -> Result<bool, VolumeError> {
        let admitted = self.admit()?;
        let range = offset..offset + len_bytes;
        if range.is_empty() {
            return Ok(true);
        }
        let is_complete = self.is_complete();
        // Edges of absent blocks would be written.
        let is_possible = is_complete || may_punch && are_whole(&self.disk, &range);
        if !is_possible {
            return Ok(false);
        }
        let (change, disk) = (self.change(admitted, range.clone()), Arc::clone(&self.disk));
        let work = move || {
            if is_complete {
                disk.image.write_zeroes_fast(offset, len_bytes, may_punch)
            } else {
                zero_fast(&disk, &range)
            }
        };
        self.run_change(change, fua, work).await
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
        // Goes along with the work: the file is not somebody else's before that has ended.
        let pass = self.life.enter()?;
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
            let _pass = pass;
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
                    return Err(error);
                }
                disk.residency().mark_dirty(rows.into_iter().map(|(chunk, _)| chunk));
                return Err(error);
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

    fn admit(&self) -> Result<gate::Admitted, VolumeError> {
        let Some(admitted) = self.gate.admit() else {
            self.life.check()?;
            return Err(VolumeError::NotOwner { volume: self.name.clone() });
        };
        if self.is_read_only() {
            return Err(VolumeError::ReadOnly { volume: self.name.clone() });
        }
        Ok(admitted)
    }

    /// A write that begins or ends within a sector needs the rest of that sector: its block is fetched first.
    async fn fill_torn_edges(&self, range: &Range<u64>) -> Result<(), VolumeError> {
        for block in self.torn_edges(range) {
            tokio::select! {
                biased;
                resident = relocation::make_resident(self, block) => resident?,
                // Whoever gives the volume up waits for the writes that were admitted, and the block may never come. Nothing is written yet.
                () = self.gate.barred() => {
                    self.life.check()?;
                    return Err(VolumeError::NotOwner { volume: self.name.clone() });
                }
            }
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

    async fn on_change_lane<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        self.workers.run(Urgency::Change, work).await.unwrap_or(Err(VolumeError::ShuttingDown))
    }

    fn change(&self, admitted: gate::Admitted, range: Range<u64>) -> Change {
        self.writes.guest.admitted();
        Change {
            admitted,
            range,
            writes: Arc::clone(&self.writes),
            // What is complete has nothing more to note.
            residency: (!self.is_complete()).then(|| (Arc::clone(&self.disk), self.journal.clone())),
            first: (!self.writes.guest.is_noted()).then(|| self.journal.clone()),
        }
    }

    /// Runs a change, with `fua` makes it durable, and does all that comes before its acknowledgement. `work` tells whether it did anything; so
    /// does this.
    async fn run_change(
        &self,
        change: Change,
        fua: bool,
        work: impl FnOnce() -> Result<bool, ImageError> + Send + 'static,
    ) -> Result<bool, VolumeError> {
        let run = move || {
            let Some(written) = change.run(work)? else { return Ok((false, None)) };
            if fua {
                return Ok((true, Some(written)));
            }
            written.acknowledge().map(|()| (true, None))
        };
        let (is_done, written) = self.on_change_lane(run).await?;
        let Some(written) = written else { return Ok(is_done) };
        self.flush().await?;
        if written.takes_time() {
            self.on_change_lane(move || written.acknowledge()).await?;
        } else {
            written.acknowledge()?;
        }
        Ok(is_done)
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
    admitted: gate::Admitted,
    range: Range<u64>,
    writes: Arc<Writes>,
    residency: Option<(Arc<Disk>, Journal)>,
    /// That a guest writes here may have to be noted.
    first: Option<Journal>,
}

/// A change that is in the file, and of which nobody was told. Still under way: who fences the volume and then asks whether a guest has written
/// gets it counted.
struct Unacknowledged {
    _admitted: gate::Admitted,
    len_bytes: u64,
    writes: Arc<Writes>,
    first: Option<Journal>,
}

impl Unacknowledged {
    /// Whether [`Unacknowledged::acknowledge`] waits for the disk.
    fn takes_time(&self) -> bool {
        !self.writes.guest.is_noted()
    }

    /// Only if this succeeds may the client be told.
    fn acknowledge(self) -> Result<(), VolumeError> {
        self.writes.guest.acknowledge(self.len_bytes, || self.first.as_ref().map_or(Ok(()), Journal::note_guest))
    }
}

impl Change {
    /// None where `work` did nothing.
    fn run(self, work: impl FnOnce() -> Result<bool, ImageError>) -> Result<Option<Unacknowledged>, VolumeError> {
        let is_done = {
            // Held throughout, so that a new observer knows when the writes that it was not told of have ended.
            let observer = self.writes.observer.read();
            self.observed(observer.as_deref(), work)?
        };
        Ok(is_done.then(|| self.done()))
    }

    /// As [`Change::run`]; None, and nothing done, while the observer is being changed.
    fn try_run(
        self,
        work: impl FnOnce() -> Result<bool, ImageError>,
    ) -> Option<Result<Option<Unacknowledged>, VolumeError>> {
        let done = {
            let observer = self.writes.observer.try_read()?;
            self.observed(observer.as_deref(), work)
        };
        Some(done.map(|is_done| is_done.then(|| self.done())))
    }

    fn done(self) -> Unacknowledged {
        let len_bytes = self.range.end - self.range.start;
        Unacknowledged { _admitted: self.admitted, len_bytes, writes: self.writes, first: self.first }
    }

    fn observed(
        &self,
        observer: Option<&dyn WriteObserver>,
        work: impl FnOnce() -> Result<bool, ImageError>,
    ) -> Result<bool, VolumeError> {
        let work = || -> Result<bool, VolumeError> {
            let is_done = work()?;
            if let Some((disk, journal)) = &self.residency {
                // What is acknowledged survives the end of this process, flushed or not, as it would on any disk.
                journal.note_live(disk, disk.blocks_of(self.range.start, self.range.end - self.range.start))?;
            }
            Ok(is_done)
        };
        let Some(observer) = observer else { return work() };
        let failed = |why| VolumeError::Observer { volume: self.writes.volume.clone(), why };
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
        let end = (at + ZEROED_AT_ONCE_BLOCKS).min(whole.end);
        disk.zero_blocks(at..end, may_punch)?;
        at = end;
    }
    Ok(())
}

/// Blocks that are zeroed at a time.
const ZEROED_AT_ONCE_BLOCKS: u64 = 1024;

/// Whether a range covers each block that it touches, of a short last block all there is.
fn are_whole(disk: &Disk, range: &Range<u64>) -> bool {
    let len_bytes = range.end - range.start;
    let blocks = disk.blocks_of(range.start, len_bytes);
    [blocks.start, blocks.end - 1]
        .into_iter()
        .map(BlockIndex)
        .all(|block| disk.within(block, range.start, len_bytes) == (0..disk.geometry.len_of(block)))
}

/// Holes over whole blocks of which some are absent; false, and nothing done, where none can be made. The first piece tells: probing
/// anywhere else would change bytes that nobody asked to have changed.
fn zero_fast(disk: &Disk, range: &Range<u64>) -> Result<bool, ImageError> {
    let blocks = disk.blocks_of(range.start, range.end - range.start);
    let first = blocks.start..blocks.end.min(blocks.start + ZEROED_AT_ONCE_BLOCKS);
    if !disk.zero_blocks_fast(first.clone(), true)? {
        return Ok(false);
    }
    let mut at = first.end;
    while at < blocks.end {
        let end = (at + ZEROED_AT_ONCE_BLOCKS).min(blocks.end);
        disk.zero_blocks(at..end, true)?;
        at = end;
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
