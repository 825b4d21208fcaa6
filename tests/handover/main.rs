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

/// `BLOCKFERRY_MODEL_BOUND=big` explores one verb, one crash and one message more: minutes.
fn bound(crashes: u8, verbs: u8, writes: u8, journal_failures: u8, oddities: u8, under_way: u8) -> Budget {
    let more = u8::from(std::env::var("BLOCKFERRY_MODEL_BOUND").is_ok_and(|bound| bound == "big"));
    Budget {
        crashes: crashes + more,
        verbs: verbs + more,
        writes,
        journal_failures,
        oddities,
        under_way: under_way + more,
        routes: &[(1, 0)],
        is_reclaimed_only: false,
        salts: [1, 2, 3],
    }
}

#[test]
fn two_sites_that_crash() {
    check("two sites that crash", 2, bound(1, 2, 1, 0, 0, 1));
}

#[test]
fn two_sites_over_a_network_that_reorders() {
    check("two sites, messages out of order", 2, bound(0, 2, 1, 0, 0, 2));
}

#[test]
fn two_sites_whose_journal_fails() {
    check("two sites whose journal fails", 2, bound(1, 1, 1, 1, 0, 1));
}

#[test]
fn two_sites_where_work_fails() {
    check("two sites where work fails", 2, bound(0, 1, 1, 0, 1, 2));
}

#[test]
fn a_hop() {
    check("a hop", 3, Budget { routes: &[(1, 0), (2, 1)], ..bound(0, 2, 1, 0, 0, 1) });
}

/// Persons decide at both sites, into one term and one after the other.
#[test]
fn two_persons() {
    check("two persons", 2, Budget { is_reclaimed_only: true, salts: [2, 1, 0], ..bound(0, 3, 0, 0, 0, 1) });
}

/// With two verbs these are a third of a million states: minutes in a build that is not optimized.
#[test]
fn a_fork() {
    let budget = Budget { routes: &[(1, 0), (2, 0)], is_reclaimed_only: true, ..bound(0, 1, 0, 0, 0, 1) };
    check("a fork", 3, budget);
}

#[test]
fn back_and_forth() {
    check("back and forth", 2, Budget { routes: &[(1, 0), (0, 1)], ..bound(0, 2, 1, 0, 0, 1) });
}

/// Shows that the model bites: every bug of the list is planted, and must be found in one of the worlds.
#[cfg(feature = "seeded-bugs")]
#[test]
fn every_seeded_bug_of_ownership_is_found() {
    use blockferry::seeded_bugs::{Bug, plant};
    let worlds = || {
        [
            World::new(2, bound(1, 2, 1, 0, 0, 1)),
            World::new(2, bound(0, 2, 1, 0, 0, 2)),
            World::new(2, Budget { is_reclaimed_only: true, salts: [2, 1, 0], ..bound(0, 3, 0, 0, 0, 1) }),
        ]
    };
    let mut missed = Vec::new();
    for bug in Bug::OF_OWNERSHIP {
        plant(Some(*bug));
        let found = worlds().into_iter().find_map(|world| explore(world).violation);
        plant(None);
        match found {
            Some(violation) => println!("{bug:?}: {}, after {} steps", violation.what, violation.trace.len()),
            None => missed.push(*bug),
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
