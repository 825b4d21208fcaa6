//! A small seeded random generator: the same seed gives the same images for ever. Pure; not for secrets.
//! Must not know: what is drawn.

use blockferry_lab::random::Random;

/// Numbers by seed and purpose.
#[derive(Clone, Debug)]
pub struct Rng(Random);

impl Rng {
    /// A generator of its own for each seed and purpose, so that a draw more for one leaves the others as they were.
    pub fn for_purpose(seed: u64, purpose: &str) -> Rng {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(purpose.as_bytes());
        let mut first = [0; 8];
        hasher.finalize_xof().fill(&mut first);
        Rng(Random::new(u64::from_le_bytes(first)))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0.number()
    }

    /// A number below `bound`; 0 when `bound` is 0. (The bias is below 2^-32 for the bounds used here.)
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.0.below(bound) }
    }

    /// A number from `low` up to and without `high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low))
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of them; `None` of nothing.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        of.get(self.below(of.len() as u64) as usize)
    }

    /// Fills with bytes that no compressor shrinks.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }

    /// Puts them into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_by_seed_and_purpose() {
        let draw = |seed, purpose| Rng::for_purpose(seed, purpose).next_u64();
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
    }

    #[test]
    fn stays_in_bounds_and_keeps_what_it_shuffles() {
        let mut rng = Rng::for_purpose(1, "test");
        assert!((0..1000).all(|_| (3..7).contains(&rng.between(3, 7))));
        assert_eq!((rng.below(0), rng.between(5, 5)), (0, 5));
        assert_eq!(rng.pick::<u8>(&[]), None);
        let mut items: Vec<u32> = (0..100).collect();
        rng.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
