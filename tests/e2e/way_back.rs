//! The way back: given up before and after the copy is done, by force, and without the other side.

use std::path::Path;

use crate::disk::{BLOCK, Disk, assert_same, noise};
use crate::nbd_client::EPERM;
use crate::site::{Pair, eventually, link, text};

const SLOW: &[&str] = &["--bulk-rate", "1Mbit/s"];

fn assert_owned_by_a(pair: &Pair, volume: &str, bytes: &[u8]) {
    let status = pair.a.status(volume);
    assert_eq!((&status["phase"], &status["owner"]), (&"owned".into(), &"a".into()), "{status}");
    let mut client = pair.a.nbd(volume);
    assert_same("the disk at its owner", &client.read_all(), bytes);
    client.write(0, &bytes[..512]);
    client.flush();
}

#[test]
fn a_disk_that_has_arrived_can_be_given_back_until_a_guest_writes() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(150, 40, 512);
    pair.add("vm", &disk);
    let destination = pair.relocate("vm", &["--wait"]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("a read", &pair.b.nbd("vm").read_all(), &disk.bytes);
    for is_restarted in [false, true] {
        if is_restarted {
            pair.relocate("vm", &["--wait"]);
            pair.b.wait_phase("vm", "released_from_source");
            pair.b.kill();
            pair.b.start();
        }
        pair.b.ok(&["cancel", "vm"]);
        assert!(!destination.exists());
        assert_owned_by_a(&pair, "vm", &disk.bytes);
    }
    // Once a guest has written it is a person's decision, restarted or not.
    pair.relocate("vm", &["--wait"]);
    pair.b.nbd("vm").write(BLOCK as u64, &noise(4096, 151));
    for is_restarted in [false, true] {
        if is_restarted {
            pair.b.kill();
            pair.b.start();
        }
        let said = pair.b.refused(&["cancel", "vm"], &["vm", "--discard-writes"]);
        assert!(said.contains("bytes"), "it says how much: {said}");
    }
    pair.b.ok(&["cancel", "vm", "--discard-writes"]);
    assert_owned_by_a(&pair, "vm", &disk.bytes);
}

#[test]
fn what_the_source_has_let_go_of_cannot_be_given_back_and_is_not_lost() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(152, 40, 512);
    pair.add("vm", &disk);
    pair.relocate("vm", &["--wait"]);
    pair.b.wait_phase("vm", "released_from_source");
    pair.a.ok(&["volume", "remove", "vm"]);
    pair.b.refused(&["cancel", "vm"], &["vm"]);
    let mut client = pair.b.nbd("vm");
    assert_same("the disk", &client.read_all(), &disk.bytes);
    client.write(0, &disk.bytes[..512]);
}

#[test]
fn a_volume_in_use_is_not_taken_without_a_word() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(153, 40, 512);
    pair.add("vm", &disk);
    let mut guest = pair.a.nbd("vm");
    guest.write(0, &disk.bytes[..512]);
    let destination = pair.path("vm-at-b.raw");
    let relocate = ["relocate", "a/vm", "--image", text(&destination)];
    let said = pair.b.refused(&relocate, &["vm", "--take"]);
    assert!(said.contains("in use"), "{said}");
    assert!(!destination.exists());
    guest.write(0, &disk.bytes[..512]);
    guest.flush();
    pair.b.ok(&[&relocate[..], &["--take"]].concat());
    assert_eq!(guest.try_write(0, &disk.bytes[..512]), Err(EPERM));
}

#[test]
fn a_name_that_left_is_not_taken_again_without_a_word() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(154, 40, 512);
    let image = pair.add("vm", &disk);
    pair.relocate("vm", &["--wait"]);
    pair.b.wait_phase("vm", "released_from_source");
    pair.a.ok(&["volume", "remove", "vm"]);
    for is_restarted in [false, true] {
        if is_restarted {
            pair.a.stop();
            pair.a.start();
        }
        pair.a.refused(&["volume", "add", "vm", "--image", text(&image)], &["vm", "left for b", "--again"]);
    }
    pair.a.ok(&["volume", "add", "vm", "--image", text(&image), "--again"]);
    assert!(pair.a.status("vm")["epoch"].as_u64() > pair.b.status("vm")["epoch"].as_u64());
}

#[test]
fn a_source_goes_on_without_a_lost_destination_which_is_fenced_when_it_comes_back() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(155, 60, 512);
    pair.add("vm", &disk);
    pair.relocate("vm", SLOW);
    pair.b.nbd("vm").write(0, &noise(4096, 156));
    pair.b.kill();
    pair.a.refused(&["reclaim", "vm", "--epoch", "1"], &["vm", "epoch 2"]);
    let epoch = pair.a.status("vm")["epoch"].to_string();
    let said = pair.a.ok(&["reclaim", "vm", "--epoch", &epoch]);
    assert!(said.contains("lost") && said.contains(" b"), "it says what is lost, and who is fenced: {said}");
    assert_owned_by_a(&pair, "vm", &disk.bytes);

    pair.b.start();
    let status = pair.b.wait_phase("vm", "fenced");
    assert!(status["phase_reason"].as_str().is_some_and(|why| why.contains("a owns it")), "{status}");
    pair.b.stop();
    pair.b.start();
    assert_eq!(pair.b.phase("vm"), "fenced", "a restart does not forget it");
    pair.b.ok(&["volume", "remove", "vm"]);
    assert_owned_by_a(&pair, "vm", &disk.bytes);
    eventually("nothing is owed", || {
        let owed = pair.a.status("vm")["owed"].clone();
        if owed.as_array().is_some_and(Vec::is_empty) { Ok(()) } else { Err(owed.to_string()) }
    });
}

#[test]
fn who_uses_a_volume_that_is_reclaimed_at_its_source_is_hung_up_on() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(164, 60, 512);
    pair.add("vm", &disk);
    pair.relocate("vm", SLOW);
    let mut idle = pair.b.nbd("vm");
    assert_same("a read", &idle.read(0, BLOCK), &disk.bytes[..BLOCK]);
    let epoch = pair.a.status("vm")["epoch"].to_string();
    pair.a.ok(&["reclaim", "vm", "--epoch", &epoch]);
    idle.wait_for_hang_up();
    assert_eq!(pair.b.phase("vm"), "fenced");
    // A person decides otherwise: new clients are served, and stay.
    let epoch = pair.b.status("vm")["epoch"].to_string();
    pair.b.ok(&["reclaim", "vm", "--epoch", &epoch]);
    assert_same("what had come", &pair.b.nbd("vm").read(0, BLOCK), &disk.bytes[..BLOCK]);
}

#[test]
fn a_destination_goes_on_without_a_lost_source() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(157, 60, 512);
    pair.add("vm", &disk);
    let destination = pair.relocate("vm", &["--no-bulk"]);
    let mut guest = pair.b.nbd("vm");
    let (written, read) = (noise(4096, 158), guest.read(0, BLOCK));
    assert_same("a block that came", &read, &disk.bytes[..BLOCK]);
    guest.write(3 * BLOCK as u64, &written);
    guest.flush();
    drop(guest);
    pair.a.kill();
    let said = pair.b.ok(&["reclaim", "vm", "--epoch", "2"]);
    assert!(said.contains("zeros") || said.contains("lost"), "{said}");
    let mut model = vec![0; disk.bytes.len()];
    model[..BLOCK].copy_from_slice(&disk.bytes[..BLOCK]);
    model[3 * BLOCK..][..4096].copy_from_slice(&written);
    assert_same("what was here, zeros elsewhere", &pair.b.nbd("vm").read_all(), &model);
    pair.b.kill();
    pair.b.start();
    assert_same("after a restart", &pair.b.nbd("vm").read_all(), &model);
    assert!(Path::exists(&destination));
    // The source comes back: it hears that the disk is not its.
    pair.a.start();
    pair.a.wait_phase("vm", "fenced");
    assert!(pair.a.cli(&["cancel", "vm"]).status.code() == Some(1));
}

#[test]
fn what_was_not_asked_to_be_copied_is_copied_when_somebody_says_resume() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(159, 40, 512);
    pair.add("vm", &disk);
    pair.relocate("vm", &["--no-bulk"]);
    pair.b.nbd("vm").write(0, &disk.bytes[..512]);
    pair.b.ok(&["resume", "vm"]);
    pair.b.wait_phase("vm", "released_from_source");
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
}

#[test]
fn a_second_instance_with_a_copied_state_is_turned_away() {
    let mut pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(160, 60, 512);
    pair.add("vm", &disk);
    let image = pair.relocate("vm", SLOW);
    pair.b.stop();
    let (copy, copied_image) = (pair.path("copy-of-b"), pair.path("copy-of-b.raw"));
    std::fs::copy(&image, &copied_image).expect("copies");
    let copied = std::process::Command::new("cp").arg("-a").arg(&pair.b.dir).arg(&copy).status().expect("cp runs");
    assert!(copied.success());
    // The original goes on, and renews its number.
    pair.b.start();
    eventually("b is connected", || match pair.b.status("vm")["link"]["state"].as_str() {
        Some("connected") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    pair.b.stop();
    // The copy: the same key and name, the state of before.
    std::fs::rename(&pair.b.dir, pair.path("b-aside")).expect("moves");
    std::fs::rename(&copy, &pair.b.dir).expect("moves");
    // Into the same file: as a snapshot of the machine has it.
    std::fs::copy(&copied_image, &image).expect("copies");
    pair.b.start();
    eventually("the copy is turned away, with addresses in the log", || {
        let log = pair.a.log();
        if log.contains("second instance") && log.contains("accepted_from") { Ok(()) } else { Err("no".into()) }
    });
    eventually("the copy takes no writes", || match pair.b.nbd("vm").try_write(0, &disk.bytes[..512]) {
        Err(EPERM) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    // A person decides that it is the one.
    pair.a.ok(&["peer", "accept", "b"]);
    eventually("the copy takes writes", || {
        pair.b.nbd("vm").try_write(0, &disk.bytes[..512]).map_err(|e| e.to_string())
    });
}

#[test]
fn who_uses_a_volume_that_is_given_up_is_hung_up_on() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(163, 40, 512);
    pair.add("vm", &disk);
    let destination = pair.relocate("vm", &["--wait"]);
    let mut idle = pair.b.nbd("vm");
    assert_same("a read", &idle.read(0, BLOCK), &disk.bytes[..BLOCK]);
    pair.b.ok(&["cancel", "vm"]);
    idle.wait_for_hang_up();
    assert!(!destination.exists());
    // Nobody holds the name, or the file, any more.
    pair.relocate("vm", &["--wait"]);
    assert_same("it came again", &pair.b.nbd("vm").read_all(), &disk.bytes);
}
