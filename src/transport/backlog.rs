//! How much bulk may be under way: held near the congestion window, and within the credit that the peer's consumer gives.
//! Must not know streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Mutex, MutexGuard, Notify};

use super::limits::{BULK_BACKLOG_BASE_BYTES, BULK_BACKLOG_MAX_BYTES, BULK_UNSENT_BYTES, bulk_charge};

/// The gate that every bulk message passes, one after the other, in the order of asking.
///
/// Two bounds. *Unacknowledged* bytes: what is written early cannot be overtaken by what becomes urgent later, and lies in
/// memory. *Credit*: the peer's transport acknowledges what its consumer has not taken yet; without credit a stalled
/// consumer would fill the connection's receive window and with it hold up demand.
#[derive(Debug, Default)]
pub(super) struct BulkGate {
    /// Credit spent since the link's start; whoever holds it is next.
    spent: Mutex<u64>,
    /// Credit given since the link's start.
    credit: AtomicU64,
    /// Whoever holds it is the next to be written.
    writing: Mutex<()>,
    unacknowledged: Arc<Unacknowledged>,
}

#[derive(Debug, Default)]
struct Unacknowledged {
    /// All that passed the gate.
    bytes: AtomicU64,
    /// Of them, what was handed to quinn as bulk.
    written: AtomicU64,
    /// Wakes the one that waits at the gate.
    changed: Notify,
    /// Wakes the one that waits to be written.
    may_write: Notify,
}

/// Room at the gate, not yet taken: dropping it takes nothing.
pub(super) struct Turn<'a> {
    spent: MutexGuard<'a, u64>,
    unacknowledged: &'a Arc<Unacknowledged>,
    bytes: u64,
    charge: u64,
}

/// Bytes under way; give it up when they are acknowledged.
#[derive(Debug)]
pub(super) struct Underway {
    unacknowledged: Arc<Unacknowledged>,
    bytes: u64,
    is_written: bool,
}

impl BulkGate {
    /// Waits until a message of `message_bytes` may go. `window_bytes` tells the congestion window.
    pub(super) async fn pass(&self, message_bytes: usize, window_bytes: impl Fn() -> u64) -> Turn<'_> {
        let (bytes, charge) = (message_bytes as u64, bulk_charge(message_bytes));
        let spent = self.spent.lock().await;
        loop {
            // `notify_one` leaves a mark when nobody waits yet: a change between the look and the wait is not missed.
            let unacknowledged = self.unacknowledged.bytes.load(Ordering::Acquire);
            let most =
                window_bytes().saturating_mul(2).saturating_add(BULK_BACKLOG_BASE_BYTES).min(BULK_BACKLOG_MAX_BYTES);
            // One message always passes: a window of nothing must not stop the link.
            let has_room = unacknowledged == 0 || unacknowledged + bytes <= most;
            if has_room && *spent + charge <= self.credit.load(Ordering::Acquire) {
                return Turn { spent, unacknowledged: &self.unacknowledged, bytes, charge };
            }
            self.unacknowledged.changed.notified().await;
        }
    }

    /// Waits until a message that passed may be written, in the order of asking. Until then it lies outside of quinn, where
    /// a promotion takes effect at once: quinn looks at a new priority only when the stream's turn comes in the old one.
    /// Dropping the future gives up the turn: who is promoted needs none.
    pub(super) async fn may_write(&self, under_way: &mut Underway, window_bytes: impl Fn() -> u64) {
        let _turn = self.writing.lock().await;
        loop {
            let window = window_bytes();
            let most = window.saturating_add((window / 8).max(BULK_UNSENT_BYTES));
            // What was written before counts, not this message: however large it is, quinn never runs dry.
            if self.unacknowledged.written.load(Ordering::Acquire) <= most {
                self.unacknowledged.written.fetch_add(under_way.bytes, Ordering::AcqRel);
                under_way.is_written = true;
                return;
            }
            self.unacknowledged.may_write.notified().await;
        }
    }

    /// The peer gives credit up to `total_bytes` since the link's start; `false` if it takes some back.
    #[must_use]
    pub(super) fn set_credit(&self, total_bytes: u64) -> bool {
        let before = self.credit.fetch_max(total_bytes, Ordering::AcqRel);
        self.unacknowledged.changed.notify_one();
        before <= total_bytes
    }
}

impl Turn<'_> {
    /// Goes.
    pub(super) fn take(mut self) -> Underway {
        *self.spent += self.charge;
        self.unacknowledged.bytes.fetch_add(self.bytes, Ordering::AcqRel);
        Underway { unacknowledged: self.unacknowledged.clone(), bytes: self.bytes, is_written: false }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.unacknowledged.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.unacknowledged.changed.notify_one();
        if self.is_written {
            self.unacknowledged.written.fetch_sub(self.bytes, Ordering::AcqRel);
        }
        // Also when the turn was given up: the mark may have been for this one.
        self.unacknowledged.may_write.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const WINDOW: u64 = 512 << 10;

    fn passes(gate: &BulkGate, bytes: usize) -> Option<Underway> {
        gate.pass(bytes, || WINDOW).now_or_never().map(Turn::take)
    }

    #[test]
    fn twice_the_window_and_a_mebibyte_may_be_under_way() {
        let gate = BulkGate::default();
        assert!(gate.set_credit(u64::MAX));
        let half = 512 << 10;
        let under_way: Vec<Underway> = std::iter::from_fn(|| passes(&gate, half)).collect();
        assert_eq!(under_way.len(), 4);
        drop(under_way);
        assert!(passes(&gate, half).is_some());
    }

    #[test]
    fn credit_bounds_it_too_and_small_messages_cost_more_than_their_size() {
        let gate = BulkGate::default();
        assert!(passes(&gate, 1).is_none(), "no credit yet");
        assert!(gate.set_credit(40 << 10));
        assert!(passes(&gate, 1).is_some());
        assert!(passes(&gate, 1).is_some());
        assert!(passes(&gate, 1).is_none(), "two messages of 16 KiB at least are spent of 40");
        assert!(!gate.set_credit(1), "credit is never taken back");
    }

    #[test]
    fn a_turn_that_is_given_up_costs_nothing() {
        let gate = BulkGate::default();
        assert!(gate.set_credit(16 << 10));
        drop(gate.pass(100, || WINDOW).now_or_never().expect("room"));
        assert!(passes(&gate, 100).is_some());
    }

    #[test]
    fn quinn_gets_a_window_and_little_more() {
        let gate = BulkGate::default();
        assert!(gate.set_credit(u64::MAX));
        let writes = |under_way: &mut Underway| gate.may_write(under_way, || WINDOW).now_or_never().is_some();
        let mut messages: Vec<Underway> = std::iter::from_fn(|| passes(&gate, 128 << 10)).collect();
        let written = messages.iter_mut().map(writes).filter(|written| *written).count();
        assert_eq!(written, 6, "640 KiB, and the message that crosses the line");
        messages.remove(0);
        assert!(writes(&mut messages[5]));
        assert!(!writes(&mut messages[6]));
        drop(messages);
        assert_eq!(gate.unacknowledged.bytes.load(Ordering::Acquire), 0);
        assert_eq!(gate.unacknowledged.written.load(Ordering::Acquire), 0);
    }

    #[tokio::test]
    async fn the_one_that_waits_is_woken() {
        let gate = Arc::new(BulkGate::default());
        let waits = tokio::spawn({
            let gate = gate.clone();
            async move { gate.pass(100, || WINDOW).await.take().bytes }
        });
        tokio::task::yield_now().await;
        assert!(gate.set_credit(1 << 20));
        assert_eq!(waits.await.expect("no panic"), 100);
    }
}
