//! An ext4 image without mounting it: make, change, look up blocks, check. Must not know: why, or where the bytes
//! come from.

use std::fs::{self, File};
use std::path::Path;

use crate::command::{self, FAKE_TIME, command, last_lines};
use crate::error::FleetError;

/// The file systems' block.
pub const BLOCK_BYTES: u64 = 4096;

/// Makes a file system filled from `tree`.
///
/// `uuid` also seeds the directory hashes, so that nothing in the image is left to chance.
///
/// # Errors
/// What mkfs.ext4 says, a tree that does not fit included.
pub fn make(image: &Path, size: u64, uuid: &str, tree: &Path) -> Result<(), FleetError> {
    let file = File::create(image).map_err(FleetError::file("create", image))?;
    file.set_len(size).map_err(FleetError::file("set the size of", image))?;
    drop(file);
    let what = image.display().to_string();
    let features = format!("hash_seed={uuid},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0");
    command::run(
        command("mkfs.ext4")
            .args(["-q", "-F", "-b", &BLOCK_BYTES.to_string(), "-L", "rootfs", "-U", uuid, "-E", &features, "-d"])
            .args([tree, image]),
        &what,
    )?;
    even_out(image)
}

/// Gives every inode the same owner and times of use and change: those of the tree's files are this user's and this
/// minute's.
fn even_out(image: &Path) -> Result<(), FleetError> {
    let mut script = String::new();
    for inode in FIRST_INODE..=used_inodes(image)? {
        for setting in [format!("ctime @{FAKE_TIME}"), format!("atime @{FAKE_TIME}"), "uid 0".into(), "gid 0".into()] {
            script += &format!("sif <{inode}> {setting}\n");
        }
    }
    run_script(image, &script).map(drop)
}

/// Inodes 1 to 10 are the file system's own, 11 is lost+found.
const FIRST_INODE: u64 = 11;

/// In a fresh file system the inodes in use are the first ones.
fn used_inodes(image: &Path) -> Result<u64, FleetError> {
    let what = image.display().to_string();
    let mut show = command("debugfs");
    let stats = command::run(show.args(["-R", "stats -h"]).arg(image), &what)?;
    let field = |name: &str| -> Option<u64> {
        let line = stats.lines().find(|line| line.starts_with(name))?;
        line.split_ascii_whitespace().last()?.parse().ok()
    };
    match (field("Inode count:"), field("Free inodes:")) {
        (Some(all), Some(free)) => Ok(all - free.min(all)),
        _ => Err(command::failed(&show, &what, "its inode counts are missing from `stats -h`".into())),
    }
}

/// Runs a debugfs script on the image and returns what the commands printed, their echo left out.
///
/// # Errors
/// [`FleetError::Program`] with the first complaint: debugfs itself carries on and exits with 0.
pub fn run_script(image: &Path, script: &str) -> Result<Vec<String>, FleetError> {
    let what = image.display().to_string();
    let file = tempfile::NamedTempFile::new().map_err(FleetError::file("create", &std::env::temp_dir()))?;
    fs::write(file.path(), script).map_err(FleetError::file("write", file.path()))?;
    let mut debugfs = command("debugfs");
    let output = command::output(debugfs.args(["-w", "-f"]).arg(file.path()).arg(image), &what)?;
    let said = String::from_utf8_lossy(&output.stderr);
    // The version is all that a run without errors says there.
    let complaint = said.lines().find(|line| !line.starts_with("debugfs ") && !line.trim().is_empty());
    if let Some(line) = complaint {
        return Err(command::failed(&debugfs, &what, line.to_owned()));
    }
    if !output.status.success() {
        return Err(command::failed(&debugfs, &what, last_lines(&output)));
    }
    let printed = String::from_utf8_lossy(&output.stdout);
    Ok(printed.lines().filter(|line| !line.starts_with("debugfs:")).map(str::to_owned).collect())
}

/// Where the given blocks of a file lie in the image, in blocks of [`BLOCK_BYTES`].
///
/// # Errors
/// When the file is not there or one of its blocks is a hole.
pub fn blocks_of(image: &Path, path: &str, logical: &[u64]) -> Result<Vec<u64>, FleetError> {
    let script: String = logical.iter().map(|block| format!("bmap \"/{path}\" {block}\n")).collect();
    let printed = run_script(image, &script)?;
    let blocks: Vec<u64> = printed.iter().filter_map(|line| line.trim().parse().ok()).filter(|b| *b > 0).collect();
    if blocks.len() == logical.len() {
        return Ok(blocks);
    }
    let message = format!("/{path} has {} of the {} blocks looked for", blocks.len(), logical.len());
    Err(command::failed(&command("debugfs"), &image.display().to_string(), message))
}

/// Checks that the file system is clean; changes nothing.
///
/// # Errors
/// [`FleetError::NotClean`] with what e2fsck found.
pub fn check(image: &Path) -> Result<(), FleetError> {
    let output = command::output(command("e2fsck").arg("-fn").arg(image), &image.display().to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(FleetError::NotClean { image: image.to_owned(), message: last_lines(&output) })
}
