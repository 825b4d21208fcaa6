//! Datagrams on their way: what has been accepted and is not due yet, bounded in bytes.
//! Pure. Must not know: sockets, clocks.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Duration;

use crate::clients::ClientId;

/// A datagram that is due at a time.
#[derive(Debug)]
pub struct Datagram {
    /// When it leaves.
    pub at: Duration,
    /// Whose it is.
    pub client: ClientId,
    /// Its payload.
    pub payload: Box<[u8]>,
    order: u64,
}

impl Ord for Datagram {
    /// The heap gives the greatest first: the earliest, and of two that are due together the one that came first.
    fn cmp(&self, other: &Datagram) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}
impl PartialOrd for Datagram {
    fn partial_cmp(&self, other: &Datagram) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Datagram {
    fn eq(&self, other: &Datagram) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Datagram {}

/// What a datagram costs beside its payload: the entry, the allocator's share.
const OVERHEAD_BYTES: usize = 80;

/// All datagrams of one direction that are on their way.
#[derive(Debug)]
pub struct Held {
    heap: BinaryHeap<Datagram>,
    bytes: usize,
    limit: usize,
    next_order: u64,
}

impl Held {
    /// Nothing yet, and never more than `limit` bytes.
    pub fn new(limit: usize) -> Held {
        Held { heap: BinaryHeap::new(), bytes: 0, limit, next_order: 0 }
    }

    /// Keeps a copy until `at`; false when there is no room.
    #[must_use]
    pub fn push(&mut self, at: Duration, client: ClientId, payload: &[u8]) -> bool {
        let cost = payload.len() + OVERHEAD_BYTES;
        if self.bytes + cost > self.limit {
            return false;
        }
        self.bytes += cost;
        self.heap.push(Datagram { at, client, payload: payload.into(), order: self.next_order });
        self.next_order += 1;
        true
    }

    /// When the next is due.
    pub fn next_at(&self) -> Option<Duration> {
        self.heap.peek().map(|datagram| datagram.at)
    }

    /// The next that is due at `now`.
    pub fn pop_due(&mut self, now: Duration) -> Option<Datagram> {
        if self.next_at()? > now {
            return None;
        }
        let datagram = self.heap.pop()?;
        self.bytes -= datagram.payload.len() + OVERHEAD_BYTES;
        Some(datagram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_by_time_then_by_arrival_and_is_bounded() {
        let ms = Duration::from_millis;
        let mut held = Held::new(3 * (1 + OVERHEAD_BYTES));
        assert!(held.push(ms(2), ClientId(1), b"b"));
        assert!(held.push(ms(1), ClientId(1), b"a"));
        assert!(held.push(ms(2), ClientId(1), b"c"));
        assert!(!held.push(ms(2), ClientId(1), b"d"));
        assert_eq!(held.next_at(), Some(ms(1)));
        assert!(held.pop_due(Duration::ZERO).is_none());
        let order: Vec<Box<[u8]>> = std::iter::from_fn(|| held.pop_due(ms(2))).map(|d| d.payload).collect();
        assert_eq!(order.concat(), b"abc");
        assert!(held.push(ms(2), ClientId(1), b"d"));
    }
}
