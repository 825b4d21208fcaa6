//! Residency rows that cannot be what the daemon wrote, put into the state database through its own library: no checksum
//! on disk would notice them.

use blockferry::core::ids::Incarnation;
use blockferry::store::{State, StateDb};

use crate::half_way::{HalfWay, Outcome};

#[test]
fn rows_that_make_no_sense() {
    const SAYS: &[&str] = &["vm", "residency"];
    let mut half_way = HalfWay::make(370);
    half_way.restore();
    // Under what the volume's rows are kept.
    let incarnation: Incarnation = {
        let state = StateDb::open(&half_way.pair.b.dir.join("state")).expect("opens");
        let record = state.get(b"vol/vm").expect("reads").expect("there is a record");
        let record: serde_json::Value = serde_json::from_slice(&record).expect("a record is JSON");
        serde_json::from_value(record["incarnation"].clone()).expect("it has an incarnation")
    };
    let key = |what: &[u8]| [format!("res/{incarnation}/").as_bytes(), what].concat();
    let chunk = |at: u64| key(&[b"c/", &at.to_be_bytes()[..]].concat());
    let change = |half_way: &HalfWay, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let state = StateDb::open(&half_way.pair.b.dir.join("state")).expect("opens");
        let row = state.get(&chunk(0)).expect("reads").expect("there is a row for the first chunk");
        state.put(&chunk(0), &change(row)).expect("writes");
        state.sync().expect("syncs");
    };
    let put = |half_way: &HalfWay, key: Vec<u8>, row: &[u8]| {
        let state = StateDb::open(&half_way.pair.b.dir.join("state")).expect("opens");
        state.put(&key, row).expect("writes");
        state.sync().expect("syncs");
    };
    let unserved = Outcome::Unserved(SAYS);
    half_way.row("an emptied row", &|h| change(h, &|_| Vec::new()), unserved);
    half_way.row("a row cut in half", &|h| change(h, &|row| row[..row.len() / 2].to_vec()), unserved);
    half_way.row("a row that is a byte short", &|h| change(h, &|row| row[..row.len() - 1].to_vec()), unserved);
    half_way.row("a row of an unknown version", &|h| change(h, &|row| [&[9], &row[1..]].concat()), unserved);
    let all = |row: Vec<u8>| row.iter().map(|_| 0xff).collect::<Vec<u8>>();
    half_way.row("a row full of ones", &|h| change(h, &all), unserved);
    // More bits than there are blocks.
    let behind = |mut row: Vec<u8>| {
        row[32] |= 0x80;
        row
    };
    half_way.row("a row that marks blocks behind the end", &|h| change(h, &behind), unserved);
    half_way.row("a row of a chunk behind the end", &|h| put(h, chunk(99), &[2; 65]), unserved);
    half_way.row("a key that is too short", &|h| put(h, key(b"c/xyz"), &[2; 65]), unserved);
    half_way.row("a row of another name", &|h| put(h, key(b"unknown"), b"?"), Outcome::Serves);
    const RECORD: &[&str] = &["vol/vm", "state database"];
    half_way.row("a volume's record that is none", &|h| put(h, b"vol/vm".to_vec(), b"{}"), Outcome::Refuses(RECORD));
    let hash = format!("hash/{incarnation}/what").into_bytes();
    half_way.row("a row of nobody's residency", &|h| put(h, b"res/vm/c/xyz".to_vec(), b"?"), Outcome::Serves);
    half_way.row("a row of hashes that is none", &|h| put(h, hash.clone(), b"?"), Outcome::Serves);
}
