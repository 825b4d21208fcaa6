//! The rows of volumes and peers that `docs/formats.md` shows: each is read, and written again under the same key, byte for byte. Must
//! not know how a site is run.

use std::path::Path;
use std::sync::Arc;

use blockferry::core::ids::{Incarnation, Name, Nonce};
use blockferry::handover::{Debt, Left};
use blockferry::image::Mark;
use blockferry::node::record::{Instance, Records, VolumeRecord};
use blockferry::store::{MemoryState, State};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Key and value of the vectors of a table, by name.
fn vectors() -> Vec<(String, String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/formats.md");
    let text = std::fs::read_to_string(path).expect("the document");
    let rows = text.lines().skip_while(|line| *line != "| record vector | key | value |").skip(2);
    let rows = rows.take_while(|line| line.starts_with('|')).map(|line| {
        let cells: Vec<&str> = line.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let ["", name, key, value, ""] = cells[..] else { panic!("not three columns: {line}") };
        (name.to_owned(), key.to_owned(), value.to_owned())
    });
    rows.collect()
}

fn no_incarnation() -> Incarnation {
    panic!("rows of this version have one")
}

/// The value once more, from what it means.
fn again<T: Serialize + DeserializeOwned>(name: &str, value: &str) -> (T, String) {
    let read: T = serde_json::from_str(value).unwrap_or_else(|error| panic!("{name}: {error}"));
    let written = serde_json::to_string(&read).expect("writes");
    (read, written)
}

#[test]
fn records_are_what_the_document_says() {
    let vectors = vectors();
    let mut kinds = Vec::new();
    for (name, key, value) in &vectors {
        let state: Arc<dyn State> = Arc::new(MemoryState::new());
        let records = Records::new(Arc::clone(&state));
        let (kind, rest) = key.split_once('/').expect("a key");
        kinds.push(kind.to_owned());
        let peer = || rest.split_once('/').expect("two parts").1.parse::<Name>().expect("a peer");
        match (kind, rest.split('/').next()) {
            ("vol", _) => {
                let (record, written) = again::<VolumeRecord>(name, value);
                assert_eq!(&written, value, "{name}");
                records.save(&record).expect("saves");
                assert_eq!(records.load(&no_incarnation).expect("loads"), [record], "{name}");
            }
            ("left", _) => {
                let (left, written) = again::<Left>(name, value);
                assert_eq!(&written, value, "{name}");
                state.put(key.as_bytes(), value.as_bytes()).expect("puts");
                let volume = rest.parse().expect("a volume");
                assert_eq!(records.left(&volume).expect("reads"), Some(left.clone()), "{name}");
                assert_eq!(records.all_left().expect("reads"), [(volume, left)], "{name}");
            }
            ("owed", volume) => {
                let (debt, written) = again::<Debt>(name, value);
                assert_eq!(&written, value, "{name}");
                state.put(key.as_bytes(), value.as_bytes()).expect("puts");
                let volume = volume.expect("a volume").parse().expect("a volume");
                assert_eq!(records.debts().expect("reads"), [(volume, debt.clone())], "{name}");
                let (volume, debt) = records.debts().expect("reads").remove(0);
                records.settle(&volume, &debt).expect("settles");
                assert!(state.scan_prefix(b"").expect("scans").is_empty(), "{name}: the key is not the debt's");
                continue;
            }
            ("mark", of) => {
                let (mark, written) = again::<Mark>(name, value);
                assert_eq!(&written, value, "{name}");
                let of = of.expect("an incarnation").parse().expect("an incarnation");
                records.note_mark(of, Some(&mark)).expect("writes");
                assert_eq!(records.mark(of).expect("reads"), Some(mark), "{name}");
            }
            ("nonce", Some("out")) => {
                let (instance, written) = again::<Instance>(name, value);
                assert_eq!(&written, value, "{name}");
                records.note_instance_for(&peer(), &instance).expect("writes");
                assert_eq!(records.instance_for(&peer()).expect("reads"), instance, "{name}");
            }
            ("nonce", Some("in")) => {
                let nonce: Nonce = value.parse().expect("16 bytes");
                records.note_instance_of(&peer(), Some(nonce)).expect("writes");
                assert_eq!(records.instance_of(&peer()).expect("reads"), Some(nonce), "{name}");
                let row = (key.as_bytes().to_vec(), nonce.0.to_vec());
                assert_eq!(state.scan_prefix(b"").expect("scans"), [row], "{name}");
                continue;
            }
            _ => panic!("{name}: a key that nobody writes: {key}"),
        }
        let row = (key.as_bytes().to_vec(), value.as_bytes().to_vec());
        let mut rows = state.scan_prefix(b"").expect("scans");
        if key.starts_with("vol/") {
            assert_eq!(rows.pop(), Some((b"volumes".to_vec(), br#"["vm1"]"#.to_vec())), "{name}: the list of names");
        }
        assert_eq!(rows, [row], "{name}");
    }
    kinds.sort();
    kinds.dedup();
    assert_eq!(kinds, ["left", "mark", "nonce", "owed", "vol"], "each kind has a vector");
    for state in ["owned", "released", "asking", "arriving", "giving_back", "fenced"] {
        let shown = format!("\"state\":{{\"{state}\"");
        let plain = format!("\"state\":\"{state}\"");
        let is_shown = vectors.iter().any(|(_, _, value)| value.contains(&shown) || value.contains(&plain));
        assert!(is_shown, "no record vector is {state}");
    }
}
