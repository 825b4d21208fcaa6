//! Volumes all of which are here: added, restored after a restart, removed. Must not know fetching.

use std::path::Path;
use std::sync::Arc;

use super::record::{Ownership, RecordError, VolumeRecord};
use super::{Entry, Node};
use crate::control::{AddVolume, ApiError, ErrorKind};
use crate::core::ids::Name;
use crate::core::manifest::Geometry;
use crate::image::{Image, ImageError};
use crate::source::{Manifest, SourceError, SourceVolume};
use crate::volume::{Volume, VolumeParts, WriteObserver};

impl WriteObserver for SourceVolume {
    fn note_write(&self, bytes: std::ops::Range<u64>) -> Result<(), String> {
        self.manifest.note_write(bytes).map_err(|error| error.to_string())
    }
}

impl Node {
    /// A record in the journal and then in memory.
    pub(super) fn save(&self, entry: &Entry, record: VolumeRecord) -> Result<(), RecordError> {
        self.records.save(&record)?;
        *entry.record.lock() = record;
        Ok(())
    }

    /// Takes an image into ownership.
    pub(super) async fn add_owned(self: &Arc<Self>, add: AddVolume) -> Result<(), ApiError> {
        let _reserved = self.reserve(&add.name)?;
        // First: the lock on the image would only say that somebody has it.
        self.refuse_shared_image(&add.name, &add.image)?;
        let image = open_image(&add.image)
            .map_err(|error| ApiError::new(ErrorKind::Invalid, format!("volume {}: {error}", add.name), ""))?;
        let block_size = u64::from(self.config.store.block_size.bytes());
        let geometry = Geometry::new(image.size_bytes(), block_size)
            .map_err(|error| ApiError::new(ErrorKind::Invalid, format!("volume {}: {error}", add.name), ""))?;
        let mut record = VolumeRecord::new(add.name.clone(), add.image, geometry, 1, Ownership::Owned);
        // Another image under the same name must never pass for this one.
        record.generation = random_generation();
        let internal = |error: String| ApiError::new(ErrorKind::Internal, format!("volume {}: {error}", add.name), "");
        let entry = self.make_complete(record.clone(), image, true).map_err(|error| internal(format!("{error:#}")))?;
        self.records.save(&record).map_err(|error| internal(error.to_string()))?;
        self.volumes.lock().insert(add.name.clone(), entry);
        tracing::info!(volume = %add.name, size_bytes = geometry.size_bytes, "a volume is served");
        Ok(())
    }

    /// Brings a journalled volume back.
    pub(super) async fn restore(self: &Arc<Self>, record: VolumeRecord) -> anyhow::Result<()> {
        let name = record.name.clone();
        let entry = match &record.state {
            Ownership::Owned | Ownership::Arrived { .. } => {
                let image = open_image(&record.image)?;
                self.check_size(&record, &image)?;
                let entry = self.make_complete(record.clone(), image, true)?;
                if let Ownership::Arrived { from, is_released: false } = &record.state {
                    self.tell_source_later(&entry, from.clone(), record.epoch);
                }
                entry
            }
            Ownership::Released { .. } => {
                let image = open_image(&record.image)?;
                self.check_size(&record, &image)?;
                self.make_complete(record.clone(), image, false)?
            }
            Ownership::Arriving { .. } => self.restore_arriving(record)?,
        };
        self.volumes.lock().insert(name, entry);
        Ok(())
    }

    /// Stops serving a volume that nobody depends on. Its image stays.
    pub(super) async fn remove_owned(&self, name: &Name) -> Result<(), ApiError> {
        if let Some(removed) = self.remove_unserved(name) {
            return removed;
        }
        let entry = self.served(name)?;
        let _turn = entry.turn.lock().await;
        may_remove(name, &entry.record.lock().state)?;
        if entry.clients() > 0 {
            return Err(ApiError::new(
                ErrorKind::Conflict,
                format!("volume {name} is in use by {} NBD clients", entry.clients()),
                "disconnect them first",
            ));
        }
        let internal = |error: String| ApiError::new(ErrorKind::Internal, format!("volume {name}: {error}"), "");
        let was_owner = entry.volume.is_owner();
        let fenced = entry.volume.fence().await.map_err(|error| error.to_string());
        if let Err(why) = fenced.and_then(|()| self.records.delete(name).map_err(|error| error.to_string())) {
            if was_owner {
                entry.volume.unfence();
            }
            return Err(internal(why));
        }
        let _ = entry.stop.send(true);
        self.volumes.lock().remove(name);
        Ok(())
    }

    /// A volume all of which is in its image, ready to be a source.
    pub(super) fn make_complete(
        &self,
        record: VolumeRecord,
        image: Image,
        is_owner: bool,
    ) -> anyhow::Result<Arc<Entry>> {
        let volume = Arc::new(Volume::complete(VolumeParts {
            name: record.name.clone(),
            incarnation: super::relocate::incarnation_of(&record),
            image: Arc::new(image),
            geometry: record.geometry,
            state: Arc::clone(&self.state),
            workers: self.disk_workers.clone(),
            is_owner,
        }));
        let entry = Entry::new(record, volume);
        self.renew_source(&entry)?;
        Ok(entry)
    }

    /// Makes (anew) what peers fetch from, of an image that no guest writes at this moment.
    pub(super) fn renew_source(&self, entry: &Entry) -> Result<(), SourceError> {
        let record = entry.record.lock().clone();
        let image = Arc::clone(entry.volume.image());
        let is_released = matches!(record.state, Ownership::Released { .. });
        let manifest = Manifest::open(record.name, image, record.geometry, Arc::clone(&self.state), is_released)?;
        self.set_source(entry, Arc::new(manifest));
        Ok(())
    }

    /// As [`Node::renew_source`] while guests write. Blocks until the writes that nobody noted have ended: what was
    /// looked at before that would be believed for ever.
    pub(super) fn begin_source(&self, entry: &Entry) -> Result<(), SourceError> {
        let record = entry.record.lock().clone();
        let image = Arc::clone(entry.volume.image());
        let manifest = Manifest::open_written(record.name, image, record.geometry, Arc::clone(&self.state))?;
        self.set_source(entry, Arc::new(manifest));
        Ok(())
    }

    /// After a change of ownership the generation is another; the manifest is still right, and two that keep rows of
    /// one image would not see each other's writes.
    pub(super) fn renew_generation(&self, entry: &Entry) -> Result<(), SourceError> {
        let kept = entry.source.lock().as_ref().map(|source| Arc::clone(&source.manifest));
        match kept {
            Some(manifest) => {
                self.set_source(entry, manifest);
                Ok(())
            }
            None => self.renew_source(entry),
        }
    }

    fn set_source(&self, entry: &Entry, manifest: Arc<Manifest>) {
        let record = entry.record.lock().clone();
        let source = Arc::new(SourceVolume {
            name: record.name,
            image: Arc::clone(entry.volume.image()),
            geometry: record.geometry,
            manifest,
            generation: record.generation,
        });
        // Before anything is hashed.
        entry.volume.set_observer(Some(Arc::clone(&source) as Arc<dyn WriteObserver>));
        self.hasher.hash_in_background(&source);
        *entry.source.lock() = Some(source);
    }

    /// Keeps a name from being taken twice at the same time.
    pub(super) fn reserve(self: &Arc<Self>, name: &Name) -> Result<Reserved, ApiError> {
        if self.entry(name).is_some() || !self.reserved.lock().insert(name.clone()) {
            return Err(ApiError::new(
                ErrorKind::Conflict,
                format!("volume {name} exists here already"),
                format!("see `blockferry status {name}`; `volume remove` or `cancel` ends it"),
            ));
        }
        Ok(Reserved { node: Arc::clone(self), name: name.clone() })
    }

    fn refuse_shared_image(&self, name: &Name, image: &Path) -> Result<(), ApiError> {
        let canonical = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let wanted = canonical(image);
        for (other, entry) in self.volumes.lock().iter() {
            if canonical(&entry.record.lock().image) == wanted {
                return Err(ApiError::new(
                    ErrorKind::Conflict,
                    format!("volume {name}: image {} is volume {other} already", image.display()),
                    "one image is one volume",
                ));
            }
        }
        Ok(())
    }

    pub(super) fn check_size(&self, record: &VolumeRecord, image: &Image) -> anyhow::Result<()> {
        // A block device may be larger than the volume that it holds.
        let fits = if image.is_block_device() {
            image.size_bytes() >= record.geometry.size_bytes
        } else {
            image.size_bytes() == record.geometry.size_bytes
        };
        anyhow::ensure!(
            fits,
            "image {} has {} bytes now, the volume has {}; put the right image back, or remove the volume's record",
            record.image.display(),
            image.size_bytes(),
            record.geometry.size_bytes
        );
        Ok(())
    }
}

/// A name that is being worked on.
pub(super) struct Reserved {
    node: Arc<Node>,
    name: Name,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.node.reserved.lock().remove(&self.name);
    }
}

/// Whether nobody depends on a volume's being served here.
pub(super) fn may_remove(name: &Name, state: &Ownership) -> Result<(), ApiError> {
    match state {
        Ownership::Released { to, is_completed: false } => Err(ApiError::new(
            ErrorKind::Refused,
            format!("volume {name} still holds blocks that {to} has not fetched"),
            format!("wait until {to} says that it is complete, or cancel the relocation there"),
        )),
        Ownership::Arriving { .. } => Err(ApiError::new(
            ErrorKind::Refused,
            format!("volume {name} is still arriving"),
            format!("wait until it is complete, or run `blockferry cancel {name}`"),
        )),
        Ownership::Arrived { from, is_released: false } => Err(ApiError::new(
            ErrorKind::Conflict,
            format!("volume {name} is complete, but {from} has not been told yet"),
            format!("try again when {from} can be reached"),
        )),
        Ownership::Owned | Ownership::Released { .. } | Ownership::Arrived { .. } => Ok(()),
    }
}

/// For writing where that is allowed, for reading otherwise: a template on a read-only disk can be a source, too.
fn open_image(path: &Path) -> Result<Image, ImageError> {
    match Image::open_write(path) {
        Err(ImageError::Unreadable { source, .. })
            if matches!(
                source.kind(),
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Image::open_read(path)
        }
        opened => opened,
    }
}

pub(super) fn no_such_volume(name: &Name) -> ApiError {
    ApiError::new(
        ErrorKind::NotFound,
        format!("there is no volume {name} here"),
        "`blockferry volume list` shows what there is",
    )
}

/// A first generation that no other image ever had; room is left to count on from it.
fn random_generation() -> u64 {
    use ring::rand::SecureRandom;
    let mut bytes = [0; 8];
    match ring::rand::SystemRandom::new().fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes) >> 1,
        // No entropy: nanoseconds do nearly as well.
        Err(_) => std::time::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_nanos() as u64 >> 1),
    }
}
