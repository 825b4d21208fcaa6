//! The ids of one image: hashed page by page, kept across restarts, forgotten where the guest writes.
//! Must not know who asks for them.
//!
//! Rows lie under `hash/<incarnation>/` (`manifest/rows.rs`). What may be believed of an image that rests, and of one that was released
//! to a peer, is decided in `manifest/rest.rs`: times are hints, ids decide.

mod rest;
mod rows;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::SourceError;
use crate::core::ids::{BlockId, BlockIndex, Incarnation, Name};
use crate::core::manifest::{Geometry, Page, PageId, PageIndex};
use crate::core::wire::RootEntry;
use crate::image::Image;
use crate::seeded_bugs::{Bug, is_planted};
use crate::store::State;
use rest::{Seal, Told};
use rows::Rows;

const UNKNOWN: u8 = 0;
const HASHING: u8 = 1;
const ZERO: u8 = 2;
const KNOWN: u8 = 3;
/// As `ZERO`, because the file system said so; nothing was read.
const HOLE: u8 = 4;

fn is_known(state: u8) -> bool {
    matches!(state, ZERO | KNOWN | HOLE)
}

/// See the module.
pub struct Manifest {
    volume: Name,
    image: Arc<Image>,
    geometry: Geometry,
    rows: Rows,
    pages: Vec<AtomicU8>,
    hashed_pages: AtomicU64,
    ids: Mutex<HashMap<u64, PageId>>,
    /// Whether `seal` holds: looked at by every write.
    is_sealed: AtomicBool,
    /// Whether a peer has it: what was announced stays.
    is_released: AtomicBool,
    /// Counts how often it was taken back from a peer that it was released to.
    edition: AtomicU64,
    /// Whether something happened to a released image that only ids can tell from a change.
    is_suspect: AtomicBool,
    seal: Mutex<Seal>,
    told: Mutex<Told>,
    /// Counts notes of writes.
    writes: AtomicU64,
    /// For each page, the last note of a write into it.
    written_at: Vec<AtomicU64>,
    /// Notes up to this one are of writes that are synced: in pages without later ones, holes are holes.
    synced_at: AtomicU64,
}

impl std::fmt::Debug for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manifest").field("volume", &self.volume).field("hashed_pages", &self.hashed_pages()).finish()
    }
}

impl Manifest {
    /// Takes over what is known from earlier, as far as it may be believed of the image now; pages that are all hole are known at once.
    /// Syncs the image for that, so it may block.
    ///
    /// An image that `is_released` to a peer must not change at all: the peer may hold half of what it was. What was announced of it is
    /// taken over whatever became of the image; a block that is not what was announced is refused with [`SourceError::Changed`].
    pub fn open(
        volume: Name,
        incarnation: Incarnation,
        image: Arc<Image>,
        geometry: Geometry,
        db: Arc<dyn State>,
        is_released: bool,
    ) -> Result<Manifest, SourceError> {
        let manifest = Manifest::unknown(volume, incarnation, image, geometry, db);
        manifest.begin_resting(is_released)?;
        Ok(manifest)
    }

    /// For an image that guests write at this moment: nothing is known of it but what is hashed once every write is
    /// noted here.
    pub fn open_written(
        volume: Name,
        incarnation: Incarnation,
        image: Arc<Image>,
        geometry: Geometry,
        db: Arc<dyn State>,
    ) -> Result<Manifest, SourceError> {
        let manifest = Manifest::unknown(volume, incarnation, image, geometry, db);
        manifest.forget_rows()?;
        Ok(manifest)
    }

    fn unknown(
        volume: Name,
        incarnation: Incarnation,
        image: Arc<Image>,
        geometry: Geometry,
        db: Arc<dyn State>,
    ) -> Manifest {
        Manifest {
            rows: Rows::new(volume.clone(), incarnation, db),
            pages: (0..geometry.pages()).map(|_| AtomicU8::new(UNKNOWN)).collect(),
            // As if every page had just been written: nobody has noted what was.
            written_at: (0..geometry.pages()).map(|_| AtomicU64::new(1)).collect(),
            writes: AtomicU64::new(1),
            synced_at: AtomicU64::new(0),
            volume,
            image,
            geometry,
            hashed_pages: AtomicU64::new(0),
            ids: Mutex::default(),
            is_sealed: AtomicBool::new(false),
            is_released: AtomicBool::new(false),
            edition: AtomicU64::new(0),
            is_suspect: AtomicBool::new(false),
            seal: Mutex::default(),
            told: Mutex::default(),
        }
    }

    /// How many pages there are ids for.
    pub fn hashed_pages(&self) -> u64 {
        self.hashed_pages.load(Ordering::Relaxed)
    }

    /// Whether a peer was told that the image changes no more.
    pub fn is_released(&self) -> bool {
        self.is_released.load(Ordering::Acquire)
    }

    /// Another one each time that the image is taken back from a peer that it was released to, before any guest writes to it.
    pub fn edition(&self) -> u64 {
        self.edition.load(Ordering::Acquire)
    }

    /// Whether the volume is gone: [`Manifest::close`].
    pub fn is_closed(&self) -> bool {
        self.rows.is_closed()
    }

    /// The volume is given up. From here on nothing is hashed and no row is written, whoever still holds this; every question is
    /// answered with [`SourceError::Gone`]. Waits for a row that is just being written.
    pub fn close(&self) {
        self.rows.close();
    }

    /// Drops the rows of a volume that is gone.
    pub fn forget_rows(&self) -> Result<(), SourceError> {
        self.rows.forget()
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
                ZERO | HOLE => RootEntry::Zero,
                KNOWN => ids.get(&page).map_or(RootEntry::Unknown, |id| RootEntry::Known(*id)),
                _ => RootEntry::Unknown,
            })
            .collect()
    }

    /// A page, from memory or the database, or hashed now. Blocks for as long as 1,024 blocks take to read.
    pub fn page(&self, page: PageIndex) -> Result<Page, SourceError> {
        self.rows.check_open()?;
        match self.kept_page(page)? {
            Some(kept) => Ok(kept),
            // A damaged row costs a hash, nothing else.
            None => self.hash_page(page),
        }
    }

    /// A page that was hashed before, if its row is sound.
    fn kept_page(&self, page: PageIndex) -> Result<Option<Page>, SourceError> {
        match self.pages[page.0 as usize].load(Ordering::Acquire) {
            ZERO | HOLE => Ok(Some(self.zero_page(page))),
            KNOWN => {
                let id = self.ids.lock().get(&page.0).copied();
                let kept = self.rows.page(page, self.geometry.ids_in(page))?;
                Ok(kept.filter(|kept| Some(kept.id()) == id))
            }
            _ => Ok(None),
        }
    }

    /// Reads and hashes a page, and keeps it if nobody wrote it meanwhile. Of a released image it must be what was announced.
    pub fn hash_page(&self, page: PageIndex) -> Result<Page, SourceError> {
        self.rows.check_open()?;
        self.write_stamp_row()?;
        self.look()?;
        if self.is_released() {
            return self.hash_released(page);
        }
        let state = &self.pages[page.0 as usize];
        let written_at = self.written_at[page.0 as usize].load(Ordering::Acquire);
        let before = state.swap(HASHING, Ordering::AcqRel);
        let kept = self.hash_blocks(page).and_then(|hashed| {
            // An owner's image that somebody changed meanwhile: all pages are unknown by now, this one included.
            self.look()?;
            let is_kept = self.keep(page, &hashed, written_at)?;
            Ok((hashed, is_kept))
        });
        match kept {
            Ok((hashed, is_kept)) => {
                if is_kept && !is_known(before) {
                    self.hashed_pages.fetch_add(1, Ordering::Relaxed);
                } else if !is_kept && is_known(before) {
                    self.hashed_pages.fetch_sub(1, Ordering::Relaxed);
                }
                Ok(hashed)
            }
            Err(error) => {
                let _ = state.compare_exchange(HASHING, UNKNOWN, Ordering::AcqRel, Ordering::Relaxed);
                if is_known(before) {
                    self.hashed_pages.fetch_sub(1, Ordering::Relaxed);
                }
                Err(error)
            }
        }
    }

    /// Writes a page's row, and then makes it known, unless somebody has written since: `written_at` is from before it was read. That it is
    /// being hashed does not tell: another may have begun anew since. Returns whether it is known.
    fn keep(&self, page: PageIndex, hashed: &Page, written_at: u64) -> Result<bool, SourceError> {
        let state = &self.pages[page.0 as usize];
        let id = hashed.id();
        let after = if hashed.is_zero() { ZERO } else { KNOWN };
        // Under the lock: a write that is noted from here on finds its place in `stale` behind this row, so that no row can come after
        // the seal that should have dropped it.
        let mut seal = self.seal.lock();
        let is_as_read = || self.written_at[page.0 as usize].load(Ordering::Acquire) == written_at;
        if state.load(Ordering::Acquire) != HASHING || !is_as_read() {
            return Ok(false);
        }
        let is_kept = self.settle_told(page, hashed, || {
            // Before it can be announced. Not synced: a process that dies loses nothing, and a machine that does has the image as it was.
            self.rows.put_page(page, hashed)?;
            if after == KNOWN {
                self.ids.lock().insert(page.0, id);
            }
            Ok(state.compare_exchange(HASHING, after, Ordering::AcqRel, Ordering::Relaxed).is_ok())
        })?;
        if is_kept {
            seal.stale.remove(&page.0);
        }
        Ok(is_kept)
    }

    /// Whether it rests: no guest of this site has written since it was opened or sealed.
    pub fn is_sealed(&self) -> bool {
        self.is_sealed.load(Ordering::Acquire)
    }

    /// A guest of this site is about to write a range: called before the bytes change, and again after, since a hash that
    /// ran in between may have seen half of it.
    pub fn note_write(&self, bytes: Range<u64>) -> Result<(), SourceError> {
        if self.is_closed() {
            return Ok(());
        }
        if self.is_sealed.load(Ordering::Acquire) {
            self.unseal()?;
        }
        if bytes.is_empty() || is_planted(Bug::StaleIdAfterWrite) {
            return Ok(());
        }
        let nth = self.writes.fetch_add(1, Ordering::AcqRel) + 1;
        let first = PageIndex::of(self.geometry.block_size.index_of(bytes.start)).0;
        let last = PageIndex::of(self.geometry.block_size.index_of(bytes.end - 1)).0;
        for page in first..=last {
            self.written_at[page as usize].fetch_max(nth, Ordering::AcqRel);
            let state = &self.pages[page as usize];
            if state.load(Ordering::Acquire) == UNKNOWN {
                continue;
            }
            let before = state.swap(UNKNOWN, Ordering::AcqRel);
            if before != UNKNOWN {
                self.seal.lock().stale.insert(page);
            }
            if is_known(before) {
                self.hashed_pages.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn hash_blocks(&self, page: PageIndex) -> Result<Page, SourceError> {
        let blocks = page.blocks(self.geometry.blocks());
        let first = self.geometry.offset_of(BlockIndex(blocks.start));
        let end = self.geometry.offset_of(BlockIndex(blocks.end)).min(self.geometry.size_bytes);
        let has_true_holes = self.has_true_holes(page, first..end)?;
        let mut ids = vec![BlockId::ZERO; (blocks.end - blocks.start) as usize];
        // A megabyte at a time: a whole number of blocks of any size.
        let mut buf = vec![0; 1 << 20];
        let mut at = first;
        while at < end {
            let data = if has_true_holes { self.image.next_data(at)? } else { Some(at..end) };
            let Some(data) = data.filter(|data| data.start < end) else { break };
            self.rows.check_open()?;
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

    fn zero_page(&self, page: PageIndex) -> Page {
        Page::new(vec![BlockId::ZERO; self.geometry.ids_in(page) as usize])
    }
}

#[cfg(test)]
mod tests;
