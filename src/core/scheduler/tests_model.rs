//! A reference model of the scheduler: what it owes after every call, computed the slow and obvious way.
//! Drives the real one, checks every action and answer against the model, and panics where the two disagree.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use super::*;
use crate::core::ids::BlockIndex;

/// Ids that the places of a world share.
const CONTENTS: u64 = 7;

/// Something that happens to a scheduler. Numbers choose among what exists at that moment. `Late` answers a flight that
/// has ended or is not with a peer; `Add` brings a removed volume's key back, perhaps at another peer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Want { volume: u32, block: u64, class: Class, with_id: bool },
    Cancel { which: usize },
    LookedUp { which: usize, is_hit: bool },
    Arrived { which: usize, wire_eighths: u64 },
    Failed { which: usize, failure: Failure },
    Late { which: usize },
    Up { peer: u32 },
    Down { peer: u32 },
    Pause { volume: u32, is_paused: bool },
    Rate { volume: u32, bytes_per_s: Option<u64> },
    SiteRate { bytes_per_s: Option<u64> },
    Window { peer: u32, bytes: u64 },
    Remove { volume: u32 },
    Add { volume: u32, peer: u32 },
    Step { ms: u64 },
    StepToDeadline,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ModelStage {
    LookingUp,
    Queued,
    /// `told` is the class that the peer knows of.
    Sent {
        peer: PeerKey,
        place: Place,
        told: Class,
    },
    Waiting {
        until: Now,
    },
}

/// What one flight has to be.
#[derive(Debug)]
struct Group {
    /// Unknown until an action names it.
    flight: Option<FlightId>,
    id: Option<BlockId>,
    class: Class,
    stage: ModelStage,
    waiters: Vec<Waiter>,
    places: Vec<Place>,
    refused: Vec<Place>,
    failures: u32,
    len_bytes: u64,
}

#[derive(Debug)]
struct ModelPeer {
    is_up: bool,
    window_bytes: u64,
    in_flight: [usize; 3],
    bulk_bytes: u64,
}

#[derive(Debug)]
struct ModelVolume {
    peer: PeerKey,
    is_paused: bool,
    rate: Option<u64>,
}

/// The scheduler and its model, side by side.
pub(super) struct World {
    scheduler: Scheduler,
    limits: Limits,
    now: Now,
    peers: BTreeMap<PeerKey, ModelPeer>,
    volumes: BTreeMap<VolumeKey, ModelVolume>,
    site_rate: Option<u64>,
    groups: Vec<Group>,
    /// Look-ups that the driver has not answered.
    lookups: Vec<FlightId>,
    ended: Vec<FlightId>,
    forgets: Vec<(FlightId, PeerKey)>,
    unanswered: BTreeSet<WaiterId>,
    next_waiter: u64,
    joined: u64,
}

/// What stands at a place: volumes share contents, and repeat them.
fn id_at(place: Place) -> BlockId {
    BlockId([(1 + content_at(place)) as u8; 32])
}

fn content_at(place: Place) -> u64 {
    (place.block.0 * 5 + u64::from(place.volume.0) * 3) % CONTENTS
}

fn len_at(place: Place) -> u64 {
    if content_at(place) == 0 { 5000 } else { 65536 }
}

impl World {
    pub(super) fn new(limits: Limits, peers: u32, volumes: u32) -> World {
        let mut world = World {
            scheduler: Scheduler::new(limits),
            limits,
            now: Duration::from_secs(1),
            peers: BTreeMap::new(),
            volumes: BTreeMap::new(),
            site_rate: None,
            groups: Vec::new(),
            lookups: Vec::new(),
            ended: Vec::new(),
            forgets: Vec::new(),
            unanswered: BTreeSet::new(),
            next_waiter: 0,
            joined: 0,
        };
        for peer in 0..peers {
            let model =
                ModelPeer { is_up: false, window_bytes: limits.bulk_window_bytes, in_flight: [0; 3], bulk_bytes: 0 };
            world.peers.insert(PeerKey(peer), model);
        }
        for volume in 0..volumes {
            world.apply(Op::Add { volume, peer: volume % peers });
        }
        for peer in 0..peers {
            world.apply(Op::Up { peer });
        }
        world
    }

    /// Does `op` to both, then compares them.
    pub(super) fn apply(&mut self, op: Op) {
        match op {
            Op::Want { volume, block, class, with_id } => self.want(VolumeKey(volume), block, class, with_id),
            Op::Cancel { which } => self.cancel(which),
            Op::LookedUp { which, is_hit } => {
                if !self.lookups.is_empty() {
                    let flight = self.lookups.remove(which % self.lookups.len());
                    self.looked_up(flight, is_hit);
                }
            }
            Op::Arrived { which, wire_eighths } => {
                if let Some((at, flight)) = self.nth_sent(which) {
                    let group = self.leave(at);
                    let landed = self.scheduler.arrived(self.now, flight, group.len_bytes * wire_eighths / 8);
                    self.land(group, landed);
                }
            }
            Op::Failed { which, failure } => {
                if let Some((at, flight)) = self.nth_sent(which) {
                    self.failed(at, flight, failure);
                }
            }
            Op::Late { which } => self.late(which),
            Op::Up { peer } => {
                if let Some(model) = self.peers.get_mut(&PeerKey(peer)) {
                    model.is_up = true;
                    self.scheduler.peer_up(self.now, PeerKey(peer));
                }
            }
            Op::Down { peer } => self.peer_down(PeerKey(peer)),
            Op::Pause { volume, is_paused } => {
                if let Some(model) = self.volumes.get_mut(&VolumeKey(volume)) {
                    model.is_paused = is_paused;
                }
                self.scheduler.set_paused(self.now, VolumeKey(volume), is_paused);
            }
            Op::Rate { volume, bytes_per_s } => {
                if let Some(model) = self.volumes.get_mut(&VolumeKey(volume)) {
                    model.rate = bytes_per_s;
                }
                self.scheduler.set_rate(self.now, VolumeKey(volume), bytes_per_s);
            }
            Op::SiteRate { bytes_per_s } => {
                self.site_rate = bytes_per_s;
                self.scheduler.set_site_rate(self.now, bytes_per_s);
            }
            Op::Window { peer, bytes } => {
                if let Some(model) = self.peers.get_mut(&PeerKey(peer)) {
                    model.window_bytes = bytes;
                }
                self.scheduler.set_bulk_window(self.now, PeerKey(peer), bytes);
            }
            Op::Remove { volume } => self.remove_volume(VolumeKey(volume)),
            Op::Add { volume, peer } => {
                let (volume, peer) = (VolumeKey(volume), PeerKey(peer % self.peers.len() as u32));
                if let Entry::Vacant(entry) = self.volumes.entry(volume) {
                    entry.insert(ModelVolume { peer, is_paused: false, rate: None });
                    self.scheduler.add_volume(volume, peer);
                }
            }
            Op::Step { ms } => self.tick(self.now + Duration::from_millis(ms)),
            Op::StepToDeadline => {
                if let Some(deadline) = self.scheduler.deadline() {
                    self.tick(deadline);
                }
            }
        }
        self.drain();
        self.check();
    }

    /// Faults end, everybody answers: nothing may be left, and nobody unanswered.
    pub(super) fn settle(&mut self) {
        let peers: Vec<u32> = self.peers.keys().map(|peer| peer.0).collect();
        let volumes: Vec<u32> = self.volumes.keys().map(|volume| volume.0).collect();
        volumes.iter().for_each(|volume| self.apply(Op::Pause { volume: *volume, is_paused: false }));
        peers.iter().for_each(|peer| self.apply(Op::Up { peer: *peer }));
        let mut steps = 0;
        while !self.groups.is_empty() {
            steps += 1;
            assert!(steps < 10_000, "no end in sight: {:?}", self.groups);
            if !self.lookups.is_empty() {
                self.apply(Op::LookedUp { which: 0, is_hit: false });
            } else if self.nth_sent(0).is_some() {
                self.apply(Op::Arrived { which: 0, wire_eighths: 4 });
            } else {
                assert!(self.scheduler.deadline().is_some(), "stuck: {:?}", self.groups);
                self.apply(Op::StepToDeadline);
            }
        }
        // Whatever was left behind in queues goes when its time comes.
        self.apply(Op::Step { ms: 3_600_000 });
        assert!(self.unanswered.is_empty(), "never answered: {:?}", self.unanswered);
        let scheduler = &self.scheduler;
        assert_eq!(scheduler.flights(), 0);
        assert!(scheduler.by_id.is_empty(), "{:?}", scheduler.by_id);
        assert!(scheduler.by_place.is_empty(), "{:?}", scheduler.by_place);
        assert!(scheduler.by_waiter.is_empty(), "{:?}", scheduler.by_waiter);
        assert!(scheduler.retries.is_empty(), "{:?}", scheduler.retries);
        assert_eq!(scheduler.deadline(), None);
        for (peer, queues) in &scheduler.peers {
            assert_eq!(scheduler.in_flight(*peer), [0; 3]);
            assert!(queues.is_idle(), "{queues:?}");
        }
    }

    fn want(&mut self, volume: VolumeKey, block: u64, class: Class, with_id: bool) {
        if !self.volumes.contains_key(&volume) {
            return;
        }
        let place = Place { volume, block: BlockIndex(block) };
        let id = with_id.then(|| id_at(place));
        let waiter = Waiter { id: WaiterId(self.next_waiter), place, class };
        self.next_waiter += 1;
        self.unanswered.insert(waiter.id);
        let by_place = self.groups.iter().position(|g| g.places.contains(&place) || g.refused.contains(&place));
        let by_id = || self.groups.iter().position(|g| id.is_some() && g.id == id);
        if let Some(at) = by_place.or_else(by_id) {
            self.joined += 1;
            // What was asked for by position is known by its content from now on, unless another flight is.
            let is_new_id = id.is_some() && by_id().is_none();
            let group = &mut self.groups[at];
            if group.id.is_none() && is_new_id {
                group.id = id;
            }
            group.waiters.push(waiter);
            if !group.places.contains(&place) && !group.refused.contains(&place) {
                group.places.push(place);
            }
            if class.is_more_urgent_than(group.class) {
                let before = std::mem::replace(&mut group.class, class);
                match group.stage {
                    ModelStage::Sent { peer, .. } => {
                        let len_bytes = group.len_bytes;
                        self.account(peer, before, len_bytes, -1);
                        self.account(peer, class, len_bytes, 1);
                    }
                    ModelStage::Waiting { .. } => group.stage = ModelStage::Queued,
                    ModelStage::LookingUp | ModelStage::Queued => {}
                }
            }
        } else {
            let stage = if with_id { ModelStage::LookingUp } else { ModelStage::Queued };
            self.groups.push(Group {
                flight: None,
                id,
                class,
                stage,
                waiters: vec![waiter],
                places: vec![place],
                refused: Vec::new(),
                failures: 0,
                len_bytes: len_at(place),
            });
        }
        let len_bytes = len_at(place) as u32;
        self.scheduler.want(self.now, WantBlock { waiter: waiter.id, place, id, class, len_bytes });
    }

    fn cancel(&mut self, which: usize) {
        let Some(waiter) = self.unanswered.iter().copied().nth(which % self.unanswered.len().max(1)) else { return };
        self.unanswered.remove(&waiter);
        let at = self.groups.iter().position(|g| g.waiters.iter().any(|w| w.id == waiter)).expect("it waits");
        self.groups[at].waiters.retain(|w| w.id != waiter);
        if self.groups[at].waiters.is_empty() {
            self.forget(at);
            self.leave(at);
        }
        self.scheduler.cancel(self.now, waiter);
    }

    fn looked_up(&mut self, flight: FlightId, is_hit: bool) {
        let at = self.groups.iter().position(|g| g.flight == Some(flight) && g.stage == ModelStage::LookingUp);
        match at {
            Some(at) if is_hit => {
                let group = self.leave(at);
                let landed = self.scheduler.looked_up(self.now, flight, true);
                self.land(group, landed);
            }
            Some(at) => {
                self.groups[at].stage = ModelStage::Queued;
                assert_eq!(self.scheduler.looked_up(self.now, flight, false), None);
            }
            // The other answer of two, or nobody waits any more.
            None => assert_eq!(self.scheduler.looked_up(self.now, flight, is_hit), None),
        }
    }

    fn failed(&mut self, at: usize, flight: FlightId, failure: Failure) {
        let ModelStage::Sent { peer, place, .. } = self.groups[at].stage else { unreachable!("chosen for it") };
        let (class, len_bytes) = (self.groups[at].class, self.groups[at].len_bytes);
        self.account(peer, class, len_bytes, -1);
        let group = &mut self.groups[at];
        match failure {
            Failure::Transient => {
                let delay_ms = (100u64 << group.failures.min(6)).min(5000);
                group.failures += 1;
                group.stage = ModelStage::Waiting { until: self.now + Duration::from_millis(delay_ms) };
            }
            Failure::Permanent => {
                group.places.retain(|other| *other != place);
                group.refused.push(place);
                group.stage = ModelStage::Queued;
                if group.places.is_empty() {
                    let group = self.groups.remove(at);
                    let landed = self.scheduler.failed(self.now, flight, failure);
                    self.land(group, landed);
                    return;
                }
            }
        }
        assert_eq!(self.scheduler.failed(self.now, flight, failure), None);
    }

    fn late(&mut self, which: usize) {
        let idle = self.groups.iter().filter(|g| !matches!(g.stage, ModelStage::Sent { .. })).filter_map(|g| g.flight);
        let flights: Vec<FlightId> = self.ended.iter().copied().chain(idle).collect();
        let Some(flight) = flights.get(which % flights.len().max(1)).copied() else { return };
        assert_eq!(self.scheduler.arrived(self.now, flight, 1000), None);
        assert_eq!(self.scheduler.failed(self.now, flight, Failure::Permanent), None);
        assert_eq!(self.scheduler.failed(self.now, flight, Failure::Transient), None);
    }

    fn peer_down(&mut self, peer: PeerKey) {
        let Some(model) = self.peers.get_mut(&peer) else { return };
        model.is_up = false;
        model.in_flight = [0; 3];
        model.bulk_bytes = 0;
        for group in &mut self.groups {
            if matches!(group.stage, ModelStage::Sent { peer: asked, .. } if asked == peer) {
                group.stage = ModelStage::Queued;
            }
        }
        self.scheduler.peer_down(self.now, peer);
    }

    fn remove_volume(&mut self, volume: VolumeKey) {
        let mut owed = Vec::new();
        for at in (0..self.groups.len()).rev() {
            let group = &mut self.groups[at];
            let gone: Vec<Waiter> = group.waiters.iter().copied().filter(|w| w.place.volume == volume).collect();
            group.waiters.retain(|w| w.place.volume != volume);
            group.places.retain(|place| place.volume != volume);
            group.refused.retain(|place| place.volume != volume);
            // The last place that had not refused is gone: those who still wait are asked for where they stand.
            if group.places.is_empty() {
                group.places.append(&mut group.refused);
            }
            let is_orphan = group.waiters.is_empty();
            let is_asked_there = matches!(group.stage, ModelStage::Sent { place, .. } if place.volume == volume);
            if is_orphan {
                self.forget(at);
                self.leave(at);
            } else if is_asked_there {
                self.forget(at);
                self.groups[at].stage = ModelStage::Queued;
            }
            owed.extend(gone);
        }
        self.volumes.remove(&volume);
        let mut dropped = self.scheduler.remove_volume(self.now, volume);
        dropped.sort_unstable_by_key(|waiter| waiter.id);
        owed.sort_unstable_by_key(|waiter| waiter.id);
        assert_eq!(dropped, owed);
        for waiter in owed {
            assert!(self.unanswered.remove(&waiter.id), "{waiter:?} was answered before");
        }
    }

    fn tick(&mut self, now: Now) {
        self.now = now;
        for group in &mut self.groups {
            if matches!(group.stage, ModelStage::Waiting { until } if until <= now) {
                group.stage = ModelStage::Queued;
            }
        }
        self.scheduler.tick(now);
    }

    fn nth_sent(&self, which: usize) -> Option<(usize, FlightId)> {
        let sent: Vec<(usize, FlightId)> = self
            .groups
            .iter()
            .enumerate()
            .filter(|(_, g)| matches!(g.stage, ModelStage::Sent { .. }))
            .filter_map(|(at, g)| g.flight.map(|flight| (at, flight)))
            .collect();
        sent.get(which % sent.len().max(1)).copied()
    }

    fn account(&mut self, peer: PeerKey, class: Class, len_bytes: u64, change: isize) {
        let model = self.peers.get_mut(&peer).expect("a peer of this world");
        let count = &mut model.in_flight[class as usize];
        *count = count.checked_add_signed(change).expect("never below zero");
        if class == Class::Bulk {
            model.bulk_bytes = model.bulk_bytes.checked_add_signed(change as i64 * len_bytes as i64).expect("as above");
        }
    }

    /// Expects a Forget, if a peer is at it, and takes it off the peer's account.
    fn forget(&mut self, at: usize) {
        let group = &self.groups[at];
        if let (ModelStage::Sent { peer, .. }, Some(flight)) = (group.stage, group.flight) {
            self.forgets.push((flight, peer));
            let (class, len_bytes) = (group.class, group.len_bytes);
            self.account(peer, class, len_bytes, -1);
            self.groups[at].stage = ModelStage::Queued;
        }
    }

    fn leave(&mut self, at: usize) -> Group {
        let group = self.groups.remove(at);
        if let ModelStage::Sent { peer, .. } = group.stage {
            self.account(peer, group.class, group.len_bytes, -1);
        }
        self.ended.extend(group.flight);
        group
    }

    fn land(&mut self, group: Group, landed: Option<Landed>) {
        let landed = landed.unwrap_or_else(|| panic!("nobody was told: {group:?}"));
        assert_eq!(landed.waiters, group.waiters, "the waiters of {:?}, the first asker first", group.flight);
        assert_eq!(landed.class, group.class);
        for waiter in landed.waiters {
            assert!(self.unanswered.remove(&waiter.id), "{waiter:?} was answered before");
        }
    }

    fn drain(&mut self) {
        while let Some(action) = self.scheduler.poll_action() {
            match action {
                Action::LookUp { flight, id, class } => {
                    let group = self.groups.iter_mut().find(|g| g.id == Some(id)).expect("a look-up for somebody");
                    assert_eq!(*group.flight.get_or_insert(flight), flight);
                    assert_eq!((group.stage, group.class), (ModelStage::LookingUp, class), "{action:?}");
                    self.lookups.push(flight);
                }
                Action::Send { flight, peer, place, class } => self.sent(flight, peer, place, class),
                Action::Promote { flight, peer, class } => {
                    let busy = self.peers[&peer].in_flight[..2].iter().any(|count| *count > 0);
                    let group = self.groups.iter_mut().find(|g| g.flight == Some(flight)).expect("it exists");
                    let ModelStage::Sent { peer: asked, told, .. } = &mut group.stage else {
                        panic!("{action:?} of {group:?}")
                    };
                    assert_eq!(*asked, peer, "{action:?}");
                    assert!(class.is_more_urgent_than(*told), "{action:?}, and it was {told:?} before");
                    let is_elevation = group.class == Class::Bulk && class == Class::Demand && busy;
                    assert!(class == group.class || is_elevation, "{action:?} of {:?}", group.class);
                    *told = class;
                }
                Action::Forget { flight, peer } => {
                    let at = self.forgets.iter().position(|f| *f == (flight, peer));
                    self.forgets.swap_remove(at.unwrap_or_else(|| panic!("{action:?} is not due")));
                }
            }
        }
        assert!(self.forgets.is_empty(), "not forgotten: {:?}", self.forgets);
    }

    fn sent(&mut self, flight: FlightId, peer: PeerKey, place: Place, class: Class) {
        assert!(!self.ended.contains(&flight), "{flight:?} has ended");
        assert!(!self.forgets.iter().any(|(other, _)| *other == flight), "{flight:?} is to be forgotten first");
        let at = self
            .groups
            .iter()
            .position(|g| g.flight == Some(flight))
            .or_else(|| self.groups.iter().position(|g| g.flight.is_none() && g.places.contains(&place)))
            .expect("a flight that somebody waits for");
        let group = &mut self.groups[at];
        assert_eq!(*group.flight.get_or_insert(flight), flight);
        assert_eq!((group.stage, group.class), (ModelStage::Queued, class), "{group:?} sent to {place:?}");
        assert!(group.places.contains(&place), "{place:?} is none of {group:?}");
        let model = &self.peers[&peer];
        assert!(model.is_up, "{peer:?} is down");
        assert_eq!(self.volumes.get(&place.volume).map(|v| v.peer), Some(peer), "{place:?} is not with {peer:?}");
        match class {
            Class::Demand => assert!(model.in_flight[0] < self.limits.demand_flights, "too much demand"),
            Class::Readahead => assert!(model.in_flight[1] < self.limits.readahead_flights, "too much readahead"),
            Class::Bulk => {
                assert!(model.bulk_bytes == 0 || model.bulk_bytes < model.window_bytes, "too much bulk");
                assert!(!self.volumes[&place.volume].is_paused, "{:?} is paused", place.volume);
            }
        }
        group.stage = ModelStage::Sent { peer, place, told: class };
        let len_bytes = group.len_bytes;
        self.account(peer, class, len_bytes, 1);
    }

    fn check(&self) {
        assert_eq!(self.scheduler.flights(), self.groups.len());
        assert_eq!(self.scheduler.joined(), self.joined);
        for (peer, model) in &self.peers {
            assert_eq!(self.scheduler.in_flight(*peer), model.in_flight, "{peer:?}");
        }
        let deadline = self.scheduler.deadline();
        assert!(
            deadline.is_none_or(|deadline| deadline > self.now),
            "a deadline that has passed makes the driver spin"
        );
        let mut ids = HashSet::new();
        let mut places = HashSet::new();
        for group in &self.groups {
            match group.stage {
                ModelStage::LookingUp => {}
                ModelStage::Sent { place, told, .. } => {
                    assert!(!group.class.is_more_urgent_than(told), "the peer was not told of {:?}", group.class);
                    assert!(group.id.is_none_or(|id| ids.insert(id)), "two flights for {:?}", group.id);
                    assert!(places.insert(place), "two flights for {place:?}");
                }
                ModelStage::Waiting { until } => {
                    assert!(deadline.is_some_and(|deadline| deadline <= until), "nobody will wake {group:?}");
                }
                ModelStage::Queued => self.check_queued(group, deadline),
            }
        }
    }

    /// Queued is right only where no peer could take it now, and time will tell where only time is missing.
    fn check_queued(&self, group: &Group, deadline: Option<Now>) {
        for place in &group.places {
            let volume = &self.volumes[&place.volume];
            let peer = &self.peers[&volume.peer];
            if !peer.is_up {
                continue;
            }
            let has_room = match group.class {
                Class::Demand => peer.in_flight[0] < self.limits.demand_flights,
                Class::Readahead => peer.in_flight[1] < self.limits.readahead_flights,
                Class::Bulk => {
                    let has_room = peer.bulk_bytes == 0 || peer.bulk_bytes < peer.window_bytes;
                    let has_pace = volume.rate.is_none() && self.site_rate.is_none() && !volume.is_paused;
                    assert!(!has_room || volume.is_paused || has_pace || deadline.is_some(), "no token for {group:?}");
                    has_room && has_pace
                }
            };
            assert!(!has_room, "{:?} has room for {group:?}", volume.peer);
        }
    }
}
