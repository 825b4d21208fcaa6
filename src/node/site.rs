//! The control API's requests, answered by the node. Must not know HTTP.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::future::BoxFuture;

use super::Node;
use super::record::Pace;
use crate::control::{
    AddVolume, Answer, ApiError, Cancel, CancelAnswer, ErrorKind, JobId, Left, OwedOfVolume, PrewarmStatus, Reclaim,
    ReclaimAnswer, RelocateRequest, Site, SiteStatus, VolumeStatus,
};
use crate::core::ids::Name;
use crate::custody::Keeper;
use crate::handover::State;
use crate::store::StoreStats;

impl Node {
    /// A handle for work that outlives the request.
    fn strong(&self) -> Result<Arc<Node>, ApiError> {
        self.this.upgrade().ok_or_else(|| ApiError::new(ErrorKind::Unavailable, "the site is shutting down", ""))
    }

    /// Changes the switches of a background copy, in the journal and in effect.
    async fn set_pace(&self, name: Name, change: impl FnOnce(&mut Pace) + Send + 'static) -> Result<(), ApiError> {
        let entry = self.known(&name)?;
        let no_copy = || {
            ApiError::new(
                ErrorKind::Conflict,
                format!("volume {name} has no background copy: it is not being relocated to this site"),
                format!("see `blockferry status {name}`"),
            )
        };
        let internal = |why: String| ApiError::new(ErrorKind::Internal, format!("volume {name}: {why}"), "");
        let changing = Arc::clone(&entry);
        // Under the record's lock it is seen whether the volume is still what it was: what was given up meanwhile is not written back.
        let changed = tokio::task::spawn_blocking(move || {
            let mut is_arriving = false;
            let mut before = Pace::default();
            let saved = changing.change_record(|record| {
                is_arriving = matches!(record.held.state, State::Asking { .. } | State::Arriving { .. });
                before = record.pace;
                if is_arriving {
                    change(&mut record.pace);
                }
            });
            (saved, is_arriving, before)
        });
        let (saved, is_arriving, before) = changed.await.map_err(|error| internal(error.to_string()))?;
        match saved {
            Some(Err(error)) => return Err(internal(error.to_string())),
            Some(Ok(())) if is_arriving => {}
            _ => return Err(no_copy()),
        }
        let pace = entry.record().pace;
        let Some(relocation) = entry.volume().ok().and_then(|volume| volume.relocation()) else {
            return Err(no_copy());
        };
        relocation.bulk().set_paused(pace.is_paused);
        relocation.bulk().set_limit(pace.limit_bytes_per_s);
        relocation.apply_pace();
        // A copy that was not asked for at first is begun.
        if pace.with_bulk && !before.with_bulk && matches!(entry.record().held.state, State::Arriving { .. }) {
            entry.copy();
        }
        Ok(())
    }

    pub(super) fn owed_of(&self, name: Option<&Name>) -> Vec<OwedOfVolume> {
        let text = |what| match what {
            crate::handover::Owed::Completed => "that every block has arrived here".to_owned(),
            crate::handover::Owed::Reclaimed => "that a person reclaimed the volume here".to_owned(),
        };
        let owed = self.debts.list(name).into_iter();
        owed.map(|(volume, debt)| OwedOfVolume {
            volume,
            peer: debt.peer,
            what: text(debt.what),
            since_epoch: debt.epoch.0,
        })
        .collect()
    }

    fn all_left(&self) -> Vec<Left> {
        let left = self.records.all_left().unwrap_or_else(|error| {
            tracing::warn!(%error, "what left this site cannot be read");
            Vec::new()
        });
        let is_gone = |name: &Name| self.entry(name).is_none();
        left.into_iter()
            .filter(|(name, _)| is_gone(name))
            .filter_map(|(name, left)| Some(Left { name, peer: left.to?, epoch: left.epoch.0 }))
            .collect()
    }
}

impl Site for Node {
    fn status(&self) -> Answer<'_, SiteStatus> {
        Box::pin(async move {
            self.look_at_peers().await;
            let entries: Vec<_> = self.volumes.lock().values().cloned().collect();
            let volumes = entries.iter().map(|entry| self.describe(entry)).collect();
            Ok(SiteStatus {
                site: self.config.site.name.clone(),
                fingerprint: self.identity.fingerprint(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                uptime_s: self.began.elapsed().as_secs_f64(),
                volumes,
                peers: self.describe_peers(),
                store: self.store.stats(),
                owed: self.owed_of(None),
                left: self.all_left(),
            })
        })
    }

    fn volume_status(&self, name: Name) -> Answer<'_, VolumeStatus> {
        Box::pin(async move {
            self.look_at_peers().await;
            let entry = self.known(&name)?;
            Ok(self.describe(&entry))
        })
    }

    fn add_volume(&self, add: AddVolume) -> Answer<'_, ()> {
        Box::pin(async move { self.strong()?.add_owned(add).await })
    }

    fn remove_volume(&self, name: Name) -> Answer<'_, ()> {
        Box::pin(async move { self.strong()?.remove_owned(&name).await })
    }

    fn relocate(&self, requests: Vec<RelocateRequest>) -> BoxFuture<'_, Vec<Result<(), ApiError>>> {
        Box::pin(async move {
            let begin = requests.iter().map(|request| async move {
                let node = self.strong()?;
                let request = request.clone();
                // A task of its own: a panic over one volume must not take the others' answers with it.
                let begun = tokio::spawn(async move { node.begin_relocation(&request).await }).await;
                begun.unwrap_or_else(|error| Err(ApiError::new(ErrorKind::Internal, error.to_string(), "")))
            });
            futures::future::join_all(begin).await
        })
    }

    fn pause(&self, name: Name) -> Answer<'_, ()> {
        Box::pin(self.set_pace(name, |pace| pace.is_paused = true))
    }

    fn resume(&self, name: Name) -> Answer<'_, ()> {
        Box::pin(self.set_pace(name, |pace| {
            pace.is_paused = false;
            pace.with_bulk = true;
        }))
    }

    fn limit(&self, name: Name, bytes_per_s: Option<u64>) -> Answer<'_, ()> {
        Box::pin(self.set_pace(name, move |pace| pace.limit_bytes_per_s = bytes_per_s))
    }

    fn cancel(&self, name: Name, cancel: Cancel) -> Answer<'_, CancelAnswer> {
        Box::pin(async move { self.strong()?.cancel_relocation(&name, cancel).await })
    }

    fn reclaim(&self, name: Name, reclaim: Reclaim) -> Answer<'_, ReclaimAnswer> {
        Box::pin(async move { self.strong()?.reclaim_volume(&name, reclaim).await })
    }

    fn accept_peer(&self, name: Name) -> Answer<'_, ()> {
        Box::pin(async move {
            if self.config.peer(&name).is_none() {
                let what = format!("there is no peer {name} in the configuration");
                return Err(ApiError::new(ErrorKind::NotFound, what, "`blockferry status` lists the peers"));
            }
            let noted = self.records.note_instance_of(&name, None);
            noted.map_err(|error| ApiError::new(ErrorKind::Internal, format!("peer {name}: {error}"), ""))?;
            tracing::warn!(peer = %name, "a person lets whichever instance of the peer comes next be the one");
            Ok(())
        })
    }

    fn prewarm(&self, images: Vec<PathBuf>) -> Answer<'_, JobId> {
        Box::pin(async move {
            let job = JobId(self.next_job.fetch_add(1, Ordering::Relaxed));
            self.strong()?.begin_prewarm(job, images)?;
            Ok(job)
        })
    }

    fn prewarm_status(&self, job: JobId) -> Answer<'_, PrewarmStatus> {
        Box::pin(async move {
            self.prewarms.status(job).ok_or_else(|| {
                ApiError::new(ErrorKind::NotFound, format!("there is no prewarm job {job}"), "jobs end with the daemon")
            })
        })
    }

    fn store_stats(&self) -> Answer<'_, StoreStats> {
        Box::pin(async move { Ok(self.store.stats()) })
    }
}
