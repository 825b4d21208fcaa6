//! Shows that the simulation bites: every bug of the list is planted, and must be found within a bounded number of seeds.
//! Must not know what a bug breaks.

use std::sync::atomic::{AtomicUsize, Ordering};

use blockferry::seeded_bugs::{Bug, plant};
use parking_lot::Mutex;

use crate::run::run;
use crate::seeds::KEPT;

/// Seeds after which a bug counts as not found.
const MOST_SEEDS: u64 = 8_000;
/// Worlds at a time: a bug is planted in one thread only.
const THREADS: usize = 2;

#[test]
fn every_seeded_bug_is_caught() {
    let next = AtomicUsize::new(0);
    let missed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(bug) = Bug::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
                    plant(Some(*bug));
                    let found = KEPT
                        .iter()
                        .copied()
                        .chain(0..MOST_SEEDS)
                        .find_map(|seed| Some((seed, run(seed, false).violation?)));
                    plant(None);
                    match found {
                        Some((seed, violation)) => {
                            println!("{bug:?}: seed {seed}, check \"{}\": {}", violation.check, violation.what);
                        }
                        None => missed.lock().push(*bug),
                    }
                }
            });
        }
    });
    assert!(missed.lock().is_empty(), "not noticed within {MOST_SEEDS} seeds: {:?}", missed.lock());
}
