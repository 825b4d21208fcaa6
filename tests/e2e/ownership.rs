//! One owner: who may write, when, and what giving up costs.

use std::path::Path;

use crate::disk::{BLOCK, Disk, assert_same, noise};
use crate::nbd_client::EPERM;
use crate::site::{Pair, link};

/// A copy that takes long enough for everything that is tried before its end.
const SLOW: &[&str] = &["--bulk-rate", "1Mbit/s"];

#[test]
fn after_the_hand_over_the_source_reads_and_flushes_but_never_writes() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(50, 100, 512);
    let image = pair.add("vm", &disk);
    let mut before = pair.a.nbd("vm");
    before.write(0, &disk.bytes[..512]);
    pair.relocate("vm", SLOW);

    for is_restarted in [false, true] {
        // Who was connected, and who comes now.
        let mut clients = vec![pair.a.nbd("vm"), pair.a.nbd_structured("vm")];
        if !is_restarted {
            clients.push(std::mem::replace(&mut before, pair.a.nbd("vm")));
        }
        for client in &mut clients {
            assert_eq!(client.try_write(4096, &[7; 4096]), Err(EPERM));
            let zeroes = client.submit_write_zeroes(4096, 4096);
            assert_eq!(client.wait(zeroes), Err(EPERM));
            client.flush();
            assert_same("a read at the source", &client.read(0, BLOCK), &disk.bytes[..BLOCK]);
        }
        drop(clients);
        assert_eq!(pair.a.status("vm")["owner"], "b");
        if !is_restarted {
            drop(std::mem::replace(&mut before, pair.b.nbd("vm")));
            pair.a.kill();
            pair.a.start();
        }
    }
    // The destination still needs it.
    let said = pair.a.refused(&["volume", "remove", "vm"], &["vm", "b"]);
    assert!(said.contains("not fetched"), "{said}");
    pair.b.ok(&["limit", "vm", "unlimited"]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
    assert_same("the source's image", &std::fs::read(image).expect("reads"), &disk.bytes);
    assert_eq!(pair.a.nbd("vm").try_write(0, &[7; 512]), Err(EPERM), "not even when it is complete");
}

#[test]
fn cancel_gives_an_unwritten_disk_back() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(51, 100, 512);
    pair.add("vm", &disk);
    let destination = pair.relocate("vm", SLOW);
    assert_same("a read at the destination", &pair.b.nbd("vm").read(0, BLOCK), &disk.bytes[..BLOCK]);
    assert!(destination.exists());
    pair.b.ok(&["cancel", "vm"]);

    assert!(!destination.exists(), "the file that was made for it is gone");
    pair.b.refused(&["status", "vm"], &["vm"]);
    let status = pair.a.status("vm");
    assert_eq!((&status["phase"], &status["owner"]), (&"owned".into(), &"a".into()), "{status}");
    let mut client = pair.a.nbd("vm");
    let data = noise(4096, 52);
    client.write(8192, &data);
    client.flush();
    let mut model = disk.bytes;
    model[8192..8192 + 4096].copy_from_slice(&data);

    // Neither a restart nor a second attempt finds anything of the first.
    pair.b.stop();
    pair.b.start();
    pair.relocate("vm", &["--wait"]);
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &model);
}

#[test]
fn cancel_is_refused_where_it_would_lose_writes() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(53, 100, 512);
    pair.add("vm", &disk);
    let destination = pair.relocate("vm", SLOW);
    let mut client = pair.b.nbd("vm");
    let data = noise(512, 54);
    client.write(50 * BLOCK as u64 + 512, &data);
    let mut model = disk.bytes;
    model[50 * BLOCK + 512..][..512].copy_from_slice(&data);
    pair.b.refused(&["cancel", "vm"], &["vm"]);
    assert!(destination.exists());
    // It stays the owner, and goes on.
    client.write(0, &data);
    model[..512].copy_from_slice(&data);
    client.flush();
    drop(client);
    // Not forgotten by a restart.
    pair.b.stop();
    pair.b.start();
    pair.b.refused(&["cancel", "vm"], &["vm"]);
    pair.b.ok(&["limit", "vm", "unlimited"]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &model);
    pair.b.refused(&["cancel", "vm"], &["vm"]);
    assert!(Path::exists(&destination), "a disk that is complete is not given up");
}

#[test]
fn the_same_volume_relocates_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut c = crate::site::Site::new(dir.path(), "c");
    let pair = Pair::with(link(200, 4), |a, _| {
        a.peers.push(c.peer(None, &["*"]));
        c.peers.push(a.peer(None, &[]));
    });
    c.peers[0].address = Some(pair.a.listen);
    c.start();
    let disk = Disk::mixed(55, 60, 512);
    pair.add("vm", &disk);
    pair.relocate("vm", SLOW);

    let other = pair.path("other.raw");
    let other = crate::site::text(&other);
    pair.b.refused(&["relocate", "a/vm", "--image", other], &["vm", "exists"]);
    let said = c.refused(&["relocate", "a/vm", "--image", other], &["vm"]);
    assert!(said.contains(" b"), "it says who has it: {said}");
    assert!(!Path::new(other).exists(), "nothing is left of the attempts");
    c.refused(&["status", "vm"], &["vm"]);
    pair.b.ok(&["limit", "vm", "unlimited"]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
    // Not even when it is complete.
    pair.b.refused(&["relocate", "a/vm", "--image", other], &["vm"]);
    c.refused(&["relocate", "a/vm", "--image", other], &["vm"]);
    assert!(!Path::new(other).exists());
}
