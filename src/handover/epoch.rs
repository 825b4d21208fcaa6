//! What counts the changes of a volume's owner. Must not know who owns what.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::seeded_bugs::{Bug, is_planted};

/// Counts the changes of ownership of one volume, across all sites.
///
/// The high half is the term: it grows when a person reclaims a volume whose other side is lost. The low half counts
/// hand-overs within a term. So a reclaimed volume is ahead of everything that the lost side can still do by itself.
/// Above term 0, the high quarter of that half begins as the decision's salt: two persons who decide at two sites into one term are told
/// apart by it, and the higher one wins.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

const TERM: u32 = 32;
const SALT: u32 = 16;
/// Decisions of persons about one volume that one site may have missed. A peer that claims more would leave no term for those to come.
const MOST_TERMS: u32 = 1 << 16;

impl Epoch {
    /// Of a volume that was just added.
    pub const FIRST: Epoch = Epoch(1);

    /// The one after a hand-over. Saturates: a volume that was handed over four thousand million times is handed over no more.
    pub fn next(self) -> Epoch {
        let is_last = self.0 as u32 == u32::MAX;
        if is_last { self } else { Epoch(self.0 + 1) }
    }

    /// The one after a person's decision: ahead of every hand-over of this term. `salt`: drawn at random.
    pub fn reclaimed(self, salt: u16) -> Epoch {
        if is_planted(Bug::ReclaimWithinTheTerm) {
            return self.next().next();
        }
        match self.term().checked_add(1) {
            Some(term) => Epoch(u64::from(term) << TERM | u64::from(salt) << SALT),
            None => self,
        }
    }

    /// How often a person decided.
    pub fn term(self) -> u32 {
        (self.0 >> TERM) as u32
    }

    /// Whether persons may decide again and again after it, and hand-overs follow. Whoever says an epoch that does not is wrong, or lies.
    pub fn leaves_room(self) -> bool {
        self.term() <= u32::MAX - MOST_TERMS && self.next() != self
    }

    /// Whether `self` may have come about since `other`: nobody decides so often, and it must leave room for more.
    pub fn is_likely_after(self, other: Epoch) -> bool {
        self.leaves_room() && self.term().saturating_sub(other.term()) <= MOST_TERMS
    }

    /// Whether a person's decision lies behind `self` that `other` does not know, and that wins over those behind `other`.
    pub fn overrules(self, other: Epoch) -> bool {
        let is_decided = self.term() > other.term() || (self.term() > 0 && self.salt() != other.salt());
        self > other && is_decided && self.is_likely_after(other)
    }

    fn salt(self) -> u16 {
        (self.0 >> SALT) as u16
    }

    /// Whether `self` is the epoch that a hand-over from `before` leads to.
    pub fn follows(self, before: Epoch) -> bool {
        self != before && before.next() == self
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term(), self.0 as u32)
    }
}

impl FromStr for Epoch {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Epoch, Self::Err> {
        text.parse().map(Epoch)
    }
}

/// Counts the contents that a source announced under one incarnation of a volume: what was announced under one number never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The next content.
    pub fn next(self) -> Generation {
        Generation(self.0.wrapping_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_persons_decision_is_ahead_of_every_hand_over() {
        let mut lost = Epoch(7);
        let reclaimed = lost.reclaimed(0);
        for _ in 0..1000 {
            lost = lost.next();
            assert!(reclaimed > lost);
        }
        assert!(reclaimed.reclaimed(0) > reclaimed.next());
        assert!(Epoch(8).follows(Epoch(7)) && !Epoch(9).follows(Epoch(7)) && !reclaimed.follows(Epoch(7)));
    }

    #[test]
    fn the_end_of_counting_does_not_wrap() {
        let last = Epoch(u64::from(u32::MAX));
        assert_eq!(last.next(), last);
        assert!(!last.next().follows(last), "nobody can take over a volume any more");
        assert_eq!(Epoch(u64::MAX).reclaimed(7), Epoch(u64::MAX));
    }

    #[test]
    fn an_epoch_after_which_nobody_could_decide_is_believed_of_nobody() {
        let here = Epoch(7);
        for claimed in [Epoch(u64::MAX), Epoch(u64::MAX - 1), Epoch(u64::from(u32::MAX) << TERM), Epoch(1 << 60)] {
            assert!(claimed > here && !claimed.overrules(here) && !claimed.is_likely_after(here), "{claimed:?}");
        }
        let many = (0..1000).fold(here, |epoch, salt| epoch.reclaimed(salt));
        assert!(many.overrules(here) && many.leaves_room());
        assert!(here.reclaimed(u16::MAX).overrules(here), "any salt is");
        assert!(!Epoch(u64::from(u32::MAX)).leaves_room(), "no hand-over can follow");
    }

    #[test]
    fn two_decisions_into_one_term_are_told_apart() {
        let (low, high) = (Epoch(7).reclaimed(3), Epoch(7).next().reclaimed(4));
        assert_eq!(low.term(), high.term());
        assert!(high.overrules(low) && !low.overrules(high));
        assert!(high.overrules(low.next().next()) && !low.next().next().overrules(high));
        assert!(!low.next().overrules(low), "a hand-over is no decision");
        assert!(!Epoch(1 << 17).overrules(Epoch(1)), "nobody decided yet");
        assert!(low.overrules(Epoch(9)) && high.reclaimed(0).overrules(high));
    }
}
