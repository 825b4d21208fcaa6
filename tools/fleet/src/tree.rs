//! What lies in a directory tree, in an order that does not depend on the machine.
//! Must not know: packages, images.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use crate::error::FleetError;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of so many bytes.
    File(u64),
    /// A directory.
    Dir,
    /// A symbolic link to this.
    Link(String),
}

/// Something in a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root, with `/` between names.
    pub path: String,
    /// What it is.
    pub kind: Kind,
}

/// All files, directories and links below `root`, sorted by path, parents first. Names that a debugfs script cannot
/// carry (quotes, control characters, not UTF-8) are left out, and so is what lies below them; so are sockets,
/// devices and the like.
///
/// # Errors
/// When a directory cannot be read.
pub fn list(root: &Path) -> Result<Vec<Entry>, FleetError> {
    walk(root, false)
}

/// As [`list`], but what this user may not read is left out.
///
/// # Errors
/// When a directory cannot be read for another reason.
pub fn list_readable(root: &Path) -> Result<Vec<Entry>, FleetError> {
    walk(root, true)
}

fn walk(root: &Path, skips_forbidden: bool) -> Result<Vec<Entry>, FleetError> {
    let mut entries = Vec::new();
    let mut open = vec![String::new()];
    while let Some(dir) = open.pop() {
        let full = root.join(&dir);
        let found = match fs::read_dir(&full) {
            Err(error) if skips_forbidden && error.kind() == ErrorKind::PermissionDenied => continue,
            other => other.map_err(FleetError::file("read the directory", &full))?,
        };
        for found in found {
            let found = found.map_err(FleetError::file("read the directory", &full))?;
            let Some(name) = found.file_name().to_str().filter(|name| is_plain(name)).map(str::to_owned) else {
                continue;
            };
            let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
            let meta = found.metadata().map_err(FleetError::file("look at", &found.path()))?;
            let kind = if meta.is_dir() {
                open.push(path.clone());
                Kind::Dir
            } else if meta.is_file() {
                Kind::File(meta.len())
            } else if meta.is_symlink() {
                let target = fs::read_link(found.path()).map_err(FleetError::file("read the link", &found.path()))?;
                match target.to_str().filter(|target| is_plain(target)) {
                    Some(target) => Kind::Link(target.to_owned()),
                    None => continue,
                }
            } else {
                continue;
            };
            entries.push(Entry { path, kind });
        }
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

/// Whether a debugfs script can carry this: between double quotes, on one line, and not taken for an inode number.
fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('<')
        && !name.contains(|c: char| c == '"' || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_sorted_and_leaves_out_what_a_script_cannot_carry() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("b/c")).unwrap();
        fs::write(root.join("b/c/file one"), b"12345").unwrap();
        fs::write(root.join("a\"quoted"), b"").unwrap();
        fs::write(root.join("a\nline"), b"").unwrap();
        std::os::unix::fs::symlink("b/c", root.join("a")).unwrap();
        let entries = list(root).unwrap();
        let expected =
            [("a", Kind::Link("b/c".into())), ("b", Kind::Dir), ("b/c", Kind::Dir), ("b/c/file one", Kind::File(5))];
        assert_eq!(entries, expected.map(|(path, kind)| Entry { path: path.into(), kind }));
    }

    #[test]
    fn a_missing_root_is_named() {
        let error = list(Path::new("/nonexistent/tree")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/tree"), "{error}");
    }
}
