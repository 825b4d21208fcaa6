//! Real, similar disk images without root: an ext4 template filled from Debian packages (or from parts of this
//! machine's `/usr`), and clones of it that have lived: other packages, data of their own, upgrades, deletions,
//! rewrites in place.
//!
//! A clone starts as a copy of the template's image and is changed through the file system, so that what it did not
//! touch stays at the same block positions, and what it deleted stays behind in free blocks. Everything follows from
//! the seed.
//!
//! Must not know: blockferry.

pub mod cli;
pub mod command;
pub mod data;
pub mod error;
pub mod ext4;
pub mod fleet;
pub mod host;
pub mod image;
pub mod packages;
pub mod plan;
pub mod recipe;
pub mod report;
pub mod rng;
pub mod script;
pub mod tree;
pub mod units;

pub use error::FleetError;
pub use fleet::{Contents, FleetOptions, Profile, build};
pub use report::{FleetReport, ImageReport};
