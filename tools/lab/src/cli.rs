//! What the command lines of programs that run sites have in common. Their help for users is in the scripts beside them, for
//! there is nothing built yet when they ask for it. Must not know what is done with it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Command};
use serde::Serialize;

/// Where a run takes things from and leaves them.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Leave images, logs and configurations of all sites for a look
    #[arg(long)]
    pub keep: bool,
    /// Where images are kept between runs, and a run's files lie [default: a folder for each program in ~/.cache/blockferry]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Write what came out to this file, too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where the programs are
    #[arg(long, value_name = "DIR", hide = true)]
    pub programs: Option<PathBuf>,
}

impl RunOptions {
    /// Writes what came out to the file that was named, if one was.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_json(&self, report: &impl Serialize) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let json = serde_json::to_vec_pretty(report).context("cannot put into JSON what came out")?;
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The options of a program that `script`, which says them to users, does not have at the beginning of a line.
pub fn missing_in(script: &str, command: &Command) -> Vec<String> {
    let shown = command.get_arguments().filter(|option| !option.is_hide_set());
    let lines = shown.filter_map(|option| option.get_long()).map(|long| format!("  --{long} "));
    lines.filter(|line| !script.lines().any(|said| said.starts_with(line.as_str()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_script_does_not_say_is_found() {
        let command = RunOptions::augment_args(Command::new("run"));
        let script = "  --keep       leaves everything\n  --directory  not that one\nor --json FILE\n";
        assert_eq!(missing_in(script, &command), ["  --dir ", "  --json "]);
    }
}
