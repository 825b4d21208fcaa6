//! The part of blockferry's core that its NBD server needs.

#[path = "../../src/core/ids.rs"]
pub mod ids;
#[path = "../../src/core/nbd/mod.rs"]
pub mod nbd;
