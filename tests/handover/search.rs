//! Breadth first through every world, and from each to its calm end. Must not know what a machine is.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasherDefault, Hash, Hasher};

use blockferry::handover::{State, Verb};

use crate::steps::{Step, ask_all, calm_step, is_take_over, steps, take};
use crate::world::{At, Waiting, World, name};

/// What was found.
pub struct Found {
    pub states: usize,
    pub depth: usize,
    pub violation: Option<Violation>,
}

pub struct Violation {
    pub what: String,
    pub trace: Vec<String>,
}

/// Most states before the search gives up: a bound that is too large for the machine is a mistake, too.
const MOST_STATES: usize = 40_000_000;

pub fn explore(start: World) -> Found {
    let mut seen: HashMap<u64, (u64, u8), BuildHasherDefault<Ready>> = HashMap::default();
    let mut calm = HashSet::default();
    let first = fingerprint(&start);
    seen.insert(first, (first, 0));
    let mut queue = VecDeque::from([(0, first, start.clone())]);
    let mut deepest = 0;
    while let Some((depth, print, world)) = queue.pop_front() {
        deepest = depth;
        if let Some(what) = world.wrong.0.clone().or_else(|| ends_badly(&world, &mut calm)) {
            let trace = trace(&start, &seen, first, print);
            return Found { states: seen.len(), depth, violation: Some(Violation { what, trace }) };
        }
        for (number, step) in steps(&world).iter().enumerate() {
            let next = take(&world, step);
            let of_next = fingerprint(&next);
            if let std::collections::hash_map::Entry::Vacant(entry) = seen.entry(of_next) {
                entry.insert((print, u8::try_from(number).expect("less than 256 steps")));
                queue.push_back((depth + 1, of_next, next));
            }
        }
        assert!(seen.len() < MOST_STATES, "the bound is too large");
    }
    Found { states: seen.len(), depth: deepest, violation: None }
}

fn trace(
    start: &World,
    seen: &HashMap<u64, (u64, u8), BuildHasherDefault<Ready>>,
    first: u64,
    mut print: u64,
) -> Vec<String> {
    let mut numbers = Vec::new();
    while print != first {
        let (before, number) = seen[&print];
        numbers.push(number);
        print = before;
    }
    let mut world = start.clone();
    let mut told = vec![picture(&world)];
    for number in numbers.into_iter().rev() {
        let step = steps(&world).swap_remove(usize::from(number));
        told.push(in_words(&world, &step));
        world = take(&world, &step);
        told.push(picture(&world));
    }
    told
}

fn in_words(world: &World, step: &Step) -> String {
    match step {
        Step::Deliver(index) => format!("=> delivered: {:?}", world.network[*index]),
        Step::Lose(index) => format!("=> lost: {:?}", world.network[*index]),
        Step::Journal(at, outcome) => {
            format!("=> journal at {}: {outcome:?}: {:?}", name(*at), world.sites[*at].process.pending)
        }
        step => format!("=> {step:?}"),
    }
}

fn picture(world: &World) -> String {
    let sites: Vec<String> = (0..world.sites.len())
        .map(|at| {
            let site = &world.sites[at];
            let gate = if site.process.is_open { "open" } else { "shut" };
            let row = site.row.as_ref().map(|row| format!("{:?} {:?}", row.epoch, row.state));
            let left = site.left.as_ref().map(|left| format!(" left {:?}", left.epoch));
            let machine = world.machine(at).map(|machine| format!(" {machine:?}"));
            format!(
                "      {} {gate} {} {} content {:b}{}{}",
                name(at),
                row.unwrap_or_default(),
                left.unwrap_or_default(),
                site.content,
                if site.debts.is_empty() { String::new() } else { format!(" owes {:?}", site.debts) },
                if std::env::var_os("BLOCKFERRY_MODEL_MACHINES").is_some() {
                    machine.unwrap_or_default()
                } else {
                    String::new()
                },
            )
        })
        .collect();
    sites.join("\n")
}

/// What is wrong where this leads to, if from now on nothing goes wrong.
fn ends_badly(world: &World, calm: &mut HashSet<u64, BuildHasherDefault<Ready>>) -> Option<String> {
    let mut way = Vec::new();
    let mut world = bare(world);
    let mut asked_at = HashSet::new();
    loop {
        let print = fingerprint(&world);
        if calm.contains(&print) {
            break;
        }
        way.push(print);
        if way.len() > 2000 {
            return Some("P3: it does not come to rest".into());
        }
        if let Some(what) = world.wrong.0 {
            return Some(what);
        }
        if let Some(step) = calm_step(&world) {
            world = bare(&take(&world, &step));
            continue;
        }
        let all = ask_all(&world);
        if all.network.is_empty() {
            if let Some(what) = is_bad_end(&world) {
                return Some(what);
            }
            break;
        }
        if asked_at.insert(print) {
            world = all;
            continue;
        }
        // Nothing changes by asking once more.
        let Some(at) = (0..world.sites.len()).find(|at| is_take_over(&world, *at)) else {
            return Some(format!("P3: asked for ever: {:?}", all.network));
        };
        world = bare(&take(&world, &Step::Expire(at)));
    }
    calm.extend(way);
    None
}

/// Without what does not matter for the calm end.
fn bare(world: &World) -> World {
    let mut world = world.clone();
    world.budget.crashes = 0;
    world.budget.verbs = 0;
    world.budget.writes = 0;
    world.budget.journal_failures = 0;
    world.budget.oddities = 0;
    world.budget.under_way = u8::MAX;
    world.ghost.next_write = 0;
    for site in &mut world.sites {
        site.process.opened = None;
    }
    world
}

fn is_bad_end(world: &World) -> Option<String> {
    for at in 0..world.sites.len() {
        let process = &world.sites[at].process;
        if let Some(waiting) = process.waiting.values().find(|waiting| !matches!(waiting, Waiting::Peer(..))) {
            return Some(format!("P3: somebody waits for ever at {}: {waiting:?}", name(at)));
        }
        if !process.waiting.is_empty() {
            return Some(format!("P3: a peer's question is never answered at {}: {:?}", name(at), process.waiting));
        }
    }
    let open: Vec<At> = (0..world.sites.len()).filter(|at| world.sites[*at].process.is_open).collect();
    match open[..] {
        [_] => is_held_for_ever(world),
        [] => nobody(world),
        _ => Some(format!("P1: for ever, {} sites admit writes", open.len())),
    }
}

/// What was let go of is kept for somebody who has all of it, and was never told that.
fn is_held_for_ever(world: &World) -> Option<String> {
    let waits = |at: At| {
        let row = world.sites[at].row.as_ref()?;
        let State::Released { to, is_completed: false } = &row.state else { return None };
        let has_all = |other: At| {
            name(other) == *to
                && world.sites[other]
                    .row
                    .as_ref()
                    .is_some_and(|has| has.epoch == row.epoch && has.state == State::Owned)
        };
        let other = (0..world.sites.len()).find(|other| has_all(*other))?;
        Some(format!("P3: {} has all of it, and {} never hears of it", name(other), name(at)))
    };
    (0..world.sites.len()).find_map(waits)
}

/// Nobody owns it. A person must have wanted that, and must be able to go on.
fn nobody(world: &World) -> Option<String> {
    if world.ghost.is_removed {
        return None;
    }
    if !world.ghost.is_reclaimed {
        return Some("P3: nobody owns it".into());
    }
    let is_way_on = |at: At| {
        let Some(row) = &world.sites[at].row else { return false };
        if !matches!(row.state, State::Released { .. } | State::Fenced { .. }) {
            return false;
        }
        let mut next = world.clone();
        next.budget.verbs = 1;
        next = take(&next, &Step::Tell(at, Verb::Reclaim { epoch: row.epoch, salt: world.budget.salts[at] }));
        for _ in 0..200 {
            match calm_step(&next) {
                Some(step) => next = take(&next, &step),
                None => break,
            }
        }
        next.sites[at].process.is_open
    };
    if (0..world.sites.len()).any(is_way_on) { None } else { Some("P3: nobody owns it, and no person can help".into()) }
}

pub fn fingerprint(of: &impl Hash) -> u64 {
    let mut hasher = Folded(0x9e37_79b9_7f4a_7c15);
    of.hash(&mut hasher);
    hasher.finish()
}

/// Multiplies and folds: what SipHash takes would be most of the time.
struct Folded(u64);

impl Folded {
    fn add(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * 0xa076_1d64_78bd_642f_u128;
        self.0 = (product as u64) ^ ((product >> 64) as u64).rotate_left(29);
    }
}

impl Hasher for Folded {
    fn finish(&self) -> u64 {
        let mut last = Folded(self.0);
        last.add(0xe703_7ed1_a0b4_28db);
        last.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_le_bytes(word) ^ ((chunk.len() as u64) << 56));
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.add(u64::from(word) + 0x1_0000);
    }

    fn write_u32(&mut self, word: u32) {
        self.add(u64::from(word) + 0x2_0000_0000);
    }

    fn write_u64(&mut self, word: u64) {
        self.add(word);
    }

    fn write_usize(&mut self, word: usize) {
        self.add(word as u64);
    }
}

/// Fingerprints are hashes already.
#[derive(Default)]
pub struct Ready(u64);

impl Hasher for Ready {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only fingerprints are keys")
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }
}
