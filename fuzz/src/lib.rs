//! What the fuzz targets need of blockferry, and no more: the NBD protocol and its server, the wire between sites, the rows of the
//! state database; compiled from the same files, but without RocksDB, which takes half an hour to build with a sanitizer.
//!
//! The targets' bodies are in [`targets`], which an ordinary test of blockferry (`tests/nbd`) compiles too.

#![allow(dead_code, reason = "parts of a larger program")]

pub mod core;
#[path = "../../src/handover/mod.rs"]
pub mod handover;
#[path = "../../src/seeded_bugs.rs"]
pub mod seeded_bugs;
#[path = "../../src/image/mod.rs"]
pub mod image;
#[path = "../../src/nbd/mod.rs"]
pub mod nbd;
pub mod node;
#[path = "../../src/pipe.rs"]
pub mod pipe;
pub mod store;
pub mod targets;
#[path = "../../src/workers.rs"]
pub mod workers;
