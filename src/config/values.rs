//! The checked types of single configuration values: a value of one of these is usable, or it was never made.
//! Must not know files, sections or each other.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use crate::core::ids::{BlockSize, Name};
use crate::units::ByteSize;

/// A host and a port, not yet resolved: `site-b.example.net:7440`, `192.0.2.7:7440`, `[2001:db8::7]:7440`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

/// Where the NBD server listens. Text: `unix:PATH`, a path with a `/` in it, or `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NbdListen {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(HostPort),
}

/// Whether NBD clients may or have to use TLS. Text: `off`, `optional`, `required`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    /// There is none.
    Off,
    /// They may.
    Optional,
    /// They have to.
    Required,
}

/// An entry of `[nbd] listen`: a place, and ` tls=MODE` behind it where it differs from `[nbd] tls`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ListenText {
    pub at: NbdListen,
    pub tls: Option<TlsMode>,
}

/// How store and wire compress with zstd. Text: `auto`, or a number from 1 to 19.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// The highest level that still keeps ahead of the link.
    Auto,
    /// This level.
    Level(u8),
}

/// A share of the bandwidth, from 0 to 0.9.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share(f64);

/// The volumes that a peer may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Every one, now and later (`"*"`).
    All,
    /// These.
    Only(BTreeSet<Name>),
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// What may need somebody.
    Warn,
    /// What happened.
    Info,
    /// How it happened.
    Debug,
    /// Everything.
    Trace,
}

/// Why a text is none of the above.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ValueError {
    /// Not `HOST:PORT`.
    #[error("{0:?} is not an address: write HOST:PORT, with an IPv6 host in brackets")]
    NotAnAddress(String),
    /// Neither a socket's path nor an address.
    #[error("{0:?} is no place to listen on: write unix:PATH or HOST:PORT")]
    NotAListen(String),
    /// `tls=` and something else.
    #[error("{0:?} is no way to use TLS: write tls=off, tls=optional or tls=required")]
    NotATlsMode(String),
    /// Longer than the kernel allows.
    #[error("the socket path {0} is longer than the {MAX_SOCKET_PATH_BYTES} bytes that the system allows: shorten it")]
    SocketPathTooLong(PathBuf),
    /// Not within 0 to 0.9.
    #[error("{0} is no share that bulk could be promised: take a number from 0 to 0.9")]
    BadShare(f64),
    /// Not `auto` or 1 to 19.
    #[error("{0} is no compression: write \"auto\" or a zstd level from 1 to 19")]
    BadCompression(String),
    /// `"*"` beside names.
    #[error("\"*\" already means every volume: remove the other names")]
    StarAndNames,
    /// The same name again.
    #[error("{0} is listed twice")]
    Twice(Name),
}

/// The longest path of a unix socket: `sun_path` has 108 bytes, the last one is its end.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Checks that a unix socket can have this path.
pub fn check_socket_path(path: &Path) -> Result<(), ValueError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        return Err(ValueError::SocketPathTooLong(path.to_owned()));
    }
    Ok(())
}

impl HostPort {
    /// A name or an address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, never 0 unless 0 was written (which picks a free one where something listens).
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for HostPort {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let not = || ValueError::NotAnAddress(text.chars().take(160).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(not)?;
        // `u16::from_str` would take "+1".
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = if digits { port.parse().map_err(|_| not())? } else { return Err(not()) };
        let host = match host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')) {
            Some(inner) => inner.parse::<Ipv6Addr>().map_err(|_| not())?.to_string(),
            None => host.to_owned(),
        };
        let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        let usable = host.parse::<Ipv6Addr>().is_ok() && text.starts_with('[') || host.bytes().all(is_name);
        if host.is_empty() || host.len() > 253 || !usable {
            return Err(not());
        }
        Ok(HostPort { host, port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for NbdListen {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.strip_prefix("unix:") {
            Some("") => Err(ValueError::NotAListen(text.to_owned())),
            Some(path) => Ok(NbdListen::Unix(path.into())),
            // A bare word would be a mistyped host as likely as a file's name.
            None if text.contains('/') => Ok(NbdListen::Unix(text.into())),
            None => match text.parse() {
                Ok(address) => Ok(NbdListen::Tcp(address)),
                Err(_) => Err(ValueError::NotAListen(text.chars().take(160).collect())),
            },
        }
    }
}

impl FromStr for TlsMode {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "off" => Ok(TlsMode::Off),
            "optional" => Ok(TlsMode::Optional),
            "required" => Ok(TlsMode::Required),
            _ => Err(ValueError::NotATlsMode(text.chars().take(160).collect())),
        }
    }
}

impl FromStr for ListenText {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.rsplit_once(" tls=") {
            Some((at, tls)) => Ok(ListenText { at: at.trim_end().parse()?, tls: Some(tls.trim_end().parse()?) }),
            None => Ok(ListenText { at: text.parse()?, tls: None }),
        }
    }
}

impl fmt::Display for NbdListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdListen::Unix(path) => write!(f, "unix:{}", path.display()),
            NbdListen::Tcp(address) => address.fmt(f),
        }
    }
}

impl Compression {
    fn level(number: i64) -> Result<Compression, ValueError> {
        match u8::try_from(number) {
            Ok(level @ 1..=19) => Ok(Compression::Level(level)),
            _ => Err(ValueError::BadCompression(number.to_string())),
        }
    }
}

impl<'de> Deserialize<'de> for Compression {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrLevel;
        impl Visitor<'_> for TextOrLevel {
            type Value = Compression;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\" or a zstd level from 1 to 19")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Compression, E> {
                match text {
                    "auto" => Ok(Compression::Auto),
                    _ => Err(E::custom(ValueError::BadCompression(format!("{text:?}")))),
                }
            }
            fn visit_i64<E: de::Error>(self, level: i64) -> Result<Compression, E> {
                Compression::level(level).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(TextOrLevel)
    }
}

impl Share {
    /// One tenth.
    pub const TENTH: Share = Share(0.1);

    /// A share of at most 0.9: demand needs room beside what bulk is promised.
    pub fn new(share: f64) -> Result<Share, ValueError> {
        if (0.0..=0.9).contains(&share) { Ok(Share(share)) } else { Err(ValueError::BadShare(share)) }
    }

    /// From 0 to 0.9.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;
        impl Visitor<'_> for Number {
            type Value = Share;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number from 0 to 0.9")
            }
            fn visit_f64<E: de::Error>(self, share: f64) -> Result<Share, E> {
                Share::new(share).map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, share: i64) -> Result<Share, E> {
                self.visit_f64(share as f64)
            }
        }
        deserializer.deserialize_any(Number)
    }
}

impl Grant {
    /// Whether `volume` is among them.
    pub fn includes(&self, volume: &Name) -> bool {
        match self {
            Grant::All => true,
            Grant::Only(names) => names.contains(volume),
        }
    }
}

impl<'de> Deserialize<'de> for Grant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let items = Vec::<String>::deserialize(deserializer)?;
        if items == ["*"] {
            return Ok(Grant::All);
        }
        if items.iter().any(|item| item == "*") {
            return Err(de::Error::custom(ValueError::StarAndNames));
        }
        let mut names = BTreeSet::new();
        for item in items {
            let name: Name = item.parse().map_err(de::Error::custom)?;
            if !names.insert(name.clone()) {
                return Err(de::Error::custom(ValueError::Twice(name)));
            }
        }
        Ok(Grant::Only(names))
    }
}

impl LogLevel {
    /// As `tracing-subscriber` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Off => "off",
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// Reads any type that parses from text out of a string value.
pub(super) struct Parsed<T>(pub T);

impl<'de, T> Deserialize<'de> for Parsed<T>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(Parsed).map_err(de::Error::custom)
    }
}

/// A block size, from `64KiB` or a number of bytes.
pub(super) struct BlockSizeText(pub BlockSize);

impl<'de> Deserialize<'de> for BlockSizeText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ByteSize(bytes) = ByteSize::deserialize(deserializer)?;
        BlockSize::new(bytes).map(BlockSizeText).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, host, port) in [
            ("site-b.example.net:7440", "site-b.example.net", 7440),
            ("192.0.2.7:1", "192.0.2.7", 1),
            ("[2001:db8::7]:7440", "2001:db8::7", 7440),
            ("localhost:0", "localhost", 0),
        ] {
            let address: HostPort = text.parse().expect(text);
            assert_eq!((address.host(), address.port()), (host, port), "{text}");
            assert_eq!(address.to_string(), text);
        }
        let long = format!("{}:1", "x".repeat(254));
        for text in
            ["", "host", "host:", ":1", "host:65536", "host:+1", "2001:db8::7:1", "[::1]", "[x]:1", "a b:1", &long]
        {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }

    #[test]
    fn places_to_listen_on() {
        assert_eq!("unix:nbd.sock".parse(), Ok(NbdListen::Unix("nbd.sock".into())));
        assert_eq!("/run/nbd.sock".parse(), Ok(NbdListen::Unix("/run/nbd.sock".into())));
        assert_eq!("./nbd.sock".parse(), Ok(NbdListen::Unix("./nbd.sock".into())));
        assert!(matches!("[::1]:10809".parse(), Ok(NbdListen::Tcp(_))));
        for text in ["", "unix:", "nbd.sock", "localhost"] {
            assert!(text.parse::<NbdListen>().is_err(), "{text}");
        }
    }

    #[test]
    fn places_to_listen_on_say_what_about_tls() {
        for (text, at, tls) in [
            ("unix:/n.sock", "unix:/n.sock", None),
            ("unix:/n.sock tls=off", "unix:/n.sock", Some(TlsMode::Off)),
            ("[::]:10809  tls=required", "[::]:10809", Some(TlsMode::Required)),
            ("unix:/with blanks/tls=x tls=optional", "unix:/with blanks/tls=x", Some(TlsMode::Optional)),
        ] {
            let at = at.parse().expect(at);
            assert_eq!(text.parse(), Ok(ListenText { at, tls }), "{text}");
        }
        for text in ["unix:/n.sock tls=on", "unix:/n.sock tls=", " tls=off", "127.0.0.1:1 tls", "127.0.0.1:1 tls=off x"]
        {
            assert!(text.parse::<ListenText>().is_err(), "{text}");
        }
    }

    #[test]
    fn socket_paths_fit_the_system() {
        assert!(check_socket_path(Path::new(&"x".repeat(MAX_SOCKET_PATH_BYTES))).is_ok());
        assert!(check_socket_path(Path::new(&"x".repeat(MAX_SOCKET_PATH_BYTES + 1))).is_err());
    }
}
