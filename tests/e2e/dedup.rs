//! What a site has already does not cross the WAN again: counted by the relay, not by the program.

use crate::disk::{BLOCK, Disk, assert_same, compressed_bytes_missing};
use crate::site::{Pair, link, text};

/// Handshake, manifests' frames, acknowledgements of small things: nothing that grows with the disk.
const CONSTANT: u64 = 96 << 10;

/// The bound of the issue: 6 % for packet headers and the manifest.
fn bound(compressed_bytes: u64) -> u64 {
    compressed_bytes + compressed_bytes * 6 / 100 + CONSTANT
}

#[test]
fn a_second_similar_image_moves_only_what_the_first_did_not_have() {
    let pair = Pair::start(link(50, 20));
    let first = Disk::mixed(10, 300, 777);
    let second = first.sibling(11, 4);
    pair.add("one", &first);
    pair.add("two", &second);

    pair.relocate("one", &["--wait"]);
    let (moved, missing) = (pair.wire_bytes(), compressed_bytes_missing(&[], &[&first.bytes]));
    assert!(moved <= bound(missing), "the first moved {moved} bytes, its blocks weigh {missing}");

    pair.wan.reset().expect("the relay runs");
    pair.relocate("two", &["--wait"]);
    let moved = pair.wire_bytes();
    let missing = compressed_bytes_missing(&[&first.bytes], &[&second.bytes]);
    assert!(moved <= bound(missing), "the second moved {moved} bytes, what the first did not have weighs {missing}");
    assert_same("the first", &pair.b.nbd("one").read_all(), &first.bytes);
    assert_same("the second", &pair.b.nbd("two").read_all(), &second.bytes);
    let status = pair.b.status("two");
    assert!(status["moved"]["store_bytes"].as_u64().expect("bytes") > 0, "{status}");
}

#[test]
fn after_a_prewarm_next_to_nothing_moves() {
    let pair = Pair::start(link(50, 20));
    let template = Disk::mixed(12, 300, 4096);
    let path = pair.path("template.raw");
    template.write_to(&path);
    let report = pair.b.ok(&["prewarm", "--image", text(&path), "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).expect("prewarm --json is JSON");
    assert_eq!(report["done"], true);
    assert_eq!(report["bytes_done"], template.bytes.len());

    // The same but for three blocks.
    let mut vm = template.clone();
    vm.bytes[40 * BLOCK..43 * BLOCK].copy_from_slice(&crate::disk::noise(3 * BLOCK, 13));
    pair.add("vm", &vm);
    pair.relocate("vm", &["--wait"]);
    let moved = pair.wire_bytes();
    assert!(moved <= bound(3 * BLOCK as u64), "{moved} bytes moved for three blocks");
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &vm.bytes);

    // Known already: nothing is stored twice.
    let again = pair.b.ok(&["prewarm", "--image", text(&path), "--json"]);
    let again: serde_json::Value = serde_json::from_str(&again).expect("prewarm --json is JSON");
    assert_eq!(again["blocks_new"], 0, "{again}");
}

#[test]
fn volumes_that_relocate_together_fetch_each_id_once() {
    let pair = Pair::start(link(50, 20));
    let template = Disk::mixed(14, 160, 0);
    let fleet: Vec<Disk> = (0..3).map(|nth| template.sibling(15 + nth, 6)).collect();
    for (name, disk) in ["x", "y", "z"].into_iter().zip(&fleet) {
        pair.add(name, disk);
    }
    pair.b.ok(&["relocate", "a/x", "a/y", "a/z", "--wait"]);
    let moved = pair.wire_bytes();
    let images: Vec<&[u8]> = fleet.iter().map(|disk| &disk.bytes[..]).collect();
    let distinct = compressed_bytes_missing(&[], &images);
    assert!(moved <= bound(distinct), "{moved} bytes moved, the distinct blocks weigh {distinct}");
    for (name, disk) in ["x", "y", "z"].into_iter().zip(&fleet) {
        assert_same(name, &pair.b.nbd(name).read_all(), &disk.bytes);
        // Without --image the site chose a place of its own.
        let image = pair.b.status(name)["image"].as_str().expect("a path").to_owned();
        assert_same(&image, &std::fs::read(&image).expect("reads"), &disk.bytes);
    }
}

/// What `analyze` says beforehand is what the relay counts afterwards.
#[test]
fn analyze_foretells_what_moves() {
    let pair = Pair::start(link(50, 20));
    let template = Disk::mixed(18, 200, 0);
    let vm = template.sibling(19, 3);
    let path = pair.path("template.raw");
    template.write_to(&path);
    let image = pair.add("vm", &vm);
    let missing = compressed_bytes_missing(&[&template.bytes], &[&vm.bytes]);
    let said = crate::site::run(crate::site::blockferry().args([
        "analyze",
        text(&image),
        "--prewarmed",
        text(&path),
        "--block-size",
        "64KiB",
        "--json",
    ]));
    assert!(said.status.success(), "{}", said.err);
    assert!(serde_json::from_str::<serde_json::Value>(&said.out).is_ok(), "analyze --json is JSON: {}", said.out);
    let foretold = numbers(&said.out);
    let near = |number: &u64| number.abs_diff(missing) <= missing / 100 + 64;
    assert!(foretold.iter().any(near), "no number near the {missing} bytes that will move in: {}", said.out);

    pair.b.ok(&["prewarm", "--image", text(&path)]);
    pair.relocate("vm", &["--wait"]);
    let moved = pair.wire_bytes();
    assert!(moved <= bound(missing), "{moved} bytes moved, {missing} were foretold");
}

fn numbers(json: &str) -> Vec<u64> {
    json.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}
