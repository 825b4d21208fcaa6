//! Room, descriptors and memory run out, other than on the disk that the volumes lie on: whoever is served goes on being
//! served, what cannot be kept is said, and it goes on by itself when there is room again.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::disk::{BLOCK, Disk, assert_same, noise};
use crate::nbd_client::{NbdClient, Replies};
use crate::site::{Pair, eventually, link, text};
use crate::small_disk::{is_impossible, on_small_disk, seen_by};

const ENOSPC: u32 = 28;

/// Fills a file system to its last byte.
fn fill(folder: &Path) -> std::path::PathBuf {
    let ballast = folder.join("ballast");
    let mut file = File::create(&ballast).expect("makes the ballast");
    for len in [1 << 20, 4096, 1] {
        while file.write(&vec![1; len]).is_ok_and(|written| written > 0) {}
    }
    ballast
}

/// The state database cannot write: no flush is acknowledged that is not durable, and flushes succeed again when it can.
#[test]
fn a_full_state_directory_fails_flushes_and_recovers() {
    if is_impossible("a_full_state_directory_fails_flushes_and_recovers") {
        return;
    }
    let mut pair = Pair::with(link(100, 4), |_, b| {
        let state = b.dir.join("state");
        std::fs::create_dir_all(&state).expect("makes the folder");
        b.launcher = on_small_disk(&state, 24);
    });
    // Of many blocks: what is kept of each that is written in part adds up, beyond what the database has allocated ahead.
    let blocks = 1100;
    let last = noise(BLOCK, 120);
    let path = pair.path("vm-at-a.raw");
    let image = File::create(&path).expect("makes an image");
    image.set_len((blocks * BLOCK) as u64).expect("sizes it");
    image.write_all_at(&last, ((blocks - 1) * BLOCK) as u64).expect("writes");
    pair.a.ok(&["volume", "add", "vm", "--image", text(&path)]);
    pair.relocate("vm", &["--no-bulk"]);
    let mut client = pair.b.nbd("vm");
    let data = |block: usize| noise(512, block as u64);
    let at = |block: usize| (block * BLOCK + 1536) as u64;
    client.write(at(0), &data(0));
    client.flush();
    let state = pair.b.dir.join("state");
    let ballast = fill(&seen_by(pair.b.pid(), &state));
    let mut flushed = 0;
    let mut errno = None;
    for block in 1..blocks - 1 {
        let written = client.try_write(at(block), &data(block));
        let cookie = client.submit_flush();
        errno = written.err().or(client.wait(cookie).err());
        if errno.is_some() {
            break;
        }
        flushed = block;
    }
    println!("{flushed} flushes had room");
    assert_eq!(errno, Some(ENOSPC), "a write or a flush says that there is no room");
    let cookie = client.submit_flush();
    assert!(client.wait(cookie).is_err(), "and it is not forgotten by the next flush");
    let said = pair.b.log();
    assert!(said.contains("No space left on device") && said.contains(text(&state)), "{said}");
    // Reads go on, of what is here and of what is not.
    assert_same("a read", &client.read(at(flushed), 512), &data(flushed));
    assert_same("a fetched block", &client.read(((blocks - 1) * BLOCK) as u64, BLOCK), &last);

    std::fs::remove_file(ballast).expect("makes room");
    eventually("flushes succeed again", || {
        let cookie = client.submit_flush();
        client.wait(cookie).map(drop).map_err(|errno| format!("errno {errno}"))
    });
    client.write(at(blocks - 2), &data(blocks - 2));
    client.flush();
    for block in [0, flushed, blocks - 2] {
        assert_same("a block", &client.read(at(block), 512), &data(block));
    }
    drop(client);
    pair.b.stop();
}

/// The store is a cache: where it has no room the relocation costs more bytes next time, and that is all.
#[test]
fn a_full_store_directory_stops_nothing() {
    if is_impossible("a_full_store_directory_stops_nothing") {
        return;
    }
    let mut pair = Pair::with(link(200, 4), |_, b| {
        let store = b.dir.join("store");
        std::fs::create_dir_all(&store).expect("makes the folder");
        b.launcher = on_small_disk(&store, 8);
    });
    fill(&seen_by(pair.b.pid(), &pair.b.dir.join("store")));
    // More than the store keeps in memory before it writes.
    let disk = Disk::noisy(121, 500);
    pair.add("vm", &disk);
    pair.relocate("vm", &["--wait"]);
    let mut client = pair.b.nbd("vm");
    client.write(0, &[7; 4096]);
    client.flush();
    let read = client.read_all();
    assert_same("the disk", &read[4096..], &disk.bytes[4096..]);
    drop(client);
    let again = disk.sibling(122, 100);
    pair.add("again", &again);
    pair.relocate("again", &["--wait"]);
    assert_same("the next disk", &pair.b.nbd("again").read_all(), &again.bytes);
    pair.b.stop();
}

/// No descriptor is left: new clients wait or are turned away, those that are there do not notice, and when some leave
/// others get in.
#[test]
fn exhausted_descriptors_concern_new_clients_only() {
    let mut pair = Pair::with(link(100, 4), |_, b| {
        b.launcher = ["sh", "-c", "ulimit -n 128 && exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    });
    let disk = Disk::noisy(123, 60);
    pair.add("vm", &disk);
    pair.relocate("vm", &["--bulk-rate", "4Mbit/s"]);
    let mut first = pair.b.nbd("vm");
    assert_same("a read", &first.read(0, BLOCK), &disk.bytes[..BLOCK]);
    let mut others = Vec::new();
    let mut refused = 0;
    for nth in 0..100 {
        let socket = std::os::unix::net::UnixStream::connect(pair.b.socket()).expect("the backlog takes it");
        socket.set_read_timeout(Some(Duration::from_millis(500))).expect("sets a timeout");
        // A greeting says that it was accepted; who is in the backlog gets none.
        let mut greeting = [0; 18];
        if std::io::Read::read_exact(&mut (&socket), &mut greeting).is_err() {
            refused += 1;
        }
        others.push(socket);
        if refused > 3 {
            println!("after {nth} clients no more are accepted");
            break;
        }
    }
    assert!(refused > 3, "128 descriptors do not suffice for 100 clients");
    // Whoever was there goes on: reads, writes, flushes, absent blocks, too.
    assert_same("an absent block", &first.read(59 * BLOCK as u64, BLOCK), &disk.bytes[59 * BLOCK..]);
    let data = noise(4096, 124);
    first.write(7 * BLOCK as u64, &data);
    first.flush();
    assert_same("a write", &first.read(7 * BLOCK as u64, 4096), &data);
    let said = pair.b.log().matches("cannot accept an nbd client").count();
    assert!((1..5).contains(&said), "the log says so, and not ten times a second: {said} times");

    drop(others);
    let mut late = eventually("new clients are served again", || {
        NbdClient::unix(&pair.b.socket(), "vm", Replies::Simple).map_err(|error| error.to_string())
    });
    assert_same("a read of a new client", &late.read(8 * BLOCK as u64, BLOCK), &disk.bytes[8 * BLOCK..][..BLOCK]);
    assert!(!pair.b.log().contains("panicked"), "{}", pair.b.log());
    drop((late, first));
    pair.b.kill();
}

/// Clients ask for more at a time than the daemon may hold in memory: all are answered, and it never holds more.
#[test]
fn many_large_requests_are_answered_in_bounded_memory() {
    const REQUEST: usize = 32 << 20;
    const CLIENTS: usize = 8;
    const EACH: usize = 4;
    let pair = Pair::start(link(100, 4));
    let path = pair.path("sparse.raw");
    File::create(&path).expect("makes an image").set_len(4 * REQUEST as u64).expect("sizes it");
    pair.a.ok(&["volume", "add", "sparse", "--image", text(&path)]);
    let clients: Vec<NbdClient> = (0..CLIENTS).map(|_| pair.a.nbd("sparse")).collect();
    let data = vec![0x5a; REQUEST];
    std::thread::scope(|scope| {
        for (nth, mut client) in clients.into_iter().enumerate() {
            let data = &data;
            scope.spawn(move || {
                // A GiB of requests, all clients together, half of them writes of the same bytes.
                let cookies: Vec<_> = (0..EACH)
                    .map(|at| match nth % 2 {
                        0 => client.submit_read((at * REQUEST) as u64, REQUEST),
                        _ => client.submit_write((at * REQUEST) as u64, data, false),
                    })
                    .collect();
                for cookie in cookies {
                    let bytes = client.wait(cookie).expect("is answered");
                    assert!(bytes.iter().all(|byte| matches!(byte, 0 | 0x5a)), "only what is there or was written");
                }
            });
        }
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", pair.a.pid())).expect("the daemon runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the peak of resident memory");
    let peak_mib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("kB") >> 10;
    println!("{peak_mib} MiB for {} MiB of requests", CLIENTS * EACH * (REQUEST >> 20));
    // The pool, the reserve of each client, and what a daemon has anyway.
    assert!(peak_mib < 400, "{peak_mib} MiB");
}
