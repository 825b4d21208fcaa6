//! One direction of the emulated WAN: a bottleneck with a tail-drop queue, then a path with delay, jitter and loss.
//!
//! Pure: time is a `Duration` since an epoch of the caller's choosing, randomness comes from a seeded generator,
//! packets are lengths. Must not know: sockets, clocks, threads, addresses.
//!
//! ```text
//! offer -> [cut?] -> [mtu?] -> queue -> serialisation at the rate -> [lost?] -> delay +- jitter -> depart -> [cut?]
//! ```

use std::time::Duration;

use crate::rng::Rng;
use crate::stats::DirectionStats;
use crate::units::{Probability, Rate};

mod jitter;
#[cfg(test)]
mod tests;

use jitter::Jitter;

/// What IPv4 and UDP headers add to a datagram's payload on the wire, in bytes.
pub const HEADER_BYTES: u64 = 28;

/// How much may wait in front of the bottleneck before a packet is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Wire bytes, the packet on the wire included.
    Bytes(u64),
    /// The longest time that a packet may wait until its first bit is sent.
    Time(Duration),
}

/// What one direction is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkOptions {
    /// The bottleneck, applied to payload + [`HEADER_BYTES`]; `None`: as fast as the machine.
    pub rate: Option<Rate>,
    /// One-way propagation delay.
    pub delay: Duration,
    /// The delay varies by as much as this, both ways (never below zero).
    pub jitter: Duration,
    /// Share of the packets that are lost behind the bottleneck: they used the wire.
    pub loss: Probability,
    /// The queue before the bottleneck.
    pub queue: Queue,
    /// Whether jitter is drawn for each packet alone, so that packets overtake each other.
    pub reorder: bool,
    /// Packets of more wire bytes than this are dropped; `None`: any datagram passes.
    pub mtu: Option<u64>,
}

impl Default for LinkOptions {
    /// No rate, no delay, no loss, and a queue of 100 ms (which matters once a rate is set).
    fn default() -> LinkOptions {
        LinkOptions {
            rate: None,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: Probability::default(),
            queue: Queue::Time(Duration::from_millis(100)),
            reorder: false,
            mtu: None,
        }
    }
}

impl LinkOptions {
    /// The same link with half of this round-trip time as its one-way delay.
    pub fn with_rtt(self, rtt: Duration) -> LinkOptions {
        LinkOptions { delay: rtt / 2, ..self }
    }
}

/// A change at run time: what is `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkChange {
    /// The new rate; `Some(None)` lifts the limit.
    pub rate: Option<Option<Rate>>,
    /// The new one-way delay.
    pub delay: Option<Duration>,
    /// The new jitter.
    pub jitter: Option<Duration>,
    /// The new loss.
    pub loss: Option<Probability>,
    /// The new queue limit.
    pub queue: Option<Queue>,
}

impl LinkChange {
    /// The options after this change.
    pub fn applied_to(self, old: LinkOptions) -> LinkOptions {
        LinkOptions {
            rate: self.rate.unwrap_or(old.rate),
            delay: self.delay.unwrap_or(old.delay),
            jitter: self.jitter.unwrap_or(old.jitter),
            loss: self.loss.unwrap_or(old.loss),
            queue: self.queue.unwrap_or(old.queue),
            ..old
        }
    }
}

/// Why a packet went no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// The queue before the bottleneck was full.
    Queue,
    /// Random loss behind the bottleneck.
    Loss,
    /// The link is cut.
    Cut,
    /// Larger than the path's MTU.
    Mtu,
}

/// What becomes of an offered packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is gone.
    Drop(DropReason),
    /// It leaves at this time; ask [`Link::depart`] then.
    Deliver {
        /// Since the caller's epoch, never before the offer.
        at: Duration,
    },
}

/// One direction of the WAN.
#[derive(Debug)]
pub struct Link {
    options: LinkOptions,
    rng: Rng,
    jitter: Jitter,
    cut: bool,
    /// When the bottleneck has sent everything that it accepted.
    free_at: Duration,
    /// The last delivery time given out: nothing leaves before it unless reordering is asked for.
    last_at: Duration,
    stats: DirectionStats,
}

impl Link {
    /// An idle link.
    pub fn new(options: LinkOptions, rng: Rng) -> Link {
        Link {
            options,
            rng,
            jitter: Jitter::default(),
            cut: false,
            free_at: Duration::ZERO,
            last_at: Duration::ZERO,
            stats: DirectionStats::default(),
        }
    }

    /// Offers a datagram of `payload` bytes at `now`. Calls must come in the order of time.
    pub fn offer(&mut self, now: Duration, payload: usize) -> Decision {
        let wire = payload as u64 + HEADER_BYTES;
        self.stats.offered_packets += 1;
        if self.cut {
            return self.dropped(DropReason::Cut);
        }
        if self.options.mtu.is_some_and(|mtu| wire > mtu) {
            return self.dropped(DropReason::Mtu);
        }
        let wait = self.free_at.saturating_sub(now);
        if self.is_full(wait, wire) {
            return self.dropped(DropReason::Queue);
        }
        self.free_at = now.max(self.free_at) + self.options.rate.map_or(Duration::ZERO, |rate| rate.time_for(wire));
        self.stats.packets += 1;
        self.stats.payload_bytes += payload as u64;
        self.stats.wire_bytes += wire;
        self.stats.max_queue_delay_ms = self.stats.max_queue_delay_ms.max(wait.as_secs_f64() * 1e3);
        if self.options.loss.get() > 0.0 && self.rng.unit() < self.options.loss.get() {
            return self.dropped(DropReason::Loss);
        }
        Decision::Deliver { at: self.arrival() }
    }

    /// Says at its delivery time whether a packet may leave: not if the link is cut then. Once a packet, followed by
    /// [`Link::delivered`] or [`Link::lost_by_relay`] when true.
    #[must_use]
    pub fn depart(&mut self) -> bool {
        if self.cut {
            self.stats.dropped_cut += 1;
        }
        !self.cut
    }

    /// So many packets that [`Link::depart`] let go were handed over.
    pub fn delivered(&mut self, packets: usize) {
        self.stats.delivered_packets += packets as u64;
    }

    /// The driver could not keep or send a packet that was promised delivery.
    pub fn lost_by_relay(&mut self) {
        self.stats.dropped_relay += 1;
    }

    /// Cuts the link: what is offered from now on is lost, and so is what is due while the cut lasts.
    pub fn cut(&mut self) {
        self.cut = true;
    }

    /// Mends the link.
    pub fn mend(&mut self) {
        self.cut = false;
    }

    /// Whether the link is cut.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Changes the link's nature. The bytes that wait before the bottleneck stay and take their time at the new rate;
    /// delivery times that were given out stay as they are.
    pub fn change(&mut self, now: Duration, change: LinkChange) {
        let new = change.applied_to(self.options);
        if new.rate != self.options.rate {
            let waiting = self.waiting_bytes(now);
            self.free_at = now + new.rate.map_or(Duration::ZERO, |rate| rate.time_for(waiting));
        }
        self.options = new;
    }

    /// What the link is like now.
    pub fn options(&self) -> LinkOptions {
        self.options
    }

    /// The counters, with the queue as it is at `now`.
    pub fn stats(&self, now: Duration) -> DirectionStats {
        DirectionStats { queue_bytes: self.waiting_bytes(now), cut: self.cut, ..self.stats }
    }

    /// Sets every counter to zero; packets on the way count as delivered when they leave.
    pub fn reset_stats(&mut self) {
        self.stats = DirectionStats::default();
    }

    /// An idle bottleneck takes any packet: a queue shorter than one packet is a link without a queue, not a cut.
    fn is_full(&self, wait: Duration, wire: u64) -> bool {
        let Some(rate) = self.options.rate else { return false };
        !wait.is_zero()
            && match self.options.queue {
                Queue::Bytes(limit) => rate.bytes_in(wait) + wire > limit,
                Queue::Time(limit) => wait > limit,
            }
    }

    fn waiting_bytes(&self, now: Duration) -> u64 {
        self.options.rate.map_or(0, |rate| rate.bytes_in(self.free_at.saturating_sub(now)))
    }

    fn arrival(&mut self) -> Duration {
        let LinkOptions { delay, jitter, reorder, .. } = self.options;
        let sent = self.free_at;
        if reorder {
            return sent + shifted(delay, jitter, self.rng.signed_unit());
        }
        let shift = self.jitter.at(sent, jitter, &mut self.rng);
        // A delay, jitter or rate that shrank at run time must not let packets overtake.
        self.last_at = self.last_at.max(sent + shifted(delay, jitter, shift));
        self.last_at
    }

    fn dropped(&mut self, reason: DropReason) -> Decision {
        match reason {
            DropReason::Queue => self.stats.dropped_queue += 1,
            DropReason::Loss => self.stats.dropped_loss += 1,
            DropReason::Cut => self.stats.dropped_cut += 1,
            DropReason::Mtu => self.stats.dropped_mtu += 1,
        }
        Decision::Drop(reason)
    }
}

/// `delay + shift * jitter`, not below zero.
fn shifted(delay: Duration, jitter: Duration, shift: f64) -> Duration {
    let by = jitter.mul_f64(shift.abs().min(1.0));
    if shift < 0.0 { delay.saturating_sub(by) } else { delay + by }
}
