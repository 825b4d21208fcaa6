//! What a site tells about itself: the JSON that scripts read. Field names are stable; new ones may be added.
//! Must not know where the numbers come from. Sizes are bytes; every `f64` must be finite (JSON has no other).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::core::ids::Name;
use crate::transport::Fingerprint;

pub use crate::store::StoreStats;

/// A whole site.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SiteStatus {
    /// Its name.
    pub site: Name,
    /// What peers pin, `sha256:...`.
    pub fingerprint: Fingerprint,
    /// The daemon's version.
    pub version: String,
    /// Since the daemon started.
    pub uptime_s: f64,
    /// Every volume, by name.
    pub volumes: Vec<VolumeStatus>,
    /// Every configured peer.
    pub peers: Vec<PeerStatus>,
    /// The content store.
    pub store: StoreStats,
    /// What peers are yet to be told of any volume, also of those that are no longer here.
    #[serde(default)]
    pub owed: Vec<OwedOfVolume>,
    /// The names that left this site for good.
    #[serde(default)]
    pub left: Vec<Left>,
}

/// Something that a peer is yet to be told of a volume; it is told as soon as it can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owed {
    /// Who is to be told.
    pub peer: Name,
    /// What, in a few words.
    pub what: String,
    /// The volume's epoch when it came to be owed.
    pub since_epoch: u64,
}

/// [`Owed`], with the volume that it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwedOfVolume {
    /// The volume's name.
    pub volume: Name,
    /// Who is to be told.
    pub peer: Name,
    /// What, in a few words.
    pub what: String,
    /// The volume's epoch when it came to be owed.
    pub since_epoch: u64,
}

/// A name that left this site for good: it is not served here again unless told so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The volume's name.
    pub name: Name,
    /// The site that it left for.
    pub peer: Name,
    /// The epoch in which it left.
    pub epoch: u64,
}

/// A configured peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// How it is called here.
    pub name: Name,
    /// The connection with it.
    pub state: LinkState,
    /// Smoothed round trip, while connected.
    pub rtt_ms: Option<f64>,
    /// Why the last connection ended or could not be made.
    pub last_error: Option<String>,
}

/// The state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// Nobody needs it, or the peer has not dialled yet.
    Idle,
    /// Being made.
    Connecting,
    /// Up.
    Connected,
    /// Lost; it is dialled again.
    Down,
}

/// One volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name, which is the NBD export's.
    pub name: Name,
    /// Which end of a relocation this site is.
    pub role: Role,
    /// How far it is.
    pub phase: Phase,
    /// What is being waited for, or what failed; may be empty.
    pub phase_reason: String,
    /// The site where it may be written, as far as this one knows. While the volume is asked for, or given back: the source, which may
    /// not have answered yet.
    pub owner: Name,
    /// Counts the changes of ownership.
    pub epoch: u64,
    /// Where its bytes lie here.
    pub image: PathBuf,
    /// The disk's size.
    pub size_bytes: u64,
    /// The block's size.
    pub block_size_bytes: u32,
    /// How many blocks are where.
    pub blocks: BlockCounts,
    /// Blocks whose ids are known, by whole pages of 1,024; only where all of the volume is here and its image is open.
    pub hashed_blocks: Option<u64>,
    /// What guests read, by where it came from.
    pub reads: ReadBytes,
    /// What the relocation moved, by how.
    pub moved: MovedBytes,
    /// How long guests' reads of absent blocks took.
    pub demand_latency_ms: LatencyMs,
    /// The background copy; only while there is one.
    pub bulk: Option<BulkStatus>,
    /// Until everything has arrived, at the present rate.
    pub eta_s: Option<f64>,
    /// The site at the other end of the relocation.
    pub peer: Option<Name>,
    /// The connection with it.
    pub link: Option<LinkStatus>,
    /// Connected NBD clients.
    pub nbd_clients: u32,
    /// Why guests may only read it; `None`: they may write, as far as the phase allows it.
    #[serde(default)]
    pub read_only: Option<String>,
    /// What guests wrote here that the source does not have: giving the relocation up loses so much.
    #[serde(default)]
    pub guest_written_bytes: u64,
    /// What peers are yet to be told of it.
    #[serde(default)]
    pub owed: Vec<Owed>,
}

/// Which end of a relocation this site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The volume is this site's own, also after a `reclaim`, or was handed over from here.
    Source,
    /// It comes, or came, from a peer, or is a peer's by a person's decision.
    Destination,
}

/// How far a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// At the source: served here, may be written here.
    Owned,
    /// At the source: another site is the owner now.
    Released,
    /// At the destination: the source has not answered yet.
    Connecting,
    /// At the destination: served, the background copy runs.
    Copying,
    /// At the destination: served, the background copy was paused.
    Paused,
    /// At the destination: served as far as it has arrived; the source cannot be reached, or cannot be read.
    Stalled,
    /// At the destination: everything is here, and the source is yet to hear of it.
    Complete,
    /// At the destination: everything is here, and the source knows. The end.
    ReleasedFromSource,
    /// At the destination: the relocation was given up, and the source is yet to take the volume back.
    GivingBack,
    /// This site may not write it any more: the other side reclaimed it, or it was lost to the other side. The reason
    /// says why and what to do.
    Fenced,
    /// It cannot go on; the reason says why and what to do.
    Failed,
}

impl Phase {
    /// Whether a relocation has arrived.
    pub fn has_arrived(self) -> bool {
        matches!(self, Phase::Complete | Phase::ReleasedFromSource | Phase::Owned)
    }

    /// As in the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Owned => "owned",
            Phase::Released => "released",
            Phase::Connecting => "connecting",
            Phase::Copying => "copying",
            Phase::Paused => "paused",
            Phase::Stalled => "stalled",
            Phase::Complete => "complete",
            Phase::ReleasedFromSource => "released_from_source",
            Phase::GivingBack => "giving_back",
            Phase::Fenced => "fenced",
            Phase::Failed => "failed",
        }
    }
}

/// Blocks of a volume by residency: `total = absent + present + written`. Writes to a block that is here already do not count; of a volume
/// all of which is here, every block is `present`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockCounts {
    /// All of them.
    pub total: u64,
    /// Still to come; those that the guest wrote in part are among them.
    pub absent: u64,
    /// Fetched whole, or there from the start.
    pub present: u64,
    /// Here, and a guest wrote to them before they had arrived.
    pub written: u64,
    /// Absent but for some sectors that a guest wrote.
    pub partial: u64,
}

/// Bytes that guests read, by where they were served from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadBytes {
    /// From the image: they were here already.
    pub resident_bytes: u64,
    /// Known to be zero.
    pub zero_bytes: u64,
    /// From this site's store.
    pub store_bytes: u64,
    /// Fetched from the peer for this read.
    pub wire_bytes: u64,
    /// From blocks that the guest had written in part.
    pub partial_bytes: u64,
}

/// Bytes of a relocation, by how they came. `wire_bytes` is what crossed the WAN; the other sizes are those of the
/// blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedBytes {
    /// Zero blocks: nothing moved.
    pub zero_bytes: u64,
    /// Blocks that this site's store had.
    pub store_bytes: u64,
    /// Blocks that were fetched once for several volumes, counted at those that did not ask first.
    pub joined_bytes: u64,
    /// Blocks that crossed the WAN, before compression.
    pub wire_raw_bytes: u64,
    /// The same as sent: compressed, without packet headers.
    pub wire_bytes: u64,
    /// `wire_bytes` by class.
    pub wire_by_class: WireBytes,
}

impl MovedBytes {
    /// All that has arrived, in bytes of blocks.
    pub fn arrived_bytes(&self) -> u64 {
        self.zero_bytes + self.store_bytes + self.joined_bytes + self.wire_raw_bytes
    }
}

/// Bytes that crossed the WAN, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireBytes {
    /// A guest waited.
    pub demand_bytes: u64,
    /// A guest was expected to ask.
    pub readahead_bytes: u64,
    /// The background copy.
    pub bulk_bytes: u64,
}

/// A distribution of times in milliseconds; all 0 when `count` is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyMs {
    /// How many were measured.
    pub count: u64,
    /// The median.
    pub p50: f64,
    /// 99 of 100 took less.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// The background copy of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BulkStatus {
    /// Bytes of blocks that arrive per second now, whatever they come from.
    pub rate_bytes_per_s: f64,
    /// The most that it may take of the link; `None`: no limit of its own.
    pub limit_bytes_per_s: Option<u64>,
    /// Whether somebody paused it.
    pub paused: bool,
}

/// The connection with the site at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Up or not.
    pub state: LinkState,
    /// Smoothed round trip.
    pub rtt_ms: Option<f64>,
    /// The congestion window.
    pub cwnd_bytes: Option<u64>,
}

/// A prewarm job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrewarmStatus {
    /// What is read.
    pub images: Vec<PathBuf>,
    /// Read so far.
    pub bytes_done: u64,
    /// To be read in all.
    pub bytes_total: u64,
    /// Blocks that the store did not have.
    pub blocks_new: u64,
    /// Blocks that it had.
    pub blocks_known: u64,
    /// Zero blocks, which are never stored.
    pub blocks_zero: u64,
    /// Whether it has ended.
    pub done: bool,
    /// Why it ended before it was through.
    pub error: Option<String>,
}
