//! Seeded numbers for those who write and choose. Pure; not for secrets. Must not know what is drawn.

use blockferry_wan::rng::Rng;

/// The same seed gives the same numbers, on every machine.
#[derive(Clone, Debug)]
pub struct Random(Rng);

impl Random {
    /// Begins at `seed`.
    pub fn new(seed: u64) -> Random {
        Random(Rng::seeded(seed))
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `bound`, which is more than 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            piece.copy_from_slice(&self.number().to_le_bytes()[..piece.len()]);
        }
    }
}
