//! Replies, byte by byte, in the three forms that a handshake can lead to. Pure.

use super::errno::NbdErrno;
use super::extents::Extent;
use super::limits::MAX_STRING_BYTES;
use super::request::{ContextIndex, Tag};
use super::wire::{self, chunk};

/// The form of requests and replies that was negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplyStyle {
    /// "The simple reply message MUST be sent by the server in response to all requests if neither structured replies
    /// [...] nor extended headers [...] have been negotiated."
    Simple,
    /// Compact headers, replies in chunks: "the server MUST use a structured reply for any response with a payload, and
    /// MUST NOT use a simple reply for NBD_CMD_READ".
    Structured,
    /// Headers of 32 bytes both ways: "all server replies MUST use an extended reply".
    Extended,
}

/// A reply, or the beginning of one, short enough to live on the stack.
#[derive(Clone, Copy)]
pub struct Header {
    bytes: [u8; Header::MAX_BYTES],
    len: usize,
}

impl Header {
    /// The longest: an extended header, offset and size of a hole.
    pub const MAX_BYTES: usize = 44;

    fn new() -> Header {
        Header { bytes: [0; Header::MAX_BYTES], len: 0 }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// The bytes to send.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl ReplyStyle {
    /// The whole reply to a request that succeeded and has no data.
    pub fn done(self, tag: Tag) -> Header {
        match self {
            ReplyStyle::Simple => simple(tag, 0),
            _ => self.chunk(tag, chunk::NONE, 0, true),
        }
    }

    /// What stands before the `len_bytes` of data from `offset` on that answer a READ as a whole.
    ///
    /// The chunk is the final one: a server "MUST NOT mark a chunk as final if there is still a possibility of
    /// detecting an error before transmission of that chunk completes", so all the data has to be at hand.
    pub fn data(self, tag: Tag, offset: u64, len_bytes: u32) -> Header {
        if self == ReplyStyle::Simple {
            return simple(tag, 0);
        }
        let mut header = self.chunk(tag, chunk::OFFSET_DATA, u64::from(len_bytes) + 8, true);
        header.put(&offset.to_be_bytes());
        header
    }

    /// What stands before some of the data that answers a READ, where it may be sent in several chunks: not with simple
    /// replies, and not with DF. [`ReplyStyle::done`] or [`ReplyStyle::error`] comes behind the last.
    pub fn part(self, tag: Tag, offset: u64, len_bytes: u32) -> Header {
        let mut header = self.chunk(tag, chunk::OFFSET_DATA, u64::from(len_bytes) + 8, false);
        header.put(&offset.to_be_bytes());
        header
    }

    /// How long the header before `data` is, whatever the request.
    pub fn data_header_bytes(self) -> usize {
        match self {
            ReplyStyle::Simple => 16,
            ReplyStyle::Structured => 28,
            ReplyStyle::Extended => 40,
        }
    }

    /// The whole reply to a READ of nothing but zeroes, where there is one that does not send them.
    pub fn hole(self, tag: Tag, offset: u64, len_bytes: u32) -> Option<Header> {
        if self == ReplyStyle::Simple {
            return None;
        }
        let mut header = self.chunk(tag, chunk::OFFSET_HOLE, 12, true);
        header.put(&offset.to_be_bytes());
        header.put(&len_bytes.to_be_bytes());
        Some(header)
    }

    /// The whole reply to a request that failed. "The server SHOULD prefer sending errors via a structured reply, as
    /// the error can then be accompanied by a string payload to present to a human user."
    pub fn error(self, tag: Tag, errno: NbdErrno, message: &str) -> Vec<u8> {
        if self == ReplyStyle::Simple {
            return simple(tag, errno.to_wire()).as_slice().to_vec();
        }
        // "message length MUST NOT exceed the 4096 bytes string length limit".
        let message = clip(message, MAX_STRING_BYTES);
        let mut reply = self.chunk(tag, chunk::ERROR, message.len() as u64 + 6, true).as_slice().to_vec();
        reply.extend_from_slice(&errno.to_wire().to_be_bytes());
        reply.extend_from_slice(&(message.len() as u16).to_be_bytes());
        reply.extend_from_slice(message.as_bytes());
        reply
    }

    /// The whole reply to a BLOCK_STATUS: "exactly one chunk of type NBD_REPLY_TYPE_BLOCK_STATUS per selected context
    /// id". The extents have gone through [`fit_extents`](super::fit_extents) with [`ReplyStyle::max_extent_bytes`].
    /// `None` with simple replies, which cannot say it (and cannot have selected a context).
    pub fn status(self, tag: Tag, contexts: &[(ContextIndex, Vec<Extent>)]) -> Option<Vec<u8>> {
        let mut reply = Vec::new();
        for (nth, (context, extents)) in contexts.iter().enumerate() {
            let last = nth + 1 == contexts.len();
            let count = extents.len() as u64;
            match self {
                ReplyStyle::Simple => return None,
                ReplyStyle::Structured => {
                    reply.extend_from_slice(self.chunk(tag, chunk::BLOCK_STATUS, 4 + 8 * count, last).as_slice());
                    reply.extend_from_slice(&context.0.to_be_bytes());
                    for extent in extents {
                        reply.extend_from_slice(&(extent.len_bytes as u32).to_be_bytes());
                        reply.extend_from_slice(&extent.flags.to_be_bytes());
                    }
                }
                ReplyStyle::Extended => {
                    reply.extend_from_slice(self.chunk(tag, chunk::BLOCK_STATUS_EXT, 8 + 16 * count, last).as_slice());
                    reply.extend_from_slice(&context.0.to_be_bytes());
                    reply.extend_from_slice(&(count as u32).to_be_bytes());
                    for extent in extents {
                        reply.extend_from_slice(&extent.len_bytes.to_be_bytes());
                        // "32 bits, padding (MUST be zero); 32 bits, status flags".
                        reply.extend_from_slice(&u64::from(extent.flags).to_be_bytes());
                    }
                }
            }
        }
        (!reply.is_empty()).then_some(reply)
    }

    /// The longest extent that a descriptor can hold; a multiple of 64 KiB where it is limited at all, because "the
    /// server SHOULD use descriptor lengths that are an integer multiple of 512 bytes where possible".
    pub fn max_extent_bytes(self) -> u64 {
        match self {
            ReplyStyle::Extended => u64::MAX,
            _ => 0xffff_0000,
        }
    }

    fn chunk(self, tag: Tag, kind: u16, len_bytes: u64, last: bool) -> Header {
        let mut header = Header::new();
        let extended = self == ReplyStyle::Extended;
        let magic = if extended { wire::EXTENDED_REPLY_MAGIC } else { wire::STRUCTURED_REPLY_MAGIC };
        header.put(&magic.to_be_bytes());
        header.put(&(if last { chunk::FLAG_DONE } else { 0 }).to_be_bytes());
        header.put(&kind.to_be_bytes());
        header.put(&tag.cookie.to_be_bytes());
        if extended {
            // "The extended reply has an additional field offset which MUST match the offset of the client's request
            // (even in reply types such as NBD_REPLY_TYPE_OFFSET_DATA where the payload itself contains a different
            // offset [...])."
            header.put(&tag.offset.to_be_bytes());
            header.put(&len_bytes.to_be_bytes());
        } else {
            header.put(&(len_bytes as u32).to_be_bytes());
        }
        header
    }
}

fn simple(tag: Tag, error: u32) -> Header {
    let mut header = Header::new();
    header.put(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    header.put(&error.to_be_bytes());
    header.put(&tag.cookie.to_be_bytes());
    header
}

/// `text` cut to at most `max_bytes` at a character's border, and before a NUL, which strings "MUST NOT contain".
pub(crate) fn clip(text: &str, max_bytes: usize) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
