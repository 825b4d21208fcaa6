//! The documents' golden vectors: each is read, is what the code says that it is, and is written again byte for byte. A message
//! without a vector, or a vector without a message, fails. Must not know how vectors were made.

use std::collections::BTreeMap;
use std::path::Path;

use blockferry::core::frame::{Encoding, Frame};
use blockferry::core::ids::{BlockId, BlockIndex, Class, Nonce};
use blockferry::core::manifest::{Geometry, PageId, PageIndex};
use blockferry::core::residency::Residency;
use blockferry::core::wire::{Control, Data, Refusal, RootEntry, Want, WireError};
use bytes::Bytes;

#[path = "golden/rows.rs"]
mod rows;
#[path = "golden/state_v1.rs"]
mod state_v1;

/// The vectors of the tables whose first column is headed `kind`, by name.
fn vectors(document: &str, kind: &str) -> BTreeMap<String, Bytes> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(document);
    let text = std::fs::read_to_string(&path).expect("the document");
    let mut found = BTreeMap::new();
    let mut is_inside = false;
    for line in text.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        match cells[..] {
            ["", heading, "bytes", ""] => is_inside = heading == kind,
            ["", name, bytes, ""] if is_inside && bytes.starts_with('`') => {
                let bytes = hex::decode(bytes.trim_matches('`')).unwrap_or_else(|error| panic!("{name}: {error}"));
                assert!(found.insert(name.to_owned(), bytes.into()).is_none(), "{name} is there twice");
            }
            ["", rule, ..] if rule.starts_with("---") => {}
            _ => is_inside = false,
        }
    }
    assert!(!found.is_empty(), "{document} has no vectors of kind {kind}");
    found
}

fn check<T: PartialEq + std::fmt::Debug>(
    mut vectors: BTreeMap<String, Bytes>,
    expected: Vec<(&str, T)>,
    decode: impl Fn(Bytes) -> Result<T, String>,
    encode: impl Fn(&T) -> Bytes,
) {
    for (name, value) in expected {
        let bytes = vectors.remove(name).unwrap_or_else(|| panic!("{name} has no vector"));
        assert_eq!(decode(bytes.clone()).as_ref(), Ok(&value), "{name}");
        assert_eq!(hex::encode(encode(&value)), hex::encode(&bytes), "{name}");
    }
    assert!(vectors.is_empty(), "nothing is expected of the vectors {:?}", vectors.keys());
}

fn name<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    text.parse().expect("a name")
}

fn controls() -> Vec<(&'static str, Control)> {
    let nonces = (Nonce(std::array::from_fn(|at| at as u8 + 1)), Nonce([0xa5; 16]));
    let hello = Control::Hello { min_version: 2, max_version: 2, site: name("b"), last: nonces.0, next: nonces.1 };
    let wants = vec![
        Want { flight: 0x0102030405060708, handle: 3, class: Class::Demand, block: BlockIndex(10) },
        Want { flight: 12, handle: 3, class: Class::Bulk, block: BlockIndex(0x0fff_ffff) },
    ];
    let geometry = Geometry::new(1 << 30, 65536).expect("a geometry");
    let (asked_roots, asked_page) = (1 << 63 | 9, 1 << 63 | 10);
    vec![
        ("Hello", hello),
        ("Open", Control::Open { request: 7, volume: name("vm1") }),
        ("TakeOver", Control::TakeOver { request: 8, epoch: 2, take: true, volume: name("vm1") }),
        ("Roots?", Control::Roots { flight: asked_roots, handle: 3, first: PageIndex(0), count: 8192 }),
        ("Page?", Control::Page { flight: asked_page, handle: 3, page: PageIndex(5) }),
        ("Wants", Control::Wants(wants)),
        ("Promote", Control::Promote { flight: 12, class: Class::Readahead }),
        ("Forget", Control::Forget { flight: 12 }),
        ("Completed", Control::Completed { request: 11, epoch: 2, volume: name("vm1") }),
        ("GiveBack", Control::GiveBack { request: 12, epoch: 2, volume: name("vm1") }),
        ("Close", Control::Close { handle: 3 }),
        ("Reclaimed", Control::Reclaimed { request: 13, epoch: 3, volume: name("vm1") }),
        ("Welcome", Control::Welcome { version: 2, site: name("a") }),
        ("Unwelcome", Control::Unwelcome { refusal: Refusal::Version, why: "update".into() }),
        ("Opened", Control::Opened { request: 7, handle: 3, geometry, generation: 1, epoch: 1, is_read_only: true }),
        ("Done", Control::Done { request: 8, epoch: 2 }),
        ("Refused", Control::Refused { request: 8, refusal: Refusal::Reclaimed, epoch: 3, why: "taken back".into() }),
    ]
}

fn raw(bytes: &'static [u8]) -> Frame {
    Frame { encoding: Encoding::Raw, raw_len_bytes: bytes.len() as u32, payload: Bytes::from_static(bytes) }
}

fn messages() -> Vec<(&'static str, Data)> {
    let (asked_roots, asked_page) = (1 << 63 | 9, 1 << 63 | 10);
    let entries = vec![RootEntry::Unknown, RootEntry::Zero, RootEntry::Known(PageId([0x33; 32]))];
    vec![
        ("Block, zero", Data::Block { flight: 12, id: BlockId::ZERO, frame: None }),
        ("Block", Data::Block { flight: 12, id: BlockId([0x11; 32]), frame: Some(raw(b"abc")) }),
        ("Failed", Data::Failed { flight: 12, refusal: Refusal::ReadFailed, why: "EIO".into() }),
        ("Page", Data::Page { flight: asked_page, page: PageIndex(5), frame: raw(&[0x22; 32]) }),
        ("Roots", Data::Roots { flight: asked_roots, first: PageIndex(0), entries }),
    ]
}

#[test]
fn control_frames_are_what_the_document_says() {
    let vectors = vectors("wire.md", "control vector");
    for kind in 0..=u8::MAX {
        let is_known = Control::decode(Bytes::copy_from_slice(&[kind])) != Err(WireError::UnknownType(kind));
        let has_vector = vectors.values().any(|bytes| bytes.first() == Some(&kind));
        assert_eq!(is_known, has_vector, "type {kind:#04x} and its vector");
    }
    check(vectors, controls(), |bytes| Control::decode(bytes).map_err(|error| error.to_string()), Control::encode);
}

#[test]
fn data_messages_are_what_the_document_says() {
    let vectors = vectors("wire.md", "data vector");
    for kind in 0..=u8::MAX {
        let is_known = Data::decode(Bytes::copy_from_slice(&[kind])) != Err(WireError::UnknownType(kind));
        let has_vector = vectors.values().any(|bytes| bytes.first() == Some(&kind));
        assert_eq!(is_known, has_vector, "type {kind:#04x} and its vector");
    }
    let decode = |bytes| Data::decode(bytes).map_err(|error: WireError| error.to_string());
    check(vectors, messages(), decode, |message| message.encode().concat().into());
}

#[test]
fn frames_are_what_the_document_says() {
    let zstd = hex::decode("28b52ffd20f06d000030626c6f636b200100e750a508").expect("hexadecimal");
    let packed = Frame { encoding: Encoding::Zstd, raw_len_bytes: 240, payload: zstd.into() };
    assert_eq!(packed.decode().expect("decodes"), b"block ".repeat(40));
    let expected = vec![("frame, raw", raw(b"abc")), ("frame, zstd", packed)];
    let decode = |bytes| Frame::from_bytes(&bytes).map_err(|error| error.to_string());
    check(vectors("wire.md", "frame vector"), expected, decode, Frame::to_bytes);
}

/// Every refusal stands in the document with its number, and with whether to ask again.
#[test]
fn refusals_are_what_the_document_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/wire.md");
    let text = std::fs::read_to_string(path).expect("the document");
    for refusal in Refusal::ALL {
        let words: String = format!("{refusal:?}")
            .chars()
            .flat_map(|c| if c.is_uppercase() { vec![' ', c.to_ascii_lowercase()] } else { vec![c] })
            .collect();
        let again = if refusal.is_transient() { "yes" } else { "no" };
        let row = format!("| {} | {} | {again} |", refusal as u16, words.trim());
        assert!(text.contains(&row), "docs/wire.md has no row {row}");
    }
}

/// A chunk of a volume of three and a half blocks of 16 KiB: the first fetched, the second written, and two sectors of the last.
#[test]
fn residency_rows_are_what_the_document_says() {
    let geometry = Geometry::new(3 * 16384 + 8192, 16384).expect("a geometry");
    let mut residency = Residency::new(geometry);
    residency.record_fetched(BlockIndex(0));
    residency.record_write(BlockIndex(1), 0..16384);
    residency.record_write(BlockIndex(3), 512..1536);
    let row = residency.chunk_row(0);
    let vectors = vectors("formats.md", "residency vector");
    assert_eq!(hex::encode(&vectors["chunk"]), hex::encode(&row));
    let mut restored = Residency::new(geometry);
    restored.restore_chunk(0, &vectors["chunk"]).expect("fits");
    assert_eq!(restored.chunk_row(0), row);
    for block in 0..4 {
        assert_eq!(restored.presence(BlockIndex(block)), residency.presence(BlockIndex(block)), "block {block}");
    }
    let old = restored.restore_chunk(0, &vectors["chunk of version 1"]).expect_err("refused");
    assert!(old.to_string().contains("version"), "{old}");
    assert_eq!(vectors.len(), 2);
}
