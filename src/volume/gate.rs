//! Who may write, and until when: a fence that lets the writes under way end. And flushes that share one sync.
//! Must not know files.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Mutex, Notify, OwnedMutexGuard};

use crate::seeded_bugs::{Bug, is_planted};

/// The writes under way, in the low half of the gate's state.
const COUNT: u64 = (1 << 32) - 1;
/// Shut until somebody opens it: this site is not the owner.
const SHUT: u64 = 1 << 63;
/// Shut for good: the volume is gone.
const SEALED: u64 = 1 << 62;

/// Returns when something is so; whoever makes it so notifies all who wait.
pub(super) async fn until(changed: &Notify, is_so: impl Fn() -> bool) {
    loop {
        let change = changed.notified();
        tokio::pin!(change);
        // Before the look: a change behind it is heard of.
        change.as_mut().enable();
        if is_so() {
            return;
        }
        change.await;
    }
}

/// Counts the writes under way; once shut, admits no more.
///
/// Open means: neither shut nor sealed. Nothing opens a sealed one.
#[derive(Debug, Default)]
pub(super) struct WriteGate {
    state: AtomicU64,
    drained: Notify,
    shut: Notify,
}

/// A write that was admitted.
#[derive(Debug)]
pub(super) struct Admitted(Arc<WriteGate>);

impl WriteGate {
    pub(super) fn new(is_open: bool) -> WriteGate {
        let is_open = is_open || is_planted(Bug::GateOpenBeforeOwnership);
        WriteGate { state: AtomicU64::new(if is_open { 0 } else { SHUT }), drained: Notify::new(), shut: Notify::new() }
    }

    /// What is admitted goes along with the write itself, so that a client that hangs up does not end it early.
    pub(super) fn admit(self: &Arc<Self>) -> Option<Admitted> {
        let before = self.state.fetch_add(1, Ordering::AcqRel);
        let admitted = Admitted(Arc::clone(self));
        if before & !COUNT == 0 { Some(admitted) } else { None }
    }

    pub(super) fn is_open(&self) -> bool {
        self.state.load(Ordering::Acquire) & !COUNT == 0
    }

    /// Admits nothing from now on and returns when what was admitted has ended.
    pub(super) async fn close(&self) {
        self.shut();
        self.drained().await;
    }

    /// Admits nothing until it is opened. What was admitted may still be under way.
    pub(super) fn shut(&self) {
        self.state.fetch_or(SHUT, Ordering::AcqRel);
        self.shut.notify_waiters();
    }

    /// Returns when it is not open: at once if it is not.
    pub(super) async fn barred(&self) {
        until(&self.shut, || !self.is_open()).await;
    }

    /// Admits nothing ever again.
    pub(super) fn seal(&self) {
        self.state.fetch_or(SEALED, Ordering::AcqRel);
        self.shut.notify_waiters();
    }

    /// Returns when what was admitted has ended. Of use where nothing more is admitted.
    pub(super) async fn drained(&self) {
        let has_ended = || self.state.load(Ordering::Acquire) & COUNT == 0 || is_planted(Bug::FenceDoesNotWait);
        until(&self.drained, has_ended).await;
    }

    /// Undoes [`WriteGate::shut`].
    pub(super) fn open(&self) {
        self.state.fetch_and(!SHUT, Ordering::AcqRel);
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if self.0.state.fetch_sub(1, Ordering::AcqRel) & COUNT == 1 {
            self.0.drained.notify_waiters();
        }
    }
}

/// Group commit: everybody who asked before a sync began is served by it.
#[derive(Debug, Default)]
pub(super) struct FlushGate {
    asked: AtomicU64,
    turn: Arc<Mutex<u64>>,
}

/// The right to sync, one at a time. It goes along with the sync itself: who asked may hang up, and the next sync must
/// not overtake one that has taken its rows and not yet written them.
#[derive(Debug)]
pub(super) struct Turn {
    done_to: OwnedMutexGuard<u64>,
    covers: u64,
}

impl Turn {
    /// The sync succeeded: so did everybody's who asked before it began.
    pub(super) fn succeed(mut self) {
        *self.done_to = self.covers;
    }
}

impl FlushGate {
    /// Runs `sync`, or waits for one that began after this call and succeeded.
    pub(super) async fn flush<E>(&self, sync: impl AsyncFnOnce(Turn) -> Result<(), E>) -> Result<(), E> {
        let mine = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let done_to = Arc::clone(&self.turn).lock_owned().await;
        if *done_to >= mine {
            return Ok(());
        }
        sync(Turn { done_to, covers: self.asked.load(Ordering::Acquire) }).await
    }

    /// The turn for a sync that begins now, unless another is under way.
    pub(super) fn try_turn(&self) -> Option<Turn> {
        let done_to = Arc::clone(&self.turn).try_lock_owned().ok()?;
        Some(Turn { done_to, covers: self.asked.load(Ordering::Acquire) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_gate_waits_for_writes_under_way_and_admits_none() {
        let gate = Arc::new(WriteGate::new(true));
        let under_way = gate.admit().expect("open");
        let closing = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.close().await }
        });
        while gate.is_open() {
            tokio::task::yield_now().await;
        }
        assert!(gate.admit().is_none());
        assert!(!closing.is_finished());
        drop(under_way);
        closing.await.expect("closes");
        gate.open();
        assert!(gate.admit().is_some());
    }

    #[tokio::test]
    async fn who_waits_for_a_gate_to_be_shut_hears_of_it() {
        let gate = Arc::new(WriteGate::new(true));
        let under_way = gate.admit().expect("open");
        let mut barred = std::pin::pin!(gate.barred());
        assert!(futures::poll!(barred.as_mut()).is_pending());
        gate.shut();
        barred.await;
        gate.barred().await;
        drop(under_way);
        gate.open();
        assert!(futures::poll!(std::pin::pin!(gate.barred())).is_pending());
        gate.seal();
        gate.barred().await;
    }

    #[tokio::test]
    async fn a_seal_is_for_good() {
        let gate = Arc::new(WriteGate::new(true));
        let under_way = gate.admit().expect("open");
        gate.seal();
        let mut drained = std::pin::pin!(gate.drained());
        assert!(futures::poll!(drained.as_mut()).is_pending());
        drop(under_way);
        drained.await;
        gate.open();
        assert!(!gate.is_open() && gate.admit().is_none());
    }

    #[tokio::test]
    async fn flushes_that_wait_share_one_sync_and_failures_are_not_shared() {
        let gate = FlushGate::default();
        let syncs = AtomicU64::new(0);
        let sync = || async {
            gate.flush(async |turn: Turn| {
                syncs.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                turn.succeed();
                Ok::<(), ()>(())
            })
            .await
        };
        let all = futures::future::join_all((0..10).map(|_| sync())).await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!(syncs.load(Ordering::Relaxed), 2, "the first, and one for all who came meanwhile");
        assert_eq!(gate.flush(async |_: Turn| Err::<(), &str>("disk")).await, Err("disk"));
        assert_eq!(gate.flush(async |_: Turn| Ok::<(), &str>(())).await, Ok(()));
    }

    #[tokio::test]
    async fn a_sync_whose_client_hung_up_is_not_overtaken() {
        let gate = Arc::new(FlushGate::default());
        let (taken, turn) = tokio::sync::oneshot::channel();
        let client = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move {
                gate.flush(async |turn: Turn| {
                    taken.send(turn).expect("the sync's thread has the turn");
                    std::future::pending::<Result<(), ()>>().await
                })
                .await
            }
        });
        let turn = turn.await.expect("it began");
        client.abort();
        assert!(client.await.expect_err("aborted").is_cancelled());
        let next = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move {
                gate.flush(async |turn: Turn| {
                    turn.succeed();
                    Ok::<(), ()>(())
                })
                .await
            }
        });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!next.is_finished());
        turn.succeed();
        next.await.expect("runs").expect("flushes");
    }
}
