//! The part of blockferry's core that its NBD server and its wire need.

#[path = "../../src/core/frame.rs"]
pub mod frame;
#[path = "../../src/core/ids.rs"]
pub mod ids;
#[path = "../../src/core/manifest.rs"]
pub mod manifest;
#[path = "../../src/core/nbd/mod.rs"]
pub mod nbd;
#[path = "../../src/core/residency.rs"]
pub mod residency;
#[path = "../../src/core/wire/mod.rs"]
pub mod wire;
