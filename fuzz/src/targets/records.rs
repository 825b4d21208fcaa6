//! Rows of volumes and peers: whatever the bytes, reading them does not panic, and what is read is written again as the same. Must not know
//! how a site is run.

use std::fmt::Debug;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::core::ids::{Incarnation, Name};
use crate::handover::{Debt, Left};
use crate::image::Mark;
use crate::node::record::{Instance, Records, VolumeRecord};
use crate::store::{MemoryState, State};

/// One row, under each key that may hold it.
pub fn records(bytes: &[u8]) {
    again::<VolumeRecord>(bytes);
    again::<Left>(bytes);
    again::<Debt>(bytes);
    again::<Mark>(bytes);
    again::<Instance>(bytes);
    volume(bytes);
    others(bytes);
}

/// What a row means is what is written of it.
fn again<T: PartialEq + Debug + Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(read) = serde_json::from_slice::<T>(bytes) {
        let written = serde_json::to_vec(&read).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<T>(&written).expect("its own row"), read);
    }
}

/// A row of any version; one of version 1 is renewed with the residency beside it.
fn volume(bytes: &[u8]) {
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    put(&*state, b"vol/vm1", bytes);
    put(&*state, b"res/vm1/guest", b"1");
    put(&*state, b"hash/vm1/stamp", b"{}");
    let records = Records::new(Arc::clone(&state));
    match records.load(&|| Incarnation([1; 16])) {
        Ok(loaded) => {
            assert_eq!(loaded.len(), 1, "one row is one volume");
            let record = &loaded[0];
            let again = records.load(&|| Incarnation([2; 16])).expect("a second start");
            assert_eq!(again, loaded, "a second start finds something else");
            records.save(record).expect("saves");
            records.debts().expect("what is owed since can be read");
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("the row vol/vm1") && text.contains("update blockferry"), "{text}");
            let kept = state.get(b"vol/vm1").expect("reads");
            assert_eq!(kept.as_deref(), Some(bytes), "what cannot be read is left alone");
        }
    }
}

/// The rows that are no volumes, and keys of any bytes.
fn others(bytes: &[u8]) {
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    let records = Records::new(Arc::clone(&state));
    let (name, of): (Name, _) = ("vm1".parse().expect("a name"), Incarnation([1; 16]));
    for key in ["left/vm1", "owed/vm1/0000000000000002/a/completed", "nonce/in/vm1", "nonce/out/vm1"] {
        put(&*state, key.as_bytes(), bytes);
    }
    put(&*state, format!("mark/{of}").as_bytes(), bytes);
    let is_nonce = records.instance_of(&name).is_ok();
    assert_eq!(is_nonce, bytes.len() == 16);
    let _ = (records.left(&name), records.mark(of), records.instance_for(&name));
    if let Ok(debts) = records.debts() {
        debts.iter().for_each(|(name, debt)| records.settle(name, debt).expect("settles"));
    }
    for prefix in ["left/", "owed/", "mark/"] {
        put(&*state, &[prefix.as_bytes(), bytes].concat(), b"{}");
    }
    let _ = (records.all_left(), records.debts());
    records.forget_marks_but(&[]).expect("forgets");
}

fn put(state: &dyn State, key: &[u8], value: &[u8]) {
    state.put(key, value).expect("memory takes it");
}
