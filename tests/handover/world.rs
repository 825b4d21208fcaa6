//! Sites, each with a real ownership machine and what would carry out its outputs, and the network between them. Must not know what is
//! explored, nor what counts as wrong beyond what a single step shows.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use blockferry::core::ids::Name;
use blockferry::handover::{
    Answer, Came, Debt, Epoch, Facts, Held, Input, Job, Left, Machine, No, Outcome as OfDebt, Output, Owed, Question,
    Reply, Row, State, Ticket, Verb, asking as begin_asking, outcome, without_volume,
};

use crate::search::fingerprint;

/// The number of a site; its name is a letter.
pub type At = usize;

pub fn name(at: At) -> Name {
    const NAMES: [&str; 3] = ["a", "b", "c"];
    NAMES[at].parse().expect("a letter is a name")
}

fn at_of(name: &Name) -> At {
    usize::from(name.as_str().as_bytes()[0] - b'a')
}

/// Everything that there is, between two steps.
#[derive(Clone, Hash)]
pub struct World {
    pub sites: Vec<Site>,
    pub network: Vec<Message>,
    pub ghost: Ghost,
    pub budget: Budget,
    pub wrong: Wrong,
}

/// How often things may still happen.
#[derive(Clone, Hash)]
pub struct Budget {
    pub crashes: u8,
    pub verbs: u8,
    pub writes: u8,
    pub journal_failures: u8,
    /// Work that fails, clients that connect, images that cannot be opened, connections that end, clones.
    pub oddities: u8,
    /// Messages that may be under way at a time.
    pub under_way: u8,
    /// Who may relocate the volume to himself from whom.
    pub routes: &'static [(At, At)],
    /// What operators do besides relocating and reclaiming.
    pub people: People,
    /// What a person's decision is salted with at each site: which one wins of two into one term.
    pub salts: [u16; 3],
}

/// What operators do besides relocating and reclaiming.
#[derive(Clone, Copy, Hash, PartialEq, Eq)]
pub enum People {
    Nothing,
    Cancel,
    CancelAndRemove,
}

/// What only an observer of all sites knows.
#[derive(Clone, Hash, Default)]
pub struct Ghost {
    /// The acknowledged writes that nobody threw away, a bit each.
    pub must: u8,
    pub next_write: u8,
    /// What was in the image when a site let go of it.
    pub released: BTreeSet<(At, Epoch, u8)>,
    /// The epochs at which operators said that it may be taken from clients that use it.
    pub taken: BTreeSet<Epoch>,
    /// Who took a volume back that was given back to it, and at which epoch it was its own again.
    pub taken_back: BTreeSet<(At, Epoch)>,
    /// The owner was removed by its operator.
    pub is_removed: bool,
    /// A person reclaimed.
    pub is_reclaimed: bool,
}

#[derive(Clone, Default)]
pub struct Wrong(pub Option<String>);

impl Hash for Wrong {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// A site: what is durable, what its process knows, what is under way.
#[derive(Clone, Hash, Default)]
pub struct Site {
    pub row: Option<Held>,
    pub left: Option<Left>,
    pub debts: BTreeSet<Debt>,
    /// A guest's write was acknowledged since the volume came. Durable.
    pub is_written: bool,
    /// The writes that are in the image.
    pub content: u8,
    pub process: Process,
}

/// What a crash forgets.
#[derive(Clone, Hash, Default)]
pub struct Process {
    pub machine: Option<Machine>,
    pub is_open: bool,
    /// Nothing is here any more, and what is asked still comes to the machine.
    pub is_ending: bool,
    /// Begins with a journal write that has not ended.
    pub pending: Vec<Output>,
    pub work: BTreeSet<Work>,
    /// Fences that wait for the write under way.
    pub draining: BTreeSet<Job>,
    /// A guest's write that was admitted and has not ended: its bit, and the epoch then.
    pub write: Option<(u8, Epoch)>,
    pub asking: Option<Asking>,
    pub asked: u8,
    pub waiting: BTreeMap<Ticket, Waiting>,
    pub is_copying: bool,
    /// The copy was stopped when it was at its end: that it ended may still be said.
    pub may_have_arrived: bool,
    pub opened: Option<(At, Epoch)>,
    pub clients: u32,
    pub has_no_image: bool,
    pub is_doubted: bool,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    Prepare(Job),
    Fence(Job),
    Fill(Job),
}

#[derive(Clone, Hash)]
pub struct Asking {
    pub id: u8,
    pub job: Job,
    pub peer: At,
    pub question: Question,
}

#[derive(Clone, Debug, Hash)]
pub enum Waiting {
    Begin,
    Verb(Verb),
    Peer(At, Id),
}

/// Which question an answer belongs to.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub enum Id {
    Machine { life: u8, number: u8 },
    Debt(Debt),
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub enum Message {
    Question { from: At, to: At, id: Id, question: Question },
    Answer { to: At, from: At, id: Id, answer: Answer },
}

/// What becomes of a journal write.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    Written,
    WrittenThenCrash,
    FailedButWritten,
    Failed,
}

impl World {
    /// All sites know each other; the first one has the volume.
    pub fn new(sites: usize, budget: Budget) -> World {
        let mut world = World {
            sites: vec![Site::default(); sites],
            network: Vec::new(),
            ghost: Ghost::default(),
            budget,
            wrong: Wrong::default(),
        };
        world.sites[0].row = Some(Held::new(Epoch::FIRST, State::Owned));
        world.restart(0);
        world
    }

    /// Three sites. The volume went from the first to the second, which passed it on to the third and let go of it.
    pub fn passed_on(budget: Budget) -> World {
        let mut world = World::new(3, budget);
        let known = [name(0)].into_iter().collect();
        let second = Epoch::FIRST.next();
        let third = second.next();
        let mut released = Held::new(second, State::Released { to: name(1), is_completed: true });
        released.lent.insert(name(1));
        let mut owned = Held::new(third, State::Owned);
        owned.came = Some(Came { from: name(1), epoch: third });
        world.sites[0].row = Some(released);
        world.sites[1].left = Some(Left { to: Some(name(2)), epoch: third, known });
        world.sites[2].row = Some(owned);
        for at in 0..3 {
            world.crash(at);
        }
        world
    }

    pub fn fail(&mut self, what: impl Into<String>) {
        self.wrong.0.get_or_insert(what.into());
    }

    pub fn machine(&self, at: At) -> Option<&Machine> {
        self.sites[at].process.machine.as_ref()
    }

    pub fn crash(&mut self, at: At) {
        let asked = self.sites[at].process.asked;
        self.sites[at].process = Process { asked, ..Process::default() };
        self.restart(at);
    }

    fn restart(&mut self, at: At) {
        if let Some(held) = self.sites[at].row.clone() {
            let (machine, first) = Machine::restore(held);
            self.sites[at].process.machine = Some(machine);
            self.carry_out(at, first);
        }
    }

    /// One input, and its outputs up to the first journal write.
    pub fn input(&mut self, at: At, input: Input) {
        let site = &mut self.sites[at];
        let facts = Facts {
            clients: site.process.clients,
            is_written: site.is_written,
            written_bytes: u64::from(site.is_written),
            has_image: !site.process.has_no_image,
        };
        let Some(machine) = &mut site.process.machine else { return };
        let outputs = machine.handle(input, &facts);
        self.carry_out(at, outputs);
    }

    pub fn ticket(&mut self, at: At, waiting: Waiting) -> Ticket {
        let all = &mut self.sites[at].process.waiting;
        let ticket = (1..).map(Ticket).find(|ticket| !all.contains_key(ticket)).expect("numbers do not end");
        all.insert(ticket, waiting);
        ticket
    }

    fn carry_out(&mut self, at: At, outputs: Vec<Output>) {
        let mut outputs = outputs.into_iter();
        while let Some(output) = outputs.next() {
            match output {
                Output::Journal(_) => {
                    self.sites[at].process.pending = std::iter::once(output).chain(outputs).collect();
                    return;
                }
                output => self.carry_out_one(at, output),
            }
        }
    }

    fn carry_out_one(&mut self, at: At, output: Output) {
        let process = &mut self.sites[at].process;
        match output {
            Output::Journal(_) => unreachable!("it is pending"),
            Output::Admit => {
                process.is_open = true;
                self.check_owners();
            }
            Output::Bar => process.is_open = false,
            Output::Prepare(job) => drop(process.work.insert(Work::Prepare(job))),
            Output::Fence { job, .. } => {
                let is_open = process.is_open;
                match process.write {
                    Some(_) => drop(process.draining.insert(job)),
                    None => drop(process.work.insert(Work::Fence(job))),
                }
                if is_open {
                    self.fail(format!("{} fences while it admits writes", name(at)));
                }
            }
            Output::Fill(job) => drop(process.work.insert(Work::Fill(job))),
            Output::Ask { job, peer, question } => {
                process.asked += 1;
                process.asking = Some(Asking { id: process.asked, job, peer: at_of(&peer), question });
            }
            Output::StopAsking => process.asking = None,
            Output::Copy => process.is_copying = true,
            Output::StopCopy => {
                process.may_have_arrived |= process.is_copying;
                process.is_copying = false;
            }
            Output::Offer => process.is_copying = false,
            Output::Reply(ticket, reply) => self.reply(at, ticket, reply),
            // It is asked until it is forgotten: [`World::forget`].
            Output::End { .. } => {
                process.is_ending = true;
                process.is_open = false;
                process.is_copying = false;
                process.may_have_arrived = false;
                process.asking = None;
                process.work.clear();
                process.draining.clear();
            }
        }
    }

    /// The journal write at the head of what is pending.
    pub fn journal(&mut self, at: At, outcome: Outcome) {
        let mut pending = std::mem::take(&mut self.sites[at].process.pending).into_iter();
        let Some(Output::Journal(row)) = pending.next() else { return };
        if !matches!(outcome, Outcome::Failed) {
            self.write_row(at, &row);
        }
        let rest: Vec<Output> = pending.collect();
        match outcome {
            Outcome::Written => self.carry_out(at, rest),
            Outcome::WrittenThenCrash => self.crash(at),
            Outcome::FailedButWritten | Outcome::Failed => {
                if let Some(machine) = &mut self.sites[at].process.machine {
                    let outputs = machine.not_journalled(row, rest);
                    self.carry_out(at, outputs);
                }
            }
        }
    }

    fn write_row(&mut self, at: At, row: &Row) {
        let before = self.epoch_seen(at);
        let site = &mut self.sites[at];
        let was = site.row.clone();
        let base = site.content;
        site.row.clone_from(&row.held);
        if row.held.is_none() {
            site.left.clone_from(&row.left);
        }
        site.debts.extend(row.owes.clone());
        let after = self.epoch_seen(at);
        if after < before {
            self.fail(format!("P5: the epoch at {} goes back from {before:?} to {after:?}", name(at)));
        }
        let Some(held) = &row.held else {
            if let Some(Held { state: State::GivingBack { from, was_owner: true, .. }, epoch, .. }) = &was
                && !self.ghost.taken_back.contains(&(at_of(from), epoch.next()))
            {
                self.fail(format!("P2: {} throws away what {from} did not take back", name(at)));
            }
            let is_told = |verb: &Waiting| matches!(verb, Waiting::Verb(Verb::Reclaim { .. }));
            if row.left.as_ref().is_some_and(|left| left.to.is_none()) {
                self.ghost.is_removed = true;
                self.ghost.must = 0;
            } else if self.sites[at].process.waiting.values().any(is_told) {
                // A person lets go of what never came.
                self.ghost.is_reclaimed = true;
            }
            return;
        };
        match &held.state {
            State::Released { is_completed, .. } => {
                self.ghost.released.insert((at, held.epoch, base));
                let is_in_use = self.sites[at].process.clients > 0;
                let lets_go = !is_completed && was.as_ref().is_none_or(|was| was.epoch != held.epoch);
                if is_in_use && lets_go && !self.ghost.taken.contains(&held.epoch) {
                    self.fail(format!("P6: {} is taken from its clients, and nobody said so", name(at)));
                }
            }
            State::Arriving { from } if !was.as_ref().is_some_and(|was| was.state == held.state) => {
                let from = at_of(from);
                let was_here = matches!(was.as_ref().map(|was| &was.state), Some(State::GivingBack { .. }));
                let release = self.ghost.released.iter().find(|one| (one.0, one.1) == (from, held.epoch)).copied();
                match release {
                    _ if was_here => {}
                    Some((_, _, content)) => self.sites[at].content = content,
                    None => self.fail(format!("{} owns what {} never let go", name(at), name(from))),
                }
            }
            State::GivingBack { from, was_owner: true, .. } if self.sites[at].is_written => {
                let is_told = self.sites[at]
                    .process
                    .waiting
                    .values()
                    .any(|waiting| matches!(waiting, Waiting::Verb(Verb::Cancel { discard: true })));
                if !is_told {
                    self.fail(format!("P2: {} gives guests' writes up though nobody said so", name(at)));
                }
                let from = at_of(from);
                if let Some((_, _, content)) =
                    self.ghost.released.iter().find(|one| (one.0, one.1) == (from, held.epoch)).copied()
                {
                    self.ghost.must &= content;
                }
            }
            State::Owned
                if was.as_ref().is_some_and(|was| {
                    was.epoch.term() == held.epoch.term() && matches!(was.state, State::Released { .. })
                }) =>
            {
                self.ghost.taken_back.insert((at, held.epoch));
            }
            State::Owned if was.is_some_and(|was| was.epoch.term() < held.epoch.term()) => {
                let is_overruled = self.is_overruled(held.epoch);
                self.ghost.is_reclaimed = true;
                self.ghost.is_removed = false;
                if !is_overruled {
                    self.ghost.must = self.sites[at].content;
                }
            }
            _ => {}
        }
    }

    /// Whether a person's decision that wins over `epoch` is durable at any site.
    pub fn is_overruled(&self, epoch: Epoch) -> bool {
        (0..self.sites.len()).any(|other| self.epoch_seen(other).overrules(epoch))
    }

    /// The epoch that a site shows: what is durable.
    pub fn row_epoch(&self, at: At) -> Option<Epoch> {
        self.sites[at].row.as_ref().map(|row| row.epoch)
    }

    /// The last epoch that is durable at a site.
    pub fn epoch_seen(&self, at: At) -> Epoch {
        let site = &self.sites[at];
        let held = site.row.as_ref().map(|held| held.epoch);
        let left = site.left.as_ref().map(|left| left.epoch);
        held.max(left).unwrap_or(Epoch(0))
    }

    fn reply(&mut self, at: At, ticket: Ticket, reply: Reply) {
        match (self.sites[at].process.waiting.remove(&ticket), reply) {
            (Some(Waiting::Peer(peer, id)), Reply::Peer(answer)) => self.answer(at, peer, id, answer),
            (Some(Waiting::Begin), Reply::Done(epoch)) => {
                let site = &self.sites[at];
                let is_owner = site.row.as_ref().is_some_and(|row| row.state.is_owner() && row.epoch == epoch);
                if !is_owner || !(site.process.is_open || site.process.is_doubted) {
                    self.fail(format!("P4: {} says \"relocated\" and does not own it", name(at)));
                }
            }
            (Some(Waiting::Verb(Verb::Cancel { .. })), Reply::Done(epoch)) => {
                if self.sites[at].process.is_open || self.sites[at].row.as_ref().is_some_and(|row| row.state.is_owner())
                {
                    self.fail(format!("P4: {} says \"cancelled\" and owns it", name(at)));
                }
                if !(0..self.sites.len()).any(|other| other != at && self.epoch_seen(other) >= epoch) {
                    self.fail(format!("P4: {} says \"cancelled\" and nobody took it back", name(at)));
                }
            }
            (Some(Waiting::Verb(_) | Waiting::Begin), Reply::Done(_) | Reply::No(_)) => {}
            (None, _) => {}
            (Some(waiting), reply) => self.fail(format!("{waiting:?} was answered {reply:?}")),
        }
    }

    /// An answer that would only be asked again, or that nobody waits for, is as good as lost.
    fn answer(&mut self, from: At, to: At, id: Id, answer: Answer) {
        let answer = match answer {
            Answer::Done(epoch) => Answer::Done(epoch),
            Answer::Refused(epoch, no) => {
                let refusal = no.refusal();
                Answer::Refused(epoch, No::Peer { peer: name(from), refusal, why: String::new() })
            }
        };
        if !answer.is_passing() {
            self.send(Message::Answer { to, from, id, answer });
        }
    }

    pub fn is_waited_for(&self, to: At, id: &Id) -> bool {
        match id {
            Id::Machine { number, .. } => {
                self.sites[to].process.asking.as_ref().is_some_and(|asking| asking.id == *number)
            }
            Id::Debt(debt) => self.sites[to].debts.contains(debt),
        }
    }

    pub fn send(&mut self, message: Message) {
        if self.network.len() < usize::from(self.budget.under_way) && !self.network.contains(&message) {
            self.network.push(message);
            self.network.sort_by_key(fingerprint);
        }
    }

    /// What nobody waits for any more need not be explored.
    pub fn tidy(&mut self) {
        let mut network = std::mem::take(&mut self.network);
        network.retain(|message| match message {
            Message::Question { .. } => true,
            Message::Answer { to, id, .. } => self.is_waited_for(*to, id),
        });
        self.network = network;
    }

    pub fn question_of_machine(&self, at: At) -> Option<Message> {
        let asking = self.sites[at].process.asking.as_ref()?;
        let id = Id::Machine { life: 0, number: asking.id };
        Some(Message::Question { from: at, to: asking.peer, id, question: asking.question.clone() })
    }

    /// How many copies of a question wait for their answer at whom it was asked.
    pub fn are_waiting(&self, question: &Message) -> usize {
        let Message::Question { from, to, id, .. } = question else { return 0 };
        let is_it = |waiting: &&Waiting| matches!(waiting, Waiting::Peer(peer, of) if peer == from && of == id);
        self.sites[*to].process.waiting.values().filter(is_it).count()
    }

    pub fn question_of_debt(&self, at: At, debt: &Debt) -> Message {
        let question = match debt.what {
            Owed::Completed => Question::Completed { epoch: debt.epoch },
            Owed::Reclaimed => Question::Reclaimed { epoch: debt.epoch },
        };
        Message::Question { from: at, to: at_of(&debt.peer), id: Id::Debt(debt.clone()), question }
    }

    pub fn deliver(&mut self, index: usize) {
        match self.network.remove(index) {
            Message::Question { from, to, id, question } => {
                if self.sites[to].process.machine.is_none() {
                    let answer = self.ask_without_volume(from, to, &question);
                    return self.answer(to, from, id, answer);
                }
                let ticket = self.ticket(to, Waiting::Peer(from, id));
                self.input(to, Input::Asked { ticket, peer: name(from), is_granted: true, question });
            }
            Message::Answer { to, id: Id::Machine { .. }, answer, .. } => {
                if let Some(asking) = self.sites[to].process.asking.take() {
                    self.input(to, Input::Answered(asking.job, answer));
                }
            }
            Message::Answer { to, from, id: Id::Debt(debt), answer } => self.settle(to, from, &debt, answer),
        }
    }

    /// Who asks from now on is answered by what is remembered.
    pub fn forget(&mut self, at: At) {
        self.sites[at].process.machine = None;
        self.sites[at].process.is_ending = false;
        self.sites[at].process.waiting.clear();
    }

    fn settle(&mut self, at: At, peer: At, debt: &Debt, answer: Answer) {
        match outcome(debt, &answer) {
            OfDebt::Settled => drop(self.sites[at].debts.remove(debt)),
            OfDebt::Overruled(epoch) if self.row_epoch(at).is_some_and(|holds| !epoch.overrules(holds)) => {
                self.sites[at].debts.remove(debt);
            }
            // It is owed until what was heard is durable.
            OfDebt::Overruled(epoch) if self.sites[at].process.machine.is_some() => {
                self.input(at, Input::Heard(name(peer), epoch));
            }
            OfDebt::Overruled(epoch) => {
                self.ask_without_volume(peer, at, &Question::Reclaimed { epoch });
                self.sites[at].debts.remove(debt);
            }
            OfDebt::Again => {}
        }
    }

    /// What it takes is written in one piece: a crash before it is a lost question, a crash behind it a lost answer.
    fn ask_without_volume(&mut self, from: At, to: At, question: &Question) -> Answer {
        let (answer, noted) = without_volume(&name(from), question, self.sites[to].left.as_ref());
        if let Some((left, owes)) = noted {
            self.sites[to].left = Some(left);
            self.sites[to].debts.extend(owes);
        }
        answer
    }

    /// The record and what it owes are durable, and the source is about to be asked. False: an old copy.
    pub fn begin(&mut self, at: At, from: At, epoch: Epoch) -> bool {
        let site = &mut self.sites[at];
        let Ok((held, owes)) = begin_asking(&name(from), epoch, site.row.as_ref(), site.left.as_ref()) else {
            return false;
        };
        site.row = Some(held.clone());
        site.debts.extend(owes);
        site.is_written = false;
        site.process.machine = Some(Machine::new(held));
        true
    }

    /// Who may write, and whether what they have is right.
    pub fn check_owners(&mut self) {
        let mut open: Vec<(Epoch, At)> = (0..self.sites.len())
            .filter(|at| self.sites[*at].process.is_open)
            .map(|at| (self.row_epoch(at).unwrap_or(Epoch(0)), at))
            .collect();
        open.sort_unstable();
        let Some((epoch, top)) = open.pop() else { return };
        if let Some((other, at)) = open.last()
            && !epoch.overrules(*other)
        {
            self.fail(format!("P1: {} at {other:?} and {} at {epoch:?} both admit writes", name(*at), name(top)));
        }
        if !self.is_overruled(epoch) && self.ghost.must & !self.sites[top].content != 0 {
            self.fail(format!("P2: {} admits writes without an acknowledged one", name(top)));
        }
    }
}
