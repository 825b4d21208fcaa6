//! What a site journals of its volumes: one JSON row each in the state database, under `vol/<name>`, written durably before
//! what it says takes effect. Must not know how volumes are served.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::core::ids::Name;
use crate::core::manifest::Geometry;
use crate::store::{State, StateBatch, StateError};

/// A volume as journalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    /// Layout of this row.
    pub version: u32,
    /// The volume's and the NBD export's name.
    pub name: Name,
    /// The raw file or block device.
    pub image: PathBuf,
    /// Its shape.
    pub geometry: Geometry,
    /// Counts the changes of ownership.
    pub epoch: u64,
    /// Counts the contents that were released to a peer.
    pub generation: u64,
    /// Who owns it and how far it is.
    pub state: Ownership,
}

/// Who owns a volume. Each variant is exactly one step of a relocation, at one of its ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Ownership {
    /// This site, and all of it is here.
    Owned,
    /// Source: `to` owns it since `epoch`.
    Released {
        /// The new owner.
        to: Name,
        /// Whether it has every block: this site's copy is not needed any more.
        is_completed: bool,
    },
    /// Destination: about to become the owner, or the owner already; blocks are missing.
    Arriving {
        /// The source.
        from: Name,
        /// What the source's volume is counted as.
        source_generation: u64,
        /// Whether this site owns it; if not, the source has to be asked (again).
        is_taken: bool,
        /// Whether it is being given back.
        is_given_back: bool,
        /// Whether the background copy was asked for.
        with_bulk: bool,
        /// Whether somebody paused it.
        is_paused: bool,
        /// Its limit.
        limit_bytes_per_s: Option<u64>,
    },
    /// Destination: this site owns it, and all of it is here.
    Arrived {
        /// The source.
        from: Name,
        /// Whether the source knows.
        is_released: bool,
    },
}

const VERSION: u32 = 1;
const PREFIX: &[u8] = b"vol/";

/// The rows of all volumes.
#[derive(Clone)]
pub struct Records {
    state: Arc<dyn State>,
}

/// Why records could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The database.
    #[error(transparent)]
    State(#[from] StateError),
    /// A row of another version, or damaged.
    #[error(
        "the record of volume {volume} in the state database cannot be read: {why}; update blockferry or restore the state database"
    )]
    Unreadable {
        /// Whose.
        volume: String,
        /// What is wrong.
        why: String,
    },
}

impl VolumeRecord {
    /// A record of the present version.
    pub fn new(name: Name, image: PathBuf, geometry: Geometry, epoch: u64, state: Ownership) -> VolumeRecord {
        VolumeRecord { version: VERSION, name, image, geometry, epoch, generation: 1, state }
    }
}

impl Records {
    /// Rows in `state`.
    pub fn new(state: Arc<dyn State>) -> Records {
        Records { state }
    }

    /// All volumes, by name. One row that cannot be read is an error: a site that forgets a volume might let somebody else write it.
    pub fn load(&self) -> Result<Vec<VolumeRecord>, RecordError> {
        let mut records = Vec::new();
        for (key, row) in self.state.scan_prefix(PREFIX)? {
            let volume = || String::from_utf8_lossy(&key[PREFIX.len()..]).into_owned();
            let unreadable = |why: String| RecordError::Unreadable { volume: volume(), why };
            let record: VolumeRecord = serde_json::from_slice(&row).map_err(|error| unreadable(error.to_string()))?;
            if record.version != VERSION {
                return Err(unreadable(format!("it has version {}, this program knows {VERSION}", record.version)));
            }
            records.push(record);
        }
        Ok(records)
    }

    /// Writes a record, durably.
    pub fn save(&self, record: &VolumeRecord) -> Result<(), RecordError> {
        let row = serde_json::to_vec(record)
            .map_err(|error| RecordError::Unreadable { volume: record.name.to_string(), why: error.to_string() })?;
        let mut batch = StateBatch::default();
        batch.put([PREFIX, record.name.as_str().as_bytes()].concat(), row);
        Ok(self.state.write_batch(batch, true)?)
    }

    /// Forgets a volume and its residency, durably.
    pub fn delete(&self, name: &Name) -> Result<(), RecordError> {
        let mut batch = StateBatch::default();
        batch.delete([PREFIX, name.as_str().as_bytes()].concat());
        batch.delete_prefix(format!("res/{name}/").into_bytes());
        batch.delete_prefix(format!("hash/{name}/").into_bytes());
        Ok(self.state.write_batch(batch, true)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryState;

    #[test]
    fn records_survive_and_damage_is_an_error() {
        let state: Arc<dyn State> = Arc::new(MemoryState::new());
        let records = Records::new(Arc::clone(&state));
        let geometry = Geometry::new(1 << 30, 65536).expect("a geometry");
        let name: Name = "vm1".parse().expect("a name");
        let released = Ownership::Released { to: "b".parse().expect("a name"), is_completed: false };
        let record = VolumeRecord::new(name.clone(), "/images/vm1.raw".into(), geometry, 3, released);
        records.save(&record).expect("saves");
        assert_eq!(records.load().expect("loads"), vec![record]);
        records.delete(&name).expect("deletes");
        assert!(records.load().expect("loads").is_empty());
        state.put(b"vol/vm2", b"{}").expect("puts");
        assert!(records.load().expect_err("damaged").to_string().contains("vm2"));
    }

    /// What version 1 wrote is read for ever after.
    #[test]
    fn a_row_of_version_1_is_read() {
        let row = br#"{"version":1,"name":"vm1","image":"/i/vm1.raw","geometry":{"size_bytes":1073741824,"block_size":65536},
            "epoch":2,"generation":1,"state":{"arriving":{"from":"a","source_generation":1,"is_taken":true,"is_given_back":false,
            "with_bulk":true,"is_paused":false,"limit_bytes_per_s":null}}}"#;
        let state: Arc<dyn State> = Arc::new(MemoryState::new());
        state.put(b"vol/vm1", row).expect("puts");
        let records = Records::new(state).load().expect("loads");
        assert!(matches!(records[0].state, Ownership::Arriving { is_taken: true, with_bulk: true, .. }));
    }
}
