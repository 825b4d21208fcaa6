//! Why a configuration is refused: where, what, and what to do about it.
//! Must not know what the keys mean.

use std::fmt;
use std::path::{Path, PathBuf};

/// A configuration that cannot be used. One line: `FILE:LINE: [section] key: what; what to do`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    place: Place,
    what: String,
    next: String,
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// The file as a whole.
    File(PathBuf),
    /// A line of the file, counted from 1.
    Line(PathBuf, usize),
    /// A variable of the environment.
    Variable(String),
}

impl ConfigError {
    pub(super) fn new(place: Place, what: impl Into<String>, next: impl Into<String>) -> ConfigError {
        ConfigError { place, what: what.into(), next: next.into() }
    }

    /// The file that is to be corrected; `None` when the fault is in the environment.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::File(path) | Place::Line(path, _) => Some(path),
            Place::Variable(_) => None,
        }
    }

    /// The line of the file, counted from 1, where one is to blame.
    pub fn line(&self) -> Option<usize> {
        match &self.place {
            Place::Line(_, line) => Some(*line),
            Place::File(_) | Place::Variable(_) => None,
        }
    }

    /// The variable of the environment that is to be corrected.
    pub fn variable(&self) -> Option<&str> {
        match &self.place {
            Place::Variable(name) => Some(name),
            Place::File(_) | Place::Line(..) => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File(path) => write!(f, "{}", path.display()),
            Place::Line(path, line) => write!(f, "{}:{line}", path.display()),
            Place::Variable(name) => write!(f, "environment variable {name}"),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)?;
        if !self.next.is_empty() {
            write!(f, "; {}", self.next)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
