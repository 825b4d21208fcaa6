//! The damage table: what is done (bits flipped, a file cut in half, emptied, deleted, replaced by garbage) x where
//! (the store, the state database, residency rows, the raw file, identity, configuration, the source, the wire), each row
//! with its one expected outcome. Whatever the damage: what a guest reads is right, or an error; and who is to mend it is
//! told in one line what and where.
//!
//! Must not know how the daemon notices.

#[path = "e2e/disk.rs"]
#[allow(dead_code, reason = "shared with the end-to-end tests")]
mod disk;
#[path = "damage/files.rs"]
mod files;
#[path = "damage/half_way.rs"]
mod half_way;
#[path = "e2e/nbd_client.rs"]
#[allow(dead_code, reason = "shared with the end-to-end tests")]
mod nbd_client;
#[path = "damage/residency.rs"]
mod residency;
#[path = "e2e/site.rs"]
#[allow(dead_code, reason = "shared with the end-to-end tests")]
mod site;
#[path = "damage/source.rs"]
mod source;
#[path = "damage/wire.rs"]
mod wire;
