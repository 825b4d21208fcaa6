//! Architecture as absences: reads the table of modules in `docs/architecture.md` and the code, and fails when a module knows what
//! it must not; and holds the files to the house's rules.

use std::fs;
use std::path::{Path, PathBuf};

/// A row of the table.
#[derive(Debug)]
struct Row {
    /// Modules (`core::ids`), or folders of the repository (`tools/wan`).
    paths: Vec<String>,
    /// Libraries that nobody else may use.
    owns: Vec<String>,
    /// What must not be named there.
    forbidden: Vec<String>,
}

/// The table under "The modules, and what each must not know".
fn table() -> Vec<Row> {
    let map = fs::read_to_string(root().join("docs/architecture.md")).expect("the map");
    let (_, section) = map.split_once("\n## The modules").expect("the section on modules");
    let rows = section.lines().skip_while(|line| !line.starts_with("| path |")).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|')).map(|line| {
        let cells: Vec<&str> = line.split('|').collect();
        let ["", paths, what, forbidden, ""] = cells[..] else { panic!("not three columns: {line}") };
        let owns = what.split("only user of ").skip(1).filter_map(|rest| quoted(rest).next());
        Row {
            paths: quoted(paths).collect(),
            owns: owns.collect(),
            forbidden: quoted(forbidden).map(|name| pattern(&name)).collect(),
        }
    });
    rows.collect()
}

/// What stands in backticks.
fn quoted(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split('`').skip(1).step_by(2).map(str::to_owned)
}

/// How a name of the third column looks in code.
fn pattern(name: &str) -> String {
    let top = name.split("::").next().unwrap_or(name);
    let is_module = src().join(top).is_dir() || src().join(format!("{top}.rs")).is_file();
    match name {
        "crate" => "crate::".to_owned(),
        _ if is_module => format!("crate::{name}"),
        _ => name.to_owned(),
    }
}

#[test]
fn modules_do_not_know_what_they_must_not() {
    let mut violations = Vec::new();
    let rows = table();
    let constrained = rows.iter().filter(|row| !row.forbidden.is_empty()).count();
    assert!(constrained >= 13, "only {constrained} rows of the table name what must not be known: is it still read?");
    for row in &rows {
        for module in row.paths.iter().filter(|path| is_module(path)) {
            for (path, text) in sources_of(module) {
                for (number, line) in code_lines(&text) {
                    for name in &row.forbidden {
                        if line.contains(name) && !(module == "image" && line.contains("crate::core::ids")) {
                            let path = path.display();
                            violations.push(format!("{path}:{number}: {module} must not know {name}: {line}"));
                        }
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
    let rows = table();
    let owned: Vec<(&str, &[String])> =
        rows.iter().flat_map(|row| row.owns.iter().map(|library| (library.as_str(), &row.paths[..]))).collect();
    let mut libraries: Vec<&str> = owned.iter().map(|(library, _)| *library).collect();
    libraries.sort_unstable();
    assert_eq!(libraries, ["axum", "indicatif", "quinn", "rocksdb"], "the only users in the table");
    for (library, users) in owned {
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
fn what_the_map_names_exists() {
    let rows = table();
    assert!(rows.len() > 20, "only {} rows are read", rows.len());
    for path in rows.iter().flat_map(|row| &row.paths) {
        let exists = if is_module(path) { !sources_of(path).is_empty() } else { root().join(path).is_dir() };
        assert!(exists, "docs/architecture.md speaks of {path}, which does not exist");
    }
}

#[test]
fn code_behind_a_test_item_is_read() {
    let text = "//! What.\n#[cfg(test)]\nmod testing;\nuse a;\n    #[cfg(test)]\n    #[allow(dead)]\n    fn b() {\n        c();\n    }\n// d\nfn e() {}\n#[cfg(test)]\nmod tests {\n    use f;\n}\nuse g;\n#[cfg(test)]\nfn h() {}\nuse i;";
    let read: Vec<(usize, &str)> = code_lines(text).collect();
    assert_eq!(read, [(4, "use a;"), (11, "fn e() {}"), (16, "use g;"), (19, "use i;")]);
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

/// Lines with their numbers, without comments and without the items that `#[cfg(test)]` stands in front of: tests may know
/// more. Relies on rustfmt: an item ends with its own line, or with a bracket below its beginning.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut found = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        if line.trim_start().starts_with("#[cfg(test)]") {
            let indent = &line[..line.len() - line.trim_start().len()];
            let mut item = lines.by_ref().skip_while(|(_, line)| line.trim_start().starts_with("#["));
            let is_one_line = |line: &str| line.ends_with([';', ',']) || line.ends_with("{}") || line.ends_with("}");
            if let Some((_, first)) = item.next()
                && !is_one_line(first)
            {
                let is_end = |line: &str| {
                    line.strip_prefix(indent)
                        .is_some_and(|rest| rest.starts_with(['}', ')', ']']) && !rest.ends_with('{'))
                };
                let _ = item.find(|(_, line)| is_end(line));
            }
        } else if !line.trim_start().starts_with("//") {
            found.push((at + 1, line.trim()));
        }
    }
    found.into_iter()
}

/// Whether a path of the table is one of the library's modules, and not a folder of the repository.
fn is_module(path: &str) -> bool {
    !path.contains('/') && path != "fuzz"
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
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
    let module = module.replace("::", "/");
    let folder = src().join(&module);
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
