//! Rows come back as they were written; those of version 1, too; and damage is an error.

use super::*;
use crate::handover::{Came, Epoch, State as HeldState};
use crate::store::MemoryState;

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn record(state: HeldState) -> VolumeRecord {
    VolumeRecord {
        version: VERSION,
        name: name("vm1"),
        image: "/images/vm1.raw".into(),
        geometry: Geometry::new(1 << 30, 65536).expect("a geometry"),
        incarnation: Incarnation([7; 16]),
        generation: Generation(3),
        held: Held { came: Some(Came { from: name("a"), epoch: Epoch(2) }), ..Held::new(Epoch(3), state) },
        source_generation: Some(Generation(9)),
        pace: Pace::default(),
        is_made: true,
        is_read_only: false,
        noted: None,
    }
}

fn draw() -> Incarnation {
    Incarnation([1; 16])
}

#[test]
fn records_survive_and_damage_is_an_error() {
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    let records = Records::new(Arc::clone(&state));
    let record = record(HeldState::Released { to: name("b"), is_completed: false });
    records.save(&record).expect("saves");
    assert_eq!(records.load(&draw).expect("loads"), vec![record]);
    state.put(b"vol/vm2", b"{}").expect("puts");
    assert!(records.load(&draw).expect_err("damaged").to_string().contains("vm2"));
    state.put(b"vol/vm2", br#"{"version":3}"#).expect("puts");
    assert!(records.load(&draw).expect_err("newer").to_string().contains("version 3"));
}

#[test]
fn a_relocation_that_is_asked_for_is_missed_if_its_record_is_lost() {
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    let records = Records::new(Arc::clone(&state));
    let asking = record(HeldState::Asking { from: name("a") });
    records.begin(&asking, None).expect("writes");
    state.delete(b"vol/vm1").expect("loses it");
    let error = Records::new(state).load(&draw).expect_err("the source may have let go for it").to_string();
    assert!(error.contains("vm1"), "{error}");
}

#[test]
fn what_is_owed_and_remembered_outlives_the_volume() {
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    let records = Records::new(Arc::clone(&state));
    let record = record(HeldState::Owned);
    let debt = Debt { peer: name("a"), what: Owed::Completed, epoch: Epoch(3) };
    let arrived = Row { held: Some(record.held.clone()), left: None, owes: Some(debt.clone()), is_new_content: false };
    records.change(&record, &arrived).expect("writes");
    state.put(format!("res/{}/c/1", record.incarnation).as_bytes(), b"row").expect("puts");
    state.put(b"res/other/c/1", b"row").expect("puts");
    let left = Left { to: Some(name("c")), epoch: Epoch(4), known: [].into() };
    let gone = Row { held: None, left: Some(left.clone()), owes: None, is_new_content: false };
    records.change(&record, &gone).expect("writes");
    assert!(records.load(&draw).expect("loads").is_empty());
    assert_eq!(state.scan_prefix(b"res/").expect("scans").len(), 1, "rows of others stay");
    assert_eq!(records.left(&record.name).expect("reads"), Some(left));
    assert_eq!(records.debts().expect("reads"), vec![(record.name.clone(), debt.clone())]);
    records.settle(&record.name, &debt).expect("settles");
    assert!(records.debts().expect("reads").is_empty());
}

/// Settled it would stay, renewed it would be written over another.
#[test]
fn a_row_that_speaks_of_something_else_than_its_key_is_an_error() {
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    let records = Records::new(Arc::clone(&state));
    let row = serde_json::to_vec(&record(HeldState::Owned)).expect("JSON");
    state.put(b"vol/vm2", &row).expect("puts");
    let error = records.load(&draw).expect_err("another volume").to_string();
    assert!(error.contains("vol/vm2") && error.contains("the volume vm1"), "{error}");
    state.put(b"owed/vm1/0000000000000002/b/completed", br#"{"peer":"a","what":"completed","epoch":2}"#).expect("puts");
    let error = records.debts().expect_err("another peer").to_string();
    assert!(error.contains("another debt"), "{error}");
}

/// What version 1 wrote is read for ever after.
#[test]
fn a_row_of_version_1_is_written_anew_with_its_residency() {
    let row = br#"{"version":1,"name":"vm1","image":"/i/vm1.raw","geometry":{"size_bytes":1073741824,"block_size":65536},
        "epoch":2,"generation":1,"state":{"arriving":{"from":"a","source_generation":1,"is_taken":true,"is_given_back":false,
        "with_bulk":true,"is_paused":false,"limit_bytes_per_s":null}}}"#;
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    state.put(b"vol/vm1", row).expect("puts");
    state.put(b"res/vm1/c/12345678", b"residency").expect("puts");
    state.put(b"hash/vm1/stamp", b"old").expect("puts");
    let records = Records::new(Arc::clone(&state));
    let loaded = records.load(&draw).expect("loads");
    assert_eq!(loaded[0].held.state, HeldState::Arriving { from: name("a") });
    let kept = state.get(format!("res/{}/c/12345678", draw()).as_bytes()).expect("reads");
    assert_eq!(kept.as_deref(), Some(&b"residency"[..]));
    assert!(state.scan_prefix(b"res/vm1/").expect("scans").is_empty());
    assert!(state.scan_prefix(b"hash/vm1/").expect("scans").is_empty());
    let again = records.load(&|| Incarnation([2; 16])).expect("loads");
    assert_eq!(again, loaded, "only once");
}

#[test]
fn a_completed_hand_over_of_version_1_is_still_owed() {
    let row =
        br#"{"version":1,"name":"vm1","image":"/i/vm1.raw","geometry":{"size_bytes":1073741824,"block_size":65536},
        "epoch":2,"generation":1,"state":{"arrived":{"from":"a","is_released":false}}}"#;
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    state.put(b"vol/vm1", row).expect("puts");
    let records = Records::new(state);
    records.load(&draw).expect("loads");
    let debt = Debt { peer: name("a"), what: Owed::Completed, epoch: Epoch(2) };
    assert_eq!(records.debts().expect("reads"), vec![(name("vm1"), debt)]);
}

#[test]
fn a_record_that_is_lost_is_missed() {
    let state: Arc<dyn State> = Arc::new(MemoryState::new());
    let records = Records::new(Arc::clone(&state));
    records.load(&draw).expect("nothing is nothing");
    let record = record(HeldState::Owned);
    records.save(&record).expect("saves");
    let again = || Records::new(Arc::clone(&state)).load(&draw);
    assert_eq!(again().expect("loads").len(), 1);
    // A part of the database is gone.
    state.delete(b"vol/vm1").expect("deletes");
    let error = again().expect_err("a record is missing").to_string();
    assert!(error.contains("vm1") && error.contains("restore the state database"), "{error}");
    records.save(&record).expect("saves");
    state.delete(b"vol/vm1").expect("deletes");
    state.delete(b"volumes").expect("deletes");
    state.put(format!("res/{}/guest", record.incarnation).as_bytes(), b"1").expect("puts");
    again().expect_err("residency of a volume that nobody knows");
    // What was removed is not missed.
    let left = Some(Left { to: None, epoch: Epoch(4), known: Default::default() });
    records.save(&record).expect("saves");
    records.change(&record, &Row { held: None, left, owes: None, is_new_content: false }).expect("writes");
    assert!(again().expect("loads").is_empty());
}
