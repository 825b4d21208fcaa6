//! Runs the programs that do the real work. Must not know: what for.

use std::process::{Command, Output, Stdio};

use crate::error::FleetError;

/// The time that every file system claims to have been made and changed at: 2025-01-01, so that images do not differ
/// by it.
pub const FAKE_TIME: u64 = 1_735_689_600;

/// The programs that are always needed, and the packages that have them.
const NEEDED: [(&str, &str); 4] =
    [("mkfs.ext4", "e2fsprogs"), ("debugfs", "e2fsprogs"), ("e2fsck", "e2fsprogs"), ("cp", "coreutils")];

/// A command with a quiet, predictable environment. File system tools are looked for in the system's directories,
/// too, which are not in every user's PATH.
pub fn command(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command
        .env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"))
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("E2FSPROGS_FAKE_TIME", FAKE_TIME.to_string())
        .env("SOURCE_DATE_EPOCH", FAKE_TIME.to_string())
        .env_remove("DEBUGFS_PAGER")
        .stdin(Stdio::null());
    command
}

/// Whether a program can be started.
pub fn is_installed(program: &str) -> bool {
    // Found means started; what it thinks of `--version` does not matter.
    command(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Checks that all programs for making file systems are there.
///
/// # Errors
/// [`FleetError::Missing`] for the first that is not.
pub fn require_file_system_tools() -> Result<(), FleetError> {
    NEEDED.iter().try_for_each(|(program, package)| require(program, package))
}

/// Checks that a program is there.
///
/// # Errors
/// [`FleetError::Missing`], naming the Debian package.
pub fn require(program: &'static str, package: &'static str) -> Result<(), FleetError> {
    if is_installed(program) { Ok(()) } else { Err(FleetError::Missing { program, package }) }
}

/// Runs to the end, whatever the exit status.
///
/// # Errors
/// [`FleetError::Program`] when it cannot be started.
pub fn output(command: &mut Command, what: &str) -> Result<Output, FleetError> {
    command.output().map_err(|source| failed(command, what, source.to_string()))
}

/// Runs to the end and returns what it printed.
///
/// # Errors
/// [`FleetError::Program`] with the last lines of its complaint when its exit status is not 0.
pub fn run(command: &mut Command, what: &str) -> Result<String, FleetError> {
    let output = output(command, what)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failed(command, what, format!("{}; {}", output.status, last_lines(&output))))
}

/// The end of what a program said, on one line.
pub fn last_lines(output: &Output) -> String {
    let said = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].join("\n");
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(5)..].join(" | ")
}

/// The error for a program that failed.
pub fn failed(command: &Command, what: &str, message: String) -> FleetError {
    let program = command.get_program().to_string_lossy().into_owned();
    FleetError::Program { program, what: what.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_say_what_the_program_said() {
        let error = run(command("sh").args(["-c", "echo first; echo broken >&2; exit 3"]), "a test").unwrap_err();
        let error = error.to_string();
        assert!(error.contains("sh failed for a test") && error.contains("broken"), "{error}");
        let missing = require("no-such-program-at-all", "no-such-package").unwrap_err().to_string();
        assert!(missing.contains("apt-get install no-such-package"), "{missing}");
    }
}
