//! The memory that requests in flight may hold: a pool for all connections, out of which nobody can take so much that
//! the next comer finds nothing. Must not know what the bytes are for.
//!
//! Each connection has [`RESERVE_BYTES`] of its own. Beyond that it draws from the pool, but never more than what stays
//! free for the others (the "dynamic threshold" of shared switch buffers: Choudhury and Hahne, 1998): one greedy client
//! gets half, the second a third of the whole, and so on, and something is always left. Who holds nothing from the pool
//! may draw whatever is free, so that a single large request is not refused for ever. Where nothing is left, because clients
//! that stand still hold all of it, a large request can still be run in pieces that fit into the reserve.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

/// What each connection may hold without asking: small requests go on however full the pool is.
pub(super) const RESERVE_BYTES: u64 = 256 << 10;

/// The pool.
pub(super) struct Budget {
    /// The most that one connection may draw.
    connection_bytes: u64,
    pool: Mutex<Pool>,
}

struct Pool {
    free_bytes: u64,
    next_share: u64,
    /// Who waits for bytes to come back, by share.
    waiting: HashMap<u64, Waker>,
}

impl Budget {
    /// A pool of `total_bytes`, of which a connection may draw `connection_bytes`.
    pub(super) fn new(total_bytes: u64, connection_bytes: u64) -> Arc<Budget> {
        let pool = Pool { free_bytes: total_bytes, next_share: 0, waiting: HashMap::new() };
        Arc::new(Budget { connection_bytes, pool: Mutex::new(pool) })
    }

    /// The share of a new connection.
    pub(super) fn share(self: &Arc<Budget>) -> Share {
        let mut pool = self.pool.lock();
        pool.next_share += 1;
        Share { budget: Arc::clone(self), number: pool.next_share, held_bytes: 0, drawn_bytes: 0 }
    }

    #[cfg(test)]
    pub(super) fn free_bytes(&self) -> u64 {
        self.pool.lock().free_bytes
    }
}

/// What one connection holds; dropping it gives everything back.
pub(super) struct Share {
    budget: Arc<Budget>,
    number: u64,
    held_bytes: u64,
    /// The part of it that came from the pool.
    drawn_bytes: u64,
}

impl Share {
    /// Takes `bytes`, or arranges that the task is woken when it may be worth another try.
    pub(super) fn poll_take(&mut self, bytes: u64, cx: &mut Context<'_>) -> Poll<()> {
        if self.take(bytes, Some(cx)) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Whether nothing is held: then whatever is missing is held by others.
    pub(super) fn is_empty(&self) -> bool {
        self.held_bytes == 0
    }

    /// Takes `bytes` if that is possible now.
    pub(super) fn try_take(&mut self, bytes: u64) -> bool {
        self.take(bytes, None)
    }

    fn take(&mut self, bytes: u64, cx: Option<&mut Context<'_>>) -> bool {
        let drawn_then = (self.held_bytes + bytes).saturating_sub(RESERVE_BYTES);
        let more = drawn_then.saturating_sub(self.drawn_bytes);
        if more > 0 {
            let mut pool = self.budget.pool.lock();
            let fits = more <= pool.free_bytes
                && (self.drawn_bytes == 0
                    || (drawn_then <= self.budget.connection_bytes && drawn_then <= pool.free_bytes - more));
            if !fits {
                if let Some(cx) = cx {
                    pool.waiting.insert(self.number, cx.waker().clone());
                }
                return false;
            }
            pool.free_bytes -= more;
            self.drawn_bytes += more;
        }
        self.held_bytes += bytes;
        true
    }

    /// Gives `bytes` back.
    pub(super) fn give_back(&mut self, bytes: u64) {
        self.held_bytes = self.held_bytes.saturating_sub(bytes);
        let still_drawn = self.held_bytes.saturating_sub(RESERVE_BYTES).min(self.drawn_bytes);
        let returned = self.drawn_bytes - still_drawn;
        if returned == 0 {
            return;
        }
        self.drawn_bytes = still_drawn;
        let waiting = {
            let mut pool = self.budget.pool.lock();
            pool.free_bytes += returned;
            std::mem::take(&mut pool.waiting)
        };
        waiting.into_values().for_each(Waker::wake);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back(self.held_bytes);
        self.budget.pool.lock().waiting.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn greedy_connections_leave_something_for_the_next() {
        let budget = Budget::new(128 * MIB, 64 * MIB);
        let mut greedy: Vec<Share> = (0..20).map(|_| budget.share()).collect();
        for share in &mut greedy {
            while share.try_take(MIB) {}
        }
        assert!(greedy[0].held_bytes <= 64 * MIB + RESERVE_BYTES);
        let mut late = budget.share();
        assert!(late.try_take(RESERVE_BYTES), "the reserve is everybody's own");
        assert_eq!(budget.free_bytes() + greedy.iter().map(|s| s.drawn_bytes).sum::<u64>(), 128 * MIB);
        drop(greedy);
        drop(late);
        assert_eq!(budget.free_bytes(), 128 * MIB);
    }

    #[test]
    fn the_largest_request_passes_beside_one_greedy_connection() {
        let budget = Budget::new(128 * MIB, 64 * MIB);
        let mut greedy = budget.share();
        while greedy.try_take(MIB) {}
        let mut other = budget.share();
        assert!(other.try_take(32 * MIB));
        other.give_back(32 * MIB);
        assert_eq!((other.held_bytes, other.drawn_bytes), (0, 0));
    }

    #[test]
    fn who_waits_is_woken_when_bytes_come_back() {
        let budget = Budget::new(4 * MIB, 4 * MIB);
        let (mut first, mut second) = (budget.share(), budget.share());
        assert!(first.try_take(4 * MIB));
        let (waker, count) = futures_test_waker();
        let mut cx = Context::from_waker(&waker);
        assert!(second.poll_take(2 * MIB, &mut cx).is_pending());
        first.give_back(4 * MIB);
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 1);
        assert!(second.poll_take(2 * MIB, &mut cx).is_ready());
    }

    fn futures_test_waker() -> (Waker, Arc<std::sync::atomic::AtomicUsize>) {
        struct Counter(Arc<std::sync::atomic::AtomicUsize>);
        impl std::task::Wake for Counter {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        (Waker::from(Arc::new(Counter(Arc::clone(&count)))), count)
    }
}
