//! A daemon is killed, or the link is cut, half-way: nothing that was flushed is lost, nothing that was marked is
//! fetched again, and whoever does not need the link does not notice.

use std::time::Duration;

use crate::disk::{BLOCK, Disk, Rng, assert_same, noise};
use crate::nbd_client::NbdClient;
use crate::site::{Pair, link};

const BLOCKS: usize = 384;
/// 3 MB a second: the 24 MiB take eight seconds, so that half-way is not missed.
const MBIT_PER_S: u64 = 24;
const RTT_MS: u64 = 20;
/// What may be in flight, or in handshakes and manifests, when something breaks.
const WINDOW_BYTES: u64 = 1 << 20;

/// What crosses the WAN if nothing is fetched twice but what arrived in the last `unmarked_s` seconds before the end
/// of a process.
fn bound(unmarked_s: u64) -> u64 {
    let disk = (BLOCKS * BLOCK) as u64;
    disk + disk * 6 / 100 + unmarked_s * MBIT_PER_S * 1_000_000 / 8 + WINDOW_BYTES
}

/// Guest's writes of all kinds, all over the disk but its last blocks, flushed.
fn write_and_flush(client: &mut NbdClient, model: &mut [u8], rng: &mut Rng) {
    for _ in 0..40 {
        // Whole sectors: nothing less can be remembered of a block that has not arrived.
        let len = [512, 4096, 5 * 512, 195 * 512][rng.below(4) as usize];
        let mut at = rng.below((model.len() - 8 * BLOCK - len) as u64) as usize;
        at -= at % 512;
        let data = noise(len, rng.next());
        client.write(at as u64, &data);
        model[at..at + len].copy_from_slice(&data);
    }
    client.flush();
}

/// A block that has not arrived: bulk goes from the front to the back, so late ones are the last.
fn last_blocks(nth: usize) -> usize {
    (BLOCKS - 1 - nth) * BLOCK
}

#[test]
fn a_killed_destination_keeps_what_was_flushed_and_fetches_nothing_again() {
    let mut pair = Pair::start(link(MBIT_PER_S, RTT_MS));
    let disk = Disk::noisy(20, BLOCKS);
    pair.add("vm", &disk);
    pair.relocate("vm", &[]);
    let (mut model, mut rng) = (disk.bytes, Rng(21));
    let mut client = pair.b.nbd("vm");
    write_and_flush(&mut client, &mut model, &mut rng);
    pair.b.wait_share("vm", 0.6);
    write_and_flush(&mut client, &mut model, &mut rng);
    // Never flushed: afterwards it is there, or it is not, sector by sector.
    let unflushed = 30 * BLOCK..30 * BLOCK + 8192;
    let unflushed_data = noise(8192, 22);
    client.write(unflushed.start as u64, &unflushed_data);
    pair.b.kill();
    drop(client);

    pair.b.start();
    let status = pair.b.status("vm");
    let absent = status["blocks"]["absent"].as_u64().expect("a count") as usize;
    assert!(absent < BLOCKS / 2, "most had been marked: {status}");
    let mut client = pair.b.nbd("vm");
    // At once, without any of them being waited for: the newest write, a block of the front, one that is absent.
    let reads: Vec<_> =
        [0, 100 * BLOCK, last_blocks(3), last_blocks(0)].map(|at| (at, client.submit_read(at as u64, BLOCK))).into();
    for (at, cookie) in reads {
        let bytes = client.wait(cookie).expect("is read");
        assert_same(&format!("the block at {at} after the restart"), &bytes, &model[at..at + BLOCK]);
    }
    pair.b.wait_phase("vm", "released_from_source");
    let read = client.read_all();
    for (sector, was) in unflushed.clone().step_by(512).zip(unflushed_data.chunks(512)) {
        let is = &read[sector..sector + 512];
        assert!(is == was || is == &model[sector..sector + 512], "an unflushed sector is neither old nor new");
    }
    model[unflushed.clone()].copy_from_slice(&read[unflushed]);
    assert_same("the disk", &read, &model);
    let moved = pair.wire_bytes();
    assert!(moved <= bound(2), "{moved} bytes moved, at most {} were expected", bound(2));
}

/// Ended as systemd would, both of them, half-way; and the store, which is only a cache, is lost meanwhile.
#[test]
fn a_restart_of_both_half_way_loses_nothing_even_without_the_store() {
    let mut pair = Pair::start(link(MBIT_PER_S, RTT_MS));
    let disk = Disk::noisy(23, BLOCKS);
    pair.add("vm", &disk);
    pair.relocate("vm", &[]);
    let (mut model, mut rng) = (disk.bytes, Rng(24));
    let mut client = pair.b.nbd("vm");
    write_and_flush(&mut client, &mut model, &mut rng);
    // Acknowledged, not flushed: SIGTERM flushes.
    let last_words = noise(4096, 25);
    client.write(last_blocks(1) as u64, &last_words);
    model[last_blocks(1)..][..4096].copy_from_slice(&last_words);
    pair.b.wait_share("vm", 0.5);
    pair.b.stop();
    pair.a.stop();
    std::fs::remove_dir_all(pair.b.dir.join("store")).expect("there was a store");

    // The destination alone: what is here is served, whoever else is there.
    pair.b.start();
    let mut client = pair.b.nbd("vm");
    assert_same("what SIGTERM flushed", &client.read(last_blocks(1) as u64, 4096), &last_words);
    assert_same("a block of the front", &client.read(0, BLOCK), &model[..BLOCK]);
    let absent = client.submit_read(last_blocks(0) as u64, BLOCK);
    pair.a.start();
    assert_same("an absent block", &client.wait(absent).expect("is read"), &model[last_blocks(0)..]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &client.read_all(), &model);
    let moved = pair.wire_bytes();
    assert!(moved <= bound(1), "{moved} bytes moved, at most {} were expected", bound(1));
}

/// What breaks, and how it is mended.
#[derive(Clone, Copy, PartialEq)]
enum Outage {
    SourceKilled,
    /// For longer than the connection survives.
    LongCut,
    /// The connection outlives it.
    ShortCut,
}

fn the_guest_goes_on(outage: Outage) {
    let mut pair = Pair::with(link(MBIT_PER_S, RTT_MS), |a, b| {
        if outage == Outage::LongCut {
            a.peer_lines = "idle_timeout = \"1s\"".to_owned();
            b.peer_lines = a.peer_lines.clone();
        }
    });
    let disk = Disk::noisy(30, BLOCKS);
    pair.add("vm", &disk);
    pair.relocate("vm", &[]);
    let (mut model, mut rng) = (disk.bytes, Rng(31));
    let mut client = pair.b.nbd("vm");
    let mut other = pair.b.nbd_structured("vm");
    pair.b.wait_share("vm", 0.4);
    match outage {
        Outage::SourceKilled => pair.a.kill(),
        Outage::LongCut | Outage::ShortCut => pair.wan.cut().expect("the relay runs"),
    }

    // Absent: no answer for as long as the link is down, neither zeros nor an error.
    let absent = client.submit_read(last_blocks(0) as u64, BLOCK);
    let absent_too = other.submit_read(last_blocks(1) as u64 + 512, 4096);
    let outlasts = Duration::from_millis(if outage == Outage::LongCut { 3000 } else { 1500 });
    assert_eq!(client.wait_for(absent, outlasts), None, "nothing can have come over a dead link");
    assert_eq!(other.wait_for(absent_too, Duration::ZERO), None);
    // Everything else goes on, on the same connections, behind the read that waits.
    assert_same("a block that is here", &client.read(0, BLOCK), &model[..BLOCK]);
    let mut patch = |client: &mut NbdClient, at: usize, len: usize, seed: u64| {
        let data = noise(len, seed);
        client.write(at as u64, &data);
        model[at..at + len].copy_from_slice(&data);
    };
    patch(&mut client, last_blocks(2) + 512, 4096, 32);
    patch(&mut client, last_blocks(4), 2 * BLOCK, 33);
    client.flush();
    write_and_flush(&mut other, &mut model, &mut rng);
    let own = last_blocks(2) + 512;
    assert_same("what was just written", &client.read(own as u64, 4096), &model[own..own + 4096]);
    if outage != Outage::ShortCut {
        let status = pair.b.wait_phase("vm", "stalled");
        assert!(status["phase_reason"].as_str().is_some_and(|why| why.contains('a') && why.len() > 5), "{status}");
    }

    match outage {
        Outage::SourceKilled => pair.a.start(),
        Outage::LongCut | Outage::ShortCut => pair.wan.mend().expect("the relay runs"),
    }
    // A guest's write may have met a block on its way: what is right is what it is now.
    let answer = client.wait(absent).expect("the read is answered when the link is back");
    assert_same("the read that waited", &answer, &model[last_blocks(0)..]);
    let answer = other.wait(absent_too).expect("the read is answered when the link is back");
    assert_same("the other read that waited", &answer, &model[last_blocks(1) + 512..][..4096]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &client.read_all(), &model);
    let moved = pair.wire_bytes();
    assert!(moved <= bound(1), "{moved} bytes moved, at most {} were expected", bound(1));
}

#[test]
fn a_killed_source_comes_back_and_the_copy_goes_on() {
    the_guest_goes_on(Outage::SourceKilled);
}

#[test]
fn a_cut_that_ends_the_connection_is_survived() {
    the_guest_goes_on(Outage::LongCut);
}

#[test]
fn a_short_cut_is_survived() {
    the_guest_goes_on(Outage::ShortCut);
}

/// The patience that is configured has an end: an I/O error, on a connection that stays, and whatever is here goes on.
#[test]
fn a_read_that_waited_long_enough_is_an_error_and_nobody_is_disconnected() {
    let mut pair = Pair::with(link(MBIT_PER_S, RTT_MS), |_, b| {
        b.peer_lines = "idle_timeout = \"1s\"".to_owned();
        b.sections = "[demand]\ntimeout = \"4s\"\n".to_owned();
    });
    let disk = Disk::noisy(40, BLOCKS);
    pair.add("vm", &disk);
    pair.relocate("vm", &[]);
    let mut client = pair.b.nbd("vm");
    let mut other = pair.b.nbd_structured("vm");
    pair.b.wait_share("vm", 0.1);
    pair.a.kill();
    let waits = client.submit_read(last_blocks(0) as u64, BLOCK);
    let status = crate::site::eventually("the status says what is waited for, by whom, since when", || {
        let status = pair.b.status("vm");
        let reason = status["phase_reason"].as_str().unwrap_or_default();
        let says_all =
            ["a cannot be reached since 20", "guest reads that wait: 1"].iter().all(|word| reason.contains(word));
        if says_all && status["phase"] == "stalled" { Ok(status) } else { Err(status.to_string()) }
    });
    assert_eq!(status["nbd_clients"], 2);
    assert_eq!(client.wait(waits), Err(crate::nbd_client::EIO));
    let log = pair.b.log();
    for words in ["guests wait for blocks: a cannot be reached since", "a block did not come within 4 s"] {
        assert!(log.contains(words), "no word of {words:?} in:\n{log}");
    }
    // The same connections, before and after.
    for client in [&mut client, &mut other] {
        assert_same("a block that is here", &client.read(0, BLOCK), &disk.bytes[..BLOCK]);
        client.flush();
    }
    pair.a.start();
    assert_same("a later read", &client.read(last_blocks(0) as u64, BLOCK), &disk.bytes[last_blocks(0)..]);
    assert_same("on both", &other.read(last_blocks(1) as u64, BLOCK), &disk.bytes[last_blocks(1)..][..BLOCK]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &client.read_all(), &disk.bytes);
}
