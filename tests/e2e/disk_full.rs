//! The destination's disk is full half-way: guests go on reading, the status says what to do, and the copy goes on by
//! itself when there is room.

use std::process::Command;

use crate::disk::{BLOCK, Disk, assert_same};
use crate::site::{Pair, eventually, link, run, text};
use crate::small_disk::{is_impossible, on_small_disk, seen_by};

#[test]
fn a_full_disk_stalls_the_copy_and_nothing_else() {
    if is_impossible("a_full_disk_stalls_the_copy_and_nothing_else") {
        return;
    }
    let small = tempfile::tempdir().expect("a directory");
    let mut pair = Pair::with(link(100, 4), |_, b| b.launcher = on_small_disk(small.path(), 14));
    let disk = Disk::noisy(100, 160);
    pair.add("vm", &disk);
    let inside = seen_by(pair.b.pid(), small.path());
    std::fs::write(inside.join("ballast"), vec![1; 8 << 20]).expect("fills the small disk");

    let destination = small.path().join("vm.raw");
    pair.b.ok(&["relocate", "a/vm", "--image", text(&destination)]);
    let status = pair.b.wait_phase("vm", "stalled");
    let reason = status["phase_reason"].as_str().expect("a reason").to_owned();
    assert!(reason.contains("full") && reason.contains(text(&destination)), "{reason}");

    let mut client = pair.b.nbd("vm");
    // Reads go on, even of what has not arrived and has nowhere to stay.
    for block in [0, 20, 159, 158, 100] {
        let bytes = client.read((block * BLOCK) as u64, BLOCK);
        assert_same(&format!("block {block} with the disk full"), &bytes, &disk.bytes[block * BLOCK..][..BLOCK]);
    }
    // A write that has no room is an error, and what it was to replace is still there.
    let at = 159 * BLOCK;
    let written = client.try_write(at as u64, &[7; BLOCK]);
    let expected = if written.is_ok() { vec![7; BLOCK] } else { disk.bytes[at..].to_vec() };
    if let Err(errno) = written {
        assert_eq!(errno, 28, "ENOSPC");
        let read = client.read(at as u64, BLOCK);
        let is_right = |(sector, (new, old)): (usize, (&[u8], &[u8]))| {
            let is = &read[sector * 512..][..512];
            is == new || is == old
        };
        let news = [7u8; BLOCK];
        let pairs = news.chunks(512).zip(disk.bytes[at..].chunks(512)).enumerate();
        assert!({ pairs }.all(is_right), "a failed write leaves each sector old or new");
    }
    assert_eq!(pair.b.phase("vm"), "stalled");

    std::fs::remove_file(inside.join("ballast")).expect("makes room");
    pair.b.wait_phase("vm", "released_from_source");
    let read = client.read_all();
    assert_same("the disk", &read[..at], &disk.bytes[..at]);
    if written.is_ok() {
        assert_same("the last block", &read[at..], &expected);
    }
    client.flush();
    drop(client);
    let raw =
        eventually("the file can be read", || std::fs::read(inside.join("vm.raw")).map_err(|error| error.to_string()));
    assert_same("the raw file", &raw, &read);
    let ran = run(Command::new("ls").arg(small.path()));
    assert_eq!(ran.out.trim(), "", "nothing is left outside of the namespace");
    pair.b.stop();
}
