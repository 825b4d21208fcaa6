//! Where a program of `tools/` keeps what it makes: a directory that lasts, and in it one for each run, which goes with
//! the run. Must not know what lies there.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Longest path of a home: `run-PID/a/control.sock` has to fit a socket's address, 107 bytes.
const LONGEST_HOME_BYTES: usize = 75;

/// Makes and finds the directory that lasts: `dir`, or `~/.cache/blockferry/PROGRAM`.
///
/// # Errors
/// When it cannot be made, or its path is too long for sockets.
pub fn home_dir(dir: Option<&Path>, program: &str) -> Result<PathBuf> {
    let dir = match (dir, std::env::var_os("HOME")) {
        (Some(dir), _) => dir.to_owned(),
        (None, Some(home)) => Path::new(&home).join(".cache/blockferry").join(program),
        (None, None) => bail!("HOME is not set: say --dir DIR"),
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let dir = fs::canonicalize(&dir).with_context(|| format!("cannot find {}", dir.display()))?;
    if dir.as_os_str().len() > LONGEST_HOME_BYTES {
        bail!("{} is too long for sockets in it: say --dir DIR with a shorter path", dir.display());
    }
    Ok(dir)
}

/// Fails when `dir` has room for less than `needed_bytes`; `instead` is what the user may do.
///
/// # Errors
/// That, or when the file system does not say.
pub fn require_room(dir: &Path, needed_bytes: u64, instead: &str) -> Result<()> {
    let stats = nix::sys::statvfs::statvfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    let free = stats.blocks_available() as u64 * stats.fragment_size() as u64;
    if free < needed_bytes {
        let (free, needed, dir) = (free >> 20, needed_bytes >> 20, dir.display());
        bail!("{dir} has room for {free} MiB, {needed} MiB are needed: {instead}");
    }
    Ok(())
}

/// A run's files; gone in the end, unless they are to be kept.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    keep: bool,
}

impl RunDir {
    /// Makes it in `home`, and removes what runs left there that were killed.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(home: &Path, keep: bool) -> Result<RunDir> {
        sweep(home);
        let path = home.join(format!("run-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        if keep {
            let kept = home.join(format!("kept-{}", std::process::id()));
            fs::rename(&path, &kept).with_context(|| format!("cannot make {}", kept.display()))?;
            return Ok(RunDir { path: kept, keep });
        }
        Ok(RunDir { path, keep })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the files for a look, after all.
    pub fn keep(&mut self) {
        if self.keep {
            return;
        }
        self.keep = true;
        // Under a name that no later run sweeps away; where that fails it is this one.
        let kept = self.path.with_file_name(format!("kept-{}", std::process::id()));
        if fs::rename(&self.path, &kept).is_ok() {
            self.path = kept;
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.keep {
            println!("Images, logs and configurations of this run are in {}", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes what runs left that were killed.
fn sweep(home: &Path) {
    let Ok(entries) = fs::read_dir(home) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("run-")).and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // It takes room, no more: the next run tries again.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_dead_runs_left_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let mine = format!("run-{}", std::process::id());
        // Above the largest process id that Linux gives.
        for name in [mine.as_str(), "run-4194305", "kept-4194305", "images"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        sweep(dir.path());
        let left = |name: &str| dir.path().join(name).exists();
        assert_eq!([left(&mine), left("run-4194305"), left("kept-4194305"), left("images")], [true, false, true, true]);
    }
}
