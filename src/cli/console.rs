//! What a verb may speak to: output, errors, the environment; and how a verb fails.
//! Must not know any verb.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::config::ConfigError;
use crate::control::ClientError;

/// The surroundings of a verb. Tests give it buffers.
pub(super) struct Console<'a> {
    /// Results.
    pub out: &'a mut dyn Write,
    /// Progress and errors.
    pub err: &'a mut dyn Write,
    /// Whether somebody watches `err`: bars instead of lines.
    pub watched: bool,
    /// Whether somebody watches `out`: it may be redrawn.
    pub redraws: bool,
    /// How often progress is looked at and told.
    pub pace: Pace,
    /// All variables.
    pub variables: Vec<(String, String)>,
}

/// The times of following something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Between two looks.
    pub poll: Duration,
    /// Between two lines, where nobody watches.
    pub line: Duration,
    /// A daemon may be away for this long (it is being restarted).
    pub absence: Duration,
    /// A request may take this long before its progress is told.
    pub quiet: Duration,
    /// Beyond a hand-over's own time, until it is not waited for any longer: withdrawing takes its time, too.
    pub slack: Duration,
}

/// Why a verb did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// Wrong usage or configuration.
    #[error("{0}")]
    Usage(String),
    /// The operation failed.
    #[error("{0}")]
    Failed(String),
    /// Nobody takes the output.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

impl CliError {
    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            CliError::Usage(_) => 2,
            CliError::Failed(_) => 1,
            // `blockferry status | head -1` is not a failure.
            CliError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            CliError::Output(_) => 1,
        }
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> CliError {
        CliError::Failed(error.to_string())
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> CliError {
        CliError::Usage(error.to_string())
    }
}

impl Console<'_> {
    /// A line of results.
    pub fn say(&mut self, line: impl AsRef<str>) -> Result<(), CliError> {
        Ok(writeln!(self.out, "{}", line.as_ref())?)
    }

    /// Results as JSON, indented for people.
    pub fn say_json(&mut self, value: &impl Serialize) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(value);
        self.say(text.map_err(|error| CliError::Failed(format!("the report cannot be written as JSON: {error}")))?)
    }

    /// A line beside the results. That nobody reads it is no reason to stop.
    pub fn note(&mut self, line: impl AsRef<str>) {
        let _ = writeln!(self.err, "{}", line.as_ref());
    }

    /// All variables of the environment.
    pub fn environment(&self) -> impl Iterator<Item = (String, String)> {
        self.variables.clone().into_iter()
    }

    /// One variable of the environment.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}
