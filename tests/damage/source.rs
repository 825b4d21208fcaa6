//! Damage at the source after it has let go: its image, its state, while the destination still needs it. What is at the
//! destination is served, what is not there is an error or waits, and never made up.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::disk::{BLOCK, assert_same, noise};
use crate::half_way::{ARRIVED, HalfWay};
use crate::nbd_client::EIO;
use crate::site::eventually;

/// Does something to the source while it is stopped; the destination comes back, too.
fn after(seed: u64, damage: impl Fn(&HalfWay)) -> HalfWay {
    let mut half_way = HalfWay::make(seed);
    // The stamps of files have steps of a few milliseconds.
    std::thread::sleep(std::time::Duration::from_millis(50));
    half_way.pair.a.stop();
    damage(&half_way);
    half_way.pair.a.start();
    half_way.pair.b.sections = "[demand]\ntimeout = \"3s\"\n".to_owned();
    half_way.pair.b.start();
    half_way
}

/// Everything that is here is served; what is absent is right or an error. `words` are in the status in the end.
#[track_caller]
fn assert_honest(half_way: &HalfWay, words: &[&str]) {
    let mut client = half_way.pair.b.nbd("vm");
    let here = ARRIVED * BLOCK;
    assert_same("what had arrived", &client.read(0, here), &half_way.model[..here]);
    let own = 130 * BLOCK;
    assert_same("what the guest wrote", &client.read(own as u64, BLOCK), &half_way.model[own..own + BLOCK]);
    let sectors = 110 * BLOCK + 512;
    assert_same("its sectors", &client.read(sectors as u64, 4096), &half_way.model[sectors..sectors + 4096]);
    let mut errors = 0;
    // All at once: each may wait as long as the configuration says.
    let reads = [85, 99, 110, 120, 140, 155].map(|block| (block, client.submit_read(at_of(block), BLOCK)));
    for (block, cookie) in reads {
        let at = block * BLOCK;
        match client.wait(cookie) {
            Ok(bytes) => assert_same(&format!("block {block}"), &bytes, &half_way.model[at..at + BLOCK]),
            Err(errno) => {
                assert_eq!(errno, EIO, "block {block}");
                errors += 1;
            }
        }
    }
    assert!(errors > 0, "something cannot be there any more");
    eventually("the status says what is wrong", || {
        let status = half_way.pair.b.status("vm");
        let reason = status["phase_reason"].as_str().unwrap_or_default();
        if words.iter().all(|word| reason.contains(word)) { Ok(()) } else { Err(status.to_string()) }
    });
    // The guest goes on writing.
    let data = noise(4096, 5);
    client.write(at_of(155), &data);
    client.flush();
    assert_same("a write", &client.read(at_of(155), 4096), &data);
}

fn at_of(block: usize) -> u64 {
    (block * BLOCK) as u64
}

#[test]
fn an_image_that_changed_after_the_release() {
    let half_way = after(380, |half_way| {
        let file = File::options().write(true).open(half_way.pair.path("vm-at-a.raw")).expect("opens");
        for block in ARRIVED..crate::half_way::BLOCKS {
            file.write_all_at(&noise(BLOCK, 9), at_of(block)).expect("writes");
        }
    });
    assert_honest(&half_way, &["vm"]);
}

#[test]
fn an_image_that_was_cut_after_the_release() {
    let half_way = after(390, |half_way| {
        let file = File::options().write(true).open(half_way.pair.path("vm-at-a.raw")).expect("opens");
        file.set_len(at_of(ARRIVED)).expect("truncates");
    });
    assert_honest(&half_way, &["vm"]);
}

#[test]
fn an_image_that_was_deleted_after_the_release() {
    let half_way = after(400, |half_way| fs::remove_file(half_way.pair.path("vm-at-a.raw")).expect("removes"));
    assert_honest(&half_way, &["vm"]);
}

/// The source has forgotten everything: it must not serve the image as its own either.
#[test]
fn a_source_without_its_state() {
    let half_way = after(410, |half_way| fs::remove_dir_all(half_way.pair.a.dir.join("state")).expect("removes"));
    assert_honest(&half_way, &["vm"]);
    let exported =
        crate::nbd_client::NbdClient::unix(&half_way.pair.a.socket(), "vm", crate::nbd_client::Replies::Simple);
    assert!(exported.is_err(), "a source that has forgotten the hand-over serves the volume");
}
