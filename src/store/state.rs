//! What a site must not forget: identities of images, residency, journals. Keys and values are bytes; what they mean is
//! their owners' business, and none of this module's.
//!
//! Unlike the content store this is never thrown away: what cannot be opened is an error for somebody to look at.

use std::path::PathBuf;
use std::sync::Arc;

/// A key and its value.
pub type StateEntry = (Vec<u8>, Vec<u8>);

/// A key-value store with ordered keys and durable batches.
///
/// A batch is applied as a whole or not at all. A crash of the process loses nothing that was written; a crash of the
/// machine may lose batches from the end, back to the last one that was written with `sync` or followed by
/// [`State::sync`], and never one from the middle.
pub trait State: Send + Sync + 'static {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError>;

    /// The values of several keys, in their order.
    fn multi_get(&self, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>, StateError>;

    /// Calls `visit` with each key that begins with `prefix` and its value, in the order of the keys, until it returns
    /// false. Sees the state as it was at one moment; `visit` must not write.
    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), StateError>;

    /// Applies a batch; if `sync`, returns when it and everything before it is durable.
    fn write_batch(&self, batch: StateBatch, sync: bool) -> Result<(), StateError>;

    /// Returns when everything that was written is durable.
    fn sync(&self) -> Result<(), StateError>;

    /// Which boot of the machine this is, where the kernel tells: what was written since its beginning is there whether it was
    /// synced or not, whatever became of processes.
    fn boot(&self) -> Option<Arc<str>> {
        super::boot_id()
    }

    /// Sets the value of one key, durable at the next sync.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StateError> {
        let mut batch = StateBatch::default();
        batch.put(key, value);
        self.write_batch(batch, false)
    }

    /// Removes one key if it is there, durable at the next sync.
    fn delete(&self, key: &[u8]) -> Result<(), StateError> {
        let mut batch = StateBatch::default();
        batch.delete(key);
        self.write_batch(batch, false)
    }

    /// All keys that begin with `prefix`, with their values, in order. For prefixes that are known to have few.
    fn scan_prefix(&self, prefix: &[u8]) -> Result<Vec<StateEntry>, StateError> {
        let mut found = Vec::new();
        self.scan(prefix, &mut |key, value| {
            found.push((key.to_vec(), value.to_vec()));
            true
        })?;
        Ok(found)
    }
}

/// Changes that take effect together, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateBatch(Vec<StateChange>);

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateChange {
    /// A key gets a value.
    Put {
        /// The key.
        key: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
    },
    /// A key goes, if it is there.
    Delete {
        /// The key.
        key: Vec<u8>,
    },
    /// All keys that begin with a prefix go.
    DeletePrefix {
        /// The prefix.
        prefix: Vec<u8>,
    },
}

impl StateBatch {
    /// A key gets a value.
    pub fn put(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.0.push(StateChange::Put { key: key.into(), value: value.into() });
    }

    /// A key goes, if it is there.
    pub fn delete(&mut self, key: impl Into<Vec<u8>>) {
        self.0.push(StateChange::Delete { key: key.into() });
    }

    /// All keys that begin with `prefix` go.
    pub fn delete_prefix(&mut self, prefix: impl Into<Vec<u8>>) {
        self.0.push(StateChange::DeletePrefix { prefix: prefix.into() });
    }

    /// The changes, in order.
    pub fn changes(&self) -> &[StateChange] {
        &self.0
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Why state could not be read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StateError {
    /// Another process has it open.
    #[error("state database {dir}: is in use by another process; stop that, or give this site another state_dir")]
    InUse {
        /// The database's folder.
        dir: PathBuf,
    },
    /// It cannot be opened.
    #[error(
        "state database {dir}: cannot be opened: {message}; it says which blocks have arrived and who owns which \
         volume, so it is left as it is: check the disk for room and errors and the folder's permissions, or restore it"
    )]
    Unusable {
        /// The database's folder.
        dir: PathBuf,
        /// What the system or RocksDB said.
        message: String,
    },
    /// An opened one failed: nothing that was not answered before can be relied on.
    #[error("state database {dir}: {doing} failed: {message}; check the disk for room and errors, then restart")]
    Failed {
        /// The database's folder.
        dir: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What RocksDB said.
        message: String,
    },
}

impl StateError {
    /// Whether making room on the disk helps.
    pub fn is_no_space(&self) -> bool {
        // RocksDB hands on what the system said, in words only.
        matches!(self, StateError::Failed { message, .. } if message.contains("No space left on device"))
    }
}

/// The first key behind all those that begin with `prefix`; None where there is none.
pub(super) fn end_of_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}
