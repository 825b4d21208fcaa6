//! Small disks: a tmpfs in a mount namespace of the daemon's own, which goes with it. Must not know what fills them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::site::{skipped, text};

fn unshare() -> Vec<String> {
    let mut words = vec!["unshare", "--mount"];
    if !nix::unistd::geteuid().is_root() {
        words.push("--map-root-user");
    }
    words.into_iter().map(str::to_owned).collect()
}

/// The launcher of a daemon for which `folder` is a file system of so many MiB.
pub fn on_small_disk(folder: &Path, mib: u32) -> Vec<String> {
    let script = format!("mount -t tmpfs -o size={mib}m blockferry-test '{}' && exec \"$@\"", text(folder));
    let mut words = unshare();
    words.extend(["sh".to_owned(), "-c".to_owned(), script, "sh".to_owned()]);
    words
}

/// Says so where there are no small disks.
pub fn is_impossible(test: &str) -> bool {
    let probe = tempfile::tempdir().expect("a directory");
    let launcher = on_small_disk(probe.path(), 1);
    let tried = Command::new(&launcher[0]).args(&launcher[1..]).arg("true").output();
    let is_impossible = !tried.is_ok_and(|tried| tried.status.success());
    if is_impossible {
        skipped(test, "mount namespaces cannot be made here");
    }
    is_impossible
}

/// A folder as the daemon sees it, from outside its namespace.
pub fn seen_by(pid: i32, folder: &Path) -> PathBuf {
    let root = Path::new("/proc").join(pid.to_string()).join("root");
    root.join(folder.strip_prefix("/").expect("absolute"))
}
