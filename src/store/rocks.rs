//! The content store on disk: RocksDB behind [`Store`].
//!
//! A block has two keys. Its id alone leads to the frame, which lies in a blob file. The id followed by a zero byte
//! leads to nothing: it lies in the tree and tells that the block is there without reading it. Both are written and dropped
//! together. A value is, little-endian: version (1 byte, [`VALUE_VERSION`]), RocksDB's sequence number when it was put
//! (8), the frame.
//!
//! FIFO drops the oldest first. That becomes an approximation of least-recently-used by putting a block again when it
//! is hit in the older half of the store; the sequence number tells its age, and costs nothing to keep. Who hits a block
//! waits for it, so that must not take long: while RocksDB would make writes wait, because more is put than the disk takes,
//! the block is put again together with the next ones that are put, which wait anyway.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use rocksdb::{
    ColumnFamilyDescriptor, DB, DBPinnableSlice, DEFAULT_COLUMN_FAMILY_NAME, ErrorKind, WriteBatch, WriteOptions,
};

use super::{Counters, Store, StoreError, StoreOptions, StoreStats, add};
use crate::core::frame::{Frame, FrameError};
use crate::core::ids::BlockId;

/// The layout of values. Version 1 is the first.
const VALUE_VERSION: u8 = 1;
const VALUE_HEADER_BYTES: usize = 9;

/// Blocks that are looked up at once: bounds how many frames are in memory besides what they expand to.
const LOOK_UP: usize = 32;

/// Blocks that may wait for the next put to be put again; more are not remembered until they are hit again. 128 KiB.
const MAX_POSTPONED: usize = 4096;

/// Keys that are written for a block; sequence numbers count them.
const KEYS_PER_BLOCK: u64 = 2;

/// A [`Store`] in a folder of its own.
pub struct RocksStore {
    db: DB,
    dir: PathBuf,
    capacity_bytes: u64,
    counters: Counters,
    /// How far behind the latest sequence number a block is old; `u64::MAX` while nothing will be dropped soon.
    old_after: AtomicU64,
    /// Bytes that may be put before `old_after` is worked out again.
    refresh_in_bytes: AtomicU64,
    /// Old blocks that were hit while RocksDB took nothing.
    postponed: Mutex<BTreeSet<BlockId>>,
    write: WriteOptions,
    write_if_idle: WriteOptions,
}

impl RocksStore {
    /// Opens the store in `dir`, making it where there is none. What cannot be opened is renamed to `dir.broken-N`, and a new
    /// one is made: it is a cache.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while another process has it open; [`StoreError::Unusable`] where nothing can be made.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<RocksStore, StoreError> {
        let unusable = |doing, message: String| StoreError::Unusable { dir: dir.to_owned(), doing, message };
        fs::create_dir_all(dir).map_err(|error| unusable("making its folder", error.to_string()))?;
        let error = match Self::try_open(dir, options) {
            Ok(store) => return Ok(store),
            Err(error) => error.into_string(),
        };
        if is_lock_held(&error) {
            return Err(StoreError::InUse { dir: dir.to_owned() });
        }
        if is_environment(&error) {
            return Err(unusable("opening", error));
        }
        let aside = free_name_beside(dir);
        tracing::error!(
            store = %dir.display(), moved_to = %aside.display(), %error,
            "the content store cannot be opened: it is moved aside and a new, empty one is made; no data is lost, but \
             blocks will be fetched again; remove the old one when you need the room"
        );
        fs::rename(dir, &aside).map_err(|error| unusable("moving the broken one aside", error.to_string()))?;
        Self::try_open(dir, options).map_err(|error| unusable("making a new one", error.into_string()))
    }

    fn try_open(dir: &Path, options: StoreOptions) -> Result<RocksStore, rocksdb::Error> {
        let rocksdb_options = options.rocksdb();
        let family = ColumnFamilyDescriptor::new(DEFAULT_COLUMN_FAMILY_NAME, rocksdb_options.clone());
        let db = DB::open_cf_descriptors(&rocksdb_options, dir, [family])?;
        let settings = options.set_after_open();
        db.set_options(&settings.each_ref().map(|(name, value)| (*name, value.as_str())))?;
        let mut write = WriteOptions::default();
        write.disable_wal(true);
        let mut write_if_idle = WriteOptions::default();
        write_if_idle.disable_wal(true);
        write_if_idle.set_no_slowdown(true);
        let store = RocksStore {
            db,
            dir: dir.to_owned(),
            capacity_bytes: options.capacity_bytes(),
            counters: Counters::default(),
            old_after: AtomicU64::new(u64::MAX),
            refresh_in_bytes: AtomicU64::new(0),
            postponed: Mutex::default(),
            write,
            write_if_idle,
        };
        store.refresh_old_after();
        Ok(store)
    }

    /// How many files of the tree a look-up may have to ask.
    pub fn tree_files(&self) -> u64 {
        // Unlike the others this one is text.
        let text = self.db.property_value("rocksdb.num-files-at-level0").ok().flatten();
        text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// Returns when RocksDB has nothing left to do in the background.
    #[cfg(test)]
    pub(super) fn wait_for_background(&self) {
        let _ = self.db.wait_for_compact(&rocksdb::WaitForCompactOptions::default());
    }

    fn property(&self, name: &str) -> u64 {
        self.db.property_int_value(name).ok().flatten().unwrap_or(0)
    }

    fn blocks_estimate(&self) -> u64 {
        self.property("rocksdb.estimate-num-keys") / KEYS_PER_BLOCK
    }

    fn stored_bytes(&self) -> u64 {
        self.property("rocksdb.live-blob-file-size")
            + self.property("rocksdb.live-sst-files-size")
            + self.property("rocksdb.cur-size-all-mem-tables")
    }

    /// Half of the blocks that the store can hold, in sequence numbers; or never while the store is less than half full.
    fn refresh_old_after(&self) {
        let (blocks, stored_bytes) = (self.blocks_estimate(), self.stored_bytes());
        let old_after = if stored_bytes < self.capacity_bytes / 2 || stored_bytes == 0 {
            u64::MAX
        } else {
            let blocks_when_full = u128::from(blocks) * u128::from(self.capacity_bytes) / u128::from(stored_bytes);
            (blocks_when_full as u64 / 2).max(1) * KEYS_PER_BLOCK
        };
        self.old_after.store(old_after, Ordering::Relaxed);
        self.refresh_in_bytes.store(self.capacity_bytes / 64, Ordering::Relaxed);
    }

    fn note_put_bytes(&self, bytes: u64) {
        // Whichever thread takes the last of the allowance works it out again; another may do so, too: no harm.
        let left = self.refresh_in_bytes.load(Ordering::Relaxed).saturating_sub(bytes);
        self.refresh_in_bytes.store(left, Ordering::Relaxed);
        if left == 0 {
            self.refresh_old_after();
        }
    }

    fn failed(&self, doing: &'static str, error: rocksdb::Error) -> StoreError {
        StoreError::Failed { dir: self.dir.clone(), doing, message: error.into_string() }
    }

    /// One entry for each key, in order.
    fn multi_get<const N: usize>(&self, keys: &[[u8; N]]) -> Vec<Result<Option<DBPinnableSlice<'_>>, rocksdb::Error>> {
        match self.db.cf_handle(DEFAULT_COLUMN_FAMILY_NAME) {
            Some(family) => self.db.batched_multi_get_cf(&family, keys, false),
            // Every database has it; were it missing, nothing would be found.
            None => keys.iter().map(|_| Ok(None)).collect(),
        }
    }

    /// What `read` makes of each block's frame; what cannot be read is dropped, counted and None.
    fn look_up<T>(
        &self,
        ids: &[BlockId],
        read: impl Fn(&[u8], &BlockId) -> Result<T, FrameError>,
    ) -> Result<Vec<Option<T>>, StoreError> {
        let mut found = Vec::with_capacity(ids.len());
        let mut lost = Vec::new();
        let mut failure = None;
        for ids in ids.chunks(LOOK_UP) {
            let keys: Vec<_> = ids.iter().map(|id| id.0).collect();
            let mut renew = WriteBatch::default();
            let mut renewed = Vec::new();
            let latest = self.db.latest_sequence_number();
            for (id, value) in ids.iter().zip(self.multi_get(&keys)) {
                let value = match value {
                    Ok(Some(value)) => value,
                    Ok(None) => {
                        found.push(None);
                        continue;
                    }
                    Err(error) => {
                        found.push(None);
                        if is_lost(&error) {
                            tracing::warn!(block = %id, %error, "a stored block cannot be read: it is dropped");
                            lost.push(*id);
                        }
                        // A damaged block is a miss, a failing disk is more than that.
                        if error.kind() != ErrorKind::Corruption {
                            failure = Some(self.failed("reading blocks", error));
                        }
                        continue;
                    }
                };
                let parsed = parse_value(&value).and_then(|(put_at, frame)| Ok((put_at, frame, read(frame, id)?)));
                match parsed {
                    Ok((put_at, frame, block)) => {
                        if self.is_old(put_at, latest) {
                            put_value(&mut renew, id, latest, &[frame]);
                            renewed.push(*id);
                        }
                        found.push(Some(block));
                    }
                    Err(error) => {
                        tracing::warn!(block = %id, %error, "a stored block is damaged: it is dropped");
                        lost.push(*id);
                        found.push(None);
                    }
                }
            }
            self.renew(renew, &renewed);
        }
        add(&self.counters.corrupt_dropped, lost.len());
        if !lost.is_empty()
            && let Err(error) = self.remove(&lost)
        {
            tracing::warn!(%error, "damaged blocks could not be dropped");
            failure.get_or_insert(error);
        }
        failure.map_or(Ok(found), Err)
    }

    fn is_old(&self, put_at: u64, latest: u64) -> bool {
        latest.saturating_sub(put_at) > self.old_after.load(Ordering::Relaxed)
    }

    /// Only if that can be had without waiting: somebody waits for the blocks.
    fn renew(&self, batch: WriteBatch, ids: &[BlockId]) {
        if ids.is_empty() {
            return;
        }
        let bytes = batch.size_in_bytes() as u64;
        match self.db.write_opt(batch, &self.write_if_idle) {
            Ok(()) => {
                add(&self.counters.renewed, ids.len());
                self.note_put_bytes(bytes);
            }
            Err(error) if error.kind() == ErrorKind::Incomplete => self.postpone(ids),
            Err(error) => tracing::warn!(%error, "blocks that were hit could not be put again"),
        }
    }

    pub(super) fn postpone(&self, ids: &[BlockId]) {
        let mut postponed = self.postponed.lock();
        let room = MAX_POSTPONED.saturating_sub(postponed.len());
        postponed.extend(ids.iter().take(room));
    }

    /// Adds up to `most` blocks whose renewal was postponed; how many. They are read again, not kept: meanwhile they can have
    /// been put, dropped or removed.
    fn renew_postponed(&self, batch: &mut WriteBatch, most: usize, latest: u64) -> usize {
        let ids: Vec<_> = {
            let mut postponed = self.postponed.lock();
            std::iter::from_fn(|| postponed.pop_first()).take(most).collect()
        };
        if ids.is_empty() {
            return 0;
        }
        let keys: Vec<_> = ids.iter().map(|id| id.0).collect();
        let mut renewed = 0;
        for (id, value) in ids.iter().zip(self.multi_get(&keys)) {
            // What cannot be read is for the next one to find who asks for it.
            if let Ok(Some(value)) = value
                && let Ok((put_at, frame)) = parse_value(&value)
                && self.is_old(put_at, latest)
            {
                put_value(batch, id, latest, &[frame]);
                renewed += 1;
            }
        }
        renewed
    }
}

impl Store for RocksStore {
    fn contains(&self, ids: &[BlockId]) -> Result<Vec<bool>, StoreError> {
        let keys: Vec<_> = ids.iter().map(presence_key).collect();
        self.multi_get(&keys)
            .into_iter()
            .map(|value| value.map(|value| value.is_some()).map_err(|error| self.failed("looking for blocks", error)))
            .collect()
    }

    fn get(&self, ids: &[BlockId]) -> Result<Vec<Option<Bytes>>, StoreError> {
        let found = self.look_up(ids, Frame::decode_verified_from)?;
        self.counters.looked_up(&found);
        Ok(found)
    }

    fn get_frames(&self, ids: &[BlockId]) -> Result<Vec<Option<Frame>>, StoreError> {
        let found = self.look_up(ids, |frame, _| Frame::from_bytes(&Bytes::copy_from_slice(frame)))?;
        self.counters.looked_up_frames(&found);
        Ok(found)
    }

    fn put(&self, blocks: &[(BlockId, Frame)]) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        let latest = self.db.latest_sequence_number();
        for (id, frame) in blocks {
            debug_assert!(!id.is_zero(), "zero blocks are never stored");
            if !id.is_zero() {
                put_value(&mut batch, id, latest, &[&frame.header(), &frame.payload]);
            }
        }
        // No more than are put, so that this takes at most twice as long.
        let renewed = self.renew_postponed(&mut batch, blocks.len().min(LOOK_UP), latest);
        let bytes = batch.size_in_bytes() as u64;
        self.db.write_opt(batch, &self.write).map_err(|error| self.failed("writing blocks", error))?;
        add(&self.counters.renewed, renewed);
        for (_, frame) in blocks.iter().filter(|(id, _)| !id.is_zero()) {
            self.counters.put(frame);
        }
        self.note_put_bytes(bytes);
        Ok(())
    }

    fn remove(&self, ids: &[BlockId]) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        for id in ids {
            batch.delete(id.0);
            batch.delete(presence_key(id));
        }
        self.db.write_opt(batch, &self.write).map_err(|error| self.failed("removing blocks", error))
    }

    fn stats(&self) -> StoreStats {
        StoreStats {
            blocks_estimate: self.blocks_estimate(),
            stored_bytes: self.stored_bytes(),
            capacity_bytes: self.capacity_bytes,
            memory_bytes: self.property("rocksdb.size-all-mem-tables")
                + self.property("rocksdb.block-cache-usage")
                + self.property("rocksdb.estimate-table-readers-mem"),
            ..self.counters.stats()
        }
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.db.flush().map_err(|error| self.failed("flushing", error))
    }
}

/// Sorts directly behind the block's own key, and shares its entry in the filter.
fn presence_key(id: &BlockId) -> [u8; size_of::<BlockId>() + 1] {
    let mut key = [0; size_of::<BlockId>() + 1];
    key[..size_of::<BlockId>()].copy_from_slice(&id.0);
    key
}

fn put_value(batch: &mut WriteBatch, id: &BlockId, sequence: u64, frame: &[&[u8]]) {
    let mut value = Vec::with_capacity(VALUE_HEADER_BYTES + frame.iter().map(|part| part.len()).sum::<usize>());
    value.push(VALUE_VERSION);
    value.extend_from_slice(&sequence.to_le_bytes());
    frame.iter().for_each(|part| value.extend_from_slice(part));
    batch.put(id.0, &value);
    batch.put(presence_key(id), []);
}

/// The sequence number when it was put, and the frame.
fn parse_value(value: &[u8]) -> Result<(u64, &[u8]), FrameError> {
    match value.split_first_chunk::<VALUE_HEADER_BYTES>() {
        Some(([VALUE_VERSION, sequence @ ..], frame)) => Ok((u64::from_le_bytes(*sequence), frame)),
        Some(([version, ..], _)) => Err(FrameError::Version(*version)),
        None => Err(FrameError::Truncated { have: value.len() }),
    }
}

/// Whether a block is gone for good, and not only out of reach.
fn is_lost(error: &rocksdb::Error) -> bool {
    let message = error.as_ref();
    error.kind() == ErrorKind::Corruption
        || message.contains("No such file or directory")
        || message.contains("Input/output error")
}

/// Whether RocksDB said that somebody (another process, or this one) holds the database's lock.
pub(super) fn is_lock_held(message: &str) -> bool {
    message.contains("/LOCK") && (message.contains("lock hold by") || message.contains("While lock file"))
}

/// Whether a new database would fail just the same.
fn is_environment(message: &str) -> bool {
    let reasons = [
        "No space left on device",
        "Disk quota exceeded",
        "Permission denied",
        "Operation not permitted",
        "Read-only file system",
        "Too many open files",
        "Cannot allocate memory",
    ];
    reasons.iter().any(|reason| message.contains(reason))
}

/// `dir.broken-N`, the first that is free.
fn free_name_beside(dir: &Path) -> PathBuf {
    let name = |number: u32| {
        let mut name = dir.as_os_str().to_owned();
        name.push(format!(".broken-{number}"));
        PathBuf::from(name)
    };
    (1..=u32::MAX).map(name).find(|path| path.symlink_metadata().is_err()).unwrap_or_else(|| name(u32::MAX))
}
