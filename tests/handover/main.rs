//! The model of ownership: every interleaving of two and three ownership machines over a network that loses, repeats and reorders, with
//! crashes and failures at every journal write and operators' verbs at any moment. It drives the machines that ship. Must not know a daemon.

mod search;
mod steps;
mod world;

use search::explore;
use world::{Budget, World};

fn check(what: &str, sites: usize, budget: Budget) {
    let started = std::time::Instant::now();
    let found = explore(World::new(sites, budget));
    println!("{what}: {} states, depth {}, {:?}", found.states, found.depth, started.elapsed());
    if let Some(violation) = found.violation {
        panic!("{what}: {}\n{}\n{}", violation.what, violation.trace.join("\n"), violation.what);
    }
}

fn is_big() -> bool {
    std::env::var("BLOCKFERRY_MODEL_BOUND").is_ok_and(|bound| bound == "big")
}

fn budget() -> Budget {
    let var = |name: &str, or: u8| std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(or);
    Budget {
        crashes: var("C", 1),
        verbs: var("V", 2),
        writes: var("W", 1),
        journal_failures: var("J", 0),
        oddities: var("O", 0),
        under_way: var("N", 2),
        routes: &[(1, 0)],
    }
}

#[test]
fn two_sites() {
    let _ = is_big();
    check("two sites", 2, budget());
}

#[test]
fn a_hop() {
    check("a hop", 3, Budget { routes: &[(1, 0), (2, 1)], ..budget() });
}

#[test]
fn a_fork() {
    check("a fork", 3, Budget { routes: &[(1, 0), (2, 0)], ..budget() });
}

#[test]
fn back_and_forth() {
    check("back and forth", 2, Budget { routes: &[(1, 0), (0, 1)], ..budget() });
}
