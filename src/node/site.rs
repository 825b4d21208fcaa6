//! The control API's requests, answered by the node. Must not know HTTP.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::future::BoxFuture;

use super::Node;
use super::record::Ownership;
use crate::control::{
    AddVolume, Answer, ApiError, Cancel, CancelAnswer, ErrorKind, JobId, PrewarmStatus, Reclaim, ReclaimAnswer,
    RelocateRequest, Site, SiteStatus, VolumeStatus,
};
use crate::core::ids::Name;
use crate::store::StoreStats;

impl Node {
    /// A handle for work that outlives the request.
    fn strong(&self) -> Result<Arc<Node>, ApiError> {
        self.this.upgrade().ok_or_else(|| ApiError::new(ErrorKind::Unavailable, "the site is shutting down", ""))
    }

    /// Changes the switches of a background copy, in the journal and in effect.
    async fn set_pace(&self, name: Name, change: impl FnOnce(&mut bool, &mut Option<u64>)) -> Result<(), ApiError> {
        let entry = self.served(&name)?;
        let _turn = entry.turn.lock().await;
        let mut record = entry.record.lock().clone();
        let (Ownership::Arriving { is_paused, limit_bytes_per_s, .. }, Some(relocation)) =
            (&mut record.state, entry.volume.relocation())
        else {
            return Err(ApiError::new(
                ErrorKind::Conflict,
                format!("volume {name} has no background copy: it is not being relocated to this site"),
                format!("see `blockferry status {name}`"),
            ));
        };
        change(is_paused, limit_bytes_per_s);
        let (is_paused, limit) = (*is_paused, *limit_bytes_per_s);
        self.save(&entry, record)
            .map_err(|error| ApiError::new(ErrorKind::Internal, format!("volume {name}: {error}"), ""))?;
        relocation.bulk().set_paused(is_paused);
        relocation.bulk().set_limit(limit);
        relocation.apply_pace();
        Ok(())
    }
}

impl Site for Node {
    fn status(&self) -> Answer<'_, SiteStatus> {
        Box::pin(async move {
            self.look_at_peers().await;
            let entries: Vec<_> = self.volumes.lock().values().cloned().collect();
            let mut volumes: Vec<_> = entries.iter().map(|entry| self.describe(entry)).collect();
            volumes.extend(self.describe_unserved());
            volumes.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(SiteStatus {
                site: self.config.site.name.clone(),
                fingerprint: self.identity.fingerprint(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                uptime_s: self.began.elapsed().as_secs_f64(),
                volumes,
                peers: self.describe_peers(),
                store: self.store.stats(),
                owed: Vec::new(),
                left: Vec::new(),
            })
        })
    }

    fn volume_status(&self, name: Name) -> Answer<'_, VolumeStatus> {
        Box::pin(async move {
            self.look_at_peers().await;
            if let Some(unserved) = self.unserved.lock().get(&name) {
                return Ok(self.describe_record(unserved));
            }
            let entry = self.served(&name)?;
            Ok(self.describe(&entry))
        })
    }

    fn add_volume(&self, add: AddVolume) -> Answer<'_, ()> {
        Box::pin(async move { self.strong()?.add_owned(add).await })
    }

    fn remove_volume(&self, name: Name) -> Answer<'_, ()> {
        Box::pin(async move { self.remove_owned(&name).await })
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
        Box::pin(self.set_pace(name, |is_paused, _| *is_paused = true))
    }

    fn resume(&self, name: Name) -> Answer<'_, ()> {
        Box::pin(self.set_pace(name, |is_paused, _| *is_paused = false))
    }

    fn limit(&self, name: Name, bytes_per_s: Option<u64>) -> Answer<'_, ()> {
        Box::pin(self.set_pace(name, move |_, limit| *limit = bytes_per_s))
    }

    fn cancel(&self, name: Name, cancel: Cancel) -> Answer<'_, CancelAnswer> {
        Box::pin(async move {
            if cancel.discard_writes {
                let message = format!("volume {name}: this version cannot discard what its guest wrote");
                return Err(ApiError::new(ErrorKind::Internal, message, "cancel it without --discard-writes"));
            }
            let status = self.volume_status(name.clone()).await?;
            self.strong()?.cancel_relocation(&name).await?;
            Ok(CancelAnswer { discarded_bytes: 0, owner: status.peer.unwrap_or(status.owner) })
        })
    }

    fn reclaim(&self, name: Name, _: Reclaim) -> Answer<'_, ReclaimAnswer> {
        let message = format!("volume {name}: this version cannot reclaim volumes");
        Box::pin(async move { Err(ApiError::new(ErrorKind::Internal, message, "")) })
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
