//! A disk of 1 TiB, nearly all of it hole: memory of both daemons stays small, and time is that of the data.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::disk::{BLOCK, Rng, allocated_bytes, assert_same, text as some_text};
use crate::site::{Pair, Site, link, text};

const SIZE: u64 = 1 << 40;
const MEMORY_KIB: u64 = 300 << 10;

fn peak_memory_kib(site: &Site) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", site.pid())).expect("the daemon runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the peak of resident memory");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("kB")
}

#[track_caller]
fn assert_small(site: &Site, when: &str) {
    let peak = peak_memory_kib(site);
    assert!(peak < MEMORY_KIB, "site {} had {} MiB of memory {when}", site.name, peak >> 10);
}

#[test]
fn a_sparse_terabyte_relocates_in_little_memory() {
    let mut pair = Pair::start(link(200, 4));
    let image = pair.path("huge.raw");
    let file = File::create_new(&image).expect("makes an image");
    if let Err(error) = file.set_len(SIZE) {
        return crate::site::skipped(
            "a_sparse_terabyte_relocates_in_little_memory",
            &format!("no file of 1 TiB here: {error}"),
        );
    }
    let mut rng = Rng(110);
    let mut data: Vec<(u64, Vec<u8>)> = (0..64u64)
        .map(|nth| {
            let at = (SIZE / 64 * nth + rng.below(SIZE / 64 - 200_000)) / 512 * 512;
            (at, some_text(100_000, nth))
        })
        .collect();
    data.push((0, some_text(BLOCK, 200)));
    data.push((SIZE - 512, some_text(512, 201)));
    for (at, bytes) in &data {
        file.write_all_at(bytes, *at).expect("writes");
    }
    file.sync_all().expect("syncs");
    drop(file);
    pair.a.ok(&["volume", "add", "huge", "--image", text(&image)]);
    let destination = pair.relocate("huge", &[]);
    let mut client = pair.b.nbd("huge");
    let (at, bytes) = &data[40];
    assert_same("data in the middle, at once", &client.read(*at, bytes.len()), bytes);
    assert_same("a hole, at once", &client.read(SIZE / 3, BLOCK), &[0; BLOCK]);

    // Half-way, if it has not been too fast.
    pair.b.kill();
    pair.b.start();
    pair.b.wait_phase("huge", "released_from_source");
    assert_small(&pair.a, "at the source");
    assert_small(&pair.b, "at the destination");
    let mut client = pair.b.nbd("huge");
    for (at, bytes) in &data {
        assert_same(&format!("data at {at}"), &client.read(*at, bytes.len()), bytes);
    }
    drop(client);
    let moved = pair.wire_bytes();
    assert!(moved < 24 << 20, "{moved} bytes moved for 6 MiB of text and a root of 512 KiB");
    let (had, has) = (allocated_bytes(&image), allocated_bytes(&destination));
    assert!(has <= had + (64 + 2) * 2 * BLOCK as u64, "{had} bytes allocated at the source, {has} at the destination");

    // Ready again, with nothing but the record of it.
    pair.b.stop();
    pair.b.start();
    pair.a.stop();
    pair.a.start();
    let (at, bytes) = &data[12];
    assert_same("data after a restart", &pair.b.nbd("huge").read(*at, bytes.len()), bytes);
    assert_same("data after a restart", &pair.a.nbd("huge").read(*at, bytes.len()), bytes);
    assert_small(&pair.a, "after a restart of the source");
    assert_small(&pair.b, "after a restart of the destination");
}
