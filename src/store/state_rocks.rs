//! The state database on disk: a second RocksDB, small, with a write-ahead log.

use std::fs;
use std::path::{Path, PathBuf};

use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, Direction, IteratorMode, Options, ReadOptions, WriteBatch,
    WriteOptions,
};

use super::options::database;
use super::rocks::is_lock_held;
use super::state::{State, StateBatch, StateChange, StateError, end_of_prefix};
use super::written::{Written, boot_id};

/// A [`State`] in a folder of its own.
pub struct StateDb {
    db: DB,
    dir: PathBuf,
    written: Written,
    write: WriteOptions,
    write_and_sync: WriteOptions,
}

impl StateDb {
    /// Opens the database in `dir`, making it where there is none.
    ///
    /// # Errors
    /// [`StateError::InUse`] while another process has it open; [`StateError::Unusable`] otherwise: nothing is ever thrown
    /// away or repaired here.
    pub fn open(dir: &Path) -> Result<StateDb, StateError> {
        StateDb::open_under(dir, boot_id().as_deref())
    }

    /// As [`StateDb::open`], under this boot of the machine.
    pub(super) fn open_under(dir: &Path, boot: Option<&str>) -> Result<StateDb, StateError> {
        let unusable = |message: String| StateError::Unusable { dir: dir.to_owned(), message };
        let refused = |error: rocksdb::Error| {
            let message = error.into_string();
            if is_lock_held(&message) { StateError::InUse { dir: dir.to_owned() } } else { unusable(message) }
        };
        fs::create_dir_all(dir).map_err(|error| unusable(error.to_string()))?;
        require_current(dir).map_err(unusable)?;
        let (written, reached) = Written::open(dir, boot).map_err(|error| unusable(error.to_string()))?;
        if let Some(reached) = reached {
            // Before RocksDB tidies up what it takes for the end.
            let mut as_it_is = rocksdb_options();
            as_it_is.create_if_missing(false);
            let found = DB::open_for_read_only(&as_it_is, dir, false).map_err(refused)?.latest_sequence_number();
            // A daemon that has it open goes on writing meanwhile; it has the lock, which is noticed below.
            if found < reached {
                return Err(unusable(format!(
                    "changes are missing from its end (the last one is {reached}, {found} is there): its log is damaged"
                )));
            }
        }
        let db = DB::open(&rocksdb_options(), dir).map_err(refused)?;
        let mut write_and_sync = WriteOptions::default();
        write_and_sync.set_sync(true);
        Ok(StateDb { db, dir: dir.to_owned(), written, write: WriteOptions::default(), write_and_sync })
    }

    /// The database has what was just written. Where that cannot be noted, less is noticed after damage, no more.
    fn note(&self, is_durable: bool) {
        let sequence = self.db.latest_sequence_number();
        let noted = if is_durable { self.written.note_durable(sequence) } else { self.written.note(sequence) };
        if let Err(error) = noted {
            tracing::debug!(dir = %self.dir.display(), %error, "how far the state database was written could not be noted");
        }
    }

    /// There is no key behind these to end a range with: they go one by one, those that `batch` puts before `change`
    /// included.
    fn delete_to_the_end(
        &self,
        batch: &StateBatch,
        change: &StateChange,
        prefix: &[u8],
        changes: &mut WriteBatch,
    ) -> Result<(), StateError> {
        for earlier in batch.changes().iter().take_while(|earlier| !std::ptr::eq(*earlier, change)) {
            if let StateChange::Put { key, .. } = earlier
                && key.starts_with(prefix)
            {
                changes.delete(key);
            }
        }
        self.scan(prefix, &mut |key, _| {
            changes.delete(key);
            true
        })
    }

    fn failed(&self, doing: &'static str) -> impl Fn(rocksdb::Error) -> StateError {
        move |error| StateError::Failed { dir: self.dir.clone(), doing, message: error.into_string() }
    }
}

/// RocksDB would make a new, empty database beside the files of one that has lost this file, and then remove them.
fn require_current(dir: &Path) -> Result<(), String> {
    if dir.join("CURRENT").exists() {
        return Ok(());
    }
    for entry in fs::read_dir(dir).map_err(|error| error.to_string())? {
        let name = entry.map_err(|error| error.to_string())?.file_name();
        let name = name.to_string_lossy();
        // What is there between the making of the folder and of CURRENT holds nothing yet.
        if name.ends_with(".sst") || (name.ends_with(".log") && !name.starts_with("LOG")) {
            return Err(format!("CURRENT is missing, but {name} is there"));
        }
    }
    Ok(())
}

/// Some 12 MiB of memory. The log is replayed up to the first damaged record, which is RocksDB's default: everything
/// behind that was not synced, for a sync makes the whole log durable.
fn rocksdb_options() -> Options {
    let mut options = database(1 << 20);
    options.set_write_buffer_size(4 << 20);
    options.set_max_write_buffer_number(2);
    options.set_max_total_wal_size(16 << 20);
    options.set_compression_type(DBCompressionType::None);
    options.set_max_open_files(64);
    options.set_max_background_jobs(2);
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(4 << 20));
    table.set_bloom_filter(10.0, false);
    options.set_block_based_table_factory(&table);
    options
}

impl State for StateDb {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.db.get(key).map_err(self.failed("reading"))
    }

    fn multi_get(&self, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>, StateError> {
        self.db.multi_get(keys).into_iter().map(|value| value.map_err(self.failed("reading"))).collect()
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), StateError> {
        let mut read = ReadOptions::default();
        if let Some(end) = end_of_prefix(prefix) {
            read.set_iterate_upper_bound(end);
        }
        for entry in self.db.iterator_opt(IteratorMode::From(prefix, Direction::Forward), read) {
            let (key, value) = entry.map_err(self.failed("scanning"))?;
            if !visit(&key, &value) {
                break;
            }
        }
        Ok(())
    }

    fn write_batch(&self, batch: StateBatch, sync: bool) -> Result<(), StateError> {
        let mut changes = WriteBatch::default();
        for change in batch.changes() {
            match change {
                StateChange::Put { key, value } => changes.put(key, value),
                StateChange::Delete { key } => changes.delete(key),
                StateChange::DeletePrefix { prefix } => match end_of_prefix(prefix) {
                    Some(end) => changes.delete_range(prefix.clone(), end),
                    None => self.delete_to_the_end(&batch, change, prefix, &mut changes)?,
                },
            }
        }
        let options = if sync { &self.write_and_sync } else { &self.write };
        self.db.write_opt(changes, options).map_err(self.failed("writing"))?;
        self.note(false);
        Ok(())
    }

    fn sync(&self) -> Result<(), StateError> {
        self.db.flush_wal(true).map_err(self.failed("syncing"))?;
        self.note(true);
        Ok(())
    }
}
