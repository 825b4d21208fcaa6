//! Architecture as absences: reads the imports of every module and fails when one knows what `docs/architecture.md` says that it
//! must not; and holds the files to the house's rules.

use std::fs;
use std::path::{Path, PathBuf};

/// Module (a path below `src/`), and what must not be named in it.
const MUST_NOT_KNOW: &[(&str, &[&str])] = &[
    (
        "core",
        &[
            "tokio",
            "quinn",
            "rocksdb",
            "std::fs",
            "std::net",
            "std::thread",
            "Instant::now",
            "SystemTime",
            "rand::",
            "crate::image",
            "crate::store",
            "crate::transport",
            "crate::source",
            "crate::fetch",
            "crate::volume",
            "crate::nbd",
            "crate::control",
            "crate::node",
        ],
    ),
    ("image", &["crate::core", "crate::store", "crate::transport", "crate::fetch", "crate::volume", "crate::node"]),
    (
        "store",
        &["crate::transport", "crate::source", "crate::fetch", "crate::volume", "crate::nbd", "crate::node", "quinn"],
    ),
    (
        "transport",
        &["crate::store", "crate::image", "crate::source", "crate::fetch", "crate::volume", "crate::nbd", "core::wire"],
    ),
    ("source", &["crate::nbd", "crate::control", "crate::fetch", "crate::volume", "crate::node", "quinn"]),
    (
        "fetch",
        &["crate::nbd", "crate::image", "crate::volume", "crate::source", "crate::control", "crate::node", "quinn"],
    ),
    ("volume", &["crate::nbd", "crate::transport", "crate::source", "crate::control", "crate::node", "quinn"]),
    (
        "nbd",
        &["crate::store", "crate::fetch", "crate::transport", "crate::source", "crate::volume", "crate::node", "quinn"],
    ),
    ("control", &["crate::fetch", "crate::transport::Endpoint", "crate::volume", "crate::source", "rocksdb", "quinn"]),
    ("analyze", &["crate::transport", "crate::volume", "crate::fetch", "crate::node", "crate::store"]),
    ("config", &["crate::cli", "crate::node", "crate::control", "tokio"]),
    ("cli", &["crate::volume", "crate::fetch", "crate::source", "crate::store", "quinn", "rocksdb"]),
    ("workers", &["crate::"]),
    ("pipe", &["crate::", "tokio"]),
];

/// The only users of a library that is behind a seam.
const ONLY_USERS: &[(&str, &[&str])] =
    &[("quinn", &["transport"]), ("rocksdb", &["store"]), ("axum", &["control"]), ("indicatif", &["cli"])];

#[test]
fn modules_do_not_know_what_they_must_not() {
    let mut violations = Vec::new();
    for (module, forbidden) in MUST_NOT_KNOW {
        for (path, text) in sources_of(module) {
            for (number, line) in code_lines(&text) {
                for name in *forbidden {
                    if line.contains(name) && !(*module == "image" && line.contains("crate::core::ids")) {
                        violations.push(format!("{}:{number}: {module} must not know {name}: {line}", path.display()));
                    }
                }
            }
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn libraries_behind_a_seam_have_one_user() {
    let mut violations = Vec::new();
    for (library, users) in ONLY_USERS {
        for (path, text) in all_sources() {
            let is_user =
                users.iter().any(|user| path.starts_with(src().join(user)) || path == src().join(format!("{user}.rs")));
            for (number, line) in code_lines(&text) {
                let is_use = line.starts_with(&format!("use {library}::")) || line.contains(&format!(" {library}::"));
                if is_use && !is_user {
                    violations.push(format!("{}:{number}: {library} belongs to {users:?}: {line}", path.display()));
                }
            }
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn every_file_says_what_it_is_for_and_stays_readable() {
    let mut violations = Vec::new();
    for (path, text) in all_sources() {
        if !text.starts_with("//!") {
            violations.push(format!("{}: does not begin with //!", path.display()));
        }
        let lines = text.lines().count();
        if lines > 1000 {
            violations.push(format!("{}: has {lines} lines, split it", path.display()));
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn the_map_names_every_module() {
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md")).expect("the map");
    let lib = fs::read_to_string(src().join("lib.rs")).expect("lib.rs");
    for line in lib.lines() {
        if let Some(module) = line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';')) {
            assert!(map.contains(&format!("`{module}")), "docs/architecture.md does not speak of {module}");
        }
    }
}

/// Lines with their numbers, without comments and without what follows `#[cfg(test)]`: tests may know more.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .enumerate()
        .map(|(at, line)| (at + 1, line.trim()))
        .filter(|(_, line)| !line.starts_with("//"))
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn all_sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    walk(&src(), &mut found);
    found
}

/// A module's files, its tests left out.
fn sources_of(module: &str) -> Vec<(PathBuf, String)> {
    let folder = src().join(module);
    let file = src().join(format!("{module}.rs"));
    // Where the clone lies makes no difference.
    let is_test = |path: &Path| path.strip_prefix(src()).unwrap_or(path).to_string_lossy().contains("test");
    let found: Vec<_> = all_sources()
        .into_iter()
        .filter(|(path, _)| (path.starts_with(&folder) || *path == file) && !is_test(path))
        .collect();
    assert!(!found.is_empty(), "there is no module {module}: has it been renamed?");
    found
}

fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
    let mut entries: Vec<_> =
        fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            walk(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            found.push((path, text));
        }
    }
}
