//! The verbs of a relocation, said at the destination. What they mean for ownership is the machine's business.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Node;
use super::entry::{Disk, Entry};
use super::inventory::Inventory;
use super::record::{Pace, VERSION, VolumeRecord};
use super::refusal::{api_error, refused};
use crate::control::{
    ApiError, Cancel, CancelAnswer, DEFAULT_HANDOVER_TIMEOUT, ErrorKind, Reclaim, ReclaimAnswer, RelocateRequest,
};
use crate::core::ids::{Incarnation, Name};
use crate::custody::Keeper;
use crate::fetch::{Expected, PeerKey, Remote, VolumeKey};
use crate::handover::{Epoch, Generation, Machine, State, Verb, asking};
use crate::image::{Image, Overwrite};
use crate::volume::{Relocation, Volume, VolumeParts};

/// How long `relocate` and `cancel` wait for the peer before they say that it cannot be reached.
const PEER_TIMEOUT: Duration = Duration::from_secs(12);
/// How long the API waits for a hand-over. It goes on for as long as `--timeout` says; the status shows how.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// An NBD client that asked for a volume here so recently is a guest that is being moved here and waits for its disk.
const KNOCKED_WITHIN: Duration = Duration::from_secs(10);
/// Names that were asked for here and are remembered.
const MAX_KNOCKS: usize = 256;
/// Relocations that came to nothing and are remembered, for whoever waits for them.
const MAX_FAILURES: usize = 1024;

impl Node {
    /// Begins one relocation; returns when the volume is owned and served here, or when that takes longer than the API waits.
    pub(super) async fn begin_relocation(self: &Arc<Self>, request: &RelocateRequest) -> Result<(), ApiError> {
        let name = &request.volume;
        let reserved = self.reserve(name)?;
        self.failures.lock().remove(name);
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
        let timeout = timeout_of(name, request.timeout_s)?;
        let opened = tokio::time::timeout(PEER_TIMEOUT, self.fetch.open(key, name.clone())).await;
        let remote = match opened {
            Ok(Ok(remote)) => remote,
            Ok(Err(error)) => return Err(refused(name, &peer.name, &error)),
            Err(_) => return Err(self.unreachable(name, &peer.name, key)),
        };
        let mut closing = Closing { node: self, key: remote.key, is_armed: true };
        let path = match &request.image {
            Some(path) => path.clone(),
            None => self.prepare_default_image(name)?,
        };
        self.refuse_shared_image(name, &path)?;
        let overwrite = if request.overwrite { Overwrite::Anything } else { Overwrite::OnlyBlank };
        let (size_bytes, at) = (remote.geometry.size_bytes, path.clone());
        // Blocking: the folder is synced.
        let made = tokio::task::spawn_blocking(move || Image::create(&at, size_bytes, overwrite)).await;
        let internal = |error: String| ApiError::new(ErrorKind::Internal, format!("volume {name}: {error}"), "");
        let image = made
            .map_err(|error| internal(error.to_string()))?
            .map_err(|error| ApiError::new(ErrorKind::Conflict, format!("volume {name}: {error}"), ""))?;
        let pace = Pace { with_bulk: request.bulk, is_paused: false, limit_bytes_per_s: request.bulk_rate_bytes_per_s };
        let entry = self.begin(name, &peer.name, image, &remote, pace).map_err(internal)?;
        closing.is_armed = false;
        drop(reserved);
        let take = request.take || self.has_been_asked_for(name);
        let (node, from) = (Arc::clone(self), peer.name.clone());
        // A task of its own: it ends, whoever waits for it.
        let begun = tokio::spawn(async move {
            let taken = entry.custody().begin(take, timeout).await;
            let name = entry.name.clone();
            match &taken {
                Ok(epoch) => {
                    tracing::info!(volume = %name, peer = %from, %epoch, "the volume is owned and served here from now on");
                }
                Err(no) => {
                    tracing::warn!(volume = %name, peer = %from, why = %no, "a relocation came to nothing");
                    node.remember_failure(&name, api_error(&name, no));
                }
            }
            taken.map(drop).map_err(|no| api_error(&name, &no))
        });
        match tokio::time::timeout(ANSWER_WITHIN, begun).await {
            Ok(Ok(taken)) => taken,
            Ok(Err(error)) => Err(internal(error.to_string())),
            // It goes on; the status says how.
            Err(_) => Ok(()),
        }
    }

    fn remember_failure(&self, name: &Name, error: ApiError) {
        let mut failures = self.failures.lock();
        if failures.len() >= MAX_FAILURES {
            failures.pop_first();
        }
        // Whoever waits for it hears that it has ended, not that it could be asked for again.
        let kind = if error.kind.is_passing() { ErrorKind::Conflict } else { error.kind };
        failures.insert(name.clone(), ApiError { kind, ..error });
    }

    /// An NBD client asked for a volume that is not here.
    pub(super) fn note_knock(&self, name: &Name) {
        let mut knocks = self.knocks.lock();
        if knocks.len() >= MAX_KNOCKS {
            knocks.retain(|_, at| at.elapsed() < KNOCKED_WITHIN);
        }
        if knocks.len() < MAX_KNOCKS {
            knocks.insert(name.clone(), Instant::now());
        }
    }

    /// Whether a guest waits for this volume here: then the one at the source is meant to lose it.
    fn has_been_asked_for(&self, name: &Name) -> bool {
        self.knocks.lock().get(name).is_some_and(|at| at.elapsed() < KNOCKED_WITHIN)
    }
}

impl Inventory {
    /// Journals that a peer is about to be asked for a volume. [`crate::custody::Custody::begin`] asks.
    pub fn begin(
        self: &Arc<Self>,
        name: &Name,
        peer: &Name,
        image: Image,
        remote: &Remote,
        pace: Pace,
    ) -> Result<Arc<Entry>, String> {
        let before = self.entry(name).map(|entry| entry.record().held);
        let left = self.records.left(name).map_err(|error| error.to_string())?;
        let (held, owes) = asking(peer, Epoch(remote.epoch), before.as_ref(), left.as_ref()).map_err(|no| {
            format!(
                "what {peer} has is older than what was here: {no}; serve an image of it with `blockferry volume add`"
            )
        })?;
        let record = VolumeRecord {
            version: VERSION,
            name: name.clone(),
            image: image.path().to_owned(),
            geometry: remote.geometry,
            incarnation: Incarnation(self.draw()),
            generation: self.draw_generation(),
            held,
            source_generation: Some(Generation(remote.generation)),
            pace,
            is_made: image.was_made(),
            is_read_only: remote.is_read_only,
            // Without it, whatever lies there after a restart would be taken for it.
            noted: Some(image.identity().map_err(|error| error.to_string())?),
        };
        let volume = Volume::relocating(self.parts(&record, image), true).map_err(|error| error.to_string())?;
        // From here on a crash finds the intent: after the restart the source is told that nothing came of it.
        self.records.begin(&record, owes.as_ref()).map_err(|error| error.to_string())?;
        if owes.is_some() {
            self.debts.wake();
        }
        let held = record.held.clone();
        let entry = self.attach(record, Arc::new(volume), remote, remote.key);
        entry.start(Machine::new(held), Vec::new());
        self.volumes.lock().insert(name.clone(), Arc::clone(&entry));
        Ok(entry)
    }

    /// A volume whose blocks are partly elsewhere, as the journal has it.
    pub(super) fn open_arriving(self: &Arc<Self>, mut record: VolumeRecord) -> anyhow::Result<Arc<Entry>> {
        let from = match &record.held.state {
            State::Arriving { from } | State::GivingBack { from, .. } => Some(from.clone()),
            // Nothing is fetched for it any more: no peer is needed to give up what never came.
            State::Fenced { .. } => None,
            _ => anyhow::bail!("not a relocation under way"),
        };
        let (image, _) = self.open_known(&mut record)?;
        let volume = Volume::relocating(self.parts(&record, image), false)?;
        let Some(from) = from else { return Ok(Entry::new(self, record, Disk::Open(Arc::new(volume), None))) };
        let dialled = self.outside().and_then(|outside| outside.dial(&from));
        let peer = dialled.ok_or_else(|| {
            anyhow::anyhow!("its source {from} is not among the [[peers]] any more, or has no address; add it again")
        })?;
        let generation = record.source_generation.map_or(0, |generation| generation.0);
        let key = self.fetch.attach(peer, record.name.clone(), Expected { geometry: record.geometry, generation });
        let remote = Remote {
            key,
            geometry: record.geometry,
            generation,
            epoch: record.held.epoch.0,
            is_read_only: record.is_read_only,
        };
        Ok(self.attach(record, Arc::new(volume), &remote, key))
    }

    fn attach(
        self: &Arc<Self>,
        record: VolumeRecord,
        volume: Arc<Volume>,
        remote: &Remote,
        key: VolumeKey,
    ) -> Arc<Entry> {
        let timeout = self.outside().and_then(|outside| outside.demand_timeout());
        let relocation = Arc::new(Relocation::new(self.fetch.clone(), key, remote.geometry, timeout));
        relocation.bulk().set_paused(record.pace.is_paused);
        relocation.bulk().set_limit(record.pace.limit_bytes_per_s);
        relocation.apply_pace();
        volume.set_relocation(relocation);
        Entry::new(self, record, Disk::Open(volume, Some(key)))
    }

    pub(super) fn parts(&self, record: &VolumeRecord, image: Image) -> VolumeParts {
        VolumeParts {
            name: record.name.clone(),
            incarnation: record.incarnation,
            image: Arc::new(image),
            geometry: record.geometry,
            state: Arc::clone(&self.state),
            workers: self.disk_workers.clone(),
            // The machine admits.
            is_owner: false,
        }
    }
}

impl Node {
    /// Gives a relocation up: the source becomes the owner again.
    pub(super) async fn cancel_relocation(
        self: &Arc<Self>,
        name: &Name,
        cancel: Cancel,
    ) -> Result<CancelAnswer, ApiError> {
        let entry = self.known(name)?;
        let owner = entry.custody().view().way_back;
        let written = entry.facts();
        let verb = Verb::Cancel { discard: cancel.discard_writes };
        let custody = entry.custody().clone();
        let told = tokio::spawn(async move { custody.tell(verb).await });
        match tokio::time::timeout(PEER_TIMEOUT, told).await {
            Ok(Ok(Ok(_))) => {
                let owner = owner.unwrap_or_else(|| self.config.site.name.clone());
                let discarded_bytes = if written.is_written { written.written_bytes } else { 0 };
                Ok(CancelAnswer { discarded_bytes, owner })
            }
            Ok(Ok(Err(no))) => Err(api_error(name, &no)),
            Ok(Err(error)) => Err(ApiError::new(ErrorKind::Internal, error.to_string(), "")),
            Err(_) => {
                let from = owner.map_or_else(|| "the source".to_owned(), |from| from.to_string());
                Err(ApiError::new(
                    ErrorKind::Unavailable,
                    format!("volume {name} is given up here, but {from} has not heard of it yet"),
                    format!("it goes on by itself when {from} answers; see `blockferry status {name}`"),
                ))
            }
        }
    }

    /// A person's decision that the other side is lost for good.
    pub(super) async fn reclaim_volume(
        self: &Arc<Self>,
        name: &Name,
        reclaim: Reclaim,
    ) -> Result<ReclaimAnswer, ApiError> {
        let entry = self.known(name)?;
        let before = entry.record();
        let absent_bytes = entry.volume().ok().map(|volume| {
            let snapshot = volume.snapshot();
            snapshot.absent_blocks * u64::from(before.geometry.block_size.bytes())
        });
        let custody = entry.custody().clone();
        let epoch = Epoch(reclaim.epoch);
        let drawn = self.draw();
        let salt = u16::from_le_bytes([drawn[0], drawn[1]]);
        let told = tokio::spawn(async move { custody.tell(Verb::Reclaim { epoch, salt }).await });
        let epoch = match told.await {
            Ok(Ok(epoch)) => epoch,
            Ok(Err(no)) => return Err(api_error(name, &no)),
            Err(error) => return Err(ApiError::new(ErrorKind::Internal, error.to_string(), "")),
        };
        let is_owner = !matches!(before.held.state, State::Asking { .. } | State::GivingBack { was_owner: false, .. });
        let (lost, lost_bytes, fenced) = match before.held.state {
            State::Released { to, .. } => (
                vec![
                    format!(
                        "what guests wrote to {name} at {to} since the hand-over at epoch {} is lost, how much is not known here",
                        before.held.epoch
                    ),
                    format!("{name} is what it was at {} when it was handed over", self.config.site.name),
                ],
                None,
                Some(to),
            ),
            State::Asking { from } | State::GivingBack { from, was_owner: false, .. } => {
                (vec![format!("nothing of {name} had come from {from}: the name is free here")], Some(0), None)
            }
            State::Arriving { from } | State::GivingBack { from, is_complete: false, .. } => (
                vec![format!("blocks of {name} that never came from {from} read as zeros from now on")],
                absent_bytes,
                Some(from),
            ),
            State::Fenced { by, is_complete: false } => (
                vec![format!("blocks of {name} that never came, and what guests wrote at {by}, are lost")],
                absent_bytes,
                Some(by),
            ),
            State::GivingBack { from: by, .. } | State::Fenced { by, .. } => {
                (vec![format!("what guests wrote to {name} at {by} meanwhile is lost")], None, Some(by))
            }
            State::Owned => (Vec::new(), Some(0), None),
        };
        tracing::warn!(volume = %name, %epoch, lost = lost.join("; "), "a person reclaimed the volume");
        Ok(ReclaimAnswer { epoch: epoch.0, is_owner, lost, lost_bytes, fenced })
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

    fn unreachable(&self, name: &Name, peer: &Name, key: PeerKey) -> ApiError {
        let dialling = self.links.lock().get(&key).and_then(|link| link.last_error()).map(|error| error.to_string());
        let why = dialling.unwrap_or_else(|| "it does not answer".into());
        ApiError::new(
            ErrorKind::Unavailable,
            format!("volume {name}: peer {peer} cannot be reached: {why}"),
            "nothing was begun; try again when it answers",
        )
    }
}

fn timeout_of(name: &Name, timeout_s: Option<f64>) -> Result<Duration, ApiError> {
    match timeout_s {
        None => Ok(DEFAULT_HANDOVER_TIMEOUT),
        Some(seconds) if seconds > 0.0 && seconds <= 1e9 => Ok(Duration::from_secs_f64(seconds)),
        Some(seconds) => {
            let what = format!("volume {name}: a hand-over cannot take at most {seconds} s");
            Err(ApiError::new(ErrorKind::Invalid, what, "give it more than 0 s"))
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
