//! Control frames: questions and short answers, in order.

use bytes::{BufMut, Bytes, BytesMut};

use super::codec::{MAX_TEXT_BYTES, Reader, WireError, put_text};
use super::{MAGIC, Refusal};
use crate::core::ids::{BlockIndex, Class, Name, Nonce};
use crate::core::manifest::{Geometry, PageIndex};

/// The most wants in one frame: 20 KiB.
pub const MAX_WANTS_PER_FRAME: usize = 1024;

/// "Send me this block": 21 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Chosen by the destination, never used twice on a connection.
    pub flight: u64,
    /// The opened volume.
    pub handle: u32,
    /// How urgent.
    pub class: Class,
    /// Which block.
    pub block: BlockIndex,
}

/// A control frame. The byte in front of each is its type.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are named in the module's table and by their types
pub enum Control {
    /// 0x01 destination: magic u32, min version u16, max version u16, site name, two nonces of 16 bytes: the one that
    /// this source acknowledged last (all zero: none), and the one of the destination from now on.
    Hello { min_version: u16, max_version: u16, site: Name, last: Nonce, next: Nonce },
    /// 0x10 destination: open a volume that it was granted.
    Open { request: u32, volume: Name },
    /// 0x11 destination: become the owner; the source admits no writes from here on. Asking again gives the same answer.
    /// Flags u8, bit 0: take it although clients are connected at the source.
    TakeOver { request: u32, epoch: u64, take: bool, volume: Name },
    /// 0x12 destination: what is known of pages `first..first + count` (at most 8,192); answered by a data message.
    Roots { flight: u64, handle: u32, first: PageIndex, count: u32 },
    /// 0x13 destination: one manifest page, hashed now if it was not; answered by a data message.
    Page { flight: u64, handle: u32, page: PageIndex },
    /// 0x14 destination: blocks; each answered by a data message.
    Wants(Vec<Want>),
    /// 0x15 destination: what was wanted as bulk is wanted more urgently now.
    Promote { flight: u64, class: Class },
    /// 0x16 destination: nobody waits for it any more.
    Forget { flight: u64 },
    /// 0x17 destination: every block is here and durable.
    Completed { request: u32, epoch: u64, volume: Name },
    /// 0x18 destination: the source may be owner again; nothing was written here.
    GiveBack { request: u32, epoch: u64, volume: Name },
    /// 0x19 destination: it asks nothing more by this handle. There is no answer.
    Close { handle: u32 },
    /// 0x1a destination: a person reclaimed the volume there at this epoch: the source owns it no more.
    Reclaimed { request: u32, epoch: u64, volume: Name },
    /// 0x81 source: chosen version u16, site name.
    Welcome { version: u16, site: Name },
    /// 0x82 source: no.
    Unwelcome { refusal: Refusal, why: String },
    /// 0x90 source: answer to Open. The epoch is the one at which the source owned it. Flags u8, bit 0: read-only.
    Opened { request: u32, handle: u32, geometry: Geometry, generation: u64, epoch: u64, is_read_only: bool },
    /// 0x91 source: answer to TakeOver, Completed, GiveBack and Reclaimed.
    Done { request: u32, epoch: u64 },
    /// 0x9f source: a request that is refused. The epoch is the one that holds at the source, 0 if none does.
    Refused { request: u32, refusal: Refusal, epoch: u64, why: String },
}

impl Control {
    /// The frame's bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        match self {
            Control::Hello { min_version, max_version, site, last, next } => {
                out.put_u8(0x01);
                out.put_u32_le(MAGIC);
                out.put_u16_le(*min_version);
                out.put_u16_le(*max_version);
                put_text(&mut out, site.as_str(), Name::MAX_BYTES);
                out.put_slice(&last.0);
                out.put_slice(&next.0);
            }
            Control::Open { request, volume } => {
                out.put_u8(0x10);
                out.put_u32_le(*request);
                put_text(&mut out, volume.as_str(), Name::MAX_BYTES);
            }
            Control::TakeOver { request, epoch, take, volume } => {
                put_question(&mut out, 0x11, *request, *epoch);
                out.put_u8(u8::from(*take));
                put_text(&mut out, volume.as_str(), Name::MAX_BYTES);
            }
            Control::Roots { flight, handle, first, count } => {
                out.put_u8(0x12);
                out.put_u64_le(*flight);
                out.put_u32_le(*handle);
                out.put_u64_le(first.0);
                out.put_u32_le(*count);
            }
            Control::Page { flight, handle, page } => {
                out.put_u8(0x13);
                out.put_u64_le(*flight);
                out.put_u32_le(*handle);
                out.put_u64_le(page.0);
            }
            Control::Wants(wants) => {
                assert!(
                    wants.len() <= MAX_WANTS_PER_FRAME,
                    "wants are sent in frames of at most {MAX_WANTS_PER_FRAME}"
                );
                out.reserve(3 + wants.len() * 21);
                out.put_u8(0x14);
                out.put_u16_le(wants.len() as u16);
                for want in wants {
                    out.put_u64_le(want.flight);
                    out.put_u32_le(want.handle);
                    out.put_u8(want.class as u8);
                    out.put_u64_le(want.block.0);
                }
            }
            Control::Promote { flight, class } => {
                out.put_u8(0x15);
                out.put_u64_le(*flight);
                out.put_u8(*class as u8);
            }
            Control::Forget { flight } => {
                out.put_u8(0x16);
                out.put_u64_le(*flight);
            }
            Control::Completed { request, epoch, volume } => {
                put_question(&mut out, 0x17, *request, *epoch);
                put_text(&mut out, volume.as_str(), Name::MAX_BYTES);
            }
            Control::GiveBack { request, epoch, volume } => {
                put_question(&mut out, 0x18, *request, *epoch);
                put_text(&mut out, volume.as_str(), Name::MAX_BYTES);
            }
            Control::Close { handle } => {
                out.put_u8(0x19);
                out.put_u32_le(*handle);
            }
            Control::Reclaimed { request, epoch, volume } => {
                put_question(&mut out, 0x1a, *request, *epoch);
                put_text(&mut out, volume.as_str(), Name::MAX_BYTES);
            }
            Control::Welcome { version, site } => {
                out.put_u8(0x81);
                out.put_u16_le(*version);
                put_text(&mut out, site.as_str(), Name::MAX_BYTES);
            }
            Control::Unwelcome { refusal, why } => {
                out.put_u8(0x82);
                out.put_u16_le(*refusal as u16);
                put_text(&mut out, why, MAX_TEXT_BYTES);
            }
            Control::Opened { request, handle, geometry, generation, epoch, is_read_only } => {
                out.put_u8(0x90);
                out.put_u32_le(*request);
                out.put_u32_le(*handle);
                out.put_u64_le(geometry.size_bytes);
                out.put_u32_le(geometry.block_size.bytes());
                out.put_u64_le(*generation);
                out.put_u64_le(*epoch);
                out.put_u8(u8::from(*is_read_only));
            }
            Control::Done { request, epoch } => {
                out.put_u8(0x91);
                out.put_u32_le(*request);
                out.put_u64_le(*epoch);
            }
            Control::Refused { request, refusal, epoch, why } => {
                out.put_u8(0x9f);
                out.put_u32_le(*request);
                out.put_u16_le(*refusal as u16);
                out.put_u64_le(*epoch);
                put_text(&mut out, why, MAX_TEXT_BYTES);
            }
        }
        out.freeze()
    }

    /// Parses what a peer sent; nothing is allocated that the bytes do not back.
    pub fn decode(mut bytes: Bytes) -> Result<Control, WireError> {
        if bytes.is_empty() {
            return Err(WireError::CutOff { frame: "control" });
        }
        let kind = bytes.split_to(1)[0];
        let frame = match kind {
            0x01 => "Hello",
            0x10 => "Open",
            0x11 => "TakeOver",
            0x12 => "Roots",
            0x13 => "Page",
            0x14 => "Wants",
            0x15 => "Promote",
            0x16 => "Forget",
            0x17 => "Completed",
            0x18 => "GiveBack",
            0x19 => "Close",
            0x1a => "Reclaimed",
            0x81 => "Welcome",
            0x82 => "Unwelcome",
            0x90 => "Opened",
            0x91 => "Done",
            0x9f => "Refused",
            other => return Err(WireError::UnknownType(other)),
        };
        let mut r = Reader::new(bytes, frame);
        let value = match kind {
            0x01 => {
                if r.u32()? != MAGIC {
                    return Err(r.bad("magic"));
                }
                let (min_version, max_version, site) = (r.u16()?, r.u16()?, r.name()?);
                Control::Hello { min_version, max_version, site, last: r.nonce()?, next: r.nonce()? }
            }
            0x10 => Control::Open { request: r.u32()?, volume: r.name()? },
            0x11 => Control::TakeOver { request: r.u32()?, epoch: r.u64()?, take: flag(&mut r)?, volume: r.name()? },
            0x12 => Control::Roots { flight: r.u64()?, handle: r.u32()?, first: PageIndex(r.u64()?), count: r.u32()? },
            0x13 => Control::Page { flight: r.u64()?, handle: r.u32()?, page: PageIndex(r.u64()?) },
            0x14 => {
                let count = usize::from(r.u16()?);
                if count > MAX_WANTS_PER_FRAME {
                    return Err(r.bad("count"));
                }
                let mut wants = Vec::with_capacity(count);
                for _ in 0..count {
                    let (flight, handle) = (r.u64()?, r.u32()?);
                    wants.push(Want { flight, handle, class: r.class()?, block: BlockIndex(r.u64()?) });
                }
                Control::Wants(wants)
            }
            0x15 => Control::Promote { flight: r.u64()?, class: r.class()? },
            0x16 => Control::Forget { flight: r.u64()? },
            0x17 => Control::Completed { request: r.u32()?, epoch: r.u64()?, volume: r.name()? },
            0x18 => Control::GiveBack { request: r.u32()?, epoch: r.u64()?, volume: r.name()? },
            0x19 => Control::Close { handle: r.u32()? },
            0x1a => Control::Reclaimed { request: r.u32()?, epoch: r.u64()?, volume: r.name()? },
            0x81 => Control::Welcome { version: r.u16()?, site: r.name()? },
            0x82 => Control::Unwelcome { refusal: refusal(&mut r)?, why: r.text(MAX_TEXT_BYTES, "text")? },
            0x90 => {
                let (request, handle) = (r.u32()?, r.u32()?);
                let (size_bytes, block_size) = (r.u64()?, r.u32()?);
                let geometry = Geometry::new(size_bytes, u64::from(block_size)).map_err(|_| r.bad("geometry"))?;
                let (generation, epoch) = (r.u64()?, r.u64()?);
                Control::Opened { request, handle, geometry, generation, epoch, is_read_only: flag(&mut r)? }
            }
            0x91 => Control::Done { request: r.u32()?, epoch: r.u64()? },
            _ => {
                let (request, refusal, epoch) = (r.u32()?, refusal(&mut r)?, r.u64()?);
                Control::Refused { request, refusal, epoch, why: r.text(MAX_TEXT_BYTES, "text")? }
            }
        };
        r.end(value)
    }
}

fn put_question(out: &mut BytesMut, kind: u8, request: u32, epoch: u64) {
    out.put_u8(kind);
    out.put_u32_le(request);
    out.put_u64_le(epoch);
}

/// Flags of which there is one, bit 0. The others are a later version's: nobody may set them in this one.
fn flag(r: &mut Reader) -> Result<bool, WireError> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(r.bad("flags")),
    }
}

fn refusal(r: &mut Reader) -> Result<Refusal, WireError> {
    Refusal::from_wire(r.u16()?).ok_or(r.bad("refusal"))
}
