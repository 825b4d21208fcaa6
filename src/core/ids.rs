//! Names and units that every other module speaks in: block ids, sizes, indices, classes, volume names.
//! Pure: must not know tokio, files, clocks or peers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes in a sector: the unit in which a guest's partial write to an absent block is remembered.
pub const SECTOR_BYTES: u32 = 512;

/// BLAKE3-256 of a block's bytes. [`BlockId::ZERO`] is not a hash but the flag "every byte is zero".
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct BlockId(pub [u8; 32]);

impl BlockId {
    /// The flag for an all-zero block: never stored, never sent. (No input with this BLAKE3 hash is known.)
    pub const ZERO: BlockId = BlockId([0; 32]);

    /// The id of a block's bytes: [`BlockId::ZERO`] when all of them are zero, their BLAKE3-256 otherwise.
    pub fn of(bytes: &[u8]) -> BlockId {
        if is_zero(bytes) { BlockId::ZERO } else { BlockId(*blake3::hash(bytes).as_bytes()) }
    }

    /// Whether this is the flag for an all-zero block.
    pub fn is_zero(&self) -> bool {
        *self == BlockId::ZERO
    }
}

impl fmt::Debug for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_zero() {
            return f.write_str("zero");
        }
        for byte in &self.0[..8] {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Whether every byte is zero. An OR-fold over 16-byte lanes: the compiler vectorises it, unlike an early exit per byte.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most non-zero blocks show it at once.
    if let Some(first) = bytes.first()
        && *first != 0
    {
        return false;
    }
    bytes.chunks(4096).all(|chunk| {
        let mut lanes = chunk.chunks_exact(16);
        let folded = lanes.by_ref().fold(0u128, |acc, lane| {
            acc | u128::from_ne_bytes(lane.try_into().expect("chunks_exact(16) yields 16 bytes"))
        });
        folded == 0 && lanes.remainder().iter().all(|byte| *byte == 0)
    })
}

/// The size of a block in bytes: a power of two from 16 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct BlockSize(u32);

/// Why a number is no block size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a block size of {0} bytes is not possible: it must be a power of two from 16KiB (16384) to 1MiB (1048576)")]
pub struct BadBlockSize(pub u64);

impl BlockSize {
    /// 16 KiB.
    pub const MIN: BlockSize = BlockSize(16 << 10);
    /// 64 KiB.
    pub const DEFAULT: BlockSize = BlockSize(64 << 10);
    /// 1 MiB.
    pub const MAX: BlockSize = BlockSize(1 << 20);

    /// Checks `bytes`.
    pub fn new(bytes: u64) -> Result<BlockSize, BadBlockSize> {
        if bytes.is_power_of_two() && (u64::from(Self::MIN.0)..=u64::from(Self::MAX.0)).contains(&bytes) {
            Ok(BlockSize(bytes as u32))
        } else {
            Err(BadBlockSize(bytes))
        }
    }

    /// In bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }

    /// How many blocks an image of `size_bytes` has; the last one may be short.
    pub fn blocks(self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(u64::from(self.0))
    }

    /// The block that holds byte `offset`.
    pub fn index_of(self, offset: u64) -> BlockIndex {
        BlockIndex(offset >> self.0.trailing_zeros())
    }

    /// The first byte of a block.
    pub fn offset_of(self, index: BlockIndex) -> u64 {
        index.0 << self.0.trailing_zeros()
    }

    /// How many bytes block `index` of an image of `size_bytes` has: less than a whole block only for the last one,
    /// 0 behind the end.
    pub fn len_of(self, index: BlockIndex, size_bytes: u64) -> u32 {
        size_bytes.saturating_sub(self.offset_of(index)).min(u64::from(self.0)) as u32
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = BadBlockSize;
    fn try_from(bytes: u32) -> Result<Self, BadBlockSize> {
        BlockSize::new(u64::from(bytes))
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.0
    }
}

/// The position of a block in its image, counted in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockIndex(pub u64);

/// The classes of transfer, in strict order: demand overtakes readahead, readahead overtakes bulk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Class {
    /// A guest waits for it.
    Demand = 0,
    /// A guest will probably ask for it soon.
    Readahead = 1,
    /// The background copy.
    Bulk = 2,
}

impl Class {
    /// All of them, the most urgent first.
    pub const ALL: [Class; 3] = [Class::Demand, Class::Readahead, Class::Bulk];

    /// The class with this number on the wire.
    pub fn from_wire(number: u8) -> Option<Class> {
        Class::ALL.get(usize::from(number)).copied()
    }

    /// Whether `self` is to be served before `other`.
    pub fn is_more_urgent_than(self, other: Class) -> bool {
        self < other
    }
}

/// The name of a volume or a peer: 1 to 128 of `A-Z a-z 0-9 . _ -`, not starting with a dot or a dash.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(std::sync::Arc<str>);

/// Why a string is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a usable name: take 1 to 128 of A-Z a-z 0-9 . _ - and do not start with . or -")]
pub struct BadName(pub String);

impl Name {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 128;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let fits = (1..=Self::MAX_BYTES).contains(&text.len())
            && !text.starts_with(['.', '-'])
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if fits { Ok(Name(text.into())) } else { Err(BadName(text.chars().take(160).collect())) }
    }
}

impl TryFrom<String> for Name {
    type Error = BadName;
    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &self.0)
    }
}

/// A random number that a site takes anew for each of its lives: a copy of its state, under the same key, has another.
/// [`Nonce::NONE`] stands for "none yet".
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Nonce(pub [u8; 16]);

/// Why a string is no nonce.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no nonce: it must be 32 hexadecimal digits")]
pub struct BadNonce(pub String);

impl Nonce {
    /// No nonce: what was never taken or never acknowledged.
    pub const NONE: Nonce = Nonce([0; 16]);

    /// Whether this stands for "none yet".
    pub fn is_none(&self) -> bool {
        *self == Nonce::NONE
    }
}

impl FromStr for Nonce {
    type Err = BadNonce;
    fn from_str(text: &str) -> Result<Self, BadNonce> {
        let mut bytes = [0; 16];
        match hex::decode_to_slice(text, &mut bytes) {
            Ok(()) => Ok(Nonce(bytes)),
            Err(_) => Err(BadNonce(text.chars().take(64).collect())),
        }
    }
}

impl TryFrom<String> for Nonce {
    type Error = BadNonce;
    fn try_from(text: String) -> Result<Self, BadNonce> {
        text.parse()
    }
}

impl From<Nonce> for String {
    fn from(nonce: Nonce) -> String {
        nonce.to_string()
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One life of a volume at a site, from its making to its removal: drawn at random, never used again. What is kept of a volume is kept
/// under this and not under its name, which comes again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Incarnation(pub [u8; 16]);

impl Incarnation {
    /// From random bytes, which the caller draws.
    pub fn from_bytes(bytes: [u8; 16]) -> Incarnation {
        Incarnation(bytes)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is no [`Incarnation`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no incarnation: 32 lowercase hexadecimal digits are expected")]
pub struct BadIncarnation(pub String);

impl FromStr for Incarnation {
    type Err = BadIncarnation;

    fn from_str(text: &str) -> Result<Incarnation, BadIncarnation> {
        let bad = || BadIncarnation(text.chars().take(64).collect());
        let digits: &[u8; 32] = text.as_bytes().try_into().map_err(|_| bad())?;
        let digit = |at: usize| match digits[at] {
            byte @ b'0'..=b'9' => Ok(byte - b'0'),
            byte @ b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(bad()),
        };
        let mut bytes = [0; 16];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = digit(2 * at)? << 4 | digit(2 * at + 1)?;
        }
        Ok(Incarnation(bytes))
    }
}

impl Serialize for Incarnation {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Incarnation {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Incarnation, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incarnations_are_told_by_their_text() {
        let incarnation = Incarnation(std::array::from_fn(|at| at as u8 * 17));
        let text = "00112233445566778899aabbccddeeff";
        assert_eq!(incarnation.to_string(), text);
        assert_eq!(text.parse::<Incarnation>().expect("its own text"), incarnation);
        assert_eq!(serde_json::to_string(&incarnation).expect("serializes"), format!("\"{text}\""));
        assert_eq!(serde_json::from_str::<Incarnation>(&format!("\"{text}\"")).expect("reads"), incarnation);
        for bad in
            ["", "00", &text.to_uppercase(), &text[1..], &format!("{text}0"), &"ä".repeat(16), &text.replace('f', "g")]
        {
            assert!(bad.parse::<Incarnation>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn nonces_are_hexadecimal_text() {
        let nonce = Nonce([0xa5; 16]);
        let json = serde_json::to_string(&nonce).expect("serialises");
        assert_eq!(json, format!("\"{}\"", "a5".repeat(16)));
        assert_eq!(serde_json::from_str::<Nonce>(&json).expect("reads back"), nonce);
        assert_eq!(format!("{nonce:?}"), "a5".repeat(16));
        for bad in ["", "a5", &"a5".repeat(17), &"g5".repeat(16)] {
            assert!(bad.parse::<Nonce>().is_err(), "{bad:?}");
        }
        assert!(Nonce::default().is_none() && !nonce.is_none());
    }

    #[test]
    fn block_sizes_are_powers_of_two_in_range() {
        for bytes in [0, 1, 4096, 8192, 65535, 65537, 96 << 10, 2 << 20, 1 << 40] {
            assert_eq!(BlockSize::new(bytes), Err(BadBlockSize(bytes)));
        }
        for shift in 14..=20 {
            assert_eq!(BlockSize::new(1 << shift).expect("in range").bytes(), 1 << shift);
        }
    }

    #[test]
    fn the_last_block_may_be_short() {
        let size = BlockSize::DEFAULT;
        let image_bytes = 3 * 65536 + 512;
        assert_eq!(size.blocks(image_bytes), 4);
        assert_eq!(size.len_of(BlockIndex(2), image_bytes), 65536);
        assert_eq!(size.len_of(BlockIndex(3), image_bytes), 512);
        assert_eq!(size.len_of(BlockIndex(4), image_bytes), 0);
        assert_eq!(size.index_of(65536 * 3 - 1), BlockIndex(2));
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        for len in [0usize, 1, 15, 16, 17, 4096, 4097, 65536] {
            let mut bytes = vec![0u8; len];
            assert!(is_zero(&bytes));
            assert!(BlockId::of(&bytes).is_zero());
            for at in [0, len / 2, len.saturating_sub(1)] {
                if at < len {
                    bytes[at] = 0x10;
                    assert!(!is_zero(&bytes), "length {len}, byte {at}");
                    assert!(!BlockId::of(&bytes).is_zero());
                    bytes[at] = 0;
                }
            }
        }
    }

    #[test]
    fn names_are_strict() {
        for good in ["vm1", "a", "web-01.example_x"] {
            assert_eq!(good.parse::<Name>().expect("a name").as_str(), good);
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\0", &"x".repeat(129)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }
}
