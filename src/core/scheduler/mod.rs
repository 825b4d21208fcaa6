//! The fetch scheduler: which block is asked of whom, when, and how urgently. One flight per id for all volumes together;
//! demand before readahead before bulk; promotion of what bulk has already asked for; a guaranteed share for bulk.
//! Pure: time is an argument, answers are actions. Must not know tokio, stores or connections.

mod queues;
mod types;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use crate::core::ids::{BlockId, Class};
use crate::seeded_bugs::{Bug, is_planted};
use queues::{Pace, PeerQueues};

pub use types::{
    Action, Failure, FlightId, Landed, Limits, Now, PeerKey, Place, VolumeKey, Waiter, WaiterId, WantBlock,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    LookingUp,
    /// In a queue of every peer that can answer and is up; in none if there is no such peer.
    Queued,
    Sent {
        peer: PeerKey,
        class: Class,
    },
    Waiting {
        until: Now,
    },
}

#[derive(Debug)]
struct Flight {
    id: Option<BlockId>,
    class: Class,
    stage: Stage,
    waiters: Vec<Waiter>,
    /// Where it can be had, the next to try first.
    places: VecDeque<Place>,
    /// Where it was refused for good.
    refused: Vec<Place>,
    len_bytes: u32,
    failures: u32,
    /// Bulk that was lent the urgency of demand, because bulk was owed its share.
    is_elevated: bool,
    charged_bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    next_flight: u64,
    flights: HashMap<FlightId, Flight>,
    by_id: HashMap<BlockId, FlightId>,
    by_place: HashMap<Place, FlightId>,
    by_waiter: HashMap<WaiterId, FlightId>,
    peers: BTreeMap<PeerKey, PeerQueues>,
    volumes: BTreeMap<VolumeKey, Pace>,
    /// The pace of all volumes' bulk together.
    site: Pace,
    retries: BTreeMap<(Now, FlightId), ()>,
    actions: VecDeque<Action>,
    joined: u64,
}

impl Scheduler {
    /// Nobody wants anything yet.
    pub fn new(limits: Limits) -> Scheduler {
        Scheduler {
            limits,
            next_flight: 1,
            flights: HashMap::new(),
            by_id: HashMap::new(),
            by_place: HashMap::new(),
            by_waiter: HashMap::new(),
            peers: BTreeMap::new(),
            volumes: BTreeMap::new(),
            site: Pace::new(PeerKey(u32::MAX)),
            retries: BTreeMap::new(),
            actions: VecDeque::new(),
            joined: 0,
        }
    }

    /// A volume whose blocks can be asked of `peer`.
    pub fn add_volume(&mut self, volume: VolumeKey, peer: PeerKey) {
        self.peers.entry(peer).or_insert_with(|| PeerQueues::new(self.limits.bulk_window_bytes));
        self.volumes.insert(volume, Pace::new(peer));
    }

    /// The volume wants nothing more: its waiters are given back unanswered.
    pub fn remove_volume(&mut self, now: Now, volume: VolumeKey) -> Vec<Waiter> {
        let mut dropped = Vec::new();
        let is_of_it = |place: &Place| place.volume == volume;
        let mut flights: Vec<FlightId> = self.flights.keys().copied().collect();
        flights.sort_unstable();
        for flight in flights {
            let Some(state) = self.flights.get_mut(&flight) else { continue };
            let (gone, stay): (Vec<_>, Vec<_>) = state.waiters.drain(..).partition(|w| is_of_it(&w.place));
            state.waiters = stay;
            for waiter in &gone {
                self.by_waiter.remove(&waiter.id);
            }
            dropped.extend(gone);
            if state.waiters.is_empty() {
                self.abandon(flight);
                continue;
            }
            // Others still wait for it: it has to be asked for through one of their volumes, also where the waiter who
            // brought the place of this one has cancelled.
            let mut is_to_be_queued = false;
            if let Stage::Sent { peer, .. } = state.stage
                && state.places.front().is_some_and(is_of_it)
            {
                self.leave_peer(flight, 0);
                self.actions.push_back(Action::Forget { flight, peer });
                is_to_be_queued = true;
            }
            let Some(state) = self.flights.get_mut(&flight) else { continue };
            if is_to_be_queued {
                state.stage = Stage::Queued;
                state.is_elevated = false;
            }
            for place in state.places.iter().chain(&state.refused).filter(|place| is_of_it(place)) {
                self.by_place.remove(place);
            }
            state.places.retain(|place| !is_of_it(place));
            state.refused.retain(|place| !is_of_it(place));
            // Only places that refused are left: they are asked once more, so that their waiters get an answer.
            if state.places.is_empty() {
                state.places.extend(state.refused.drain(..));
                is_to_be_queued = state.stage == Stage::Queued;
            }
            if is_to_be_queued {
                self.enqueue(flight, |_| true);
            }
        }
        for queues in self.peers.values_mut() {
            queues.drop_volume(volume);
        }
        self.volumes.remove(&volume);
        self.dispatch(now);
        dropped
    }

    /// Stops or resumes the volume's bulk flights that are not under way yet.
    pub fn set_paused(&mut self, now: Now, volume: VolumeKey, is_paused: bool) {
        if let Some(pace) = self.volumes.get_mut(&volume) {
            pace.is_paused = is_paused;
        }
        self.dispatch(now);
    }

    /// Bounds the volume's bulk wire bytes per second.
    pub fn set_rate(&mut self, now: Now, volume: VolumeKey, bytes_per_s: Option<u64>) {
        if let Some(pace) = self.volumes.get_mut(&volume) {
            pace.set_rate(now, bytes_per_s);
        }
        self.dispatch(now);
    }

    /// Bounds the bulk wire bytes per second of all volumes together.
    pub fn set_site_rate(&mut self, now: Now, bytes_per_s: Option<u64>) {
        self.site.set_rate(now, bytes_per_s);
        self.dispatch(now);
    }

    /// How many raw bulk bytes may be under way with a peer: near what the path holds.
    pub fn set_bulk_window(&mut self, now: Now, peer: PeerKey, window_bytes: u64) {
        if let Some(queues) = self.peers.get_mut(&peer) {
            queues.bulk_window_bytes = window_bytes;
        }
        self.dispatch(now);
    }

    /// The peer can be asked.
    pub fn peer_up(&mut self, now: Now, peer: PeerKey) {
        let queues = self.peers.entry(peer).or_insert_with(|| PeerQueues::new(self.limits.bulk_window_bytes));
        if queues.is_up {
            return;
        }
        queues.is_up = true;
        let mut queued: Vec<FlightId> =
            self.flights.iter().filter(|(_, f)| f.stage == Stage::Queued).map(|(id, _)| *id).collect();
        queued.sort_unstable();
        for flight in queued {
            self.enqueue(flight, |other| other == peer);
        }
        self.dispatch(now);
    }

    /// The connection is gone: what was under way is asked again, of another peer that has it or when this one is back.
    pub fn peer_down(&mut self, now: Now, peer: PeerKey) {
        if let Some(queues) = self.peers.get_mut(&peer) {
            queues.reset();
        }
        let mut lost: Vec<FlightId> = self
            .flights
            .iter()
            .filter(|(_, f)| matches!(f.stage, Stage::Sent { peer: asked, .. } if asked == peer))
            .map(|(id, _)| *id)
            .collect();
        lost.sort_unstable();
        if is_planted(Bug::LostConnectionForgotten) {
            lost.pop();
        }
        for flight in lost {
            if let Some(state) = self.flights.get_mut(&flight) {
                state.stage = Stage::Queued;
                state.is_elevated = false;
                self.enqueue(flight, |_| true);
            }
        }
        self.dispatch(now);
    }

    /// Somebody wants a block: a new flight, or a seat in the one that is under way.
    pub fn want(&mut self, now: Now, want: WantBlock) {
        debug_assert!(want.id.is_none_or(|id| !id.is_zero()), "zero blocks are never asked for");
        let waiter = Waiter { id: want.waiter, place: want.place, class: want.class };
        let under_way =
            self.by_place.get(&want.place).or_else(|| want.id.as_ref().and_then(|id| self.by_id.get(id))).copied();
        let under_way = under_way.filter(|_| !is_planted(Bug::JoinLost));
        if let Some(flight) = under_way
            && let Some(state) = self.flights.get_mut(&flight)
        {
            state.waiters.push(waiter);
            self.by_waiter.insert(want.waiter, flight);
            self.joined += 1;
            // Asked for by its position before its page was here: from now on others find it by its content, too.
            if let (None, Some(id)) = (state.id, want.id)
                && !self.by_id.contains_key(&id)
            {
                state.id = Some(id);
                self.by_id.insert(id, flight);
            }
            let is_new_queue = state.places.iter().all(|place| place.volume != want.place.volume);
            let is_new_place = !state.places.contains(&want.place) && !state.refused.contains(&want.place);
            if is_new_place {
                state.places.push_back(want.place);
                self.by_place.insert(want.place, flight);
            }
            let (stage, class) = (state.stage, state.class);
            if want.class.is_more_urgent_than(class) {
                self.promote(now, flight, want.class);
            } else if is_new_place
                && is_new_queue
                && stage == Stage::Queued
                && let Some(at) = self.volumes.get(&want.place.volume).map(|pace| pace.peer)
            {
                self.enqueue(flight, |peer| peer == at);
            }
            self.dispatch(now);
            return;
        }
        let flight = FlightId(self.next_flight);
        self.next_flight += 1;
        let stage = if want.id.is_some() { Stage::LookingUp } else { Stage::Queued };
        self.flights.insert(
            flight,
            Flight {
                id: want.id,
                class: want.class,
                stage,
                waiters: vec![waiter],
                places: VecDeque::from([want.place]),
                refused: Vec::new(),
                len_bytes: want.len_bytes,
                failures: 0,
                is_elevated: false,
                charged_bytes: 0,
            },
        );
        self.by_place.insert(want.place, flight);
        self.by_waiter.insert(want.waiter, flight);
        match want.id {
            Some(id) => {
                self.by_id.insert(id, flight);
                self.actions.push_back(Action::LookUp { flight, id, class: want.class });
            }
            None => {
                self.enqueue(flight, |_| true);
                self.dispatch(now);
            }
        }
    }

    /// The waiter does not wait any more.
    pub fn cancel(&mut self, now: Now, waiter: WaiterId) {
        let Some(flight) = self.by_waiter.remove(&waiter) else { return };
        if let Some(state) = self.flights.get_mut(&flight) {
            state.waiters.retain(|other| other.id != waiter);
            if state.waiters.is_empty() {
                self.abandon(flight);
            }
        }
        self.dispatch(now);
    }

    /// The store's answer. On a hit the flight ends here: the waiters are to be answered from the store.
    pub fn looked_up(&mut self, now: Now, flight: FlightId, is_hit: bool) -> Option<Landed> {
        let state = self.flights.get_mut(&flight)?;
        if state.stage != Stage::LookingUp {
            return None;
        }
        if is_hit {
            return self.end(flight);
        }
        state.stage = Stage::Queued;
        self.enqueue(flight, |_| true);
        self.dispatch(now);
        None
    }

    /// A verified block came. None when nobody waits for this flight (it was forgotten, or answered before).
    pub fn arrived(&mut self, now: Now, flight: FlightId, wire_bytes: u64) -> Option<Landed> {
        if !matches!(self.flights.get(&flight)?.stage, Stage::Sent { .. }) {
            return None;
        }
        self.leave_peer(flight, wire_bytes);
        let landed = self.end(flight);
        self.dispatch(now);
        landed
    }

    /// The peer said no, or sent something that failed its check. Returns the waiters if no place is left to ask.
    pub fn failed(&mut self, now: Now, flight: FlightId, failure: Failure) -> Option<Landed> {
        if !matches!(self.flights.get(&flight)?.stage, Stage::Sent { .. }) {
            return None;
        }
        self.leave_peer(flight, 0);
        let state = self.flights.get_mut(&flight)?;
        state.is_elevated = false;
        let landed = match failure {
            Failure::Permanent => {
                state.refused.extend(state.places.pop_front());
                if state.places.is_empty() {
                    self.end(flight)
                } else {
                    state.stage = Stage::Queued;
                    self.enqueue(flight, |_| true);
                    None
                }
            }
            Failure::Transient => {
                state.places.rotate_left(1);
                let until = now + backoff(state.failures);
                state.failures += 1;
                state.stage = Stage::Waiting { until };
                if !is_planted(Bug::RetryForgotten) {
                    self.retries.insert((until, flight), ());
                }
                None
            }
        };
        self.dispatch(now);
        landed
    }

    /// Lets time pass: retries that are due, rate limits that have room again.
    pub fn tick(&mut self, now: Now) {
        while let Some((&(until, flight), ())) = self.retries.first_key_value() {
            if until > now {
                break;
            }
            self.retries.pop_first();
            if let Some(state) = self.flights.get_mut(&flight)
                && state.stage == (Stage::Waiting { until })
            {
                self.ask_again(now, flight);
            }
        }
        self.dispatch(now);
    }

    /// When [`Scheduler::tick`] is next worth calling.
    pub fn deadline(&self) -> Option<Now> {
        let retry = self.retries.first_key_value().map(|((until, _), ())| *until);
        // Only for those that wait for nothing but a token: any other deadline would lie in the past, again and again.
        let paced = self.volumes.iter().filter_map(|(volume, pace)| {
            let waits = |queues: &PeerQueues| queues.is_up && queues.has_bulk_room() && queues.has_bulk_of(*volume);
            if self.peers.get(&pace.peer).is_some_and(waits) {
                pace.next_token().max(self.site.next_token())
            } else {
                None
            }
        });
        retry.into_iter().chain(paced).min()
    }

    /// The next thing to do; drain it after every call above.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The block that a flight is for, where it is known.
    pub fn id_of(&self, flight: FlightId) -> Option<BlockId> {
        self.flights.get(&flight)?.id
    }

    /// The peer that a flight is under way with, if it is.
    pub fn asked(&self, flight: FlightId) -> Option<PeerKey> {
        match self.flights.get(&flight)?.stage {
            Stage::Sent { peer, .. } => Some(peer),
            _ => None,
        }
    }

    /// Whose block a flight under way asks for.
    pub fn place_of(&self, flight: FlightId) -> Option<Place> {
        self.flights.get(&flight)?.places.front().copied()
    }

    /// The length of a flight's block, in bytes.
    pub fn len_of(&self, flight: FlightId) -> Option<u32> {
        Some(self.flights.get(&flight)?.len_bytes)
    }

    /// Flights that exist, in whatever stage.
    pub fn flights(&self) -> usize {
        self.flights.len()
    }

    /// Wants that found their block under way already.
    pub fn joined(&self) -> u64 {
        self.joined
    }

    /// Flights under way with a peer, by class as accounted (elevated bulk is bulk).
    pub fn in_flight(&self, peer: PeerKey) -> [usize; 3] {
        self.peers.get(&peer).map_or([0; 3], |queues| queues.in_flight)
    }

    fn promote(&mut self, now: Now, flight: FlightId, class: Class) {
        let Some(state) = self.flights.get_mut(&flight) else { return };
        let before = std::mem::replace(&mut state.class, class);
        match state.stage {
            Stage::LookingUp => {
                if let Some(id) = state.id {
                    self.actions.push_back(Action::LookUp { flight, id, class });
                }
            }
            Stage::Queued => self.enqueue(flight, |_| true),
            Stage::Sent { peer, .. } => {
                state.stage = Stage::Sent { peer, class };
                let (is_elevated, len) = (state.is_elevated, u64::from(state.len_bytes));
                if let Some(queues) = self.peers.get_mut(&peer) {
                    queues.reclass(flight, before, class, len);
                }
                // What a guest waits for is not charged to bulk's rate.
                if before == Class::Bulk
                    && let Some(pace) = state.places.front().and_then(|place| self.volumes.get_mut(&place.volume))
                {
                    pace.settle(state.charged_bytes, 0);
                    self.site.settle(state.charged_bytes, 0);
                }
                // The peer serves what is elevated as demand already.
                if !is_elevated && !is_planted(Bug::PromotionLost) {
                    self.actions.push_back(Action::Promote { flight, peer, class });
                }
            }
            // It failed a moment ago; whoever asks now need not wait for the back-off of the background.
            Stage::Waiting { until } => {
                self.retries.remove(&(until, flight));
                self.ask_again(now, flight);
            }
        }
    }

    /// After a failure: first of the peer whose turn it is, then of whoever has it. Otherwise the first of the peers
    /// would be asked each time, however often it fails.
    fn ask_again(&mut self, now: Now, flight: FlightId) {
        let Some(state) = self.flights.get_mut(&flight) else { return };
        state.stage = Stage::Queued;
        let next = state.places.front().and_then(|place| self.volumes.get(&place.volume)).map(|pace| pace.peer);
        if let Some(next) = next.filter(|peer| self.peers.get(peer).is_some_and(|queues| queues.is_up)) {
            self.enqueue(flight, |peer| peer == next);
            self.dispatch_peer(now, next);
        }
        if self.flights.get(&flight).is_some_and(|state| state.stage == Stage::Queued) {
            self.enqueue(flight, |peer| Some(peer) != next);
        }
    }

    /// Puts a queued flight into the queues of those peers that are up, have it and are `asked`. Queues may hold stale
    /// entries; a flight is taken from a queue only if it is `Queued` in that class.
    fn enqueue(&mut self, flight: FlightId, is_asked: impl Fn(PeerKey) -> bool) {
        let Some(state) = self.flights.get(&flight) else { return };
        let class = state.class;
        // Once for each queue, however many places lead to it.
        let mut entered: Vec<(PeerKey, Option<VolumeKey>)> = Vec::new();
        for place in &state.places {
            let Some(peer) = self.volumes.get(&place.volume).map(|pace| pace.peer).filter(|peer| is_asked(*peer))
            else {
                continue;
            };
            let queue = (peer, (class == Class::Bulk).then_some(place.volume));
            if entered.contains(&queue) {
                continue;
            }
            entered.push(queue);
            if let Some(queues) = self.peers.get_mut(&peer).filter(|queues| queues.is_up) {
                queues.push(flight, class, place.volume, state.failures > 0);
                let bound = 2 * self.flights.len() + 1024;
                queues.sweep(class, place.volume, bound, |flight| is_queued(&self.flights, flight, class));
            }
        }
    }

    fn abandon(&mut self, flight: FlightId) {
        if let Some(Flight { stage: Stage::Sent { peer, .. }, .. }) = self.flights.get(&flight) {
            let peer = *peer;
            self.leave_peer(flight, 0);
            self.actions.push_back(Action::Forget { flight, peer });
        }
        self.end(flight);
    }

    fn leave_peer(&mut self, flight: FlightId, wire_bytes: u64) {
        let Some(state) = self.flights.get(&flight) else { return };
        let Stage::Sent { peer, class } = state.stage else { return };
        if let Some(queues) = self.peers.get_mut(&peer) {
            let raw = u64::from(state.len_bytes);
            queues.left(flight, class, raw, wire_bytes, self.limits.bulk_min_share);
        }
        if class == Class::Bulk
            && let Some(pace) = state.places.front().and_then(|place| self.volumes.get_mut(&place.volume))
        {
            pace.settle(state.charged_bytes, wire_bytes);
            self.site.settle(state.charged_bytes, wire_bytes);
        }
    }

    fn end(&mut self, flight: FlightId) -> Option<Landed> {
        let state = self.flights.remove(&flight)?;
        if let Some(id) = state.id {
            self.by_id.remove(&id);
        }
        if let Stage::Waiting { until } = state.stage {
            self.retries.remove(&(until, flight));
        }
        for place in state.places.iter().chain(&state.refused) {
            self.by_place.remove(place);
        }
        for waiter in &state.waiters {
            self.by_waiter.remove(&waiter.id);
        }
        Some(Landed { waiters: state.waiters, class: state.class })
    }

    /// Sends whatever the bounds allow.
    fn dispatch(&mut self, now: Now) {
        let peers: Vec<PeerKey> = self.peers.iter().filter(|(_, q)| q.is_up).map(|(peer, _)| *peer).collect();
        for peer in peers {
            self.dispatch_peer(now, peer);
        }
    }

    fn dispatch_peer(&mut self, now: Now, peer: PeerKey) {
        while self.dispatch_one(now, peer) {}
    }

    fn dispatch_one(&mut self, now: Now, peer: PeerKey) -> bool {
        let Some(queues) = self.peers.get_mut(&peer) else { return false };
        let flights = &self.flights;
        if queues.owes_bulk()
            && let Some(flight) = queues.pop_oldest_bulk()
        {
            return self.elevate(flight, peer);
        }
        for (class, limit) in
            [(Class::Demand, self.limits.demand_flights), (Class::Readahead, self.limits.readahead_flights)]
        {
            let is_free = class == Class::Readahead && is_planted(Bug::ReadaheadWithoutBound);
            if (is_free || queues.in_flight[class as usize] < limit)
                && let Some(flight) = queues.pop(class, |flight| is_queued(flights, flight, class))
            {
                return self.send(now, flight, peer, class, None);
            }
        }
        if self.site.may_send(now) && queues.has_bulk_room() {
            let volumes = &mut self.volumes;
            let picked = queues.pop_bulk(
                |volume| volumes.get_mut(&volume).is_some_and(|pace| pace.may_send(now)),
                |flight| is_queued(flights, flight, Class::Bulk),
            );
            if let Some((flight, volume)) = picked {
                return self.send(now, flight, peer, Class::Bulk, Some(volume));
            }
        }
        false
    }

    /// Bulk goes through the volume whose turn it is: another one with the same id may be paused, or pay for it.
    fn send(&mut self, now: Now, flight: FlightId, peer: PeerKey, class: Class, turn: Option<VolumeKey>) -> bool {
        let Some(state) = self.flights.get_mut(&flight) else { return true };
        // A place that this peer has; it goes to the front, where a failure looks for it.
        let has = |place: &Place| self.volumes.get(&place.volume).is_some_and(|pace| pace.peer == peer);
        let is_its_turn = |place: &Place| turn.is_none_or(|volume| volume == place.volume);
        let Some(at) = state.places.iter().position(|place| has(place) && is_its_turn(place)) else { return true };
        state.places.rotate_left(at);
        let place = state.places[0];
        state.stage = Stage::Sent { peer, class };
        let len = u64::from(state.len_bytes);
        if let Some(queues) = self.peers.get_mut(&peer) {
            queues.sent(flight, class, len);
            state.charged_bytes = queues.expected_wire_bytes(len);
        }
        if class == Class::Bulk
            && let Some(pace) = self.volumes.get_mut(&place.volume)
        {
            pace.charge(now, state.charged_bytes);
            self.site.charge(now, state.charged_bytes);
        }
        self.actions.push_back(Action::Send { flight, peer, place, class });
        true
    }

    fn elevate(&mut self, flight: FlightId, peer: PeerKey) -> bool {
        let Some(state) = self.flights.get_mut(&flight) else { return true };
        state.is_elevated = true;
        if let Some(queues) = self.peers.get_mut(&peer) {
            queues.elevated(u64::from(state.len_bytes));
        }
        self.actions.push_back(Action::Promote { flight, peer, class: Class::Demand });
        true
    }
}

fn is_queued(flights: &HashMap<FlightId, Flight>, flight: FlightId, class: Class) -> bool {
    flights.get(&flight).is_some_and(|state| state.stage == Stage::Queued && state.class == class)
}

/// 100 ms, doubling to 5 s.
fn backoff(failures: u32) -> Duration {
    Duration::from_millis(100 << failures.min(6)).min(Duration::from_secs(5))
}

#[cfg(test)]
mod tests;
