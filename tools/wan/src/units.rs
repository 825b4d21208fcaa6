//! Rates, time spans, sizes and probabilities as people write them: `100Mbit/s`, `40ms`, `64KiB`, `0.1%`.
//! Pure. Must not know: sockets, the link.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Bits per second, never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(u64);

impl Rate {
    /// A rate of so many bits per second; `None` for zero, which would never deliver anything (cut the link instead).
    pub fn from_bits_per_second(bits: u64) -> Option<Rate> {
        (bits > 0).then_some(Rate(bits))
    }

    /// Bits per second.
    pub fn bits_per_second(self) -> u64 {
        self.0
    }

    /// How long `bytes` occupy the wire.
    pub fn time_for(self, bytes: u64) -> Duration {
        let nanos = (u128::from(bytes) * 8 * 1_000_000_000 + u128::from(self.0) / 2) / u128::from(self.0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// How many bytes pass in `time`.
    pub fn bytes_in(self, time: Duration) -> u64 {
        u64::try_from(time.as_nanos() * u128::from(self.0) / 8_000_000_000).unwrap_or(u64::MAX)
    }
}

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Rate, String> {
        let wrong = || format!("`{text}` is not a rate: write 100Mbit/s, 1Gbit/s or 500kbit/s");
        let (number, unit) = split_number(text).ok_or_else(wrong)?;
        let factor = match unit {
            "bit/s" => 1e0,
            "kbit/s" => 1e3,
            "Mbit/s" => 1e6,
            "Gbit/s" => 1e9,
            _ => return Err(wrong()),
        };
        Rate::from_bits_per_second((number * factor).round() as u64).ok_or_else(|| {
            format!("`{text}`: a rate must be more than zero; use `cut` for a link that carries nothing")
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bits if bits.is_multiple_of(1_000_000_000) => write!(f, "{}Gbit/s", bits / 1_000_000_000),
            bits if bits.is_multiple_of(1_000_000) => write!(f, "{}Mbit/s", bits / 1_000_000),
            bits if bits.is_multiple_of(1_000) => write!(f, "{}kbit/s", bits / 1_000),
            bits => write!(f, "{bits}bit/s"),
        }
    }
}

/// Either a rate or `unlimited`, as the command line takes it.
pub fn parse_rate_limit(text: &str) -> Result<Option<Rate>, String> {
    if text == "unlimited" { Ok(None) } else { text.parse().map(Some) }
}

/// A time span: `40ms`, `1.5s`, `200us`, `0ms`. A newtype so that it parses from options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// The longest span that is taken: an hour is no network any more, and sums of spans stay far from overflow.
pub const SPAN_MAX: Duration = Duration::from_secs(3600);

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Span, String> {
        let wrong = || format!("`{text}` is not a time: write 40ms, 1.5s, 200us or 0ms");
        let (number, unit) = split_number(text).ok_or_else(wrong)?;
        let nanos = match unit {
            "ns" => 1e0,
            "us" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            _ => return Err(wrong()),
        };
        let span = Duration::from_nanos((number * nanos).round() as u64);
        if span > SPAN_MAX { Err(format!("`{text}` is longer than an hour")) } else { Ok(Span(span)) }
    }
}

/// A size in bytes: `64KiB`, `8MiB`, `1500B`, `1500`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size: write 64KiB, 8MiB or 1500B");
    let (number, unit) = split_number(text).ok_or_else(wrong)?;
    let factor = match unit {
        "" | "B" => 1e0,
        "KiB" => 1024f64,
        "MiB" => 1024f64 * 1024.0,
        "GiB" => 1024f64 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    Ok((number * factor).round() as u64)
}

/// A share between 0 and 1: `0.1%` or `0.001`.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Probability(f64);

impl Probability {
    /// A probability; `None` outside 0 to 1.
    pub fn new(value: f64) -> Option<Probability> {
        (0.0..=1.0).contains(&value).then_some(Probability(value))
    }

    /// The value, 0 to 1.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl FromStr for Probability {
    type Err = String;
    fn from_str(text: &str) -> Result<Probability, String> {
        let wrong = || format!("`{text}` is not a probability: write 0.1% or 0.001, at most 100%");
        let (number, unit) = split_number(text).ok_or_else(wrong)?;
        let value = match unit {
            "%" => number / 100.0,
            "" => number,
            _ => return Err(wrong()),
        };
        Probability::new(value).ok_or_else(wrong)
    }
}

/// `("1.5", "ms")` out of `1.5ms`: a plain decimal number of at most 18 digits (no sign, no exponent), then the unit.
fn split_number(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    if number.len() > 18 {
        return None;
    }
    Some((number.parse().ok()?, unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        assert_eq!("100Mbit/s".parse::<Rate>().unwrap().bits_per_second(), 100_000_000);
        assert_eq!("1.5Gbit/s".parse::<Rate>().unwrap().bits_per_second(), 1_500_000_000);
        assert_eq!("64kbit/s".parse::<Rate>().unwrap().to_string(), "64kbit/s");
        assert_eq!(parse_rate_limit("unlimited"), Ok(None));
        for wrong in ["", "100", "100MB/s", "-1Mbit/s", "0Mbit/s", "1e3Mbit/s", "Mbit/s", "..Mbit/s"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn time_on_the_wire() {
        let rate: Rate = "100Mbit/s".parse().unwrap();
        assert_eq!(rate.time_for(1500), Duration::from_micros(120));
        assert_eq!(rate.bytes_in(Duration::from_micros(120)), 1500);
        assert_eq!("1bit/s".parse::<Rate>().unwrap().time_for(u64::MAX), Duration::from_nanos(u64::MAX));
    }

    #[test]
    fn spans_sizes_and_probabilities() {
        assert_eq!("40ms".parse::<Span>().unwrap().0, Duration::from_millis(40));
        assert_eq!("1.5s".parse::<Span>().unwrap().0, Duration::from_millis(1500));
        assert_eq!("0ms".parse::<Span>().unwrap().0, Duration::ZERO);
        assert!("40".parse::<Span>().is_err());
        assert!("2000000s".parse::<Span>().is_err());
        assert_eq!(parse_size("64KiB"), Ok(65536));
        assert_eq!(parse_size("1500"), Ok(1500));
        assert!(parse_size("64kb").is_err());
        assert_eq!("0.1%".parse::<Probability>().unwrap().get(), 0.001);
        assert_eq!("0.5".parse::<Probability>().unwrap().get(), 0.5);
        assert!("101%".parse::<Probability>().is_err());
    }
}
