//! Records of version 1, which knew volumes by their names alone: read once, and written anew. Must not know how volumes are
//! served.

use std::path::PathBuf;

use serde::Deserialize;

use super::record::{Pace, VERSION, VolumeRecord, check_key, put_record};
use crate::core::ids::{Incarnation, Name};
use crate::core::manifest::Geometry;
use crate::handover::{Came, Debt, Epoch, Generation, Held, Owed, State as HeldState};
use crate::store::{State, StateBatch, StateError};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordV1 {
    #[serde(rename = "version")]
    _version: u32,
    name: Name,
    image: PathBuf,
    geometry: Geometry,
    epoch: u64,
    generation: u64,
    state: OwnershipV1,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum OwnershipV1 {
    Owned,
    Released {
        to: Name,
        is_completed: bool,
    },
    Arriving {
        from: Name,
        source_generation: u64,
        is_taken: bool,
        is_given_back: bool,
        with_bulk: bool,
        is_paused: bool,
        limit_bytes_per_s: Option<u64>,
    },
    Arrived {
        from: Name,
        is_released: bool,
    },
}

/// Why a row could not be renewed.
pub(super) enum RenewError {
    State(StateError),
    Row(String),
}

impl From<StateError> for RenewError {
    fn from(error: StateError) -> RenewError {
        RenewError::State(error)
    }
}

/// Writes a record of version 1 as one of version 2, with the residency that was kept under its name, in one batch. Ids of images
/// are dropped: they are made anew.
pub(super) fn renew(
    state: &dyn State,
    key: &[u8],
    row: &[u8],
    incarnation: Incarnation,
) -> Result<VolumeRecord, RenewError> {
    let old: RecordV1 = serde_json::from_slice(row).map_err(|error| RenewError::Row(error.to_string()))?;
    check_key(key, &old.name).map_err(RenewError::Row)?;
    let epoch = Epoch(old.epoch);
    let came = |from: &Name| Some(Came { from: from.clone(), epoch });
    let mut pace = Pace::default();
    let (mut source_generation, mut owes) = (None, None);
    let is_made = matches!(old.state, OwnershipV1::Arriving { .. });
    let held = match old.state {
        OwnershipV1::Owned => Held::new(epoch, HeldState::Owned),
        OwnershipV1::Released { to, is_completed } => {
            Held { lent: [to.clone()].into(), ..Held::new(epoch, HeldState::Released { to, is_completed }) }
        }
        OwnershipV1::Arriving {
            from,
            source_generation: generation,
            is_taken,
            is_given_back,
            with_bulk,
            is_paused,
            limit_bytes_per_s,
        } => {
            pace = Pace { with_bulk, is_paused, limit_bytes_per_s };
            source_generation = Some(Generation(generation));
            let state = match (is_taken, is_given_back) {
                (_, true) => HeldState::GivingBack { from: from.clone(), was_owner: is_taken, is_complete: false },
                (true, false) => HeldState::Arriving { from: from.clone() },
                (false, false) => HeldState::Asking { from: from.clone() },
            };
            Held { came: came(&from), ..Held::new(epoch, state) }
        }
        OwnershipV1::Arrived { from, is_released } => {
            owes = (!is_released).then(|| Debt { peer: from.clone(), what: Owed::Completed, epoch });
            // Whether a guest wrote since it arrived is not known: so it cannot be given back.
            Held::new(epoch, HeldState::Owned)
        }
    };
    let record = VolumeRecord {
        version: VERSION,
        name: old.name.clone(),
        image: old.image,
        geometry: old.geometry,
        incarnation,
        generation: Generation(old.generation),
        held,
        source_generation,
        pace,
        is_made,
        is_read_only: false,
        noted: None,
    };
    let mut batch = StateBatch::default();
    let before = format!("res/{}/", old.name).into_bytes();
    for (key, value) in state.scan_prefix(&before)? {
        batch.put([format!("res/{incarnation}/").as_bytes(), &key[before.len()..]].concat(), value);
    }
    batch.delete_prefix(before);
    batch.delete_prefix(format!("hash/{}/", old.name).into_bytes());
    if let Some(debt) = owes {
        super::record::put_debt(&mut batch, &old.name, &debt).map_err(|error| RenewError::Row(error.to_string()))?;
    }
    put_record(&mut batch, &record).map_err(|error| RenewError::Row(error.to_string()))?;
    state.write_batch(batch, true)?;
    Ok(record)
}
