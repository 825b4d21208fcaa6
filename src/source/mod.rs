//! Answers wants from an image: hash, compress, send. Serves the manifest while it is still being hashed.
//! Must not know NBD, the control API, or where the other end keeps anything.

mod hasher;
mod manifest;
mod queue;
mod session;

use std::sync::Arc;

use futures::future::BoxFuture;

use crate::core::ids::{BlockIndex, Name};
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
    /// Somebody writes the image that is being relocated.
    #[error(
        "image {path}: was changed by somebody else while it was being read as a static image; stop that writer and relocate again"
    )]
    Changed {
        /// The image.
        path: std::path::PathBuf,
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
            SourceError::State { .. } => Refusal::Internal,
        }
    }
}

impl SourceVolume {
    /// Reads one block, checking that the image is still what was hashed.
    pub fn read_block(&self, block: BlockIndex) -> Result<Vec<u8>, SourceError> {
        let mut bytes = vec![0; self.geometry.len_of(block) as usize];
        self.image.read_at(self.geometry.offset_of(block), &mut bytes)?;
        // After the read: a change before it shows, a change after it does not matter to these bytes.
        self.manifest.check_unchanged()?;
        Ok(bytes)
    }

    /// Whether a block is known to be zero without reading it.
    pub fn is_hole(&self, block: BlockIndex) -> Result<bool, SourceError> {
        let offset = self.geometry.offset_of(block);
        Ok(self.image.is_hole(offset..offset + u64::from(self.geometry.len_of(block)))?)
    }
}
