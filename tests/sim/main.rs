//! Deterministic simulation: the volume, fetch, scheduler, source and ownership logic of two or three sites over a disk, a network and a
//! clock of chance. One number drives everything. docs/architecture.md says what is real in it and what is not.
//!
//! `BLOCKFERRY_SIM_SEEDS=100000 cargo nextest run --test sim` runs more seeds; `BLOCKFERRY_SIM_SEED=7 cargo nextest run --test sim
//! one_seed --no-capture` runs one and prints what happened in it.

#[cfg(feature = "seeded-bugs")]
mod bugs;
mod disk;
mod faults;
mod guest;
mod kept;
mod model;
mod network;
mod operator;
mod panics;
mod people;
mod process;
mod random;
mod referee;
mod run;
mod seeds;
mod site;
mod site_lives;
mod slot;
mod wiretap;
mod world;

/// Bytes of a block: the smallest, so that a world is small.
const BLOCK: u64 = 16 << 10;
