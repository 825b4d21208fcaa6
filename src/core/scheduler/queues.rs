//! What waits for one peer and what is under way with it, and a volume's pace. Must not know flights' contents.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::time::Duration;

use super::{FlightId, Now, PeerKey, VolumeKey};
use crate::core::ids::Class;

/// The queues of one peer.
#[derive(Debug)]
pub(super) struct PeerQueues {
    pub(super) is_up: bool,
    pub(super) bulk_window_bytes: u64,
    pub(super) in_flight: [usize; 3],
    demand: VecDeque<FlightId>,
    readahead: VecDeque<FlightId>,
    bulk: BTreeMap<VolumeKey, VecDeque<FlightId>>,
    last_bulk_volume: Option<VolumeKey>,
    /// Bulk that is under way and not elevated, the oldest first.
    sent_bulk: BTreeSet<FlightId>,
    bulk_in_flight_bytes: u64,
    /// Wire bytes that bulk should have had for its share of what the guests got.
    owed_bytes: f64,
    /// Wire bytes per raw byte, as lately seen.
    wire_ratio: f64,
}

/// Bulk's claim is forgotten above this: it is a share of the present, not of the past. It can only grow that far while
/// there is no bulk under way to be elevated; what comes then is elevated at once, ahead of whatever guests ask next.
const MAX_OWED_BYTES: f64 = 64.0 * 1024.0;

impl PeerQueues {
    pub(super) fn new(bulk_window_bytes: u64) -> PeerQueues {
        PeerQueues {
            is_up: false,
            bulk_window_bytes,
            in_flight: [0; 3],
            demand: VecDeque::new(),
            readahead: VecDeque::new(),
            bulk: BTreeMap::new(),
            last_bulk_volume: None,
            sent_bulk: BTreeSet::new(),
            bulk_in_flight_bytes: 0,
            owed_bytes: 0.0,
            wire_ratio: 0.5,
        }
    }

    /// The peer is gone, and everything that lay with it.
    pub(super) fn reset(&mut self) {
        *self = PeerQueues { wire_ratio: self.wire_ratio, ..PeerQueues::new(self.bulk_window_bytes) };
    }

    pub(super) fn push(&mut self, flight: FlightId, class: Class, volume: VolumeKey, is_retry: bool) {
        let queue = match class {
            Class::Demand => &mut self.demand,
            Class::Readahead => &mut self.readahead,
            Class::Bulk => self.bulk.entry(volume).or_default(),
        };
        if is_retry { queue.push_front(flight) } else { queue.push_back(flight) }
    }

    /// Clears a queue that has grown beyond `bound` of all but one entry for each flight that is current. What is
    /// cancelled or promoted stays in its queue until its turn, and a paused volume's turn may never come.
    pub(super) fn sweep(
        &mut self,
        class: Class,
        volume: VolumeKey,
        bound: usize,
        is_current: impl Fn(FlightId) -> bool,
    ) {
        let queue = match class {
            Class::Demand => &mut self.demand,
            Class::Readahead => &mut self.readahead,
            Class::Bulk => self.bulk.entry(volume).or_default(),
        };
        if queue.len() > bound {
            let mut seen = HashSet::new();
            queue.retain(|flight| is_current(*flight) && seen.insert(*flight));
        }
    }

    /// The next urgent flight that is still what the queue says it is.
    pub(super) fn pop(&mut self, class: Class, is_current: impl Fn(FlightId) -> bool) -> Option<FlightId> {
        let queue = if class == Class::Demand { &mut self.demand } else { &mut self.readahead };
        std::iter::from_fn(|| queue.pop_front()).find(|flight| is_current(*flight))
    }

    /// The next bulk flight, the volumes taking turns.
    pub(super) fn pop_bulk(
        &mut self,
        mut may_send: impl FnMut(VolumeKey) -> bool,
        is_current: impl Fn(FlightId) -> bool,
    ) -> Option<(FlightId, VolumeKey)> {
        let mut turn: Vec<VolumeKey> = self.bulk.keys().copied().collect();
        if let Some(last) = self.last_bulk_volume {
            let first = turn.partition_point(|volume| *volume <= last);
            turn.rotate_left(first);
        }
        for volume in turn {
            if !may_send(volume) {
                continue;
            }
            let Some(queue) = self.bulk.get_mut(&volume) else { continue };
            let picked = std::iter::from_fn(|| queue.pop_front()).find(|flight| is_current(*flight));
            if queue.is_empty() {
                self.bulk.remove(&volume);
            }
            if let Some(flight) = picked {
                self.last_bulk_volume = Some(volume);
                return Some((flight, volume));
            }
        }
        None
    }

    /// Nothing waits and nothing is under way.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.queued() == 0
            && self.bulk.is_empty()
            && self.sent_bulk.is_empty()
            && self.bulk_in_flight_bytes == 0
            && self.in_flight == [0; 3]
    }

    /// Entries in all queues, the stale ones included.
    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.demand.len() + self.readahead.len() + self.bulk.values().map(VecDeque::len).sum::<usize>()
    }

    pub(super) fn has_bulk_of(&self, volume: VolumeKey) -> bool {
        self.bulk.contains_key(&volume)
    }

    /// Nothing of the volume is to be sent any more.
    pub(super) fn drop_volume(&mut self, volume: VolumeKey) {
        self.bulk.remove(&volume);
    }

    /// At least one block may always be under way, however large.
    pub(super) fn has_bulk_room(&self) -> bool {
        self.bulk_in_flight_bytes == 0 || self.bulk_in_flight_bytes < self.bulk_window_bytes
    }

    pub(super) fn expected_wire_bytes(&self, raw_bytes: u64) -> u64 {
        (raw_bytes as f64 * self.wire_ratio) as u64
    }

    pub(super) fn sent(&mut self, flight: FlightId, class: Class, raw_bytes: u64) {
        self.in_flight[class as usize] += 1;
        if class == Class::Bulk {
            self.bulk_in_flight_bytes += raw_bytes;
            self.sent_bulk.insert(flight);
        }
    }

    pub(super) fn reclass(&mut self, flight: FlightId, before: Class, after: Class, raw_bytes: u64) {
        self.sent_bulk.remove(&flight);
        self.in_flight[before as usize] = self.in_flight[before as usize].saturating_sub(1);
        self.in_flight[after as usize] += 1;
        if before == Class::Bulk {
            self.bulk_in_flight_bytes = self.bulk_in_flight_bytes.saturating_sub(raw_bytes);
        }
    }

    /// A flight has ended: 0 `wire_bytes` when it brought nothing.
    pub(super) fn left(&mut self, flight: FlightId, class: Class, raw_bytes: u64, wire_bytes: u64, min_share: f64) {
        let was_elevated = class == Class::Bulk && !self.sent_bulk.remove(&flight);
        self.in_flight[class as usize] = self.in_flight[class as usize].saturating_sub(1);
        if class == Class::Bulk {
            self.bulk_in_flight_bytes = self.bulk_in_flight_bytes.saturating_sub(raw_bytes);
        }
        if wire_bytes == 0 {
            return;
        }
        if raw_bytes > 0 {
            self.wire_ratio += (wire_bytes as f64 / raw_bytes as f64 - self.wire_ratio) / 32.0;
        }
        match class {
            Class::Bulk if was_elevated => {}
            Class::Bulk => self.owed_bytes = (self.owed_bytes - wire_bytes as f64).max(0.0),
            _ => {
                let claim = wire_bytes as f64 * min_share / (1.0 - min_share);
                self.owed_bytes = (self.owed_bytes + claim).min(MAX_OWED_BYTES.max(claim));
            }
        }
    }

    /// Whether bulk is owed at least a block while guests keep the link busy.
    pub(super) fn owes_bulk(&self) -> bool {
        let guests_are_busy = self.in_flight[Class::Demand as usize] + self.in_flight[Class::Readahead as usize] > 0;
        guests_are_busy && self.owed_bytes >= 16384.0 * self.wire_ratio.max(0.05)
    }

    pub(super) fn elevated(&mut self, raw_bytes: u64) {
        self.owed_bytes -= self.expected_wire_bytes(raw_bytes).max(1) as f64;
    }

    /// Takes the longest-waiting bulk flight that is under way and was not elevated yet.
    pub(super) fn pop_oldest_bulk(&mut self) -> Option<FlightId> {
        self.sent_bulk.pop_first()
    }
}

/// A volume's bulk pace: a token bucket over wire bytes that may go into debt by what was misjudged.
#[derive(Debug)]
pub(super) struct Pace {
    pub(super) peer: PeerKey,
    pub(super) is_paused: bool,
    rate_bytes_per_s: Option<f64>,
    tokens: f64,
    refilled_at: Now,
}

impl Pace {
    pub(super) fn new(peer: PeerKey) -> Pace {
        Pace { peer, is_paused: false, rate_bytes_per_s: None, tokens: 0.0, refilled_at: Now::ZERO }
    }

    pub(super) fn set_rate(&mut self, now: Now, bytes_per_s: Option<u64>) {
        self.rate_bytes_per_s = bytes_per_s.map(|rate| rate.max(1) as f64);
        self.tokens = 0.0;
        self.refilled_at = now;
    }

    pub(super) fn may_send(&mut self, now: Now) -> bool {
        let Some(rate) = self.rate_bytes_per_s else { return !self.is_paused };
        let passed = now.saturating_sub(self.refilled_at);
        self.refilled_at = now;
        // A tenth of a second of burst: enough for the timer's grain, too little to be felt on the link.
        self.tokens = (self.tokens + passed.as_secs_f64() * rate).min((rate / 10.0).max(1.0));
        !self.is_paused && self.tokens > 0.0
    }

    pub(super) fn charge(&mut self, _now: Now, wire_bytes: u64) {
        if self.rate_bytes_per_s.is_some() {
            self.tokens -= wire_bytes as f64;
        }
    }

    pub(super) fn settle(&mut self, charged_bytes: u64, wire_bytes: u64) {
        if self.rate_bytes_per_s.is_some() {
            self.tokens += charged_bytes as f64 - wire_bytes as f64;
        }
    }

    /// When it has a token again, if it is limited and has none.
    pub(super) fn next_token(&self) -> Option<Now> {
        let rate = self.rate_bytes_per_s.filter(|_| !self.is_paused && self.tokens <= 0.0)?;
        let missing = (1.0 - self.tokens).max(0.0);
        Some(self.refilled_at + Duration::from_secs_f64((missing / rate).clamp(0.001, 3600.0)))
    }
}
