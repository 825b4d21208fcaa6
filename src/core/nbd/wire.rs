//! The protocol's numbers, in the protocol's own words. Every integer on the wire is big-endian ("network byte order").

/// `NBDMAGIC`, the server's first eight bytes.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, in the greeting and before each option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// `NBD_REQUEST_MAGIC`: 28 bytes: magic u32, flags u16, type u16, cookie u64, offset u64, length u32.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// `NBD_EXTENDED_REQUEST_MAGIC`: 32 bytes, the same with a length of 64 bits.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// `NBD_SIMPLE_REPLY_MAGIC`: 16 bytes: magic u32, error u32, cookie u64.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// `NBD_STRUCTURED_REPLY_MAGIC`: 20 bytes: magic u32, flags u16, type u16, cookie u64, length u32.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// `NBD_EXTENDED_REPLY_MAGIC`: 32 bytes: magic u32, flags u16, type u16, cookie u64, offset u64, length u64.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a compact request header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of an extended request header.
pub const EXTENDED_REQUEST_BYTES: usize = 32;

/// Handshake flags of the server, and the client's flags, which have the same bits.
pub mod handshake {
    /// "MUST be set by servers that support the fixed newstyle protocol".
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zeroes after EXPORT_NAME can be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Option numbers, `NBD_OPT_*`.
pub mod opt {
    /// Choose an export and enter transmission, without a way to say why not.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Ask about an export.
    pub const INFO: u32 = 6;
    /// Ask about an export and enter transmission.
    pub const GO: u32 = 7;
    /// Negotiate structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Negotiate extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types, `NBD_REP_*`.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The bit of all errors.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = ERROR_BIT + 1;
    /// The option is forbidden here.
    pub const ERR_POLICY: u32 = ERROR_BIT + 2;
    /// The option is syntactically or semantically invalid.
    pub const ERR_INVALID: u32 = ERROR_BIT + 3;
    /// TLS has to be initiated first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    /// The export is not available.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    /// The server is being shut down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    /// The request or the reply is too large.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
    /// Extended headers are required, or are in force and cannot be taken back.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT + 10;
}

/// Information types, `NBD_INFO_*`.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Block size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags, `NBD_FLAG_*`.
pub mod transmission {
    /// "MUST always be 1".
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is honoured.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is honoured.
    pub const SEND_DF: u16 = 1 << 7;
    /// Flushes cover all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is served.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is honoured.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may carry a payload.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Request types, `NBD_CMD_*`.
pub mod cmd {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Make what was acknowledged durable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask about extents.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags, `NBD_CMD_FLAG_*`.
pub mod cmd_flag {
    /// Answer only when the data is durable.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes have to stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Do not fragment the reply.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zero fast or not at all.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of a payload.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Reply chunk types, `NBD_REPLY_TYPE_*`.
pub mod chunk {
    /// The flag of the last chunk.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// Nothing more.
    pub const NONE: u16 = 0;
    /// Data.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes that are not sent.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents, lengths of 32 bits.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents, lengths of 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Flags of the context `base:allocation`.
pub mod state {
    /// "the block represents a hole".
    pub const HOLE: u32 = 1 << 0;
    /// "the block contents read as all zeroes".
    pub const ZERO: u32 = 1 << 1;
}

/// The name of the one metadata context that the protocol itself defines.
pub const BASE_ALLOCATION: &str = "base:allocation";
