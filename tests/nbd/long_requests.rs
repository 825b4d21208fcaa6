//! Requests of many KiB, whose bytes go through pipes where that is possible: mixed with others, at depth, on a disk that runs
//! full, and by two clients on the same blocks. Must not know how the bytes go.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use blockferry::core::nbd::wire::{cmd, cmd_flag};
use blockferry::core::nbd::{NbdErrno, ReplyStyle};

use crate::client::Client;
use crate::disk::{BLOCK, Rng, assert_same, noise};
use crate::kinds::{EXPORT, Kind, STYLES, on_both_kinds};
use crate::site::{Site, text};
use crate::small_disk::{is_impossible, on_small_disk, seen_by};
use crate::targets::drive::Connection;

const MIB: usize = 1 << 20;

/// A length: mostly of those that go through pipes, at their limits, and beyond.
fn some_len(rng: &mut Rng) -> usize {
    let exact = [16_384, 16_385, 32_767, 32_768, 32_769, 65_536, 131_071, 131_072, 131_073, 262_143, 262_144, 262_145];
    let len = match rng.below(8) {
        0 => 512 * (1 + rng.below(16)),
        1 => 256 * 1024 + rng.below(768 * 1024),
        2..5 => return exact[rng.below(exact.len() as u64) as usize],
        _ => 16 * 1024 + rng.below(240 * 1024),
    };
    len as usize
}

/// A place for it.
fn some_range(rng: &mut Rng, len: usize, end: usize) -> Range<usize> {
    let align = [1, 512, 4096, 65_536][rng.below(4) as usize];
    let at = rng.below((end - len) as u64) as usize / align * align;
    at..at + len
}

/// What there is to be asked besides data.
enum Due {
    Read(Range<usize>),
    Trim(Range<usize>),
    Done,
}

/// Batches of requests of every kind in a client's own region of the disk, which begins at `start`; `model` is what it holds.
/// Within a batch, nothing is changed that is also read or changed otherwise: so every answer is certain.
fn work(client: &mut Client, seed: u64, start: u64, model: &mut [u8]) {
    let mut rng = Rng(seed);
    for batch in 0..30 {
        let mut due = HashMap::new();
        let mut taken: Vec<(Range<usize>, bool)> = Vec::new();
        for turn in 0..8 + rng.below(9) {
            let len = some_len(&mut rng);
            let mut range = some_range(&mut rng, len, model.len());
            let kind =
                [cmd::READ, cmd::READ, cmd::WRITE, cmd::WRITE, cmd::WRITE, cmd::FLUSH, cmd::WRITE_ZEROES, cmd::TRIM]
                    [rng.below(8) as usize];
            if kind == cmd::TRIM {
                range = range.start / 512 * 512..range.end / 512 * 512;
            }
            if kind == cmd::FLUSH {
                let raw = client.raw(cmd::FLUSH, 0, 0, 0);
                due.insert(client.submit(&raw, &[]), Due::Done);
                continue;
            }
            let changes = kind != cmd::READ;
            let meets = |other: &Range<usize>| other.start < range.end && range.start < other.end;
            if taken.iter().any(|(other, has_changed)| (changes || *has_changed) && meets(other)) {
                continue;
            }
            taken.push((range.clone(), changes));
            let may_be_whole = client.style() != ReplyStyle::Simple && rng.below(2) == 0;
            let flags = match kind {
                cmd::READ if may_be_whole => cmd_flag::DF,
                cmd::WRITE if rng.below(8) == 0 => cmd_flag::FUA,
                cmd::WRITE_ZEROES if rng.below(2) == 0 => cmd_flag::NO_HOLE,
                _ => 0,
            };
            let raw = client.raw(kind, flags, start + range.start as u64, range.len() as u64);
            let payload =
                if kind == cmd::WRITE { noise(range.len(), seed << 32 | batch << 8 | turn) } else { Vec::new() };
            let cookie = client.submit(&raw, &payload);
            match kind {
                cmd::WRITE => model[range.clone()].copy_from_slice(&payload),
                cmd::WRITE_ZEROES => model[range.clone()].fill(0),
                _ => {}
            }
            due.insert(
                cookie,
                match kind {
                    cmd::READ => Due::Read(range),
                    cmd::TRIM => Due::Trim(range),
                    _ => Due::Done,
                },
            );
        }
        let segment = [usize::MAX, usize::MAX, 131_072, 65_537, 9_999, 1_021][rng.below(6) as usize];
        let mut trimmed = Vec::new();
        for (cookie, answer) in client.connection.drain_in_segments(segment) {
            assert_eq!(answer.errno, None, "seed {seed}, batch {batch}");
            match due.remove(&cookie).expect("it was asked") {
                Due::Read(range) => {
                    let what = format!("seed {seed}, batch {batch}: {} bytes at {}", range.len(), range.start);
                    assert_same(&what, &answer.data, &model[range]);
                }
                Due::Trim(range) => trimmed.push(range),
                Due::Done => {}
            }
        }
        assert!(due.is_empty());
        for range in trimmed.into_iter().filter(|range| !range.is_empty()) {
            let now = client.read(start + range.start as u64, range.len() as u64);
            let is_one = now.iter().zip(&model[range.clone()]).all(|(now, was)| *now == 0 || now == was);
            assert!(is_one, "seed {seed}, batch {batch}: TRIM of {range:?}");
            model[range].copy_from_slice(&now);
        }
    }
}

/// Clients of every reply style at once, each beside a model of its own region. The regions meet within pages.
#[test]
fn long_requests_of_several_clients_beside_models() {
    const REGION: usize = 4 * MIB + 1536;
    on_both_kinds(30, 320, |kind| {
        let mut model = kind.bytes.clone();
        let clients = STYLES.map(|style| Client::new(kind.connect(style, 0)));
        std::thread::scope(|scope| {
            for (nth, (mut client, region)) in clients.into_iter().zip(model.chunks_mut(REGION)).enumerate() {
                scope.spawn(move || work(&mut client, 300 + nth as u64, (nth * REGION) as u64, region));
            }
        });
        let mut reader = Client::new(kind.connect(ReplyStyle::Structured, 0));
        reader.succeeds(cmd::FLUSH, 0, 0, 0);
        let worked = STYLES.len() * REGION;
        for (nth, expected) in model[..worked].chunks(100_000).enumerate() {
            let got = reader.read(nth as u64 * 100_000, expected.len() as u64);
            assert_same(&format!("bytes from {} on", nth * 100_000), &got, expected);
        }
        if let Some(path) = kind.file() {
            assert_same("the raw file", &std::fs::read(path).expect("reads"), &model);
        }
    });
}

/// What the file holds of a block that has not come is nobody's business, even if it is in the page cache.
#[test]
fn long_reads_of_blocks_of_which_some_sectors_are_here() {
    on_both_kinds(31, 160, |kind| {
        let mut model = kind.bytes.clone();
        let mut client = Client::new(kind.connect(ReplyStyle::Simple, 0));
        for block in (3..100).step_by(7) {
            // Every page of it gets into the page cache.
            for page in 0..BLOCK / 4096 {
                let at = block * BLOCK + page * 4096;
                let data = noise(512, at as u64);
                client.write(at as u64, &data);
                model[at..at + 512].copy_from_slice(&data);
            }
            let (at, len) = [(0, BLOCK), (0, BLOCK / 2), (BLOCK / 2, BLOCK), (4096, BLOCK - 4096)][block % 4];
            let range = block * BLOCK + at..block * BLOCK + at + len;
            assert_same(&format!("block {block}"), &client.read(range.start as u64, len as u64), &model[range]);
        }
    });
}

/// No room is left in the middle of many long writes: that is said of each, what was acknowledged is there, and when there is
/// room again everything goes on.
#[test]
fn long_writes_that_fill_the_disk() {
    if is_impossible("long_writes_that_fill_the_disk") {
        return;
    }
    let dir = tempfile::Builder::new().prefix("ferry").tempdir().expect("a directory");
    let small = dir.path().join("small");
    std::fs::create_dir(&small).expect("makes the folder");
    let mut site = Site::new(dir.path(), "a");
    site.launcher = on_small_disk(&small, 12);
    site.start();
    let inside = seen_by(site.pid(), &small);
    let size = 16 * MIB;
    File::create(inside.join("disk.raw")).expect("makes an image").set_len(size as u64).expect("sizes it");
    std::fs::write(inside.join("ballast"), vec![1; 6 * MIB]).expect("makes ballast");
    site.ok(&["volume", "add", EXPORT, "--image", text(&small.join("disk.raw"))]);
    let mut model = vec![0; size];
    for style in STYLES {
        let mut client = Client::new(Connection::open(&site.socket(), EXPORT, style, 0));
        let lens = [131_072, 65_536, 100_000, 40_000, 131_072, 50_001];
        let mut ranges = Vec::new();
        let mut at = 1000;
        while at + 131_072 < 9 * MIB {
            let len = lens[ranges.len() % lens.len()];
            ranges.push(at..at + len);
            at += len;
        }
        let mut failed = Vec::new();
        for (nth, batch) in ranges.chunks(16).enumerate() {
            let mut due = HashMap::new();
            for range in batch {
                let data = noise(range.len(), (nth * range.end) as u64);
                let raw = client.raw(cmd::WRITE, 0, range.start as u64, range.len() as u64);
                due.insert(client.submit(&raw, &data), (range.clone(), data));
            }
            for (cookie, answer) in client.connection.drain_in_segments(usize::MAX) {
                let (range, data) = due.remove(&cookie).expect("it was asked");
                match answer.errno {
                    None => model[range].copy_from_slice(&data),
                    Some(errno) => {
                        assert_eq!(errno, NbdErrno::NoSpc);
                        failed.push((range, data));
                    }
                }
            }
        }
        assert!(failed.len() > 16, "{} of {} writes found no room", failed.len(), ranges.len());
        assert!(failed.len() + 16 < ranges.len(), "{} of {} writes found no room", failed.len(), ranges.len());
        // A part of each may have been written.
        for (range, data) in &failed {
            let now = client.read(range.start as u64, range.len() as u64);
            let mut all = now.iter().zip(&model[range.clone()]).zip(data);
            assert!(all.all(|((now, was), new)| now == was || now == new), "{style:?}: bytes of others in {range:?}");
            model[range.clone()].copy_from_slice(&now);
        }
        for range in &ranges {
            let now = client.read(range.start as u64, range.len() as u64);
            assert_same(&format!("{style:?}: {range:?}"), &now, &model[range.clone()]);
        }
        // Room comes back.
        let ballast = inside.join("ballast");
        File::options().write(true).open(&ballast).and_then(|file| file.set_len(0)).expect("makes room");
        for (range, data) in &failed {
            client.write(range.start as u64, data);
            model[range.clone()].copy_from_slice(data);
        }
        client.succeeds(cmd::FLUSH, 0, 0, 0);
        assert_same("the raw file", &std::fs::read(inside.join("disk.raw")).expect("reads"), &model);
        // As it was for the next.
        client.succeeds(cmd::TRIM, 0, 0, size as u64);
        model.fill(0);
        std::fs::write(&ballast, vec![1; 6 * MIB]).expect("makes ballast");
    }
    site.stop();
}

/// What tells a word from all others on the disk, and from none.
fn place_of(sector: u64, word: usize) -> u64 {
    (sector << 8) + word as u64 + 1
}

/// What a client's write of this number puts into a sector: every word says whose it is, so that any other is noticed.
fn sector_of(sector: u64, version: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (at, word) in bytes.chunks_mut(8).enumerate() {
        word.copy_from_slice(&(version << 32 | place_of(sector, at)).to_be_bytes());
    }
    bytes
}

/// Which version a word is of; it may not be of any other place.
#[track_caller]
fn version_of(word: &[u8], at: usize, sector: u64) -> u64 {
    let word = word.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    assert_eq!(word & 0xffff_ffff, place_of(sector, at), "sector {sector} holds what was written elsewhere");
    word >> 32
}

const WRITERS: u64 = 2;
const AREA_SECTORS: u64 = 1024;
const BATCHES: u64 = 40;

/// Writes and reads all over the area, at depth, as others do.
fn meddle(client: &mut Client, writer: u64, start: u64) {
    let mut rng = Rng(400 + writer);
    let mut torn = 0;
    for batch in 1..=BATCHES {
        let mut due = HashMap::new();
        for turn in 0..12 {
            let sectors = 64 + rng.below(193);
            let first = rng.below(AREA_SECTORS - sectors);
            let is_read = turn % 2 == 0;
            let version = batch * WRITERS + writer;
            let data: Vec<u8> = match is_read {
                true => Vec::new(),
                false => (first..first + sectors).flat_map(|sector| sector_of(sector, version)).collect(),
            };
            let raw = client.raw(if is_read { cmd::READ } else { cmd::WRITE }, 0, start + first * 512, sectors * 512);
            due.insert(client.submit(&raw, &data), (is_read, first, sectors));
        }
        for (cookie, answer) in client.connection.drain_in_segments([usize::MAX, 50_001][batch as usize % 2]) {
            assert_eq!(answer.errno, None);
            let (is_read, first, sectors) = due.remove(&cookie).expect("it was asked");
            let sectors = if is_read { first..first + sectors } else { 0..0 };
            assert_eq!(answer.data.len() as u64, 512 * (sectors.end - sectors.start));
            for (sector, bytes) in sectors.zip(answer.data.chunks(512)) {
                let versions: Vec<u64> =
                    bytes.chunks(8).enumerate().map(|(at, word)| version_of(word, at, sector)).collect();
                // Of one's own none that was not sent yet; the other's clock is the other's.
                let is_known = |version: &u64| {
                    *version <= (BATCHES + 1) * WRITERS && (version % WRITERS != writer || version / WRITERS <= batch)
                };
                assert!(versions.iter().all(is_known), "sector {sector} has the versions {versions:?}");
                torn += usize::from(versions.iter().any(|version| *version != versions[0]));
            }
        }
    }
    // Page caches promise no more to who reads while another writes.
    eprintln!("{torn} sectors were read while they were being written");
}

/// Replies to long reads wait in the socket while what they were read from is written over, discarded, or both: what is taken in the
/// end was there at some time between the request and the reply.
#[test]
fn replies_that_are_taken_when_the_disk_has_changed() {
    const SECTORS: u64 = 48 * 256;
    let all = |version: u64| (0..SECTORS).flat_map(move |sector| sector_of(sector, version)).collect::<Vec<u8>>();
    on_both_kinds(33, 140, |kind| {
        let mut other = Client::new(kind.connect(ReplyStyle::Structured, 0));
        for (nth, (discards, writes)) in [(true, false), (false, true), (true, true)].into_iter().enumerate() {
            let (old, new) = (2 * nth as u64 + 1, 2 * nth as u64 + 2);
            let at = 512 * 3;
            other.write(at, &all(old));
            let mut late = Client::new(kind.connect(STYLES[nth], 0));
            let mut due = HashMap::new();
            for first in (0..SECTORS).step_by(256) {
                let raw = late.raw(cmd::READ, 0, at + first * 512, 131_072);
                due.insert(late.submit(&raw, &[]), first);
            }
            assert!(late.connection.send());
            // Its first replies are under way when another's request has been answered.
            other.succeeds(cmd::FLUSH, 0, 0, 0);
            if discards {
                // Within sectors and pages at both ends.
                other.succeeds(cmd::TRIM, 0, at + 512 * 5, 512 * (SECTORS - 9));
            }
            if writes {
                other.write(at, &all(new));
            }
            for (cookie, answer) in late.connection.drain() {
                assert_eq!(answer.errno, None);
                let first = due.remove(&cookie).expect("it was asked");
                for (sector, bytes) in (first..).zip(answer.data.chunks(512)) {
                    let (was, is) = (sector_of(sector, old), sector_of(sector, new));
                    // By words: some may have been read while they were written.
                    let is_right = bytes
                        .chunks(8)
                        .zip(was.chunks(8).zip(is.chunks(8)))
                        .all(|(word, (was, is))| word == was || writes && word == is || discards && word == [0; 8]);
                    assert!(is_right, "round {nth}: sector {sector} begins with {:?}", &bytes[..16]);
                }
            }
        }
    });
}

/// Every sector is one of those that were written there, whoever wrote, and however long the reply was on its way.
#[test]
fn two_clients_on_the_same_blocks() {
    on_both_kinds(32, 64, |kind: &Kind| {
        let start = 5 * BLOCK as u64 + 512;
        let mut clients = [STYLES[0], STYLES[2]].map(|style| Client::new(kind.connect(style, 0)));
        let first: Vec<u8> = (0..AREA_SECTORS).flat_map(|sector| sector_of(sector, 0)).collect();
        clients[0].write(start, &first);
        std::thread::scope(|scope| {
            for (writer, client) in clients.iter_mut().enumerate() {
                scope.spawn(move || meddle(client, writer as u64, start));
            }
        });
        let [first, second] = clients.each_mut().map(|client| client.read(start, AREA_SECTORS * 512));
        assert_same("what both read in the end", &first, &second);
        for (sector, bytes) in first.chunks(512).enumerate() {
            let version = version_of(&bytes[..8], 0, sector as u64);
            assert_same("a sector in the end", bytes, &sector_of(sector as u64, version));
        }
        if let Some(path) = kind.file() {
            let mut file = vec![0; first.len()];
            File::open(path).expect("opens").read_exact_at(&mut file, start).expect("reads");
            assert_same("the raw file", &file, &first);
        }
    });
}
