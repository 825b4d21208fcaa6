//! What counts the changes of a volume's owner. Must not know who owns what.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Counts the changes of ownership of one volume, across all sites.
///
/// The high half is the term: it grows when a person reclaims a volume whose other side is lost. The low half counts
/// hand-overs within a term. So a reclaimed volume is ahead of everything that the lost side can still do by itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

const TERM: u32 = 32;

impl Epoch {
    /// Of a volume that was just added.
    pub const FIRST: Epoch = Epoch(1);

    /// The one after a hand-over. Saturates: a volume that was handed over four thousand million times is handed over no more.
    pub fn next(self) -> Epoch {
        let is_last = self.0 as u32 == u32::MAX;
        if is_last { self } else { Epoch(self.0 + 1) }
    }

    /// The one after a person's decision: ahead of every hand-over of this term.
    pub fn reclaimed(self) -> Epoch {
        match self.term().checked_add(1) {
            Some(term) => Epoch(u64::from(term) << TERM),
            None => self,
        }
    }

    /// How often a person decided.
    pub fn term(self) -> u32 {
        (self.0 >> TERM) as u32
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
        let reclaimed = lost.reclaimed();
        for _ in 0..1000 {
            lost = lost.next();
            assert!(reclaimed > lost);
        }
        assert!(reclaimed.reclaimed() > reclaimed.next());
        assert!(Epoch(8).follows(Epoch(7)) && !Epoch(9).follows(Epoch(7)) && !reclaimed.follows(Epoch(7)));
    }

    #[test]
    fn the_end_of_counting_does_not_wrap() {
        let last = Epoch(u64::from(u32::MAX));
        assert_eq!(last.next(), last);
        assert!(!last.next().follows(last), "nobody can take over a volume any more");
        assert_eq!(Epoch(u64::MAX).reclaimed(), Epoch(u64::MAX));
    }
}
