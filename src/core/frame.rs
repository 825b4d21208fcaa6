//! How a block looks when it is stored or sent: compressed with zstd, or raw where that does not shrink it.
//! Pure: must not know where frames are kept or who sends them. What it is given is parsed as hostile input.
//!
//! A frame in bytes, all integers little-endian:
//!
//! | offset | bytes | field                                                                         |
//! |--------|-------|-------------------------------------------------------------------------------|
//! | 0      | 1     | version: [`VERSION`]                                                          |
//! | 1      | 1     | encoding: 0 raw, 1 zstd                                                       |
//! | 2      | 2     | reserved: 0                                                                   |
//! | 4      | 4     | length of the block, in bytes: at most [`MAX_RAW_BYTES`]                      |
//! | 8      | rest  | payload: the block itself, or one zstd frame that is shorter than the block   |

use std::cell::RefCell;

use bytes::{BufMut, Bytes, BytesMut};
use zstd::bulk::{Compressor, Decompressor};

use crate::core::ids::BlockId;

/// The layout above. Version 1 is the first.
pub const VERSION: u8 = 1;

/// Bytes before the payload.
pub const HEADER_BYTES: usize = 8;

/// The most that a frame may announce or expand to, in bytes: one block of the largest size ([`BlockSize::MAX`]).
///
/// [`BlockSize::MAX`]: crate::core::ids::BlockSize::MAX
pub const MAX_RAW_BYTES: u32 = 1 << 20;

/// How a payload is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// The block's own bytes.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// One block, ready to be stored or sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// How `payload` is encoded.
    pub encoding: Encoding,
    /// The block's length in bytes.
    pub raw_len_bytes: u32,
    /// The encoded block.
    pub payload: Bytes,
}

/// Why bytes are no frame, or not the frame of the block that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than a header.
    #[error("a frame of {have} bytes has no complete header of {HEADER_BYTES}")]
    Truncated {
        /// Bytes that came.
        have: usize,
    },
    /// Written by a version that this one does not know.
    #[error("a frame of version {0}, this program knows version {VERSION}")]
    Version(u8),
    /// An encoding that this version does not know.
    #[error("a frame of unknown encoding {0}")]
    Encoding(u8),
    /// Reserved bytes that are set.
    #[error("a frame with reserved bits set: {0:#06x}")]
    Reserved(u16),
    /// More than any block has.
    #[error("a frame announces {announced} bytes, a block has at most {MAX_RAW_BYTES}")]
    TooLarge {
        /// What the header says.
        announced: u32,
    },
    /// The payload is not as long as its kind must be, or expands to another length than announced.
    #[error("a frame announces {announced} bytes and carries {actual}")]
    Length {
        /// What the header says.
        announced: u32,
        /// Length of the raw payload, of the zstd payload that saves nothing, or of what it expanded to.
        actual: u64,
    },
    /// Not what zstd accepts, or more than was announced.
    #[error("a frame does not decompress: {0}")]
    Zstd(String),
    /// A well-formed frame of another block.
    #[error("a frame of block {actual} came as block {expected}")]
    WrongBlock {
        /// The id that was asked for.
        expected: BlockId,
        /// The id of what came.
        actual: BlockId,
    },
}

impl Frame {
    /// Encodes a block: with zstd at `level` (-7 to 22) where that makes it shorter, raw where it does not.
    ///
    /// # Panics
    /// On a block of more than [`MAX_RAW_BYTES`]: no caller has one.
    pub fn encode(raw: &Bytes, level: i32) -> Frame {
        let raw_len_bytes = checked_len(raw);
        match compress(raw, level, Bytes::copy_from_slice) {
            Some(payload) => Frame { encoding: Encoding::Zstd, raw_len_bytes, payload },
            None => Frame { encoding: Encoding::Raw, raw_len_bytes, payload: raw.clone() },
        }
    }

    /// How many bytes the payload of [`Frame::encode`] would have, without keeping it.
    ///
    /// # Panics
    /// As [`Frame::encode`].
    pub fn encoded_payload_bytes(raw: &[u8], level: i32) -> u32 {
        let raw_len_bytes = checked_len(raw);
        compress(raw, level, |payload| payload.len() as u32).unwrap_or(raw_len_bytes)
    }

    /// The block's bytes, unverified. Never allocates more than `raw_len_bytes`, and never more than [`MAX_RAW_BYTES`].
    pub fn decode(&self) -> Result<Bytes, FrameError> {
        let view = View { encoding: self.encoding, raw_len_bytes: self.raw_len_bytes, payload: &self.payload };
        view.check()?;
        match self.encoding {
            Encoding::Raw => Ok(self.payload.clone()),
            Encoding::Zstd => view.decode(),
        }
    }

    /// The block's bytes, which are those of block `id`.
    pub fn decode_verified(&self, id: &BlockId) -> Result<Bytes, FrameError> {
        verify(self.decode()?, id)
    }

    /// As [`Frame::from_bytes`] and [`Frame::decode_verified`], without copying a compressed payload first.
    pub fn decode_verified_from(bytes: &[u8], id: &BlockId) -> Result<Bytes, FrameError> {
        verify(View::parse(bytes)?.decode()?, id)
    }

    /// Length of [`Frame::to_bytes`].
    pub fn len_bytes(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }

    /// The header of [`Frame::to_bytes`]; the payload follows it.
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        let len = self.raw_len_bytes.to_le_bytes();
        [VERSION, self.encoding as u8, 0, 0, len[0], len[1], len[2], len[3]]
    }

    /// The layout in this module's documentation.
    pub fn to_bytes(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(self.len_bytes());
        bytes.put_slice(&self.header());
        bytes.put_slice(&self.payload);
        bytes.freeze()
    }

    /// The reverse of [`Frame::to_bytes`]; the payload shares `bytes`.
    pub fn from_bytes(bytes: &Bytes) -> Result<Frame, FrameError> {
        let View { encoding, raw_len_bytes, .. } = View::parse(bytes)?;
        Ok(Frame { encoding, raw_len_bytes, payload: bytes.slice(HEADER_BYTES..) })
    }
}

/// A frame whose payload lies somewhere else.
struct View<'a> {
    encoding: Encoding,
    raw_len_bytes: u32,
    payload: &'a [u8],
}

impl<'a> View<'a> {
    fn parse(bytes: &'a [u8]) -> Result<View<'a>, FrameError> {
        let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::Truncated { have: bytes.len() });
        };
        let [version, encoding, reserved @ .., len0, len1, len2, len3] = *header;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let encoding = match encoding {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            unknown => return Err(FrameError::Encoding(unknown)),
        };
        if reserved != [0, 0] {
            return Err(FrameError::Reserved(u16::from_le_bytes(reserved)));
        }
        let view = View { encoding, raw_len_bytes: u32::from_le_bytes([len0, len1, len2, len3]), payload };
        view.check()?;
        Ok(view)
    }

    fn check(&self) -> Result<(), FrameError> {
        let announced = self.raw_len_bytes;
        if announced > MAX_RAW_BYTES {
            return Err(FrameError::TooLarge { announced });
        }
        let actual = self.payload.len() as u64;
        let fits = match self.encoding {
            Encoding::Raw => actual == u64::from(announced),
            // What does not shrink is never encoded so: a longer payload is somebody else's doing.
            Encoding::Zstd => actual < u64::from(announced),
        };
        if fits { Ok(()) } else { Err(FrameError::Length { announced, actual }) }
    }

    /// For a view that was checked.
    fn decode(&self) -> Result<Bytes, FrameError> {
        match self.encoding {
            Encoding::Raw => Ok(Bytes::copy_from_slice(self.payload)),
            Encoding::Zstd => decompress(self.payload, self.raw_len_bytes),
        }
    }
}

fn verify(raw: Bytes, id: &BlockId) -> Result<Bytes, FrameError> {
    let actual = BlockId::of(&raw);
    if actual == *id { Ok(raw) } else { Err(FrameError::WrongBlock { expected: *id, actual }) }
}

fn checked_len(raw: &[u8]) -> u32 {
    assert!(
        raw.len() <= MAX_RAW_BYTES as usize,
        "a block of {} bytes, at most {MAX_RAW_BYTES} are possible",
        raw.len()
    );
    raw.len() as u32
}

/// A thread's compression context with the level it is set to, and where it compresses to.
struct Packer {
    compressor: Compressor<'static>,
    level: i32,
    scratch: Vec<u8>,
}

thread_local! {
    static PACKER: RefCell<Option<Packer>> = const { RefCell::new(None) };
    static UNPACKER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// What `keep` makes of the compressed bytes; None where they would not be fewer than `raw`'s, or where zstd fails (it
/// has nothing but memory to fail on), for raw is always right.
fn compress<T>(raw: &[u8], level: i32, keep: impl FnOnce(&[u8]) -> T) -> Option<T> {
    PACKER.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|packer| packer.level != level) {
            let compressor = Compressor::new(level).ok()?;
            let scratch = slot.take().map(|packer| packer.scratch).unwrap_or_default();
            *slot = Some(Packer { compressor, level, scratch });
        }
        let Packer { compressor, scratch, .. } = slot.as_mut()?;
        scratch.clear();
        // zstd is faster where it need not watch for the end of its output.
        scratch.reserve(zstd::zstd_safe::compress_bound(raw.len()));
        let len = compressor.compress_to_buffer(raw, scratch).ok()?;
        (len < raw.len()).then(|| keep(&scratch[..len]))
    })
}

/// Exactly `raw_len_bytes` (checked by the caller to be a block's), or an error: zstd stops at the end of the buffer.
fn decompress(payload: &[u8], raw_len_bytes: u32) -> Result<Bytes, FrameError> {
    UNPACKER.with_borrow_mut(|slot| {
        let unpacker = match slot {
            Some(unpacker) => unpacker,
            None => slot.insert(Decompressor::new().map_err(|error| FrameError::Zstd(error.to_string()))?),
        };
        let mut raw = Vec::with_capacity(raw_len_bytes as usize);
        let len =
            unpacker.decompress_to_buffer(payload, &mut raw).map_err(|error| FrameError::Zstd(error.to_string()))?;
        // A Vec may have more room than was asked for.
        if len != raw_len_bytes as usize {
            return Err(FrameError::Length { announced: raw_len_bytes, actual: len as u64 });
        }
        Ok(Bytes::from(raw))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Text-like bytes: they shrink, and no two seeds give the same.
    fn shrinking(len: usize, seed: u64) -> Bytes {
        let words = [&b"block "[..], b"store ", b"volume ", b"relocation "];
        let mut state = seed | 1;
        let mut bytes = Vec::with_capacity(len + 16);
        while bytes.len() < len {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            bytes.extend_from_slice(words[(state >> 60) as usize % words.len()]);
        }
        bytes.truncate(len);
        bytes.into()
    }

    fn random(len: usize, seed: u64) -> Bytes {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes.into()
    }

    #[test]
    fn the_largest_block_fits() {
        assert_eq!(MAX_RAW_BYTES, crate::core::ids::BlockSize::MAX.bytes());
    }

    #[test]
    fn the_layout_is_byte_exact() {
        let frame = Frame { encoding: Encoding::Raw, raw_len_bytes: 3, payload: Bytes::from_static(b"abc") };
        assert_eq!(frame.to_bytes().as_ref(), [1, 0, 0, 0, 3, 0, 0, 0, b'a', b'b', b'c']);
        let frame = Frame { encoding: Encoding::Zstd, raw_len_bytes: 0x0001_0203, payload: Bytes::from_static(b"z") };
        assert_eq!(frame.to_bytes().as_ref(), [1, 1, 0, 0, 3, 2, 1, 0, b'z']);
        assert_eq!(frame.len_bytes(), 9);
    }

    #[test]
    fn a_frame_that_version_1_wrote_can_be_read_for_ever() {
        // 40 times "block ", level 3, as the first release stored it.
        let stored = hex::decode(concat!("01010000f0000000", "28b52ffd20f06d000030626c6f636b200100e750a508"))
            .expect("a fixture in hexadecimal");
        let raw = b"block ".repeat(40);
        assert_eq!(Frame::decode_verified_from(&stored, &BlockId::of(&raw)).expect("a frame").as_ref(), raw);
    }

    #[test]
    fn what_does_not_shrink_is_raw() {
        for len in [0, 1, 2, 512, 4096, 65536, 1 << 20] {
            let raw = random(len, 7);
            let frame = Frame::encode(&raw, 3);
            assert_eq!(frame.encoding, Encoding::Raw, "{len} bytes");
            assert_eq!(frame.payload, raw);
            assert_eq!(Frame::encoded_payload_bytes(&raw, 3) as usize, len);
        }
        let raw = shrinking(65536, 7);
        let frame = Frame::encode(&raw, 3);
        assert_eq!(frame.encoding, Encoding::Zstd);
        assert!(frame.payload.len() < 20_000, "{} bytes", frame.payload.len());
        assert_eq!(Frame::encoded_payload_bytes(&raw, 3) as usize, frame.payload.len());
    }

    #[test]
    fn levels_may_alternate_in_one_thread() {
        let raw = shrinking(65536, 1);
        let fast = Frame::encode(&raw, -5);
        let small = Frame::encode(&raw, 9);
        assert!(small.payload.len() < fast.payload.len());
        assert_eq!(Frame::encode(&raw, -5), fast);
        assert_eq!(fast.decode(), small.decode());
    }

    #[test]
    fn announcing_too_much_is_an_error_and_no_allocation() {
        for announced in [MAX_RAW_BYTES + 1, u32::MAX] {
            for encoding in [Encoding::Raw, Encoding::Zstd] {
                let frame = Frame { encoding, raw_len_bytes: announced, payload: Bytes::from_static(b"x") };
                assert_eq!(frame.decode(), Err(FrameError::TooLarge { announced }));
                assert_eq!(Frame::from_bytes(&frame.to_bytes()), Err(FrameError::TooLarge { announced }));
            }
        }
    }

    #[test]
    fn expanding_to_more_or_less_than_announced_is_an_error() {
        let bomb = zstd::bulk::compress(&vec![0u8; 64 << 20], 19).expect("compresses");
        let frame = Frame { encoding: Encoding::Zstd, raw_len_bytes: 65536, payload: bomb.into() };
        assert!(matches!(frame.decode(), Err(FrameError::Zstd(_))), "{:?}", frame.decode());

        let mut frame = Frame::encode(&shrinking(65536, 3), 3);
        frame.raw_len_bytes += 1;
        assert_eq!(frame.decode(), Err(FrameError::Length { announced: 65537, actual: 65536 }));
        frame.raw_len_bytes -= 2;
        assert!(frame.decode().is_err());
    }

    #[test]
    fn a_payload_that_saves_nothing_is_refused() {
        let payload = Bytes::from(zstd::bulk::compress(b"abc", 3).expect("compresses"));
        let actual = payload.len() as u64;
        let frame = Frame { encoding: Encoding::Zstd, raw_len_bytes: 3, payload };
        assert_eq!(frame.decode(), Err(FrameError::Length { announced: 3, actual }));
    }

    #[test]
    fn unknown_headers_are_named() {
        let good = Frame::encode(&Bytes::from_static(b"abc"), 3).to_bytes();
        let with = |at: usize, value: u8| {
            let mut bytes = good.to_vec();
            bytes[at] = value;
            Frame::from_bytes(&bytes.into())
        };
        assert_eq!(with(0, 2), Err(FrameError::Version(2)));
        assert_eq!(with(1, 2), Err(FrameError::Encoding(2)));
        assert_eq!(with(3, 1), Err(FrameError::Reserved(0x0100)));
        assert_eq!(with(4, 4), Err(FrameError::Length { announced: 4, actual: 3 }));
        for len in 0..HEADER_BYTES {
            assert_eq!(Frame::from_bytes(&good.slice(..len)), Err(FrameError::Truncated { have: len }));
        }
    }

    #[test]
    fn a_frame_of_another_block_is_not_believed() {
        let (mine, other) = (shrinking(4096, 1), shrinking(4096, 2));
        let (expected, actual) = (BlockId::of(&mine), BlockId::of(&other));
        let frame = Frame::encode(&other, 3);
        assert_eq!(frame.decode_verified(&expected), Err(FrameError::WrongBlock { expected, actual }));
        let stored = frame.to_bytes();
        assert_eq!(Frame::decode_verified_from(&stored, &expected), Err(FrameError::WrongBlock { expected, actual }));
        assert_eq!(Frame::decode_verified_from(&stored, &actual), Ok(other));
    }

    fn any_block() -> impl Strategy<Value = Bytes> {
        let lens = prop_oneof![0..100usize, 4000..4200usize, Just(65536usize)];
        (lens, any::<u64>(), any::<bool>())
            .prop_map(|(len, seed, shrinks)| if shrinks { shrinking(len, seed) } else { random(len, seed) })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn blocks_survive(raw in any_block(), level in -7i32..6) {
            let frame = Frame::encode(&raw, level);
            prop_assert!(frame.payload.len() <= raw.len());
            let stored = frame.to_bytes();
            prop_assert_eq!(&Frame::from_bytes(&stored).expect("own frame"), &frame);
            prop_assert_eq!(frame.decode().expect("own frame"), raw.clone());
            prop_assert_eq!(Frame::decode_verified_from(&stored, &BlockId::of(&raw)).expect("own frame"), raw);
        }

        #[test]
        fn truncated_frames_are_errors(raw in any_block(), cut in any::<prop::sample::Index>()) {
            let stored = Frame::encode(&raw, 3).to_bytes();
            let cut = stored.slice(..cut.index(stored.len()));
            prop_assert!(Frame::decode_verified_from(&cut, &BlockId::of(&raw)).is_err());
            prop_assert!(Frame::from_bytes(&cut).and_then(|frame| frame.decode_verified(&BlockId::of(&raw))).is_err());
        }

        /// A damaged frame may still hold the right bytes (zstd has bits that mean nothing), but never pass with others.
        #[test]
        fn flipped_bits_never_pass_with_other_bytes(raw in any_block(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut stored = Frame::encode(&raw, 3).to_bytes().to_vec();
            let at = at.index(stored.len());
            stored[at] ^= 1 << bit;
            if let Ok(bytes) = Frame::decode_verified_from(&stored, &BlockId::of(&raw)) {
                prop_assert_eq!(bytes, raw);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), plausible in any::<bool>()) {
            if plausible && bytes.len() >= HEADER_BYTES {
                bytes[..HEADER_BYTES].copy_from_slice(&[VERSION, 1, 0, 0, 0, 0, 1, 0]);
            }
            let id = BlockId([7; 32]);
            prop_assert!(Frame::decode_verified_from(&bytes, &id).is_err());
            if let Ok(frame) = Frame::from_bytes(&bytes.into()) {
                prop_assert!(frame.decode_verified(&id).is_err());
            }
        }
    }
}
