//! Volumes whose disk could not be opened when the site started: they keep their record and their name, say what is wrong,
//! and keep no other volume from being served. The next start tries again. Must not touch images.

use super::owned::may_remove;
use super::record::VolumeRecord;
use super::status::{Sides, sides};
use super::{Entry, Node};
use crate::control::{ApiError, BlockCounts, ErrorKind, LatencyMs, MovedBytes, Phase, ReadBytes, VolumeStatus};
use crate::core::ids::Name;

/// A record without a volume, and why.
#[derive(Clone)]
pub(super) struct Unserved {
    pub(super) record: VolumeRecord,
    pub(super) why: String,
}

impl Node {
    /// Notes that a journalled volume cannot be served until the next start.
    pub(super) fn leave_unserved(&self, record: VolumeRecord, why: String) {
        tracing::error!(volume = %record.name, error = why, "a volume cannot be served; the others are");
        // Nobody may take the name: the record must not be overwritten.
        self.reserved.lock().insert(record.name.clone());
        self.unserved.lock().insert(record.name.clone(), Unserved { record, why });
    }

    /// Why a journalled volume is not served, if that is so.
    pub(super) fn why_unserved(&self, name: &Name) -> Option<String> {
        let why = self.unserved.lock().get(name)?.why.clone();
        Some(format!("volume {name} cannot be served: {why}; when it is mended, restart the daemon"))
    }

    /// A volume that is served, or why there is none.
    pub(super) fn served(&self, name: &Name) -> Result<std::sync::Arc<Entry>, ApiError> {
        self.entry(name).ok_or_else(|| match self.why_unserved(name) {
            Some(why) => ApiError::new(ErrorKind::Unavailable, why, ""),
            None => super::owned::no_such_volume(name),
        })
    }

    /// Forgets the record of a volume that is not served, where nobody depends on it.
    pub(super) fn remove_unserved(&self, name: &Name) -> Option<Result<(), ApiError>> {
        let Unserved { record, .. } = self.unserved.lock().get(name).cloned()?;
        let removed = may_remove(name, &record.state).and_then(|()| {
            let internal = |error: super::record::RecordError| {
                ApiError::new(ErrorKind::Internal, format!("volume {name}: {error}"), "")
            };
            self.records.delete(name).map_err(internal)
        });
        if removed.is_ok() {
            self.unserved.lock().remove(name);
            self.reserved.lock().remove(name);
        }
        Some(removed)
    }

    /// What is known without the disk.
    pub(super) fn describe_unserved(&self) -> Vec<VolumeStatus> {
        let unserved: Vec<Unserved> = self.unserved.lock().values().cloned().collect();
        unserved.iter().map(|one| self.describe_record(one)).collect()
    }

    pub(super) fn describe_record(&self, Unserved { record, why }: &Unserved) -> VolumeStatus {
        let Sides { role, owner, peer } = sides(&self.config.site.name, &record.state);
        VolumeStatus {
            name: record.name.clone(),
            role,
            phase: Phase::Failed,
            phase_reason: format!("it cannot be served: {why}; when it is mended, restart the daemon"),
            owner,
            epoch: record.epoch,
            image: record.image.clone(),
            size_bytes: record.geometry.size_bytes,
            block_size_bytes: record.geometry.block_size.bytes(),
            // Nothing can be read here now, whatever is in the file.
            blocks: BlockCounts {
                total: record.geometry.blocks(),
                absent: record.geometry.blocks(),
                ..BlockCounts::default()
            },
            hashed_blocks: None,
            reads: ReadBytes::default(),
            moved: MovedBytes::default(),
            demand_latency_ms: LatencyMs::default(),
            bulk: None,
            eta_s: None,
            link: peer.as_ref().map(|peer| self.link_status(peer)),
            peer,
            nbd_clients: 0,
            read_only: None,
            guest_written_bytes: 0,
            owed: Vec::new(),
        }
    }
}
