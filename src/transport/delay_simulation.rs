//! A network in virtual time for the tests of the congestion control: senders with quinn's window, pacing and loss detection rules share one
//! bottleneck with a drop-tail queue, random loss and jitter; bulk is greedy, demand replies of 64 KiB come at intervals and
//! overtake bulk in the sender. No sockets, no clocks: a seed fixes a run.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use super::delay_control::DelayControl;

/// QUIC payload and what it occupies on the wire (IPv4, UDP).
pub(super) const PACKET: u64 = 1452;
const WIRE_PACKET: u64 = PACKET + 28;
/// Payload of a stream frame in such a packet.
const STREAM_BYTES: u64 = 1420;
const DEMAND_PACKETS: u32 = (64 * 1024_u64).div_ceil(STREAM_BYTES) as u32;
/// What the endpoint asks of its peer: an acknowledgement for every eighth packet or after 3 ms.
const ACK_EVERY: u32 = 8;
const ACK_DELAY_NS: u64 = 3_000_000;
const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;

/// What a sender asks its congestion control.
pub(super) trait Control {
    fn ack(&mut self, now: u64, sent: u64, bytes: u64, idle: bool);
    fn acks_end(&mut self, now: u64);
    fn loss(&mut self, now: u64, sent: u64, bytes: u64, outage: bool);
    fn window(&self) -> u64;
}

impl Control for DelayControl {
    fn ack(&mut self, now: u64, sent: u64, bytes: u64, idle: bool) {
        self.on_ack(Duration::from_nanos(now), Duration::from_nanos(sent), bytes, idle);
    }
    fn acks_end(&mut self, now: u64) {
        self.on_acks_end(Duration::from_nanos(now));
    }
    fn loss(&mut self, now: u64, sent: u64, bytes: u64, outage: bool) {
        self.on_loss(Duration::from_nanos(now), Duration::from_nanos(sent), bytes, outage);
    }
    fn window(&self) -> u64 {
        DelayControl::window(self)
    }
}

/// The textbook loss-based competitor: CUBIC's window (RFC 9438) without its TCP-friendly region.
pub(super) struct Cubic {
    window: f64,
    slow_start: bool,
    max: f64,
    epoch: u64,
    recovery: u64,
}

impl Cubic {
    pub(super) fn new() -> Cubic {
        Cubic { window: 10.0 * PACKET as f64, slow_start: true, max: 0.0, epoch: 0, recovery: 0 }
    }
}

impl Control for Cubic {
    fn ack(&mut self, now: u64, _sent: u64, bytes: u64, _idle: bool) {
        if self.slow_start {
            self.window += bytes as f64;
        } else {
            let packets = self.max / PACKET as f64;
            let k = (packets * 0.3 / 0.4).cbrt();
            let t = (now - self.epoch) as f64 / SECOND as f64;
            let goal = (0.4 * (t - k).powi(3) + packets) * PACKET as f64;
            self.window += ((goal - self.window) * bytes as f64 / self.window).clamp(0.0, bytes as f64 / 2.0);
        }
    }
    fn acks_end(&mut self, _now: u64) {}
    fn loss(&mut self, now: u64, sent: u64, _bytes: u64, _outage: bool) {
        if sent <= self.recovery {
            return;
        }
        self.max = self.window;
        self.window = (self.window * 0.7).max(4.0 * PACKET as f64);
        (self.slow_start, self.epoch, self.recovery) = (false, now, now);
    }
    fn window(&self) -> u64 {
        self.window as u64
    }
}

/// A small, fixed generator (SplitMix64).
struct Dice(u64);

impl Dice {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The path. Changes happen at the given times, in order.
#[derive(Clone)]
pub(super) struct Path {
    bits_per_second: f64,
    rtt_ns: u64,
    queue_ns: u64,
    loss: f64,
    jitter_ns: u64,
    changes: Vec<(u64, f64, u64)>,
}

impl Path {
    pub(super) fn new(mbit_per_second: u64, rtt_ms: u64, queue_ms: u64) -> Path {
        Path {
            bits_per_second: mbit_per_second as f64 * 1e6,
            rtt_ns: rtt_ms * MS,
            queue_ns: queue_ms * MS,
            loss: 0.0,
            jitter_ns: 0,
            changes: Vec::new(),
        }
    }
    pub(super) fn loss(mut self, loss: f64) -> Path {
        self.loss = loss;
        self
    }
    pub(super) fn jitter_ms(mut self, jitter_ms: u64) -> Path {
        self.jitter_ns = jitter_ms * MS;
        self
    }
    /// From second `at` on: another rate, another round-trip time.
    pub(super) fn then(mut self, at: u64, mbit_per_second: u64, rtt_ms: u64) -> Path {
        self.changes.push((at * SECOND, mbit_per_second as f64 * 1e6, rtt_ms * MS));
        self
    }
    fn packet_ns(&self) -> u64 {
        (WIRE_PACKET as f64 * 8e9 / self.bits_per_second) as u64
    }
}

/// What happens next: a packet reaches the receiver; the receiver's patience with its acknowledgement ends; one reaches the
/// sender; the sender may send again, or must look for losses; a demand request, made half a round trip ago, reaches it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Event {
    Arrive { flow: usize, number: u64 },
    AckTimer { flow: usize, generation: u64 },
    Ack { flow: usize, index: usize },
    Wake { flow: usize },
    LossTimer { flow: usize },
    Demand,
}

/// A packet on its way: when it was sent, and the demand reply that it belongs to.
#[derive(Clone, Copy)]
struct Sent {
    at: u64,
    demand: Option<u32>,
}

pub(super) struct Flow {
    control: Box<dyn Control>,
    next: u64,
    in_flight: u64,
    unacked: BTreeMap<u64, Sent>,
    demand: VecDeque<u32>,
    largest_acked: u64,
    tokens: f64,
    tokens_at: u64,
    srtt: f64,
    rttvar: f64,
    wake_at: u64,
    last_ack_at: u64,
    // The receiver's side.
    received: Vec<u64>,
    since_ack: u32,
    next_expected: u64,
    ack_generation: u64,
    acks: Vec<Vec<u64>>,
    delivered_bytes: Vec<(u64, u64)>,
    pub(super) lost: u64,
}

impl Flow {
    fn new(control: Box<dyn Control>) -> Flow {
        Flow {
            control,
            next: 1,
            in_flight: 0,
            unacked: BTreeMap::new(),
            demand: VecDeque::new(),
            largest_acked: 0,
            tokens: 10.0 * PACKET as f64,
            tokens_at: 0,
            srtt: 100e6,
            rttvar: 50e6,
            wake_at: 0,
            last_ack_at: 0,
            received: Vec::new(),
            since_ack: 0,
            next_expected: 1,
            ack_generation: 0,
            acks: Vec::new(),
            delivered_bytes: Vec::new(),
            lost: 0,
        }
    }

    /// When quinn's pacer lets the next packet go (`pacing.rs` of quinn-proto 0.11).
    fn paced_until(&mut self, now: u64) -> Option<u64> {
        let window = self.control.window() as f64;
        let capacity = (window * 2e6 / self.srtt).clamp(10.0 * PACKET as f64, 256.0 * PACKET as f64);
        self.tokens = self.tokens.min(capacity);
        if self.tokens >= PACKET as f64 {
            return None;
        }
        self.tokens = (self.tokens + window * 1.25 * (now - self.tokens_at) as f64 / self.srtt).min(capacity);
        self.tokens_at = now;
        if self.tokens >= PACKET as f64 {
            return None;
        }
        Some(now + (self.srtt * (capacity - self.tokens) / window / 1.25) as u64 + 1)
    }
}

pub(super) struct Simulation {
    now: u64,
    path: Path,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    order: u64,
    pub(super) flows: Vec<Flow>,
    dice: Dice,
    link_free_at: u64,
    last_arrival: u64,
    /// Demand replies: packets still missing, when asked.
    replies: Vec<(u32, u64)>,
    reply_ns: Vec<(u64, u64)>,
    demand_every_ns: u64,
    /// The queue's delay as every packet met it: (time, delay).
    queue_ns: Vec<(u64, u64)>,
}

impl Simulation {
    pub(super) fn run(path: Path, controls: Vec<Box<dyn Control>>, seed: u64, seconds: u64) -> Simulation {
        let mut simulation = Simulation {
            now: 0,
            path,
            events: BinaryHeap::new(),
            order: 0,
            flows: controls.into_iter().map(Flow::new).collect(),
            dice: Dice(seed),
            link_free_at: 0,
            last_arrival: 0,
            replies: Vec::new(),
            reply_ns: Vec::new(),
            demand_every_ns: 97 * MS,
            queue_ns: Vec::new(),
        };
        for flow in 0..simulation.flows.len() {
            // Later flows join later.
            simulation.at(flow as u64 * 3 * SECOND, Event::Wake { flow });
        }
        simulation.at(SECOND / 2, Event::Demand);
        while let Some(Reverse((at, _, event))) = simulation.events.pop() {
            if at > seconds * SECOND {
                break;
            }
            simulation.now = at;
            if let Some((_, rate, rtt)) = simulation.path.changes.first().filter(|change| change.0 <= at).copied() {
                (simulation.path.bits_per_second, simulation.path.rtt_ns) = (rate, rtt);
                simulation.path.changes.remove(0);
            }
            simulation.handle(event);
        }
        simulation
    }

    fn at(&mut self, at: u64, event: Event) {
        self.order += 1;
        self.events.push(Reverse((at, self.order, event)));
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Wake { flow } => self.send(flow),
            Event::Arrive { flow, number } => self.arrive(flow, number),
            Event::AckTimer { flow, generation } if self.flows[flow].ack_generation == generation => {
                self.send_ack(flow)
            }
            Event::AckTimer { .. } => {}
            Event::Ack { flow, index } => self.acked(flow, index),
            Event::LossTimer { flow } => self.detect_loss(flow),
            Event::Demand => {
                let reply = self.replies.len() as u32;
                self.replies.push((DEMAND_PACKETS, self.now - self.path.rtt_ns / 2));
                self.flows[0].demand.extend((0..DEMAND_PACKETS).map(|_| reply));
                self.at(self.now + self.demand_every_ns, Event::Demand);
                self.send(0);
            }
        }
    }

    fn send(&mut self, flow: usize) {
        loop {
            let sender = &mut self.flows[flow];
            if sender.in_flight + PACKET >= sender.control.window() {
                return;
            }
            if let Some(until) = sender.paced_until(self.now) {
                if sender.wake_at != until {
                    sender.wake_at = until;
                    self.at(until, Event::Wake { flow });
                }
                return;
            }
            sender.tokens -= PACKET as f64;
            let number = sender.next;
            sender.next += 1;
            sender.in_flight += PACKET;
            let demand = sender.demand.pop_front();
            sender.unacked.insert(number, Sent { at: self.now, demand });
            self.transmit(flow, number);
        }
    }

    fn transmit(&mut self, flow: usize, number: u64) {
        let waits = self.link_free_at.saturating_sub(self.now);
        self.queue_ns.push((self.now, waits));
        if waits > self.path.queue_ns {
            return;
        }
        self.link_free_at = self.now + waits + self.path.packet_ns();
        if self.dice.unit() < self.path.loss {
            return;
        }
        let jitter = (self.dice.unit() * self.path.jitter_ns as f64) as u64;
        // Jitter without reordering: what overtakes nothing is what routers do.
        self.last_arrival = self.last_arrival.max(self.link_free_at + self.path.rtt_ns / 2 + jitter);
        self.at(self.last_arrival, Event::Arrive { flow, number });
    }

    fn arrive(&mut self, flow: usize, number: u64) {
        let receiver = &mut self.flows[flow];
        receiver.received.push(number);
        receiver.since_ack += 1;
        receiver.delivered_bytes.push((self.now, WIRE_PACKET));
        let gap = number != receiver.next_expected;
        receiver.next_expected = receiver.next_expected.max(number + 1);
        if let Some(reply) = receiver.unacked.get(&number).and_then(|sent| sent.demand) {
            let (missing, asked) = &mut self.replies[reply as usize];
            *missing -= 1;
            if *missing == 0 {
                self.reply_ns.push((self.now, self.now - *asked));
            }
        }
        if self.flows[flow].since_ack >= ACK_EVERY || gap {
            self.send_ack(flow);
        } else if self.flows[flow].since_ack == 1 {
            let generation = self.flows[flow].ack_generation;
            self.at(self.now + ACK_DELAY_NS, Event::AckTimer { flow, generation });
        }
    }

    fn send_ack(&mut self, flow: usize) {
        let receiver = &mut self.flows[flow];
        receiver.since_ack = 0;
        receiver.ack_generation += 1;
        let numbers = std::mem::take(&mut receiver.received);
        receiver.acks.push(numbers);
        let index = receiver.acks.len() - 1;
        self.at(self.now + self.path.rtt_ns / 2, Event::Ack { flow, index });
    }

    fn acked(&mut self, flow: usize, index: usize) {
        let now = self.now;
        let sender = &mut self.flows[flow];
        sender.last_ack_at = now;
        let numbers = std::mem::take(&mut sender.acks[index]);
        let mut newest = None;
        for number in numbers {
            let Some(sent) = sender.unacked.remove(&number) else { continue };
            sender.in_flight -= PACKET;
            sender.control.ack(now, sent.at, PACKET, false);
            if number > sender.largest_acked {
                sender.largest_acked = number;
                newest = Some(sent.at);
            }
        }
        sender.control.acks_end(now);
        if let Some(sent) = newest {
            let rtt = (now - sent) as f64;
            sender.rttvar = 0.75 * sender.rttvar + 0.25 * (sender.srtt - rtt).abs();
            sender.srtt = if sender.srtt == 100e6 { rtt } else { 0.875 * sender.srtt + 0.125 * rtt };
        }
        self.detect_loss(flow);
        self.send(flow);
    }

    /// Packet threshold 3, time threshold 9/8, and a probe timeout that stands for persistent congestion.
    fn detect_loss(&mut self, flow: usize) {
        let now = self.now;
        let sender = &mut self.flows[flow];
        let too_old = (sender.srtt * 9.0 / 8.0) as u64;
        let silence = (3.0 * (sender.srtt + 4.0 * sender.rttvar)) as u64 + ACK_DELAY_NS;
        let outage = !sender.unacked.is_empty() && now.saturating_sub(sender.last_ack_at) > silence;
        let lost: Vec<u64> = sender
            .unacked
            .iter()
            .take_while(|(number, _)| outage || **number < sender.largest_acked)
            .filter(|(number, sent)| {
                outage || **number + 3 <= sender.largest_acked || now.saturating_sub(sent.at) >= too_old
            })
            .map(|(number, _)| *number)
            .collect();
        let mut newest_sent = 0;
        for number in &lost {
            if let Some(sent) = sender.unacked.remove(number) {
                newest_sent = sent.at;
                sender.in_flight -= PACKET;
                if let Some(reply) = sent.demand {
                    sender.demand.push_front(reply);
                }
            }
        }
        if !lost.is_empty() {
            sender.lost += lost.len() as u64;
            sender.control.loss(now, newest_sent, lost.len() as u64 * PACKET, outage);
            sender.last_ack_at = now;
            self.at(now + silence, Event::LossTimer { flow });
            self.send(flow);
        }
    }

    /// The part of the bottleneck that `flow` used between two seconds.
    pub(super) fn share(&self, flow: usize, from: u64, to: u64) -> f64 {
        let bytes: u64 = self.flows[flow]
            .delivered_bytes
            .iter()
            .filter(|(at, _)| (from * SECOND..to * SECOND).contains(at))
            .map(|(_, bytes)| bytes)
            .sum();
        bytes as f64 * 8.0 / (self.path.bits_per_second * (to - from) as f64)
    }

    /// A percentile of the demand replies' times in ms, from second `from` on.
    pub(super) fn reply_ms(&self, percent: usize, from: u64) -> f64 {
        percentile(self.reply_ns.iter().filter(|(at, _)| *at >= from * SECOND).map(|(_, ns)| *ns), percent)
    }

    /// A percentile of the queue in ms.
    pub(super) fn queue_ms(&self, percent: usize, from: u64) -> f64 {
        percentile(self.queue_ns.iter().filter(|(at, _)| *at >= from * SECOND).map(|(_, ns)| *ns), percent)
    }
}

fn percentile(values: impl Iterator<Item = u64>, percent: usize) -> f64 {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    assert!(!values.is_empty(), "nothing was measured");
    values[(values.len() - 1) * percent / 100] as f64 / MS as f64
}
