//! Sizes as people write them: `64KiB`, `1GiB`. Pure. Must not know: images.

/// A size in bytes: a plain decimal number, then `B`, `KiB`, `MiB`, `GiB`, `TiB` or nothing.
///
/// # Errors
/// A sentence that says what would be right.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size: write 64KiB, 512MiB or 1GiB");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(wrong()),
    };
    if number.len() > 15 {
        return Err(wrong());
    }
    let number: f64 = number.parse().map_err(|_| wrong())?;
    Ok((number * (1u64 << shift) as f64).round() as u64)
}

/// Bytes as whole MiB, for tables.
pub fn mib(bytes: u64) -> u64 {
    (bytes + (1 << 19)) >> 20
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64KiB"), Ok(65_536));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("4096"), Ok(4096));
        for wrong in ["", "GiB", "1GB", "-1", "1 GiB", "1e9", "..", "1234567890123456"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(mib(3 << 20), 3);
    }
}
