//! What can happen next in a world, and what comes of it. Must not know in which order it is explored.

use blockferry::core::wire::Refusal;
use blockferry::handover::{Debt, Epoch, Held, Input, Machine, No, Question, State, Ticket, Verb, adding, may_be_at};

use crate::world::{At, Message, Outcome, People, Waiting, Work, World, name};

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Step {
    /// `0` looks at the volume at `1`, as `relocate` does first.
    Open(At, At),
    Relocate(At, bool),
    Tell(At, Verb),
    Add(At),
    Write(At),
    WriteEnds(At),
    Expire(At),
    Hang(At, Ticket),
    Arrive(At),
    Hear(At, At),
    Doubt(At, bool),
    Clients(At, u32),
    Image(At, bool),
    Work(At, Work, bool),
    Journal(At, Outcome),
    Forget(At),
    Tick(At),
    Crash(At),
    Ask(At),
    AskOfDebt(At, Debt),
    Deliver(usize),
    Lose(usize),
}

/// Everything that can happen.
pub fn steps(world: &World) -> Vec<Step> {
    let mut all = Vec::new();
    for (index, message) in world.network.iter().enumerate() {
        if is_ready(world, message) {
            all.push(Step::Deliver(index));
        }
        if world.network.len() == usize::from(world.budget.under_way) {
            all.push(Step::Lose(index));
        }
    }
    for at in 0..world.sites.len() {
        if world.budget.crashes > 0 && world.sites[at].row.is_some() {
            all.push(Step::Crash(at));
        }
        asks(world, at, &mut all);
        if !world.sites[at].process.pending.is_empty() {
            all.push(Step::Journal(at, Outcome::Written));
            if world.budget.crashes > 0 {
                all.push(Step::Journal(at, Outcome::WrittenThenCrash));
            }
            if world.budget.journal_failures > 0 {
                all.push(Step::Journal(at, Outcome::FailedButWritten));
                all.push(Step::Journal(at, Outcome::Failed));
            }
            continue;
        }
        if world.sites[at].process.is_ending {
            all.push(Step::Forget(at));
            continue;
        }
        of_site(world, at, &mut all);
        if world.budget.verbs > 0 {
            of_people(world, at, &mut all);
        }
    }
    all
}

fn is_ready(world: &World, message: &Message) -> bool {
    let (Message::Question { to, .. } | Message::Answer { to, .. }) = message;
    world.sites[*to].process.pending.is_empty()
}

fn asks(world: &World, at: At, all: &mut Vec<Step>) {
    if let Some(question) = world.question_of_machine(at)
        && !world.network.contains(&question)
        && world.are_waiting(&question) < 2
    {
        all.push(Step::Ask(at));
    }
    for debt in &world.sites[at].debts {
        if !world.network.contains(&world.question_of_debt(at, debt)) {
            all.push(Step::AskOfDebt(at, debt.clone()));
        }
    }
}

fn of_site(world: &World, at: At, all: &mut Vec<Step>) {
    let site = &world.sites[at];
    let process = &site.process;
    let is_odd = world.budget.oddities > 0;
    let Some(machine) = &process.machine else { return };
    for work in &process.work {
        all.push(Step::Work(at, *work, true));
        if is_odd {
            all.push(Step::Work(at, *work, false));
        }
    }
    if machine.is_unsure() {
        all.push(Step::Tick(at));
    }
    if has_arrived(world, at) || process.may_have_arrived {
        all.push(Step::Arrive(at));
    }
    match process.write {
        Some(_) => all.push(Step::WriteEnds(at)),
        None if process.is_open && world.budget.writes > 0 => all.push(Step::Write(at)),
        None => {}
    }
    if matches!(machine.held().state, State::Asking { .. }) {
        all.push(Step::Expire(at));
    }
    for (ticket, waiting) in &process.waiting {
        if let Waiting::Peer(peer, id) = waiting
            && (is_odd || !world.is_waited_for(*peer, id))
        {
            all.push(Step::Hang(at, *ticket));
        }
    }
    for other in 0..world.sites.len() {
        let is_ahead = world.row_epoch(other).is_some_and(|epoch| epoch.overrules(machine.held().epoch));
        if other != at && is_ahead {
            all.push(Step::Hear(at, other));
        }
    }
    if process.is_doubted || is_odd {
        all.push(Step::Doubt(at, !process.is_doubted));
    }
    if process.clients > 0 || (is_odd && process.is_open) {
        all.push(Step::Clients(at, 1 - process.clients));
    }
    if process.has_no_image || is_odd {
        all.push(Step::Image(at, process.has_no_image));
    }
}

/// Every block can have come: the source has them still.
pub fn has_arrived(world: &World, at: At) -> bool {
    let Some(Held { state: State::Arriving { from }, epoch, .. }) = &world.sites[at].row else { return false };
    world.sites[at].process.is_copying
        && world.sites.iter().enumerate().any(|(other, site)| {
            name(other) == *from
                && site.row.as_ref().is_some_and(|row| {
                    row.epoch == *epoch && matches!(&row.state, State::Released { to, .. } if *to == name(at))
                })
        })
}

fn of_people(world: &World, at: At, all: &mut Vec<Step>) {
    for (to, from) in world.budget.routes {
        let site = &world.sites[*to];
        if *to != at {
            continue;
        }
        if world.row_epoch(*from).is_some_and(|epoch| site.process.opened != Some((*from, epoch))) {
            all.push(Step::Open(*to, *from));
        }
    }
    let site = &world.sites[at];
    if let Some((from, epoch)) = site.process.opened
        && is_free(world, at)
        && epoch.next() > world.epoch_seen(at)
    {
        all.push(Step::Relocate(at, false));
        if world.sites[from].process.clients > 0 {
            all.push(Step::Relocate(at, true));
        }
    }
    let Some(machine) = &site.process.machine else {
        if site.left.is_some() && may_be_at(site.left.as_ref()).is_none() {
            all.push(Step::Add(at));
        }
        return;
    };
    if world.budget.people == People::CancelAndRemove {
        all.push(Step::Tell(at, Verb::Remove));
    }
    if machine.way_back().is_some() && world.budget.people != People::Nothing {
        all.push(Step::Tell(at, Verb::Cancel { discard: false }));
        all.push(Step::Tell(at, Verb::Cancel { discard: true }));
    }
    all.push(Step::Tell(at, Verb::Reclaim { epoch: machine.held().epoch, salt: world.budget.salts[at] }));
}

/// Whether a relocation to here can begin: nothing is here, or what was let go of and is not needed any more.
fn is_free(world: &World, at: At) -> bool {
    let site = &world.sites[at];
    match (&site.process.machine, &site.row) {
        (None, None) => true,
        (Some(machine), Some(row)) => {
            matches!(row.state, State::Released { is_completed: true, .. })
                && machine.held() == row
                && !machine.is_unsure()
        }
        _ => false,
    }
}

/// What comes of it.
pub fn take(world: &World, step: &Step) -> World {
    let mut next = world.clone();
    carry_out(&mut next, step);
    next.check_owners();
    next.tidy();
    next
}

fn carry_out(world: &mut World, step: &Step) {
    match step {
        Step::Open(to, from) => {
            let epoch = world.row_epoch(*from).unwrap_or(Epoch(0));
            world.sites[*to].process.opened = Some((*from, epoch));
        }
        Step::Relocate(at, take) => relocate(world, *at, *take),
        Step::Tell(at, verb) => {
            world.budget.verbs -= 1;
            let ticket = world.ticket(*at, Waiting::Verb(verb.clone()));
            world.input(*at, Input::Told(ticket, verb.clone()));
        }
        Step::Add(at) => {
            world.budget.verbs -= 1;
            let site = &mut world.sites[*at];
            site.row = Some(adding(site.left.as_ref()));
            site.content = 0;
            site.is_written = false;
            world.ghost.must = 0;
            world.ghost.is_removed = false;
            world.crash(*at);
        }
        Step::Write(at) => {
            world.budget.writes -= 1;
            let bit = 1 << world.ghost.next_write;
            world.ghost.next_write += 1;
            world.sites[*at].process.write = Some((bit, world.epoch_seen(*at)));
        }
        Step::WriteEnds(at) => write(world, *at),
        Step::Expire(at) => world.input(*at, Input::Expired),
        Step::Hang(at, ticket) => {
            if let Some(Waiting::Peer(peer, id)) = world.sites[*at].process.waiting.remove(ticket)
                && world.is_waited_for(peer, &id)
            {
                world.budget.oddities -= 1;
            }
            world.input(*at, Input::Hung(*ticket));
        }
        Step::Arrive(at) => {
            world.sites[*at].process.may_have_arrived = false;
            world.sites[*at].process.is_copying = false;
            world.input(*at, Input::Arrived);
        }
        Step::Hear(at, other) => {
            let epoch = world.row_epoch(*other).unwrap_or(Epoch(0));
            world.input(*at, Input::Heard(name(*other), epoch));
        }
        Step::Doubt(at, is_doubted) => {
            world.budget.oddities -= u8::from(*is_doubted);
            world.sites[*at].process.is_doubted = *is_doubted;
            world.input(*at, Input::Doubted(*is_doubted));
            if *is_doubted && world.sites[*at].process.is_open {
                world.fail(format!("P1: {} admits writes though it may be a copy", name(*at)));
            }
        }
        Step::Clients(at, clients) => {
            world.budget.oddities -= u8::from(*clients > 0);
            world.sites[*at].process.clients = *clients;
        }
        Step::Image(at, is_there) => {
            world.budget.oddities -= u8::from(!is_there);
            world.sites[*at].process.has_no_image = !is_there;
        }
        Step::Work(at, work, is_ok) => {
            world.budget.oddities -= u8::from(!is_ok);
            world.sites[*at].process.work.remove(work);
            let done = if *is_ok { Ok(()) } else { Err(No::Failed(Refusal::ReadFailed, String::new())) };
            let input = match work {
                Work::Prepare(job) => Input::Prepared(*job, done),
                Work::Fence(job) => Input::Fenced(*job, done),
                Work::Fill(job) => Input::Filled(*job, done),
            };
            world.input(*at, input);
        }
        Step::Journal(at, outcome) => {
            match outcome {
                Outcome::Written => {}
                Outcome::WrittenThenCrash => world.budget.crashes -= 1,
                Outcome::FailedButWritten | Outcome::Failed => world.budget.journal_failures -= 1,
            }
            world.journal(*at, *outcome);
        }
        Step::Forget(at) => world.forget(*at),
        Step::Tick(at) => world.input(*at, Input::Tick),
        Step::Crash(at) => {
            world.budget.crashes -= 1;
            world.crash(*at);
        }
        Step::Ask(at) => {
            if let Some(question) = world.question_of_machine(*at) {
                world.send(question);
            }
        }
        Step::AskOfDebt(at, debt) => {
            let question = world.question_of_debt(*at, debt);
            world.send(question);
        }
        Step::Deliver(index) => world.deliver(*index),
        Step::Lose(index) => drop(world.network.remove(*index)),
    }
}

fn relocate(world: &mut World, at: At, take: bool) {
    world.budget.verbs -= 1;
    let Some((from, epoch)) = world.sites[at].process.opened.take() else { return };
    if !world.begin(at, from, epoch) {
        return;
    }
    if take {
        world.ghost.taken.insert(world.epoch_seen(at));
    }
    let ticket = world.ticket(at, Waiting::Begin);
    world.input(at, Input::Begin(ticket, take));
}

/// A guest's write is in the image, and acknowledged: the fences that waited for it are done. It counts unless a person has decided since it
/// began that what was here does not.
fn write(world: &mut World, at: At) {
    let site = &mut world.sites[at];
    let Some((bit, began)) = site.process.write.take() else { return };
    site.content |= bit;
    site.is_written = true;
    let drained = std::mem::take(&mut site.process.draining);
    site.process.work.extend(drained.into_iter().map(Work::Fence));
    if !world.is_overruled(began) {
        world.ghost.must |= bit;
    }
}

/// The next step if from now on nothing is lost, nobody crashes, all work ends well, and nobody wants anything; None: nothing is left.
pub fn calm_step(world: &World) -> Option<Step> {
    let sites = || 0..world.sites.len();
    let process = |at: At| &world.sites[at].process;
    if let Some(at) = sites().find(|at| !process(*at).pending.is_empty()) {
        return Some(Step::Journal(at, Outcome::Written));
    }
    if let Some(at) = sites().find(|at| world.machine(*at).is_some_and(Machine::is_unsure)) {
        return Some(Step::Tick(at));
    }
    if let Some(at) = sites().find(|at| process(*at).is_ending) {
        return Some(Step::Forget(at));
    }
    for at in sites() {
        let process = process(at);
        if process.write.is_some() {
            return Some(Step::WriteEnds(at));
        }
        if let Some(work) = process.work.first() {
            return Some(Step::Work(at, *work, true));
        }
        if process.clients > 0 {
            return Some(Step::Clients(at, 0));
        }
        if process.has_no_image {
            return Some(Step::Image(at, true));
        }
        if process.is_doubted {
            return Some(Step::Doubt(at, false));
        }
    }
    if !world.network.is_empty() {
        return Some(Step::Deliver(0));
    }
    if let Some(at) = sites().find(|at| has_arrived(world, *at)) {
        return Some(Step::Arrive(at));
    }
    None
}

/// All that is to be asked now.
pub fn ask_all(world: &World) -> World {
    let mut next = world.clone();
    for at in 0..world.sites.len() {
        next.network.extend(world.question_of_machine(at));
        next.network.extend(world.sites[at].debts.iter().map(|debt| world.question_of_debt(at, debt)));
    }
    next
}

/// Questions of machines, not of debts.
pub fn is_take_over(world: &World, at: At) -> bool {
    matches!(&world.sites[at].process.asking, Some(asking) if matches!(asking.question, Question::TakeOver { .. }))
}
