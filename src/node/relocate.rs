//! The destination's end of a relocation: begin, go on after a restart, complete, give back. Every step is journalled before
//! it takes effect, and every step can be asked for again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::record::{Ownership, VolumeRecord};
use super::{Entry, Node};
use crate::control::{ApiError, ErrorKind, RelocateRequest};
use crate::core::ids::{Incarnation, Name};
use crate::core::wire::Refusal;
use crate::fetch::{Expected, FetchError, Remote, VolumeKey};
use crate::image::Image;
use crate::units::Patience;
use crate::volume::{Relocation, Volume, VolumeParts, run_bulk};

/// How long `relocate` and `cancel` wait for the peer before they say that it cannot be reached.
const PEER_TIMEOUT: Duration = Duration::from_secs(12);
/// Between attempts to tell a source that everything is here.
const TELL_AGAIN: Duration = Duration::from_secs(5);

impl Node {
    /// Begins one relocation; returns when the volume is owned and served here.
    pub(super) async fn begin_relocation(self: &Arc<Self>, request: &RelocateRequest) -> Result<(), ApiError> {
        let name = &request.volume;
        let _reserved = self.reserve(name)?;
        let peer = self.config.peer(&request.peer).ok_or_else(|| {
            ApiError::new(
                ErrorKind::NotFound,
                format!("volume {name}: there is no peer {} in the configuration", request.peer),
                "add a [[peers]] entry for it and restart the daemon",
            )
        })?;
        let key = self.ensure_dialled(&peer.name).ok_or_else(|| {
            ApiError::new(
                ErrorKind::Invalid,
                format!("volume {name}: peer {} has no address in the configuration", peer.name),
                "add `address = \"HOST:PORT\"` to its [[peers]] entry and restart the daemon",
            )
        })?;
        let opened = tokio::time::timeout(PEER_TIMEOUT, self.fetch.open(key, name.clone())).await;
        let remote = match opened {
            Ok(Ok(remote)) => remote,
            Ok(Err(error)) => return Err(refused(name, &peer.name, &error)),
            Err(_) => return Err(self.unreachable(name, &peer.name, key)),
        };
        let closing = Closing { node: self, key: remote.key, is_armed: true };
        let path = match &request.image {
            Some(path) => path.clone(),
            None => self.prepare_default_image(name)?,
        };
        let image = Image::create(&path, remote.geometry.size_bytes)
            .map_err(|error| ApiError::new(ErrorKind::Conflict, format!("volume {name}: {error}"), ""))?;
        let record = VolumeRecord::new(
            name.clone(),
            path,
            remote.geometry,
            remote.epoch + 1,
            Ownership::Arriving {
                from: peer.name.clone(),
                source_generation: remote.generation,
                is_taken: false,
                is_given_back: false,
                with_bulk: request.bulk,
                is_paused: false,
                limit_bytes_per_s: request.bulk_rate_bytes_per_s,
            },
        );
        let internal = |error: String| ApiError::new(ErrorKind::Internal, format!("volume {name}: {error}"), "");
        let volume =
            Volume::relocating(self.parts(&record, image, false), true).map_err(|e| internal(e.to_string()))?;
        // From here on a crash finds the intent: after the restart the source is asked again.
        self.records.save(&record).map_err(|error| internal(error.to_string()))?;
        let mut closing = closing;
        closing.is_armed = false;
        let entry = self.attach(record, Arc::new(volume), &remote, remote.key);
        self.volumes.lock().insert(name.clone(), Arc::clone(&entry));
        self.take_over(&entry, remote.key).await?;
        self.spawn_copy(&entry);
        tracing::info!(volume = %name, peer = %peer.name, "the volume is owned and served here from now on");
        Ok(())
    }

    /// Asks the source for ownership and journals the answer. If the source cannot be reached just now, the attempt goes on by itself.
    async fn take_over(self: &Arc<Self>, entry: &Arc<Entry>, key: VolumeKey) -> Result<(), ApiError> {
        let record = entry.record.lock().clone();
        let (name, epoch) = (record.name.clone(), record.epoch);
        let Ownership::Arriving { from, .. } = &record.state else { return Ok(()) };
        match tokio::time::timeout(PEER_TIMEOUT, self.fetch.take_over(key, epoch)).await {
            Ok(Ok(_)) => match self.taken(entry).await {
                Ok(true) => Ok(()),
                Ok(false) => {
                    let what = format!("volume {name}: the relocation was cancelled meanwhile");
                    Err(ApiError::new(ErrorKind::Conflict, what, ""))
                }
                Err(error) => {
                    let what = format!("volume {name}: {error}");
                    Err(ApiError::new(ErrorKind::Internal, what, "restart the daemon"))
                }
            },
            Ok(Err(error)) => {
                // The source says that it did not let go: nothing has happened.
                let refusal = refused(&name, from, &error);
                self.forget(entry, key, true);
                Err(refusal)
            }
            Err(_) => {
                // It may have let go: the question stays open until it is answered.
                let (node, entry) = (Arc::clone(self), Arc::clone(entry));
                tokio::spawn(async move { node.finish_take_over(&entry, key).await });
                Err(ApiError::new(
                    ErrorKind::Unavailable,
                    format!("volume {name}: {from} has not answered the hand-over yet"),
                    format!("it goes on by itself when {from} answers; see `blockferry status {name}`"),
                ))
            }
        }
    }

    async fn finish_take_over(self: &Arc<Self>, entry: &Arc<Entry>, key: VolumeKey) {
        let epoch = entry.record.lock().epoch;
        let mut stop = entry.stop.subscribe();
        let answer = tokio::select! {
            answer = until_final(|| self.fetch.take_over(key, epoch)) => answer,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match answer {
            Ok(_) => match self.taken(entry).await {
                Ok(true) => self.spawn_copy(entry),
                Ok(false) => {}
                Err(error) => *entry.trouble.lock() = Some(error.to_string()),
            },
            Err(error) => *entry.trouble.lock() = Some(error.to_string()),
        }
    }

    /// The source let go. Returns whether this site is the owner now: not if the relocation was given up while it was
    /// asked.
    async fn taken(&self, entry: &Entry) -> Result<bool, super::record::RecordError> {
        let _turn = entry.turn.lock().await;
        let mut record = entry.record.lock().clone();
        match &mut record.state {
            Ownership::Arriving { is_taken, is_given_back: false, .. } => *is_taken = true,
            _ => return Ok(false),
        }
        self.save(entry, record)?;
        entry.volume.unfence();
        Ok(true)
    }

    /// Goes on with a relocation after a restart: the volume is served at once, blocks come when the peer can be reached.
    pub(super) fn restore_arriving(self: &Arc<Self>, record: VolumeRecord) -> anyhow::Result<Arc<Entry>> {
        let Ownership::Arriving { from, source_generation, is_taken, is_given_back, .. } = &record.state else {
            anyhow::bail!("not a relocation under way");
        };
        let (from, generation, is_taken, is_given_back) = (from.clone(), *source_generation, *is_taken, *is_given_back);
        let image = Image::open_write(&record.image)?;
        self.check_size(&record, &image)?;
        let is_owner = is_taken && !is_given_back;
        let volume = Volume::relocating(self.parts(&record, image, is_owner), false)?;
        let peer = self.ensure_dialled(&from).ok_or_else(|| {
            anyhow::anyhow!("its source {from} is not among the [[peers]] any more, or has no address; add it again")
        })?;
        let expected = Expected { geometry: record.geometry, generation };
        let key = self.fetch.attach(peer, record.name.clone(), expected);
        let remote = Remote { key, geometry: record.geometry, generation, epoch: record.epoch };
        let entry = self.attach(record, Arc::new(volume), &remote, key);
        let (node, task) = (Arc::clone(self), Arc::clone(&entry));
        if is_given_back {
            tokio::spawn(async move { node.finish_giving_back(&task, key).await });
        } else if is_taken {
            self.spawn_copy(&entry);
        } else {
            tokio::spawn(async move { node.finish_take_over(&task, key).await });
        }
        Ok(entry)
    }

    fn attach(&self, record: VolumeRecord, volume: Arc<Volume>, remote: &Remote, key: VolumeKey) -> Arc<Entry> {
        let timeout = match self.config.demand.timeout {
            Patience::Forever => None,
            Patience::For(timeout) => Some(timeout),
        };
        let relocation = Arc::new(Relocation::new(self.fetch.clone(), key, remote.geometry, timeout));
        if let Ownership::Arriving { is_paused, limit_bytes_per_s, .. } = &record.state {
            relocation.bulk().set_paused(*is_paused);
            relocation.bulk().set_limit(*limit_bytes_per_s);
            relocation.apply_pace();
        }
        volume.set_relocation(relocation);
        Entry::new(record, volume)
    }

    fn spawn_copy(self: &Arc<Self>, entry: &Arc<Entry>) {
        let with_bulk = matches!(entry.record.lock().state, Ownership::Arriving { with_bulk: true, .. });
        let (node, entry) = (Arc::clone(self), Arc::clone(entry));
        tokio::spawn(async move {
            let mut stop = entry.stop.subscribe();
            let copied = tokio::select! {
                copied = run_bulk(Arc::clone(&entry.volume), with_bulk) => copied,
                _ = stop.wait_for(|stop| *stop) => return,
            };
            if let Err(error) = copied {
                tracing::error!(volume = %entry.volume.name(), %error, "the copy has ended before it was complete");
                *entry.trouble.lock() = Some(error.to_string());
                return;
            }
            node.arrived(&entry).await;
        });
    }

    /// Every block is here, durably. The journal says so before anything that proves it is dropped.
    async fn arrived(self: &Arc<Self>, entry: &Arc<Entry>) {
        let turn = entry.turn.lock().await;
        let mut record = entry.record.lock().clone();
        let Ownership::Arriving { from, is_given_back: false, .. } = record.state.clone() else { return };
        record.state = Ownership::Arrived { from: from.clone(), is_released: false };
        let epoch = record.epoch;
        if let Err(error) = self.save(entry, record) {
            tracing::error!(volume = %entry.volume.name(), %error, "the volume is complete, but that could not be recorded");
            *entry.trouble.lock() = Some(error.to_string());
            return;
        }
        // From here on others may fetch it from us.
        let (node, of) = (Arc::clone(self), Arc::clone(entry));
        let begun = tokio::task::spawn_blocking(move || -> Result<(), String> {
            of.volume.forget_journal().map_err(|error| error.to_string())?;
            node.begin_source(&of).map_err(|error| error.to_string())
        });
        if let Err(why) = begun.await.unwrap_or_else(|error| Err(error.to_string())) {
            tracing::error!(volume = %entry.volume.name(), why, "the volume is complete, but no peer can fetch it from here");
            *entry.trouble.lock() = Some(why);
        }
        drop(turn);
        tracing::info!(volume = %entry.volume.name(), "every block is here");
        self.tell_source_later(entry, from, epoch);
    }

    /// Tells the source that it may let go, until it has heard.
    pub(super) fn tell_source_later(self: &Arc<Self>, entry: &Arc<Entry>, from: Name, epoch: u64) {
        let (node, entry) = (Arc::clone(self), Arc::clone(entry));
        tokio::spawn(async move {
            let mut stop = entry.stop.subscribe();
            let told = node.tell_source(&entry, &from, epoch);
            tokio::select! {
                () = told => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        });
    }

    async fn tell_source(self: &Arc<Self>, entry: &Arc<Entry>, from: &Name, epoch: u64) {
        let name = entry.volume.name().clone();
        loop {
            let told = async {
                let peer = self.ensure_dialled(from).ok_or(FetchError::UnknownPeer)?;
                // Opened for this: a source that has no such volume any more says so.
                let open = self.fetch.open(peer, name.clone()).await?.key;
                let told = tokio::time::timeout(PEER_TIMEOUT, self.fetch.completed(open, epoch)).await;
                self.fetch.close(open);
                told.unwrap_or(Err(FetchError::Gone))
            };
            match told.await {
                Ok(_) => break,
                // It heard, its answer was lost, and it has let go since.
                Err(FetchError::Refused { refusal: Refusal::UnknownVolume | Refusal::NotOwner, .. }) => break,
                Err(error) => {
                    tracing::warn!(volume = %name, peer = %from, %error, "the source does not know yet that it may let go");
                    tokio::time::sleep(TELL_AGAIN).await;
                }
            }
        }
        let _turn = entry.turn.lock().await;
        let mut record = entry.record.lock().clone();
        if let Ownership::Arrived { is_released, .. } = &mut record.state {
            *is_released = true;
            if let Err(error) = self.save(entry, record) {
                tracing::warn!(volume = %name, %error, "that the source let go could not be recorded");
            }
        }
        if let Some(relocation) = entry.volume.relocation() {
            self.fetch.close(relocation.key());
        }
    }

    /// Gives a relocation up: the source becomes the owner again.
    pub(super) async fn cancel_relocation(self: &Arc<Self>, name: &Name) -> Result<(), ApiError> {
        let entry = self.served(name)?;
        let turn = entry.turn.lock().await;
        let mut record = entry.record.lock().clone();
        let Ownership::Arriving { from, is_given_back, .. } = &mut record.state else {
            return Err(ApiError::new(
                ErrorKind::Conflict,
                format!("volume {name} is not being relocated to this site"),
                format!("see `blockferry status {name}`"),
            ));
        };
        let from = from.clone();
        let is_repeated = std::mem::replace(is_given_back, true);
        let was_owner = entry.volume.is_owner();
        let written = || {
            ApiError::new(
                ErrorKind::Refused,
                format!("volume {name} was written here since it is relocated; cancelling would lose those writes"),
                "let it complete; then relocate it back",
            )
        };
        // Before the fence: it would fail the guest's writes meanwhile, and wait for those that wait for the peer.
        if entry.volume.has_guest_writes() {
            return Err(written());
        }
        let fenced = entry.volume.fence().await;
        if fenced.is_err() || entry.volume.has_guest_writes() {
            if was_owner {
                entry.volume.unfence();
            }
            return Err(match fenced {
                Err(error) => {
                    ApiError::new(ErrorKind::Internal, format!("volume {name}: {error}"), "nothing was cancelled")
                }
                Ok(()) => written(),
            });
        }
        if !is_repeated {
            self.save(&entry, record).map_err(|error| {
                ApiError::new(ErrorKind::Internal, format!("volume {name}: {error}"), "nothing was cancelled")
            })?;
        }
        let _ = entry.stop.send(true);
        let Some(key) = entry.volume.relocation().map(|relocation| relocation.key()) else { return Ok(()) };
        let epoch = entry.record.lock().epoch;
        match tokio::time::timeout(PEER_TIMEOUT, self.fetch.give_back(key, epoch)).await {
            Ok(Ok(_)) => {
                self.forget(&entry, key, true);
                Ok(())
            }
            Ok(Err(error)) => Err(refused(name, &from, &error)),
            Err(_) => {
                drop(turn);
                let (node, entry) = (Arc::clone(self), Arc::clone(&entry));
                tokio::spawn(async move { node.finish_giving_back(&entry, key).await });
                Err(ApiError::new(
                    ErrorKind::Unavailable,
                    format!("volume {name} is given up here, but {from} has not heard of it yet"),
                    format!("it goes on by itself when {from} answers"),
                ))
            }
        }
    }

    async fn finish_giving_back(self: &Arc<Self>, entry: &Arc<Entry>, key: VolumeKey) {
        let epoch = entry.record.lock().epoch;
        match until_final(|| self.fetch.give_back(key, epoch)).await {
            Ok(_) => self.forget(entry, key, true),
            Err(error) => *entry.trouble.lock() = Some(error.to_string()),
        }
    }

    /// Drops a volume that this site does not own, and the file that was made for it.
    fn forget(&self, entry: &Arc<Entry>, key: VolumeKey, with_file: bool) {
        let record = entry.record.lock().clone();
        let _ = entry.stop.send(true);
        self.fetch.close(key);
        if let Err(error) = self.records.delete(&record.name) {
            tracing::error!(volume = %record.name, %error, "the volume's record could not be deleted");
            *entry.trouble.lock() = Some(error.to_string());
            return;
        }
        self.volumes.lock().remove(&record.name);
        if with_file
            && !entry.volume.image().is_block_device()
            && let Err(error) = std::fs::remove_file(&record.image)
        {
            tracing::warn!(volume = %record.name, %error, "the file of a volume that was given up is left over");
        }
    }

    fn prepare_default_image(&self, name: &Name) -> Result<PathBuf, ApiError> {
        let path = self.default_image(name);
        let folder = self.config.site.state_dir.join("volumes");
        std::fs::create_dir_all(&folder).map_err(|error| {
            let what = format!("volume {name}: {} cannot be made: {error}", folder.display());
            ApiError::new(ErrorKind::Internal, what, "name another place with --image")
        })?;
        Ok(path)
    }

    fn parts(&self, record: &VolumeRecord, image: Image, is_owner: bool) -> VolumeParts {
        VolumeParts {
            name: record.name.clone(),
            incarnation: incarnation_of(record),
            image: Arc::new(image),
            geometry: record.geometry,
            state: Arc::clone(&self.state),
            workers: self.disk_workers.clone(),
            is_owner,
        }
    }

    fn unreachable(&self, name: &Name, peer: &Name, key: crate::fetch::PeerKey) -> ApiError {
        let dialling = self.links.lock().get(&key).and_then(|link| link.last_error()).map(|error| error.to_string());
        let why = dialling.unwrap_or_else(|| "it does not answer".into());
        ApiError::new(
            ErrorKind::Unavailable,
            format!("volume {name}: peer {peer} cannot be reached: {why}"),
            "nothing was begun; try again when it answers",
        )
    }
}

/// Until the record has one of its own: another for each relocation of a name, as epochs only grow.
pub(super) fn incarnation_of(record: &VolumeRecord) -> Incarnation {
    let id = blake3::hash(format!("{} {}", record.name, record.epoch).as_bytes());
    Incarnation(std::array::from_fn(|at| id.as_bytes()[at]))
}

/// Asks until the answer is one that will not change by itself.
async fn until_final<F: Future<Output = Result<u64, FetchError>>>(ask: impl Fn() -> F) -> Result<u64, FetchError> {
    loop {
        match ask().await {
            Err(FetchError::Refused { refusal, .. }) if refusal.is_transient() => tokio::time::sleep(TELL_AGAIN).await,
            answer => return answer,
        }
    }
}

/// A remote volume that is closed again unless the relocation comes about.
struct Closing<'a> {
    node: &'a Node,
    key: VolumeKey,
    is_armed: bool,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        if self.is_armed {
            self.node.fetch.close(self.key);
        }
    }
}

fn refused(name: &Name, peer: &Name, error: &FetchError) -> ApiError {
    let kind = match error {
        FetchError::Refused { refusal: Refusal::UnknownVolume, .. } => ErrorKind::NotFound,
        FetchError::Refused { refusal: Refusal::NotOwner | Refusal::Busy, .. } => ErrorKind::Conflict,
        FetchError::Refused { refusal: Refusal::ShuttingDown, .. } => ErrorKind::Unavailable,
        FetchError::Refused { .. } | FetchError::Inconsistent { .. } => ErrorKind::Refused,
        FetchError::Gone | FetchError::UnknownPeer => ErrorKind::Internal,
    };
    ApiError::new(kind, format!("volume {name}: {error}"), format!("nothing was begun; see the log of {peer}"))
}
