//! What the fuzz targets do, for whoever brings bytes: libFuzzer (`fuzz/fuzz_targets/`), and an ordinary test that runs
//! the corpus and its mutations (`tests/nbd/fuzz.rs`). A property that does not hold panics.
//!
//! Must not know the server's decisions: what has to come out is said here a second time, from the protocol's text.

pub(crate) mod answers;
mod disk;
pub(crate) mod drive;
mod handshake;
mod input;
pub(crate) mod judge;
mod records;
mod replies;
mod requests;
mod session;
mod wire;

pub mod seeds;

pub use handshake::handshake;
pub use input::Rng;
pub use records::records;
pub use replies::replies;
pub use requests::requests;
pub use session::session;
pub use wire::{control, data, frame, residency};

/// A target: its name, which is that of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 9] = [
    ("handshake", handshake),
    ("requests", requests),
    ("replies", replies),
    ("session", session),
    ("control", control),
    ("data", data),
    ("frame", frame),
    ("residency", residency),
    ("records", records),
];
