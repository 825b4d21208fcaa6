//! The source's end: who asks to take over, to give back, to be believed that all has arrived. Must not know the destination's end.

use super::{
    Answer, Asker, Debt, Epoch, Facts, Job, Machine, No, Output, Owed, Phase, Question, Reply, State, Ticket, no,
};
use crate::core::ids::Name;
use crate::seeded_bugs::{Bug, is_planted};

impl Asker {
    /// Looked at again after all that takes time: a guest may have begun to use it meanwhile.
    fn may_take(&self, facts: &Facts) -> Result<(), No> {
        match facts.clients {
            0 => Ok(()),
            _ if self.take || is_planted(Bug::TakenFromClients) => Ok(()),
            clients => Err(No::InUse(clients)),
        }
    }
}

impl Machine {
    pub(super) fn asked(
        &mut self,
        ticket: Ticket,
        peer: Name,
        is_granted: bool,
        question: Question,
        facts: &Facts,
    ) -> Vec<Output> {
        // Who has to do with the volume is heard whatever the configuration says by now.
        if !is_granted && !self.held.knows(&peer) {
            return self.refuse(ticket, No::Unknown);
        }
        match question {
            Question::TakeOver { epoch, take } => self.take_over(ticket, peer, is_granted, epoch, take, facts),
            Question::GiveBack { epoch } => self.give_back(ticket, &peer, epoch),
            Question::Completed { epoch } => self.completed(ticket, &peer, epoch),
            Question::Reclaimed { epoch } => self.reclaimed_elsewhere(ticket, &peer, epoch),
        }
    }

    fn take_over(
        &mut self,
        ticket: Ticket,
        peer: Name,
        is_granted: bool,
        epoch: Epoch,
        take: bool,
        facts: &Facts,
    ) -> Vec<Output> {
        match &mut self.phase {
            // Asked once more, on another connection perhaps.
            Phase::Preparing(_, asker) | Phase::Fencing(_, asker) if asker.peer == peer && asker.epoch == epoch => {
                asker.tickets.push(ticket);
                asker.take |= take;
                return Vec::new();
            }
            Phase::Preparing(_, asker) | Phase::Fencing(_, asker) => {
                let to = asker.peer.clone();
                return self.refuse(ticket, No::HandingOver(to));
            }
            Phase::Removing(_) => return self.refuse(ticket, No::Removing),
            _ => {}
        }
        match &self.held.state {
            // The answer was lost: it is the same again.
            State::Released { to, .. } if *to == peer && self.held.epoch == epoch => return self.done(ticket),
            State::Released { to, .. } => {
                let to = to.clone();
                return self.refuse(ticket, No::OwnedBy(to));
            }
            State::Asking { from } | State::Arriving { from } => {
                let from = from.clone();
                return self.refuse(ticket, No::Arriving(from));
            }
            State::GivingBack { from, .. } => {
                let from = from.clone();
                return self.refuse(ticket, No::GivingBack(from));
            }
            State::Fenced { by, .. } => {
                let by = by.clone();
                return self.refuse(ticket, No::OwnedBy(by));
            }
            State::Owned => {}
        }
        if matches!(self.phase, Phase::GivingUp { .. }) {
            let from = self.way_back().cloned().unwrap_or_else(|| peer.clone());
            return self.refuse(ticket, No::GivingBack(from));
        }
        if !epoch.follows(self.held.epoch) {
            return self.refuse(ticket, No::Epoch { asked: epoch, holds: self.held.epoch });
        }
        if !is_granted {
            return self.refuse(ticket, No::Unknown);
        }
        if !facts.has_image {
            return self.refuse(ticket, No::NoImage);
        }
        if self.is_doubted {
            return self.refuse(ticket, No::Clone);
        }
        let asker = Asker { peer, epoch, take, tickets: vec![ticket] };
        if let Err(no) = asker.may_take(facts) {
            return self.refuse(ticket, no);
        }
        let job = self.new_job();
        self.phase = Phase::Preparing(job, asker);
        vec![Output::Prepare(job)]
    }

    pub(super) fn prepared(&mut self, job: Job, done: Result<(), No>, facts: &Facts) -> Vec<Output> {
        match std::mem::take(&mut self.phase) {
            Phase::Preparing(at, asker) if at == job => match done.and_then(|()| asker.may_take(facts)) {
                Ok(()) => {
                    let job = self.new_job();
                    self.phase = Phase::Fencing(job, asker);
                    vec![Output::Bar, Output::Fence { job, is_for_peer: true }]
                }
                Err(why) => self.refuse_all(asker.tickets, &why),
            },
            phase => {
                self.phase = phase;
                Vec::new()
            }
        }
    }

    /// The fence for a peer: everything is durable, and the image is what was announced.
    fn fenced_for_peer(&mut self, asker: Asker, done: Result<(), No>, facts: &Facts) -> Vec<Output> {
        match done.and_then(|()| asker.may_take(facts)) {
            Ok(()) => {
                self.held.lent.insert(asker.peer.clone());
                let state = State::Released { to: asker.peer, is_completed: false };
                let mut outputs = self.change(asker.epoch, state, None, false);
                let answer = Reply::Peer(Answer::Done(asker.epoch));
                outputs.extend(asker.tickets.into_iter().map(|ticket| Output::Reply(ticket, answer.clone())));
                if is_planted(Bug::AnswerBeforeJournal) {
                    outputs.reverse();
                }
                outputs
            }
            Err(why) => [self.readmit(), self.refuse_all(asker.tickets, &why)].concat(),
        }
    }

    /// The connection over which somebody asked is gone: nobody would hear the answer, and guests would be kept out for nothing.
    pub(super) fn hung(&mut self, ticket: Ticket) -> Vec<Output> {
        let (Phase::Preparing(_, asker) | Phase::Fencing(_, asker)) = &mut self.phase else { return Vec::new() };
        asker.tickets.retain(|waiting| *waiting != ticket);
        if !asker.tickets.is_empty() {
            return Vec::new();
        }
        self.phase = Phase::Resting;
        self.readmit()
    }

    /// After this is answered, the peer does not own the volume at `epoch`, and never will.
    fn give_back(&mut self, ticket: Ticket, peer: &Name, epoch: Epoch) -> Vec<Output> {
        let holds = self.held.epoch;
        let is_asking = |asker: &Asker| asker.peer == *peer && asker.epoch == epoch;
        let mut withdrawn = Vec::new();
        if let Phase::Preparing(_, asker) | Phase::Fencing(_, asker) = &self.phase
            && is_asking(asker)
        {
            let tickets = asker.tickets.clone();
            self.phase = Phase::Resting;
            withdrawn = self.refuse_all(tickets, &No::Withdrawn);
        }
        match &self.held.state {
            State::Released { to, .. } if to == peer && epoch == holds => {
                let mut outputs = self.change(epoch.next(), State::Owned, None, true);
                outputs.extend(self.readmit());
                outputs.extend(self.done(ticket));
                outputs
            }
            // It was given back before, or was never this peer's: whoever has it now has it since.
            _ if holds >= epoch => self.done(ticket),
            // Never taken. It must not be taken any more: the question may still be on its way on an earlier connection.
            State::Owned if epoch.follows(holds) && matches!(self.phase, Phase::Resting) => {
                let mut outputs = withdrawn;
                let after = if is_planted(Bug::WithdrawalForgotten) { holds } else { epoch.next() };
                outputs.extend(self.change(after, State::Owned, None, false));
                outputs.extend(self.readmit());
                outputs.extend(self.done(ticket));
                outputs
            }
            // Another peer's hand-over at the same epoch is under way, or a removal: asked again, the answer is known.
            State::Owned if epoch.follows(holds) => {
                let why = self.handing_over_to().cloned().map_or(No::Removing, No::HandingOver);
                self.refuse(ticket, why)
            }
            // What is not owned here cannot have been handed to the peer from here at an epoch that this site has not seen.
            State::Released { to, .. } => {
                let to = to.clone();
                self.refuse(ticket, No::OwnedBy(to))
            }
            // It may be owned here at the epoch before by and by: a question that is still on its way could be granted then.
            State::Arriving { from } | State::Asking { from } => {
                let from = from.clone();
                self.refuse(ticket, No::Arriving(from))
            }
            State::GivingBack { from, .. } => {
                let from = from.clone();
                self.refuse(ticket, No::GivingBack(from))
            }
            _ => self.refuse(ticket, No::Epoch { asked: epoch, holds }),
        }
    }

    fn completed(&mut self, ticket: Ticket, peer: &Name, epoch: Epoch) -> Vec<Output> {
        let holds = self.held.epoch;
        match &self.held.state {
            State::Released { to, is_completed: true } if to == peer && epoch == holds => self.done(ticket),
            State::Released { to, .. } if to == peer && epoch == holds => {
                let state = State::Released { to: peer.clone(), is_completed: true };
                let mut outputs = self.change(epoch, state, None, false);
                outputs.extend(self.done(ticket));
                outputs
            }
            // Something newer holds: a person reclaimed it, say. The peer is told which epoch.
            _ if holds.overrules(epoch) => {
                let by = peer.clone();
                self.refuse(ticket, No::Reclaimed { by, epoch: holds })
            }
            // It was given back since: nothing here waits for the peer's blocks any more.
            _ if holds > epoch => self.done(ticket),
            _ => self.refuse(ticket, No::Epoch { asked: epoch, holds }),
        }
    }

    /// At the peer a person decided that the volume is there. Believed only of sites that had it, and only forwards.
    fn reclaimed_elsewhere(&mut self, ticket: Ticket, peer: &Name, epoch: Epoch) -> Vec<Output> {
        let holds = self.held.epoch;
        if holds.overrules(epoch) {
            // Another person decided, too, and that decision wins: the peer is to hear of it.
            return self.refuse(ticket, No::Reclaimed { by: peer.clone(), epoch: holds });
        }
        if holds >= epoch {
            return self.done(ticket);
        }
        if !self.held.knows(peer) || !epoch.overrules(holds) {
            return self.refuse(ticket, No::Epoch { asked: epoch, holds });
        }
        let mut outputs = self.fence_off(peer.clone(), epoch, false);
        outputs.extend(self.done(ticket));
        outputs
    }

    /// Another site owns it by a person's decision. Whoever got it from here, or is believed to own it, is told, too; else, if the other site
    /// does not know that it was heard, that site.
    pub(super) fn fence_off(&mut self, by: Name, epoch: Epoch, is_overheard: bool) -> Vec<Output> {
        let why = No::Reclaimed { by: by.clone(), epoch };
        let mut outputs = match std::mem::take(&mut self.phase) {
            Phase::Preparing(_, asker) | Phase::Fencing(_, asker) => self.refuse_all(asker.tickets, &why),
            Phase::Waiting(_) => vec![Output::StopAsking],
            _ => Vec::new(),
        };
        let owes = match &self.held.state {
            State::Released { to: owner, .. }
            | State::Fenced { by: owner, .. }
            | State::Asking { from: owner }
            | State::GivingBack { from: owner, .. }
                if *owner != by =>
            {
                Some(Debt { peer: owner.clone(), what: Owed::Reclaimed, epoch })
            }
            _ if is_overheard => Some(Debt { peer: by.clone(), what: Owed::Reclaimed, epoch }),
            _ => None,
        };
        match &self.held.state {
            // It never owned anything, so there is nothing that a person could want of it.
            State::Asking { from } | State::GivingBack { from, was_owner: false, .. } => {
                self.held.epoch = epoch;
                self.held.lent.insert(from.clone());
                outputs.extend(self.end(Some(by), owes, true));
                outputs.extend(self.tell_operators(&Reply::No(why)));
                return outputs;
            }
            State::Arriving { .. } => outputs.push(Output::StopCopy),
            _ => {}
        }
        let is_complete = self.held.state.is_complete();
        self.held.lent.insert(by.clone());
        outputs.extend(self.change(epoch, State::Fenced { by, is_complete }, owes, false));
        outputs.extend(self.tell_operators(&Reply::No(why)));
        outputs
    }

    pub(super) fn remove(&mut self, ticket: Ticket, facts: &Facts) -> Vec<Output> {
        match (&self.phase, &self.held.state) {
            (Phase::Removing(_), _) => {
                self.operators.push(ticket);
                Vec::new()
            }
            (Phase::Preparing(_, asker) | Phase::Fencing(_, asker), _) => {
                let to = asker.peer.clone();
                no(ticket, No::HandingOver(to))
            }
            (Phase::Filling(..), _) => no(ticket, No::Reclaiming),
            (_, State::Owned) if facts.clients > 0 => no(ticket, No::InUse(facts.clients)),
            (Phase::Resting, State::Owned) => {
                let job = self.new_job();
                self.phase = Phase::Removing(job);
                self.operators.push(ticket);
                vec![Output::Bar, Output::Fence { job, is_for_peer: false }]
            }
            (_, State::Released { to, is_completed: true }) => {
                let (to, epoch) = (to.clone(), self.held.epoch);
                let mut outputs = self.end(Some(to), None, false);
                outputs.push(Output::Reply(ticket, Reply::Done(epoch)));
                outputs
            }
            (_, State::Released { to, .. }) => {
                let to = to.clone();
                no(ticket, No::Needed(to))
            }
            (_, State::Fenced { by, .. }) => {
                let (by, epoch) = (by.clone(), self.held.epoch);
                let mut outputs = self.end(Some(by), None, false);
                outputs.push(Output::Reply(ticket, Reply::Done(epoch)));
                outputs
            }
            (_, State::Asking { from } | State::Arriving { from }) => {
                let from = from.clone();
                no(ticket, No::Arriving(from))
            }
            (_, State::GivingBack { from, .. }) => {
                let from = from.clone();
                no(ticket, No::GivingBack(from))
            }
            (_, State::Owned) => no(ticket, self.way_back().cloned().map_or(No::Removing, No::GivingBack)),
        }
    }

    fn fenced_to_remove(&mut self, done: Result<(), No>, facts: &Facts) -> Vec<Output> {
        let is_free = if facts.clients > 0 { Err(No::InUse(facts.clients)) } else { Ok(()) };
        match done.and(is_free) {
            Ok(()) => {
                let epoch = self.held.epoch;
                let mut outputs = self.end(None, None, false);
                outputs.extend(self.tell_operators(&Reply::Done(epoch)));
                outputs
            }
            Err(why) => {
                let mut outputs = self.readmit();
                outputs.extend(self.tell_operators(&Reply::No(why)));
                outputs
            }
        }
    }

    /// Which way the fence was shut for, and what follows.
    pub(super) fn fenced(&mut self, job: Job, done: Result<(), No>, facts: &Facts) -> Vec<Output> {
        match std::mem::take(&mut self.phase) {
            Phase::Fencing(at, asker) if at == job || is_planted(Bug::StaleFenceBelieved) => {
                self.fenced_for_peer(asker, done, facts)
            }
            Phase::Removing(at) if at == job => self.fenced_to_remove(done, facts),
            Phase::GivingUp { job: at, discard } if at == job => self.fenced_to_give_back(discard, facts),
            phase => {
                self.phase = phase;
                Vec::new()
            }
        }
    }

    fn done(&self, ticket: Ticket) -> Vec<Output> {
        vec![Output::Reply(ticket, Reply::Peer(Answer::Done(self.held.epoch)))]
    }

    fn refuse(&self, ticket: Ticket, why: No) -> Vec<Output> {
        vec![Output::Reply(ticket, Reply::Peer(Answer::Refused(Some(self.held.epoch), why)))]
    }

    fn refuse_all(&self, tickets: Vec<Ticket>, why: &No) -> Vec<Output> {
        tickets.into_iter().flat_map(|ticket| self.refuse(ticket, why.clone())).collect()
    }
}
