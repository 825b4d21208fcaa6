//! `PEER/NAME`, and files that list many of them.
//! Must not know what is done with them.
//!
//! A fleet file is plain text, so that a shell loop can write it: a line `PEER/NAME [PATH]` for each volume. The path
//! is the rest of the line and may have spaces; a relative one is relative to the file. Empty lines, and lines that
//! begin with `#`, mean nothing. Anything else, and a volume that is listed twice, is an error with its line.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::core::ids::Name;

/// A volume at a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    pub peer: Name,
    pub volume: Name,
}

/// A line of a fleet file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FleetItem {
    pub remote: Remote,
    /// Where it is to lie here.
    pub image: Option<PathBuf>,
}

/// Why a fleet file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum FleetError {
    #[error("cannot read the fleet file {}: {source}; check the path", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: this is no fleet file: it has more than {MAX_FLEET_BYTES} bytes", .0.display())]
    TooLarge(PathBuf),
    #[error("{}:{line}: {what}; write PEER/NAME [PATH]", path.display())]
    Line { path: PathBuf, line: usize, what: String },
    #[error("{}:{line}: {volume} was listed before, in line {before}; remove one", path.display())]
    Twice { path: PathBuf, line: usize, before: usize, volume: Name },
    #[error("{}: lists no volume; write a line PEER/NAME [PATH] for each", .0.display())]
    Empty(PathBuf),
}

const MAX_FLEET_BYTES: u64 = 4 << 20;

impl FromStr for Remote {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let Some((peer, volume)) = text.split_once('/') else {
            return Err(format!("{text:?} is not PEER/NAME, such as site-b/web-01"));
        };
        let part = |what: &str, text: &str| text.parse().map_err(|error| format!("the {what} {error}"));
        Ok(Remote { peer: part("peer", peer)?, volume: part("volume", volume)? })
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.peer, self.volume)
    }
}

/// Reads the fleet file at `path`.
pub(super) fn read_fleet(path: &Path) -> Result<Vec<FleetItem>, FleetError> {
    let failed = |source| FleetError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path).map_err(failed)?.take(MAX_FLEET_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FLEET_BYTES {
        return Err(FleetError::TooLarge(path.to_owned()));
    }
    parse_fleet(path, &text)
}

fn parse_fleet(path: &Path, text: &str) -> Result<Vec<FleetItem>, FleetError> {
    let directory = path.parent().unwrap_or(Path::new(""));
    let mut items = Vec::new();
    let mut lines_by_volume = HashMap::new();
    for (line, content) in (1..).zip(text.lines()) {
        let content = content.trim();
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let (remote, image) = match content.split_once(char::is_whitespace) {
            Some((remote, image)) => (remote, Some(directory.join(image.trim_start()))),
            None => (content, None),
        };
        let remote: Remote = remote.parse().map_err(|what| FleetError::Line { path: path.to_owned(), line, what })?;
        if let Some(before) = lines_by_volume.insert(remote.volume.clone(), line) {
            return Err(FleetError::Twice { path: path.to_owned(), line, before, volume: remote.volume });
        }
        items.push(FleetItem { remote, image });
    }
    if items.is_empty() {
        return Err(FleetError::Empty(path.to_owned()));
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<FleetItem>, FleetError> {
        parse_fleet(Path::new("/etc/fleet.txt"), text)
    }

    #[test]
    fn lines_are_volumes() {
        let text = "# web\nsite-b/web-01\n\n  site-b/web-02  /srv/web 02.raw \nsite-c/db\tdb.raw\r\n";
        let items = parse(text).expect("a fleet");
        let shown: Vec<_> = items.iter().map(|item| (item.remote.to_string(), item.image.as_deref())).collect();
        assert_eq!(
            shown,
            [
                ("site-b/web-01".to_owned(), None),
                ("site-b/web-02".to_owned(), Some(Path::new("/srv/web 02.raw"))),
                ("site-c/db".to_owned(), Some(Path::new("/etc/db.raw"))),
            ]
        );
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, words) in [
            ("site-b/a\nsite-b", "/etc/fleet.txt:2: \"site-b\" is not PEER/NAME"),
            ("site-b/", "/etc/fleet.txt:1: the volume \"\" is not a usable name"),
            ("/a", "/etc/fleet.txt:1: the peer \"\" is not a usable name"),
            ("a/b/c", "the volume \"b/c\" is not a usable name"),
            ("site-b/a\n\nsite-c/a /x", "/etc/fleet.txt:3: a was listed before, in line 1"),
            ("# nothing\n", "/etc/fleet.txt: lists no volume"),
        ] {
            let message = parse(text).expect_err(text).to_string();
            assert!(message.contains(words), "{text}: {message}");
        }
        let missing = read_fleet(Path::new("/nonexistent/fleet")).expect_err("missing").to_string();
        assert!(missing.contains("cannot read the fleet file /nonexistent/fleet"), "{missing}");
    }
}
