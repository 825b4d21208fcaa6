//! Pause, resume and limit do what they say, as counted by the relay. Times are only bounded from above and generously:
//! the machine may be slow.

use std::time::{Duration, Instant};

use crate::disk::{BLOCK, Disk, assert_same};
use crate::site::{Pair, link};

/// What keeps a connection alive, and asks a status now and then.
const IDLE_BYTES: u64 = 48 << 10;

fn moved_in(pair: &Pair, time: Duration) -> (u64, f64) {
    let (before, began) = (pair.wire_bytes(), Instant::now());
    std::thread::sleep(time);
    (pair.wire_bytes() - before, began.elapsed().as_secs_f64())
}

#[test]
fn limits_and_pauses_are_held() {
    let pair = Pair::start(link(200, 10));
    let disk = Disk::noisy(60, 320);
    pair.add("vm", &disk);
    pair.relocate("vm", &["--bulk-rate", "8Mbit/s"]);
    pair.b.wait_share("vm", 0.05);
    let (moved, seconds) = moved_in(&pair, Duration::from_secs(2));
    assert!((moved as f64) < 2.0 * 1e6 * seconds, "{moved} bytes in {seconds} s, at most 1 MB/s were allowed");
    pair.b.wait_share("vm", 0.15);

    pair.b.ok(&["pause", "vm"]);
    let status = pair.b.wait_phase("vm", "paused");
    assert_eq!(status["bulk"]["paused"], true);
    // What was asked for already still comes.
    moved_in(&pair, Duration::from_millis(1200));
    let (moved, _) = moved_in(&pair, Duration::from_millis(1200));
    assert!(moved < IDLE_BYTES, "{moved} bytes moved during a pause");
    // What the guest reads comes all the same.
    let at = 310 * BLOCK;
    assert_same("a read in the pause", &pair.b.nbd("vm").read(at as u64, BLOCK), &disk.bytes[at..at + BLOCK]);
    // A limit is no end of a pause.
    pair.b.ok(&["limit", "vm", "4Mbit/s"]);
    assert_eq!(pair.b.phase("vm"), "paused");

    pair.b.ok(&["resume", "vm"]);
    let (moved, seconds) = moved_in(&pair, Duration::from_secs(2));
    assert!((moved as f64) < 2.0 * 5e5 * seconds, "{moved} bytes in {seconds} s, at most 0.5 MB/s were allowed");
    pair.b.ok(&["limit", "vm", "unlimited"]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
    pair.b.refused(&["pause", "vm"], &["vm"]);
    pair.b.refused(&["limit", "nobody", "1Mbit/s"], &["nobody"]);
}

/// A pause and a limit outlive the daemon.
#[test]
fn a_pause_survives_a_restart() {
    let mut pair = Pair::start(link(200, 10));
    let disk = Disk::noisy(61, 160);
    pair.add("vm", &disk);
    pair.relocate("vm", &["--bulk-rate", "4Mbit/s"]);
    pair.b.ok(&["pause", "vm"]);
    pair.b.kill();
    pair.b.start();
    let status = pair.b.status("vm");
    assert_eq!(status["bulk"]["paused"], true, "{status}");
    assert_eq!(status["bulk"]["limit_bytes_per_s"], 500_000, "{status}");
    // Reading it makes the link, so that it is not for want of one that nothing comes.
    let at = 150 * BLOCK;
    assert_same("a read in the pause", &pair.b.nbd("vm").read(at as u64, BLOCK), &disk.bytes[at..at + BLOCK]);
    moved_in(&pair, Duration::from_millis(600));
    let (moved, _) = moved_in(&pair, Duration::from_millis(1200));
    assert!(moved < IDLE_BYTES, "{moved} bytes moved during a pause");
    pair.b.ok(&["limit", "vm", "unlimited"]);
    pair.b.ok(&["resume", "vm"]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
}

/// Without a bulk copy nothing moves but what is read.
#[test]
fn without_bulk_only_what_is_read_moves() {
    let pair = Pair::start(link(200, 10));
    let disk = Disk::noisy(62, 160);
    pair.add("vm", &disk);
    pair.relocate("vm", &["--no-bulk"]);
    let mut client = pair.b.nbd("vm");
    for block in [5, 77, 140, 33] {
        let bytes = client.read((block * BLOCK) as u64, BLOCK);
        assert_same("a read", &bytes, &disk.bytes[block * BLOCK..][..BLOCK]);
    }
    moved_in(&pair, Duration::from_millis(500));
    let status = pair.b.status("vm");
    assert!(status["blocks"]["absent"].as_u64().expect("a count") >= 140, "{status}");
    assert!(pair.wire_bytes() < 20 * BLOCK as u64, "{} bytes moved for four reads", pair.wire_bytes());
    // The guest reads all of it: then it is complete.
    assert_same("the disk", &client.read_all(), &disk.bytes);
    pair.b.wait_phase("vm", "released_from_source");
}
