//! Sizes, rates and durations as people write them (`64KiB`, `100Mbit/s`, `15s`), and as tables show them.
//! Must not know where the text came from: configuration, command line and tables use the same types.
//!
//! `Display` is exact: what it prints parses back to the same value. [`approx_bytes`], [`approx_rate`] and
//! [`approx_seconds`] round, for people.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A number of bytes. Text: a number with at most one decimal point and an optional unit (`B`, `KiB` ... `PiB`,
/// `kB` ... `PB`); a fraction of a byte is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A rate in bytes per second, at least 1. Text: a number and a unit (`kbit/s` ... `Tbit/s`, `B/s`, `kB/s` ...
/// `TB/s`, `KiB/s` ... `TiB/s`); a fraction of a byte per second is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u64);

/// An upper limit for a rate. Text: a [`Rate`], or `unlimited`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RateLimit {
    /// As fast as it goes.
    Unlimited,
    /// At most this.
    AtMost(Rate),
}

/// A length of time. Text: `15s`, `1h 30min`, `250ms` (the humantime format).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

/// How long to wait before giving up. Text: a [`Span`], or `forever`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Patience {
    /// Never give up.
    Forever,
    /// Give up after this long.
    For(Duration),
}

/// Why a text is no size, rate or duration. The message says what would be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a number with a unit of a size.
    #[error("{0:?} is not a size: write it like 64KiB, 2GiB, 1.5TiB or 500GB")]
    NotASize(String),
    /// Not a number with a unit of a rate.
    #[error("{0:?} is not a rate: write it like 100Mbit/s, 1Gbit/s, 12MB/s or 10MiB/s")]
    NotARate(String),
    /// Not a rate, where `unlimited` would also do.
    #[error("{0:?} is not a rate limit: write it like 100Mbit/s, 12MB/s or unlimited")]
    NotALimit(String),
    /// Not a duration.
    #[error("{0:?} is not a duration: write it like 500ms, 15s, 10min or 1h 30min")]
    NotASpan(String),
    /// Not a duration, where `forever` would also do.
    #[error("{0:?} is not a waiting time: write it like 15s, 10min, 1h or forever")]
    NotAPatience(String),
    /// Does not fit into 64 bits of bytes (or of bits, for a rate).
    #[error("{0:?} is too large")]
    TooLarge(String),
    /// A rate of zero would never end.
    #[error("{0:?} is less than one byte per second: nothing would ever move")]
    NoRate(String),
}

const BINARY: [(&str, u64); 5] =
    [("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
const DECIMAL: [(&str, u64); 6] = [
    ("PB", 1_000_000_000_000_000),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("KB", 1_000),
];
const BITS: [(&str, u64); 5] =
    [("Tbit/s", 1_000_000_000_000), ("Gbit/s", 1_000_000_000), ("Mbit/s", 1_000_000), ("kbit/s", 1_000), ("bit/s", 1)];

impl ByteSize {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let not = || UnitError::NotASize(quoted(text));
        let (number, unit) = split_unit(text).ok_or_else(not)?;
        let factor = byte_factor(unit).ok_or_else(not)?;
        match number.times(factor) {
            Some(bytes) => Ok(ByteSize(bytes)),
            None => Err(UnitError::TooLarge(quoted(text))),
        }
    }
}

impl fmt::Display for ByteSize {
    /// The largest binary unit that divides the value exactly.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match BINARY.iter().find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor)) {
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Rate {
    /// A rate of `bytes` per second; `None` for 0, and for more than fits 64 bits when counted in bits.
    pub fn bytes_per_s(bytes: u64) -> Option<Rate> {
        (bytes > 0 && bytes <= u64::MAX / 8).then_some(Rate(bytes))
    }

    /// In bytes per second.
    pub fn as_bytes_per_s(self) -> u64 {
        self.0
    }

    /// In bits per second.
    pub fn as_bits_per_s(self) -> u64 {
        self.0 * 8
    }
}

impl FromStr for Rate {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let not = || UnitError::NotARate(quoted(text));
        let (number, unit) = split_unit(text).ok_or_else(not)?;
        let bytes = match BITS.iter().find(|(name, _)| *name == unit) {
            Some((_, factor)) => number.times(*factor).map(|bits| bits / 8),
            None => {
                // "100" alone could be bits or bytes, and "100MB" an amount: a rate names its unit in full.
                let factor = unit.strip_suffix("/s").filter(|unit| !unit.is_empty()).and_then(byte_factor);
                number.times(factor.ok_or_else(not)?)
            }
        };
        match bytes {
            Some(0) => Err(UnitError::NoRate(quoted(text))),
            Some(bytes) => Rate::bytes_per_s(bytes).ok_or_else(|| UnitError::TooLarge(quoted(text))),
            None => Err(UnitError::TooLarge(quoted(text))),
        }
    }
}

impl fmt::Display for Rate {
    /// In bits where that is a round number, else in the largest unit of bytes that divides it exactly.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.as_bits_per_s();
        if let Some((unit, factor)) =
            BITS[..4].iter().find(|(_, factor)| bits >= *factor && bits.is_multiple_of(*factor))
        {
            return write!(f, "{}{unit}", bits / factor);
        }
        match BINARY.iter().find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor)) {
            Some((unit, factor)) => write!(f, "{}{unit}/s", self.0 / factor),
            None => write!(f, "{}B/s", self.0),
        }
    }
}

impl RateLimit {
    /// In bytes per second; `None` when unlimited.
    pub fn as_bytes_per_s(self) -> Option<u64> {
        match self {
            RateLimit::Unlimited => None,
            RateLimit::AtMost(rate) => Some(rate.as_bytes_per_s()),
        }
    }
}

impl FromStr for RateLimit {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        if text == "unlimited" {
            return Ok(RateLimit::Unlimited);
        }
        text.parse().map(RateLimit::AtMost).map_err(|error| match error {
            UnitError::NotARate(text) => UnitError::NotALimit(text),
            other => other,
        })
    }
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RateLimit::Unlimited => f.write_str("unlimited"),
            RateLimit::AtMost(rate) => rate.fmt(f),
        }
    }
}

impl FromStr for Span {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        humantime::parse_duration(text).map(Span).map_err(|_| UnitError::NotASpan(quoted(text)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl FromStr for Patience {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        match text {
            "forever" => Ok(Patience::Forever),
            _ => match text.parse() {
                Ok(Span(duration)) => Ok(Patience::For(duration)),
                Err(_) => Err(UnitError::NotAPatience(quoted(text))),
            },
        }
    }
}

impl fmt::Display for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Patience::Forever => f.write_str("forever"),
            Patience::For(duration) => Span(*duration).fmt(f),
        }
    }
}

/// Text in, text out; with `numbers`, a plain number is accepted as well.
macro_rules! serde_as_text {
    ($type:ty, $expecting:literal $(, $from_number:expr)?) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                    $(fn visit_u64<E: de::Error>(self, number: u64) -> Result<$type, E> {
                        Ok($from_number(number))
                    }
                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$type, E> {
                        match u64::try_from(number) {
                            Ok(number) => Ok($from_number(number)),
                            Err(_) => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
                        }
                    })?
                }
                deserializer.deserialize_any(Text)
            }
        }
    };
}

serde_as_text!(ByteSize, "a size such as \"64GiB\", or a number of bytes", ByteSize);
serde_as_text!(Rate, "a rate such as \"100Mbit/s\"");
serde_as_text!(RateLimit, "a rate such as \"100Mbit/s\", or \"unlimited\"");
serde_as_text!(Span, "a duration such as \"15s\"");
serde_as_text!(Patience, "a duration such as \"1h\", or \"forever\"");

/// Bytes for people: four characters of number at most, binary units (`1.5 GiB`).
pub fn approx_bytes(bytes: u64) -> String {
    match BINARY.iter().find(|(_, factor)| bytes >= *factor) {
        Some((unit, factor)) => {
            let value = bytes as f64 / *factor as f64;
            if value < 99.95 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
        }
        None => format!("{bytes} B"),
    }
}

/// A rate for people, in bits as links are sold (`94.2 Mbit/s`).
pub fn approx_rate(bytes_per_s: f64) -> String {
    let bits = bytes_per_s * 8.0;
    if !bits.is_finite() || bits < 1.0 {
        return "0 bit/s".to_owned();
    }
    let (unit, factor) = BITS.iter().find(|(_, factor)| bits >= *factor as f64).unwrap_or(&BITS[4]);
    let value = bits / *factor as f64;
    if value < 99.95 && *factor > 1 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

/// A time for people: the two largest units (`2h 5m`, `3m 20s`, `12s`).
pub fn approx_seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds > 9.0e7 {
        return "more than 1000d".to_owned();
    }
    let whole = seconds.max(0.0).round() as u64;
    let (days, hours, minutes, rest) = (whole / 86_400, whole / 3_600 % 24, whole / 60 % 60, whole % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m {rest}s"),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// A decimal number, exact: `digits / 10^places`.
struct Decimal {
    digits: u128,
    places: u32,
}

impl Decimal {
    /// The whole part of the product; `None` when it needs more than 64 bits.
    fn times(&self, factor: u64) -> Option<u64> {
        let product = self.digits.checked_mul(u128::from(factor))?;
        u64::try_from(product / 10u128.pow(self.places)).ok()
    }
}

/// `1.5TiB` -> 1.5 and `TiB`. At most one space between them, as in `1.5 TiB`.
fn split_unit(text: &str) -> Option<(Decimal, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let unit = match rest.strip_prefix(' ') {
        Some("") => return None,
        Some(unit) => unit,
        None => rest,
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if !fraction.is_empty() => (whole, fraction),
        Some(_) => return None,
        None => (number, ""),
    };
    // 20 digits are more than 64 bits hold, and the product with the largest unit still fits 128 bits.
    if whole.is_empty() || whole.len() + fraction.len() > 20 {
        return None;
    }
    let digits = format!("{whole}{fraction}").parse().ok()?;
    Some((Decimal { digits, places: fraction.len() as u32 }, unit))
}

fn byte_factor(unit: &str) -> Option<u64> {
    if unit.is_empty() || unit == "B" {
        return Some(1);
    }
    BINARY.iter().chain(&DECIMAL).find(|(name, _)| *name == unit).map(|(_, factor)| *factor)
}

/// What an error message repeats of its input: enough to recognise it, never a flood.
fn quoted(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests;
