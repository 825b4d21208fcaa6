//! Recipe ids: short names for everything that shapes an image, so that it is made again only when something changed.
//! Pure. Must not know: what is made.

/// Counts up when the tool makes different images of the same arguments.
pub const TOOL_VERSION: &str = "fleet-1";

/// The id of these parts in this order, 16 hexadecimal digits.
pub fn id<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [TOOL_VERSION].into_iter().chain(parts) {
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// A UUID (version 8, of our own making: RFC 9562) that follows from these parts.
pub fn uuid<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let parts: Vec<&str> = parts.into_iter().collect();
    let hash = blake3::hash(parts.join("\n").as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_tell_parts_apart() {
        assert_eq!(id(["a", "b"]), id(["a", "b"]));
        assert_ne!(id(["ab", "c"]), id(["a", "bc"]));
        assert_eq!(id([]).len(), 16);
    }

    #[test]
    fn uuids_are_well_formed() {
        let uuid = uuid(["template", "1"]);
        let groups: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert_eq!(groups, [8, 4, 4, 4, 12]);
        assert_eq!(&uuid[14..15], "8");
    }
}
