//! Real, similar images, made by `fleet` and kept between runs; and how files compare. Must not know sites.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process;
use crate::site::{Programs, parse};

/// What is wanted of the fleet.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// How many clones.
    pub count: usize,
    /// The size of each.
    pub size_bytes: u64,
    /// Filled from this machine's files; what is smaller than 1 GiB has to be.
    pub from_host: bool,
}

/// A clone of the fleet's template.
#[derive(Clone, Debug)]
pub struct Image {
    /// `vm01`, `vm02` ...
    pub name: String,
    /// What its machine does, in a word.
    pub profile: String,
    /// The raw file.
    pub source: PathBuf,
}

impl Wanted {
    /// Where these images lie within `home`.
    pub fn dir(&self, home: &Path) -> PathBuf {
        let count = if self.count == 3 { String::new() } else { format!("-{}", self.count) };
        home.join(format!("images-{}MiB{}{count}", self.size_bytes >> 20, if self.from_host { "-host" } else { "" }))
    }

    /// Whether an earlier run has made them.
    pub fn is_made(&self, home: &Path) -> bool {
        self.dir(home).join("fleet.json").exists()
    }
}

/// Makes them within `home`, where they are missing.
///
/// # Errors
/// When `fleet` fails, or makes others.
pub fn make(programs: &Programs, home: &Path, wanted: &Wanted) -> Result<Vec<Image>> {
    #[derive(Deserialize)]
    struct Fleet {
        images: Vec<FleetImage>,
    }
    #[derive(Deserialize)]
    struct FleetImage {
        path: PathBuf,
        profile: Option<String>,
    }
    let Wanted { count, size_bytes, from_host } = *wanted;
    let mut fleet = process::command(&programs.fleet);
    fleet.args(["--json", "--vms", &count.to_string(), "--size", &size_bytes.to_string(), "--out"]);
    fleet.arg(wanted.dir(home));
    if from_host {
        fleet.args(["--from-host", "--data-mb", &(size_bytes >> 24).clamp(1, 32).to_string()]);
    }
    let fleet: Fleet = parse(&process::output(&mut fleet, true)?)?;
    let clones = fleet.images.into_iter().filter_map(|image| Some((image.path, image.profile?)));
    let images: Vec<_> = (1..)
        .zip(clones)
        .map(|(place, (source, profile))| Image { name: format!("vm{place:02}"), profile, source })
        .collect();
    if images.len() != count {
        bail!("the fleet has {} virtual machines instead of {count}", images.len());
    }
    Ok(images)
}

/// Where two files differ first, in words; `None`: nowhere.
///
/// # Errors
/// When one of them cannot be read.
pub fn first_difference(is: &Path, should: &Path) -> Result<Option<String>> {
    let open = |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let (is_file, should_file) = (open(is)?, open(should)?);
    let (is_length, length) = (is_file.metadata()?.len(), should_file.metadata()?.len());
    if is_length != length {
        return Ok(Some(format!("{is_length} bytes instead of {length}")));
    }
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for offset in (0..length).step_by(1 << 20) {
        let count = (length - offset).min(1 << 20) as usize;
        is_file.read_exact_at(&mut a[..count], offset).with_context(|| format!("cannot read {}", is.display()))?;
        should_file.read_exact_at(&mut b[..count], offset).context("cannot read the expected image")?;
        if let Some(at) = (0..count).find(|at| a[*at] != b[*at]) {
            let byte = offset + at as u64;
            return Ok(Some(format!("byte {byte} is {:#04x} and should be {:#04x}", a[at], b[at])));
        }
    }
    Ok(None)
}

/// Copies an image; holes stay holes.
///
/// # Errors
/// What `cp` says.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_file(to).with_context(|| format!("cannot remove {}", to.display()))?;
    }
    let mut copy = process::command("cp");
    process::output(copy.args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to), false).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let one = file("one", b"abc");
        assert_eq!(first_difference(&one, &file("same", b"abc")).unwrap(), None);
        let other = first_difference(&one, &file("other", b"abd")).unwrap().unwrap();
        assert!(other.starts_with("byte 2 is 0x63"), "{other}");
        let longer = first_difference(&one, &file("longer", b"abcd")).unwrap().unwrap();
        assert!(longer.starts_with("3 bytes instead of 4"), "{longer}");
    }
}
