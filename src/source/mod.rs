//! Answers wants from an image: hash, compress, send. Serves the manifest while it is still being hashed.
//! Must not know NBD, the control API, or where the other end keeps anything.

mod hasher;
mod manifest;
mod queue;
mod session;

use std::sync::Arc;

use futures::future::BoxFuture;

use crate::core::ids::{BlockId, BlockIndex, Name};
use crate::core::manifest::Geometry;
use crate::core::wire::Refusal;
use crate::image::{Image, ImageError};

pub use hasher::Hasher;
pub use manifest::Manifest;
pub use session::{SourceOptions, serve_link};

/// An image that blocks are served from, with what is known of its ids.
#[derive(Debug)]
pub struct SourceVolume {
    /// The volume's name.
    pub name: Name,
    /// Where the bytes lie.
    pub image: Arc<Image>,
    /// Shape of the image.
    pub geometry: Geometry,
    /// Its manifest, as far as it is hashed.
    pub manifest: Arc<Manifest>,
    /// Counts hand-overs and contents: the destination holds on to what it was told under one number.
    pub generation: u64,
}

/// A refusal with its explanation for the peer.
pub type Refused = (Refusal, String);

/// What the source asks of the site: who may have what, and who owns it. Implemented where all is put together.
pub trait Catalog: Send + Sync + 'static {
    /// The volume and the epoch at which this site owns it, if `peer` was granted it.
    fn open(&self, peer: &Name, volume: &Name) -> Result<(Arc<SourceVolume>, u64), Refused>;
    /// Moves ownership to `peer`: no write is admitted from here on, those under way have ended and are durable, and the new
    /// epoch is journalled, before this returns. Asking again gives the same answer.
    fn take_over<'a>(&'a self, peer: &'a Name, volume: &'a Name, epoch: u64) -> BoxFuture<'a, Result<u64, Refused>>;
    /// The peer has every block: the volume is released.
    fn completed<'a>(&'a self, peer: &'a Name, volume: &'a Name, epoch: u64) -> BoxFuture<'a, Result<u64, Refused>>;
    /// The peer gives the volume back unwritten.
    fn give_back<'a>(&'a self, peer: &'a Name, volume: &'a Name, epoch: u64) -> BoxFuture<'a, Result<u64, Refused>>;
}

/// Why a source could not answer.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Reading failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Somebody changed the image after it was released.
    #[error(
        "image {path}: was changed by somebody else: {what}; stop that writer and put the image back as it was, or cancel the relocation at its destination"
    )]
    Changed {
        /// The image.
        path: std::path::PathBuf,
        /// Which block, and how that is known.
        what: String,
    },
    /// The volume was removed, or is served anew.
    #[error("volume {volume} is not served as it was opened any more; open it again")]
    Gone {
        /// Which.
        volume: Name,
    },
    /// The state database failed.
    #[error("the ids of volume {volume} could not be kept: {source}")]
    State {
        /// Whose.
        volume: Name,
        /// Why.
        source: crate::store::StateError,
    },
}

impl SourceError {
    /// What the peer is told.
    pub fn refusal(&self) -> Refusal {
        match self {
            SourceError::Image(ImageError::Shorter { .. }) | SourceError::Changed { .. } => Refusal::ImageChanged,
            SourceError::Image(_) => Refusal::ReadFailed,
            SourceError::Gone { .. } => Refusal::UnknownVolume,
            SourceError::State { .. } => Refusal::Internal,
        }
    }
}

impl SourceVolume {
    /// One block and its id; no bytes for one of zeros. Of a released image, only what was announced of it.
    pub fn read_block(&self, block: BlockIndex) -> Result<(BlockId, Option<Vec<u8>>), SourceError> {
        let (offset, len_bytes) = (self.geometry.offset_of(block), self.geometry.len_of(block));
        // An image that is written has holes where data is not written back; a released one was synced.
        let is_hole =
            self.manifest.is_released() && self.image.is_hole(offset..offset + u64::from(len_bytes)).unwrap_or(false);
        if is_hole {
            self.manifest.admit(block, BlockId::ZERO)?;
            return Ok((BlockId::ZERO, None));
        }
        let mut bytes = vec![0; len_bytes as usize];
        self.image.read_at(offset, &mut bytes)?;
        let id = BlockId::of(&bytes);
        // After the read: a change before it shows, a change after it does not matter to these bytes.
        self.manifest.admit(block, id)?;
        Ok((id, (!id.is_zero()).then_some(bytes)))
    }
}
