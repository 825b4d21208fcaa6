//! What has been seen so far, at one block size, and where it was seen last: compact, and shared by all workers.
//! Must not know images, files or reports.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use parking_lot::Mutex;

/// The first 16 bytes of a BLAKE3 hash: among 2^40 blocks two different ones collide with probability 2^-49.
pub(super) type Digest = [u8; 16];

/// Whose content it is: the prewarmed images together are 0, the images of the list count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder(pub(super) u32);

impl Holder {
    /// All prewarmed images.
    pub(super) const PREWARMED: Holder = Holder(0);
}

/// Where content was before it was looked at now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Earlier in the same image.
    Within,
    /// In an earlier image of the list.
    Across,
    /// In a prewarmed image, and in no earlier one of the list.
    Prewarmed,
    /// Nowhere.
    Nowhere,
}

/// Digests and who held each of them last. About 27 bytes of memory for each; sharded, so that workers seldom wait.
pub(super) struct Seen {
    shards: Vec<Mutex<HashMap<Digest, Holder, BuildHasherDefault<FirstBytes>>>>,
}

impl Seen {
    const SHARDS: usize = 64;

    pub(super) fn new() -> Seen {
        Seen { shards: (0..Self::SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// Where `digest` was; from now on it is `holder`'s. Holders must come in order: 0, 1, 2...
    pub(super) fn meet(&self, digest: Digest, holder: Holder) -> Origin {
        // The map uses the first bytes, the choice of a shard the last.
        let shard = &self.shards[usize::from(digest[15]) % Self::SHARDS];
        match shard.lock().insert(digest, holder) {
            None => Origin::Nowhere,
            Some(last) if last == holder => Origin::Within,
            Some(Holder::PREWARMED) => Origin::Prewarmed,
            Some(_) => Origin::Across,
        }
    }
}

/// Digests are uniformly distributed already: their first bytes are as good a hash as any.
#[derive(Default)]
pub(super) struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk::<8>() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    /// The length of the array, which is always the same.
    fn write_usize(&mut self, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_holder_decides() {
        let seen = Seen::new();
        let (a, b) = ([1; 16], [2; 16]);
        assert_eq!(seen.meet(a, Holder::PREWARMED), Origin::Nowhere);
        assert_eq!(seen.meet(a, Holder::PREWARMED), Origin::Within);
        assert_eq!(seen.meet(a, Holder(1)), Origin::Prewarmed);
        assert_eq!(seen.meet(a, Holder(1)), Origin::Within);
        assert_eq!(seen.meet(b, Holder(1)), Origin::Nowhere);
        assert_eq!(seen.meet(a, Holder(3)), Origin::Across);
        assert_eq!(seen.meet(b, Holder(3)), Origin::Across);
        assert_eq!(seen.meet(b, Holder(3)), Origin::Within);
    }

    #[test]
    fn digests_are_spread_by_their_first_bytes() {
        use std::hash::BuildHasher;
        let build = BuildHasherDefault::<FirstBytes>::default();
        let mut digest = [0u8; 16];
        digest[..8].copy_from_slice(&0x0123_4567_89ab_cdefu64.to_le_bytes());
        assert_eq!(build.hash_one(digest), 0x0123_4567_89ab_cdef);
    }
}
