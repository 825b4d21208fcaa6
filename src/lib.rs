//! blockferry moves a VM's disk between data centres while the VM keeps running, and sends over the WAN only what the
//! other side does not have yet. `docs/architecture.md` is the map of the modules below.

pub mod analyze;
pub mod cli;
pub mod config;
pub mod control;
pub mod core;
pub mod custody;
pub mod fetch;
pub mod handover;
pub mod image;
pub mod nbd;
pub mod node;
pub mod pipe;
pub mod seeded_bugs;
pub mod source;
pub mod store;
pub mod transport;
pub mod units;
pub mod volume;
pub mod workers;
