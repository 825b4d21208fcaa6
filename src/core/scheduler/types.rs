//! What goes into the scheduler and what comes out of it. Data only.

use std::time::Duration;

use crate::core::ids::{BlockId, BlockIndex, Class};

/// Time since an arbitrary beginning; the driver's monotonic clock, or a test's.
pub type Now = Duration;

/// A peer that blocks can be asked of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerKey(pub u32);

/// A volume that wants blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeKey(pub u32);

/// One question under way. A flight that failed or was forgotten may be sent again under the same id, never two at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlightId(pub u64);

/// Somebody who is owed an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WaiterId(pub u64);

/// A block by its position: what can be asked of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Whose.
    pub volume: VolumeKey,
    /// Where.
    pub block: BlockIndex,
}

/// Somebody wants a block.
#[derive(Clone, Copy, Debug)]
pub struct WantBlock {
    /// Who is to be told.
    pub waiter: WaiterId,
    /// Where it stands.
    pub place: Place,
    /// What it holds, where the manifest page is here already.
    pub id: Option<BlockId>,
    /// How urgent.
    pub class: Class,
    /// Bytes in the block.
    pub len_bytes: u32,
}

/// What the driver is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Look into the store, then call [`super::Scheduler::looked_up`]. May come twice for a flight when it was promoted.
    LookUp {
        /// Of which flight.
        flight: FlightId,
        /// The block.
        id: BlockId,
        /// How urgent.
        class: Class,
    },
    /// Ask the peer.
    Send {
        /// Of which flight.
        flight: FlightId,
        /// Whom.
        peer: PeerKey,
        /// For what.
        place: Place,
        /// How urgent.
        class: Class,
    },
    /// Tell the peer that a flight that it was asked for has become more urgent.
    Promote {
        /// Which.
        flight: FlightId,
        /// Whom.
        peer: PeerKey,
        /// How urgent now.
        class: Class,
    },
    /// Tell the peer that nobody waits any more.
    Forget {
        /// Which.
        flight: FlightId,
        /// Whom.
        peer: PeerKey,
    },
}

/// A waiter with its place and class, given back when its flight ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Who.
    pub id: WaiterId,
    /// For what.
    pub place: Place,
    /// As what it asked.
    pub class: Class,
}

/// A flight that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Landed {
    /// Everybody who is owed the answer, the first asker first.
    pub waiters: Vec<Waiter>,
    /// The most urgent class that it had.
    pub class: Class,
}

/// How a peer failed to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Ask again later.
    Transient,
    /// This peer will not give this block; another place with the same id may.
    Permanent,
}

/// Bounds. See `core::limits` of the driver for the figures in use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Demand flights under way with one peer.
    pub demand_flights: usize,
    /// Readahead flights under way with one peer.
    pub readahead_flights: usize,
    /// Bulk bytes (raw) under way with one peer, unless [`super::Scheduler::set_bulk_window`] said otherwise.
    pub bulk_window_bytes: u64,
    /// The share of the link's bytes that bulk gets however busy the guests are: 0 to 0.9.
    pub bulk_min_share: f64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { demand_flights: 256, readahead_flights: 128, bulk_window_bytes: 16 << 20, bulk_min_share: 0.1 }
    }
}
