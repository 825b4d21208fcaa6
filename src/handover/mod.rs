//! Who owns a volume: one pure machine for each site that has to do with it. Must not know anything but `core`.
//!
//! The machine is told what peers ask, what operators want and what became of the work ([`Input`]), and says what is to be done, in
//! order ([`Output`]). It has no clock, no I/O, no threads. `node` and the simulation drive it; a model test explores every
//! interleaving of two and three of them over a network that loses, repeats and reorders.
//!
//! ```text
//!          source                                     destination
//!   Owned (e)                                   Asking (e+1)
//!     | <---------------- TakeOver(e+1) ---------- |
//!   prepares: writes the cache back             |
//!   fences, syncs                               |
//!   Released (e+1)                              |
//!     | ----------------- Done(e+1) ------------> |
//!     |                                         Arriving (e+1)  every block comes  Owned (e+1)
//!     | <---------------- Completed(e+1) -------- |               owed until it is answered
//!   Released, completed
//! ```
//!
//! The way back is `GiveBack(e+1)`: the destination is no owner any more before it asks, the source is the owner at `e+2` before it answers. It also
//! withdraws a take-over that was not answered: after it, no take-over at `e+1` succeeds, in whatever order the questions arrive.
//!
//! | rule | where |
//! |---|---|
//! | what is said is durable before | [`Output::Journal`] stands in front |
//! | who might not be the owner admits nothing | [`Output::Bar`] stands in front of the journal, [`Output::Admit`] behind it |
//! | a decided step is not undone | what could not be journalled is tried again, [`Input::Tick`] |
//! | a person can always go on | [`Verb::Reclaim`], ahead of all that the other side does by itself |

mod absent;
mod destination;
mod epoch;
mod no;
mod source;
mod types;

pub use absent::{Outcome, adding, asking, may_be_at, outcome, without_volume};
pub use epoch::{Epoch, Generation};
pub use no::No;
pub use types::{
    Answer, Came, Debt, Facts, Held, Input, Job, Left, Output, Owed, Question, Reply, Row, State, Ticket, Verb,
};

use crate::core::ids::Name;
use crate::seeded_bugs::{Bug, is_planted};

/// See the module. Everything in it but [`Machine::held`] is forgotten by a crash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    held: Held,
    phase: Phase,
    /// Who waits for the end of what is under way, at this site.
    operators: Vec<Ticket>,
    /// Why a relocation is withdrawn: what those who began it are told.
    because: Option<No>,
    /// Another instance with this site's identity is about.
    is_doubted: bool,
    /// What could not be journalled, and what follows it.
    unsure: Option<Box<(Row, Vec<Output>)>>,
    /// What ended meanwhile: heard, one for each tick, when that is journalled.
    late: Vec<Input>,
    next_job: u32,
    /// Nothing is here any more.
    has_ended: bool,
}

/// What is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Phase {
    #[default]
    Resting,
    /// Source: the cache is being written back for a peer.
    Preparing(Job, Asker),
    /// Source: the fence is shut for a peer.
    Fencing(Job, Asker),
    /// The fence is shut to give the volume back.
    GivingUp { job: Job, discard: bool },
    /// The fence is shut to remove the volume.
    Removing(Job),
    /// What never arrived is being given up.
    Filling(Job, u16),
    /// A question to a peer is open.
    Waiting(Job),
}

/// A peer that wants to take over.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Asker {
    peer: Name,
    epoch: Epoch,
    /// Whether it was told to take it from clients that use it here.
    take: bool,
    tickets: Vec<Ticket>,
}

impl Machine {
    /// A volume as the journal has it, when a site starts, and what to do first.
    pub fn restore(held: Held) -> (Machine, Vec<Output>) {
        let mut machine = Machine::new(held);
        let outputs = match machine.held.state.clone() {
            State::Owned => vec![Output::Admit],
            State::Arriving { .. } => vec![Output::Admit, Output::Copy],
            State::Released { .. } | State::Fenced { .. } => Vec::new(),
            // Whoever began it is told nothing any more: it is withdrawn.
            State::Asking { from } => machine.withdraw(from, No::ShuttingDown),
            State::GivingBack { from, .. } => machine.ask_to_take_back(from),
        };
        (machine, outputs)
    }

    /// A volume whose record was just written: nothing has to be done first.
    pub fn new(held: Held) -> Machine {
        Machine {
            held,
            phase: Phase::Resting,
            operators: Vec::new(),
            because: None,
            is_doubted: false,
            unsure: None,
            late: Vec::new(),
            next_job: 0,
            has_ended: false,
        }
    }

    /// What is journalled, or is about to be.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Whether nothing of the volume is here any more: no input has an effect.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Whether something waits to be journalled, or to be heard after that: [`Input::Tick`] goes on.
    pub fn is_unsure(&self) -> bool {
        self.unsure.is_some() || !self.late.is_empty()
    }

    /// The peer to which the volume is being handed over at this moment.
    pub fn handing_over_to(&self) -> Option<&Name> {
        match &self.phase {
            Phase::Preparing(_, asker) | Phase::Fencing(_, asker) => Some(&asker.peer),
            _ => None,
        }
    }

    /// Whether guests' writes are admitted, as far as this machine decides.
    pub fn admits(&self) -> bool {
        let is_shut = matches!(self.phase, Phase::Fencing(..) | Phase::GivingUp { .. } | Phase::Removing(_))
            || self.unsure.is_some()
            || self.is_doubted
            || self.has_ended;
        self.held.state.is_owner() && !is_shut
    }

    /// Whether the source could take the volume back: it is still what this site took over.
    pub fn way_back(&self) -> Option<&Name> {
        self.held.way_back()
    }

    /// Decides. The outputs are to be carried out in their order before the next input.
    pub fn handle(&mut self, input: Input, facts: &Facts) -> Vec<Output> {
        // The end, too, is to be journalled.
        if self.unsure.is_some() {
            return self.handle_unsure(input);
        }
        if self.has_ended {
            return self.answer_after_the_end(input);
        }
        let input = match input {
            Input::Tick if !self.late.is_empty() => self.late.remove(0),
            input => input,
        };
        match input {
            Input::Begin(ticket, take) => self.begin(ticket, take),
            Input::Asked { ticket, peer, is_granted, question } => {
                self.asked(ticket, peer, is_granted, question, facts)
            }
            Input::Hung(ticket) => self.hung(ticket),
            Input::Told(ticket, Verb::Remove) => self.remove(ticket, facts),
            Input::Told(ticket, Verb::Cancel { discard }) => self.cancel(ticket, discard, facts),
            Input::Told(ticket, Verb::Reclaim { epoch, salt }) => self.reclaim(ticket, epoch, salt),
            Input::Prepared(job, done) => self.prepared(job, done, facts),
            Input::Fenced(job, done) => self.fenced(job, done, facts),
            Input::Filled(job, done) => self.filled(job, done),
            Input::Answered(job, answer) => self.answered(job, answer),
            Input::Expired => self.expired(),
            Input::Arrived => self.arrived(),
            Input::Heard(peer, epoch) => self.heard(&peer, epoch),
            Input::Doubted(is_doubted) => self.doubt(is_doubted),
            Input::Tick => Vec::new(),
        }
    }

    /// [`Output::Journal`] failed: whether the row is durable nobody knows. Nothing is admitted until it is, and what follows it waits.
    pub fn not_journalled(&mut self, row: Row, rest: Vec<Output>) -> Vec<Output> {
        self.unsure = Some(Box::new((row, rest)));
        vec![Output::Bar]
    }

    /// While something is not journalled only the clock is heard. Who asks is to ask again, what ends waits.
    fn handle_unsure(&mut self, input: Input) -> Vec<Output> {
        let no = || No::Journal("the last change of ownership is yet to be written".into());
        match input {
            Input::Tick => match self.unsure.take().map(|unsure| *unsure) {
                // What was admitted before is barred since, and who admits now may be in doubt since: decided anew.
                Some((row, rest)) => {
                    let mut outputs = vec![Output::Journal(row)];
                    outputs.extend(self.readmit());
                    outputs.extend(rest.into_iter().filter(|output| *output != Output::Admit));
                    outputs
                }
                None => Vec::new(),
            },
            Input::Asked { ticket, .. } => {
                // Which epoch holds is not durable.
                let answer = Answer::Refused(None, no());
                vec![Output::Reply(ticket, Reply::Peer(answer))]
            }
            Input::Told(ticket, _) | Input::Begin(ticket, _) => vec![Output::Reply(ticket, Reply::No(no()))],
            // It is remembered: what follows the row looks at it.
            Input::Doubted(is_doubted) => {
                self.is_doubted = is_doubted;
                Vec::new()
            }
            // Nobody is waited for while something is unsure.
            Input::Hung(_) => Vec::new(),
            input => {
                if !self.has_ended && !self.late.contains(&input) {
                    self.late.push(input);
                }
                Vec::new()
            }
        }
    }

    /// A peer is to ask again: what is remembered of the volume answers then. Nothing that is said here is to be taken for that.
    fn answer_after_the_end(&self, input: Input) -> Vec<Output> {
        match input {
            Input::Asked { ticket, .. } => {
                let no = if is_planted(Bug::UnknownAfterTheEnd) { No::Unknown } else { No::Removing };
                vec![Output::Reply(ticket, Reply::Peer(Answer::Refused(None, no)))]
            }
            Input::Told(ticket, _) | Input::Begin(ticket, _) => vec![Output::Reply(ticket, Reply::No(No::Unknown))],
            _ => Vec::new(),
        }
    }

    /// A change of ownership: durable before anything that follows from it. Who is no owner any more admits nothing from before.
    fn change(&mut self, epoch: Epoch, state: State, owes: Option<Debt>, is_new_content: bool) -> Vec<Output> {
        self.held.epoch = epoch;
        self.held.state = state;
        let row = Row { held: Some(self.held.clone()), left: None, owes, is_new_content };
        let mut outputs = Vec::new();
        if !self.held.state.is_owner() {
            outputs.push(Output::Bar);
        }
        outputs.push(Output::Journal(row));
        if is_planted(Bug::AdmitBeforeJournal) && self.held.state.is_owner() {
            outputs.insert(0, Output::Admit);
        }
        outputs
    }

    /// Nothing is here any more; what is remembered outlives it.
    fn end(&mut self, to: Option<Name>, owes: Option<Debt>, with_image: bool) -> Vec<Output> {
        let mut known = self.held.others();
        if let Some(to) = &to {
            known.remove(to);
        }
        let left = Some(Left { to, epoch: self.held.epoch, known });
        self.has_ended = true;
        self.late.clear();
        self.phase = Phase::Resting;
        vec![
            Output::Bar,
            Output::Journal(Row { held: None, left, owes, is_new_content: false }),
            Output::End { with_image },
        ]
    }

    /// Opens the gate again if nothing else keeps it shut.
    fn readmit(&self) -> Vec<Output> {
        if self.admits() { vec![Output::Admit] } else { Vec::new() }
    }

    fn doubt(&mut self, is_doubted: bool) -> Vec<Output> {
        let before = std::mem::replace(&mut self.is_doubted, is_doubted);
        match (before, is_doubted) {
            (false, true) if is_planted(Bug::DoubtForgotten) => Vec::new(),
            (false, true) => vec![Output::Bar],
            (true, false) => self.readmit(),
            _ => Vec::new(),
        }
    }

    fn new_job(&mut self) -> Job {
        self.next_job = self.next_job.wrapping_add(1);
        Job(self.next_job)
    }

    fn tell_operators(&mut self, reply: &Reply) -> Vec<Output> {
        std::mem::take(&mut self.operators).into_iter().map(|ticket| Output::Reply(ticket, reply.clone())).collect()
    }
}

fn no(ticket: Ticket, no: No) -> Vec<Output> {
    vec![Output::Reply(ticket, Reply::No(no))]
}

#[cfg(test)]
mod tests;
