//! Disk images for tests: seeded, small, with all that images have (text, noise, zeros, holes, duplicates), and what
//! their blocks weigh when they are compressed. Must not know sites.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// The block size of a site that was not told another.
pub const BLOCK: usize = 64 << 10;

/// A seeded generator (splitmix64): a test that fails fails again.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to `end - 1`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Bytes that do not shrink.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Bytes that shrink to about a third.
pub fn text(len: usize, seed: u64) -> Vec<u8> {
    const WORDS: [&[u8]; 16] = [
        b"block ",
        b"store ",
        b"volume ",
        b"relocate",
        b"guest\n",
        b"sector ",
        b"page ",
        b"manifest",
        b"epoch ",
        b"owner ",
        b"journal ",
        b"flush;\n",
        b"residency",
        b"demand ",
        b"bulk ",
        b"hash ",
    ];
    let mut bytes = Vec::with_capacity(len + 16);
    for byte in noise(len / 5 + 16, seed) {
        bytes.extend_from_slice(WORDS[usize::from(byte & 15)]);
        if byte & 0x30 == 0 {
            bytes.push(byte);
        }
        if bytes.len() >= len {
            break;
        }
    }
    bytes.resize(len, b'.');
    bytes
}

/// What lies in the blocks of an image; zeros are holes in the file unless they are listed in `written_zeros`.
#[derive(Clone)]
pub struct Disk {
    pub bytes: Vec<u8>,
    written_zeros: HashSet<usize>,
}

impl Disk {
    /// Noise, text, zeros, holes, duplicates and blocks that are half empty; the last block is `tail` bytes short of one.
    pub fn mixed(seed: u64, blocks: usize, tail: usize) -> Disk {
        let mut rng = Rng(seed);
        let mut disk = Disk { bytes: vec![0; blocks * BLOCK + tail], written_zeros: HashSet::new() };
        for block in 0..blocks {
            let content = match rng.below(20) {
                0..5 => noise(BLOCK, rng.next()),
                5..11 => text(BLOCK, rng.next()),
                11..13 => {
                    disk.written_zeros.insert(block);
                    continue;
                }
                13..16 => continue,
                16..18 if block > 0 => {
                    let twin = rng.below(block as u64) as usize;
                    disk.bytes[twin * BLOCK..][..BLOCK].to_vec()
                }
                _ => [vec![0; BLOCK / 2], text(BLOCK / 2, rng.next())].concat(),
            };
            disk.bytes[block * BLOCK..][..BLOCK].copy_from_slice(&content);
        }
        let last = text(tail, rng.next());
        disk.bytes[blocks * BLOCK..].copy_from_slice(&last);
        disk
    }

    /// Nothing but noise: what moves is what there is.
    pub fn noisy(seed: u64, blocks: usize) -> Disk {
        Disk { bytes: noise(blocks * BLOCK, seed), written_zeros: HashSet::new() }
    }

    /// A sibling: about one block in `every` is another, the rest is shared, some of it at another place.
    pub fn sibling(&self, seed: u64, every: u64) -> Disk {
        let mut rng = Rng(seed);
        let mut sibling = self.clone();
        let blocks = self.bytes.len() / BLOCK;
        for block in 0..blocks {
            if rng.below(every) == 0 {
                let new = if rng.below(2) == 0 { noise(BLOCK, rng.next()) } else { text(BLOCK, rng.next()) };
                sibling.bytes[block * BLOCK..][..BLOCK].copy_from_slice(&new);
            } else if rng.below(8) == 0 {
                let from = rng.below(blocks as u64) as usize;
                sibling.bytes[block * BLOCK..][..BLOCK].copy_from_slice(&self.bytes[from * BLOCK..][..BLOCK]);
            }
        }
        sibling
    }

    /// Makes the raw file.
    pub fn write_to(&self, path: &Path) {
        let file = File::create_new(path).expect("makes an image");
        file.set_len(self.bytes.len() as u64).expect("sizes an image");
        for (block, bytes) in self.bytes.chunks(BLOCK).enumerate() {
            if self.written_zeros.contains(&block) || bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(bytes, (block * BLOCK) as u64).expect("fills an image");
            }
        }
        // What is allocated is counted only when it has been written out.
        file.sync_all().expect("syncs an image");
    }
}

/// What the distinct, non-zero blocks of `wanted` that `known` does not have weigh: zstd level 3, or raw if that is less.
pub fn compressed_bytes_missing(known: &[&[u8]], wanted: &[&[u8]]) -> u64 {
    let mut seen: HashSet<blake3::Hash> =
        known.iter().flat_map(|image| image.chunks(BLOCK)).map(blake3::hash).collect();
    let mut bytes = 0;
    for block in wanted.iter().flat_map(|image| image.chunks(BLOCK)) {
        if block.iter().any(|byte| *byte != 0) && seen.insert(blake3::hash(block)) {
            let compressed = zstd::bulk::compress(block, 3).expect("compresses");
            bytes += compressed.len().min(block.len()) as u64;
        }
    }
    bytes
}

/// Bytes that the file system has allocated for a file.
pub fn allocated_bytes(path: &Path) -> u64 {
    let file = File::open(path).expect("opens");
    file.sync_all().expect("syncs");
    file.metadata().expect("examines").blocks() * 512
}

/// Fails with the first difference, not with megabytes of it.
#[track_caller]
pub fn assert_same(what: &str, got: &[u8], expected: &[u8]) {
    assert_eq!(got.len(), expected.len(), "{what}: the size differs");
    if got == expected {
        return;
    }
    let differs = |(a, b): &(&[u8], &[u8])| a != b;
    let sectors: Vec<usize> = got
        .chunks(512)
        .zip(expected.chunks(512))
        .enumerate()
        .filter(|(_, pair)| differs(pair))
        .map(|(at, _)| at)
        .collect();
    let first = sectors[0] * 512;
    let zero = got[first..(first + 512).min(got.len())].iter().all(|byte| *byte == 0);
    panic!(
        "{what}: {} sectors differ, the first at byte {first} (block {}), where {}",
        sectors.len(),
        first / BLOCK,
        if zero { "zeros were read" } else { "other data were read" }
    );
}
