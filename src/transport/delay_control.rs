//! Congestion control that keeps router queues short: decides how many bytes may be in flight from the delays and losses
//! of the packets. Pure: time is a [`Duration`] since the connection's start; must not know quinn, tokio, streams or
//! classes.
//!
//! Why an own one: stream priority orders only what still lies in the sender. A controller that fills the router's queue
//! (Cubic) puts every demand reply behind that queue; quinn's BBR does not pace by its own model. This one aims at a
//! *standing queue* of [`TARGET_QUEUE`]: enough that the link never idles, little enough that demand does not feel it.
//!
//! How, once per round trip ("round"):
//! - The queue is the round's smallest round-trip time minus the base (the minimum of the last ten seconds). Jitter only
//!   adds, so that a round's minimum sees through it.
//! - A window `w` that filled the link at a round-trip time `rtt` means a rate of `w / rtt`, hence the window that would
//!   have left exactly the target is `w * (base + target) / rtt`. `w` is the window *when the packet was sent*, which makes
//!   the correction exact instead of one round late.
//! - Below half the target for two rounds, growth accelerates (a link that became faster is found in a second or two).
//! - When the base has not been seen for [`DRAIN_INTERVAL`], the window dips below the bandwidth-delay product for half a
//!   round, so that an honest base is measured; a path that became longer is learned when the old base leaves the ten
//!   seconds.
//! - Isolated loss is ignored; more than [`HEAVY_LOSS`] of a round's window lowers the window, once per round, and the
//!   target to what that router can hold.
//! - **Beside loss-based flows** (Cubic) the queue stays although this window shrinks. Four rounds of that in succession,
//!   and the controller *competes*: it goes back to the old window and follows CUBIC's curve, times 0.7 on loss, until the
//!   queue empties or [`COMPETE_FOR`] passes. Being meek would not shorten a queue that others fill, only starve the
//!   relocation, demand included.

use std::collections::VecDeque;
use std::time::Duration;

use super::limits::SEND_WINDOW_BYTES;

/// The standing queue aimed at: above the burst of a paced sender (2 ms) and of acknowledgements (1 ms at 100 Mbit/s), and
/// half of the shortest router queue (10 ms) that the laboratory tries.
pub(super) const TARGET_QUEUE: Duration = Duration::from_millis(5);
/// The target never falls below this, however short the router's queue.
const MIN_TARGET_QUEUE: Duration = Duration::from_millis(1);
/// How long a smallest round-trip time counts as the base.
const BASE_MEMORY: Duration = Duration::from_secs(10);
/// A base that grew by this factor is another path's.
const LONGER_PATH: u32 = 3;
/// The base is a minimum over this many buckets of [`BASE_MEMORY`].
const BASE_BUCKETS: u32 = 10;
/// The window dips when the base has not been seen for so long; half of [`BASE_MEMORY`], so that two dips fall into it.
const DRAIN_INTERVAL: Duration = Duration::from_secs(5);
/// The window during a dip, in parts of the bandwidth-delay product.
const DRAIN_GAIN: f64 = 0.9;
/// More than this part of a window lost in one round is congestion, less is the noise of the line.
const HEAVY_LOSS: f64 = 0.02;
/// So many packets of a round may be lost however small the window.
const LOSS_GRACE_PACKETS: u64 = 3;
/// The factor after heavy loss: Cubic's.
const LOSS_DECREASE: f64 = 0.7;
/// The factor after a congestion mark: marks come earlier than drops (RFC 8511 section 3 takes 0.85 for Cubic).
const MARK_DECREASE: f64 = 0.85;
/// After heavy loss growth does not accelerate for so many rounds, and for so long at least: a router with hardly any
/// queue would lose packets again and again.
const CAUTIOUS_ROUNDS: u32 = 16;
const CAUTIOUS_FOR: Duration = Duration::from_secs(2);
/// The fastest growth outside slow start, as a part of the window per round ...
const MAX_GROWTH: f64 = 0.25;
/// ... and so that what the round overshoots, before its echo arrives, queues no longer than this.
const MAX_OVERSHOOT: Duration = Duration::from_millis(12);
/// CUBIC's growth constant C, in packets per second cubed (RFC 9438 section 5.1).
const CUBIC_GROWTH: f64 = 0.4;
/// Added to the window every round, so that flows that share a queue drift towards equal shares of the link.
const SHARE_PACKETS: u64 = 4;
/// So many rounds in succession the queue must outlast a shrinking window before it counts as somebody else's.
const FOREIGN_ROUNDS: u32 = 4;
/// The longest that the controller competes before it tries the gentle way again.
const COMPETE_FOR: Duration = Duration::from_secs(20);
/// Samples that one look at the queue in slow start takes together (HyStart++, RFC 9406, takes 8).
const SLOW_START_SAMPLES: u32 = 10;
/// The smallest window in packets: fewer cannot detect a loss by later packets.
const MIN_WINDOW_PACKETS: u64 = 4;
/// The largest window: more than the send window never is in flight.
const MAX_WINDOW_BYTES: u64 = SEND_WINDOW_BYTES as u64;
/// The first window in packets. RFC 6928 allows 10 of TCP; the packets are paced here, and the first demand reply of 64 KiB
/// then takes one round trip, not three.
const INITIAL_WINDOW_PACKETS: u64 = 64;

/// The state machine. Feed it every acknowledgement and loss; [`DelayControl::window`] is the answer.
#[derive(Debug, Clone)]
pub(super) struct DelayControl {
    mtu: u64,
    window: u64,
    phase: Phase,
    base: BaseRtt,
    /// The base at the end of the last round.
    known_base: Option<Duration>,
    round: Round,
    look: Look,
    /// Windows of the past, to know which one a packet was sent under.
    past: VecDeque<(Duration, u64)>,
    /// The queue aimed at: [`TARGET_QUEUE`], or less behind a router that cannot hold so much.
    target: Duration,
    /// Slow start ends here at the latest (after an outage: half of what the path took before).
    slow_start_limit: u64,
    /// Losses of packets that were sent before this belong to a decrease that was made already.
    recovery_until: Option<Duration>,
    /// Rounds in succession with almost no queue.
    empty_rounds: u32,
    cautious_until: Duration,
    foreign: Option<Foreign>,
    /// While set, the window is capped so that the queue empties.
    drain: Option<Drain>,
    last_drain: Duration,
    /// The smallest round-trip time of the last whole round.
    latest_rtt: Duration,
    /// Bytes acknowledged in the last whole round.
    latest_acked: u64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Doubles per round until the queue shows.
    SlowStart,
    /// Holds the standing queue at the target.
    Steady,
    /// Behaves like a loss-based flow, because the queue is not ours.
    Competing { since: Duration, cubic: Cubic },
}

/// CUBIC's curve: up to `peak` packets at first, then beyond it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cubic {
    peak: f64,
    epoch: Duration,
}

impl Cubic {
    /// In packets, [`LOSS_DECREASE`] x peak at the epoch.
    fn window(&self, now: Duration) -> f64 {
        let until_peak = (self.peak * (1.0 - LOSS_DECREASE) / CUBIC_GROWTH).cbrt();
        let time = now.saturating_sub(self.epoch).as_secs_f64() - until_peak;
        CUBIC_GROWTH * time.powi(3) + self.peak
    }
}

#[derive(Debug, Clone, Copy)]
struct Drain {
    cap: u64,
    until: Duration,
}

/// The suspicion that somebody else fills the queue.
#[derive(Debug, Clone, Copy)]
struct Foreign {
    /// The window before the first of the vain decreases.
    window_before: u64,
    /// The window and the queue of the round before.
    sent_window: u64,
    queue: Duration,
    rounds: u32,
}

/// What was seen since the round began. A round ends with the first acknowledgement of a packet sent in it.
#[derive(Debug, Clone, Copy)]
struct Round {
    start: Duration,
    /// The smallest round-trip time, and when that packet was sent.
    min: Option<(Duration, Duration)>,
    acked: u64,
    /// Of `acked`, what was acknowledged while the application had nothing to send.
    acked_idle: u64,
    lost: u64,
    decreased: bool,
    ends: bool,
}

/// The look at the queue that slow start takes several times a round.
#[derive(Debug, Clone, Copy, Default)]
struct Look {
    start: Duration,
    /// The smallest round-trip time, and when that packet was sent.
    min: Option<(Duration, Duration)>,
    samples: u32,
    /// Whether the look before saw a queue.
    seen_before: bool,
}

impl Round {
    fn new(start: Duration) -> Round {
        Round { start, min: None, acked: 0, acked_idle: 0, lost: 0, decreased: false, ends: false }
    }

    /// Whether the window decided how much was in flight, not the application nor the processor: a window that is not used
    /// must not grow.
    fn filled_window(&self, window: u64) -> bool {
        self.acked * 2 >= window && self.acked_idle * 4 <= self.acked
    }
}

impl DelayControl {
    /// `mtu_bytes` is the size of the path's packets.
    pub(super) fn new(now: Duration, mtu_bytes: u64) -> DelayControl {
        DelayControl {
            mtu: mtu_bytes,
            window: Self::initial_window(mtu_bytes),
            phase: Phase::SlowStart,
            base: BaseRtt::default(),
            known_base: None,
            round: Round::new(now),
            look: Look { start: now, ..Look::default() },
            past: VecDeque::from([(now, Self::initial_window(mtu_bytes))]),
            target: TARGET_QUEUE,
            slow_start_limit: u64::MAX,
            recovery_until: None,
            empty_rounds: 0,
            cautious_until: now,
            foreign: None,
            drain: None,
            last_drain: now,
            latest_rtt: Duration::ZERO,
            latest_acked: 0,
        }
    }

    /// The window of a fresh path.
    pub(super) fn initial_window(mtu_bytes: u64) -> u64 {
        INITIAL_WINDOW_PACKETS * mtu_bytes
    }

    /// Bytes that may be in flight.
    pub(super) fn window(&self) -> u64 {
        let window = self.drain.map_or(self.window, |drain| drain.cap.min(self.window));
        window.clamp(self.min_window(), MAX_WINDOW_BYTES)
    }

    /// The path's packet size changed.
    pub(super) fn on_mtu(&mut self, mtu_bytes: u64) {
        self.mtu = mtu_bytes;
    }

    /// A packet of `bytes`, sent at `sent`, was acknowledged. `idle`: the application had nothing to send meanwhile.
    pub(super) fn on_ack(&mut self, now: Duration, sent: Duration, bytes: u64, idle: bool) {
        let rtt = now.saturating_sub(sent).max(Duration::from_micros(1));
        self.base.observe(now, rtt);
        let round = &mut self.round;
        round.acked += bytes;
        if idle {
            round.acked_idle += bytes;
        }
        keep_smaller(&mut round.min, rtt, sent);
        keep_smaller(&mut self.look.min, rtt, sent);
        self.look.samples += 1;
        round.ends |= sent >= round.start;
        if self.phase == Phase::SlowStart && self.may_double(idle) {
            self.window += bytes;
            if self.window >= self.slow_start_limit {
                self.phase = Phase::Steady;
            }
        }
    }

    /// All packets of one acknowledgement were reported.
    pub(super) fn on_acks_end(&mut self, now: Duration) {
        if self.drain.is_some_and(|drain| now >= drain.until) {
            self.drain = None;
        }
        if self.phase == Phase::SlowStart {
            self.look_for_queue(now);
        }
        if self.round.ends {
            self.end_round(now);
        }
        self.remember_window(now);
    }

    /// Packets were lost: `bytes` of them, the newest sent at `sent`. Zero bytes stand for a congestion mark. `outage`:
    /// nothing came through for several round trips.
    pub(super) fn on_loss(&mut self, now: Duration, sent: Duration, bytes: u64, outage: bool) {
        if outage {
            self.slow_start_limit = (self.window / 2).max(Self::initial_window(self.mtu));
            self.window = self.min_window();
            self.phase = Phase::SlowStart;
            self.drain = None;
            self.foreign = None;
            self.recovery_until = Some(now);
            return;
        }
        self.round.lost += bytes;
        if self.round.decreased || self.recovery_until.is_some_and(|until| sent <= until) {
            return;
        }
        let packets = self.window as f64 / self.mtu as f64;
        let competing = match &mut self.phase {
            Phase::Competing { cubic, .. } => {
                *cubic = Cubic { peak: packets, epoch: now };
                true
            }
            Phase::SlowStart | Phase::Steady => false,
        };
        let heavy = (self.window as f64 * HEAVY_LOSS) as u64;
        let marked = bytes == 0;
        if !marked && !competing && self.round.lost <= heavy.max(LOSS_GRACE_PACKETS * self.mtu) {
            return;
        }
        let mut lowered = self.window as f64 * if marked { MARK_DECREASE } else { LOSS_DECREASE };
        if let (Phase::SlowStart, Some(base), Some((rtt, at))) = (self.phase, self.base.get(), self.look.min) {
            // The last doubling overshot by up to a factor of two: what the link carried tells how far.
            let carried = self.window_at(at) as f64 * base.as_secs_f64() / rtt.as_secs_f64();
            lowered = lowered.min(carried.max(self.window as f64 * 0.35));
        }
        if !competing {
            // A queue that overflowed at this depth cannot hold more: aim lower behind this router.
            let deepest = self.latest_rtt.saturating_sub(self.base.get().unwrap_or_default());
            self.target = deepest.mul_f64(0.7).clamp(MIN_TARGET_QUEUE, self.target);
            self.cautious_until = now + (self.latest_rtt * CAUTIOUS_ROUNDS).max(CAUTIOUS_FOR);
            self.empty_rounds = 0;
            self.phase = Phase::Steady;
        }
        self.window = (lowered as u64).max(self.min_window());
        self.round.decreased = true;
        self.recovery_until = Some(now);
    }

    fn min_window(&self) -> u64 {
        MIN_WINDOW_PACKETS * self.mtu
    }

    /// Whether slow start may go on: the window is in use.
    fn may_double(&self, idle: bool) -> bool {
        // Replies with pauses between them may have twice the window that they fill: the pacer spreads a window over most
        // of a round trip, so that a short one delays even what fits.
        let fills_half = self.window < self.round.acked.max(self.latest_acked) * 2;
        // A round that doubles began with half of what it ends with, and the round before delivered half of that.
        let doubles = self.window <= self.latest_acked * 4 + Self::initial_window(self.mtu);
        fills_half || (!idle && doubles)
    }

    /// Ends slow start as soon as a queue stands: HyStart++ with its eighth of the base, within 4 to 16 ms. Twice in a row
    /// over an eighth of a round each: a stall of this machine or of the peer looks like a queue, but a short one.
    fn look_for_queue(&mut self, now: Duration) {
        let (Some(base), Some((rtt, sent))) = (self.base.get(), self.look.min) else { return };
        if self.look.samples < SLOW_START_SAMPLES || now.saturating_sub(self.look.start) < base / 8 {
            return;
        }
        let allowed = (base / 8).clamp(Duration::from_millis(4), Duration::from_millis(16));
        let seen = rtt >= base + allowed;
        let confirmed = seen && self.look.seen_before;
        self.look = Look { start: now, min: None, samples: 0, seen_before: seen };
        if !confirmed {
            return;
        }
        let carried = self.window_at(sent) as f64 * (base + self.target).as_secs_f64() / rtt.as_secs_f64();
        self.window = (carried as u64).clamp(self.min_window(), self.window);
        self.phase = Phase::Steady;
        self.empty_rounds = 0;
    }

    fn end_round(&mut self, now: Duration) {
        let round = std::mem::replace(&mut self.round, Round::new(now));
        let (Some(base), Some((rtt, sent))) = (self.base.get(), round.min) else { return };
        self.latest_rtt = rtt;
        self.latest_acked = round.acked;
        let queue = rtt.saturating_sub(base);
        self.target = (self.target + self.target / 100).min(TARGET_QUEUE);
        self.notice_longer_path(base);
        match self.phase {
            Phase::SlowStart => {}
            Phase::Steady => self.steer(now, &round, queue, base, sent),
            Phase::Competing { since, cubic } => self.compete(now, &round, queue, since, cubic),
        }
        self.drain_if_due(now, base, rtt);
    }

    /// The old base has left the memory, and the new one is another path's: what was taken for a queue was the way. The window had shrunk to
    /// nothing for it, and steps that a round of that length allows would take minutes.
    fn notice_longer_path(&mut self, base: Duration) {
        let is_longer = self.known_base.replace(base).is_some_and(|before| base > before * LONGER_PATH);
        if is_longer && self.phase == Phase::Steady {
            self.window = self.window.max(Self::initial_window(self.mtu));
            self.slow_start_limit = MAX_WINDOW_BYTES;
            self.phase = Phase::SlowStart;
            self.foreign = None;
        }
    }

    /// One correction towards the target queue.
    fn steer(&mut self, now: Duration, round: &Round, queue: Duration, base: Duration, sent: Duration) {
        let sent_window = self.window_at(sent);
        let ratio = (base + self.target).as_secs_f64() / (base + queue).as_secs_f64();
        let window = self.window as f64;
        let share = ((SHARE_PACKETS * self.mtu) as f64).min(window * 0.04);
        let wanted = sent_window as f64 * ratio + share;
        if queue > self.target {
            self.empty_rounds = 0;
            if round.decreased {
                return;
            }
            // Far above: at once. Near: half the way, since the measure is noisy.
            let step = if queue > self.target * 2 { 1.0 } else { 0.5 };
            let lowered = window + step * (wanted - window).min(0.0);
            // Enough to see whether the queue follows; what others fill is not emptied by more.
            let suspicious = self.foreign.is_some_and(|foreign| foreign.rounds > 0);
            let lowered = lowered.max(window * if suspicious { 0.8 } else { 0.5 });
            self.window = (lowered as u64).max(self.min_window());
            self.suspect_others(now, queue, sent_window, window as u64);
            return;
        }
        self.foreign = None;
        if !round.filled_window(self.window) || round.decreased || self.drain.is_some() {
            return;
        }
        self.empty_rounds = if queue < self.target / 2 { self.empty_rounds + 1 } else { 0 };
        let mut raised = window + 0.5 * (wanted - window).max(0.0);
        if now >= self.cautious_until && self.empty_rounds > 1 {
            let doublings = (self.empty_rounds - 1).min(4) as i32;
            raised = raised.max(window * (1.0 + 0.02 * 2f64.powi(doublings)));
        }
        let growth = (MAX_OVERSHOOT.as_secs_f64() / base.as_secs_f64()).min(MAX_GROWTH);
        let raised = raised.min(window * (1.0 + growth)).max(window + self.mtu as f64) as u64;
        self.window = raised.min(MAX_WINDOW_BYTES);
    }

    /// Whether the queue outlasts a window that shrank: alone on the link it would have followed.
    fn suspect_others(&mut self, now: Duration, queue: Duration, sent_window: u64, window_before: u64) {
        if queue <= self.target * 2 {
            self.foreign = None;
            return;
        }
        let Some(mut foreign) = self.foreign else {
            self.foreign = Some(Foreign { window_before, sent_window, queue, rounds: 0 });
            return;
        };
        let shrank = sent_window * 10 <= foreign.sent_window * 9 || sent_window <= self.min_window();
        if shrank {
            foreign.rounds = if queue * 10 >= foreign.queue * 8 { foreign.rounds + 1 } else { 0 };
            foreign.sent_window = sent_window;
            foreign.queue = queue;
        }
        self.foreign = Some(foreign);
        if foreign.rounds >= FOREIGN_ROUNDS {
            self.window = foreign.window_before;
            self.foreign = None;
            let peak = foreign.window_before as f64 / self.mtu as f64;
            self.phase = Phase::Competing { since: now, cubic: Cubic { peak, epoch: now } };
        }
    }

    fn compete(&mut self, now: Duration, round: &Round, queue: Duration, since: Duration, cubic: Cubic) {
        if queue <= self.target || now.saturating_sub(since) >= COMPETE_FOR {
            self.phase = Phase::Steady;
            self.foreign = None;
            return;
        }
        if round.filled_window(self.window) && !round.decreased {
            let window = (cubic.window(now) * self.mtu as f64) as u64;
            self.window = window.clamp(self.window, self.window + self.window / 2).min(MAX_WINDOW_BYTES);
        }
    }

    fn drain_if_due(&mut self, now: Duration, base: Duration, rtt: Duration) {
        if rtt <= base + (base / 64).max(Duration::from_millis(1)) {
            self.last_drain = now;
        }
        if self.phase != Phase::Steady || now.saturating_sub(self.last_drain) < DRAIN_INTERVAL {
            return;
        }
        self.last_drain = now;
        let carried = self.window as f64 * base.as_secs_f64() / rtt.as_secs_f64();
        self.drain = Some(Drain { cap: (carried * DRAIN_GAIN) as u64, until: now + rtt / 2 });
    }

    /// The window under which a packet sent at `sent` was sent.
    fn window_at(&self, sent: Duration) -> u64 {
        let later = self.past.partition_point(|(at, _)| *at <= sent);
        match later.checked_sub(1) {
            Some(index) => self.past[index].1,
            None => self.past.front().map_or(self.window, |(_, window)| *window),
        }
    }

    /// Notes the window: four round trips of history in at most a few hundred entries.
    fn remember_window(&mut self, now: Duration) {
        let window = self.window();
        if let Some((at, last)) = self.past.back_mut()
            && (*last == window || now.saturating_sub(*at) < self.latest_rtt / 64)
        {
            *last = window;
            return;
        }
        self.past.push_back((now, window));
        let horizon = now.saturating_sub((self.latest_rtt * 4).max(Duration::from_secs(1)));
        while self.past.len() > 1 && (self.past[1].0 < horizon || self.past.len() > 512) {
            self.past.pop_front();
        }
    }
}

fn keep_smaller(kept: &mut Option<(Duration, Duration)>, rtt: Duration, sent: Duration) {
    if kept.is_none_or(|(smallest, _)| rtt < smallest) {
        *kept = Some((rtt, sent));
    }
}

/// The smallest round-trip time of the last [`BASE_MEMORY`], as minima of [`BASE_BUCKETS`] buckets.
#[derive(Debug, Clone, Default)]
struct BaseRtt {
    /// When the bucket began, and its minimum.
    buckets: VecDeque<(Duration, Duration)>,
}

impl BaseRtt {
    fn observe(&mut self, now: Duration, rtt: Duration) {
        match self.buckets.back_mut() {
            Some((began, min)) if now.saturating_sub(*began) < BASE_MEMORY / BASE_BUCKETS => *min = rtt.min(*min),
            _ => self.buckets.push_back((now, rtt)),
        }
        // Only now, with a newer sample at hand: after a silence the old base is better than none.
        while self.buckets.front().is_some_and(|(began, _)| now.saturating_sub(*began) > BASE_MEMORY) {
            self.buckets.pop_front();
        }
    }

    fn get(&self) -> Option<Duration> {
        self.buckets.iter().map(|(_, min)| *min).min()
    }
}
