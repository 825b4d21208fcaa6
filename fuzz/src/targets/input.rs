//! Choices made of a fuzzer's bytes. Must not know what they choose.

/// Bytes, taken from the front; when there are none left, every choice is 0.
pub(super) struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Input<'a> {
        Input { rest: bytes }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn u8(&mut self) -> u8 {
        match self.rest.split_first() {
            Some((first, rest)) => {
                self.rest = rest;
                *first
            }
            None => 0,
        }
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from(self.u8()) << 8 | u16::from(self.u8())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from(self.u16()) << 16 | u32::from(self.u16())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from(self.u32()) << 32 | u64::from(self.u32())
    }

    pub(super) fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// One of `choices`.
    pub(super) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.u8()) % choices.len()]
    }

    /// A number that is likely to lie near one of `edges`.
    pub(super) fn near(&mut self, edges: &[u64]) -> u64 {
        let edge = self.one_of(edges);
        match self.u8() {
            shift @ 0..=127 => edge.wrapping_add(u64::from(shift) % 5).wrapping_sub(2),
            128..=191 => edge.wrapping_sub(u64::from(self.u16())),
            192..=251 => u64::from(self.u16()) << 4,
            _ => self.u64(),
        }
    }
}

/// A seeded generator (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to `end - 1`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Lengths into which a stream is cut: all at once, single bytes, or whatever `choice` leads to.
pub(super) fn pieces(choice: u8) -> impl FnMut() -> usize {
    let mut rng = Rng(u64::from(choice));
    move || match choice {
        0 => usize::MAX,
        1 => 1,
        2..=100 => 1 + rng.below(40),
        _ => 1 + rng.below(9000),
    }
}
