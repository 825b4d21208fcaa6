//! Damage on a site's own disk between two starts: the store is a cache and may lose everything; other things may not
//! be lost silently.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::disk::{BLOCK, Disk, assert_same, compressed_bytes_missing};
use crate::nbd_client::{NbdClient, Replies};
use crate::site::{Pair, link, text};

fn prewarmed(disk: &Disk) -> Pair {
    let mut pair = Pair::start(link(100, 4));
    let template = pair.path("template.raw");
    disk.write_to(&template);
    pair.b.ok(&["prewarm", "--image", text(&template)]);
    pair.b.stop();
    pair
}

fn store_files(store: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(store).expect("there is a store");
    entries.map(|entry| entry.expect("reads").path()).collect()
}

/// Flips a bit in every 4 KiB of a file.
fn damage(path: &Path) -> usize {
    let file = File::options().read(true).write(true).open(path).expect("opens");
    let len = file.metadata().expect("examines").len();
    let mut flips = 0;
    for at in (512..len).step_by(4096) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("reads");
        file.write_all_at(&[byte[0] ^ 0x10], at).expect("writes");
        flips += 1;
    }
    flips
}

#[test]
fn damaged_blocks_in_the_store_are_dropped_and_fetched() {
    let disk = Disk::mixed(90, 160, 777);
    let mut pair = prewarmed(&disk);
    let blobs: Vec<_> = store_files(&pair.b.dir.join("store"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "blob"))
        .collect();
    assert!(!blobs.is_empty(), "blocks lie in *.blob");
    let flips: usize = blobs.iter().map(|path| damage(path)).sum();
    assert!(flips > 100, "{flips} bits were flipped");
    pair.b.start();

    pair.add("vm", &disk);
    pair.relocate("vm", &["--wait"]);
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
    let stats = pair.b.ok(&["store", "stats", "--json"]);
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("store stats --json is JSON");
    assert!(stats["corrupt_dropped"].as_u64().expect("a count") > 0, "{stats}");

    // What was fetched instead is kept: the bad blocks are gone for good.
    let again = disk.sibling(91, 40);
    pair.add("again", &again);
    pair.wan.reset().expect("the relay runs");
    pair.relocate("again", &["--wait"]);
    assert_same("the next disk", &pair.b.nbd("again").read_all(), &again.bytes);
    let missing = compressed_bytes_missing(&[&disk.bytes], &[&again.bytes]);
    let moved = pair.wire_bytes();
    assert!(moved <= missing + missing / 10 + (128 << 10), "{moved} bytes moved, {missing} were missing");
}

/// Every other file of the store, one by one: at worst it begins empty.
#[test]
fn a_store_whose_files_are_damaged_never_keeps_a_site_from_its_volumes() {
    let disk = Disk::mixed(92, 40, 512);
    let mut pair = prewarmed(&disk);
    let store = pair.b.dir.join("store");
    for kind in ["MANIFEST", "CURRENT", ".sst", ".log", "OPTIONS"] {
        for path in store_files(&store) {
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
            if name.starts_with(kind) || name.ends_with(kind) {
                let len = std::fs::metadata(&path).expect("examines").len() as usize;
                std::fs::write(&path, vec![0xa5; len]).expect("writes");
            }
        }
        pair.b.start();
        if kind == "MANIFEST" {
            pair.add("vm", &disk);
            pair.relocate("vm", &["--wait"]);
        }
        assert_same(&format!("the disk after damage to {kind}"), &pair.b.nbd("vm").read_all(), &disk.bytes);
        pair.b.stop();
    }
    std::fs::remove_dir_all(&store).expect("there was a store");
    pair.b.start();
    assert_same("the disk without a store", &pair.b.nbd("vm").read_all(), &disk.bytes);
}

/// The image of one volume is away at a start: that one is not served, the others are, and nothing is forgotten.
#[test]
fn a_missing_image_does_not_keep_the_others_from_being_served() {
    let mut pair = Pair::start(link(100, 4));
    let disk = Disk::mixed(93, 30, 0);
    let away = pair.add("away", &disk);
    let other = disk.sibling(94, 2);
    pair.add("other", &other);
    pair.a.stop();
    let hidden = pair.path("hidden.raw");
    std::fs::rename(&away, &hidden).expect("renames");
    pair.a.start();
    assert_same("the other volume", &pair.a.nbd("other").read_all(), &other.bytes);
    assert!(pair.a.log().contains("away-at-a.raw"), "the log names what is missing");
    assert!(!away.exists(), "nothing is made in its place");
    let status = pair.a.status("away");
    assert_eq!(status["phase"], "failed");
    assert!(status["phase_reason"].as_str().is_some_and(|why| why.contains("away-at-a.raw")), "{status}");
    pair.b.refused(&["relocate", "a/away"], &["away"]);
    // Its name is not free: the record of it must not be lost.
    let other_path = pair.path("third.raw");
    other.write_to(&other_path);
    pair.a.refused(&["volume", "add", "away", "--image", text(&other_path)], &["away", "exists"]);
    // It comes back as what it was.
    pair.a.stop();
    std::fs::rename(&hidden, &away).expect("renames");
    pair.a.start();
    let mut client = pair.a.nbd("away");
    assert_same("the volume that was away", &client.read_all(), &disk.bytes);
    client.write(0, &[1; BLOCK]);
}

/// The destination's file is cut short, or goes, half-way through the relocation: an error, never zeros.
#[test]
fn a_destination_file_that_lost_bytes_is_not_served_as_zeros() {
    let mut pair = Pair::start(link(100, 4));
    let disk = Disk::noisy(95, 80);
    pair.add("vm", &disk);
    let destination = pair.relocate("vm", &["--bulk-rate", "8Mbit/s"]);
    pair.b.wait_share("vm", 0.3);
    pair.b.stop();
    let file = File::options().write(true).open(&destination).expect("opens");
    file.set_len(10 * BLOCK as u64).expect("truncates");
    drop(file);
    // It may refuse to serve this volume, or fetch what is missing; zeros it must not serve.
    pair.b.start();
    let client = NbdClient::unix(&pair.b.socket(), "vm", Replies::Simple);
    let Ok(mut client) = client else {
        let status = pair.b.status("vm");
        assert!(status["phase_reason"].as_str().is_some_and(|why| why.contains("vm-at-b.raw")), "{status}");
        return;
    };
    for block in 0..30 {
        if let Ok(bytes) = client.try_read((block * BLOCK) as u64, BLOCK) {
            assert_same(&format!("block {block}"), &bytes, &disk.bytes[block * BLOCK..][..BLOCK]);
        }
    }
}
