//! A source behind a serial link in virtual time: what is asked for stands in the sender's queues in strict order of
//! class, a packet at a time, and arrives a fixed delay later. Guests and bulk ask again as soon as they are answered.
//! Shows who gets how much of the link, and who waits for whom.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use super::*;
use crate::core::ids::BlockIndex;

/// Raw bytes of every block here.
const BLOCK_BYTES: u32 = 64 << 10;
const PACKET_BYTES: u64 = 4096;
const PEER: PeerKey = PeerKey(0);

/// A link and who uses it.
#[derive(Clone, Copy, Debug)]
struct Setup {
    bytes_per_s: u64,
    rtt: Duration,
    /// Wire bytes of a block.
    wire_bytes: u64,
    limits: Limits,
    /// Demand reads that are always waiting.
    demand_depth: usize,
    /// Bulk wants that every volume always has with the scheduler.
    bulk_depth: usize,
    volumes: u32,
}

/// A demand read that was answered.
#[derive(Clone, Copy, Debug)]
struct Read {
    latency: Duration,
    /// Bulk that the sender let out as demand while this read stood in its queue.
    elevated_bytes: u64,
    /// Demand likewise, this read included.
    demand_bytes: u64,
}

enum Event {
    Asked { flight: FlightId, class: Class },
    Promoted { flight: FlightId, class: Class },
    PacketOut,
    Arrived { flight: FlightId },
}

struct Outgoing {
    flight: FlightId,
    left_bytes: u64,
    is_elevated: bool,
    /// What the sender had let out when this was asked for: elevated bulk, demand.
    sent_before: (u64, u64),
}

/// The whole of it.
struct Link {
    setup: Setup,
    scheduler: Scheduler,
    now: Now,
    /// Demand reads, in the order of their answers.
    reads: Vec<Read>,
    /// Bulk wire bytes that have arrived, by volume.
    bulk_bytes: BTreeMap<VolumeKey, u64>,
    events: BTreeMap<(Now, u64), Event>,
    sequence: u64,
    outgoing: [VecDeque<Outgoing>; 3],
    on_the_wire: Option<(Outgoing, Class)>,
    let_out: (u64, u64),
    /// When each demand read began, and what stood in its way once it is through.
    reading: HashMap<WaiterId, Now>,
    overtaken: HashMap<FlightId, (u64, u64)>,
    bulk_wants: BTreeMap<VolumeKey, usize>,
    next_block: u64,
    ticks: u64,
}

impl Link {
    fn new(setup: Setup) -> Link {
        let mut scheduler = Scheduler::new(setup.limits);
        for volume in 0..setup.volumes {
            scheduler.add_volume(VolumeKey(volume), PEER);
        }
        scheduler.peer_up(Now::ZERO, PEER);
        Link {
            setup,
            scheduler,
            now: Now::ZERO,
            reads: Vec::new(),
            bulk_bytes: BTreeMap::new(),
            events: BTreeMap::new(),
            sequence: 0,
            outgoing: Default::default(),
            on_the_wire: None,
            let_out: (0, 0),
            reading: HashMap::new(),
            overtaken: HashMap::new(),
            bulk_wants: BTreeMap::new(),
            next_block: 0,
            ticks: 0,
        }
    }

    /// All bulk wire bytes that have arrived.
    fn bulk_total(&self) -> u64 {
        self.bulk_bytes.values().sum()
    }

    /// All demand wire bytes that have arrived.
    fn demand_total(&self) -> u64 {
        self.reads.len() as u64 * self.setup.wire_bytes
    }

    /// What the link can carry in `time`, in bytes.
    fn capacity(&self, time: Duration) -> f64 {
        self.setup.bytes_per_s as f64 * time.as_secs_f64()
    }

    /// The time that `bytes` take on the wire.
    fn time_of(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.setup.bytes_per_s as f64)
    }

    /// How often the driver had to be woken for time alone.
    fn ticks(&self) -> u64 {
        self.ticks
    }

    /// Lets the world go on for `time`.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.ask();
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let deadline = self.scheduler.deadline();
            let Some(next) = event.into_iter().chain(deadline).min().filter(|next| *next <= end) else { break };
            assert!(next >= self.now, "time does not run backwards");
            self.now = next;
            if event == Some(next) {
                let Some((_, event)) = self.events.pop_first() else { break };
                self.happen(event);
            } else {
                self.ticks += 1;
                self.scheduler.tick(self.now);
            }
        }
        self.now = end;
    }

    fn ask(&mut self) {
        while self.reading.len() < self.setup.demand_depth {
            let waiter = self.want(VolumeKey(0), Class::Demand);
            self.reading.insert(waiter, self.now);
        }
        for volume in (0..self.setup.volumes).map(VolumeKey) {
            while *self.bulk_wants.entry(volume).or_default() < self.setup.bulk_depth {
                self.bulk_wants.entry(volume).and_modify(|count| *count += 1);
                self.want(volume, Class::Bulk);
            }
        }
        while let Some(action) = self.scheduler.poll_action() {
            let event = match action {
                Action::Send { flight, class, .. } => Event::Asked { flight, class },
                Action::Promote { flight, class, .. } => Event::Promoted { flight, class },
                Action::LookUp { .. } | Action::Forget { .. } => panic!("{action:?}: nobody asked by id or went away"),
            };
            self.after(self.setup.rtt / 2, event);
        }
    }

    fn want(&mut self, volume: VolumeKey, class: Class) -> WaiterId {
        let block = self.next_block;
        self.next_block += 1;
        let (waiter, place) = (WaiterId(block), Place { volume, block: BlockIndex(block) });
        self.scheduler.want(self.now, WantBlock { waiter, place, id: None, class, len_bytes: BLOCK_BYTES });
        waiter
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + delay, self.sequence), event);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Asked { flight, class } => {
                let (left_bytes, sent_before) = (self.setup.wire_bytes, self.let_out);
                let outgoing = Outgoing { flight, left_bytes, is_elevated: false, sent_before };
                self.outgoing[class as usize].push_back(outgoing);
                self.transmit();
            }
            Event::Promoted { flight, class } => {
                if let Some((outgoing, now_as)) = self.on_the_wire.as_mut().filter(|(o, _)| o.flight == flight) {
                    outgoing.is_elevated = true;
                    *now_as = class;
                }
                for queue in 0..3 {
                    if let Some(at) = self.outgoing[queue].iter().position(|o| o.flight == flight)
                        && let Some(mut outgoing) = self.outgoing[queue].remove(at)
                    {
                        outgoing.is_elevated = true;
                        self.outgoing[class as usize].push_back(outgoing);
                    }
                }
            }
            Event::PacketOut => {
                if let Some((mut outgoing, class)) = self.on_the_wire.take() {
                    let packet_bytes = outgoing.left_bytes.min(PACKET_BYTES);
                    outgoing.left_bytes -= packet_bytes;
                    match class {
                        Class::Demand if outgoing.is_elevated => self.let_out.0 += packet_bytes,
                        Class::Demand => self.let_out.1 += packet_bytes,
                        _ => {}
                    }
                    if outgoing.left_bytes > 0 {
                        self.outgoing[class as usize].push_front(outgoing);
                    } else {
                        let (elevated, demand) = outgoing.sent_before;
                        let overtaken = (self.let_out.0 - elevated, self.let_out.1 - demand);
                        self.overtaken.insert(outgoing.flight, overtaken);
                        self.after(self.setup.rtt / 2, Event::Arrived { flight: outgoing.flight });
                    }
                }
                self.transmit();
            }
            Event::Arrived { flight } => {
                let landed = self.scheduler.arrived(self.now, flight, self.setup.wire_bytes).expect("somebody waits");
                let (elevated_bytes, demand_bytes) = self.overtaken.remove(&flight).expect("it was let out");
                for waiter in landed.waiters {
                    if let Some(began) = self.reading.remove(&waiter.id) {
                        self.reads.push(Read { latency: self.now - began, elevated_bytes, demand_bytes });
                    } else {
                        self.bulk_wants.entry(waiter.place.volume).and_modify(|count| *count -= 1);
                        *self.bulk_bytes.entry(waiter.place.volume).or_default() += self.setup.wire_bytes;
                    }
                }
            }
        }
    }

    fn transmit(&mut self) {
        if self.on_the_wire.is_some() {
            return;
        }
        for class in Class::ALL {
            if let Some(outgoing) = self.outgoing[class as usize].pop_front() {
                let packet_time = self.time_of(outgoing.left_bytes.min(PACKET_BYTES));
                self.on_the_wire = Some((outgoing, class));
                self.after(packet_time, Event::PacketOut);
                return;
            }
        }
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Guests that would take the whole link, and bulk beside them.
const BUSY: Setup = Setup {
    bytes_per_s: 12_500_000,
    rtt: Duration::from_millis(40),
    wire_bytes: 65536,
    limits: Limits { demand_flights: 256, readahead_flights: 128, bulk_window_bytes: 1 << 20, bulk_min_share: 0.1 },
    demand_depth: 32,
    bulk_depth: 64,
    volumes: 1,
};

#[test]
fn bulk_keeps_its_share_under_endless_demand() {
    for (wire_bytes, bulk_min_share) in [(65536, 0.1), (20_000, 0.1), (8_000, 0.1), (65536, 0.8)] {
        // The window counts raw bytes: the better they shrink, the more of them fill the same path.
        let bulk_window_bytes = (16 << 20) * 65536 / wire_bytes;
        let limits = Limits { bulk_window_bytes, bulk_min_share, demand_flights: 2000, ..BUSY.limits };
        let demand_depth = 2_000_000 / wire_bytes as usize;
        let mut link = Link::new(Setup { wire_bytes, demand_depth, bulk_depth: 1000, limits, ..BUSY });
        link.run(secs(10));
        let (bulk, demand) = (link.bulk_total() as f64, link.demand_total() as f64);
        let share = bulk / (bulk + demand);
        let wanted = bulk_min_share * 0.95..bulk_min_share * 1.15;
        assert!(wanted.contains(&share), "a share of {share} at {wire_bytes} wire bytes a block");
        assert!(bulk + demand > 0.97 * link.capacity(secs(10)), "the link is full");
    }
}

#[test]
fn bulk_takes_everything_when_guests_are_idle() {
    let mut link = Link::new(Setup { demand_depth: 0, ..BUSY });
    link.run(secs(10));
    assert!(link.bulk_total() as f64 > 0.98 * link.capacity(secs(10)), "{}", link.bulk_total());
}

/// The first reads, while the scheduler learns how far blocks shrink, and wrongly expects them to shrink by half.
const LEARNING: usize = 200;

/// A read waits for its own bytes, for those of demand before it, for bulk's tenth of them, and for `blocks` of bulk.
fn assert_little_overtakes(link: &Link, reads: &[Read], blocks: u64) {
    assert!(reads.len() > 100);
    for read in reads {
        let share_bytes = read.demand_bytes / 9;
        assert!(read.elevated_bytes <= share_bytes + blocks * link.setup.wire_bytes, "{read:?}");
        let sent_bytes = read.demand_bytes + read.elevated_bytes;
        // A packet may be on the wire already.
        let bound = link.setup.rtt + link.time_of(sent_bytes + 2 * 4096);
        assert!(read.latency <= bound, "{read:?} took more than {bound:?}");
    }
}

#[test]
fn one_block_of_elevated_bulk_may_stand_in_a_read_s_way() {
    // So short a round trip that a single reader fills the link.
    let mut link = Link::new(Setup { rtt: Duration::from_micros(200), demand_depth: 1, ..BUSY });
    link.run(secs(10));
    assert_little_overtakes(&link, &link.reads[LEARNING..], 1);
    let block_time = link.time_of(65536);
    let worst = link.reads[LEARNING..].iter().map(|read| read.latency).max().unwrap_or_default();
    assert!(worst <= link.setup.rtt + 2 * block_time + link.time_of(2 * 4096), "{worst:?}");
    assert!(link.reads.iter().any(|read| read.elevated_bytes > 0), "bulk was elevated at all");

    let mut link = Link::new(BUSY);
    link.run(secs(10));
    assert_little_overtakes(&link, &link.reads[LEARNING..], 1);
}

#[test]
fn a_claim_from_the_past_does_not_come_in_one_burst() {
    // Bulk was paused while guests had the link, or had hardly anything to ask for.
    for (is_paused, bulk_depth) in [(true, 64), (false, 1)] {
        let mut link = Link::new(Setup { bulk_depth, ..BUSY });
        link.scheduler.set_paused(Now::ZERO, VolumeKey(0), is_paused);
        link.run(secs(5));
        let (reads_before, bulk_before) = (link.reads.len(), link.bulk_total());
        link.scheduler.set_paused(link.now, VolumeKey(0), false);
        link.setup.bulk_depth = 64;
        link.run(secs(5));
        // The claim itself and the block that bulk may be ahead by.
        assert_little_overtakes(&link, &link.reads[reads_before..], 2);
        let bulk = (link.bulk_total() - bulk_before) as f64;
        assert!(bulk > 0.09 * link.capacity(secs(5)), "{bulk}");
    }
}

#[test]
fn a_rate_limit_is_held() {
    for (wire_bytes, rate, demand_depth) in
        [(65536, 4_000_000, 0), (20_000, 1_000_000, 0), (30_000, 100_000, 0), (65536, 500_000, 16)]
    {
        let mut link = Link::new(Setup { wire_bytes, demand_depth, ..BUSY });
        link.scheduler.set_rate(Now::ZERO, VolumeKey(0), Some(rate));
        link.run(secs(10));
        let wanted = rate as f64 * 10.0;
        let error = link.bulk_total() as f64 / wanted - 1.0;
        assert!(error.abs() < 0.05, "{error} off {rate} bytes/s with {wire_bytes} a block");
        let blocks = link.bulk_total() / wire_bytes;
        assert!(link.ticks() <= 3 * blocks + 100, "{} wake-ups for {blocks} blocks", link.ticks());
    }
}

#[test]
fn a_limit_for_the_whole_site_is_held_by_all_volumes_together() {
    for (rate, of_one) in [(3_000_000, None), (500_000, None), (3_000_000, Some(500_000))] {
        let mut link = Link::new(Setup { demand_depth: 2, volumes: 3, ..BUSY });
        link.scheduler.set_site_rate(Now::ZERO, Some(rate));
        link.scheduler.set_rate(Now::ZERO, VolumeKey(1), of_one);
        link.run(secs(10));
        let error = link.bulk_total() as f64 / (rate as f64 * 10.0) - 1.0;
        assert!(error.abs() < 0.05, "{error} off {rate} bytes/s");
        for (volume, bytes) in &link.bulk_bytes {
            let share = match of_one {
                None => rate / 3,
                Some(own) if volume.0 == 1 => own,
                Some(own) => (rate - own) / 2,
            };
            let error = *bytes as f64 / (share as f64 * 10.0) - 1.0;
            assert!(error.abs() < 0.1, "{volume:?} is {error} off its {share} bytes/s");
        }
        let blocks = link.bulk_total() / 65536;
        assert!(link.ticks() <= 3 * blocks + 100, "{} wake-ups for {blocks} blocks", link.ticks());
    }
}

#[test]
fn a_window_of_one_block_always_makes_progress() {
    for bulk_window_bytes in [0, 1, 65536] {
        let limits = Limits { bulk_window_bytes, ..BUSY.limits };
        let mut link = Link::new(Setup { limits, demand_depth: 0, ..BUSY });
        link.run(secs(10));
        let round_trip = link.setup.rtt + link.time_of(65536);
        let possible = 10.0 / round_trip.as_secs_f64();
        assert!(link.bulk_total() as f64 / 65536.0 > possible - 2.0);
        // And beside demand, where each block stands in line with all that the guests have asked before it.
        let mut link = Link::new(Setup { limits, ..BUSY });
        link.run(secs(10));
        let possible = 10.0 / (round_trip + link.time_of(32 * 65536)).as_secs_f64();
        assert!(link.bulk_total() as f64 / 65536.0 > possible - 2.0, "{}", link.bulk_total());
    }
}

#[test]
fn volumes_take_turns() {
    let mut link = Link::new(Setup { volumes: 3, demand_depth: 0, ..BUSY });
    link.run(secs(5));
    let most = link.bulk_bytes.values().max().copied().unwrap_or_default();
    let least = link.bulk_bytes.values().min().copied().unwrap_or_default();
    // The first volume fills the window before the others have asked for anything.
    assert!(most - least <= link.setup.limits.bulk_window_bytes + 2 * 65536, "{:?}", link.bulk_bytes);
    assert_eq!(link.bulk_bytes.len(), 3);
}
