//! What may be believed of an image that no guest of this site writes. Must not know how pages are kept.
//!
//! Times and sizes are hints, ids decide. Where a hint says that somebody else may have changed the image:
//!
//! | the image | becomes |
//! |---|---|
//! | rests, owned here | unknown, and is hashed anew |
//! | is released to a peer | suspect: what was announced stays, each block is compared with it, and what was not announced is refused |
//!
//! A block of a released image is compared in any case where its id is known: a hint can be forged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::rows::Sealed;
use super::{HASHING, HOLE, KNOWN, Manifest, UNKNOWN, ZERO, is_known};
use crate::core::ids::{BlockId, BlockIndex};
use crate::core::manifest::{PAGE_IDS, Page, PageId, PageIndex};
use crate::image::Stamp;
use crate::seeded_bugs::{Bug, is_planted};
use crate::source::SourceError;

/// Times of files advance in steps of the kernel's timer (10 ms at most). A write within the same step as the hashing
/// would not move the stamp: so an image rests this long before it is hashed.
pub(super) const TIMESTAMP_GRAIN: Duration = Duration::from_millis(20);

/// Pages whose ids are in memory to compare with: 2 MiB at most.
const RECENT_PAGES: usize = 64;

#[derive(Default)]
pub(super) struct Seal {
    /// What the image was when it came to rest; None for a block device.
    pub stamp: Option<Stamp>,
    /// What was written to a block device by then, by whomever.
    pub device_writes: Option<u64>,
    /// Rows of pages that were written since.
    pub stale: BTreeSet<u64>,
    pub is_row_written: bool,
}

/// What a peer was told of a released image.
#[derive(Default)]
pub(super) struct Told {
    /// Blocks that were sent before their pages were hashed.
    blocks: BTreeMap<u64, BlockId>,
    /// Pages that were looked at last, the newest at the end.
    recent: VecDeque<(u64, Arc<Page>)>,
}

/// Whether a change of content is to be suspected. A file may be renamed, and its device be numbered anew at a boot; ctime moves with modes,
/// owners, links and attributes; what was added behind the end is not the volume's.
fn is_suspicious(noted: &Stamp, now: &Stamp) -> bool {
    noted.inode != now.inode || noted.mtime_ns != now.mtime_ns || now.size_bytes < noted.size_bytes
}

impl Manifest {
    /// See [`Manifest::open`].
    pub(super) fn begin_resting(&self, is_released: bool) -> Result<(), SourceError> {
        self.rows.forget_by_name()?;
        let stamp = self.image.stamp()?;
        let kept = self.rows.sealed()?.filter(|kept| kept.geometry == self.geometry);
        if let Some(kept) = kept.as_ref().filter(|_| is_released) {
            self.load_pages()?;
            self.told.lock().blocks = self.rows.told()?.into_iter().collect();
            let mut seal = self.seal.lock();
            *seal = Seal { stamp: kept.stamp.clone(), is_row_written: true, ..Seal::default() };
            seal.device_writes = self.image.device_writes();
            self.is_released.store(true, Ordering::Release);
            self.is_sealed.store(true, Ordering::Release);
            drop(seal);
            // The answer from before needs no hole to be found again: those that were announced have rows.
            if let Err(error) = self.sync() {
                tracing::warn!(volume = %self.volume, %error, "a released image could not be synced");
            }
            return self.look();
        }
        // All of it: while nobody looked, a time may have been set back. A boot may have numbered the device anew.
        let is_same = |kept: &Sealed| match (&kept.stamp, &stamp) {
            (Some(kept), Some(now)) => Stamp { device: now.device, ..kept.clone() } == *now,
            _ => false,
        };
        let is_same = kept.as_ref().is_some_and(is_same);
        match is_same {
            true => self.load_pages()?,
            false => self.rows.forget()?,
        }
        *self.seal.lock() = Seal { stamp, is_row_written: is_same, ..Seal::default() };
        self.is_sealed.store(true, Ordering::Release);
        match self.sync() {
            Ok(()) => self.find_holes()?,
            Err(error) => {
                tracing::warn!(volume = %self.volume, %error, "no hole is believed of an image that cannot be synced")
            }
        }
        if is_released { self.release() } else { Ok(()) }
    }

    /// The image rests: from here on it is static, any change is somebody else's. What is known may be believed after a restart.
    /// The caller has stopped writes and synced the image.
    pub fn seal(&self) -> Result<(), SourceError> {
        self.rest()?;
        self.write_stamp_row()
    }

    /// As [`Manifest::seal`], but what is known is not believed after a restart yet.
    pub(super) fn rest(&self) -> Result<(), SourceError> {
        self.rows.check_open()?;
        self.sync()?;
        self.look()?;
        self.doubt_holes()?;
        let mut seal = self.seal.lock();
        if !self.is_sealed.load(Ordering::Acquire) {
            self.rows.delete_pages(seal.stale.iter().copied())?;
            *seal = Seal { stamp: self.image.stamp()?, ..Seal::default() };
            self.is_sealed.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// As [`Manifest::seal`], for an image that a peer is about to own: what is announced from here on never changes, across restarts.
    /// Durable when it returns. Asked again, it changes nothing.
    pub fn release(&self) -> Result<(), SourceError> {
        if self.is_released() {
            return self.rows.check_open();
        }
        // Blocks that are not there any more could never be sent: said while the image is still this site's own.
        self.image.check_size()?;
        self.rest()?;
        self.release_resting()
    }

    /// The second half of [`Manifest::release`]: whoever asked for it may have gone meanwhile, and guests were let in again; what they wrote
    /// does not rest.
    pub(super) fn release_resting(&self) -> Result<(), SourceError> {
        // Held for all of it: the row of a page that is written from now on must not be one from before.
        let mut seal = self.seal.lock();
        if self.is_released() {
            // By another who was asked the same: what was told since stays.
            return self.rows.check_open();
        }
        if !self.is_sealed.load(Ordering::Acquire) {
            return Err(SourceError::Written { volume: self.volume.clone() });
        }
        let mut told = self.told.lock();
        let is_zero = |page: &u64| matches!(self.pages[*page as usize].load(Ordering::Acquire), ZERO | HOLE);
        let zeros = (0..self.geometry.pages()).filter(is_zero);
        self.rows.put_released(zeros, &Sealed { stamp: seal.stamp.clone(), geometry: self.geometry })?;
        *told = Told::default();
        seal.is_row_written = true;
        seal.device_writes = self.image.device_writes();
        self.is_suspect.store(false, Ordering::Release);
        self.is_released.store(true, Ordering::Release);
        Ok(())
    }

    /// The image is this site's own again, as it was.
    pub fn take_back(&self) -> Result<(), SourceError> {
        self.take_back_sealed(&mut self.seal.lock())
    }

    fn take_back_sealed(&self, seal: &mut Seal) -> Result<(), SourceError> {
        if self.is_released() {
            // First: what is read from here on and compared with nothing is sent to nobody who opened it before.
            self.edition.fetch_add(1, Ordering::AcqRel);
            self.is_released.store(false, Ordering::Release);
            *self.told.lock() = Told::default();
        }
        // Until that has succeeded it is asked for again.
        if self.is_suspect.load(Ordering::Acquire) {
            self.forget_all(seal)?;
            self.is_suspect.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Before a guest's first write since the image rested. Durable: the image's times may reach the disk after its bytes.
    pub(super) fn unseal(&self) -> Result<(), SourceError> {
        // One lock for all of it: a release that is withdrawn may still be under way.
        let mut seal = self.seal.lock();
        self.take_back_sealed(&mut seal)?;
        if seal.is_row_written {
            self.rows.delete_sealed()?;
            seal.is_row_written = false;
        }
        seal.stamp = None;
        self.is_sealed.store(false, Ordering::Release);
        Ok(())
    }

    /// Somebody is known to have changed the image: of a released one only what was announced is served, where it is still that.
    pub fn suspect(&self) {
        let _seal = self.seal.lock();
        if self.is_released() {
            self.is_suspect.store(true, Ordering::Release);
        }
    }

    /// Looks at what hints at a change, and draws the consequence; see the module. Not an error: a changed block is one.
    pub fn look(&self) -> Result<(), SourceError> {
        if !self.is_sealed.load(Ordering::Acquire) || self.is_suspect.load(Ordering::Acquire) {
            return Ok(());
        }
        let is_released = self.is_released();
        let (expected, device_writes) = {
            let seal = self.seal.lock();
            (seal.stamp.clone(), seal.device_writes)
        };
        let is_changed = match (expected.as_ref(), self.image.stamp()?) {
            (Some(noted), Some(now)) => is_suspicious(noted, &now),
            _ => is_released && device_writes.is_some() && self.image.device_writes() != device_writes,
        };
        if !is_changed {
            return Ok(());
        }
        let mut seal = self.seal.lock();
        // A guest's write may have begun between the two looks.
        if !self.is_sealed.load(Ordering::Acquire) || seal.stamp != expected || self.is_released() != is_released {
            return Ok(());
        }
        let (volume, image) = (&self.volume, self.image.path().display());
        if is_released {
            self.is_suspect.store(true, Ordering::Release);
            tracing::warn!(
                %volume, %image,
                "the image may have been changed by somebody else after it was released: only blocks that are what was announced are served"
            );
            return Ok(());
        }
        tracing::warn!(%volume, %image, "the image was changed by somebody else while it rested: it is hashed anew");
        self.forget_all(&mut seal)
    }

    /// Nothing is known of it any more; from here on it rests as it is.
    fn forget_all(&self, seal: &mut Seal) -> Result<(), SourceError> {
        self.rows.forget()?;
        let nth = self.writes.fetch_add(1, Ordering::AcqRel) + 1;
        for (state, written_at) in self.pages.iter().zip(&self.written_at) {
            written_at.store(nth, Ordering::Release);
            if is_known(state.swap(UNKNOWN, Ordering::AcqRel)) {
                self.hashed_pages.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.ids.lock().clear();
        *seal = Seal { stamp: self.image.stamp()?, ..Seal::default() };
        Ok(())
    }

    /// Whether a block may be sent, `id` being what it holds: of a released image, only if that is what was announced, or nothing was. Then
    /// it is announced hereby, in a row.
    pub fn admit(&self, block: BlockIndex, id: BlockId) -> Result<(), SourceError> {
        self.rows.check_open()?;
        self.look()?;
        if !self.is_released() {
            return Ok(());
        }
        let page = PageIndex::of(block);
        let mut told = self.told.lock();
        let announced = match told.blocks.get(&block.0) {
            Some(announced) => *announced,
            None if is_known(self.pages[page.0 as usize].load(Ordering::Acquire)) => {
                drop(told);
                match self.announced_page(page)?.id_of(block) {
                    Some(announced) => announced,
                    None => return Err(self.changed(block, "is not in its page")),
                }
            }
            None if self.is_suspect.load(Ordering::Acquire) => return Err(self.changed(block, NOT_KNOWN)),
            None => {
                self.rows.put_told(block.0, id)?;
                told.blocks.insert(block.0, id);
                id
            }
        };
        if announced == id { Ok(()) } else { Err(self.changed(block, "is not what was announced of it")) }
    }

    fn announced_page(&self, page: PageIndex) -> Result<Arc<Page>, SourceError> {
        if let Some((_, kept)) = self.told.lock().recent.iter().find(|(index, _)| *index == page.0) {
            return Ok(Arc::clone(kept));
        }
        let kept = Arc::new(self.page(page)?);
        let recent = &mut self.told.lock().recent;
        recent.push_back((page.0, Arc::clone(&kept)));
        if recent.len() > RECENT_PAGES {
            recent.pop_front();
        }
        Ok(kept)
    }

    /// Hashes a page of a released image. What was announced of it has to come out.
    pub(super) fn hash_released(&self, page: PageIndex) -> Result<Page, SourceError> {
        let state = &self.pages[page.0 as usize];
        let first = BlockIndex(page.blocks(self.geometry.blocks()).start);
        let announced = match state.load(Ordering::Acquire) {
            KNOWN => self.ids.lock().get(&page.0).copied(),
            ZERO | HOLE => Some(PageId([0; 32])),
            _ => None,
        };
        if let Some(announced) = announced {
            let hashed = self.hash_blocks(page)?;
            if hashed.id() != announced {
                return Err(self.changed(first, "or one of the 1,023 behind it is not what was announced of them"));
            }
            self.rows.put_page(page, &hashed)?;
            return Ok(hashed);
        }
        if self.is_suspect.load(Ordering::Acquire) {
            return Err(self.changed(first, NOT_KNOWN));
        }
        let written_at = self.written_at[page.0 as usize].load(Ordering::Acquire);
        state.store(HASHING, Ordering::Release);
        let hashed = self.hash_blocks(page).and_then(|hashed| {
            self.look()?;
            if self.is_suspect.load(Ordering::Acquire) {
                return Err(self.changed(first, NOT_KNOWN));
            }
            self.keep(page, &hashed, written_at)?;
            Ok(hashed)
        });
        match &hashed {
            Ok(_) => drop(self.hashed_pages.fetch_add(1, Ordering::Relaxed)),
            Err(_) => drop(state.compare_exchange(HASHING, UNKNOWN, Ordering::AcqRel, Ordering::Relaxed)),
        }
        hashed
    }

    /// Whether a page that is about to become known holds what was sent of it; what was sent is known by the page from then on.
    pub(super) fn settle_told(
        &self,
        page: PageIndex,
        hashed: &Page,
        keep: impl FnOnce() -> Result<bool, SourceError>,
    ) -> Result<bool, SourceError> {
        let mut told = self.told.lock();
        let blocks = page.blocks(self.geometry.blocks());
        for (block, id) in told.blocks.range(blocks.clone()) {
            if hashed.id_of(BlockIndex(*block)) != Some(*id) {
                return Err(self.changed(BlockIndex(*block), "is not what was sent of it"));
            }
        }
        let is_kept = keep()?;
        if is_kept {
            let settled: Vec<u64> = told.blocks.range(blocks).map(|(block, _)| *block).collect();
            for block in &settled {
                told.blocks.remove(block);
            }
            if !settled.is_empty() {
                self.rows.delete_told(settled.into_iter())?;
            }
        }
        Ok(is_kept)
    }

    fn changed(&self, block: BlockIndex, what: &str) -> SourceError {
        let offset = self.geometry.offset_of(block);
        let what = format!("block {} at byte {offset} {what}", block.0);
        SourceError::Changed { path: self.image.path().to_owned(), what }
    }

    /// Written before the first page row that relies on it, and only when the image's times can be trusted to tell.
    pub(super) fn write_stamp_row(&self) -> Result<(), SourceError> {
        let is_wanted = |seal: &Seal| seal.stamp.is_some() && !seal.is_row_written;
        if !is_wanted(&self.seal.lock()) {
            return Ok(());
        }
        // What a killed daemon left in the kernel's cache alone is about to be hashed: after a power loss the row would be believed of an
        // image that has lost it. Without the lock: a guest's first write takes it.
        if let Err(error) = self.sync() {
            tracing::warn!(volume = %self.volume, %error, "the ids of an image that cannot be synced are not kept");
            return Ok(());
        }
        let Some(stamp) = self.seal.lock().stamp.clone() else { return Ok(()) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as i128;
        let age = now - stamp.mtime_ns.max(stamp.ctime_ns);
        if (0..TIMESTAMP_GRAIN.as_nanos() as i128).contains(&age) {
            std::thread::sleep(TIMESTAMP_GRAIN);
        }
        self.look()?;
        let mut seal = self.seal.lock();
        // Another one by now: somebody is still changing it, so no time can be trusted yet.
        if !is_wanted(&seal) || seal.stamp.as_ref() != Some(&stamp) {
            return Ok(());
        }
        self.rows.put_sealed(&Sealed { stamp: Some(stamp), geometry: self.geometry })?;
        seal.is_row_written = true;
        Ok(())
    }

    /// Makes what was written durable, after which the file system's word about holes is good.
    fn sync(&self) -> Result<(), SourceError> {
        let nth = self.writes.load(Ordering::Acquire);
        self.image.sync_data()?;
        self.synced_at.fetch_max(nth, Ordering::AcqRel);
        Ok(())
    }

    /// Whether the file system's holes in a page may be believed: data that is not written back may pass for one.
    pub(super) fn has_true_holes(&self, page: PageIndex, bytes: Range<u64>) -> Result<bool, SourceError> {
        let is_synced =
            || self.written_at[page.0 as usize].load(Ordering::Acquire) <= self.synced_at.load(Ordering::Acquire);
        if is_synced()
            || is_planted(Bug::UnsyncedHolesBelieved)
            || self.image.next_data(bytes.start)?.is_some_and(|data| data.start == bytes.start && data.end >= bytes.end)
        {
            return Ok(true);
        }
        Ok(self.sync().is_ok() && is_synced())
    }

    /// Pages in holes need no hashing.
    fn find_holes(&self) -> Result<(), SourceError> {
        let page_bytes = u64::from(self.geometry.block_size.bytes()) * PAGE_IDS;
        let mut next = 0;
        while next < self.geometry.pages() {
            let data = self.image.next_data(next * page_bytes)?;
            let first_with_data = data.as_ref().map_or(self.geometry.pages(), |data| data.start / page_bytes);
            for page in next..first_with_data.min(self.geometry.pages()) {
                let state = &self.pages[page as usize];
                if state.compare_exchange(UNKNOWN, HOLE, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    self.hashed_pages.fetch_add(1, Ordering::Relaxed);
                }
            }
            next = data.map_or(self.geometry.pages(), |data| data.end.div_ceil(page_bytes)).max(first_with_data + 1);
        }
        Ok(())
    }

    /// Pages that were taken for holes and hold data are unknown. After a sync; not once they are announced for good.
    fn doubt_holes(&self) -> Result<(), SourceError> {
        if self.is_released() {
            return Ok(());
        }
        for (page, state) in (0..).map(PageIndex).zip(&self.pages) {
            if state.load(Ordering::Acquire) != HOLE {
                continue;
            }
            let blocks = page.blocks(self.geometry.blocks());
            let end = self.geometry.offset_of(BlockIndex(blocks.end)).min(self.geometry.size_bytes);
            let is_hole = self.image.is_hole(self.geometry.offset_of(BlockIndex(blocks.start))..end)?;
            if !is_hole && state.compare_exchange(HOLE, UNKNOWN, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                self.hashed_pages.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn load_pages(&self) -> Result<(), SourceError> {
        let mut ids = self.ids.lock();
        for (index, id) in self.rows.page_ids()? {
            let Some(state) = self.pages.get(index as usize) else { continue };
            let known = if id == PageId([0; 32]) { ZERO } else { KNOWN };
            ids.insert(index, id);
            if !is_known(state.swap(known, Ordering::AcqRel)) {
                self.hashed_pages.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

const NOT_KNOWN: &str = "was not looked at before somebody changed the image, so what it held is not known";
