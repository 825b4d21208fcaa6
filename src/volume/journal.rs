//! A volume's residency on disk: rows in the state database. Must not know the file.
//!
//! Keys: `res/<volume>/c/<chunk, big-endian u64>` (a row of [`Residency::take_dirty`]) and `res/<volume>/guest` (there once a guest
//! has written).

use std::sync::Arc;

use super::VolumeError;
use crate::core::ids::Name;
use crate::core::residency::Residency;
use crate::store::{State, StateBatch, StateError};

#[derive(Clone)]
pub(super) struct Journal {
    state: Arc<dyn State>,
    volume: Name,
}

impl Journal {
    pub(super) fn new(state: Arc<dyn State>, volume: Name) -> Journal {
        Journal { state, volume }
    }

    /// Makes rows durable. The caller has synced the data that they speak of.
    pub(super) fn write(&self, rows: &[(u64, Vec<u8>)]) -> Result<(), StateError> {
        if rows.is_empty() {
            return Ok(());
        }
        let mut batch = StateBatch::default();
        for (chunk, row) in rows {
            batch.put([self.key("c/"), chunk.to_be_bytes().to_vec()].concat(), row.clone());
        }
        self.state.write_batch(batch, true)
    }

    /// Makes durable that a guest writes here, before it does. Residency alone does not tell: a write to a block that was
    /// fetched leaves no row behind.
    pub(super) fn note_guest(&self) -> Result<(), StateError> {
        let mut batch = StateBatch::default();
        batch.put(self.key("guest"), b"1".to_vec());
        self.state.write_batch(batch, true)
    }

    /// Reads everything back; whether a guest had written. A row that makes no sense is an error: the volume is not served
    /// by guessing.
    pub(super) fn restore(&self, residency: &mut Residency) -> Result<bool, VolumeError> {
        let prefix = self.key("c/");
        let mut damage = None;
        self.state.scan(&prefix, &mut |key, row| {
            let chunk = key.get(prefix.len()..).and_then(|chunk| chunk.try_into().ok()).map(u64::from_be_bytes);
            let restored = match chunk {
                Some(chunk) => residency.restore_chunk(chunk, row).map_err(|error| error.to_string()),
                None => Err("a key of the wrong length".into()),
            };
            damage = restored.err();
            damage.is_none()
        })?;
        if let Some(why) = damage {
            return Err(VolumeError::Observer {
                volume: self.volume.clone(),
                why: format!("its residency in the state database is damaged: {why}; restore the state database"),
            });
        }
        Ok(self.state.get(&self.key("guest"))?.is_some())
    }

    /// Nothing is known of this volume any more, durably.
    pub(super) fn forget(&self) -> Result<(), StateError> {
        let mut batch = StateBatch::default();
        batch.delete_prefix(self.key(""));
        self.state.write_batch(batch, true)
    }

    fn key(&self, what: &str) -> Vec<u8> {
        format!("res/{}/{what}", self.volume).into_bytes()
    }
}
