//! Puts into the API's words what the site knows of its volumes. Must not change anything.

use std::time::Instant;

use parking_lot::Mutex;

use super::record::Ownership;
use super::{Entry, Node};
use crate::control::{
    BlockCounts, BulkStatus, LatencyMs, LinkState, LinkStatus, MovedBytes, PeerStatus, Phase, ReadBytes, Role,
    VolumeStatus, WireBytes,
};
use crate::core::ids::Name;
use crate::core::manifest::Geometry;
use crate::fetch::{PeerKey, PeerView, Waiting};
use crate::volume::{BulkState, Snapshot};

/// How fast blocks become present, smoothed over some seconds.
#[derive(Debug, Default)]
pub(crate) struct RateMeter(Mutex<Rate>);

#[derive(Debug, Default)]
struct Rate {
    last: Option<(Instant, u64)>,
    bytes_per_s: f64,
}

impl RateMeter {
    /// Called about once a second.
    pub(crate) fn observe(&self, snapshot: &Snapshot, geometry: Geometry) {
        let mut rate = self.0.lock();
        let (now, absent) = (Instant::now(), snapshot.absent_blocks);
        if let Some((at, before)) = rate.last {
            let passed = now.duration_since(at).as_secs_f64().max(0.001);
            let arrived = before.saturating_sub(absent) as f64 * f64::from(geometry.block_size.bytes()) / passed;
            // About five seconds of memory.
            rate.bytes_per_s += (arrived - rate.bytes_per_s) * 0.2;
        }
        rate.last = Some((now, absent));
    }

    fn bytes_per_s(&self) -> f64 {
        self.0.lock().bytes_per_s
    }
}

/// Who is who in a relocation, as seen from this site.
pub(super) struct Sides {
    pub(super) role: Role,
    pub(super) owner: Name,
    pub(super) peer: Option<Name>,
}

pub(super) fn sides(here: &Name, state: &Ownership) -> Sides {
    let (role, owner, peer) = match state {
        Ownership::Owned => (Role::Source, here, None),
        Ownership::Released { to, .. } => (Role::Source, to, Some(to)),
        Ownership::Arriving { from, is_taken: true, is_given_back: false, .. } => (Role::Destination, here, Some(from)),
        Ownership::Arriving { from, .. } => (Role::Destination, from, Some(from)),
        Ownership::Arrived { from, .. } => (Role::Destination, here, Some(from)),
    };
    Sides { role, owner: owner.clone(), peer: peer.cloned() }
}

impl Node {
    pub(super) fn describe(&self, entry: &Entry) -> VolumeStatus {
        let record = entry.record.lock().clone();
        let snapshot = entry.volume.snapshot();
        let Sides { role, owner, peer } = sides(&self.config.site.name, &record.state);
        let view = peer.as_ref().and_then(|peer| self.view_of(peer));
        let (phase, phase_reason) = self.phase(entry, &record.state, view.as_ref());
        let moved = &snapshot.moved;
        let rate = entry.rate.bytes_per_s();
        let missing = snapshot.absent_blocks * u64::from(record.geometry.block_size.bytes());
        let relocation = entry.volume.relocation();
        let is_arriving = matches!(record.state, Ownership::Arriving { .. });
        VolumeStatus {
            role,
            phase,
            phase_reason,
            owner,
            epoch: record.epoch,
            image: record.image.clone(),
            size_bytes: record.geometry.size_bytes,
            block_size_bytes: record.geometry.block_size.bytes(),
            blocks: BlockCounts {
                total: snapshot.total_blocks,
                absent: snapshot.absent_blocks,
                present: snapshot.total_blocks - snapshot.absent_blocks - snapshot.written_blocks,
                written: snapshot.written_blocks,
                partial: snapshot.partial_blocks,
            },
            hashed_blocks: entry.source.lock().as_ref().map(|source| {
                (source.manifest.hashed_pages() * crate::core::manifest::PAGE_IDS).min(snapshot.total_blocks)
            }),
            reads: ReadBytes {
                resident_bytes: snapshot.reads.resident_bytes,
                zero_bytes: snapshot.reads.zero_bytes,
                store_bytes: snapshot.reads.store_bytes,
                wire_bytes: snapshot.reads.wire_bytes,
                partial_bytes: snapshot.reads.partial_bytes,
            },
            moved: MovedBytes {
                zero_bytes: moved.zero_bytes,
                store_bytes: moved.store_bytes,
                joined_bytes: moved.joined_bytes,
                wire_raw_bytes: moved.wire_raw_bytes,
                wire_bytes: moved.wire_bytes.iter().sum(),
                wire_by_class: WireBytes {
                    demand_bytes: moved.wire_bytes[0],
                    readahead_bytes: moved.wire_bytes[1],
                    bulk_bytes: moved.wire_bytes[2],
                },
            },
            demand_latency_ms: LatencyMs {
                count: snapshot.demand_count,
                p50: snapshot.demand_ms[0],
                p99: snapshot.demand_ms[1],
                max: snapshot.demand_ms[2],
            },
            bulk: relocation.as_ref().filter(|_| is_arriving).map(|relocation| BulkStatus {
                rate_bytes_per_s: rate,
                limit_bytes_per_s: relocation.bulk().limit_bytes_per_s(),
                paused: relocation.bulk().is_paused(),
            }),
            eta_s: (is_arriving && rate > 1.0 && phase == Phase::Copying).then(|| missing as f64 / rate),
            link: peer.as_ref().map(|peer| self.link_status(peer)),
            peer,
            nbd_clients: entry.clients(),
            read_only: None,
            guest_written_bytes: match role {
                Role::Source => 0,
                Role::Destination => snapshot.written_blocks * u64::from(record.geometry.block_size.bytes()),
            },
            owed: Vec::new(),
            name: record.name,
        }
    }

    fn phase(&self, entry: &Entry, state: &Ownership, view: Option<&PeerView>) -> (Phase, String) {
        let trouble = entry.trouble.lock().clone();
        match state {
            Ownership::Owned => (Phase::Owned, trouble.unwrap_or_default()),
            Ownership::Released { to, is_completed: false } => (Phase::Released, format!("{to} is fetching it")),
            Ownership::Released { to, is_completed: true } => {
                (Phase::Released, format!("{to} has all of it; `volume remove` lets go of it here"))
            }
            Ownership::Arrived { is_released: true, .. } => (Phase::ReleasedFromSource, trouble.unwrap_or_default()),
            Ownership::Arrived { from, .. } => (Phase::Complete, format!("{from} is yet to hear of it")),
            Ownership::Arriving { .. } if trouble.is_some() => (Phase::Failed, trouble.unwrap_or_default()),
            Ownership::Arriving { is_given_back: true, from, .. } => {
                (Phase::GivingBack, format!("being given back to {from}"))
            }
            Ownership::Arriving { is_taken: false, from, .. } => {
                (Phase::Connecting, format!("waiting for {from} to hand it over"))
            }
            Ownership::Arriving { from, with_bulk, .. } => {
                let down = view.filter(|view| !view.is_up);
                let relocation = entry.volume.relocation();
                let waiting = relocation.as_ref().and_then(|r| self.waiting.lock().get(&r.key()).cloned());
                let reads = match relocation.as_ref().map_or(0, |relocation| relocation.waiting_demands()) {
                    0 => String::new(),
                    reads => format!("; guest reads that wait: {reads}"),
                };
                let bulk = relocation.as_ref().map(|r| (r.bulk().state(), r.bulk().is_paused()));
                match bulk {
                    Some((BulkState::Failed(why), _)) => (Phase::Failed, why),
                    Some((BulkState::Waiting(why), _)) => (Phase::Stalled, why),
                    _ if view.is_none() || down.is_some() => {
                        // What the dialling says is newer than what the last connection died of.
                        let newest = down.and_then(|view| view.last_error.clone());
                        let why = match waiting {
                            Some(waiting) => {
                                Waiting { why: newest.unwrap_or(waiting.why.clone()), ..waiting }.to_string()
                            }
                            None => format!("{from} cannot be reached: {}", newest.unwrap_or_default()),
                        };
                        (Phase::Stalled, format!("{why}{reads}"))
                    }
                    _ if let Some(waiting) = waiting => (Phase::Stalled, format!("{waiting}{reads}")),
                    Some((_, true)) => (Phase::Paused, "paused by hand; `resume` lets it go on".into()),
                    _ if let Some(why) = relocation.and_then(|relocation| relocation.refusal()) => (Phase::Failed, why),
                    _ if !with_bulk => {
                        (Phase::Copying, "without a background copy: blocks come when they are read".into())
                    }
                    _ => (Phase::Copying, String::new()),
                }
            }
        }
    }

    pub(super) fn describe_peers(&self) -> Vec<PeerStatus> {
        self.config
            .peers
            .iter()
            .map(|peer| {
                let status = self.link_status(&peer.name);
                let last_error = self.last_error(&peer.name);
                PeerStatus { name: peer.name.clone(), state: status.state, rtt_ms: status.rtt_ms, last_error }
            })
            .collect()
    }

    fn key_of(&self, peer: &Name) -> Option<PeerKey> {
        self.config.peers.iter().position(|other| other.name == *peer).map(|at| PeerKey(at as u32))
    }

    fn view_of(&self, peer: &Name) -> Option<PeerView> {
        let key = self.key_of(peer)?;
        let views = self.peer_views.lock();
        let mut view = views.iter().find(|(other, _)| *other == key).map(|(_, view)| view.clone())?;
        if !view.is_up {
            view.last_error = self.last_error_of(key).or(view.last_error);
        }
        Some(view)
    }

    fn last_error(&self, peer: &Name) -> Option<String> {
        let key = self.key_of(peer)?;
        self.view_of(peer).and_then(|view| view.last_error).or_else(|| self.last_error_of(key))
    }

    fn last_error_of(&self, key: PeerKey) -> Option<String> {
        self.links.lock().get(&key)?.last_error().map(|error| error.to_string())
    }

    pub(super) fn link_status(&self, peer: &Name) -> LinkStatus {
        let is_dialled = self.key_of(peer).is_some_and(|key| self.links.lock().contains_key(&key));
        let view = self.view_of(peer);
        let state = match &view {
            Some(view) if view.is_up => LinkState::Connected,
            Some(view) if view.connects > 0 => LinkState::Down,
            _ if is_dialled => LinkState::Connecting,
            _ => LinkState::Idle,
        };
        LinkStatus {
            state,
            rtt_ms: view.as_ref().and_then(|view| view.rtt).map(|rtt| rtt.as_secs_f64() * 1000.0),
            cwnd_bytes: view.and_then(|view| view.cwnd_bytes),
        }
    }
}
