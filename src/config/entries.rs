//! A configuration taken apart into entries: section, key, value, and the place each came from (a line of the file, or
//! a variable of the environment that overrides it). Refuses keys that do not exist.
//! Must not know what the values mean.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::error::{ConfigError, Place};
use super::keys::{self, CLI_VARIABLES, Kind, PEERS, PREFIX};

/// A value and where it came from.
#[derive(Debug, Clone)]
struct Entry {
    value: Value,
    place: Place,
}

/// The entries of one section, or of one `[[peers]]` table.
#[derive(Debug)]
pub(super) struct Section {
    name: &'static str,
    /// Where the section begins; the file, when it is not there.
    place: Place,
    entries: BTreeMap<&'static str, Entry>,
}

/// All entries of a configuration.
#[derive(Debug)]
pub(super) struct Entries {
    path: PathBuf,
    sections: BTreeMap<&'static str, Section>,
    peers: Vec<Section>,
}

/// A value taken from a section, and the place to blame when it turns out not to fit with others.
#[derive(Debug)]
pub(super) struct Taken<T> {
    pub value: T,
    label: String,
    place: Place,
}

impl<T> Taken<T> {
    /// The same place, another value.
    pub fn map<U>(self, convert: impl FnOnce(T) -> U) -> Taken<U> {
        Taken { value: convert(self.value), label: self.label, place: self.place }
    }

    /// An error about this value.
    pub fn error(&self, what: impl AsRef<str>, next: &str) -> ConfigError {
        ConfigError::new(self.place.clone(), format!("{}: {}", self.label, what.as_ref()), next)
    }
}

impl Entries {
    /// Takes the text of the file at `path` apart, then lets the environment override it.
    pub fn parse(
        path: &Path,
        text: &str,
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<Entries, ConfigError> {
        let syntax = |error: toml::de::Error| {
            let place = match error.span() {
                Some(span) => Place::Line(path.to_owned(), line_of(text, &span)),
                None => Place::File(path.to_owned()),
            };
            ConfigError::new(place, format!("not TOML: {}", one_line(error.message())), "")
        };
        // Two readings of a small file: one has the places, the other the values.
        let places = DeTable::parse(text).map_err(syntax)?;
        let values: Table = toml::from_str(text).map_err(syntax)?;

        let mut entries = Entries { path: path.to_owned(), sections: BTreeMap::new(), peers: Vec::new() };
        let file = File { path, text };
        for (key, place) in places.get_ref() {
            let here = file.place(&key.span());
            let typed = key.get_ref().as_ref();
            let Some(section) = keys::sections().find(|section| *section == typed) else {
                return Err(unknown_section(here, typed));
            };
            match (place.get_ref(), values.get(section)) {
                (DeValue::Array(tables), Some(Value::Array(rows))) if section == PEERS => {
                    for (table, row) in tables.iter().zip(rows) {
                        let (DeValue::Table(table_places), Value::Table(row)) = (table.get_ref(), row) else {
                            return Err(ConfigError::new(here, "peers must be tables", "write [[peers]]"));
                        };
                        let peer = file.section(section, file.place(&table.span()), table_places, row)?;
                        entries.peers.push(peer);
                    }
                }
                (_, _) if section == PEERS => {
                    return Err(ConfigError::new(here, "there can be many peers", "write [[peers]], not [peers]"));
                }
                (DeValue::Table(table), Some(Value::Table(row))) => {
                    entries.sections.insert(section, file.section(section, here, table, row)?);
                }
                (_, _) => {
                    let what = format!("{section} must be a table");
                    return Err(ConfigError::new(here, what, format!("write [{section}] and its keys below")));
                }
            }
        }
        entries.override_from(environment)?;
        Ok(entries)
    }

    /// The section `name`, to be taken once; empty when the file does not have it.
    pub fn section(&mut self, name: &'static str) -> Section {
        let place = Place::File(self.path.clone());
        self.sections.remove(name).unwrap_or(Section { name, place, entries: BTreeMap::new() })
    }

    /// The `[[peers]]` in the order of the file, to be taken once.
    pub fn peers(&mut self) -> Vec<Section> {
        std::mem::take(&mut self.peers)
    }

    fn override_from(&mut self, environment: impl Iterator<Item = (String, String)>) -> Result<(), ConfigError> {
        for (variable, text) in environment {
            let Some(rest) = variable.strip_prefix(PREFIX) else { continue };
            if CLI_VARIABLES.contains(&variable.as_str()) {
                continue;
            }
            let place = Place::Variable(variable.clone());
            let plain = keys::KEYS
                .iter()
                .filter(|key| key.section != PEERS)
                .find(|key| rest == format!("{}_{}", keys::variable_form(key.section), keys::variable_form(key.name)));
            if let Some(key) = plain {
                let value = value_from_text(key.kind, &text, &place)?;
                let whole_file = Place::File(self.path.clone());
                let section = self.sections.entry(key.section).or_insert_with(|| Section {
                    name: key.section,
                    place: whole_file,
                    entries: BTreeMap::new(),
                });
                section.entries.insert(key.name, Entry { value, place });
            } else if let Some(rest) = rest.strip_prefix("PEERS_") {
                self.override_peer(rest, &text, place)?;
            } else {
                return Err(unknown_variable(place, &variable));
            }
        }
        Ok(())
    }

    /// `rest` is `NAME_KEY`: an override for the listed peer whose name is spelt NAME in variables.
    fn override_peer(&mut self, rest: &str, text: &str, place: Place) -> Result<(), ConfigError> {
        let key = keys::KEYS.iter().filter(|key| key.section == PEERS && key.name != "name").find_map(|key| {
            let peer = rest.strip_suffix(&format!("_{}", keys::variable_form(key.name)))?;
            Some((key, peer))
        });
        let Some((key, wanted)) = key else {
            let next = "the keys of a peer are BLOCKFERRY_PEERS_<NAME>_ADDRESS, _FINGERPRINT and _VOLUMES";
            return Err(ConfigError::new(place, "matches no key of the configuration", next));
        };
        let is_meant = |peer: &Section| match peer.entries.get("name").map(|entry| &entry.value) {
            Some(Value::String(name)) => keys::variable_form(name) == wanted,
            _ => false,
        };
        let meant: Vec<usize> = (0..self.peers.len()).filter(|at| is_meant(&self.peers[*at])).collect();
        match meant[..] {
            [at] => {
                let value = value_from_text(key.kind, text, &place)?;
                self.peers[at].entries.insert(key.name, Entry { value, place });
                Ok(())
            }
            [] => {
                let what = format!("no [[peers]] has a name that is spelt {wanted} in a variable");
                Err(ConfigError::new(place, what, "list the peer in the file, or unset the variable"))
            }
            _ => {
                let what = format!("several [[peers]] have a name that is spelt {wanted} in a variable");
                Err(ConfigError::new(place, what, "set the key in the file"))
            }
        }
    }
}

impl Section {
    /// The value of `key`, if it was set.
    pub fn optional<T: DeserializeOwned>(&mut self, key: &'static str) -> Result<Option<Taken<T>>, ConfigError> {
        debug_assert!(keys::find(self.name, key).is_some(), "[{}] {key} is missing in KEYS", self.name);
        let Some(Entry { value, place }) = self.entries.remove(key) else { return Ok(None) };
        let label = self.label(key);
        match value.try_into() {
            Ok(value) => Ok(Some(Taken { value, label, place })),
            Err(error) => Err(ConfigError::new(place, format!("{label}: {}", one_line(error.message())), "")),
        }
    }

    /// The value of `key`, or `default`.
    pub fn or<T: DeserializeOwned>(&mut self, key: &'static str, default: T) -> Result<Taken<T>, ConfigError> {
        Ok(self.optional(key)?.unwrap_or_else(|| self.default(key, default)))
    }

    /// A value that nobody set, taken as if it stood in this section.
    pub fn default<T>(&self, key: &'static str, value: T) -> Taken<T> {
        Taken { value, label: self.label(key), place: self.place.clone() }
    }

    /// The value of `key`, which has no default; `next` says how to find one.
    pub fn required<T: DeserializeOwned>(&mut self, key: &'static str, next: &str) -> Result<Taken<T>, ConfigError> {
        let missing = ConfigError::new(self.place.clone(), format!("{} is missing", self.label(key)), next);
        self.optional(key)?.ok_or(missing)
    }

    fn label(&self, key: &str) -> String {
        if self.name == PEERS { format!("[[{}]] {key}", self.name) } else { format!("[{}] {key}", self.name) }
    }
}

/// The file, for finding lines.
struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

impl File<'_> {
    fn place(&self, span: &Range<usize>) -> Place {
        Place::Line(self.path.to_owned(), line_of(self.text, span))
    }

    fn section(
        &self,
        name: &'static str,
        place: Place,
        places: &DeTable<'_>,
        values: &Table,
    ) -> Result<Section, ConfigError> {
        let mut entries = BTreeMap::new();
        for key in places.keys() {
            let typed = key.get_ref().as_ref();
            let place = self.place(&key.span());
            match (keys::find(name, typed), values.get(typed)) {
                (Some(known), Some(value)) => entries.insert(known.name, Entry { value: value.clone(), place }),
                (_, _) => return Err(unknown_key(place, name, typed)),
            };
        }
        Ok(Section { name, place, entries })
    }
}

fn unknown_key(place: Place, section: &str, typed: &str) -> ConfigError {
    let what = format!("[{section}] has no key {}", shown(typed));
    let names = || keys::KEYS.iter().filter(|key| key.section == section).map(|key| key.name);
    let next = match keys::nearest(typed, names()) {
        Some(known) => format!("did you mean {known}?"),
        None => format!("its keys are {}", names().collect::<Vec<_>>().join(", ")),
    };
    ConfigError::new(place, what, next)
}

fn unknown_section(place: Place, typed: &str) -> ConfigError {
    // A key above every section is most likely one that lost its header.
    let lost = keys::KEYS.iter().find(|key| key.name == typed).map(|key| key.section);
    let next = match (keys::nearest(typed, keys::sections()), lost) {
        (Some(known), _) => format!("did you mean [{known}]?"),
        (None, Some(section)) => format!("put it below [{section}]"),
        (None, None) => format!("the sections are {}", keys::sections().collect::<Vec<_>>().join(", ")),
    };
    ConfigError::new(place, format!("there is no section {}", shown(typed)), next)
}

fn unknown_variable(place: Place, variable: &str) -> ConfigError {
    let plain = keys::KEYS.iter().filter(|key| key.section != PEERS);
    let plain = plain.map(|key| keys::variable_form(&format!("{}_{}", key.section, key.name)));
    let of_cli = CLI_VARIABLES.iter().filter_map(|variable| variable.strip_prefix(PREFIX)).map(str::to_owned);
    let known: Vec<String> = plain.chain(of_cli).collect();
    // Without the prefix, which all of them have in common.
    let typed = variable.strip_prefix(PREFIX).unwrap_or(variable);
    let next = match keys::nearest(typed, known.iter().map(String::as_str)) {
        Some(known) => format!("did you mean {PREFIX}{known}? (else unset it)"),
        None => "unset it: every BLOCKFERRY_SECTION_KEY must be a key of the configuration".to_owned(),
    };
    ConfigError::new(place, "matches no key of the configuration", next)
}

fn value_from_text(kind: Kind, text: &str, place: &Place) -> Result<Value, ConfigError> {
    let as_number = || text.parse().map(Value::Integer).ok().or_else(|| text.parse().map(Value::Float).ok());
    match kind {
        Kind::Text => Ok(Value::String(text.to_owned())),
        Kind::TextOrNumber => Ok(as_number().unwrap_or_else(|| Value::String(text.to_owned()))),
        Kind::Number => as_number()
            .ok_or_else(|| ConfigError::new(place.clone(), format!("{} is not a number", shown(text)), "write 0.25")),
        Kind::List if text.trim().is_empty() => Ok(Value::Array(Vec::new())),
        Kind::List => Ok(Value::Array(text.split(',').map(|item| Value::String(item.trim().to_owned())).collect())),
    }
}

fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = &text.as_bytes()[..span.start.min(text.len())];
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// What a message repeats of the input.
fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(80).collect::<String>())
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", ")
}
