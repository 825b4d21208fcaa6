//! Images that are missing, unreadable, shorter or another than announced, and places where none can be made: each a
//! clear error that names the thing, and nothing lost.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};

use crate::disk::{BLOCK, Disk, assert_same, noise};
use crate::nbd_client::EIO;
use crate::site::{Pair, link, skipped, text};

#[test]
fn images_that_cannot_be_served_are_named() {
    let pair = Pair::start(link(200, 4));
    let good = Disk::mixed(70, 20, 512);
    let good_path = pair.add("good", &good);
    let path = |name: &str| pair.path(name);
    std::fs::create_dir(path("folder")).expect("makes a folder");
    std::fs::write(path("empty.raw"), b"").expect("writes");
    std::fs::write(path("disk.qcow2"), [&b"QFI\xfb"[..], &[0; 4096]].concat()).expect("writes");
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("makes a fifo");
    good.write_to(&path("in-use.raw"));
    let in_use = File::open(path("in-use.raw")).expect("opens");
    lock(&in_use);

    let table = [
        ("missing.raw", "no such file"),
        ("no-folder/disk.raw", "folder"),
        ("folder", "folder"),
        ("empty.raw", "empty"),
        ("disk.qcow2", "qcow2"),
        ("fifo", "regular file"),
        ("in-use.raw", "in use"),
    ];
    for (name, why) in table {
        let image = path(name);
        let said = pair.a.refused(&["volume", "add", "bad", "--image", text(&image)], &["bad", name]);
        assert!(said.contains(why), "{name}: no word of {why:?} in: {said}");
    }
    // One image is one volume, one name is one volume.
    pair.a.refused(&["volume", "add", "twin", "--image", text(&good_path)], &["twin", "is volume good already"]);
    good.write_to(&path("other.raw"));
    pair.a.refused(&["volume", "add", "good", "--image", text(&path("other.raw"))], &["good", "exists"]);
    // The same when images only fill the store: all of them are looked at before anything is read.
    pair.b.refused(&["prewarm", "--image", text(&path("missing.raw"))], &["missing.raw"]);

    let listed = pair.a.ok(&["volume", "list", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("volume list --json is JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_same("the volume that was there before", &pair.a.nbd("good").read_all(), &good.bytes);
    assert!(!path("missing.raw").exists() && !path("no-folder").exists(), "nothing is made by looking");
}

#[test]
fn an_unreadable_image_is_named() {
    let test = "an_unreadable_image_is_named";
    if nix::unistd::geteuid().is_root() {
        return skipped(test, "root may read everything");
    }
    let pair = Pair::start(link(200, 4));
    let path = pair.path("secret.raw");
    Disk::mixed(71, 10, 0).write_to(&path);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).expect("changes permissions");
    let said = pair.a.refused(&["volume", "add", "secret", "--image", text(&path)], &["secret.raw"]);
    assert!(said.contains("ermission"), "{said}");
}

#[test]
fn destinations_that_cannot_be_made_are_named_and_left_alone() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(72, 20, 512);
    pair.add("vm", &disk);
    let path = |name: &str| pair.path(name);
    std::fs::write(path("precious.raw"), b"somebody's").expect("writes");
    std::fs::write(path("in-use.raw"), b"somebody's").expect("writes");
    let in_use = File::open(path("in-use.raw")).expect("opens");
    lock(&in_use);
    std::fs::create_dir(path("folder")).expect("makes a folder");

    let table = [
        ("precious.raw", "exists"),
        ("in-use.raw", "in use"),
        ("folder", "exists"),
        ("no-folder/disk.raw", "folder"),
        ("precious.raw/disk.raw", "irectory"),
    ];
    for (name, why) in table {
        let image = path(name);
        let said = pair.b.refused(&["relocate", "a/vm", "--image", text(&image)], &["vm", name]);
        assert!(said.contains(why), "{name}: no word of {why:?} in: {said}");
        pair.b.refused(&["status", "vm"], &["vm"]);
    }
    for name in ["precious.raw", "in-use.raw"] {
        assert_eq!(std::fs::read(path(name)).expect("reads"), b"somebody's", "{name}");
    }
    assert!(!path("no-folder").exists());
    // The source let go of nothing.
    let status = pair.a.status("vm");
    assert_eq!((&status["phase"], &status["owner"]), (&"owned".into(), &"a".into()), "{status}");
    pair.a.nbd("vm").write(0, &disk.bytes[..512]);
    // What a crash in the middle of `relocate` leaves behind is no obstacle.
    File::create(path("vm-at-b.raw")).and_then(|file| file.set_len(disk.bytes.len() as u64)).expect("makes a file");
    pair.relocate("vm", &["--wait"]);
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
}

/// Somebody truncates the image of an idle volume: the relocation says so, and never makes the missing bytes up.
#[test]
fn an_image_that_is_shorter_than_announced_fails_clearly() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::noisy(73, 60);
    let image = pair.add("vm", &disk);
    let other = Disk::mixed(74, 20, 0);
    pair.add("other", &other);
    wait_hashed(&pair, "vm");
    File::options().write(true).open(&image).expect("opens").set_len(30 * BLOCK as u64).expect("truncates");

    let destination = pair.path("vm-at-b.raw");
    let said = pair.b.refused(&["relocate", "a/vm", "--image", text(&destination)], &["vm", "vm-at-a.raw"]);
    assert!(said.contains(&(60 * BLOCK).to_string()), "it says what was announced: {said}");
    assert!(!destination.exists(), "nothing is left of the attempt");
    assert_nothing_made_up(&pair, "vm", &disk.bytes, 30..60);
    // It did not take the ownership along.
    let status = pair.a.status("vm");
    assert_eq!((&status["phase"], &status["owner"]), (&"owned".into(), &"a".into()), "{status}");
    assert_eq!(
        pair.a.nbd("vm").try_read(40 * BLOCK as u64, BLOCK),
        Err(EIO),
        "nor are the bytes made up at the source"
    );
    // Others are not concerned.
    pair.relocate("other", &["--wait"]);
    assert_same("the other volume", &pair.b.nbd("other").read_all(), &other.bytes);
}

/// Somebody writes into the image that is being read as a static one, behind the daemon's back.
#[test]
fn an_image_that_changes_under_the_copy_fails_clearly() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::noisy(75, 160);
    let image = pair.add("vm", &disk);
    wait_hashed(&pair, "vm");
    pair.relocate("vm", &["--bulk-rate", "4Mbit/s"]);
    let mut client = pair.b.nbd("vm");
    assert_same("a read before", &client.read(0, BLOCK), &disk.bytes[..BLOCK]);
    // Its stamp has steps of a few milliseconds.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let file = File::options().write(true).open(&image).expect("opens");
    file.write_all_at(&noise(20 * BLOCK, 76), 140 * BLOCK as u64).expect("writes");

    pair.b.ok(&["limit", "vm", "unlimited"]);
    let status = pair.b.wait_phase("vm", "failed");
    let reason = status["phase_reason"].as_str().expect("a reason");
    println!("failed: {reason}");
    assert!(reason.contains("vm"), "it names the image or the volume: {reason}");
    assert!(status["blocks"]["absent"].as_u64().expect("a count") >= 20, "{status}");
    assert_nothing_made_up(&pair, "vm", &disk.bytes, 140..160);
    // What had arrived is there, and what the guest writes is kept.
    assert_same("a read after", &client.read(0, BLOCK), &disk.bytes[..BLOCK]);
    let data = noise(4096, 77);
    client.write(150 * BLOCK as u64, &data);
    client.flush();
    assert_same("a write after", &client.read(150 * BLOCK as u64, 4096), &data);
}

/// Truncated when the copy is on its way already.
#[test]
fn an_image_that_is_truncated_under_the_copy_fails_clearly() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::noisy(78, 60);
    let image = pair.add("vm", &disk);
    pair.relocate("vm", &["--bulk-rate", "1Mbit/s"]);
    File::options().write(true).open(&image).expect("opens").set_len(30 * BLOCK as u64).expect("truncates");
    pair.b.ok(&["limit", "vm", "unlimited"]);
    let status = pair.b.wait_phase("vm", "failed");
    let reason = status["phase_reason"].as_str().expect("a reason");
    assert!(reason.contains("vm-at-a.raw"), "it names the image: {reason}");
    assert_nothing_made_up(&pair, "vm", &disk.bytes, 0..60);
    // The way out: nobody wrote there, so it can be given back.
    pair.b.ok(&["cancel", "vm"]);
    assert_eq!(pair.a.status("vm")["owner"], "a");
}

/// Changed while it was at rest, before anybody asked for it: what it holds at the hand-over is what relocates.
#[test]
fn an_image_that_was_changed_at_rest_is_noticed_before_the_hand_over() {
    let pair = Pair::start(link(200, 4));
    let mut disk = Disk::mixed(79, 60, 512);
    let image = pair.add("vm", &disk);
    wait_hashed(&pair, "vm");
    std::thread::sleep(std::time::Duration::from_millis(50));
    let data = noise(BLOCK, 80);
    let file = File::options().write(true).open(&image).expect("opens");
    // Over data, and over what was a block of zeros.
    let zeros = disk.bytes.chunks(BLOCK).position(|block| block.iter().all(|byte| *byte == 0)).expect("there is one");
    for block in [7, zeros] {
        file.write_all_at(&data, (block * BLOCK) as u64).expect("writes");
        disk.bytes[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(&data);
    }
    pair.relocate("vm", &["--wait"]);
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
    assert_same("its file", &std::fs::read(pair.path("vm-at-b.raw")).expect("reads"), &disk.bytes);
    let log = pair.a.log();
    assert!(log.contains("was changed by somebody else while it rested"), "nobody was told: {log}");
}

/// Whatever is served of these blocks at the destination is what they were, or an error.
#[track_caller]
fn assert_nothing_made_up(pair: &Pair, volume: &str, bytes: &[u8], blocks: std::ops::Range<usize>) {
    let socket = pair.b.socket();
    let Ok(mut client) = crate::nbd_client::NbdClient::unix(&socket, volume, crate::nbd_client::Replies::Simple) else {
        return; // The relocation was refused altogether: nothing is served.
    };
    for block in blocks {
        match client.try_read((block * BLOCK) as u64, BLOCK) {
            Ok(read) => assert_same(&format!("block {block}"), &read, &bytes[block * BLOCK..][..BLOCK]),
            Err(errno) => assert_eq!(errno, EIO, "block {block}"),
        }
    }
}

fn wait_hashed(pair: &Pair, volume: &str) {
    crate::site::eventually("the image is hashed", || {
        let status = pair.a.status(volume);
        if status["hashed_blocks"] == status["blocks"]["total"] { Ok(()) } else { Err(status.to_string()) }
    });
}

/// As another daemon, or anybody who cares, locks an image.
fn lock(file: &File) {
    // SAFETY: flock only reads the descriptor, which `file` keeps open during the call.
    let locked = unsafe { nix::libc::flock(file.as_raw_fd(), nix::libc::LOCK_EX | nix::libc::LOCK_NB) };
    assert_eq!(locked, 0, "nobody else has it");
}

#[test]
fn a_half_arrived_image_that_somebody_wrote_meanwhile_is_not_served() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(78, 60, 512);
    pair.add("vm", &disk);
    let destination = pair.relocate("vm", &["--no-bulk"]);
    assert_same("a block that came", &pair.b.nbd("vm").read(0, BLOCK), &disk.bytes[..BLOCK]);
    pair.b.stop();
    // In place: it is the same file.
    let file = File::options().write(true).open(&destination).expect("opens");
    file.write_all_at(&noise(4096, 79), 0).expect("writes");
    pair.b.start();
    let status = pair.b.status("vm");
    assert_eq!(status["phase"], "failed", "{status}");
    let reason = status["phase_reason"].as_str().expect("a reason");
    assert!(reason.contains("content"), "{reason}");
    // What is not damaged goes on: it is the source's again.
    pair.b.ok(&["cancel", "vm"]);
    assert_same("the disk at its source", &pair.a.nbd("vm").read_all(), &disk.bytes);
}
