//! A site that exists only in memory, for tests of the API and of the command line: it takes down what it was asked,
//! and its relocations advance by one step whenever somebody looks.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, ready};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::*;
use crate::core::ids::Name;

/// What a volume's name makes of it: `bad-...` fails, `slow` is never answered, `precious` cannot be cancelled. The
/// hand-over of `late-...` takes two looks, that of `stuck-...` does not end, that of `withdrawn-...` is withdrawn.
#[derive(Default)]
pub(crate) struct FakeSite {
    pub volumes: Mutex<BTreeMap<Name, VolumeStatus>>,
    pub calls: Mutex<Vec<String>>,
    pub owed: Mutex<Vec<OwedOfVolume>>,
    pub left: Mutex<Vec<Left>>,
    prewarms: Mutex<Vec<(Vec<PathBuf>, u64)>>,
    /// The next status waits for this.
    pub gate: Mutex<Option<oneshot::Receiver<()>>>,
    /// The next removal or relocation waits for this.
    pub change_gate: Mutex<Option<oneshot::Receiver<()>>>,
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// A 1 GiB volume with every number different.
pub(crate) fn volume(name_text: &str, role: Role, phase: Phase) -> VolumeStatus {
    VolumeStatus {
        name: name(name_text),
        role,
        phase,
        phase_reason: String::new(),
        owner: name("site-a"),
        epoch: 3,
        image: format!("/srv/{name_text}.raw").into(),
        size_bytes: 1 << 30,
        block_size_bytes: 65536,
        blocks: BlockCounts { total: 16384, absent: 4096, present: 12000, written: 288, partial: 2 },
        hashed_blocks: (role == Role::Source).then_some(8192),
        reads: ReadBytes {
            resident_bytes: 5 << 20,
            zero_bytes: 1 << 20,
            store_bytes: 2 << 20,
            wire_bytes: 3 << 20,
            partial_bytes: 4096,
        },
        moved: MovedBytes {
            zero_bytes: 300 << 20,
            store_bytes: 200 << 20,
            joined_bytes: 50 << 20,
            wire_raw_bytes: 200 << 20,
            wire_bytes: 90 << 20,
            wire_by_class: WireBytes { demand_bytes: 10 << 20, readahead_bytes: 0, bulk_bytes: 80 << 20 },
        },
        demand_latency_ms: LatencyMs { count: 120, p50: 45.5, p99: 61.25, max: 99.0 },
        bulk: (role == Role::Destination).then_some(BulkStatus {
            rate_bytes_per_s: 11_000_000.0,
            limit_bytes_per_s: Some(12_500_000),
            paused: false,
        }),
        eta_s: (phase == Phase::Copying).then_some(125.0),
        peer: (role == Role::Destination).then(|| name("site-b")),
        link: (role == Role::Destination).then_some(LinkStatus {
            state: LinkState::Connected,
            rtt_ms: Some(40.2),
            cwnd_bytes: Some(620_000),
        }),
        nbd_clients: 1,
        read_only: None,
        guest_written_bytes: if role == Role::Destination { 18 << 20 } else { 0 },
        owed: Vec::new(),
    }
}

impl FakeSite {
    /// With an owned image `web-01`, and `db-01` on its way here.
    pub(crate) fn with_volumes() -> Arc<FakeSite> {
        let site = FakeSite::default();
        let both = [volume("web-01", Role::Source, Phase::Owned), volume("db-01", Role::Destination, Phase::Copying)];
        *site.volumes.lock() = both.into_iter().map(|volume| (volume.name.clone(), volume)).collect();
        Arc::new(site)
    }

    fn note(&self, call: String) {
        self.calls.lock().push(call);
    }

    fn missing(name: &Name) -> ApiError {
        ApiError::new(ErrorKind::NotFound, format!("there is no volume {name}"), "`blockferry status` lists them")
    }

    fn order(&self, what: &str, name: Name) -> Result<(), ApiError> {
        self.note(format!("{what} {name}"));
        self.volumes.lock().get(&name).map(drop).ok_or_else(|| FakeSite::missing(&name))
    }

    /// Relocations go on by one step each time they are looked at.
    fn advance(volume: &mut VolumeStatus) {
        let text = volume.name.to_string();
        match volume.phase {
            Phase::Connecting
                if text.starts_with("stuck")
                    || (volume.phase_reason.is_empty()
                        && ["late", "withdrawn"].iter().any(|s| text.starts_with(s))) =>
            {
                volume.phase_reason = "site-b is writing back its cache before the hand-over".into();
            }
            Phase::Connecting => {
                volume.phase_reason.clear();
                volume.phase = Phase::Copying;
                volume.eta_s = Some(60.0);
                volume.blocks.absent = 8192;
            }
            Phase::Copying if text.starts_with("bad") => {
                volume.phase = Phase::Failed;
                volume.phase_reason = "the disk is full".into();
            }
            Phase::Copying if text.starts_with("new") => {
                volume.phase = Phase::ReleasedFromSource;
                volume.eta_s = None;
                volume.blocks.absent = 0;
            }
            _ => {}
        }
    }

    fn stats() -> StoreStats {
        StoreStats {
            blocks_estimate: 20_000,
            stored_bytes: 3 << 30,
            capacity_bytes: 12 << 30,
            memory_bytes: 20 << 20,
            hits: 300,
            misses: 100,
            hit_raw_bytes: 300 << 16,
            puts: 1000,
            put_raw_bytes: 1000 << 16,
            put_stored_bytes: 400 << 16,
            ..StoreStats::default()
        }
    }
}

impl Site for FakeSite {
    fn status(&self) -> Answer<'_, SiteStatus> {
        async move {
            let gate = self.gate.lock().take();
            if let Some(gate) = gate {
                let _ = gate.await;
            }
            Ok(SiteStatus {
                site: name("site-a"),
                fingerprint: format!("sha256:{}", "ab".repeat(32)).parse().expect("a fingerprint"),
                version: "0.1.0".into(),
                uptime_s: 3725.0,
                volumes: self.volumes.lock().values().cloned().collect(),
                peers: vec![
                    PeerStatus {
                        name: name("site-b"),
                        state: LinkState::Connected,
                        rtt_ms: Some(40.2),
                        last_error: None,
                    },
                    PeerStatus {
                        name: name("site-c"),
                        state: LinkState::Down,
                        rtt_ms: None,
                        last_error: Some("no answer from site-c.example:7440".into()),
                    },
                ],
                store: FakeSite::stats(),
                owed: self.owed.lock().clone(),
                left: self.left.lock().clone(),
            })
        }
        .boxed()
    }

    fn volume_status(&self, name: Name) -> Answer<'_, VolumeStatus> {
        if name.as_str() == "slow" {
            return futures::future::pending().boxed();
        }
        let mut volumes = self.volumes.lock();
        let found = volumes.get_mut(&name).map(|volume| {
            FakeSite::advance(volume);
            volume.clone()
        });
        if found.as_ref().is_some_and(|volume| volume.phase == Phase::Copying) && name.as_str().starts_with("withdrawn")
        {
            let message = format!("the hand-over of {name} was withdrawn: it took more than 5m");
            return ready(Err(ApiError::new(ErrorKind::Conflict, message, "relocate it again"))).boxed();
        }
        ready(found.ok_or_else(|| FakeSite::missing(&name))).boxed()
    }

    fn add_volume(&self, add: AddVolume) -> Answer<'_, ()> {
        let again = if add.again { " again" } else { "" };
        self.note(format!("add {} {}{again}", add.name, add.image.display()));
        let left = self.left.lock().iter().find(|left| left.name == add.name && !add.again).cloned();
        if let Some(Left { name, peer, epoch }) = left {
            let message = format!("{name} left this site for {peer} in epoch {epoch}");
            return ready(Err(ApiError::new(ErrorKind::Conflict, message, "--again takes it back"))).boxed();
        }
        let mut volumes = self.volumes.lock();
        if volumes.contains_key(&add.name) {
            let message = format!("there is a volume {} already", add.name);
            return ready(Err(ApiError::new(ErrorKind::Conflict, message, "choose another name"))).boxed();
        }
        let mut added = volume(add.name.as_str(), Role::Source, Phase::Owned);
        added.image = add.image;
        volumes.insert(add.name, added);
        ready(Ok(())).boxed()
    }

    fn remove_volume(&self, name: Name) -> Answer<'_, ()> {
        assert_ne!(name.as_str(), "panics", "a panic on purpose");
        async move {
            let gate = self.change_gate.lock().take();
            if let Some(gate) = gate {
                let _ = gate.await;
            }
            let result = self.order("remove", name.clone());
            self.volumes.lock().remove(&name);
            result
        }
        .boxed()
    }

    fn relocate(&self, requests: Vec<RelocateRequest>) -> BoxFuture<'_, Vec<Result<(), ApiError>>> {
        let mut results = Vec::new();
        for request in requests {
            self.note(format!("relocate {request:?}"));
            let mut volumes = self.volumes.lock();
            results.push(if request.peer.as_str() != "site-b" {
                let message = format!("there is no peer {}", request.peer);
                Err(ApiError::new(ErrorKind::NotFound, message, "list it as [[peers]] in the configuration"))
            } else if let Entry::Vacant(place) = volumes.entry(request.volume.clone()) {
                place.insert(volume(request.volume.as_str(), Role::Destination, Phase::Connecting));
                Ok(())
            } else {
                let message = format!("there is a volume {} already", request.volume);
                Err(ApiError::new(ErrorKind::Conflict, message, "cancel or remove that one first"))
            });
        }
        let gate = self.change_gate.lock().take();
        async move {
            if let Some(gate) = gate {
                let _ = gate.await;
            }
            results
        }
        .boxed()
    }

    fn pause(&self, name: Name) -> Answer<'_, ()> {
        ready(self.order("pause", name)).boxed()
    }

    fn resume(&self, name: Name) -> Answer<'_, ()> {
        ready(self.order("resume", name)).boxed()
    }

    fn limit(&self, name: Name, bytes_per_s: Option<u64>) -> Answer<'_, ()> {
        ready(self.order(&format!("limit {bytes_per_s:?}"), name)).boxed()
    }

    fn cancel(&self, name: Name, cancel: Cancel) -> Answer<'_, CancelAnswer> {
        if name.as_str() == "precious" && !cancel.discard_writes {
            let message = "cancelling precious would lose 3 blocks that its guest wrote";
            return ready(Err(ApiError::new(ErrorKind::Refused, message, "let it complete"))).boxed();
        }
        let what = if cancel.discard_writes { "cancel discarding" } else { "cancel" };
        let discarded_bytes = if cancel.discard_writes { 3 << 16 } else { 0 };
        let answer = CancelAnswer { discarded_bytes, owner: self::name("site-b") };
        ready(self.order(what, name).map(|()| answer)).boxed()
    }

    fn accept_peer(&self, name: Name) -> Answer<'_, ()> {
        let accepted = self.order("accept", name);
        Box::pin(async move { accepted })
    }

    fn reclaim(&self, name: Name, reclaim: Reclaim) -> Answer<'_, ReclaimAnswer> {
        let answer = self.order(&format!("reclaim {}", reclaim.epoch), name.clone()).and_then(|()| {
            let mut volumes = self.volumes.lock();
            let volume = volumes.get_mut(&name).ok_or_else(|| FakeSite::missing(&name))?;
            if volume.epoch != reclaim.epoch {
                let message = format!("{name} is in epoch {}, not {}", volume.epoch, reclaim.epoch);
                return Err(ApiError::new(ErrorKind::Conflict, message, "look at its status again"));
            }
            volume.epoch += 1;
            let (lost, lost_bytes) = match volume.role {
                Role::Source => (vec![], Some(0)),
                Role::Destination => {
                    (vec!["4096 blocks that never arrived read as errors.".to_owned()], Some(4096 << 16))
                }
            };
            Ok(ReclaimAnswer { epoch: volume.epoch, is_owner: true, lost, lost_bytes, fenced: volume.peer.clone() })
        });
        ready(answer).boxed()
    }

    fn prewarm(&self, images: Vec<PathBuf>) -> Answer<'_, JobId> {
        self.note(format!("prewarm {images:?}"));
        let mut prewarms = self.prewarms.lock();
        prewarms.push((images, 0));
        ready(Ok(JobId(prewarms.len() as u64))).boxed()
    }

    fn prewarm_status(&self, job: JobId) -> Answer<'_, PrewarmStatus> {
        let mut prewarms = self.prewarms.lock();
        let found = usize::try_from(job.0).ok().and_then(|at| prewarms.get_mut(at.checked_sub(1)?));
        let Some((images, looks)) = found else {
            let message = format!("there is no prewarm job {job}");
            return ready(Err(ApiError::new(ErrorKind::NotFound, message, "start it again"))).boxed();
        };
        *looks += 1;
        let done = *looks >= 2;
        let broken = images.iter().any(|image| image.to_string_lossy().contains("broken"));
        ready(Ok(PrewarmStatus {
            images: images.clone(),
            bytes_done: (*looks).min(2) << 29,
            bytes_total: 1 << 30,
            blocks_new: 7000,
            blocks_known: 1000,
            blocks_zero: 8384,
            done,
            error: (done && broken).then(|| "/srv/broken.raw cannot be read: Input/output error".to_owned()),
        }))
        .boxed()
    }

    fn store_stats(&self) -> Answer<'_, StoreStats> {
        ready(Ok(FakeSite::stats())).boxed()
    }
}

/// A fake site behind a real socket in a directory of its own. Ends with the test's runtime.
pub(crate) struct FakeDaemon {
    pub site: Arc<FakeSite>,
    pub dir: tempfile::TempDir,
}

impl FakeDaemon {
    /// Must be called within a tokio runtime.
    pub(crate) fn start() -> FakeDaemon {
        FakeDaemon::answering_within(REQUEST_TIMEOUT)
    }

    pub(crate) fn answering_within(timeout: Duration) -> FakeDaemon {
        let dir = tempfile::tempdir().expect("a directory");
        let site = FakeSite::with_volumes();
        let server = ControlServer::bind(&dir.path().join("control.sock")).expect("bound").within(timeout);
        let served: Arc<dyn Site> = site.clone();
        tokio::spawn(server.serve(served, std::future::pending()));
        FakeDaemon { site, dir }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    pub(crate) fn client(&self) -> ControlClient {
        ControlClient::new(self.socket())
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.site.calls.lock().clone()
    }
}
