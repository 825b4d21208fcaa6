//! A site's content-addressed cache: block id -> frame. Disposable: losing it loses no data, and it may drop blocks
//! whenever it likes. Must not know the network, volumes or images.
//!
//! Beside it, and not at all disposable, lies the state database ([`State`]): what this site must not forget.

mod memory;
mod options;
mod rocks;
mod state;
mod state_memory;
mod state_rocks;
mod written;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use memory::MemoryStore;
pub use options::StoreOptions;
pub use rocks::RocksStore;
pub use state::{State, StateBatch, StateChange, StateEntry, StateError};
pub use state_memory::MemoryState;
pub use state_rocks::StateDb;
pub use written::boot_id;

use crate::core::frame::Frame;
use crate::core::ids::BlockId;

/// Where blocks are kept by id. All calls block, some of them for a good part of a second when the disk is busy: make
/// them from threads that may. Lists come back in the order of the ids that were asked for.
///
/// A caller takes an error as a miss: the block is fetched, and the relocation goes on without the store.
pub trait Store: Send + Sync + 'static {
    /// Which of these blocks are there. Reads no block, so that a later [`Store::get`] may still find one damaged, or
    /// dropped since to make room.
    fn contains(&self, ids: &[BlockId]) -> Result<Vec<bool>, StoreError>;

    /// The bytes of these blocks, checked against their ids. A block that fails the check is dropped, counted, and None.
    fn get(&self, ids: &[BlockId]) -> Result<Vec<Option<Bytes>>, StoreError>;

    /// The frames of these blocks as they were put, *not* checked against their ids: for a receiver that checks them.
    fn get_frames(&self, ids: &[BlockId]) -> Result<Vec<Option<Frame>>, StoreError>;

    /// Keeps blocks, and drops the ones that were put or got longest ago where there is no room. That a frame is the
    /// block's is the caller's word; it is checked when the block is read back. What was put may be lost in a crash
    /// until [`Store::flush`]. [`BlockId::ZERO`] is a bug, and skipped.
    fn put(&self, blocks: &[(BlockId, Frame)]) -> Result<(), StoreError>;

    /// Forgets blocks; those that are not there, too.
    fn remove(&self, ids: &[BlockId]) -> Result<(), StoreError>;

    /// Counters and sizes.
    fn stats(&self) -> StoreStats;

    /// Brings to the disk what lies in memory; at shutdown.
    fn flush(&self) -> Result<(), StoreError>;
}

/// Counters since the store was opened, and sizes now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStats {
    /// Blocks that are kept: an estimate, since a block that was put twice may count twice for a while.
    pub blocks_estimate: u64,
    /// Bytes of the frames and of what is needed to find them, on disk and in memory.
    pub stored_bytes: u64,
    /// What `stored_bytes` is kept below, but for what has not been written out yet.
    pub capacity_bytes: u64,
    /// Memory for blocks on their way to the disk, filters and indices.
    pub memory_bytes: u64,
    /// Blocks that were asked for, and there.
    pub hits: u64,
    /// Blocks that were asked for, and not there (or damaged).
    pub misses: u64,
    /// Bytes of the blocks (not of their frames) that were asked for, and there.
    pub hit_raw_bytes: u64,
    /// Blocks that were put.
    pub puts: u64,
    /// Bytes of those blocks.
    pub put_raw_bytes: u64,
    /// Bytes of their frames.
    pub put_stored_bytes: u64,
    /// Blocks that were put again because they were hit when they had become old.
    pub renewed: u64,
    /// Blocks that were dropped because they were damaged.
    pub corrupt_dropped: u64,
}

/// Why the store could not do something.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("content store {dir}: is in use by another process; stop that, or give this site another state_dir")]
    InUse {
        /// The database's folder.
        dir: PathBuf,
    },
    /// It cannot be opened, nor moved out of the way.
    #[error("content store {dir}: {doing} failed: {message}; check its permissions, and the disk for room and errors")]
    Unusable {
        /// The database's folder.
        dir: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system or RocksDB said.
        message: String,
    },
    /// An opened store failed.
    #[error(
        "content store {dir}: {doing} failed: {message}; the store is a cache: check the disk, and restart; \
         if that does not help remove the folder while the daemon is stopped"
    )]
    Failed {
        /// The store's folder.
        dir: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What RocksDB said.
        message: String,
    },
}

/// The counters of [`StoreStats`].
#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    hit_raw_bytes: AtomicU64,
    puts: AtomicU64,
    put_raw_bytes: AtomicU64,
    put_stored_bytes: AtomicU64,
    renewed: AtomicU64,
    corrupt_dropped: AtomicU64,
}

impl Counters {
    fn looked_up(&self, found: &[Option<Bytes>]) {
        let hits = found.iter().flatten().count();
        let raw_bytes: usize = found.iter().flatten().map(Bytes::len).sum();
        add(&self.hits, hits);
        add(&self.misses, found.len() - hits);
        add(&self.hit_raw_bytes, raw_bytes);
    }

    fn looked_up_frames(&self, found: &[Option<Frame>]) {
        let hits = found.iter().flatten().count();
        let raw_bytes: usize = found.iter().flatten().map(|frame| frame.raw_len_bytes as usize).sum();
        add(&self.hits, hits);
        add(&self.misses, found.len() - hits);
        add(&self.hit_raw_bytes, raw_bytes);
    }

    fn put(&self, frame: &Frame) {
        add(&self.puts, 1);
        add(&self.put_raw_bytes, frame.raw_len_bytes as usize);
        add(&self.put_stored_bytes, frame.len_bytes());
    }

    /// The sizes are left at 0.
    fn stats(&self) -> StoreStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StoreStats {
            hits: read(&self.hits),
            misses: read(&self.misses),
            hit_raw_bytes: read(&self.hit_raw_bytes),
            puts: read(&self.puts),
            put_raw_bytes: read(&self.put_raw_bytes),
            put_stored_bytes: read(&self.put_stored_bytes),
            renewed: read(&self.renewed),
            corrupt_dropped: read(&self.corrupt_dropped),
            ..StoreStats::default()
        }
    }
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;
