//! How RocksDB is set up as a content store, and why. Must not know what is done with it.
//!
//! Blocks lie in blob files, in the order in which they were put; the LSM tree holds only ids and places. The tree is
//! never merged but within its level 0 (FIFO), so that a block is written once, and room is made by dropping the oldest
//! file with the blobs that only it knows. `benches/store.rs` compares this with RocksDB's defaults.

use rocksdb::{
    BlockBasedOptions, Cache, DBCompactionStyle, DBCompressionType, FifoCompactOptions, LogLevel, Options,
    SliceTransform,
};

use crate::core::ids::BlockId;

/// Bounds of a content store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    /// What it may take on disk, in bytes; at least [`StoreOptions::MIN_CAPACITY_BYTES`]. May differ from what it was
    /// when the store was made: it shrinks or grows.
    pub capacity_bytes: u64,
    /// What it may take in memory for blocks on their way to the disk (half of it) and for caching (a quarter), in bytes.
    /// Filters and indices may come on top when the store is full: 3 bytes for each block.
    pub memory_bytes: u64,
    /// Bytes per second that it may write to the disk in the background, so that a prewarm does not starve the guests'
    /// reads; None for no limit.
    pub write_bytes_per_s: Option<u64>,
}

impl Default for StoreOptions {
    /// 64 GiB on disk, 48 MiB in memory, 256 MiB/s.
    fn default() -> Self {
        StoreOptions { capacity_bytes: 64 << 30, memory_bytes: 48 << 20, write_bytes_per_s: Some(256 << 20) }
    }
}

/// Bytes of a [`BlockId`]: what the filters are built over.
const ID_BYTES: usize = size_of::<BlockId>();

/// Of a filter, for each block. A miss asks every file; at 12 bits, 60 files would send every sixth of them to the disk, at
/// 16 every thirtieth.
const FILTER_BITS: f64 = 16.0;

/// Files of level 0 that are left alone. When the store is full the oldest of about this many goes, so this is the
/// reciprocal of the share that is dropped at once.
const FILES: i32 = 16;

/// Files that may be open: those of the tree are few, the rest is for blobs.
const MAX_OPEN_FILES: i32 = 512;

impl StoreOptions {
    /// The smallest capacity; a smaller one is raised to it.
    pub const MIN_CAPACITY_BYTES: u64 = 16 << 20;

    pub(super) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.max(Self::MIN_CAPACITY_BYTES)
    }

    /// Two of these may be in memory. Each becomes one blob file, and in a small store no more than a 64th of it.
    fn memtable_bytes(&self) -> u64 {
        (self.memory_bytes / 4).min(self.capacity_bytes() / 64).clamp(256 << 10, 256 << 20)
    }

    pub(super) fn rocksdb(&self) -> Options {
        let mut options = database(1 << 20);
        let mut fifo = FifoCompactOptions::default();
        // Counts only the tree's files, and so never bites; the true bound is set by `set_after_open`.
        fifo.set_max_table_files_size(self.capacity_bytes());
        options.set_compaction_style(DBCompactionStyle::Fifo);
        options.set_fifo_compaction_options(&fifo);
        options.set_level_zero_file_num_compaction_trigger(FILES);
        // Age alone is no reason to drop a block (RocksDB's default is 30 days).
        options.set_ttl(0);

        options.set_enable_blob_files(true);
        options.set_min_blob_size(1 << 10);
        options.set_blob_file_size(256 << 20);
        options.set_enable_blob_gc(false);
        // Frames are compressed already.
        options.set_compression_type(DBCompressionType::None);
        options.set_blob_compression_type(DBCompressionType::None);

        options.set_write_buffer_size(self.memtable_bytes() as usize);
        options.set_max_write_buffer_number(2);
        options.set_max_background_jobs(2);
        options.set_bytes_per_sync(1 << 20);
        if let Some(bytes_per_s) = self.write_bytes_per_s {
            options.set_ratelimiter(i64::try_from(bytes_per_s.max(1 << 20)).unwrap_or(i64::MAX), 100_000, 10);
        }

        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&Cache::new_lru_cache((self.memory_bytes / 4) as usize));
        table.set_bloom_filter(FILTER_BITS, false);
        // Both keys of a block begin with its id: one entry in the filter serves them.
        table.set_whole_key_filtering(false);
        options.set_prefix_extractor(SliceTransform::create_fixed_prefix(ID_BYTES));
        // Every look-up asks every file, so filters and indices have to stay in memory: in the open files themselves.
        // (In the cache they would be paged out by blocks of the tree: a miss then took 60 times as long.)
        table.set_cache_index_and_filter_blocks(false);
        options.set_block_based_table_factory(&table);
        options.set_max_open_files(MAX_OPEN_FILES);
        options
    }

    /// What the crate has no setters for: to be set after every open. Counts blobs towards the capacity, and merges
    /// small files of level 0 (without touching blobs) so that a large store has some dozens of them, not thousands.
    pub(super) fn set_after_open(&self) -> [(&'static str, String); 2] {
        let capacity = self.capacity_bytes();
        [
            // 0: derived from the capacity and the ratio of the tree's size to the blobs'.
            ("max_compaction_bytes", "0".into()),
            (
                "compaction_options_fifo",
                format!(
                    "{{max_table_files_size={capacity};max_data_files_size={capacity};\
                     allow_compaction=true;use_kv_ratio_compaction=true;}}"
                ),
            ),
        ]
    }
}

/// What both databases have in common: made where missing, and modest in what they log. `log_bytes` for each of at most
/// two files of RocksDB's own log.
pub(super) fn database(log_bytes: usize) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_log_level(LogLevel::Warn);
    options.set_max_log_file_size(log_bytes);
    options.set_keep_log_file_num(2);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options.set_max_manifest_file_size(16 << 20);
    options.set_skip_stats_update_on_db_open(true);
    options
}
