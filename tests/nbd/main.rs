//! NBD, from outside and from close by. The fuzz targets' bodies on their corpus and beside a model of a disk, with the server
//! as a library; and the protocol's rules checked on raw sockets with a daemon, on a volume that is complete and on one
//! that is being relocated. Must not know how anything is done inside.

use blockferry::{core, handover, image, nbd, node, store};

mod client;
mod commands;
mod crowds;
#[path = "../e2e/disk.rs"]
#[expect(dead_code, reason = "shared with the tests from end to end")]
mod disk;
mod fuzz;
mod handshakes;
mod kinds;
mod long_requests;
mod mounted;
#[path = "../e2e/nbd_client.rs"]
#[expect(dead_code, reason = "shared with the tests from end to end")]
mod nbd_client;
mod peers;
#[path = "../e2e/site.rs"]
#[expect(dead_code, reason = "shared with the tests from end to end")]
mod site;
#[path = "../e2e/small_disk.rs"]
mod small_disk;
#[path = "../../fuzz/src/targets/mod.rs"]
mod targets;
