//! What the fuzzers do, a little of it, on every run of the tests: the whole corpus and seeded mutations of it. Nothing here
//! is left to chance or to the clock; a failure names what reproduces it.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use crate::targets::seeds::seeds;
use crate::targets::{Rng, TARGETS, session};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

/// The files of a target's corpus, by name.
fn files(target: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = corpus().join(target);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .map(|path| {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            (name, std::fs::read(&path).expect("reads"))
        })
        .collect()
}

/// Runs a body; what it fails with names the input, and the input is kept where `cargo fuzz run TARGET FILE` finds it.
fn try_one(target: &str, body: fn(&[u8]), what: &str, bytes: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(bytes))) {
        let path = std::env::temp_dir().join(format!("{target}-{}", blake3::hash(bytes).to_hex().split_at(16).0));
        let _ = std::fs::write(&path, bytes);
        eprintln!(
            "target {target} fails on {what}: reproduce by `cargo +nightly fuzz run {target} {}`",
            path.display()
        );
        std::panic::resume_unwind(panic);
    }
}

fn mutate(bytes: &mut Vec<u8>, others: &[Vec<u8>], rng: &mut Rng) {
    const EDGES: [u8; 8] = [0, 1, 0x7f, 0x80, 0xff, 0xfe, 0x10, 0x40];
    for _ in 0..=rng.below(4) {
        let at = rng.below(bytes.len() + 1);
        let len = rng.below(9).min(bytes.len() - at);
        match rng.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
            1 if at < bytes.len() => bytes[at] = EDGES[rng.below(EDGES.len())],
            2 => drop(bytes.drain(at..at + len)),
            3 => {
                let copied = bytes[at..at + len].to_vec();
                bytes.splice(at..at, copied);
            }
            4 => {
                let new: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
                bytes.splice(at..at + len, new);
            }
            5 => {
                // The end of another.
                let other = &others[rng.below(others.len())];
                bytes.truncate(at);
                bytes.extend(&other[rng.below(other.len() + 1)..]);
            }
            _ => bytes.truncate(at),
        }
    }
    bytes.truncate(64 << 10);
}

/// The corpus of one target, then `mutations` of it.
fn run(target: &str, mutations: u64) {
    let (_, body) = *TARGETS.iter().find(|(name, _)| *name == target).expect("a target");
    let files = files(target);
    for (name, bytes) in &files {
        try_one(target, body, name, bytes);
    }
    let all: Vec<Vec<u8>> = files.into_values().collect();
    for seed in 0..mutations {
        let mut rng = Rng(seed);
        let mut bytes = all[rng.below(all.len())].clone();
        mutate(&mut bytes, &all, &mut rng);
        try_one(target, body, &format!("mutation {seed}"), &bytes);
    }
}

#[test]
fn handshakes_of_any_bytes() {
    run("handshake", 4000);
}

#[test]
fn requests_of_any_bytes() {
    run("requests", 8000);
}

#[test]
fn replies_to_anything_are_understood() {
    run("replies", 3000);
}

#[test]
fn what_another_site_sends_and_what_is_kept() {
    run("control", 8000);
    run("data", 4000);
    run("frame", 4000);
    run("residency", 8000);
    run("records", 4000);
}

#[test]
fn sessions_of_the_corpus() {
    run("session", 150);
}

/// Long random interleavings of several clients' requests, against the model.
#[test]
fn several_clients_and_a_model_agree() {
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let bytes: Vec<u8> = (0..6000).map(|_| rng.next() as u8).collect();
        try_one("session", session, &format!("seed {seed}"), &bytes);
    }
}

/// The files whose names begin with `seed-` are what the program makes. `FUZZ_WRITE_SEEDS=1` makes them anew.
#[test]
fn the_seeds_are_what_the_program_makes() {
    let is_writing = std::env::var_os("FUZZ_WRITE_SEEDS").is_some();
    let mut total_bytes = 0;
    for (target, _) in TARGETS {
        let made: BTreeMap<String, Vec<u8>> = seeds()
            .into_iter()
            .filter(|(other, _, _)| *other == target)
            .map(|(_, name, bytes)| (name, bytes))
            .collect();
        if is_writing {
            let folder = corpus().join(target);
            std::fs::create_dir_all(&folder).expect("makes a folder");
            for name in files(target).keys().filter(|name| name.starts_with("seed-")) {
                std::fs::remove_file(folder.join(name)).expect("removes");
            }
            for (name, bytes) in &made {
                std::fs::write(folder.join(name), bytes).expect("writes");
            }
        }
        let mut there = files(target);
        total_bytes += there.values().map(Vec::len).sum::<usize>();
        there.retain(|name, _| name.starts_with("seed-"));
        let is_same = there == made;
        assert!(is_same, "the seeds of {target} are not those of targets/seeds.rs: FUZZ_WRITE_SEEDS=1 makes them anew");
    }
    assert!(total_bytes <= 300 << 10, "the corpus has {total_bytes} bytes: minimise it");
}
