//! What may happen to the sites of a relocation and the links between them, and how often. Pure.

use blockferry_lab::random::Random;
use serde::Serialize;

/// One thing that goes wrong and is mended again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// SIGKILL at the destination.
    DestinationKilled,
    /// And once more while it starts.
    DestinationKilledTwice,
    /// SIGTERM at the destination, and a new start.
    DestinationStopped,
    /// SIGKILL at the source; the destination's clients go on.
    SourceKilled,
    /// SIGKILL at both, in either order.
    BothKilled,
    /// SIGKILL at the destination, and its whole store deleted.
    StoreLost,
    /// Nothing passes for less than the connection survives.
    LinkCut,
    /// Nothing passes until the connection is given up, and then some.
    LinkDead,
    /// Next to nothing passes for a while.
    LinkStalled,
    /// The link is cut, the destination killed, and both come back one after the other.
    LinkCutDestinationKilled,
    /// SIGKILL at the site that has nothing to do with it.
    BystanderKilled,
    /// SIGKILL at the owner, before the disk goes anywhere.
    OwnerKilled,
    /// SIGKILL at one of them, or both, in the middle of the hand-over.
    HandOverKilled,
}

/// Those that need a relocation under way, with their weights.
const WEIGHTS: [(Kind, u64); 11] = [
    (Kind::DestinationKilled, 30),
    (Kind::SourceKilled, 14),
    (Kind::BothKilled, 12),
    (Kind::DestinationKilledTwice, 8),
    (Kind::StoreLost, 8),
    (Kind::LinkCut, 8),
    (Kind::LinkDead, 6),
    (Kind::LinkStalled, 5),
    (Kind::LinkCutDestinationKilled, 5),
    (Kind::DestinationStopped, 4),
    (Kind::BystanderKilled, 3),
];

impl Kind {
    /// Draws one.
    pub fn draw(random: &mut Random) -> Kind {
        let mut at = random.below(WEIGHTS.iter().map(|(_, weight)| weight).sum());
        for (kind, weight) in WEIGHTS {
            if at < weight {
                return kind;
            }
            at -= weight;
        }
        Kind::DestinationKilled
    }

    /// As people say it.
    pub fn words(self) -> &'static str {
        match self {
            Kind::DestinationKilled => "destination killed",
            Kind::DestinationKilledTwice => "destination killed, and again while it started",
            Kind::DestinationStopped => "destination stopped in order",
            Kind::SourceKilled => "source killed",
            Kind::BothKilled => "both killed",
            Kind::StoreLost => "destination killed, store deleted",
            Kind::LinkCut => "link cut for a moment",
            Kind::LinkDead => "link dead",
            Kind::LinkStalled => "link stalled",
            Kind::LinkCutDestinationKilled => "link cut, destination killed",
            Kind::BystanderKilled => "third site killed",
            Kind::OwnerKilled => "owner killed, nothing under way",
            Kind::HandOverKilled => "killed during the hand-over",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_drawn() {
        let mut random = Random::new(1);
        let drawn: std::collections::BTreeSet<Kind> = (0..1000).map(|_| Kind::draw(&mut random)).collect();
        assert_eq!(drawn.len(), WEIGHTS.len());
    }
}
