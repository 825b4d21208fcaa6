//! Reading and writing fixed-width fields, every length checked before it is believed. Must not know any message.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::core::ids::{BlockId, Class, Name, Nonce};

/// A peer sent what this protocol does not allow. It loses its connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The frame ends before its fields do.
    #[error("a {frame} frame is cut off")]
    CutOff {
        /// Which frame.
        frame: &'static str,
    },
    /// Bytes follow the last field.
    #[error("a {frame} frame has {extra} bytes too many")]
    TooLong {
        /// Which frame.
        frame: &'static str,
        /// How many.
        extra: usize,
    },
    /// No such frame.
    #[error("there is no frame of type {0:#04x}")]
    UnknownType(u8),
    /// A field with an impossible value.
    #[error("a {frame} frame has an impossible {field}")]
    BadField {
        /// Which frame.
        frame: &'static str,
        /// Which field.
        field: &'static str,
    },
}

pub(super) struct Reader {
    bytes: Bytes,
    frame: &'static str,
}

impl Reader {
    pub(super) fn new(bytes: Bytes, frame: &'static str) -> Reader {
        Reader { bytes, frame }
    }

    fn need(&self, len: usize) -> Result<(), WireError> {
        if self.bytes.len() < len { Err(WireError::CutOff { frame: self.frame }) } else { Ok(()) }
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        self.need(1)?;
        Ok(self.bytes.get_u8())
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.need(2)?;
        Ok(self.bytes.get_u16_le())
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.need(4)?;
        Ok(self.bytes.get_u32_le())
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.need(8)?;
        Ok(self.bytes.get_u64_le())
    }

    pub(super) fn hash(&mut self) -> Result<[u8; 32], WireError> {
        self.need(32)?;
        let mut hash = [0; 32];
        self.bytes.copy_to_slice(&mut hash);
        Ok(hash)
    }

    pub(super) fn id(&mut self) -> Result<BlockId, WireError> {
        Ok(BlockId(self.hash()?))
    }

    pub(super) fn nonce(&mut self) -> Result<Nonce, WireError> {
        self.need(16)?;
        let mut nonce = [0; 16];
        self.bytes.copy_to_slice(&mut nonce);
        Ok(Nonce(nonce))
    }

    pub(super) fn class(&mut self) -> Result<Class, WireError> {
        Class::from_wire(self.u8()?).ok_or(self.bad("class"))
    }

    pub(super) fn name(&mut self) -> Result<Name, WireError> {
        let text = self.text(Name::MAX_BYTES, "name")?;
        text.parse().map_err(|_| self.bad("name"))
    }

    pub(super) fn text(&mut self, max_bytes: usize, field: &'static str) -> Result<String, WireError> {
        let len = usize::from(self.u16()?);
        if len > max_bytes {
            return Err(self.bad(field));
        }
        self.need(len)?;
        String::from_utf8(self.bytes.split_to(len).to_vec()).map_err(|_| self.bad(field))
    }

    pub(super) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes)
    }

    pub(super) fn bad(&self, field: &'static str) -> WireError {
        WireError::BadField { frame: self.frame, field }
    }

    pub(super) fn end<T>(self, value: T) -> Result<T, WireError> {
        match self.bytes.len() {
            0 => Ok(value),
            extra => Err(WireError::TooLong { frame: self.frame, extra }),
        }
    }
}

/// The longest explanation that travels with a refusal, in bytes.
pub(super) const MAX_TEXT_BYTES: usize = 512;

pub(super) fn put_text(out: &mut BytesMut, text: &str, max_bytes: usize) {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.put_u16_le(end as u16);
    out.put_slice(&text.as_bytes()[..end]);
}
