//! Every bound of the transport in one place, with the reasons why they fit together. Constants only.

use crate::core::ids::Class;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// The largest control frame, in bytes.
pub const MAX_CONTROL_FRAME_BYTES: usize = MIB;
/// The largest data message, in bytes: the largest block and room for its description.
pub const MAX_DATA_MESSAGE_BYTES: usize = MIB + 64 * KIB;

/// Before every data message: its class (1 byte) and its length (3 bytes, little-endian).
pub(super) const DATA_HEADER_BYTES: usize = 4;
/// Before every control frame: its length (4 bytes, little-endian).
pub(super) const CONTROL_HEADER_BYTES: usize = 4;

/// quinn's send buffer for all streams of a connection. It is blind to priority: a class that filled it would block the
/// others, hence the budgets below. Larger than the bandwidth-delay product of 1 Gbit/s x 200 ms (25 MB).
pub(super) const SEND_WINDOW_BYTES: usize = 64 * MIB;
/// What the peer may send before it is read: bounds the memory of a connection whatever the peer does, and is larger than
/// the same bandwidth-delay product.
pub(super) const RECEIVE_WINDOW_BYTES: usize = 48 * MIB;
/// The same per stream. A whole data message fits, so that a stream never waits for its reader, and no ordered stream can
/// have the 1,024 gaps at which quinn closes the connection (quinn #2694).
pub(super) const STREAM_RECEIVE_WINDOW_BYTES: usize = 1250 * KIB;
/// Streams that the peer may have open towards us (quinn: 100). One message is one stream.
pub(super) const MAX_STREAMS: usize = 4096;

/// Bulk that the peer may have sent and that this side's consumer has not taken. The rest of [`RECEIVE_WINDOW_BYTES`]
/// stays free for urgent data however long bulk's consumer stalls.
pub(super) const BULK_CREDIT_BYTES: u64 = (40 * MIB) as u64;
/// The least that a bulk message costs of the credit, so that many small ones leave streams for urgent data.
pub(super) const BULK_LEAST_CHARGE_BYTES: u64 = (16 * KIB) as u64;
/// New credit is announced in steps of this, so that it costs a packet in a thousand.
pub(super) const BULK_CREDIT_STEP_BYTES: u64 = BULK_CREDIT_BYTES / 16;

/// Bulk written and not acknowledged is held at twice the congestion window and this: one window in the network, one to
/// refill from, little to overtake when a message is promoted.
pub(super) const BULK_BACKLOG_BASE_BYTES: u64 = MIB as u64;
/// The same, at most.
pub(super) const BULK_BACKLOG_MAX_BYTES: u64 = BULK_CREDIT_BYTES;
/// Bulk handed to quinn and not acknowledged is held at the window and an eighth of it, at least this: enough that quinn
/// never runs dry between an acknowledgement and the next write, little enough that a promotion loses little.
pub(super) const BULK_UNSENT_BYTES: u64 = (128 * KIB) as u64;
/// Demand that may be written and not acknowledged; the same for readahead.
pub(super) const URGENT_BACKLOG_BYTES: usize = 11 * MIB;
/// Frames waiting to be written to the control stream.
pub(super) const CONTROL_QUEUE_FRAMES: usize = 32;

/// Urgent messages being read, in bytes: beyond it they wait in quinn's receive window.
pub(super) const URGENT_READ_BYTES: usize = 16 * MIB;
/// Messages waiting for their consumer, per channel.
pub(super) const CONTROL_CHANNEL_FRAMES: usize = 64;
pub(super) const URGENT_CHANNEL_MESSAGES: usize = 64;
pub(super) const BULK_CHANNEL_MESSAGES: usize = 16;

/// quinn counts the acknowledged part of a chunk as buffered until all of it is acknowledged: keep chunks short.
pub(super) const WRITE_CHUNK_BYTES: usize = 64 * KIB;

// Every class can spend its budget at the same time without filling the send window.
const _: () = assert!(
    BULK_BACKLOG_MAX_BYTES as usize + 2 * URGENT_BACKLOG_BYTES + STREAM_RECEIVE_WINDOW_BYTES <= SEND_WINDOW_BYTES
);
// A stalled bulk consumer leaves several messages of room for urgent data and a whole control frame ...
const _: () = assert!(BULK_CREDIT_BYTES as usize + 4 * MAX_DATA_MESSAGE_BYTES <= RECEIVE_WINDOW_BYTES);
// ... and more than a thousand streams.
const _: () = assert!((BULK_CREDIT_BYTES / BULK_LEAST_CHARGE_BYTES) as usize + 1024 <= MAX_STREAMS);
const _: () = assert!(MAX_DATA_MESSAGE_BYTES + DATA_HEADER_BYTES <= STREAM_RECEIVE_WINDOW_BYTES);
const _: () = assert!(MAX_DATA_MESSAGE_BYTES < 1 << 24, "the length in the header has three bytes");
const _: () = assert!(MAX_DATA_MESSAGE_BYTES <= URGENT_BACKLOG_BYTES && MAX_DATA_MESSAGE_BYTES <= URGENT_READ_BYTES);

/// What a bulk message costs of the credit.
pub(super) fn bulk_charge(message_bytes: usize) -> u64 {
    (message_bytes as u64).max(BULK_LEAST_CHARGE_BYTES)
}

/// quinn's stream priority (strict, the greatest first) of the `number`th message: by class, and within a class first come,
/// first served. Round robin, quinn's way with equal priorities, would finish all of a class at the same, late time, and
/// let bulk's acknowledgements come in clumps.
pub(super) fn priority(class: Class, number: u64) -> i32 {
    /// So many messages until the numbers start anew; then a few old ones are overtaken once.
    const BAND: i32 = 1 << 28;
    let floor = match class {
        Class::Demand => 2 * BAND,
        Class::Readahead => BAND,
        Class::Bulk => 0,
    };
    floor + (BAND - 1 - (number % BAND as u64) as i32)
}

/// Above every class.
pub(super) const CONTROL_PRIORITY: i32 = i32::MAX;

/// A semaphore's permits for so many bytes: one a KiB, since tokio counts in `u32`.
pub(super) fn kib_permits(bytes: usize) -> u32 {
    bytes.div_ceil(KIB).max(1) as u32
}
