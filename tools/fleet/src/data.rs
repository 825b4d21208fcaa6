//! What a machine writes in its life: logs, records, uploads, a paged database, upgraded files. Seeded and pure.
//! Must not know: file systems, where the bytes go.

use std::fmt::Write;

use crate::rng::Rng;

/// The database's page.
pub const PAGE_BYTES: usize = 8192;

// One a line would hide that it is a list of words.
#[rustfmt::skip]
const WORDS: &[&str] = &[
    "session", "opened", "closed", "for", "user", "root", "by", "cron", "job", "request", "GET", "POST", "index",
    "status", "ok", "error", "timeout", "connection", "retry", "upstream", "backend", "cache", "miss", "hit",
    "worker", "started", "stopped", "kernel", "service", "unit", "reached", "target", "customer", "order", "invoice",
    "item", "price", "total", "shipped", "pending", "queue", "message", "delivered", "disk", "usage", "memory",
    "available", "address", "assigned",
];

/// Log lines of the host `name`, about `bytes` of them: they compress about fivefold.
pub fn log(name: &str, bytes: usize, rng: &mut Rng) -> Vec<u8> {
    let mut text = String::with_capacity(bytes + 256);
    let mut second = rng.below(86_400);
    while text.len() < bytes {
        second += rng.between(1, 90);
        let (day, hour, minute) = (1 + second / 86_400 % 28, second / 3600 % 24, second / 60 % 60);
        // Writing to a String cannot fail.
        let _ = write!(text, "2025-01-{day:02}T{hour:02}:{minute:02}:{:02} {name} ", second % 60);
        let _ = write!(text, "{}[{}]:", rng.pick(WORDS).unwrap_or(&""), rng.between(300, 32_768));
        for _ in 0..rng.between(4, 14) {
            let _ = write!(text, " {}", rng.pick(WORDS).unwrap_or(&""));
        }
        let _ = writeln!(text, " {:08x}", rng.next_u64() as u32);
    }
    text.truncate(bytes);
    text.into_bytes()
}

/// Records as an application keeps them, one JSON object a line: they compress about threefold.
pub fn records(bytes: usize, rng: &mut Rng) -> Vec<u8> {
    let mut text = String::with_capacity(bytes + 512);
    while text.len() < bytes {
        let (id, customer, cents) = (rng.next_u64(), rng.below(100_000), rng.below(1_000_000));
        let _ = write!(text, r#"{{"id":"{id:016x}","customer":{customer},"cents":{cents},"note":""#);
        for _ in 0..rng.between(5, 30) {
            let _ = write!(text, "{} ", rng.pick(WORDS).unwrap_or(&""));
        }
        text.push_str("\"}\n");
    }
    text.truncate(bytes);
    text.into_bytes()
}

/// Bytes that do not compress: pictures, archives.
pub fn incompressible(bytes: usize, rng: &mut Rng) -> Vec<u8> {
    let mut data = vec![0; bytes];
    rng.fill(&mut data);
    data
}

/// One page of the database `name`: a header and rows in both halves, the rest zero. No 4 KiB of it are all zero, so
/// that every block of the file is allocated and can be rewritten in place.
pub fn page(name: &str, number: u64, generation: u32, rng: &mut Rng) -> Vec<u8> {
    let mut page = vec![0; PAGE_BYTES];
    let header = format!("page {number} generation {generation} of {name}\n");
    page[..header.len()].copy_from_slice(header.as_bytes());
    rng.fill(&mut page[header.len()..header.len() + 2400]);
    rng.fill(&mut page[PAGE_BYTES / 2..PAGE_BYTES / 2 + 600]);
    page
}

/// The next version of a file: some places changed, and something inserted, after which everything is shifted, as
/// when a program is compiled again.
pub fn upgraded(old: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut new = old.to_vec();
    for _ in 0..1 + new.len() / 100_000 {
        let at = rng.below(new.len() as u64) as usize;
        let end = (at + rng.between(16, 400) as usize).min(new.len());
        rng.fill(&mut new[at..end]);
    }
    // In the later half, so that the first blocks stay alike.
    let at = new.len() / 2 + rng.below(new.len() as u64 / 2) as usize;
    let mut inserted = vec![0; rng.between(8, 200) as usize];
    rng.fill(&mut inserted);
    new.splice(at..at, inserted);
    new
}

/// A file whose space was asked for in advance: data at both ends, a hole between.
pub fn preallocated(bytes: usize, rng: &mut Rng) -> Vec<u8> {
    let mut data = vec![0; bytes];
    let end = data.len().min(4096);
    rng.fill(&mut data[..end]);
    let start = data.len().saturating_sub(4096);
    rng.fill(&mut data[start..]);
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rng() -> Rng {
        Rng::for_purpose(1, "data")
    }

    #[test]
    fn sizes_are_exact_and_bytes_repeat() {
        for bytes in [0, 1, 4096, 100_000] {
            assert_eq!(log("vm", bytes, &mut rng()).len(), bytes);
            assert_eq!(records(bytes, &mut rng()).len(), bytes);
            assert_eq!(incompressible(bytes, &mut rng()).len(), bytes);
            assert_eq!(preallocated(bytes, &mut rng()).len(), bytes);
        }
        assert_eq!(log("vm", 5000, &mut rng()), log("vm", 5000, &mut rng()));
    }

    #[test]
    fn pages_have_no_zero_block() {
        let page = page("vm01-web", 7, 0, &mut rng());
        assert_eq!(page.len(), PAGE_BYTES);
        assert!(page.chunks(4096).all(|block| block.iter().any(|b| *b != 0)));
    }

    #[test]
    fn an_upgrade_resembles_what_it_replaces() {
        let old = records(200_000, &mut rng());
        let new = upgraded(&old, &mut rng());
        assert_ne!(old, new);
        assert!(new.len() > old.len() && new.len() < old.len() + 300);
        let same = old.chunks(4096).zip(new.chunks(4096)).filter(|(a, b)| a == b).count();
        assert!(same >= 15, "{same}");
        assert!(!upgraded(&[], &mut rng()).is_empty());
    }
}
