//! Counts the blocks of a chunk, in all block sizes at once. Must not know files or threads.
//!
//! Bytes are hashed once, in leaves of the smallest block size; a larger block is compared by the hash of its leaves'
//! hashes. Blocks are equal exactly when those are, which is all that counting needs.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::AddAssign;

use super::seen::{Digest, Holder, Origin, Seen};
use crate::core::frame::Frame;
use crate::core::ids::{BlockSize, is_zero};
use crate::core::manifest::PAGE_IDS;

/// The bytes of one image at one block size, by step; see the documentation of [`super`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) zero_bytes: u64,
    pub(super) within_bytes: u64,
    pub(super) across_bytes: u64,
    pub(super) prewarmed_bytes: u64,
    pub(super) unique_bytes: u64,
    /// What zstd leaves of `unique_bytes`.
    pub(super) compressed_bytes: u64,
    pub(super) unique_blocks: u64,
    /// Pages of the manifest.
    pub(super) pages: u64,
    /// Ids of non-zero blocks in those pages that no image had before.
    pub(super) new_page_ids: u64,
}

/// The non-zero part of one manifest page, whatever the order in which its blocks were counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PageCount {
    /// The sum of a hash for each block and its place: the same for pages of the same content.
    pub(super) content: u128,
    /// Non-zero blocks.
    pub(super) ids: u64,
}

/// What workers count; each list has an entry for each block size.
pub(super) struct Counts {
    pub(super) tallies: Vec<Tally>,
    /// By number of the page; pages of nothing but zeros have no entry.
    pub(super) pages: Vec<HashMap<u64, PageCount>>,
}

impl Counts {
    pub(super) fn new(block_sizes: usize) -> Counts {
        Counts { tallies: vec![Tally::default(); block_sizes], pages: vec![HashMap::new(); block_sizes] }
    }
}

/// Counts chunks of one image.
pub(super) struct Worker<'a> {
    block_sizes: &'a [BlockSize],
    seen: &'a [Seen],
    holder: Holder,
    zstd_level: i32,
    counts: Counts,
    leaves: Vec<Leaf>,
}

/// Bytes of the smallest block size, or what is left of them at the image's end.
struct Leaf {
    /// BLAKE3; for zeros, their number.
    hash: [u8; 32],
    is_zero: bool,
}

impl<'a> Worker<'a> {
    /// `block_sizes` must be ascending, `seen` has an entry for each.
    pub(super) fn new(block_sizes: &'a [BlockSize], seen: &'a [Seen], holder: Holder, zstd_level: i32) -> Worker<'a> {
        Worker { block_sizes, seen, holder, zstd_level, counts: Counts::new(block_sizes.len()), leaves: Vec::new() }
    }

    /// Counts a chunk that begins on a boundary of all block sizes, and ends on one or at the image's end.
    pub(super) fn count(&mut self, offset: u64, bytes: &[u8]) {
        let leaf_bytes = self.block_sizes[0].bytes() as usize;
        self.leaves.clear();
        self.leaves.extend(bytes.chunks(leaf_bytes).map(Leaf::of));
        for i in 0..self.block_sizes.len() {
            let block_bytes = self.block_sizes[i].bytes() as usize;
            let first = self.block_sizes[i].index_of(offset).0;
            let blocks = bytes.chunks(block_bytes).zip(self.leaves.chunks(block_bytes / leaf_bytes));
            for (index, (block, leaves)) in (first..).zip(blocks) {
                let tally = &mut self.counts.tallies[i];
                let len = block.len() as u64;
                let Some(digest) = digest_of(leaves) else {
                    tally.zero_bytes += len;
                    continue;
                };
                match self.seen[i].meet(digest, self.holder) {
                    Origin::Within => tally.within_bytes += len,
                    Origin::Across => tally.across_bytes += len,
                    Origin::Prewarmed => tally.prewarmed_bytes += len,
                    Origin::Nowhere => {
                        tally.unique_bytes += len;
                        tally.unique_blocks += 1;
                        // Nobody asks what prewarming sends.
                        if self.holder != Holder::PREWARMED {
                            tally.compressed_bytes += u64::from(Frame::encoded_payload_bytes(block, self.zstd_level));
                        }
                    }
                }
                if self.holder != Holder::PREWARMED {
                    self.counts.pages[i].entry(index / PAGE_IDS).or_default().add(index % PAGE_IDS, digest);
                }
            }
        }
    }

    pub(super) fn into_counts(self) -> Counts {
        self.counts
    }
}

impl Leaf {
    fn of(bytes: &[u8]) -> Leaf {
        let is_zero = is_zero(bytes);
        let hash = if is_zero {
            let mut length = [0; 32];
            length[..8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            length
        } else {
            *blake3::hash(bytes).as_bytes()
        };
        Leaf { hash, is_zero }
    }
}

/// What a block is compared by; None for zeros.
fn digest_of(leaves: &[Leaf]) -> Option<Digest> {
    if leaves.iter().all(|leaf| leaf.is_zero) {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    for leaf in leaves {
        hasher.update(&leaf.hash);
    }
    Some(first_half(&hasher.finalize()))
}

fn first_half(hash: &blake3::Hash) -> Digest {
    let (halves, _) = hash.as_bytes().as_chunks::<16>();
    halves[0]
}

impl PageCount {
    fn add(&mut self, place: u64, digest: Digest) {
        let mut placed = [0; 24];
        placed[..16].copy_from_slice(&digest);
        placed[16..].copy_from_slice(&place.to_le_bytes());
        self.content = self.content.wrapping_add(u128::from_le_bytes(first_half(&blake3::hash(&placed))));
        self.ids += 1;
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        for (mine, theirs) in self.tallies.iter_mut().zip(other.tallies) {
            *mine += theirs;
        }
        for (mine, theirs) in self.pages.iter_mut().zip(other.pages) {
            for (page, count) in theirs {
                match mine.entry(page) {
                    Entry::Vacant(entry) => {
                        entry.insert(count);
                    }
                    Entry::Occupied(mut entry) => {
                        let sum = entry.get_mut();
                        sum.content = sum.content.wrapping_add(count.content);
                        sum.ids += count.ids;
                    }
                }
            }
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.zero_bytes += other.zero_bytes;
        self.within_bytes += other.within_bytes;
        self.across_bytes += other.across_bytes;
        self.prewarmed_bytes += other.prewarmed_bytes;
        self.unique_bytes += other.unique_bytes;
        self.compressed_bytes += other.compressed_bytes;
        self.unique_blocks += other.unique_blocks;
        self.pages += other.pages;
        self.new_page_ids += other.new_page_ids;
    }
}
