//! Puts into the API's words what the site knows of its volumes. Must not change anything.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::Node;
use super::entry::Entry;
use super::record::VolumeRecord;
use crate::control::{
    BlockCounts, BulkStatus, LatencyMs, LinkState, LinkStatus, MovedBytes, Owed, PeerStatus, Phase, ReadBytes, Role,
    VolumeStatus, WireBytes,
};
use crate::core::ids::Name;
use crate::core::manifest::Geometry;
use crate::custody::View;
use crate::fetch::{PeerKey, PeerView, Waiting};
use crate::handover::{Held, State};
use crate::volume::{BulkState, Snapshot, Volume};

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
///
/// Owned here, and still what came from a peer: this site is the destination; owned otherwise, or handed over from here: the source.
/// A fenced site counts as a destination, of whoever decided. The owner is the one that this site knows of: while a volume is asked for or
/// given back the source, although it may not have answered yet.
struct Sides {
    role: Role,
    owner: Name,
    peer: Option<Name>,
}

fn sides(here: &Name, held: &Held) -> Sides {
    let (role, owner, peer) = match &held.state {
        State::Owned => match held.way_back() {
            Some(from) => (Role::Destination, here, Some(from)),
            _ => (Role::Source, here, None),
        },
        State::Released { to, .. } => (Role::Source, to, Some(to)),
        State::Asking { from } | State::GivingBack { from, .. } => (Role::Destination, from, Some(from)),
        State::Arriving { from } => (Role::Destination, here, Some(from)),
        State::Fenced { by, .. } => (Role::Destination, by, Some(by)),
    };
    Sides { role, owner: owner.clone(), peer: peer.cloned() }
}

impl Node {
    pub(super) fn describe(&self, entry: &Arc<Entry>) -> VolumeStatus {
        let (record, view) = (entry.record(), entry.custody().view());
        let volume = entry.volume();
        let snapshot = match &volume {
            Ok(volume) => volume.snapshot(),
            // Nothing can be read here now, whatever is in the file.
            Err(_) => Snapshot::unknown(record.geometry.blocks()),
        };
        let Sides { role, owner, peer } = sides(&self.config.site.name, &record.held);
        let link = peer.as_ref().and_then(|peer| self.view_of(peer));
        let (phase, phase_reason) = self.phase(entry, &record, &view, &volume, link.as_ref());
        let moved = &snapshot.moved;
        let rate = entry.rate.bytes_per_s();
        let missing = snapshot.absent_blocks * u64::from(record.geometry.block_size.bytes());
        let relocation = volume.as_ref().ok().and_then(|volume| volume.relocation());
        let is_arriving = matches!(record.held.state, State::Asking { .. } | State::Arriving { .. });
        let owed = self.owed_of(Some(&record.name)).into_iter();
        VolumeStatus {
            role,
            phase,
            phase_reason,
            owner,
            epoch: record.held.epoch.0,
            image: record.image.clone(),
            size_bytes: record.geometry.size_bytes,
            block_size_bytes: record.geometry.block_size.bytes(),
            blocks: BlockCounts {
                total: snapshot.total_blocks,
                absent: snapshot.absent_blocks,
                present: snapshot.total_blocks.saturating_sub(snapshot.absent_blocks + snapshot.written_blocks),
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
            read_only: self.is_read_only(entry),
            guest_written_bytes: volume.as_ref().map_or(0, |volume| match view.way_back {
                Some(_) => volume.guest_written_bytes(),
                None => 0,
            }),
            owed: owed.map(|owed| Owed { peer: owed.peer, what: owed.what, since_epoch: owed.since_epoch }).collect(),
            name: record.name,
        }
    }

    fn phase(
        &self,
        entry: &Entry,
        record: &VolumeRecord,
        view: &View,
        volume: &Result<Arc<Volume>, String>,
        link: Option<&PeerView>,
    ) -> (Phase, String) {
        let trouble = entry.trouble.lock().clone();
        let (held, owed) = (&record.held, self.debts.list(Some(&record.name)));
        if view.is_unsure {
            let why =
                "its last change of owner cannot be written to the state database; no write is admitted until it is";
            return (Phase::Failed, why.into());
        }
        match &held.state {
            State::Asking { from } => {
                let why = match trouble {
                    Some(trouble) => format!("waiting for {from} to hand it over: {trouble}"),
                    None => format!("waiting for {from} to hand it over: it writes back its cache first"),
                };
                return (Phase::Connecting, why);
            }
            State::GivingBack { from, .. } => {
                let why = trouble.map_or(String::new(), |trouble| format!(": {trouble}"));
                return (Phase::GivingBack, format!("{from} is yet to take it back{why}"));
            }
            State::Fenced { by, .. } => {
                let why = format!(
                    "{by} owns it since epoch {} by a person's decision; `volume remove` lets go of what is here, which stays in its file",
                    held.epoch
                );
                return (Phase::Fenced, why);
            }
            State::Released { to, is_completed: false } => {
                let why = match volume {
                    Ok(_) => format!("{to} is fetching it"),
                    Err(why) => format!(
                        "{to} is fetching it, and it cannot be served: {why}; when it is mended, restart the daemon"
                    ),
                };
                return (Phase::Released, why);
            }
            State::Released { to, is_completed: true } => {
                return (Phase::Released, format!("{to} has all of it; `volume remove` lets go of it here"));
            }
            State::Owned | State::Arriving { .. } => {}
        }
        let volume = match volume {
            Ok(volume) => volume,
            Err(why) => {
                return (Phase::Failed, format!("it cannot be served: {why}; when it is mended, restart the daemon"));
            }
        };
        let State::Arriving { from } = &held.state else {
            let handing = view.handing_over_to.as_ref().map(|to| format!("it is being handed over to {to}"));
            let why = trouble.or(handing).unwrap_or_default();
            let owes =
                owed.iter().find(|(_, debt)| debt.what == crate::handover::Owed::Completed && debt.epoch == held.epoch);
            return match (held.way_back(), owes) {
                (Some(_), Some((_, debt))) => (Phase::Complete, format!("{} is yet to hear of it", debt.peer)),
                (Some(_), None) => (Phase::ReleasedFromSource, why),
                (None, _) => (Phase::Owned, why),
            };
        };
        if let Some(trouble) = trouble {
            return (Phase::Failed, trouble);
        }
        let down = link.filter(|link| !link.is_up);
        let relocation = volume.relocation();
        let waiting = relocation.as_ref().and_then(|r| self.waiting.lock().get(&r.key()).cloned());
        let reads = match relocation.as_ref().map_or(0, |relocation| relocation.waiting_demands()) {
            0 => String::new(),
            reads => format!("; guest reads that wait: {reads}"),
        };
        let bulk = relocation.as_ref().map(|r| (r.bulk().state(), r.bulk().is_paused()));
        match bulk {
            Some((BulkState::Failed(why), _)) => (Phase::Failed, why),
            Some((BulkState::Waiting(why), _)) => (Phase::Stalled, why),
            _ if link.is_none() || down.is_some() => {
                // What the dialling says is newer than what the last connection died of.
                let newest = down.and_then(|view| view.last_error.clone());
                let why = match waiting {
                    Some(waiting) => Waiting { why: newest.unwrap_or(waiting.why.clone()), ..waiting }.to_string(),
                    None => format!("{from} cannot be reached: {}", newest.unwrap_or_default()),
                };
                (Phase::Stalled, format!("{why}{reads}"))
            }
            _ if let Some(waiting) = waiting => (Phase::Stalled, format!("{waiting}{reads}")),
            Some((_, true)) => (Phase::Paused, "paused by hand; `resume` lets it go on".into()),
            _ if let Some(why) = relocation.and_then(|relocation| relocation.refusal()) => (Phase::Failed, why),
            _ if !record.pace.with_bulk => (
                Phase::Copying,
                "without a background copy: blocks come when they are read; `resume` begins one".into(),
            ),
            _ => (Phase::Copying, String::new()),
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
