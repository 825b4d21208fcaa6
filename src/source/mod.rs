//! Answers wants from an image: hash, compress, send. Serves the manifest while it is still being hashed.
//! Must not know NBD, the control API, or where the other end keeps anything.

mod hasher;
mod manifest;
mod queue;
mod session;

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use futures::future::BoxFuture;

use crate::core::ids::{BlockId, BlockIndex, Incarnation, Name, Nonce};
use crate::core::manifest::Geometry;
use crate::core::wire::Refusal;
use crate::handover::{Answer, Question};
use crate::image::{Image, ImageError};
use crate::seeded_bugs::{Bug, is_planted};
use crate::store::{State, StateBatch, StateError};
use crate::transport::Link;

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

/// A volume as a peer opened it: good for as long as it holds what it held then, or what is released of that. It keeps nothing of the volume
/// open.
#[derive(Clone, Debug)]
pub struct Opening {
    volume: Weak<SourceVolume>,
    /// The volume's name.
    pub name: Name,
    /// Shape of the image.
    pub geometry: Geometry,
    /// See [`SourceVolume::generation`].
    pub generation: u64,
    edition: u64,
}

/// A refusal for the peer: why, the epoch that holds here (0: none), and words.
pub type Refused = (Refusal, u64, String);

/// A volume that a peer may fetch.
#[derive(Clone, Debug)]
pub struct Offered {
    /// What the peer opens.
    pub opening: Opening,
    /// The epoch that holds here.
    pub epoch: u64,
    /// Whether its guests may only read it.
    pub is_read_only: bool,
}

/// What a session asks of the site: who may have what, and who owns it. Implemented where all is put together.
pub trait Catalog: Send + Sync + 'static {
    /// The volume, if `peer` may have it.
    fn open(&self, peer: &Name, volume: &Name) -> Result<Offered, Refused>;
    /// A question about who owns a volume. It counts as asked when this returns, so that questions are handled in the order in which they
    /// came; the answer follows. Dropping that tells that nobody waits any more.
    fn ask(&self, peer: &Name, volume: &Name, question: Question) -> BoxFuture<'static, Answer>;
    /// Who is at the other end of a new link says which instance of its site it is; why it is turned away, if it is not the one that was
    /// here. An earlier link of the same site has ended when this returns.
    fn greet(&self, link: &Arc<dyn Link>, last: Nonce, next: Nonce) -> Result<(), (Refusal, String)>;
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
    /// A guest wrote to it while it was being released: the hand-over was withdrawn meanwhile.
    #[error("volume {volume} was written while it was being handed over; ask for it again")]
    Written {
        /// Which.
        volume: Name,
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

/// Deletes what is kept of images that none of `known` is: of volumes that are gone, and by names, as earlier versions did.
pub fn forget_strangers(state: &dyn State, known: &[Incarnation]) -> Result<(), StateError> {
    let mut strangers = BTreeSet::new();
    let is_known = |key: &[u8]| known.iter().any(|of| key.starts_with(format!("hash/{of}/").as_bytes()));
    state.scan(b"hash/", &mut |key, _| {
        if !is_known(key) {
            let end = key.iter().skip(5).position(|byte| *byte == b'/').map_or(key.len(), |at| at + 6);
            strangers.insert(key[..end].to_vec());
        }
        true
    })?;
    let mut batch = StateBatch::default();
    strangers.into_iter().for_each(|prefix| batch.delete_prefix(prefix));
    if batch.is_empty() { Ok(()) } else { state.write_batch(batch, true) }
}

impl SourceError {
    /// What the peer is told.
    pub fn refusal(&self) -> Refusal {
        match self {
            SourceError::Image(ImageError::Shorter { .. }) | SourceError::Changed { .. } => Refusal::ImageChanged,
            SourceError::Image(_) => Refusal::ReadFailed,
            SourceError::Written { .. } => Refusal::Busy,
            SourceError::Gone { .. } => Refusal::UnknownVolume,
            SourceError::State { .. } => Refusal::Internal,
        }
    }
}

impl Opening {
    /// What was opened; [`SourceError::Gone`] once it is given up, or served anew.
    pub fn volume(&self) -> Result<Arc<SourceVolume>, SourceError> {
        self.volume.upgrade().ok_or_else(|| self.gone())
    }

    /// Whether what was read of `volume` before this call may be sent to who opened it: [`SourceError::Gone`] once it is given up, or taken back
    /// from the peer that it was released to. What guests write to it from then on is nothing that the peer may mix with what it has.
    pub fn check(&self, volume: &SourceVolume) -> Result<(), SourceError> {
        let is_another = volume.manifest.edition() != self.edition && !is_planted(Bug::OpeningOutlivesRelease);
        if is_another || volume.manifest.is_closed() { Err(self.gone()) } else { Ok(()) }
    }

    fn gone(&self) -> SourceError {
        SourceError::Gone { volume: self.name.clone() }
    }
}

impl SourceVolume {
    /// Opens it. To be called before it is looked up to whom the volume belongs.
    pub fn open(self: &Arc<Self>) -> Opening {
        Opening {
            volume: Arc::downgrade(self),
            name: self.name.clone(),
            geometry: self.geometry,
            generation: self.generation,
            edition: self.manifest.edition(),
        }
    }

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
