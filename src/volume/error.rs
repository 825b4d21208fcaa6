//! What can go wrong with a volume's reads and writes, sorted by who has to act. Must not know NBD's numbers.

use std::time::Duration;

use crate::core::ids::Name;
use crate::fetch::FetchError;
use crate::image::ImageError;
use crate::store::StateError;

/// Why a read, a write or a flush of a volume failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Another site owns it.
    #[error("volume {volume} belongs to another site: it may not be written here")]
    NotOwner {
        /// Which.
        volume: Name,
    },
    /// The image can only be read.
    #[error("volume {volume}: its image can only be read")]
    ReadOnly {
        /// Which.
        volume: Name,
    },
    /// The file.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The journal.
    #[error(transparent)]
    State(#[from] StateError),
    /// The peer.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The peer could not be reached for as long as the configuration says.
    #[error("a block did not come within {} s ([demand] timeout): {why}", .after.as_secs())]
    TimedOut {
        /// How long it was waited for.
        after: Duration,
        /// What it was waited for.
        why: String,
    },
    /// An earlier sync failed, so nobody knows what the disk holds.
    #[error(
        "volume {volume}: the disk failed to sync, so nobody knows what it holds; restart the daemon when the disk is well again"
    )]
    SyncFailed {
        /// Which.
        volume: Name,
    },
    /// The write could not be noted in the manifest.
    #[error("volume {volume}: {why}")]
    Observer {
        /// Which.
        volume: Name,
        /// What failed.
        why: String,
    },
    /// The volume is gone from this site: whoever still holds it can do nothing with it.
    #[error("volume {volume} was given up here")]
    Closed {
        /// Which.
        volume: Name,
    },
    /// A peer, or the store, gave a block that is not as long as it must be.
    #[error(
        "volume {volume}: block {block} came with {got_bytes} bytes instead of {expected_bytes}; it is not written; see the source's log"
    )]
    BlockLength {
        /// Which volume.
        volume: Name,
        /// Which block, by its index.
        block: u64,
        /// What came.
        got_bytes: usize,
        /// What is right.
        expected_bytes: u32,
    },
    /// The daemon is going down.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

impl VolumeError {
    /// Whether making room on the disk helps.
    pub fn is_no_space(&self) -> bool {
        match self {
            VolumeError::Image(error) => error.is_no_space(),
            VolumeError::State(error) => error.is_no_space(),
            _ => false,
        }
    }
}
