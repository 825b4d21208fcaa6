//! Two sites, end to end, as real processes with a relay between them: every line of "it is done when" that can be
//! tested from outside. Must not know the library: only the command line, NBD, files, and what the relay counts.

mod bad_images;
mod bad_peers;
mod damage;
mod dedup;
mod disk;
mod disk_full;
mod guest;
mod nbd_client;
mod outages;
mod ownership;
mod pace;
mod relocation;
mod running_out;
mod scale;
mod site;
mod small_disk;
mod tls;
mod tools;
mod way_back;
