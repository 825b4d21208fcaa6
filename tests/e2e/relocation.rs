//! A disk relocates while a guest reads and writes it, and ends as an ordinary file.

use crate::disk::{Disk, allocated_bytes, assert_same};
use crate::guest::Guest;
use crate::site::{Pair, eventually, link, text};

/// Reads and writes at the source before, at the destination during and after; the model has the last word.
#[test]
fn a_disk_relocates_under_reads_and_writes() {
    let pair = Pair::start(link(40, 20));
    // The size is a multiple of nothing.
    let disk = Disk::mixed(1, 360, 12_345);
    let source = pair.add("vm", &disk);
    let mut guest = Guest::new(disk.bytes, vec![pair.a.nbd("vm"), pair.a.nbd_structured("vm")], 2);
    guest.run(200);
    guest.check_all();
    let model = guest.finish();

    let destination = pair.relocate("vm", &[]);
    // Served from the first moment.
    let clients = vec![pair.b.nbd("vm"), pair.b.nbd_structured("vm"), pair.b.nbd("vm")];
    let mut guest = Guest::new(model, clients, 3);
    let status = eventually("the relocation is complete, under load", || {
        guest.run(60);
        let status = pair.b.status("vm");
        if status["phase"] == "released_from_source" { Ok(status) } else { Err(status.to_string()) }
    });
    assert!(guest.reads > 60 && guest.writes > 30, "{} reads, {} writes", guest.reads, guest.writes);
    guest.run(100);
    guest.check_all();
    let model = guest.finish();
    assert_eq!(status["owner"], "b");
    assert_eq!(status["blocks"]["absent"], 0);
    assert!(status["demand_latency_ms"]["count"].as_u64().expect("a count") > 0, "{status}");

    let at_source = pair.a.status("vm");
    assert_eq!(at_source["phase"], "released");
    assert_eq!(at_source["owner"], "b");
    // Nobody needs the source's copy any more.
    pair.a.ok(&["volume", "remove", "vm"]);

    let mut pair = pair;
    pair.b.stop();
    let raw = std::fs::read(&destination).expect("the raw file needs no blockferry");
    assert_same("the raw file at the destination", &raw, &model);
    // Sparse stays sparse; what the guest wrote is allowed for.
    let (had, has) = (allocated_bytes(&source), allocated_bytes(&destination));
    assert!(has <= had + (6 << 20), "{had} bytes were allocated at the source, {has} are at the destination");
}

/// Nobody writes: nothing but the data is allocated, and written zeros become holes.
#[test]
fn sparse_stays_sparse() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(4, 200, 512);
    let source = pair.add("vm", &disk);
    let destination = pair.relocate("vm", &["--wait"]);
    pair.b.stop();
    assert_same("the raw file", &std::fs::read(&destination).expect("reads"), &disk.bytes);
    let (had, has) = (allocated_bytes(&source), allocated_bytes(&destination));
    assert!(has <= had + (256 << 10), "{had} bytes were allocated at the source, {has} are at the destination");
}

/// What arrived can go on from there: back to the site where it came from.
#[test]
fn a_disk_goes_there_and_back() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(5, 120, 0);
    pair.add("vm", &disk);
    pair.relocate("vm", &["--wait"]);
    pair.b.wait_phase("vm", "released_from_source");
    let mut guest = Guest::new(disk.bytes, vec![pair.b.nbd("vm")], 6);
    guest.run(150);
    let model = guest.finish();

    pair.a.ok(&["volume", "remove", "vm"]);
    let address = Some(pair.b.listen);
    pair.a.stop();
    pair.a.peers[0].address = address;
    pair.a.start();
    let back = pair.path("vm-back-at-a.raw");
    pair.a.ok(&["relocate", "b/vm", "--image", text(&back), "--wait"]);
    assert_same("the disk back at a", &pair.a.nbd("vm").read_all(), &model);
    assert_eq!(pair.b.nbd("vm").try_write(0, &[1; 512]), Err(crate::nbd_client::EPERM), "b is not the owner any more");
    pair.a.nbd("vm").write(0, &[1; 512]);
}
