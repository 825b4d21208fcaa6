//! Requests: from header bytes to a checked [`Command`], or to the error that answers them. Pure.
//!
//! All bounds are checked here, against the size and the flags that were negotiated; what runs commands need not check
//! again.

use super::errno::NbdErrno;
use super::limits::{MAX_PAYLOAD_BYTES, MAX_STATUS_PAYLOAD_BYTES};
use super::reply::ReplyStyle;
use super::wire::{self, cmd, cmd_flag, transmission};

/// Which of its metadata contexts an export is asked about: the position in the list of names that the export gave. It
/// is also the metadata context id on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContextIndex(pub u32);

/// What the handshake agreed on, for the whole transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The form of requests and replies.
    pub style: ReplyStyle,
    /// The transmission flags that the client was told.
    pub flags: u16,
    /// The size that the client was told, in bytes.
    pub size_bytes: u64,
    /// The metadata contexts that the client selected, each once.
    pub contexts: Vec<ContextIndex>,
}

/// What a reply has to repeat of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// "the server MUST use the same value for cookie as was sent by the client [...], treating the cookie as an opaque
    /// field".
    pub cookie: u64,
    /// The request's offset, which an extended reply repeats: "MUST match the request".
    pub offset: u64,
}

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The range may become a hole (NO_HOLE was not set).
    pub may_punch: bool,
    /// FAST_ZERO: "the server MUST fail quickly with NBD_ENOTSUP unless the request can be serviced in less time than a
    /// corresponding NBD_CMD_WRITE".
    pub fast: bool,
}

/// A checked request: every range lies within the export and is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read.
    Read {
        /// First byte.
        offset: u64,
        /// Length, at most [`MAX_PAYLOAD_BYTES`].
        len_bytes: u32,
        /// The reply has to be one chunk of data.
        dont_fragment: bool,
    },
    /// Write; the payload follows the header.
    Write {
        /// First byte.
        offset: u64,
        /// Length of the payload, at most [`MAX_PAYLOAD_BYTES`].
        len_bytes: u32,
        /// Answer when durable.
        fua: bool,
    },
    /// End the session after all outstanding requests; there is no reply.
    Disconnect,
    /// Make what was acknowledged durable.
    Flush,
    /// Discard.
    Trim {
        /// First byte.
        offset: u64,
        /// Length.
        len_bytes: u64,
        /// Answer when durable.
        fua: bool,
    },
    /// Prefetch.
    Cache {
        /// First byte.
        offset: u64,
        /// Length.
        len_bytes: u64,
    },
    /// Write zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Length.
        len_bytes: u64,
        /// How.
        flags: ZeroFlags,
        /// Answer when durable.
        fua: bool,
    },
    /// Ask for the extents of all selected contexts.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Length of interest.
        len_bytes: u64,
        /// One extent only.
        one: bool,
    },
    /// The same for some contexts; a payload, to be read by [`parse_status_payload`], says which and how many bytes.
    BlockStatusOf {
        /// First byte.
        offset: u64,
        /// Length of the payload, at most 4 KiB.
        payload_bytes: u32,
        /// One extent only.
        one: bool,
    },
}

impl Command {
    /// The bytes that follow the header on the wire.
    pub fn payload_bytes(&self) -> u32 {
        match *self {
            Command::Write { len_bytes, .. } => len_bytes,
            Command::BlockStatusOf { payload_bytes, .. } => payload_bytes,
            _ => 0,
        }
    }

    /// The error to send when running this command failed with `errno`: two values are reserved for one case each.
    pub fn error_to_send(&self, errno: NbdErrno) -> NbdErrno {
        match (errno, self) {
            // "The server SHOULD NOT return NBD_EOVERFLOW except as documented in response to NBD_CMD_READ when
            // NBD_CMD_FLAG_DF is supported."
            (NbdErrno::Overflow, Command::Read { dont_fragment: true, .. }) => errno,
            (NbdErrno::Overflow, _) => NbdErrno::Inval,
            // "The server SHOULD NOT return NBD_ENOTSUP except as documented in response to NBD_CMD_WRITE_ZEROES when
            // NBD_CMD_FLAG_FAST_ZERO is supported."
            (NbdErrno::NotSup, Command::WriteZeroes { flags: ZeroFlags { fast: true, .. }, .. }) => errno,
            (NbdErrno::NotSup, _) => NbdErrno::Inval,
            _ => errno,
        }
    }
}

/// A request that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// For its reply.
    pub tag: Tag,
    /// What to do.
    pub command: Command,
}

/// A request that is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRequest {
    /// For its reply.
    pub tag: Tag,
    /// The error.
    pub errno: NbdErrno,
    /// What is wrong, for people.
    pub reason: &'static str,
    /// Payload that has to be taken off the stream first: "a server SHOULD gracefully consume length bytes of payload
    /// (even if it then replies with an NBD_EINVAL failure [...]), and proceed with the next client command".
    pub skip_bytes: u64,
}

/// What ends a connection at once: "Either side MAY initiate a hard disconnect if it detects a violation by the other
/// party of a mandatory condition".
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The stream is out of step, or the client does not speak NBD.
    #[error("a request starts with {0:#010x}, which is not the magic number that was negotiated; disconnecting")]
    Magic(u32),
    /// "A server SHOULD initiate hard disconnect if a client sets the NBD_CMD_FLAG_PAYLOAD_LEN flag and uses a length
    /// larger than a server's advertised or default maximum payload length".
    #[error("a payload of {0} bytes is announced, more than the advertised maximum of 32 MiB; disconnecting")]
    Payload(u64),
}

/// What stands at the beginning of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Less than a header.
    Incomplete,
    /// A request, [`Session::header_bytes`] long, its payload not included.
    Request(Request),
    /// A request that fails, [`Session::header_bytes`] long.
    Bad(BadRequest),
    /// The connection has to end.
    Fault(Fault),
}

impl Session {
    /// The length of every request header of this session.
    pub fn header_bytes(&self) -> usize {
        match self.style {
            ReplyStyle::Extended => wire::EXTENDED_REQUEST_BYTES,
            _ => wire::REQUEST_BYTES,
        }
    }

    /// Reads and checks the request header at the beginning of `input`.
    pub fn parse(&self, input: &[u8]) -> Parsed {
        let extended = self.style == ReplyStyle::Extended;
        let wanted = if extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
        // The magic is checked as soon as it is there: whoever speaks another protocol may never send a whole header.
        let Some(magic) = input.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)) else {
            return Parsed::Incomplete;
        };
        if magic != wanted {
            return Parsed::Fault(Fault::Magic(magic));
        }
        if input.len() < self.header_bytes() {
            return Parsed::Incomplete;
        }
        let flags = be_u16(input, 4);
        let kind = be_u16(input, 6);
        let tag = Tag { cookie: be_u64(input, 8), offset: be_u64(input, 16) };
        let len_bytes = if extended { be_u64(input, 24) } else { u64::from(be_u32(input, 24)) };

        // "With extended headers, the flag MUST be set for NBD_CMD_WRITE (as the write command always sends a payload
        // of the bytes to be written)". The clients of QEMU (10.0) do not set it, and its server takes their payload
        // all the same; so does this one. In the compact style "the only command where length represents payload length
        // instead of effect length is NBD_CMD_WRITE".
        let has_payload = kind == cmd::WRITE || (extended && flags & cmd_flag::PAYLOAD_LEN != 0 && kind != cmd::DISC);
        let skip_bytes = if has_payload { len_bytes } else { 0 };
        // A compact WRITE announces less than 4 GiB: that is consumed without being kept. An extended one could keep
        // the connection busy for ever.
        if extended && skip_bytes > u64::from(MAX_PAYLOAD_BYTES) {
            return Parsed::Fault(Fault::Payload(skip_bytes));
        }
        match self.check(kind, flags, tag.offset, len_bytes) {
            Ok(command) => Parsed::Request(Request { tag, command }),
            Err((errno, reason)) => Parsed::Bad(BadRequest { tag, errno, reason, skip_bytes }),
        }
    }

    fn check(&self, kind: u16, flags: u16, offset: u64, len_bytes: u64) -> Result<Command, (NbdErrno, &'static str)> {
        let extended = self.style == ReplyStyle::Extended;
        let offers = |flag: u16| self.flags & flag != 0;
        let flag_if = |offered: bool, flag: u16| if offered { flag } else { 0 };
        let allowed = match kind {
            cmd::READ => flag_if(offers(transmission::SEND_DF), cmd_flag::DF),
            cmd::WRITE => flag_if(extended, cmd_flag::PAYLOAD_LEN),
            // "The values of the length and offset fields in a disconnect request MUST be zero", but there is no reply
            // in which to complain.
            cmd::DISC => return Ok(Command::Disconnect),
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | flag_if(offers(transmission::SEND_FAST_ZERO), cmd_flag::FAST_ZERO),
            cmd::BLOCK_STATUS => {
                cmd_flag::REQ_ONE | flag_if(offers(transmission::BLOCK_STATUS_PAYLOAD), cmd_flag::PAYLOAD_LEN)
            }
            cmd::FLUSH | cmd::TRIM | cmd::CACHE => 0,
            // "The server SHOULD return NBD_EINVAL if it receives an unknown command."
            _ => return Err((NbdErrno::Inval, "unknown command")),
        };
        // "This flag is valid for all commands, provided NBD_FLAG_SEND_FUA has been negotiated, in which case the
        // server MUST accept all commands with this bit set (even by ignoring the bit)." "The server SHOULD return
        // NBD_EINVAL if it receives an unknown command flag. It also SHOULD return NBD_EINVAL if it receives a request
        // with a flag not explicitly documented as applicable to the given request."
        if flags & !(allowed | flag_if(offers(transmission::SEND_FUA), cmd_flag::FUA)) != 0 {
            return Err((NbdErrno::Inval, "a flag that is unknown, not offered or not meant for this command"));
        }
        // "If this flag is set, the server MUST error subsequent write operations to the export"; "it SHOULD return
        // NBD_EPERM if it receives a write or trim request on a read-only export".
        if offers(transmission::READ_ONLY) && matches!(kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES) {
            return Err((NbdErrno::Perm, "the export is read-only"));
        }
        let fua = flags & cmd_flag::FUA != 0;
        // A payload of BLOCK_STATUS stands where the length of other commands does.
        if kind == cmd::BLOCK_STATUS {
            // "Servers SHOULD reply with NBD_EINVAL to clients sending NBD_CMD_BLOCK_STATUS without selecting at least
            // one metadata context."
            if self.contexts.is_empty() {
                return Err((NbdErrno::Inval, "no metadata context was selected"));
            }
            let one = flags & cmd_flag::REQ_ONE != 0;
            if flags & cmd_flag::PAYLOAD_LEN != 0 {
                let payload_bytes = u32::try_from(len_bytes).unwrap_or(u32::MAX);
                if !(12..=MAX_STATUS_PAYLOAD_BYTES).contains(&payload_bytes) || !payload_bytes.is_multiple_of(4) {
                    return Err((NbdErrno::Inval, "a payload that is not 8 bytes and one context id or more"));
                }
                return Ok(Command::BlockStatusOf { offset, payload_bytes, one });
            }
            self.range(offset, len_bytes, NbdErrno::Inval)?;
            return Ok(Command::BlockStatus { offset, len_bytes, one });
        }
        match kind {
            cmd::READ => {
                // "The server SHOULD report an NBD_EINVAL error if the client's request [...] is larger than the
                // advertised maximum block size."
                let len_bytes = payload_len(len_bytes)?;
                // "It SHOULD return NBD_EINVAL if it receives a read or trim request including one or more sectors
                // beyond the size of the device".
                self.range(offset, u64::from(len_bytes), NbdErrno::Inval)?;
                Ok(Command::Read { offset, len_bytes, dont_fragment: flags & cmd_flag::DF != 0 })
            }
            cmd::WRITE => {
                let len_bytes = payload_len(len_bytes)?;
                // "The server SHOULD return NBD_ENOSPC if it receives a write request including one or more sectors
                // beyond the size of the device."
                self.range(offset, u64::from(len_bytes), NbdErrno::NoSpc)?;
                Ok(Command::Write { offset, len_bytes, fua })
            }
            cmd::FLUSH => {
                // "For a flush request, length and offset are reserved, and MUST be set to all-zero."
                if offset != 0 || len_bytes != 0 {
                    return Err((NbdErrno::Inval, "a flush with an offset or a length"));
                }
                Ok(Command::Flush)
            }
            cmd::TRIM => {
                self.range(offset, len_bytes, NbdErrno::Inval)?;
                Ok(Command::Trim { offset, len_bytes, fua })
            }
            cmd::CACHE => {
                self.range(offset, len_bytes, NbdErrno::Inval)?;
                Ok(Command::Cache { offset, len_bytes })
            }
            _ => {
                // "The server SHOULD return NBD_ENOSPC if it receives a write zeroes request including one or more
                // sectors beyond the size of the device."
                self.range(offset, len_bytes, NbdErrno::NoSpc)?;
                let may_punch = flags & cmd_flag::NO_HOLE == 0;
                let flags = ZeroFlags { may_punch, fast: flags & cmd_flag::FAST_ZERO != 0 };
                Ok(Command::WriteZeroes { offset, len_bytes, flags, fua })
            }
        }
    }

    /// Whether `offset + len_bytes` lies within the export. A length of 0 is an error too: its behaviour "is
    /// unspecified although the server SHOULD NOT disconnect".
    fn range(&self, offset: u64, len_bytes: u64, beyond: NbdErrno) -> Result<(), (NbdErrno, &'static str)> {
        if len_bytes == 0 {
            return Err((NbdErrno::Inval, "a length of 0"));
        }
        match offset.checked_add(len_bytes) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err((beyond, "the range does not lie within the export")),
        }
    }
}

fn payload_len(len_bytes: u64) -> Result<u32, (NbdErrno, &'static str)> {
    match u32::try_from(len_bytes) {
        Ok(len_bytes) if len_bytes <= MAX_PAYLOAD_BYTES => Ok(len_bytes),
        _ => Err((NbdErrno::Inval, "longer than the advertised maximum of 32 MiB")),
    }
}

/// Reads the payload of a [`Command::BlockStatusOf`] at `offset`: 64 bits effect length, then context ids of 32 bits.
/// Returns the length of interest and the contexts.
///
/// "duplicate or unknown metacontext ids [...] MUST gracefully consume the client's payload before failing with
/// NBD_EINVAL": the payload has been consumed by whoever calls.
pub fn parse_status_payload(
    session: &Session,
    offset: u64,
    payload: &[u8],
) -> Result<(u64, Vec<ContextIndex>), (NbdErrno, &'static str)> {
    let Some((length, ids)) = payload.split_first_chunk::<8>() else {
        return Err((NbdErrno::Inval, "a payload of less than 8 bytes"));
    };
    let len_bytes = u64::from_be_bytes(*length);
    session.range(offset, len_bytes, NbdErrno::Inval)?;
    let mut contexts = Vec::with_capacity(session.contexts.len());
    let (ids, rest) = ids.as_chunks::<4>();
    if !rest.is_empty() || ids.is_empty() {
        return Err((NbdErrno::Inval, "a payload that is not 8 bytes and one context id or more"));
    }
    for id in ids {
        let context = ContextIndex(u32::from_be_bytes(*id));
        if !session.contexts.contains(&context) || contexts.contains(&context) {
            return Err((NbdErrno::Inval, "a context id twice, or one that was not selected"));
        }
        contexts.push(context);
    }
    Ok((len_bytes, contexts))
}

// The callers have checked that the header is complete.
fn be_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be_u16(bytes, at)) << 16 | u32::from(be_u16(bytes, at + 2))
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be_u32(bytes, at)) << 32 | u64::from(be_u32(bytes, at + 4))
}
