//! What a site journals of its volumes and its peers: rows in the state database, each written durably before what it says takes
//! effect. `docs/formats.md` has them byte by byte. Must not know how volumes are served.
//!
//! | key | value |
//! |---|---|
//! | `vol/NAME` | JSON of [`VolumeRecord`] |
//! | `volumes` | JSON: the names of all records, so that one that is lost is missed |
//! | `left/NAME` | JSON of [`Left`]: what is remembered of a volume that is not here any more |
//! | `owed/NAME/<epoch, 16 hex digits>/PEER/WHAT` | JSON of [`Debt`]: what a peer is to be told until it answers |
//! | `mark/INCARNATION` | JSON of [`Mark`]: what the image held when it last rested; gone while it may be written |
//! | `nonce/in/PEER` | 16 bytes: the instance of the peer that was here last |
//! | `nonce/out/PEER` | JSON of [`Instance`]: which instance this site is, for this peer |

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::record_v1;
use crate::core::ids::{Incarnation, Name, Nonce};
use crate::core::manifest::Geometry;
use crate::handover::{Debt, Generation, Held, Left, Owed, Row};
use crate::image::{Identity, Mark};
use crate::store::{State, StateBatch, StateEntry, StateError};

/// A volume as journalled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Of this making of the volume: names come again, this number does not. Every row about the volume is kept under it.
    pub incarnation: Incarnation,
    /// Counts the contents that were announced to peers.
    pub generation: Generation,
    /// Who owns it and how far it is.
    pub held: Held,
    /// What the source's content was counted as, if the volume came from one.
    pub source_generation: Option<Generation>,
    /// The background copy's switches.
    pub pace: Pace,
    /// Whether the file was made for the volume: only such a file is deleted.
    pub is_made: bool,
    /// Whether guests may only read it, as at its source.
    pub is_read_only: bool,
    /// What the image was when this site last had it open; None in a row of an earlier version.
    pub noted: Option<Identity>,
}

/// The switches of a background copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pace {
    /// Whether blocks that nobody reads are copied, too.
    pub with_bulk: bool,
    /// Whether somebody paused it.
    pub is_paused: bool,
    /// Its limit.
    pub limit_bytes_per_s: Option<u64>,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { with_bulk: true, is_paused: false, limit_bytes_per_s: None }
    }
}

/// Which instance this site is for a peer that it fetches from. Two that were copied from one another are told apart by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instance {
    /// What the peer last accepted.
    pub last: Nonce,
    /// What the peer is told next.
    pub next: Nonce,
    /// Whether the peer said that another instance was there since.
    pub is_doubted: bool,
}

/// Of the rows that this program writes.
pub const VERSION: u32 = 2;
pub(super) const VOLUMES: &[u8] = b"vol/";
const LEFT: &[u8] = b"left/";
const OWED: &[u8] = b"owed/";
const MARKS: &str = "mark/";
const NAMES: &[u8] = b"volumes";

/// The rows of a site.
#[derive(Clone)]
pub struct Records {
    state: Arc<dyn State>,
    /// The names that the row `volumes` has, once it was read. Held while it is written.
    names: Arc<Mutex<Option<BTreeSet<Name>>>>,
}

/// Why records could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The database.
    #[error(transparent)]
    State(#[from] StateError),
    /// A row of another version, or damaged.
    #[error(
        "the row {key} in the state database cannot be read: {why}; update blockferry or restore the state database"
    )]
    Unreadable {
        /// Which.
        key: String,
        /// What is wrong.
        why: String,
    },
}

impl RecordError {
    pub(super) fn unreadable(key: &[u8], why: impl ToString) -> RecordError {
        RecordError::Unreadable { key: String::from_utf8_lossy(key).into_owned(), why: why.to_string() }
    }
}

impl VolumeRecord {
    /// The prefixes of all rows about this making of the volume.
    fn own_rows(&self) -> [Vec<u8>; 3] {
        let of = self.incarnation;
        [format!("res/{of}/").into_bytes(), format!("hash/{of}/").into_bytes(), mark_key(of)]
    }

    fn key(name: &Name) -> Vec<u8> {
        [VOLUMES, name.as_str().as_bytes()].concat()
    }
}

/// A row that speaks of another volume than its key would be written anew under that volume's key, over its row.
pub(super) fn check_key(key: &[u8], name: &Name) -> Result<(), String> {
    if key == VolumeRecord::key(name) { Ok(()) } else { Err(format!("it speaks of the volume {name}")) }
}

/// The version of a row, whatever else it has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl Records {
    /// Rows in `state`.
    pub fn new(state: Arc<dyn State>) -> Records {
        Records { state, names: Arc::default() }
    }

    /// All volumes, by name. One row that cannot be read is an error: a site that forgets a volume might let somebody else write it.
    /// Rows of version 1 are written anew as of version 2, under incarnations that `draw` gives.
    pub fn load(&self, draw: &dyn Fn() -> Incarnation) -> Result<Vec<VolumeRecord>, RecordError> {
        let rows = self.state.scan_prefix(VOLUMES)?;
        // Before anything is written: rows of version 1 are renewed one by one, and a crash may come in between.
        self.check_names(&rows)?;
        let mut records = Vec::new();
        for (key, row) in rows {
            let unreadable = |why: &dyn ToString| RecordError::unreadable(&key, why.to_string());
            let Version { version } = serde_json::from_slice(&row).map_err(|error| unreadable(&error))?;
            let record = match version {
                1 => record_v1::renew(&*self.state, &key, &row, draw()).map_err(|error| match error {
                    record_v1::RenewError::State(error) => error.into(),
                    record_v1::RenewError::Row(error) => unreadable(&error),
                })?,
                VERSION => {
                    let record: VolumeRecord = serde_json::from_slice(&row).map_err(|error| unreadable(&error))?;
                    check_key(&key, &record.name).map_err(|why| unreadable(&why))?;
                    record
                }
                other => return Err(unreadable(&format!("it has version {other}, this program knows {VERSION}"))),
            };
            records.push(record);
        }
        Ok(records)
    }

    /// Whether the records are all that there are. A database that lost a part of itself begins with the rest, as if nothing had been.
    fn check_names(&self, rows: &[StateEntry]) -> Result<(), RecordError> {
        let mut there = BTreeSet::new();
        for (key, _) in rows {
            let name = String::from_utf8_lossy(&key[VOLUMES.len()..]).parse();
            there.insert(name.map_err(|_| RecordError::unreadable(key, "it names no volume"))?);
        }
        let noted = self.read_names()?;
        let lost: Vec<String> = match &noted {
            Some(noted) => noted.difference(&there).map(Name::to_string).collect(),
            // Written with the first record of version 2. Without it there is nothing, or all of it is of version 1.
            None if self.has_rows_of_version_2()? => vec!["of volumes whose names are lost, too".into()],
            None => Vec::new(),
        };
        if !lost.is_empty() {
            let why = format!("records are missing: {}", lost.join(", "));
            return Err(RecordError::unreadable(NAMES, why));
        }
        if noted.as_ref() != Some(&there) {
            let mut batch = StateBatch::default();
            batch.put(NAMES, json(NAMES, &there)?);
            self.state.write_batch(batch, true)?;
        }
        *self.names.lock() = Some(there);
        Ok(())
    }

    /// Whether there are rows that are written beside, or after, the list of names.
    fn has_rows_of_version_2(&self) -> Result<bool, RecordError> {
        for prefix in [OWED, LEFT, MARKS.as_bytes()] {
            if !self.state.scan_prefix(prefix)?.is_empty() {
                return Ok(true);
            }
        }
        // Residency by incarnation, not by name.
        let mut is_there = false;
        self.state.scan(b"res/", &mut |key, _| {
            let of = key.get(4..36).and_then(|of| std::str::from_utf8(of).ok());
            is_there = key.get(36) == Some(&b'/') && of.is_some_and(|of| of.parse::<Incarnation>().is_ok());
            !is_there
        })?;
        Ok(is_there)
    }

    fn read_names(&self) -> Result<Option<BTreeSet<Name>>, RecordError> {
        let row = self.state.get(NAMES)?;
        row.map(|row| serde_json::from_slice(&row).map_err(|error| RecordError::unreadable(NAMES, error))).transpose()
    }

    /// Writes a batch after which a volume is, or is not, among the records; with the list of all if that changes it.
    fn write_named(&self, mut batch: StateBatch, name: &Name, is_there: bool) -> Result<(), RecordError> {
        let mut names = self.names.lock();
        let mut known = match names.as_ref() {
            Some(known) => known.clone(),
            None => self.read_names()?.unwrap_or_default(),
        };
        let has_changed = if is_there { known.insert(name.clone()) } else { known.remove(name) };
        if !has_changed {
            *names = Some(known);
            drop(names);
            return Ok(self.state.write_batch(batch, true)?);
        }
        batch.put(NAMES, json(NAMES, &known)?);
        self.state.write_batch(batch, true)?;
        *names = Some(known);
        Ok(())
    }

    /// Writes a record, durably.
    pub fn save(&self, record: &VolumeRecord) -> Result<(), RecordError> {
        self.begin(record, None)
    }

    /// Writes a record and what is owed since, durably.
    pub fn begin(&self, record: &VolumeRecord, owes: Option<&Debt>) -> Result<(), RecordError> {
        let mut batch = StateBatch::default();
        put_record(&mut batch, record)?;
        if let Some(debt) = owes {
            put_debt(&mut batch, &record.name, debt)?;
        }
        self.write_named(batch, &record.name, true)
    }

    /// Writes what is remembered of a volume that is not here, and what is owed since, durably.
    pub fn note_left(&self, name: &Name, left: &Left, owes: Option<&Debt>) -> Result<(), RecordError> {
        let mut batch = StateBatch::default();
        batch.put([LEFT, name.as_str().as_bytes()].concat(), json(LEFT, left)?);
        if let Some(debt) = owes {
            put_debt(&mut batch, name, debt)?;
        }
        Ok(self.state.write_batch(batch, true)?)
    }

    /// Writes a change of ownership, durably: `record` is the volume's as it is to be. Where nothing of it is here any more, all
    /// rows about it go.
    pub fn change(&self, record: &VolumeRecord, row: &Row) -> Result<(), RecordError> {
        let mut batch = StateBatch::default();
        match &row.held {
            Some(_) => put_record(&mut batch, record)?,
            None => {
                batch.delete(VolumeRecord::key(&record.name));
                record.own_rows().into_iter().for_each(|prefix| batch.delete_prefix(prefix));
            }
        }
        if let Some(left) = &row.left {
            batch.put([LEFT, record.name.as_str().as_bytes()].concat(), json(LEFT, left)?);
        }
        if let Some(debt) = &row.owes {
            put_debt(&mut batch, &record.name, debt)?;
        }
        self.write_named(batch, &record.name, row.held.is_some())
    }

    /// What is remembered of a volume of this name that was here.
    pub fn left(&self, name: &Name) -> Result<Option<Left>, RecordError> {
        let key = [LEFT, name.as_str().as_bytes()].concat();
        let row = self.state.get(&key)?;
        row.map(|row| serde_json::from_slice(&row).map_err(|error| RecordError::unreadable(&key, error))).transpose()
    }

    /// All that is remembered.
    pub fn all_left(&self) -> Result<Vec<(Name, Left)>, RecordError> {
        let rows = self.state.scan_prefix(LEFT)?;
        let parse = |(key, row): &(Vec<u8>, Vec<u8>)| -> Result<(Name, Left), RecordError> {
            let name = String::from_utf8_lossy(&key[LEFT.len()..]).parse();
            let name = name.map_err(|_| RecordError::unreadable(key, "it names no volume"))?;
            Ok((name, serde_json::from_slice(row).map_err(|error| RecordError::unreadable(key, error))?))
        };
        rows.iter().map(parse).collect()
    }

    /// What peers are yet to be told, with the volume that it is about.
    pub fn debts(&self) -> Result<Vec<(Name, Debt)>, RecordError> {
        let rows = self.state.scan_prefix(OWED)?;
        let parse = |(key, row): &(Vec<u8>, Vec<u8>)| -> Result<(Name, Debt), RecordError> {
            let text = String::from_utf8_lossy(&key[OWED.len()..]).into_owned();
            let name = text.split('/').next().unwrap_or_default().parse();
            let name = name.map_err(|_| RecordError::unreadable(key, "it names no volume"))?;
            let debt: Debt = serde_json::from_slice(row).map_err(|error| RecordError::unreadable(key, error))?;
            // Who settles it would leave the row.
            if *key != debt_key(&name, &debt) {
                return Err(RecordError::unreadable(key, "it speaks of another debt than its key"));
            }
            Ok((name, debt))
        };
        rows.iter().map(parse).collect()
    }

    /// A peer was told, and answered.
    pub fn settle(&self, name: &Name, debt: &Debt) -> Result<(), RecordError> {
        let mut batch = StateBatch::default();
        batch.delete(debt_key(name, debt));
        Ok(self.state.write_batch(batch, true)?)
    }

    /// What an image held when it last rested, if it has not been written since.
    pub fn mark(&self, of: Incarnation) -> Result<Option<Mark>, RecordError> {
        let key = mark_key(of);
        let row = self.state.get(&key)?;
        row.map(|row| serde_json::from_slice(&row).map_err(|error| RecordError::unreadable(&key, error))).transpose()
    }

    /// Notes what an image holds that rests, durably; None: it may be written from now on.
    pub fn note_mark(&self, of: Incarnation, mark: Option<&Mark>) -> Result<(), RecordError> {
        let mut batch = StateBatch::default();
        match mark {
            Some(mark) => batch.put(mark_key(of), json(MARKS.as_bytes(), mark)?),
            None => batch.delete(mark_key(of)),
        }
        Ok(self.state.write_batch(batch, true)?)
    }

    /// Drops the marks of all but these.
    pub fn forget_marks_but(&self, known: &[Incarnation]) -> Result<(), RecordError> {
        let mut batch = StateBatch::default();
        for (key, _) in self.state.scan_prefix(MARKS.as_bytes())? {
            if !known.iter().any(|of| key == mark_key(*of)) {
                batch.delete(key);
            }
        }
        if batch.is_empty() { Ok(()) } else { Ok(self.state.write_batch(batch, true)?) }
    }

    /// Which instance of a peer was here last.
    pub fn instance_of(&self, peer: &Name) -> Result<Option<Nonce>, RecordError> {
        let key = format!("nonce/in/{peer}").into_bytes();
        let row = self.state.get(&key)?;
        row.map(|row| row.try_into().map(Nonce).map_err(|_| RecordError::unreadable(&key, "it has not 16 bytes")))
            .transpose()
    }

    /// Notes it, durably; None: whichever comes next is the one.
    pub fn note_instance_of(&self, peer: &Name, nonce: Option<Nonce>) -> Result<(), RecordError> {
        let key = format!("nonce/in/{peer}").into_bytes();
        let mut batch = StateBatch::default();
        match nonce {
            Some(nonce) => batch.put(key, nonce.0.to_vec()),
            None => batch.delete(key),
        }
        Ok(self.state.write_batch(batch, true)?)
    }

    /// Which instance this site is for a peer.
    pub fn instance_for(&self, peer: &Name) -> Result<Instance, RecordError> {
        let key = format!("nonce/out/{peer}").into_bytes();
        match self.state.get(&key)? {
            Some(row) => serde_json::from_slice(&row).map_err(|error| RecordError::unreadable(&key, error)),
            None => Ok(Instance::default()),
        }
    }

    /// Notes it, durably.
    pub fn note_instance_for(&self, peer: &Name, instance: &Instance) -> Result<(), RecordError> {
        let mut batch = StateBatch::default();
        batch.put(format!("nonce/out/{peer}").into_bytes(), json(b"nonce/out/", instance)?);
        Ok(self.state.write_batch(batch, true)?)
    }
}

pub(super) fn put_record(batch: &mut StateBatch, record: &VolumeRecord) -> Result<(), RecordError> {
    batch.put(VolumeRecord::key(&record.name), json(VOLUMES, record)?);
    Ok(())
}

pub(super) fn put_debt(batch: &mut StateBatch, name: &Name, debt: &Debt) -> Result<(), RecordError> {
    batch.put(debt_key(name, debt), json(OWED, debt)?);
    Ok(())
}

fn json(key: &[u8], row: &impl Serialize) -> Result<Vec<u8>, RecordError> {
    serde_json::to_vec(row).map_err(|error| RecordError::unreadable(key, error))
}

fn mark_key(of: Incarnation) -> Vec<u8> {
    format!("{MARKS}{of}").into_bytes()
}

fn debt_key(name: &Name, debt: &Debt) -> Vec<u8> {
    let what = match debt.what {
        Owed::Completed => "completed",
        Owed::Reclaimed => "reclaimed",
    };
    format!("owed/{name}/{:016x}/{}/{what}", debt.epoch.0, debt.peer).into_bytes()
}

// By path: the fuzz targets compile this file from elsewhere.
#[cfg(test)]
#[path = "record/tests.rs"]
mod tests;
