//! Directory trees out of this machine's `/usr`, for when there is no package archive within reach.
//! Must not know: images, packages.
//!
//! Directories are taken in an order that the seed decides, until there is enough for the template, then for each
//! profile.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use crate::error::FleetError;
use crate::fleet::{Contents, Profile, Tree};
use crate::recipe;
use crate::rng::Rng;
use crate::script::parent;
use crate::tree::{self, Kind};

/// Larger files are left out: one of them would be a whole profile.
const FILE_MAX_BYTES: u64 = 32 << 20;

/// Where files come from.
const PARTS: [&str; 4] = ["bin", "lib", "sbin", "share"];

/// What is taken for the template and for each profile, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// For the template.
    pub template: u64,
    /// For each profile.
    pub profile: u64,
}

impl Budget {
    /// For images of this size: half of it, at most 560 MiB; a tenth of that again for each profile.
    pub fn for_image(size: u64) -> Budget {
        let template = (size / 2).min(560 << 20);
        Budget { template, profile: template / 10 }
    }
}

/// Copies parts of `usr` (normally `/usr`) to trees in the cache.
///
/// # Errors
/// When the files cannot be copied, or there are not enough.
pub fn contents(
    usr: &Path,
    cache: &Path,
    profiles: usize,
    seed: u64,
    budget: Budget,
    say: &(dyn Fn(&str) + Sync),
) -> Result<Contents, FleetError> {
    let mut groups = groups(usr)?.into_iter().collect::<Vec<_>>();
    Rng::for_purpose(seed, "host").shuffle(&mut groups);
    let mut groups = groups.into_iter().map(|(_, files)| files);
    let template = take(&mut groups, budget.template);
    if template.iter().map(|file| file.size).sum::<u64>() < budget.template / 2 {
        return Err(FleetError::Usage(format!("{} has too few files for a template", usr.display())));
    }
    let template = copy(usr, cache, &template, say)?;
    let mut named = Vec::new();
    for n in 1..=profiles {
        let files = take(&mut groups, budget.profile);
        named.push(Profile { name: format!("host{n}"), tree: copy(usr, cache, &files, say)? });
    }
    Ok(Contents { source: "host".into(), template, profiles: named })
}

struct Found {
    path: String,
    kind: Kind,
    size: u64,
    modified_ns: u128,
}

/// Files and links by directory.
fn groups(usr: &Path) -> Result<BTreeMap<String, Vec<Found>>, FleetError> {
    let mut groups: BTreeMap<String, Vec<Found>> = BTreeMap::new();
    for part in PARTS.iter().filter(|part| usr.join(part).is_dir()) {
        for entry in tree::list_readable(&usr.join(part))? {
            let path = format!("{part}/{}", entry.path);
            let size = match entry.kind {
                Kind::Dir => continue,
                Kind::File(size) if size > FILE_MAX_BYTES => continue,
                Kind::File(size) => size,
                Kind::Link(_) => 0,
            };
            let modified = fs::symlink_metadata(usr.join(&path)).and_then(|meta| meta.modified());
            let modified_ns = modified.ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
            let found = Found { kind: entry.kind, size, modified_ns, path: path.clone() };
            groups.entry(parent(&path).to_owned()).or_default().push(found);
        }
    }
    Ok(groups)
}

/// Directory by directory until nearly all of the budget is spent; files that do not fit into the rest are left out.
fn take(groups: &mut impl Iterator<Item = Vec<Found>>, budget: u64) -> Vec<Found> {
    let (mut taken, mut left) = (Vec::new(), budget);
    while left > budget / 50 {
        let Some(files) = groups.next() else { break };
        for file in files {
            // A file costs an inode and part of a block, too.
            let cost = file.size + 4096;
            if cost <= left {
                left -= cost;
                taken.push(file);
            }
        }
    }
    taken.sort_by(|a, b| a.path.cmp(&b.path));
    taken
}

fn copy(usr: &Path, cache: &Path, files: &[Found], say: &(dyn Fn(&str) + Sync)) -> Result<Tree, FleetError> {
    let facts: Vec<String> = files.iter().map(|f| format!("{} {} {}", f.path, f.size, f.modified_ns)).collect();
    let id = recipe::id(["host"].into_iter().chain(facts.iter().map(String::as_str)));
    let root = cache.join("trees").join(&id);
    if root.exists() {
        return Ok(Tree { root, id, packages: Vec::new() });
    }
    say(&format!("copying {} files from {}", files.len(), usr.display()));
    let part = root.with_extension("part");
    if part.exists() {
        fs::remove_dir_all(&part).map_err(FleetError::file("remove", &part))?;
    }
    fs::create_dir_all(&part).map_err(FleetError::file("create the directory", &part))?;
    for file in files {
        let (from, to) = (usr.join(&file.path), part.join("usr").join(&file.path));
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).map_err(FleetError::file("create the directory", dir))?;
        }
        match &file.kind {
            Kind::Link(target) => std::os::unix::fs::symlink(target, &to).map_err(FleetError::file("create", &to))?,
            _ => match fs::copy(&from, &to) {
                Ok(_) => {}
                // What this user may not read is left out.
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(FleetError::file("copy", &from)(error)),
            },
        }
    }
    fs::rename(&part, &root).map_err(FleetError::file("rename", &part))?;
    Ok(Tree { root, id, packages: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_different_files_for_each_and_remembers() {
        let dir = tempfile::tempdir().unwrap();
        let (usr, cache) = (dir.path().join("usr"), dir.path().join("cache"));
        for n in 0..100 {
            let sub = usr.join(format!("share/d{n:02}"));
            fs::create_dir_all(&sub).unwrap();
            fs::write(sub.join("file"), vec![n as u8; 10_000]).unwrap();
        }
        let budget = Budget { template: 600_000, profile: 200_000 };
        let get = || contents(&usr, &cache, 2, 1, budget, &|_| ()).unwrap();
        let first = get();
        let files = |tree: &Tree| -> Vec<String> {
            let entries = tree::list(&tree.root).unwrap();
            entries.into_iter().filter(|e| e.kind != Kind::Dir).map(|e| e.path).collect()
        };
        let (template, a, b) = (files(&first.template), files(&first.profiles[0].tree), files(&first.profiles[1].tree));
        assert!(template.len() > 35 && a.len() > 10 && b.len() > 10);
        assert!(a.iter().chain(&b).all(|path| !template.contains(path)));
        assert_eq!(get().template.id, first.template.id);
        let other = contents(&usr, &cache, 2, 2, budget, &|_| ()).unwrap();
        assert_ne!(other.template.id, first.template.id);
    }

    #[test]
    fn too_little_is_a_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = contents(dir.path(), dir.path(), 1, 1, Budget::for_image(1 << 30), &|_| ()).unwrap_err();
        assert!(error.to_string().contains("too few"), "{error}");
    }
}
