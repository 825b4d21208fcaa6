//! The laboratory of the programs in `tools/` that run real sites: daemons as processes, the WAN between them, an NBD
//! client, seeded numbers, the options and the directory of a run. Must not know blockferry's library: it sees what a
//! user sees, the command line, NBD and the files.

pub mod cli;
pub mod images;
pub mod nbd;
pub mod process;
pub mod random;
pub mod run_dir;
pub mod site;
