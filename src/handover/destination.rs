//! The destination's end: to ask, to own, to give back, to go on without a peer that is lost. Must not know the source's end.

use super::{
    Answer, Came, Debt, Epoch, Facts, Job, Machine, No, Output, Owed, Phase, Question, Reply, State, Ticket, no,
};
use crate::core::ids::Name;
use crate::core::wire::Refusal;
use crate::seeded_bugs::{Bug, is_planted};

impl Machine {
    /// The record says [`State::Asking`]: the source is asked.
    pub(super) fn begin(&mut self, ticket: Ticket, take: bool) -> Vec<Output> {
        let State::Asking { from } = &self.held.state else { return no(ticket, No::NoWayBack) };
        let (peer, epoch) = (from.clone(), self.held.epoch);
        self.operators.push(ticket);
        let job = self.new_job();
        self.phase = Phase::Waiting(job);
        vec![Output::Ask { job, peer, question: Question::TakeOver { epoch, take } }]
    }

    /// The answer to a question of this site.
    pub(super) fn answered(&mut self, job: Job, answer: Answer) -> Vec<Output> {
        if self.phase != Phase::Waiting(job) {
            return Vec::new();
        }
        match self.held.state.clone() {
            State::Asking { from } => self.answered_take_over(from, answer),
            State::GivingBack { from, was_owner, is_complete } => {
                self.answered_give_back(from, was_owner, is_complete, answer)
            }
            _ => Vec::new(),
        }
    }

    fn answered_take_over(&mut self, from: Name, answer: Answer) -> Vec<Output> {
        let epoch = self.held.epoch;
        match answer {
            Answer::Done(holds) if holds == epoch => {
                self.phase = Phase::Resting;
                self.held.came = Some(Came { from: from.clone(), epoch });
                let mut outputs = self.change(epoch, State::Arriving { from }, None, true);
                outputs.extend(self.readmit());
                outputs.push(Output::Copy);
                outputs.extend(self.tell_operators(&Reply::Done(epoch)));
                outputs
            }
            // An answer to something else, or of a source that contradicts itself.
            Answer::Done(holds) => self.withdraw(from, No::Epoch { asked: epoch, holds }),
            Answer::Refused(_, why) if is_planted(Bug::RefusalBelieved) => {
                self.because = Some(why);
                self.given_back(from, epoch.next())
            }
            // That it was refused does not tell that it will not be granted: the question may be on its way twice.
            Answer::Refused(_, why) => self.withdraw(from, why),
        }
    }

    /// Makes certain that the source does not let go for this site any more.
    pub(super) fn withdraw(&mut self, from: Name, why: No) -> Vec<Output> {
        self.because = Some(why);
        let state = State::GivingBack { from: from.clone(), was_owner: false, is_complete: false };
        let mut outputs = self.change(self.held.epoch, state, None, false);
        outputs.extend(self.ask_to_take_back(from));
        outputs
    }

    pub(super) fn ask_to_take_back(&mut self, peer: Name) -> Vec<Output> {
        let job = self.new_job();
        self.phase = Phase::Waiting(job);
        vec![Output::Ask { job, peer, question: Question::GiveBack { epoch: self.held.epoch } }]
    }

    fn answered_give_back(&mut self, from: Name, was_owner: bool, is_complete: bool, answer: Answer) -> Vec<Output> {
        let epoch = self.held.epoch;
        let why = match answer {
            Answer::Done(holds) if !was_owner || holds == epoch.next() || is_planted(Bug::GivenBackToAnybody) => {
                return self.given_back(from, holds);
            }
            // Something newer holds there than what this site gives back. Either way it owns the volume no more; but what is
            // here may be all that there is of it, and stays.
            Answer::Done(holds) => {
                let holds = if holds.is_likely_after(epoch) { holds } else { epoch };
                return self.fence_off(from, holds.max(epoch.next()), false);
            }
            Answer::Refused(_, why) if !was_owner => {
                // The source never let go, and says that it does not know of it: it cannot let go any more.
                self.because.get_or_insert(why);
                return self.given_back(from, epoch.next());
            }
            Answer::Refused(holds, why) => match holds.filter(|holds| holds.is_likely_after(epoch)) {
                Some(holds) if holds.overrules(epoch) => return self.fence_off(from, holds, false),
                // Somebody else owns it since, by the source's account.
                Some(holds) if holds > epoch => return self.fence_off(from, holds, false),
                _ => why,
            },
        };
        // The source cannot take it: it has let go of its image. Nothing has changed hands, so this site is the owner still.
        self.phase = Phase::Resting;
        let state = if is_complete { State::Owned } else { State::Arriving { from } };
        let mut outputs = self.change(epoch, state, None, false);
        outputs.extend(self.readmit());
        if !is_complete {
            outputs.push(Output::Copy);
        }
        outputs.extend(self.tell_operators(&Reply::No(why)));
        outputs
    }

    /// The source has it, for certain, at `holds`. Nothing of it stays here.
    fn given_back(&mut self, from: Name, holds: Epoch) -> Vec<Output> {
        let reply = match self.because.take() {
            Some(why) => Reply::No(why),
            None => Reply::Done(holds),
        };
        let mut outputs = self.end(Some(from), None, true);
        outputs.extend(self.tell_operators(&reply));
        outputs
    }

    /// The time for the hand-over is over.
    pub(super) fn expired(&mut self) -> Vec<Output> {
        match self.held.state.clone() {
            State::Asking { from } => [vec![Output::StopAsking], self.withdraw(from, No::Expired)].concat(),
            _ => Vec::new(),
        }
    }

    pub(super) fn cancel(&mut self, ticket: Ticket, discard: bool, facts: &Facts) -> Vec<Output> {
        match (&self.phase, self.held.state.clone()) {
            (_, State::Asking { from }) => {
                let mut outputs = vec![Output::StopAsking];
                // Those who began it are told that it came to nothing; who cancels, that this succeeded.
                outputs.extend(self.tell_operators(&Reply::No(No::Withdrawn)));
                outputs.extend(self.withdraw(from, No::Withdrawn));
                self.because = None;
                self.operators.push(ticket);
                outputs
            }
            (Phase::Filling(..), _) => no(ticket, No::Reclaiming),
            (_, State::GivingBack { .. }) | (Phase::GivingUp { .. }, _) => {
                self.operators.push(ticket);
                Vec::new()
            }
            (Phase::Resting, State::Arriving { .. } | State::Owned) if self.way_back().is_some() => {
                // Before the fence: it would fail the guest's writes meanwhile.
                if facts.is_written && !discard {
                    return no(ticket, No::Written(facts.written_bytes));
                }
                let job = self.new_job();
                self.phase = Phase::GivingUp { job, discard };
                self.operators.push(ticket);
                vec![Output::Bar, Output::Fence { job, is_for_peer: false }]
            }
            (_, State::Owned) if self.handing_over_to().is_some() => {
                let to = self.handing_over_to().cloned().map_or(No::Removing, No::HandingOver);
                no(ticket, to)
            }
            (Phase::Removing(_), _) => no(ticket, No::Removing),
            _ => no(ticket, No::NoWayBack),
        }
    }

    /// No write is under way any more. Whether the disk could sync does not matter: what is here is thrown away.
    pub(super) fn fenced_to_give_back(&mut self, discard: bool, facts: &Facts) -> Vec<Output> {
        let Some(from) = self.way_back().cloned() else { return self.readmit() };
        if facts.is_written && !discard {
            let mut outputs = self.readmit();
            outputs.extend(self.tell_operators(&Reply::No(No::Written(facts.written_bytes))));
            return outputs;
        }
        let is_complete = self.held.state.is_complete();
        let mut outputs = Vec::new();
        if !is_complete {
            outputs.push(Output::StopCopy);
        }
        let state = State::GivingBack { from: from.clone(), was_owner: true, is_complete };
        outputs.extend(self.change(self.held.epoch, state, None, false));
        outputs.extend(self.ask_to_take_back(from));
        outputs
    }

    /// Every block is here, durably. The source is to hear of it, whatever becomes of the volume here.
    pub(super) fn arrived(&mut self) -> Vec<Output> {
        let State::Arriving { from } = self.held.state.clone() else { return Vec::new() };
        // A fence that is shut meanwhile is shut for a volume that is complete by then.
        let epoch = self.held.epoch;
        let owes = Debt { peer: from, what: Owed::Completed, epoch };
        let owes = Some(owes).filter(|_| !is_planted(Bug::DebtForgotten));
        let mut outputs = self.change(epoch, State::Owned, owes, false);
        outputs.push(Output::Offer);
        if matches!(self.phase, Phase::Filling(..)) {
            // It said so after it was stopped: nothing is lost.
            self.phase = Phase::Resting;
            outputs.extend(self.tell_operators(&Reply::No(No::NothingToReclaim)));
        }
        outputs
    }

    /// A peer says which epoch holds there. If that tells of a person's decision, this site owns the volume no more.
    pub(super) fn heard(&mut self, peer: &Name, epoch: Epoch) -> Vec<Output> {
        if self.held.knows(peer) && epoch.overrules(self.held.epoch) {
            return self.fence_off(peer.clone(), epoch, true);
        }
        Vec::new()
    }

    /// A person says that the other side is lost for good.
    pub(super) fn reclaim(&mut self, ticket: Ticket, epoch: Epoch, salt: u16) -> Vec<Output> {
        if epoch != self.held.epoch {
            return no(ticket, No::NotThisEpoch(self.held.epoch));
        }
        match (&self.phase, self.held.state.clone()) {
            (Phase::Filling(..), _) => {
                self.operators.push(ticket);
                Vec::new()
            }
            (Phase::Resting | Phase::Waiting(_), State::Released { to, .. }) => self.reclaim_now(ticket, to, salt),
            (Phase::Resting | Phase::Waiting(_), State::Fenced { by, is_complete: true }) => {
                self.reclaim_now(ticket, by, salt)
            }
            // It never owned anything: it lets go of the name. Should the source come back, it has let go to nobody.
            (_, State::Asking { from } | State::GivingBack { from, was_owner: false, .. }) => {
                let epoch = self.held.epoch;
                let mut outputs = vec![Output::StopAsking];
                outputs.extend(self.tell_operators(&Reply::No(No::Withdrawn)));
                outputs.extend(self.end(Some(from), None, true));
                outputs.push(Output::Reply(ticket, Reply::Done(epoch)));
                outputs
            }
            (_, State::GivingBack { from, was_owner: true, is_complete: true }) => {
                let mut outputs = vec![Output::StopAsking];
                outputs.extend(self.tell_operators(&Reply::No(No::Withdrawn)));
                outputs.extend(self.reclaim_now(ticket, from, salt));
                outputs
            }
            (
                Phase::Resting | Phase::Waiting(_),
                State::Arriving { .. } | State::GivingBack { .. } | State::Fenced { .. },
            ) => {
                let mut outputs = vec![Output::StopAsking, Output::StopCopy];
                outputs.extend(self.tell_operators(&Reply::No(No::Withdrawn)));
                let job = self.new_job();
                self.phase = Phase::Filling(job, salt);
                self.operators.push(ticket);
                outputs.push(Output::Fill(job));
                outputs
            }
            (Phase::Resting, State::Owned) => no(ticket, No::NothingToReclaim),
            (_, _) => no(ticket, self.handing_over_to().cloned().map_or(No::Removing, No::HandingOver)),
        }
    }

    fn reclaim_now(&mut self, ticket: Ticket, other: Name, salt: u16) -> Vec<Output> {
        self.operators.push(ticket);
        self.phase = Phase::Resting;
        self.because = None;
        let epoch = self.held.epoch.reclaimed(salt);
        if epoch == self.held.epoch {
            return self.tell_operators(&Reply::No(No::NotThisEpoch(epoch)));
        }
        self.held.lent.insert(other.clone());
        let owes = Debt { peer: other, what: Owed::Reclaimed, epoch };
        let mut outputs = self.change(epoch, State::Owned, Some(owes), true);
        outputs.extend(self.readmit());
        outputs.push(Output::Offer);
        outputs.extend(self.tell_operators(&Reply::Done(epoch)));
        outputs
    }

    /// What never arrived reads as zeros from now on, durably.
    pub(super) fn filled(&mut self, job: Job, done: Result<(), No>) -> Vec<Output> {
        let Phase::Filling(at, salt) = self.phase else { return Vec::new() };
        if at != job {
            return Vec::new();
        }
        self.phase = Phase::Resting;
        let other = match &self.held.state {
            State::Arriving { from } | State::GivingBack { from, .. } => from.clone(),
            State::Fenced { by, .. } => by.clone(),
            _ => return self.tell_operators(&Reply::No(No::NothingToReclaim)),
        };
        match (done, self.operators.pop()) {
            (Ok(()), Some(ticket)) => self.reclaim_now(ticket, other, salt),
            (Ok(()), None) => Vec::new(),
            (Err(why), ticket) => {
                self.operators.extend(ticket);
                let mut outputs = self.tell_operators(&Reply::No(why));
                match self.held.state.clone() {
                    State::Arriving { .. } => outputs.push(Output::Copy),
                    State::GivingBack { from, .. } => outputs.extend(self.ask_to_take_back(from)),
                    _ => {}
                }
                outputs
            }
        }
    }
}

impl Answer {
    /// Whether asking the same again, later and without anybody doing anything, may be answered otherwise.
    pub fn is_passing(&self) -> bool {
        match self {
            Answer::Done(_) => false,
            Answer::Refused(_, No::Peer { refusal, .. }) => refusal.is_transient(),
            Answer::Refused(_, no) => {
                let refusal: Refusal = no.refusal();
                refusal.is_transient()
            }
        }
    }
}
