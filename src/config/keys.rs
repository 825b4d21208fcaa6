//! The list of every key that a configuration may have: what is not in it is an error.
//! Must not know what the values mean.

/// Which kind of text an environment variable for the key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Taken as it is.
    Text,
    /// A number.
    Number,
    /// A number where it looks like one, text where it does not.
    TextOrNumber,
    /// Items separated by commas; nothing at all is the empty list.
    List,
}

/// A key of a section. `[[peers]]` is a section that may occur many times.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// `site` for `[site]`.
    pub section: &'static str,
    /// The key's name.
    pub name: &'static str,
    pub(super) kind: Kind,
}

/// The section that is an array of tables.
pub(super) const PEERS: &str = "peers";

/// Variables of the environment that the command line defines for itself (`--socket`, `--config`, `--state`).
pub const CLI_VARIABLES: [&str; 3] = ["BLOCKFERRY_SOCKET", "BLOCKFERRY_CONFIG", "BLOCKFERRY_STATE"];

/// What every variable that overrides a key begins with.
pub(super) const PREFIX: &str = "BLOCKFERRY_";

/// Every key there is.
pub const KEYS: &[Key] = &[
    Key { section: "site", name: "name", kind: Kind::Text },
    Key { section: "site", name: "state_dir", kind: Kind::Text },
    Key { section: "peer", name: "listen", kind: Kind::Text },
    Key { section: "peer", name: "idle_timeout", kind: Kind::Text },
    Key { section: PEERS, name: "name", kind: Kind::Text },
    Key { section: PEERS, name: "address", kind: Kind::Text },
    Key { section: PEERS, name: "fingerprint", kind: Kind::Text },
    Key { section: PEERS, name: "volumes", kind: Kind::List },
    Key { section: "nbd", name: "listen", kind: Kind::List },
    Key { section: "nbd", name: "tls", kind: Kind::Text },
    Key { section: "nbd", name: "tls_certificate", kind: Kind::Text },
    Key { section: "nbd", name: "tls_key", kind: Kind::Text },
    Key { section: "nbd", name: "tls_client_ca", kind: Kind::Text },
    Key { section: "store", name: "capacity", kind: Kind::Text },
    Key { section: "store", name: "block_size", kind: Kind::Text },
    Key { section: "store", name: "compression", kind: Kind::TextOrNumber },
    Key { section: "bulk", name: "rate", kind: Kind::Text },
    Key { section: "bulk", name: "min_share", kind: Kind::Number },
    Key { section: "demand", name: "timeout", kind: Kind::Text },
    Key { section: "control", name: "socket", kind: Kind::Text },
    Key { section: "log", name: "level", kind: Kind::Text },
];

/// The key `name` of `section`.
pub(super) fn find(section: &str, name: &str) -> Option<Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name).copied()
}

/// Every section, once.
pub(super) fn sections() -> impl Iterator<Item = &'static str> {
    let starts_new = |at: usize| at == 0 || KEYS[at - 1].section != KEYS[at].section;
    (0..KEYS.len()).filter(move |at| starts_new(*at)).map(|at| KEYS[at].section)
}

/// `site-b` -> `SITE_B`: how a key or a peer is spelt in a variable's name.
pub(super) fn variable_form(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

/// The known word that is nearest to a mistyped one; `None` when none is near enough to be meant.
pub(super) fn nearest<'a>(typed: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A text this long is no typing mistake, and the distance costs its square.
    if typed.len() > 64 {
        return None;
    }
    let enough = typed.chars().count().max(3) / 3 + 1;
    known.map(|word| (edit_distance(typed, word), word)).filter(|(d, _)| *d <= enough).min().map(|(_, word)| word)
}

/// Levenshtein's distance, counting a swap of neighbours as one mistake (optimal string alignment).
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let mut least = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    least = least.min(rows[i - 2][j - 2] + 1);
                }
                least
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_once() {
        let all: Vec<_> = sections().collect();
        assert_eq!(all, ["site", "peer", "peers", "nbd", "store", "bulk", "demand", "control", "log"]);
    }

    #[test]
    fn distances() {
        for (a, b, distance) in [("", "", 0), ("", "abc", 3), ("capactiy", "capacity", 1), ("rate", "late", 1)] {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
        }
        assert_eq!(nearest("capactiy", ["capacity", "compression"].into_iter()), Some("capacity"));
        assert_eq!(nearest("colour", ["capacity", "compression"].into_iter()), None);
        assert_eq!(nearest(&"x".repeat(1000), ["capacity"].into_iter()), None);
    }
}
