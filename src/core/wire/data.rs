//! Data messages, source to destination: one stream each, in any order.

use bytes::{BufMut, Bytes, BytesMut};

use super::Refusal;
use super::codec::{MAX_TEXT_BYTES, Reader, WireError, put_text};
use crate::core::frame::Frame;
use crate::core::ids::BlockId;
use crate::core::manifest::{PageId, PageIndex};

/// The most page states in one message: 264 KiB.
pub const MAX_ROOTS_PER_MESSAGE: usize = 8192;

/// What the source knows of one manifest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootEntry {
    /// 0: not hashed yet.
    Unknown,
    /// 1: nothing but zero blocks.
    Zero,
    /// 2 and 32 bytes: the page's id.
    Known(PageId),
}

/// A data message. The byte in front of each is its type.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Data {
    /// 1: flight u64, id 32 bytes, frame (absent for a zero block).
    Block { flight: u64, id: BlockId, frame: Option<Frame> },
    /// 2: flight u64, refusal u16, text.
    Failed { flight: u64, refusal: Refusal, why: String },
    /// 3: flight u64, page u64, frame of the page's bytes.
    Page { flight: u64, page: PageIndex, frame: Frame },
    /// 4: flight u64, first page u64, then the entries.
    Roots { flight: u64, first: PageIndex, entries: Vec<RootEntry> },
}

impl Data {
    /// The message in parts, so that a payload is not copied.
    pub fn encode(&self) -> Vec<Bytes> {
        let mut head = BytesMut::with_capacity(64);
        match self {
            Data::Block { flight, id, frame } => {
                head.put_u8(1);
                head.put_u64_le(*flight);
                head.put_slice(&id.0);
                match frame {
                    None => vec![head.freeze()],
                    Some(frame) => with_frame(head, frame),
                }
            }
            Data::Failed { flight, refusal, why } => {
                head.put_u8(2);
                head.put_u64_le(*flight);
                head.put_u16_le(*refusal as u16);
                put_text(&mut head, why, MAX_TEXT_BYTES);
                vec![head.freeze()]
            }
            Data::Page { flight, page, frame } => {
                head.put_u8(3);
                head.put_u64_le(*flight);
                head.put_u64_le(page.0);
                with_frame(head, frame)
            }
            Data::Roots { flight, first, entries } => {
                head.put_u8(4);
                head.put_u64_le(*flight);
                head.put_u64_le(first.0);
                for entry in entries {
                    match entry {
                        RootEntry::Unknown => head.put_u8(0),
                        RootEntry::Zero => head.put_u8(1),
                        RootEntry::Known(id) => {
                            head.put_u8(2);
                            head.put_slice(&id.0);
                        }
                    }
                }
                vec![head.freeze()]
            }
        }
    }

    /// How many bytes a message expands to, by its header alone: what to reserve before it is parsed. Never less than
    /// the message has, never more than a frame may announce.
    pub fn raw_len_bytes(message: &[u8]) -> u32 {
        // Type, flight, id, then the frame's header, whose length stands at 4.
        let announced = match message.first() {
            Some(1) => message.get(45..49).and_then(|len| len.try_into().ok()).map_or(0, u32::from_le_bytes),
            _ => 0,
        };
        announced.min(crate::core::frame::MAX_RAW_BYTES).max(message.len() as u32)
    }

    /// Parses what a peer sent.
    pub fn decode(mut bytes: Bytes) -> Result<Data, WireError> {
        if bytes.is_empty() {
            return Err(WireError::CutOff { frame: "data" });
        }
        let kind = bytes.split_to(1)[0];
        match kind {
            1 => {
                let mut r = Reader::new(bytes, "Block");
                let (flight, id) = (r.u64()?, r.id()?);
                let rest = r.rest();
                let frame = match (id.is_zero(), rest.is_empty()) {
                    (true, true) => None,
                    (false, false) => Some(Frame::from_bytes(&rest).map_err(|_| r.bad("frame"))?),
                    _ => return Err(r.bad("frame")),
                };
                Ok(Data::Block { flight, id, frame })
            }
            2 => {
                let mut r = Reader::new(bytes, "Failed");
                let flight = r.u64()?;
                let refusal = Refusal::from_wire(r.u16()?).ok_or(r.bad("refusal"))?;
                let why = r.text(MAX_TEXT_BYTES, "text")?;
                r.end(Data::Failed { flight, refusal, why })
            }
            3 => {
                let mut r = Reader::new(bytes, "Page");
                let (flight, page) = (r.u64()?, PageIndex(r.u64()?));
                let frame = Frame::from_bytes(&r.rest()).map_err(|_| r.bad("frame"))?;
                Ok(Data::Page { flight, page, frame })
            }
            4 => {
                let mut r = Reader::new(bytes, "Roots");
                let (flight, first) = (r.u64()?, PageIndex(r.u64()?));
                let mut entries = Vec::new();
                let mut rest = Reader::new(r.rest(), "Roots");
                while let Ok(state) = rest.u8() {
                    // In memory an entry is much larger than the byte that may stand for it.
                    if entries.len() >= MAX_ROOTS_PER_MESSAGE {
                        return Err(rest.bad("count"));
                    }
                    entries.push(match state {
                        0 => RootEntry::Unknown,
                        1 => RootEntry::Zero,
                        2 => RootEntry::Known(PageId(rest.hash()?)),
                        _ => return Err(rest.bad("entry")),
                    });
                }
                Ok(Data::Roots { flight, first, entries })
            }
            other => Err(WireError::UnknownType(other)),
        }
    }
}

fn with_frame(mut head: BytesMut, frame: &Frame) -> Vec<Bytes> {
    head.extend_from_slice(&frame.header());
    vec![head.freeze(), frame.payload.clone()]
}
