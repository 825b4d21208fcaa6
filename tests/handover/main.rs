//! The model of ownership: every interleaving of two and three ownership machines over a network that loses, repeats and reorders, with
//! crashes and failures at every journal write and operators' verbs at any moment. It drives the machines that ship. Must not know a daemon.

mod search;
mod steps;
mod world;

use search::explore;
use world::{Budget, People, World};

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
        people: People::CancelAndRemove,
        salts: [1, 2, 3],
    }
}

/// All that is explored by default, by name; first what is small or finds much.
fn worlds() -> Vec<(&'static str, World)> {
    let two = |budget| World::new(2, budget);
    // Persons decide at both sites, into one term and one after the other.
    let persons = Budget { people: People::Nothing, salts: [2, 1, 0], ..bound(0, 3, 0, 0, 0, 1) };
    let giving_back = Budget { people: People::Cancel, salts: [2, 1, 0], ..bound(0, 3, 0, 0, 0, 1) };
    let back = Budget { routes: &[(1, 2)], people: People::Nothing, ..bound(0, 2, 0, 0, 0, 1) };
    // With two verbs these are a third of a million states: minutes in a build that is not optimized.
    let fork = Budget { routes: &[(1, 0), (2, 0)], people: People::Nothing, ..bound(0, 1, 0, 0, 0, 1) };
    vec![
        ("two sites where work fails", two(bound(0, 1, 1, 0, 1, 2))),
        ("two sites whose journal fails", two(bound(1, 1, 1, 1, 0, 1))),
        ("passed on and asked back", World::passed_on(back)),
        ("a fork", World::new(3, fork)),
        ("two sites that crash", two(bound(1, 2, 1, 0, 0, 1))),
        ("given back and reclaimed", two(giving_back)),
        ("two sites, messages out of order", two(bound(0, 2, 1, 0, 0, 2))),
        ("back and forth", two(Budget { routes: &[(1, 0), (0, 1)], ..bound(0, 2, 1, 0, 0, 1) })),
        ("a hop", World::new(3, Budget { routes: &[(1, 0), (2, 1)], ..bound(0, 2, 1, 0, 0, 1) })),
        ("two persons", two(persons)),
    ]
}

fn check(what: &str) {
    let world = worlds().into_iter().find(|(name, _)| *name == what).expect("it is in the list").1;
    let started = std::time::Instant::now();
    let found = explore(world);
    println!("{what}: {} states, depth {}, {:?}", found.states, found.depth, started.elapsed());
    if let Some(violation) = found.violation {
        panic!("{what}: {}\n{}\n{}", violation.what, violation.trace.join("\n"), violation.what);
    }
}

#[test]
fn two_sites_that_crash() {
    check("two sites that crash");
}

#[test]
fn two_sites_over_a_network_that_reorders() {
    check("two sites, messages out of order");
}

#[test]
fn two_sites_whose_journal_fails() {
    check("two sites whose journal fails");
}

#[test]
fn two_sites_where_work_fails() {
    check("two sites where work fails");
}

#[test]
fn a_hop() {
    check("a hop");
}

#[test]
fn two_persons() {
    check("two persons");
}

#[test]
fn passed_on_and_asked_back() {
    check("passed on and asked back");
}

#[test]
fn given_back_and_reclaimed() {
    check("given back and reclaimed");
}

#[test]
fn a_fork() {
    check("a fork");
}

#[test]
fn back_and_forth() {
    check("back and forth");
}

/// Shows that the model bites: every bug of the list is planted, and must be found in one of the worlds.
#[cfg(feature = "seeded-bugs")]
#[test]
fn every_seeded_bug_of_ownership_is_found() {
    use blockferry::seeded_bugs::{Bug, plant};
    let mut missed = Vec::new();
    for bug in Bug::OF_OWNERSHIP {
        plant(Some(*bug));
        let found = worlds().into_iter().find_map(|(name, world)| Some((name, explore(world).violation?)));
        plant(None);
        match found {
            Some((name, violation)) => {
                println!("{bug:?}: {name}: {}, after {} steps", violation.what, violation.trace.len());
            }
            None => missed.push(*bug),
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
