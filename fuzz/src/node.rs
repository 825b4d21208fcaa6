//! The part of blockferry's `node` that reads and writes its rows.

#[path = "../../src/node/record.rs"]
pub mod record;
#[path = "../../src/node/record_v1.rs"]
mod record_v1;
