//! What a site says, remembers and owes of a volume that is not here, and what becomes of what it owes. Must not know a machine.

use super::{Answer, Debt, Epoch, Held, Left, No, Owed, Question, State};
use crate::core::ids::Name;
use crate::core::wire::Refusal;
use crate::seeded_bugs::{Bug, is_planted};

/// What becomes of a debt after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The peer knows, or needs not know any more.
    Settled,
    /// And a person's decision holds there that is ahead of what was to be told: it is heard here ([`super::Input::Heard`]).
    Overruled(Epoch),
    /// It is to be told again.
    Again,
}

/// See [`Outcome`].
pub fn outcome(debt: &Debt, answer: &Answer) -> Outcome {
    match answer {
        Answer::Done(_) => Outcome::Settled,
        Answer::Refused(Some(holds), _) if holds.overrules(debt.epoch) => Outcome::Overruled(*holds),
        Answer::Refused(Some(holds), _) if *holds > debt.epoch => Outcome::Settled,
        // It has no such volume and remembers none: it waits for nothing.
        Answer::Refused(None, No::Peer { refusal: Refusal::UnknownVolume, .. } | No::Unknown) => Outcome::Settled,
        Answer::Refused(..) => Outcome::Again,
    }
}

/// What is to be durable before a question is answered: what is remembered from now on, and what is owed.
pub type Noted = (Left, Option<Debt>);

/// A question of `peer` about a volume that is not here. What is remembered of it decides.
pub fn without_volume(peer: &Name, question: &Question, left: Option<&Left>) -> (Answer, Option<Noted>) {
    let Some(left) = left else { return (Answer::Refused(None, No::Unknown), None) };
    let answer = match question {
        // It was told before, or needs to be told no more: nothing here waits for it.
        Question::Completed { epoch } | Question::GiveBack { epoch } if left.epoch > *epoch => Answer::Done(left.epoch),
        Question::Completed { .. } => Answer::Done(left.epoch),
        // Another person decided, too, and that decision wins: the peer is to hear of it.
        Question::Reclaimed { epoch } if left.epoch.overrules(*epoch) => {
            Answer::Refused(Some(left.epoch), No::Reclaimed { by: peer.clone(), epoch: left.epoch })
        }
        Question::Reclaimed { epoch } => {
            return (Answer::Done((*epoch).max(left.epoch)), overruled(peer, *epoch, left));
        }
        Question::GiveBack { .. } | Question::TakeOver { .. } => Answer::Refused(Some(left.epoch), No::Unknown),
    };
    (answer, None)
}

/// A person decided at `peer`. Whoever has the volume from here does not know that by itself.
fn overruled(peer: &Name, epoch: Epoch, left: &Left) -> Option<Noted> {
    let is_known = left.known.contains(peer) || left.to.as_ref() == Some(peer);
    if !is_known || !epoch.overrules(left.epoch) {
        return None;
    }
    let mut known = left.known.clone();
    known.remove(peer);
    let other = left.to.clone().filter(|to| to != peer);
    known.extend(other.clone());
    let owes = other.map(|peer| Debt { peer, what: Owed::Reclaimed, epoch });
    Some((Left { to: Some(peer.clone()), epoch, known }, owes))
}

/// What is journalled of an image that is served under a name from now on; `left` is what is remembered of what was here.
///
/// Two epochs ahead of what was seen: what is still on its way about the earlier volume speaks of the epoch between them at most. Whoever
/// had that may have kept it: what a person decides there is heard here, and passed on.
pub fn adding(left: Option<&Left>) -> Held {
    let Some(left) = left else { return Held::new(Epoch::FIRST, State::Owned) };
    let mut held = Held::new(left.epoch.next().next(), State::Owned);
    held.lent = left.known.iter().chain(&left.to).cloned().collect();
    held
}

/// The site at which a volume of this name may be written: to serve another one here is for a person to say.
pub fn may_be_at(left: Option<&Left>) -> Option<&Name> {
    if is_planted(Bug::LeftForgotten) { None } else { left?.to.as_ref() }
}

/// What is journalled before `from`, where the volume is at `at`, is asked for it, and what is owed from then on. `before` was let go of
/// here, `left` is what is remembered of what was here.
pub fn asking(from: &Name, at: Epoch, before: Option<&Held>, left: Option<&Left>) -> Result<(Held, Option<Debt>), No> {
    let epoch = at.next();
    if !epoch.leaves_room() {
        return Err(No::Epoch { asked: epoch, holds: at });
    }
    let last = before.map(|held| held.epoch).max(left.map(|left| left.epoch)).unwrap_or(Epoch(0));
    if epoch <= last {
        // An old copy of it: what was seen here since is ahead.
        return Err(No::Epoch { asked: epoch, holds: last });
    }
    let owner = match (before.map(|held| &held.state), left) {
        (Some(State::Released { to, .. }), _) => Some(to.clone()),
        (None, Some(left)) => left.to.clone(),
        _ => None,
    };
    let mut held = Held::new(epoch, State::Asking { from: from.clone() });
    held.lent.extend(before.map(Held::others).unwrap_or_default());
    held.lent.extend(left.map(|left| left.known.clone()).unwrap_or_default());
    held.lent.extend(owner.clone());
    held.lent.remove(from);
    // Whoever had it from here may not know of the decision that lies between.
    let owes = owner.filter(|owner| owner != from && last != Epoch(0) && at.overrules(last)).map(|peer| Debt {
        peer,
        what: Owed::Reclaimed,
        epoch: at,
    });
    Ok((held, owes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn debt() -> Debt {
        Debt { peer: "a".parse().expect("a name"), what: Owed::Completed, epoch: Epoch(2) }
    }

    fn refused(holds: Option<Epoch>, refusal: Refusal) -> Answer {
        let no = No::Peer { peer: "a".parse().expect("a name"), refusal, why: String::new() };
        Answer::Refused(holds, no)
    }

    #[test]
    fn only_an_answer_that_cannot_change_settles_a_debt() {
        let debt = debt();
        assert_eq!(outcome(&debt, &Answer::Done(Epoch(2))), Outcome::Settled);
        assert_eq!(outcome(&debt, &refused(None, Refusal::UnknownVolume)), Outcome::Settled);
        assert_eq!(
            outcome(&debt, &refused(Some(Epoch(3)), Refusal::NotOwner)),
            Outcome::Settled,
            "it holds anew there"
        );
        let reclaimed = Epoch(2).reclaimed(0);
        assert_eq!(outcome(&debt, &refused(Some(reclaimed), Refusal::Reclaimed)), Outcome::Overruled(reclaimed));
        for refusal in [Refusal::Busy, Refusal::Internal, Refusal::NotOwner, Refusal::ShuttingDown] {
            assert_eq!(outcome(&debt, &refused(Some(Epoch(2)), refusal)), Outcome::Again, "{refusal:?}");
            assert_eq!(outcome(&debt, &refused(None, refusal)), Outcome::Again, "{refusal:?}");
        }
    }
}
