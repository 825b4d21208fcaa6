//! `config/blockferry.toml` is documentation that must not rot: it parses, and it shows every key that there is.

use std::path::Path;

use blockferry::config::{Config, KEYS};

#[test]
fn the_example_parses() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/blockferry.toml");
    let config = Config::load(&path, std::iter::empty()).expect("the example is a configuration");
    assert_eq!(config.site.name.as_str(), "site-a");
    assert_eq!(config.peers.len(), 1);
}

#[test]
fn the_example_shows_every_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/blockferry.toml");
    let text = std::fs::read_to_string(path).expect("the example can be read");
    let mut section = String::new();
    let mut shown = Vec::new();
    let mut explained = false;
    for line in text.lines() {
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
        } else if let Some((key, _)) = line.trim_start_matches("# ").split_once(" = ") {
            // What has no value of its own by default stands there as a comment.
            let is_key = KEYS.iter().any(|known| known.section == section && known.name == key);
            if is_key || !line.starts_with('#') {
                assert!(explained, "{section}.{key} has no comment above it");
                shown.push((section.clone(), key.to_owned()));
            }
        }
        explained = line.starts_with('#');
    }
    let all: Vec<_> = KEYS.iter().map(|key| (key.section.to_owned(), key.name.to_owned())).collect();
    assert_eq!(shown, all);
}
