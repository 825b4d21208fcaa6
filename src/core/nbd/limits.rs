//! Every bound of the NBD codec in one place. Pure numbers.

/// The longest string: "MUST be no longer than 4096 bytes".
pub const MAX_STRING_BYTES: usize = 4096;

/// The most option data that is taken in: room for the longest name and several hundred queries. A client that
/// announces more is disconnected ("if a server believes a client's behaviour constitutes a denial of service, it MAY
/// initiate a hard disconnect"); nothing is allocated for it.
pub const MAX_OPTION_BYTES: usize = 64 << 10;

/// The largest payload of a READ or a WRITE: "any payload length not exceeding 2^25 (33,554,432) bytes SHOULD
/// NOT be considered a denial of service attack".
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// The advertised minimum block size: any byte can be addressed.
pub const MIN_BLOCK_BYTES: u32 = 1;

/// The advertised preferred block size where an export names none that is allowed.
pub const DEFAULT_PREFERRED_BYTES: u32 = 4096;

/// The most extents in one chunk of a reply to BLOCK_STATUS.
pub const MAX_EXTENTS: usize = 2048;

/// The longest request header (the extended one).
pub const REQUEST_HEADER_MAX_BYTES: usize = 32;

/// The most payload of a BLOCK_STATUS: its effect length and more context ids than anybody can have selected.
pub(crate) const MAX_STATUS_PAYLOAD_BYTES: u32 = 4096;

// GO with the longest name and a handful of information requests has to fit.
const _: () = assert!(MAX_OPTION_BYTES >= 2 * MAX_STRING_BYTES);
// "MUST be at least as large as the smaller of the preferred block size or export size": preferred sizes are cut to 64
// KiB.
const _: () = assert!(MAX_PAYLOAD_BYTES >= 64 << 10 && DEFAULT_PREFERRED_BYTES >= 512);
// A status payload is buffered whole.
const _: () = assert!(MAX_STATUS_PAYLOAD_BYTES < MAX_PAYLOAD_BYTES);
