//! Which seeds are run, and what is said of one that fails. Must not know what a seed does.

use crate::run::{Outcome, run};

/// Seeds that once found something: run first, for ever.
pub const KEPT: &[u64] = &[
    177, 278, 443, 481, 596, 638, 653, 868, 963, 1010, 1099, 1222, 1661, 1889, 2568, 2860, 3410, 3624, 4644, 5925,
    8243, 8462, 8862, 9470, 9531, 20629,
];

/// Run by default, over all tests of this file.
const SEEDS: u64 = 10_000;
/// So many tests share them, so that they run at the same time.
const SHARES: u64 = 4;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, which is no number")))
}

/// After so many seeds that found something the others are not run.
const ENOUGH: usize = 10;

/// What a seed found, and how to see it again.
fn finding(seed: u64, outcome: &Outcome) -> Option<String> {
    let violation = outcome.violation.as_ref()?;
    Some(format!(
        "seed {seed}, check \"{}\": {}\n  BLOCKFERRY_SIM_SEED={seed} cargo nextest run --test sim one_seed --no-capture",
        violation.check, violation.what
    ))
}

fn run_all(seeds: impl Iterator<Item = u64>) {
    let (mut count, mut events, mut virtual_ms) = (0, 0, 0);
    let mut findings = Vec::new();
    for seed in seeds {
        let outcome = run(seed, false);
        findings.extend(finding(seed, &outcome));
        count += 1;
        events += outcome.fingerprint.1;
        virtual_ms += outcome.virtual_ms;
        if findings.len() >= ENOUGH {
            break;
        }
    }
    let hours = virtual_ms / 3_600_000;
    println!("{count} seeds: {events} events in {hours} hours of virtual time, {} violations", findings.len());
    assert!(
        findings.is_empty(),
        "run what is printed under each to see it again, and keep the seed in tests/sim/seeds.rs\n{}",
        findings.join("\n")
    );
}

fn run_share(share: u64) {
    let seeds = number("BLOCKFERRY_SIM_SEEDS").unwrap_or(SEEDS);
    run_all((0..seeds).filter(|seed| seed % SHARES == share && !KEPT.contains(seed)));
}

#[test]
fn seeds_that_found_something() {
    run_all(KEPT.iter().copied());
}

#[test]
fn seeds_1_of_4() {
    run_share(0);
}

#[test]
fn seeds_2_of_4() {
    run_share(1);
}

#[test]
fn seeds_3_of_4() {
    run_share(2);
}

#[test]
fn seeds_4_of_4() {
    run_share(3);
}

#[test]
fn one_seed() {
    let Some(seed) = number("BLOCKFERRY_SIM_SEED") else {
        println!("set BLOCKFERRY_SIM_SEED to run one seed and to see what happens in it");
        return;
    };
    let outcome = run(seed, true);
    println!("{}", outcome.log.join("\n"));
    println!("{:?}", outcome.tally);
    assert_eq!(finding(seed, &outcome), None);
}

#[test]
fn a_seed_is_the_same_every_time() {
    for seed in 0..60 {
        let (first, second) = (run(seed, false), run(seed, false));
        assert_eq!(first.fingerprint, second.fingerprint, "seed {seed}: what happens depends on something else, too");
    }
}
