//! The protocol's rules for requests, said a second time: what has to become of a header. Must not know how the server
//! decides it.

use crate::core::nbd::wire::{cmd, cmd_flag, transmission};
use crate::core::nbd::{MAX_PAYLOAD_BYTES, NbdErrno, ReplyStyle, Session};

/// A request as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) magic: u32,
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
}

impl Raw {
    /// As the header's bytes.
    pub(crate) fn bytes(&self, style: ReplyStyle) -> Vec<u8> {
        let mut bytes = self.magic.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.kind.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        match style {
            ReplyStyle::Extended => bytes.extend(self.len_bytes.to_be_bytes()),
            _ => bytes.extend((self.len_bytes as u32).to_be_bytes()),
        }
        bytes
    }

    /// From a whole header.
    pub(crate) fn read(style: ReplyStyle, bytes: &[u8]) -> Raw {
        let number =
            |at: usize, len: usize| bytes[at..at + len].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        Raw {
            magic: number(0, 4) as u32,
            flags: number(4, 2) as u16,
            kind: number(6, 2) as u16,
            cookie: number(8, 8),
            offset: number(16, 8),
            len_bytes: if style == ReplyStyle::Extended { number(24, 8) } else { number(24, 4) },
        }
    }
}

/// The magic number of requests.
pub(crate) fn request_magic(style: ReplyStyle) -> u32 {
    if style == ReplyStyle::Extended { 0x21e4_1c71 } else { 0x2560_9513 }
}

/// What has to become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The connection ends without a reply.
    HangUp,
    /// It is served; so many bytes of payload follow.
    Serve { payload_bytes: u64 },
    /// It is answered by this error; so many bytes of payload are skipped.
    Refuse { errno: NbdErrno, payload_bytes: u64 },
    /// DISC.
    Leave,
}

/// Judges one request.
pub(crate) fn judge(session: &Session, raw: &Raw) -> Verdict {
    let extended = session.style == ReplyStyle::Extended;
    let offered = |flag: u16| session.flags & flag != 0;
    if raw.magic != request_magic(session.style) {
        return Verdict::HangUp;
    }
    if raw.kind == cmd::DISC {
        return Verdict::Leave;
    }
    let counts_payload = extended && raw.flags & cmd_flag::PAYLOAD_LEN != 0;
    let payload_bytes = if raw.kind == cmd::WRITE || counts_payload { raw.len_bytes } else { 0 };
    if extended && payload_bytes > u64::from(MAX_PAYLOAD_BYTES) {
        return Verdict::HangUp;
    }
    let refuse = |errno| Verdict::Refuse { errno, payload_bytes };
    // By command: the flags that it may carry if they were offered, and the errors beyond the end and when read-only.
    let (mut flags, beyond, changes): (u16, NbdErrno, bool) = match raw.kind {
        cmd::READ => (if offered(transmission::SEND_DF) { cmd_flag::DF } else { 0 }, NbdErrno::Inval, false),
        cmd::WRITE => (if extended { cmd_flag::PAYLOAD_LEN } else { 0 }, NbdErrno::NoSpc, true),
        cmd::FLUSH | cmd::CACHE => (0, NbdErrno::Inval, false),
        cmd::TRIM => (0, NbdErrno::Inval, true),
        cmd::WRITE_ZEROES => {
            let fast = if offered(transmission::SEND_FAST_ZERO) { cmd_flag::FAST_ZERO } else { 0 };
            (cmd_flag::NO_HOLE | fast, NbdErrno::NoSpc, true)
        }
        cmd::BLOCK_STATUS => {
            let payload = if offered(transmission::BLOCK_STATUS_PAYLOAD) { cmd_flag::PAYLOAD_LEN } else { 0 };
            (cmd_flag::REQ_ONE | payload, NbdErrno::Inval, false)
        }
        _ => return refuse(NbdErrno::Inval),
    };
    if offered(transmission::SEND_FUA) {
        flags |= cmd_flag::FUA;
    }
    if raw.flags & !flags != 0 {
        return refuse(NbdErrno::Inval);
    }
    if changes && offered(transmission::READ_ONLY) {
        return refuse(NbdErrno::Perm);
    }
    if raw.kind == cmd::BLOCK_STATUS && session.contexts.is_empty() {
        return refuse(NbdErrno::Inval);
    }
    if raw.kind == cmd::BLOCK_STATUS && counts_payload {
        // The payload itself is judged when it is there.
        let fits = (12..=4096).contains(&raw.len_bytes) && raw.len_bytes.is_multiple_of(4);
        return if fits { Verdict::Serve { payload_bytes } } else { refuse(NbdErrno::Inval) };
    }
    if raw.kind == cmd::FLUSH {
        let is_plain = raw.offset == 0 && raw.len_bytes == 0;
        return if is_plain { Verdict::Serve { payload_bytes } } else { refuse(NbdErrno::Inval) };
    }
    if matches!(raw.kind, cmd::READ | cmd::WRITE) && raw.len_bytes > u64::from(MAX_PAYLOAD_BYTES) || raw.len_bytes == 0
    {
        return refuse(NbdErrno::Inval);
    }
    let end = u128::from(raw.offset) + u128::from(raw.len_bytes);
    if end > u128::from(session.size_bytes) { refuse(beyond) } else { Verdict::Serve { payload_bytes } }
}
