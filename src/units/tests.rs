//! Tests of [`super`]: tables of what people write, and property-tested round trips.

use proptest::prelude::*;

use super::*;

#[test]
fn sizes_as_people_write_them() {
    for (text, bytes) in [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("64KiB", 65_536),
        ("64 KiB", 65_536),
        ("2GiB", 2 << 30),
        ("1.5TiB", 3 << 39),
        ("0.5PiB", 1 << 49),
        ("500GB", 500_000_000_000),
        ("3kB", 3_000),
        ("0.3KiB", 307),
        ("18446744073709551615", u64::MAX),
    ] {
        assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
    }
    for text in
        ["", "KiB", "64kib", "64K", "64 ", "64  KiB", "-1", "+1", "1e3", "1.", ".5", "1.2.3", "64KiB ", "1_000", "٣"]
    {
        assert_eq!(text.parse::<ByteSize>(), Err(UnitError::NotASize(text.to_owned())), "{text}");
    }
    for text in ["18446744073709551616", "16384PiB", "99999999999999999999PiB"] {
        assert_eq!(text.parse::<ByteSize>(), Err(UnitError::TooLarge(text.to_owned())), "{text}");
    }
}

#[test]
fn rates_as_people_write_them() {
    for (text, bytes) in [
        ("100Mbit/s", 12_500_000),
        ("1Gbit/s", 125_000_000),
        ("1.5Gbit/s", 187_500_000),
        ("12MB/s", 12_000_000),
        ("10MiB/s", 10 << 20),
        ("1B/s", 1),
        ("8bit/s", 1),
        ("9bit/s", 1),
        ("64 kbit/s", 8_000),
    ] {
        assert_eq!(text.parse::<Rate>().map(Rate::as_bytes_per_s), Ok(bytes), "{text}");
    }
    for text in ["", "100", "100M", "100MB", "/s", "1/s", "100mbit/s", "100Mbps", "fast", "unlimited"] {
        assert_eq!(text.parse::<Rate>(), Err(UnitError::NotARate(text.to_owned())), "{text}");
    }
    for text in ["0MB/s", "7bit/s", "0.5B/s"] {
        assert_eq!(text.parse::<Rate>(), Err(UnitError::NoRate(text.to_owned())), "{text}");
    }
    assert_eq!("18446744073709551615B/s".parse::<Rate>().map_err(|e| matches!(e, UnitError::TooLarge(_))), Err(true));
    assert_eq!("unlimited".parse(), Ok(RateLimit::Unlimited));
    assert_eq!("fast".parse::<RateLimit>(), Err(UnitError::NotALimit("fast".to_owned())));
    assert_eq!(RateLimit::Unlimited.as_bytes_per_s(), None);
}

#[test]
fn times_as_people_write_them() {
    assert_eq!("15s".parse(), Ok(Span(Duration::from_secs(15))));
    assert_eq!("1h 30min".parse(), Ok(Span(Duration::from_secs(5400))));
    assert_eq!("forever".parse(), Ok(Patience::Forever));
    assert_eq!("1h".parse(), Ok(Patience::For(Duration::from_secs(3600))));
    for text in ["", "15", "s", "-1s", "soon"] {
        assert_eq!(text.parse::<Span>(), Err(UnitError::NotASpan(text.to_owned())), "{text}");
        assert_eq!(text.parse::<Patience>(), Err(UnitError::NotAPatience(text.to_owned())), "{text}");
    }
}

#[test]
fn display_is_short_where_it_can_be() {
    for (bytes, text) in [(65_536, "64KiB"), (3 << 39, "1536GiB"), (1_000, "1000"), (0, "0"), (1 << 50, "1PiB")] {
        assert_eq!(ByteSize(bytes).to_string(), text);
    }
    for (text, printed) in [("100Mbit/s", "100Mbit/s"), ("12MB/s", "96Mbit/s"), ("3B/s", "3B/s"), ("1KiB/s", "1KiB/s")]
    {
        assert_eq!(text.parse::<Rate>().map(|rate| rate.to_string()), Ok(printed.to_owned()));
    }
}

#[test]
fn a_long_text_is_not_repeated_in_full() {
    let error = "x".repeat(10_000).parse::<ByteSize>().expect_err("no size");
    assert!(error.to_string().len() < 200);
}

#[test]
fn tables_round() {
    assert_eq!(approx_bytes(0), "0 B");
    assert_eq!(approx_bytes(1023), "1023 B");
    assert_eq!(approx_bytes(1536), "1.5 KiB");
    assert_eq!(approx_bytes(300 << 20), "300 MiB");
    assert_eq!(approx_bytes(3 << 39), "1.5 TiB");
    assert_eq!(approx_rate(12_500_000.0), "100 Mbit/s");
    assert_eq!(approx_rate(1_234_567.0), "9.9 Mbit/s");
    assert_eq!(approx_rate(0.0), "0 bit/s");
    assert_eq!(approx_rate(f64::NAN), "0 bit/s");
    assert_eq!(approx_seconds(12.4), "12s");
    assert_eq!(approx_seconds(200.0), "3m 20s");
    assert_eq!(approx_seconds(7_500.0), "2h 5m");
    assert_eq!(approx_seconds(200_000.0), "2d 7h");
    assert_eq!(approx_seconds(f64::INFINITY), "more than 1000d");
}

#[test]
fn serde_takes_text_and_only_sizes_take_numbers() {
    assert_eq!(serde_json::from_str::<ByteSize>("65536").ok(), Some(ByteSize(65_536)));
    assert_eq!(serde_json::from_str::<ByteSize>("\"64KiB\"").ok(), Some(ByteSize(65_536)));
    assert_eq!(serde_json::to_string(&ByteSize(65_536)).ok().as_deref(), Some("\"64KiB\""));
    let message = |json| serde_json::from_str::<RateLimit>(json).expect_err(json).to_string();
    assert!(message("100").contains("expected a rate such as"), "{}", message("100"));
    assert!(message("\"fast\"").contains("is not a rate limit"), "{}", message("\"fast\""));
    let negative = serde_json::from_str::<ByteSize>("-1").expect_err("negative").to_string();
    assert!(negative.contains("expected a size"), "{negative}");
}

proptest! {
    #[test]
    fn sizes_round_trip(bytes in any::<u64>()) {
        prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
    }

    #[test]
    fn round_sizes_round_trip(count in 0u64..1 << 14, shift in 0u32..50) {
        let size = ByteSize(count << shift);
        prop_assert_eq!(size.to_string().parse(), Ok(size));
    }

    #[test]
    fn rates_round_trip(bytes in 1u64..=u64::MAX / 8) {
        let rate = Rate::bytes_per_s(bytes).expect("in range");
        prop_assert_eq!(rate.to_string().parse(), Ok(rate));
    }

    #[test]
    fn durations_round_trip(seconds in 0u64..1 << 40, nanos in 0u32..1_000_000_000) {
        let duration = Duration::new(seconds, nanos);
        prop_assert_eq!(Span(duration).to_string().parse(), Ok(Span(duration)));
        prop_assert_eq!(Patience::For(duration).to_string().parse(), Ok(Patience::For(duration)));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,40}") {
        let _ = (text.parse::<ByteSize>(), text.parse::<Rate>(), text.parse::<Span>());
    }

    #[test]
    fn near_misses_do_not_panic(text in "[0-9]{0,24}\\.?[0-9]{0,24} ?[KMGTPkB]?i?(B|bit)?(/s)?") {
        let _ = (text.parse::<ByteSize>(), text.parse::<Rate>());
    }
}
