//! What is kept of an image's ids in the state database. Must not know when it may be believed.
//!
//! Under `hash/<incarnation>/`: `stamp` (JSON of [`Sealed`]); `page/<index, big-endian u64>` (the page's 32-byte id, all zero for a page of
//! zeros, and the page's bytes, none for a page of zeros); `told/<block, big-endian u64>` (the 32-byte id of a block that a peer was sent
//! before its page was hashed).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};

use super::SourceError;
use crate::core::ids::{BlockId, Incarnation, Name};
use crate::core::manifest::{Geometry, Page, PageId, PageIndex};
use crate::image::Stamp;
use crate::store::{State, StateBatch, StateError};

/// What the image was when it came to rest.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Sealed {
    /// None: a block device.
    pub stamp: Option<Stamp>,
    pub geometry: Geometry,
}

pub(super) struct Rows {
    volume: Name,
    prefix: String,
    db: Arc<dyn State>,
    /// Looked at before every write of a guest.
    is_closed: AtomicBool,
    /// Held by whoever writes a row, so that none comes after the end.
    writing: RwLock<()>,
}

impl Rows {
    pub(super) fn new(volume: Name, incarnation: Incarnation, db: Arc<dyn State>) -> Rows {
        Rows {
            volume,
            prefix: format!("hash/{incarnation}/"),
            db,
            is_closed: AtomicBool::new(false),
            writing: RwLock::new(()),
        }
    }

    /// Nothing is written once this returns.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        // Who saw that it was open holds this.
        drop(self.writing.write());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    pub(super) fn check_open(&self) -> Result<(), SourceError> {
        match self.is_closed() {
            true => Err(SourceError::Gone { volume: self.volume.clone() }),
            false => Ok(()),
        }
    }

    /// All of them, be the manifest closed or not.
    pub(super) fn forget(&self) -> Result<(), SourceError> {
        let mut batch = StateBatch::default();
        batch.delete_prefix(self.key(""));
        self.db.write_batch(batch, true).map_err(|source| self.failed(source))
    }

    /// What an earlier version kept under the volume's name: it cannot be told whose it was.
    pub(super) fn forget_by_name(&self) -> Result<(), SourceError> {
        let is_there =
            self.db.get(format!("hash/{}/stamp", self.volume).as_bytes()).map_err(|source| self.failed(source))?;
        if is_there.is_some() && self.volume.as_str().parse::<Incarnation>().is_err() {
            let mut batch = StateBatch::default();
            batch.delete_prefix(format!("hash/{}/", self.volume).into_bytes());
            self.write(batch, false)?;
        }
        Ok(())
    }

    pub(super) fn sealed(&self) -> Result<Option<Sealed>, SourceError> {
        let row = self.get(&self.key("stamp"))?;
        Ok(row.and_then(|row| serde_json::from_slice(&row).ok()))
    }

    pub(super) fn put_sealed(&self, sealed: &Sealed) -> Result<(), SourceError> {
        let mut batch = StateBatch::default();
        batch.put(self.key("stamp"), serde_json::to_vec(sealed).unwrap_or_default());
        self.write(batch, false)
    }

    pub(super) fn delete_sealed(&self) -> Result<(), SourceError> {
        let mut batch = StateBatch::default();
        batch.delete(self.key("stamp"));
        self.write(batch, true)
    }

    /// The ids of all pages that have rows, by index.
    pub(super) fn page_ids(&self) -> Result<Vec<(u64, PageId)>, SourceError> {
        Ok(self.ids_under("page/")?.into_iter().map(|(page, id)| (page, PageId(id))).collect())
    }

    /// Blocks that were sent before their pages were hashed.
    pub(super) fn told(&self) -> Result<Vec<(u64, BlockId)>, SourceError> {
        Ok(self.ids_under("told/")?.into_iter().map(|(block, id)| (block, BlockId(id))).collect())
    }

    fn ids_under(&self, what: &str) -> Result<Vec<(u64, [u8; 32])>, SourceError> {
        let prefix = self.key(what);
        let rows = self.db.scan_prefix(&prefix).map_err(|source| self.failed(source))?;
        let parsed = rows.into_iter().filter_map(|(key, row)| {
            let index = key.get(prefix.len()..)?.try_into().ok().map(u64::from_be_bytes)?;
            Some((index, *row.first_chunk::<32>()?))
        });
        Ok(parsed.collect())
    }

    /// A page as it was kept, whatever its id; None if there is no sound row.
    pub(super) fn page(&self, page: PageIndex, ids: u64) -> Result<Option<Page>, SourceError> {
        let row = self.get(&self.indexed("page/", page.0))?;
        Ok(row.and_then(|row| Page::from_bytes(row.get(32..)?, ids).ok()))
    }

    pub(super) fn put_page(&self, page: PageIndex, hashed: &Page) -> Result<(), SourceError> {
        let bytes = if hashed.is_zero() { Vec::new() } else { hashed.to_bytes() };
        let mut batch = StateBatch::default();
        batch.put(self.indexed("page/", page.0), [&hashed.id().0[..], &bytes].concat());
        self.write(batch, false)
    }

    /// What holds from a release on, durably: rows for the pages of zeros, and none of what was told of an earlier release.
    pub(super) fn put_released(&self, zeros: impl Iterator<Item = u64>, sealed: &Sealed) -> Result<(), SourceError> {
        let mut batch = StateBatch::default();
        zeros.for_each(|page| batch.put(self.indexed("page/", page), vec![0; 32]));
        batch.delete_prefix(self.key("told/"));
        batch.put(self.key("stamp"), serde_json::to_vec(sealed).unwrap_or_default());
        self.write(batch, true)
    }

    pub(super) fn delete_pages(&self, pages: impl Iterator<Item = u64>) -> Result<(), SourceError> {
        let mut batch = StateBatch::default();
        pages.for_each(|page| batch.delete(self.indexed("page/", page)));
        self.write(batch, true)
    }

    pub(super) fn put_told(&self, block: u64, id: BlockId) -> Result<(), SourceError> {
        let mut batch = StateBatch::default();
        batch.put(self.indexed("told/", block), id.0.to_vec());
        self.write(batch, false)
    }

    pub(super) fn delete_told(&self, blocks: impl Iterator<Item = u64>) -> Result<(), SourceError> {
        let mut batch = StateBatch::default();
        blocks.for_each(|block| batch.delete(self.indexed("told/", block)));
        self.write(batch, false)
    }

    fn key(&self, what: &str) -> Vec<u8> {
        format!("{}{what}", self.prefix).into_bytes()
    }

    pub(super) fn indexed(&self, what: &str, index: u64) -> Vec<u8> {
        [self.key(what), index.to_be_bytes().to_vec()].concat()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, SourceError> {
        self.db.get(key).map_err(|source| self.failed(source))
    }

    fn write(&self, batch: StateBatch, is_synced: bool) -> Result<(), SourceError> {
        if batch.is_empty() {
            return Ok(());
        }
        let _writing = self.writing.read();
        self.check_open()?;
        self.db.write_batch(batch, is_synced).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: StateError) -> SourceError {
        SourceError::State { volume: self.volume.clone(), source }
    }
}
