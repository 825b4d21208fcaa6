//! The NBD server as a library, against a second reading of the protocol and a model of a disk: the fuzz targets' bodies,
//! run on their corpus, on mutations of it and on random sessions. Must not know volumes or processes.

use blockferry::{core, nbd};

mod fuzz;
#[path = "../../fuzz/src/targets/mod.rs"]
mod targets;
