//! The ids of one image: hashed page by page, kept across restarts, forgotten where the guest writes.
//! Must not know who asks for them.
//!
//! Rows in the state database, under `hash/<volume>/`: `stamp` (JSON of [`Sealed`]), `page/<index, big-endian u64>` (the page's
//! 32-byte id and the page's bytes). The page rows are believed only under a stamp row that equals the image's stamp now:
//! the stamp row is deleted, durably, before the first write through this site, and written again when the image
//! rests ([`Manifest::seal`]).

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::SourceError;
use crate::core::ids::{BlockId, BlockIndex, Name};
use crate::core::manifest::{Geometry, Page, PageId, PageIndex};
use crate::core::wire::RootEntry;
use crate::image::{Image, Stamp};
use crate::seeded_bugs::{Bug, is_planted};
use crate::store::{State, StateBatch};

const UNKNOWN: u8 = 0;
const HASHING: u8 = 1;
const ZERO: u8 = 2;
const KNOWN: u8 = 3;

/// Times of files advance in steps of the kernel's timer (10 ms at most). A write within the same step as the hashing
/// would not move the stamp: so an image rests this long before it is hashed.
const TIMESTAMP_GRAIN: Duration = Duration::from_millis(20);

/// See the module.
pub struct Manifest {
    volume: Name,
    image: Arc<Image>,
    geometry: Geometry,
    db: Arc<dyn State>,
    pages: Vec<AtomicU8>,
    hashed_pages: AtomicU64,
    ids: Mutex<std::collections::HashMap<u64, PageId>>,
    /// Whether `seal` holds a stamp: looked at by every write.
    is_sealed: AtomicBool,
    seal: Mutex<Seal>,
}

#[derive(Default)]
struct Seal {
    stamp: Option<Stamp>,
    /// Rows of pages that were written since.
    stale: BTreeSet<u64>,
    is_row_written: bool,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    stamp: Stamp,
    geometry: Geometry,
}

impl std::fmt::Debug for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manifest").field("volume", &self.volume).field("hashed_pages", &self.hashed_pages()).finish()
    }
}

impl Manifest {
    /// Takes over what is known from earlier, as far as the image has not changed since; pages that are all hole are known at once.
    ///
    /// An image that `is_released` to a peer must not change at all: the peer may hold half of what it was. If it did while nobody
    /// looked, every question about it is answered with [`SourceError::Changed`] until it is as it was.
    pub fn open(
        volume: Name,
        image: Arc<Image>,
        geometry: Geometry,
        db: Arc<dyn State>,
        is_released: bool,
    ) -> Result<Manifest, SourceError> {
        let manifest = Manifest::unknown(volume, image, geometry, db);
        let stamp = manifest.image.stamp()?;
        let kept = manifest.get(&manifest.key("stamp"))?;
        let kept: Option<Sealed> = kept.and_then(|row| serde_json::from_slice(&row).ok());
        let is_same = |kept: &Sealed| Some(&kept.stamp) == stamp.as_ref() && kept.geometry == geometry;
        // Only what a change of content moves: a file may be renamed, or its device be numbered anew at a boot.
        let has_other_content = |kept: &Sealed| {
            stamp
                .as_ref()
                .is_some_and(|now| now.size_bytes != kept.stamp.size_bytes || now.mtime_ns != kept.stamp.mtime_ns)
        };
        if let Some(kept) = kept.as_ref().filter(|kept| is_released && has_other_content(kept)) {
            tracing::error!(
                volume = %manifest.volume, image = %manifest.image.path().display(),
                "the image was changed after it was released to a peer: nothing of it is served until it is as it was"
            );
            *manifest.seal.lock() = Seal { stamp: Some(kept.stamp.clone()), is_row_written: true, ..Seal::default() };
            manifest.is_sealed.store(true, Ordering::Release);
            return Ok(manifest);
        }
        if kept.is_some_and(|kept| is_same(&kept)) {
            manifest.load_pages()?;
            manifest.seal.lock().is_row_written = true;
        } else {
            manifest.forget_rows()?;
        }
        manifest.seal.lock().stamp = stamp;
        manifest.is_sealed.store(true, Ordering::Release);
        manifest.find_holes()?;
        Ok(manifest)
    }

    /// For an image that guests write at this moment: nothing is known of it but what is hashed once every write is
    /// noted here.
    pub fn open_written(
        volume: Name,
        image: Arc<Image>,
        geometry: Geometry,
        db: Arc<dyn State>,
    ) -> Result<Manifest, SourceError> {
        let manifest = Manifest::unknown(volume, image, geometry, db);
        manifest.forget_rows()?;
        Ok(manifest)
    }

    fn unknown(volume: Name, image: Arc<Image>, geometry: Geometry, db: Arc<dyn State>) -> Manifest {
        Manifest {
            pages: (0..geometry.pages()).map(|_| AtomicU8::new(UNKNOWN)).collect(),
            volume,
            image,
            geometry,
            db,
            hashed_pages: AtomicU64::new(0),
            ids: Mutex::default(),
            is_sealed: AtomicBool::new(false),
            seal: Mutex::default(),
        }
    }

    /// How many pages there are ids for.
    pub fn hashed_pages(&self) -> u64 {
        self.hashed_pages.load(Ordering::Relaxed)
    }

    /// The first page at or after `from` that is not hashed.
    pub fn next_unknown(&self, from: PageIndex) -> Option<PageIndex> {
        let pages = self.pages.get(from.0 as usize..)?;
        pages.iter().position(|state| state.load(Ordering::Relaxed) == UNKNOWN).map(|at| PageIndex(from.0 + at as u64))
    }

    /// What is known of some pages; empty behind the end.
    pub fn roots(&self, first: PageIndex, count: u64) -> Vec<RootEntry> {
        let ids = self.ids.lock();
        (first.0..first.0.saturating_add(count).min(self.geometry.pages()))
            .map(|page| match self.pages[page as usize].load(Ordering::Acquire) {
                ZERO => RootEntry::Zero,
                KNOWN => ids.get(&page).map_or(RootEntry::Unknown, |id| RootEntry::Known(*id)),
                _ => RootEntry::Unknown,
            })
            .collect()
    }

    /// A page, from memory or the database, or hashed now. Blocks for as long as 1,024 blocks take to read.
    pub fn page(&self, page: PageIndex) -> Result<Page, SourceError> {
        match self.pages[page.0 as usize].load(Ordering::Acquire) {
            ZERO => return Ok(self.zero_page(page)),
            KNOWN => {
                let id = self.ids.lock().get(&page.0).copied();
                let row = self.get(&self.page_key(page))?;
                if let (Some(id), Some(row)) = (id, row)
                    && let Some((_, bytes)) = row.split_at_checked(32)
                    && let Ok(kept) = Page::from_bytes(bytes, self.geometry.ids_in(page))
                    && kept.id() == id
                {
                    return Ok(kept);
                }
                // A damaged row costs a hash, nothing else.
            }
            _ => {}
        }
        self.hash_page(page)
    }

    /// Reads and hashes a page, and keeps it if nobody wrote it meanwhile.
    pub fn hash_page(&self, page: PageIndex) -> Result<Page, SourceError> {
        let state = &self.pages[page.0 as usize];
        self.write_stamp_row()?;
        let before = state.swap(HASHING, Ordering::AcqRel);
        let hashed = self.hash_blocks(page).and_then(|hashed| {
            self.check_unchanged()?;
            Ok(hashed)
        });
        let hashed = match hashed {
            Ok(hashed) => hashed,
            Err(error) => {
                let _ = state.compare_exchange(HASHING, UNKNOWN, Ordering::AcqRel, Ordering::Relaxed);
                return Err(error);
            }
        };
        let id = hashed.id();
        let mut after = ZERO;
        if !hashed.is_zero() {
            self.ids.lock().insert(page.0, id);
            after = KNOWN;
        }
        let is_kept = state.compare_exchange(HASHING, after, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if is_kept && before != KNOWN && before != ZERO {
            self.hashed_pages.fetch_add(1, Ordering::Relaxed);
        } else if !is_kept && (before == KNOWN || before == ZERO) {
            self.hashed_pages.fetch_sub(1, Ordering::Relaxed);
        }
        if is_kept && after == KNOWN {
            // Under the lock, and only while it is still known: a write that is noted from here on finds its place in
            // `stale` behind this row, so that no row can come after the seal that should have dropped it.
            let mut seal = self.seal.lock();
            if state.load(Ordering::Acquire) == KNOWN {
                let mut batch = StateBatch::default();
                batch.put(self.page_key(page), [&id.0[..], &hashed.to_bytes()].concat());
                // Not synced: a lost row costs a hash.
                self.write(batch, false)?;
                seal.stale.remove(&page.0);
            }
        }
        Ok(hashed)
    }

    /// A guest of this site is about to write a range: called before the bytes change, and again after, since a hash that
    /// ran in between may have seen half of it.
    pub fn note_write(&self, bytes: Range<u64>) -> Result<(), SourceError> {
        if self.is_sealed.load(Ordering::Acquire) {
            let mut seal = self.seal.lock();
            if seal.is_row_written {
                let mut batch = StateBatch::default();
                batch.delete(self.key("stamp"));
                // Durable before the write: the image's times may reach the disk after its bytes.
                self.write(batch, true)?;
                seal.is_row_written = false;
            }
            seal.stamp = None;
            self.is_sealed.store(false, Ordering::Release);
        }
        if bytes.is_empty() || is_planted(Bug::StaleIdAfterWrite) {
            return Ok(());
        }
        let first = PageIndex::of(self.geometry.block_size.index_of(bytes.start)).0;
        let last = PageIndex::of(self.geometry.block_size.index_of(bytes.end - 1)).0;
        for page in first..=last {
            let state = &self.pages[page as usize];
            if state.load(Ordering::Acquire) == UNKNOWN {
                continue;
            }
            let before = state.swap(UNKNOWN, Ordering::AcqRel);
            if before != UNKNOWN {
                self.seal.lock().stale.insert(page);
            }
            if before == KNOWN || before == ZERO {
                self.hashed_pages.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The image rests: from here on it is static, any change is somebody else's. What is known may be believed after a restart.
    /// The caller has stopped writes and synced the image.
    pub fn seal(&self) -> Result<(), SourceError> {
        let stamp = self.image.stamp()?;
        let mut seal = self.seal.lock();
        if seal.stamp.is_some() {
            drop(seal);
            return self.write_stamp_row();
        }
        let mut batch = StateBatch::default();
        for page in &seal.stale {
            batch.delete(self.page_key(PageIndex(*page)));
        }
        self.write(batch, true)?;
        seal.stale.clear();
        seal.stamp = stamp;
        seal.is_row_written = false;
        self.is_sealed.store(true, Ordering::Release);
        drop(seal);
        self.write_stamp_row()
    }

    /// Whether the image is still what it was when it came to rest. Always so while guests of this site write it.
    pub fn check_unchanged(&self) -> Result<(), SourceError> {
        if !self.is_sealed.load(Ordering::Acquire) {
            return Ok(());
        }
        let expected = self.seal.lock().stamp.clone();
        if expected.is_some() && self.image.stamp()? != expected {
            // A guest's write may have begun between the two looks.
            if self.is_sealed.load(Ordering::Acquire) && self.seal.lock().stamp == expected {
                return Err(SourceError::Changed { path: self.image.path().to_owned() });
            }
        }
        Ok(())
    }

    /// Drops the rows of a volume that is gone.
    pub fn forget_rows(&self) -> Result<(), SourceError> {
        let mut batch = StateBatch::default();
        batch.delete_prefix(self.key(""));
        self.write(batch, true)
    }

    fn hash_blocks(&self, page: PageIndex) -> Result<Page, SourceError> {
        let blocks = page.blocks(self.geometry.blocks());
        let first = self.geometry.offset_of(BlockIndex(blocks.start));
        let end = self.geometry.offset_of(BlockIndex(blocks.end)).min(self.geometry.size_bytes);
        let mut ids = vec![BlockId::ZERO; (blocks.end - blocks.start) as usize];
        // A megabyte at a time: a whole number of blocks of any size.
        let mut buf = vec![0; 1 << 20];
        let mut at = first;
        while let Some(data) = self.image.next_data(at)?.filter(|data| data.start < end) {
            let start = data.start - (data.start - first) % (1 << 20);
            let len = (end - start).min(1 << 20) as usize;
            self.image.read_once_at(start, &mut buf[..len])?;
            let index = self.geometry.block_size.index_of(start - first).0 as usize;
            for (nth, block) in buf[..len].chunks(self.geometry.block_size.bytes() as usize).enumerate() {
                ids[index + nth] = BlockId::of(block);
            }
            at = start + len as u64;
        }
        Ok(Page::new(ids))
    }

    /// Pages in holes need no hashing.
    fn find_holes(&self) -> Result<(), SourceError> {
        let page_bytes = u64::from(self.geometry.block_size.bytes()) * crate::core::manifest::PAGE_IDS;
        let mut next = 0;
        while next < self.geometry.pages() {
            let data = self.image.next_data(next * page_bytes)?;
            let first_with_data = data.as_ref().map_or(self.geometry.pages(), |data| data.start / page_bytes);
            for page in next..first_with_data {
                if self.pages[page as usize].swap(ZERO, Ordering::AcqRel) == UNKNOWN {
                    self.hashed_pages.fetch_add(1, Ordering::Relaxed);
                }
            }
            next = data.map_or(self.geometry.pages(), |data| data.end.div_ceil(page_bytes)).max(first_with_data + 1);
        }
        Ok(())
    }

    fn load_pages(&self) -> Result<(), SourceError> {
        let prefix = self.key("page/");
        let rows = self.db.scan_prefix(&prefix).map_err(|source| self.state_error(source))?;
        let mut ids = self.ids.lock();
        for (key, row) in rows {
            let index = key.get(prefix.len()..).and_then(|index| index.try_into().ok()).map(u64::from_be_bytes);
            let id = row.first_chunk::<32>();
            if let (Some(index), Some(id)) = (index, id)
                && let Some(state) = self.pages.get(index as usize)
            {
                ids.insert(index, PageId(*id));
                state.store(KNOWN, Ordering::Release);
                self.hashed_pages.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Written before the first page row that relies on it, and only when the image's times can be trusted to tell.
    fn write_stamp_row(&self) -> Result<(), SourceError> {
        let is_wanted = |seal: &Seal| seal.stamp.is_some() && !seal.is_row_written;
        if !is_wanted(&self.seal.lock()) {
            return Ok(());
        }
        // What a killed daemon left in the kernel's cache alone is about to be hashed: after a power loss the row would be believed of an
        // image that has lost it. Without the lock: a guest's first write takes it.
        if let Err(error) = self.image.sync_data() {
            tracing::warn!(volume = %self.volume, %error, "the ids of an image that cannot be synced are not kept");
            return Ok(());
        }
        let mut seal = self.seal.lock();
        let Some(stamp) = seal.stamp.clone().filter(|_| !seal.is_row_written) else { return Ok(()) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as i128;
        let age = now - stamp.mtime_ns.max(stamp.ctime_ns);
        if (0..TIMESTAMP_GRAIN.as_nanos() as i128).contains(&age) {
            std::thread::sleep(TIMESTAMP_GRAIN);
            if self.image.stamp()?.as_ref() != Some(&stamp) {
                return Err(SourceError::Changed { path: self.image.path().to_owned() });
            }
        }
        let row = serde_json::to_vec(&Sealed { stamp, geometry: self.geometry }).unwrap_or_default();
        let mut batch = StateBatch::default();
        batch.put(self.key("stamp"), row);
        self.write(batch, false)?;
        seal.is_row_written = true;
        Ok(())
    }

    fn zero_page(&self, page: PageIndex) -> Page {
        Page::new(vec![BlockId::ZERO; self.geometry.ids_in(page) as usize])
    }

    fn key(&self, what: &str) -> Vec<u8> {
        format!("hash/{}/{what}", self.volume).into_bytes()
    }

    fn page_key(&self, page: PageIndex) -> Vec<u8> {
        [self.key("page/"), page.0.to_be_bytes().to_vec()].concat()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, SourceError> {
        self.db.get(key).map_err(|source| self.state_error(source))
    }

    fn write(&self, batch: StateBatch, is_synced: bool) -> Result<(), SourceError> {
        self.db.write_batch(batch, is_synced).map_err(|source| self.state_error(source))
    }

    fn state_error(&self, source: crate::store::StateError) -> SourceError {
        SourceError::State { volume: self.volume.clone(), source }
    }
}

#[cfg(test)]
mod tests;
