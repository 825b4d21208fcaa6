//! The source's end of ownership: who may have what, and the journal before every answer. Must not know connections.

use std::sync::Arc;

use futures::future::BoxFuture;

use super::record::Ownership;
use super::{Entry, Node};
use crate::core::ids::Name;
use crate::core::wire::Refusal;
use crate::image::ImageError;
use crate::source::{Catalog, Refused, SourceError, SourceVolume};

impl Catalog for Node {
    fn open(&self, peer: &Name, volume: &Name) -> Result<(Arc<SourceVolume>, u64), Refused> {
        let entry = self.granted(peer, volume)?;
        let record = entry.record.lock().clone();
        match &record.state {
            Ownership::Owned | Ownership::Arrived { .. } => {}
            Ownership::Released { to, .. } if to == peer => {}
            Ownership::Released { to, .. } => {
                let why = format!("volume {volume} was handed over to {to}; relocate it from there");
                return Err((Refusal::NotOwner, why));
            }
            Ownership::Arriving { from, .. } => {
                let why = format!("volume {volume} is still arriving from {from}; wait until it is complete");
                return Err((Refusal::Busy, why));
            }
        }
        let source = entry.source.lock().clone();
        let source = source.ok_or((Refusal::Busy, format!("volume {volume} is being prepared; try again")))?;
        Ok((source, record.epoch))
    }

    fn take_over<'a>(&'a self, peer: &'a Name, volume: &'a Name, epoch: u64) -> BoxFuture<'a, Result<u64, Refused>> {
        Box::pin(async move {
            let entry = self.granted(peer, volume)?;
            let _turn = entry.turn.lock().await;
            let record = entry.record.lock().clone();
            match &record.state {
                // The answer was lost: it is the same again.
                Ownership::Released { to, .. } if to == peer && record.epoch == epoch => return Ok(epoch),
                Ownership::Owned | Ownership::Arrived { .. } if epoch == record.epoch + 1 => {}
                Ownership::Owned | Ownership::Arrived { .. } => {
                    let why = format!("volume {volume} is at epoch {}, {epoch} cannot follow it", record.epoch);
                    return Err((Refusal::NotOwner, why));
                }
                Ownership::Released { to, .. } => {
                    return Err((Refusal::NotOwner, format!("volume {volume} was handed over to {to}")));
                }
                Ownership::Arriving { .. } => {
                    return Err((Refusal::Busy, format!("volume {volume} is still arriving")));
                }
            }
            let source = entry.source.lock().clone();
            let source = source.ok_or((Refusal::Busy, format!("volume {volume} is being prepared")))?;
            let fenced = async {
                entry.volume.fence().await.map_err(|error| error.to_string())?;
                let rested = tokio::task::spawn_blocking(move || rest(&source)).await;
                match rested.map_err(|error| error.to_string())? {
                    Ok(()) => {}
                    Err(changed @ SourceError::Changed { .. }) => {
                        // What the image holds now is what the next attempt will find.
                        self.renew_source(&entry).map_err(|error| error.to_string())?;
                        return Err(changed.to_string());
                    }
                    Err(error) => return Err(error.to_string()),
                }
                Ok(())
            };
            if let Err(why) = fenced.await {
                entry.volume.unfence();
                return Err((Refusal::Internal, why));
            }
            let mut next = record.clone();
            next.epoch = epoch;
            next.state = Ownership::Released { to: peer.clone(), is_completed: false };
            if let Err(error) = self.save(&entry, next) {
                // The row may have reached the disk all the same: whoever is the owner, it is not certainly this site.
                let why = format!("the hand-over could not be journalled: {error}; writes are refused until it is");
                *entry.trouble.lock() = Some(why.clone());
                return Err((Refusal::Internal, why));
            }
            *entry.trouble.lock() = None;
            tracing::info!(%volume, %peer, epoch, "ownership has moved to the peer; writes are refused here from now on");
            Ok(epoch)
        })
    }

    fn completed<'a>(&'a self, peer: &'a Name, volume: &'a Name, epoch: u64) -> BoxFuture<'a, Result<u64, Refused>> {
        Box::pin(async move {
            let entry = self.granted(peer, volume)?;
            let _turn = entry.turn.lock().await;
            let mut record = entry.record.lock().clone();
            match &mut record.state {
                Ownership::Released { to, is_completed } if to == peer && record.epoch == epoch => *is_completed = true,
                _ => return Err((Refusal::NotOwner, format!("volume {volume} is not on its way to {peer}"))),
            }
            self.save(&entry, record).map_err(|error| (Refusal::Internal, error.to_string()))?;
            tracing::info!(%volume, %peer, "the peer has every block; the image here is not needed any more");
            Ok(epoch)
        })
    }

    fn give_back<'a>(&'a self, peer: &'a Name, volume: &'a Name, epoch: u64) -> BoxFuture<'a, Result<u64, Refused>> {
        Box::pin(async move {
            let entry = self.granted(peer, volume)?;
            let _turn = entry.turn.lock().await;
            let mut record = entry.record.lock().clone();
            match &record.state {
                // Given back already; whoever has it now has it since.
                _ if record.epoch > epoch => return Ok(record.epoch),
                // Never taken. It must not be taken any more: the question may still be on its way on an earlier
                // connection.
                Ownership::Owned | Ownership::Arrived { is_released: true, .. } if epoch == record.epoch + 1 => {
                    record.epoch = epoch + 1;
                    self.save(&entry, record).map_err(|error| (Refusal::Internal, error.to_string()))?;
                    return Ok(epoch + 1);
                }
                // Never granted, so there is nothing to take back.
                Ownership::Owned | Ownership::Arrived { .. } => return Ok(record.epoch),
                Ownership::Released { to, .. } if to != peer || record.epoch < epoch => return Ok(record.epoch),
                Ownership::Released { to, is_completed: false } if to == peer && record.epoch == epoch => {}
                _ => return Err((Refusal::NotOwner, format!("volume {volume} is not on its way to {peer}"))),
            }
            record.epoch = epoch + 1;
            record.generation += 1;
            record.state = Ownership::Owned;
            self.save(&entry, record).map_err(|error| (Refusal::Internal, error.to_string()))?;
            self.renew_generation(&entry).map_err(|error| (Refusal::Internal, error.to_string()))?;
            let source = entry.source.lock().clone();
            if let Some(Err(error)) = source.map(|source| source.manifest.take_back()) {
                return Err((Refusal::Internal, error.to_string()));
            }
            entry.volume.unfence();
            tracing::info!(%volume, %peer, "the peer gave the volume back; it may be written here again");
            Ok(epoch + 1)
        })
    }
}

/// Before the hand-over, not after it: an image that is not what was announced must not take the owner along. Blocking.
fn rest(source: &SourceVolume) -> Result<(), SourceError> {
    if let Some(stamp) = source.image.stamp()?
        && stamp.size_bytes < source.geometry.size_bytes
    {
        let (path, announced_bytes) = (source.image.path().to_owned(), source.geometry.size_bytes);
        return Err(ImageError::Shorter { path, offset: stamp.size_bytes, announced_bytes }.into());
    }
    source.manifest.release()
}

impl Node {
    /// A peer cannot tell a volume that it was not granted from one that does not exist.
    fn granted(&self, peer: &Name, volume: &Name) -> Result<Arc<Entry>, Refused> {
        let is_granted = self.config.peer(peer).is_some_and(|peer| peer.volumes.includes(volume));
        match self.entry(volume) {
            Some(entry) if is_granted => Ok(entry),
            None if is_granted && self.why_unserved(volume).is_some() => {
                let why = format!("the image of volume {volume} cannot be opened at {}", self.config.site.name);
                Err((Refusal::Busy, why))
            }
            found => {
                if found.is_some() {
                    tracing::warn!(%volume, %peer, "a peer asked for a volume that it was not granted; see `volumes` of its [[peers]] entry");
                }
                let why = format!(
                    "there is no volume {volume} for this peer: check the name, and `volumes` in the [[peers]] entry at {}",
                    self.config.site.name
                );
                Err((Refusal::UnknownVolume, why))
            }
        }
    }
}
