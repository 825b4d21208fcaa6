//! How far the state database was written, in a file beside its own. RocksDB replays its log up to the first damaged record
//! and takes what is missing behind it for a torn end: right after a power loss, wrong where the bytes had been there. With
//! this number an end that is missing is told from one that never was. Must not know what is written.
//!
//! The file `WRITTEN`: magic, boot, RocksDB's sequence number, and a checksum over these; 8 bytes each, little-endian. It is
//! not synced with every batch, so that it costs next to nothing: what it says holds under the boot that it names (the
//! kernel has it after a `kill -9`), or, at boot 0, under every one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

/// Its name in the database's folder; RocksDB leaves alone what it does not know.
pub(super) const FILE_NAME: &str = "WRITTEN";
const MAGIC: [u8; 8] = *b"bfwritn1";
const BYTES: usize = 32;
/// What was noted under this holds whatever happened since.
const DURABLE: u64 = 0;
/// Where the kernel tells no boot: believed by nobody.
const UNKNOWN: u64 = u64::MAX;

/// Which boot of the machine this is, where the kernel tells: a new one at every boot, and never the same again.
pub fn boot_id() -> Option<Arc<str>> {
    static BOOT: LazyLock<Option<Arc<str>>> = LazyLock::new(|| {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim().into()).filter(|id: &Arc<str>| !id.is_empty())
    });
    BOOT.clone()
}

/// The open file.
pub(super) struct Written {
    boot: u64,
    noted: Mutex<(File, u64)>,
}

impl Written {
    /// Opens or makes it. Also the sequence number that the database must have reached, where that is known.
    pub(super) fn open(dir: &Path, boot: Option<&str>) -> io::Result<(Written, Option<u64>)> {
        let boot = boot.map_or(UNKNOWN, |id| number(blake3::hash(id.as_bytes()).as_bytes()).clamp(1, UNKNOWN - 1));
        let file = File::options().read(true).write(true).create(true).truncate(false).open(dir.join(FILE_NAME))?;
        let mut bytes = [0; BYTES];
        let reached = match file.read_exact_at(&mut bytes, 0) {
            Ok(()) if bytes[..8] == MAGIC && bytes[24..] == checksum(&bytes[..24]) => {
                let noted_under = number(&bytes[8..]);
                (noted_under == DURABLE || (noted_under == boot && boot != UNKNOWN)).then(|| number(&bytes[16..]))
            }
            Ok(()) => {
                tracing::warn!(dir = %dir.display(), "{FILE_NAME} of the state database is damaged: what is missing at its end would not be noticed");
                None
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => return Err(error),
        };
        Ok((Written { boot, noted: Mutex::new((file, 0)) }, reached))
    }

    /// The database has everything up to here, as far as the kernel is concerned.
    pub(super) fn note(&self, sequence: u64) -> io::Result<()> {
        let mut noted = self.noted.lock();
        // Another thread may have been quicker with a later one.
        if sequence <= noted.1 {
            return Ok(());
        }
        noted.1 = sequence;
        noted.0.write_all_at(&row(self.boot, sequence), 0)
    }

    /// The database has everything up to here, durably.
    pub(super) fn note_durable(&self, sequence: u64) -> io::Result<()> {
        let mut noted = self.noted.lock();
        if sequence < noted.1 {
            return Ok(());
        }
        noted.1 = sequence;
        noted.0.write_all_at(&row(DURABLE, sequence), 0)?;
        noted.0.sync_data()
    }
}

fn row(boot: u64, sequence: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&boot.to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    let sum = checksum(&bytes[..24]);
    bytes[24..].copy_from_slice(&sum);
    bytes
}

fn checksum(bytes: &[u8]) -> [u8; 8] {
    number(blake3::hash(bytes).as_bytes()).to_le_bytes()
}

fn number(bytes: &[u8]) -> u64 {
    bytes[..8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_holds_under_its_boot_and_a_durable_one_under_all() {
        let dir = tempfile::tempdir().expect("a folder");
        let reached = |boot| Written::open(dir.path(), boot).expect("opens").1;
        let open = |boot| Written::open(dir.path(), boot).expect("opens").0;
        assert_eq!(reached(Some("one")), None);
        let first = open(Some("one"));
        first.note(7).expect("notes");
        first.note(6).expect("notes");
        assert_eq!([reached(Some("one")), reached(Some("two")), reached(None)], [Some(7), None, None]);
        first.note_durable(8).expect("notes");
        assert_eq!([reached(Some("one")), reached(Some("two")), reached(None)], [Some(8); 3]);
        open(None).note(9).expect("notes");
        assert_eq!([reached(Some("one")), reached(None)], [None, None]);
    }

    /// What version 1 wrote is read for ever after.
    #[test]
    fn the_layout_is_that_of_version_1_and_damage_is_told() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join(FILE_NAME);
        let old = "626677726974 6e31 0000000000000000 2a00000000000000 bd0b2ff9d32fe077";
        assert_eq!(hex::encode(row(DURABLE, 42)), old.replace(' ', ""));
        std::fs::write(&path, row(DURABLE, 42)).expect("writes");
        assert_eq!(Written::open(dir.path(), None).expect("opens").1, Some(42));
        let mut damaged = row(DURABLE, 42);
        damaged[17] ^= 1;
        std::fs::write(&path, damaged).expect("writes");
        assert_eq!(Written::open(dir.path(), None).expect("opens").1, None);
        std::fs::write(&path, &damaged[..9]).expect("writes");
        assert_eq!(Written::open(dir.path(), None).expect("opens").1, None);
    }
}
