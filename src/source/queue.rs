//! What one peer has asked for and not yet got: strict order of classes, promotion, bounds. Pure: must not know images,
//! connections or threads.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::core::ids::{BlockIndex, Class};
use crate::core::wire::Want;

/// The most wants that a peer may have open. A well-behaved destination stays far below.
pub const MAX_OPEN_WANTS: usize = 16_384;

/// What is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// The destination's number for it.
    pub flight: u64,
    /// Which opened volume.
    pub handle: u32,
    /// Which block.
    pub block: BlockIndex,
}

/// What a promotion is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promoted {
    /// It waits in a more urgent queue now.
    Requeued,
    /// It is being read or lies in the transport: raise it there.
    UnderWay,
    /// It is unknown: answered already.
    Unknown,
}

/// See the module.
#[derive(Debug, Default)]
pub struct SendQueue {
    queues: [VecDeque<u64>; 3],
    open: HashMap<u64, (Item, Class, bool)>,
}

/// The peer asked for more than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_OPEN_WANTS} blocks wanted at a time")]
pub struct TooMany;

impl SendQueue {
    /// Takes a want. A flight that is open already keeps its place.
    pub fn push(&mut self, want: Want) -> Result<(), TooMany> {
        if self.open.len() >= MAX_OPEN_WANTS {
            return Err(TooMany);
        }
        let item = Item { flight: want.flight, handle: want.handle, block: want.block };
        if let std::collections::hash_map::Entry::Vacant(place) = self.open.entry(want.flight) {
            place.insert((item, want.class, false));
            self.queues[want.class as usize].push_back(want.flight);
            self.sweep(want.class);
        }
        Ok(())
    }

    /// What was forgotten or promoted stays in its queue until its turn: a peer that wants and forgets in a circle must
    /// not make it grow without end.
    fn sweep(&mut self, class: Class) {
        let queue = &mut self.queues[class as usize];
        if queue.len() > 2 * MAX_OPEN_WANTS {
            let mut seen = HashSet::new();
            let is_current =
                |flight: &u64| self.open.get(flight).is_some_and(|(_, now, begun)| *now == class && !*begun);
            queue.retain(|flight| is_current(flight) && seen.insert(*flight));
        }
    }

    /// The next item of the classes up to `least`, the most urgent first; it counts as open until [`SendQueue::done`].
    pub fn pop(&mut self, classes: &[Class]) -> Option<(Item, Class)> {
        for class in classes {
            while let Some(flight) = self.queues[*class as usize].pop_front() {
                if let Some((item, now, is_under_way)) = self.open.get_mut(&flight)
                    && now == class
                    && !*is_under_way
                {
                    *is_under_way = true;
                    return Some((*item, *class));
                }
            }
        }
        None
    }

    /// Makes a flight more urgent; never less.
    pub fn promote(&mut self, flight: u64, class: Class) -> Promoted {
        let Some((_, now, is_under_way)) = self.open.get_mut(&flight) else { return Promoted::Unknown };
        if class.is_more_urgent_than(*now) {
            *now = class;
            if !*is_under_way {
                self.queues[class as usize].push_back(flight);
                self.sweep(class);
                return Promoted::Requeued;
            }
        }
        if *is_under_way { Promoted::UnderWay } else { Promoted::Requeued }
    }

    /// Nobody waits for it: it is not sent if it was not begun.
    pub fn forget(&mut self, flight: u64) {
        if self.open.get(&flight).is_some_and(|(_, _, is_under_way)| !is_under_way) {
            self.open.remove(&flight);
        }
    }

    /// It was handed to the transport; returns the class that it has by now.
    pub fn done(&mut self, flight: u64) -> Option<Class> {
        self.open.remove(&flight).map(|(_, class, _)| class)
    }

    /// The class that a flight has by now.
    pub fn class_of(&self, flight: u64) -> Option<Class> {
        self.open.get(&flight).map(|(_, class, _)| *class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(flight: u64, class: Class) -> Want {
        Want { flight, handle: 1, class, block: BlockIndex(flight) }
    }

    #[test]
    fn demand_comes_first_and_promotion_moves_once() {
        let mut queue = SendQueue::default();
        for flight in 1..=3 {
            queue.push(want(flight, Class::Bulk)).expect("room");
        }
        queue.push(want(9, Class::Demand)).expect("room");
        assert_eq!(queue.promote(3, Class::Demand), Promoted::Requeued);
        assert_eq!(queue.promote(3, Class::Readahead), Promoted::Requeued, "never less urgent");
        let order: Vec<u64> = std::iter::from_fn(|| queue.pop(&Class::ALL).map(|(item, _)| item.flight)).collect();
        assert_eq!(order, [9, 3, 1, 2]);
        assert_eq!(queue.promote(1, Class::Demand), Promoted::UnderWay);
        assert_eq!(queue.done(1), Some(Class::Demand));
        assert_eq!(queue.promote(1, Class::Demand), Promoted::Unknown);
    }

    #[test]
    fn a_peer_that_wants_and_forgets_in_a_circle_is_bounded() {
        let mut queue = SendQueue::default();
        queue.push(want(7, Class::Bulk)).expect("room");
        for _ in 0..4 * MAX_OPEN_WANTS {
            queue.push(want(1, Class::Bulk)).expect("room");
            queue.promote(1, Class::Demand);
            queue.forget(1);
        }
        assert!(queue.queues.iter().all(|queue| queue.len() <= 2 * MAX_OPEN_WANTS + 1));
        assert_eq!(queue.pop(&[Class::Bulk]).map(|(item, _)| item.flight), Some(7), "what is wanted keeps its place");
        assert_eq!(queue.pop(&Class::ALL), None);
    }

    #[test]
    fn bounds_and_forgetting() {
        let mut queue = SendQueue::default();
        for flight in 0..MAX_OPEN_WANTS as u64 {
            queue.push(want(flight, Class::Bulk)).expect("room");
        }
        assert_eq!(queue.push(want(1 << 40, Class::Demand)), Err(TooMany));
        queue.forget(0);
        queue.push(want(1 << 40, Class::Demand)).expect("room again");
        assert_eq!(queue.pop(&[Class::Bulk]).map(|(item, _)| item.flight), Some(1));
        queue.push(want(1, Class::Demand)).unwrap_err();
        queue.forget(1);
        assert_eq!(queue.done(1), Some(Class::Bulk), "what was begun is finished");
    }
}
