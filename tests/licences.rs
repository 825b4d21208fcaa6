//! What is linked into blockferry is what deny.toml allows: licences, sources, no wildcards. Reads `cargo metadata`, so that
//! nothing has to be installed for it; `cargo deny check licenses bans sources` reads the same file. Must not know the
//! library.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Whether an SPDX expression is satisfied by licences that `is_allowed` names. `/` is how crates once wrote OR.
///
/// # Errors
/// What is wrong with the expression.
fn is_satisfied(expression: &str, is_allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let satisfied = any_of(&mut words, is_allowed)?;
    match words.next() {
        None => Ok(satisfied),
        Some(word) => Err(format!("`{word}` is too much in `{expression}`")),
    }
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any_of(words: &mut Words<'_>, is_allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let mut satisfied = all_of(words, is_allowed)?;
    while words.next_if_eq(&"OR").is_some() {
        satisfied |= all_of(words, is_allowed)?;
    }
    Ok(satisfied)
}

fn all_of(words: &mut Words<'_>, is_allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let mut satisfied = one(words, is_allowed)?;
    while words.next_if_eq(&"AND").is_some() {
        satisfied &= one(words, is_allowed)?;
    }
    Ok(satisfied)
}

fn one(words: &mut Words<'_>, is_allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    match words.next() {
        Some("(") => {
            let satisfied = any_of(words, is_allowed)?;
            words.next_if_eq(&")").ok_or("a parenthesis is not closed")?;
            Ok(satisfied)
        }
        None | Some(")" | "AND" | "OR" | "WITH") => Err("a licence is missing".to_owned()),
        Some(licence) => {
            let Some(_) = words.next_if_eq(&"WITH") else { return Ok(is_allowed(licence)) };
            let exception = words.next().ok_or("an exception is missing")?;
            Ok(is_allowed(&format!("{licence} WITH {exception}")))
        }
    }
}

/// What deny.toml says.
struct Rules {
    licences: Vec<String>,
    targets: Vec<String>,
}

fn strings(of: &toml::Value) -> Vec<String> {
    let list = of.as_array().expect("a list in deny.toml");
    list.iter().map(|item| item.as_str().expect("a string in deny.toml").to_owned()).collect()
}

impl Rules {
    fn read(text: &str) -> Rules {
        let deny: toml::Value = toml::from_str(text).expect("deny.toml is TOML");
        // What this file takes for granted about the rest of deny.toml.
        for (section, key, wanted) in [
            ("bans", "wildcards", "deny"),
            ("bans", "multiple-versions", "allow"),
            ("sources", "unknown-registry", "deny"),
            ("sources", "unknown-git", "deny"),
        ] {
            assert_eq!(deny[section][key].as_str(), Some(wanted), "[{section}] {key}: this test has to learn it");
        }
        Rules { licences: strings(&deny["licenses"]["allow"]), targets: strings(&deny["graph"]["targets"]) }
    }

    /// What is wrong with the packages that `metadata` resolves.
    fn violations(&self, metadata: &Value) -> Vec<String> {
        let nodes = metadata["resolve"]["nodes"].as_array().expect("nodes");
        let packages = metadata["packages"].as_array().expect("packages");
        let is_used = |package: &&Value| nodes.iter().any(|node| node["id"] == package["id"]);
        packages.iter().filter(is_used).flat_map(|package| self.faults_of(package)).collect()
    }

    fn faults_of(&self, package: &Value) -> Vec<String> {
        let word = |key: &str| package[key].as_str().unwrap_or_default();
        let name = format!("{} {}", word("name"), word("version"));
        let is_allowed = |licence: &str| self.licences.iter().any(|allowed| allowed == licence);
        let mut faults = Vec::new();
        match package["license"].as_str().map(|licence| (licence, is_satisfied(licence, &is_allowed))) {
            None => faults.push(format!("{name} names no licence")),
            Some((_, Ok(true))) => {}
            Some((licence, Ok(false))) => faults.push(format!("{name}: `{licence}` is not allowed by deny.toml")),
            Some((licence, Err(error))) => faults.push(format!("{name}: `{licence}` cannot be read: {error}")),
        }
        let source = package["source"].as_str();
        if source.is_some_and(|source| source != "registry+https://github.com/rust-lang/crates.io-index") {
            faults.push(format!("{name} comes from {}", package["source"]));
        }
        // What others depend on is not ours to choose.
        let own = package["dependencies"].as_array().filter(|_| source.is_none());
        for dependency in own.into_iter().flatten() {
            if dependency["req"] == "*" && dependency["path"].is_null() {
                faults.push(format!("{name} takes any version of {}", dependency["name"]));
            }
        }
        faults
    }
}

#[test]
fn what_is_linked_is_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rules = Rules::read(&std::fs::read_to_string(root.join("deny.toml")).expect("deny.toml is there"));
    assert!(!rules.targets.is_empty(), "deny.toml names targets");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root).args(["metadata", "--locked", "--format-version", "1", "--all-features"]);
    for target in &rules.targets {
        cargo.args(["--filter-platform", target]);
    }
    let told = cargo.output().expect("cargo runs");
    assert!(told.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&told.stderr));
    let metadata: Value = serde_json::from_slice(&told.stdout).expect("cargo metadata is JSON");
    let nodes = metadata["resolve"]["nodes"].as_array().expect("nodes").len();
    assert!(nodes > 100, "{nodes} packages only: nothing was looked at");
    let violations = rules.violations(&metadata);
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn expressions_are_read_as_spdx_means_them() {
    let is_allowed = |licence: &str| ["MIT", "ISC", "Apache-2.0"].contains(&licence);
    for (expression, satisfied) in [
        ("MIT", true),
        ("GPL-3.0-only", false),
        ("GPL-3.0-only OR MIT", true),
        ("GPL-3.0-only/MIT", true),
        ("GPL-3.0-only AND MIT", false),
        ("MIT AND ISC", true),
        ("GPL-3.0-only OR MIT AND ISC", true),
        ("(GPL-3.0-only OR MIT) AND GPL-2.0-only", false),
        ("(GPL-3.0-only OR MIT) AND ISC", true),
        ("Apache-2.0 WITH LLVM-exception", false),
        ("Apache-2.0 WITH LLVM-exception OR MIT", true),
    ] {
        assert_eq!(is_satisfied(expression, &is_allowed), Ok(satisfied), "{expression}");
    }
    for broken in ["", "MIT OR", "(MIT", "MIT)", "MIT ISC", "AND MIT", "MIT WITH"] {
        assert!(is_satisfied(broken, &is_allowed).is_err(), "{broken}");
    }
}

#[test]
fn what_is_not_allowed_is_named() {
    let rules = Rules { licences: vec!["MIT".to_owned()], targets: Vec::new() };
    let crates_io = "registry+https://github.com/rust-lang/crates.io-index";
    let package = |name: &str, licence: Option<&str>, source: Option<&str>| {
        let dependencies = serde_json::json!([{ "name": "any", "req": "*", "path": null }]);
        serde_json::json!({ "id": name, "name": name, "version": "1.0.0", "license": licence, "source": source,
            "dependencies": dependencies })
    };
    let packages = [
        package("fine", Some("MIT"), Some(crates_io)),
        package("copyleft", Some("GPL-3.0-only"), Some(crates_io)),
        package("silent", None, Some(crates_io)),
        package("elsewhere", Some("MIT"), Some("git+https://example.net/elsewhere")),
        package("own", Some("MIT"), None),
        package("unused", Some("GPL-3.0-only"), Some(crates_io)),
    ];
    let nodes: Vec<Value> = packages[..5].iter().map(|package| serde_json::json!({ "id": package["id"] })).collect();
    let violations = rules.violations(&serde_json::json!({ "packages": packages, "resolve": { "nodes": nodes } }));
    let named = ["copyleft", "silent", "elsewhere", "own"];
    assert_eq!(violations.len(), named.len(), "{violations:?}");
    assert!(violations.iter().zip(named).all(|(said, name)| said.starts_with(name)), "{violations:?}");
}
