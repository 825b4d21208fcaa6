//! What version 1 of the records left behind (`tests/fixtures/state-v1.jsonl`: key and value of each row, in hex) is read for ever after. Must not
//! know how a site is run.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use blockferry::core::ids::{BlockIndex, Incarnation};
use blockferry::core::manifest::Geometry;
use blockferry::core::residency::Residency;
use blockferry::node::record::Records;
use blockferry::store::{MemoryState, State};

/// As the fixture has it.
const BOOT: &str = "6b2a4b2e-1f0d-4c8e-9a53-0d5f8a3c7e11";

/// Under the key of `vm1`.
const OTHER: &str = r#"{"version":1,"name":"own","image":"/i","geometry":{"size_bytes":57344,"block_size":16384},"epoch":1,"generation":1,"state":"owned"}"#;

fn fixture() -> Arc<MemoryState> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/state-v1.jsonl");
    let text = std::fs::read_to_string(path).expect("the fixture");
    let state = Arc::new(MemoryState::new());
    for line in text.lines() {
        let row: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let part = |name: &str| hex::decode(row[name].as_str().expect("text")).expect("hexadecimal");
        state.put(&part("key"), &part("value")).expect("puts");
    }
    state
}

/// 01…01 for the first, 02…02 for the second: names come in their order.
fn draw(drawn: &Cell<u8>) -> Incarnation {
    drawn.set(drawn.get() + 1);
    Incarnation([drawn.get(); 16])
}

fn all(state: &MemoryState) -> Vec<(String, Vec<u8>)> {
    let rows = state.scan_prefix(b"").expect("scans").into_iter();
    rows.map(|(key, value)| (key.escape_ascii().to_string(), value)).collect()
}

/// A record as it is to be written: what version 1 knew, and what it did not.
fn record(name: &str, nth: u8, held: &str, source_generation: &str, is_made: bool, pace: &str) -> (String, Vec<u8>) {
    let incarnation = Incarnation([nth; 16]);
    let value = format!(
        r#"{{"version":2,"name":"{name}","image":"/images/{name}.raw","geometry":{{"size_bytes":57344,"block_size":16384}},"incarnation":"{incarnation}","generation":{},"held":{held},"source_generation":{source_generation},"pace":{pace},"is_made":{is_made},"is_read_only":false,"noted":null}}"#,
        if name == "gone" { 2 } else { 1 }
    );
    (format!("vol/{name}"), value.into_bytes())
}

#[test]
fn rows_of_version_1_become_those_of_version_2() {
    let state = fixture();
    let before = all(&state);
    let value = |key: &str| before.iter().find(|(other, _)| other == key).expect("in the fixture").1.clone();
    let records = Records::new(Arc::clone(&state) as Arc<dyn State>);
    let drawn = Cell::new(0);
    let loaded = records.load(&|| draw(&drawn)).expect("loads");
    assert_eq!(drawn.get(), 7, "each has an incarnation of its own");

    let at_once = r#"{"with_bulk":true,"is_paused":false,"limit_bytes_per_s":null}"#;
    let slowly = r#"{"with_bulk":true,"is_paused":true,"limit_bytes_per_s":1048576}"#;
    let demand = r#"{"with_bulk":false,"is_paused":false,"limit_bytes_per_s":null}"#;
    let came = r#""came":{"from":"a","epoch":2}"#;
    let arriving = format!(r#"{{"epoch":2,"state":{{"arriving":{{"from":"a"}}}},{came}}}"#);
    let asking = format!(r#"{{"epoch":2,"state":{{"asking":{{"from":"a"}}}},{came}}}"#);
    let giving_back = format!(
        r#"{{"epoch":2,"state":{{"giving_back":{{"from":"a","was_owner":true,"is_complete":false}}}},{came}}}"#
    );
    let released = r#"{"epoch":4,"state":{"released":{"to":"b","is_completed":false}},"lent":["b"]}"#;
    let (first, behind) = (r"\x00".repeat(8), r"\x00".repeat(7) + r"\x01");
    let moved = |nth: u8, to: &str, from: &str| (format!("res/{}/{to}", Incarnation([nth; 16])), value(from));
    let mut expected = vec![
        ("owed/late/0000000000000002/a/completed".into(), br#"{"peer":"a","what":"completed","epoch":2}"#.to_vec()),
        record("asked", 1, &asking, "5", true, at_once),
        record("came", 2, &arriving, "5", true, slowly),
        record("came-back", 3, &giving_back, "7", true, demand),
        record("gone", 4, released, "null", false, at_once),
        record("late", 5, r#"{"epoch":2,"state":"owned"}"#, "null", false, at_once),
        record("own", 6, r#"{"epoch":1,"state":"owned"}"#, "null", false, at_once),
        record("settled", 7, r#"{"epoch":2,"state":"owned"}"#, "null", false, at_once),
        moved(2, &format!("c/{first}"), &format!("res/came/c/{first}")),
        moved(2, &format!("live/{BOOT}/{first}"), &format!("res/came/live/{BOOT}/{first}")),
        moved(2, "guest", "res/came/guest"),
        moved(3, &format!("c/{first}"), &format!("res/came-back/c/{first}")),
        ("volumes".into(), br#"["asked","came","came-back","gone","late","own","settled"]"#.to_vec()),
        // Rows of nobody's, and of another owner of this database, stay as they are.
        (format!("res/came-b/c/{behind}"), value(&format!("res/came-b/c/{behind}"))),
    ];
    expected.sort();
    let text = |rows: &[(String, Vec<u8>)]| -> Vec<String> {
        rows.iter().map(|(key, value)| format!("{key} = {}", value.escape_ascii())).collect()
    };
    let after = all(&state);
    assert_eq!(text(&after), text(&expected));

    // The residency means what it meant.
    let geometry = Geometry::new(57344, 16384).expect("a geometry");
    let mut residency = Residency::new(geometry);
    let key = [format!("res/{}/c/", Incarnation([2; 16])).as_bytes(), &0u64.to_be_bytes()].concat();
    residency.restore_chunk(0, &state.get(&key).expect("reads").expect("is there")).expect("fits");
    let resident: Vec<bool> = (0..4).map(|block| residency.bits().is_resident(BlockIndex(block))).collect();
    assert_eq!(resident, [true, true, false, false]);

    let again = records.load(&|| panic!("nothing is left to renew")).expect("loads again");
    assert_eq!(again, loaded);
    assert_eq!(all(&state), after, "and nothing is written");
    assert_eq!(state.unsynced_batches(), 0, "all of it is durable");
}

/// It may be newer, or damaged: neither is guessed at, and what is to be done is said.
#[test]
fn a_row_of_an_unknown_version_is_refused() {
    for (row, why) in [
        (r#"{"version":3,"name":"vm1"}"#, "it has version 3, this program knows 2"),
        (r#"{"version":0,"name":"vm1"}"#, "it has version 0, this program knows 2"),
        (r#"{"name":"vm1"}"#, "missing field `version`"),
        (r#"{"version":1,"name":"vm1","colour":"red"}"#, "unknown field `colour`"),
        (OTHER, "it speaks of the volume own"),
    ] {
        let state = fixture();
        state.put(b"vol/vm1", row.as_bytes()).expect("puts");
        let records = Records::new(Arc::clone(&state) as Arc<dyn State>);
        let drawn = Cell::new(0);
        let error = records.load(&|| draw(&drawn)).expect_err("refused").to_string();
        assert!(error.contains(why), "{error}");
        assert!(error.contains("the row vol/vm1"), "{error}");
        assert!(error.contains("update blockferry or restore the state database"), "{error}");
        assert_eq!(state.get(b"vol/vm1").expect("reads"), Some(row.as_bytes().to_vec()), "it is left alone");
    }
}
