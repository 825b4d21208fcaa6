//! What can go wrong while images are made. Must not know: how they are made.

use std::path::{Path, PathBuf};

/// An error of the tool.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// An option that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// A program that is needed is not installed.
    #[error("{program} is not installed: apt-get install {package}")]
    Missing {
        /// The program.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program failed.
    #[error("{program} failed for {what}: {message}")]
    Program {
        /// The program.
        program: String,
        /// What it was to do.
        what: String,
        /// What it said.
        message: String,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The packages could not be had.
    #[error("cannot get the Debian packages: {0}; try `apt-get update`, or use --from-host")]
    Packages(String),
    /// A file system check found an image damaged.
    #[error("{image} is not clean, which is a bug of this tool (the image is left for you to look at): {message}")]
    NotClean {
        /// The image.
        image: PathBuf,
        /// What e2fsck said.
        message: String,
    },
}

impl FleetError {
    /// The exit status of the program: 2 for wrong usage, 1 for anything that failed.
    pub fn exit_status(&self) -> u8 {
        match self {
            FleetError::Usage(_) => 2,
            _ => 1,
        }
    }

    pub(crate) fn file<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> FleetError + 'a {
        move |source| FleetError::File { action, path: path.to_owned(), source }
    }
}
