//! What an operator does between the kills, and how often each comes. Pure.

use blockferry_lab::random::Random;
use serde::Serialize;

/// One thing that an operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// `cancel` while it is arriving, before anything was written.
    CancelUnwritten,
    /// `cancel` while it is arriving and was written: refused, and then with `--discard-writes`.
    CancelDiscard,
    /// The same, begun while the link is cut.
    CancelCut,
    /// `cancel` when all of it is there, before anything was written.
    CancelComplete,
    /// `cancel` in the middle of the hand-over, and sometimes a kill.
    CancelHandOver,
    /// `volume remove`, and the same image added again.
    RemoveReAdd,
    /// `volume remove`, and another image added under the name.
    RemoveOther,
    /// `volume remove`, and the image added at a site that it had left: with `--again`.
    AddElsewhere,
    /// Another file at the image's path while the owner is down.
    SwapAtHome,
    /// The same at the source of a relocation.
    SwapAtSource,
    /// The same at the destination of a relocation.
    SwapAtDestination,
    /// The destination is lost, the source reclaims, and the destination comes back.
    ReclaimAtSource,
    /// The source is lost, the destination reclaims, and the source comes back.
    ReclaimAtDestination,
    /// All of it arrives, and it goes on to the third site while the first one still has what it released.
    Hop,
    /// Verbs that make no sense now.
    Refused,
}

/// All of them.
pub const ALL: [Verb; 15] = [
    Verb::CancelUnwritten,
    Verb::CancelDiscard,
    Verb::CancelCut,
    Verb::CancelComplete,
    Verb::CancelHandOver,
    Verb::RemoveReAdd,
    Verb::RemoveOther,
    Verb::AddElsewhere,
    Verb::SwapAtHome,
    Verb::SwapAtSource,
    Verb::SwapAtDestination,
    Verb::ReclaimAtSource,
    Verb::ReclaimAtDestination,
    Verb::Hop,
    Verb::Refused,
];

impl Verb {
    /// Whether it needs a relocation under way; the others need that there is none.
    pub fn is_under_way(self) -> bool {
        match self {
            Verb::CancelDiscard
            | Verb::CancelCut
            | Verb::SwapAtSource
            | Verb::SwapAtDestination
            | Verb::ReclaimAtSource
            | Verb::ReclaimAtDestination
            | Verb::Hop
            | Verb::Refused => true,
            Verb::CancelUnwritten
            | Verb::CancelComplete
            | Verb::CancelHandOver
            | Verb::RemoveReAdd
            | Verb::RemoveOther
            | Verb::AddElsewhere
            | Verb::SwapAtHome => false,
        }
    }

    /// As people say it.
    pub fn words(self) -> &'static str {
        match self {
            Verb::CancelUnwritten => "cancel while arriving",
            Verb::CancelDiscard => "cancel refused, then --discard-writes",
            Verb::CancelCut => "cancel --discard-writes, link cut",
            Verb::CancelComplete => "cancel when complete",
            Verb::CancelHandOver => "cancel during the hand-over",
            Verb::RemoveReAdd => "remove, the same image added",
            Verb::RemoveOther => "remove, another image added",
            Verb::AddElsewhere => "remove, added elsewhere --again",
            Verb::SwapAtHome => "image swapped at its owner",
            Verb::SwapAtSource => "image swapped at the source",
            Verb::SwapAtDestination => "image swapped at the destination",
            Verb::ReclaimAtSource => "reclaim at the source",
            Verb::ReclaimAtDestination => "reclaim at the destination",
            Verb::Hop => "hop to the third site",
            Verb::Refused => "verbs that have to be refused",
        }
    }
}

/// Verbs in a random order; each comes once before any comes again, as far as it is possible then.
#[derive(Default)]
pub struct Deck(Vec<Verb>);

impl Deck {
    /// The next that is possible.
    pub fn draw(&mut self, random: &mut Random, is_under_way: bool) -> Verb {
        loop {
            if let Some(at) = self.0.iter().position(|verb| verb.is_under_way() == is_under_way) {
                return self.0.remove(at);
            }
            let mut more = ALL.to_vec();
            for at in (1..more.len()).rev() {
                more.swap(at, random.below(at as u64 + 1) as usize);
            }
            self.0.extend(more);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_comes_before_one_comes_again() {
        let (mut deck, mut random) = (Deck::default(), Random::new(5));
        for (is_under_way, count) in [(true, 8), (false, 7)] {
            let mut drawn: Vec<Verb> = (0..count).map(|_| deck.draw(&mut random, is_under_way)).collect();
            drawn.sort();
            drawn.dedup();
            assert_eq!(drawn.len(), count);
            assert!(drawn.iter().all(|verb| verb.is_under_way() == is_under_way));
        }
    }
}
