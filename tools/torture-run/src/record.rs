//! What the clients write: every sector says which write it is of and where it belongs, and has a checksum, so that bytes
//! that are found where others should be tell where they come from. Pure.

/// The unit in which records are made, and in which a write that was not acknowledged is old or new.
pub const SECTOR_BYTES: u64 = 512;
const SECTOR: usize = SECTOR_BYTES as usize;
const MAGIC: [u8; 8] = *b"torture\n";
/// Magic, checksum, sequence number, sector.
const HEADER: usize = 32;

/// Above the number of a write stands the number of its disk.
const DISK_SHIFT: u32 = 40;

/// The number of a write, across all disks.
pub fn sequence(disk: u64, write: u64) -> u64 {
    disk << DISK_SHIFT | write
}

/// The disk and the write that a number stands for.
pub fn parts(sequence: u64) -> (u64, u64) {
    (sequence >> DISK_SHIFT, sequence & ((1 << DISK_SHIFT) - 1))
}

/// The bytes that write `sequence` puts at `offset` and behind it; neither end need be a sector's.
pub fn fill(sequence: u64, offset: u64, into: &mut [u8]) {
    let mut done = 0;
    while done < into.len() {
        let at = offset + done as u64;
        let record = sector(sequence, at / SECTOR_BYTES);
        let from = (at % SECTOR_BYTES) as usize;
        let count = (SECTOR - from).min(into.len() - done);
        into[done..done + count].copy_from_slice(&record[from..from + count]);
        done += count;
    }
}

/// Which write a whole sector is of, and for which sector it was made; `None` for anything else than a record.
pub fn read(bytes: &[u8]) -> Option<(u64, u64)> {
    if bytes.len() != SECTOR || bytes[..8] != MAGIC {
        return None;
    }
    let number = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let (sequence, place) = (number(16), number(24));
    (bytes[8..16] == checksum(&bytes[16..])).then_some((sequence, place))
}

fn sector(sequence: u64, place: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes[24..HEADER].copy_from_slice(&place.to_le_bytes());
    // Half of it does not compress, as guests' data does by half.
    let mut random = blockferry_lab::random::Random::new(sequence.rotate_left(32) ^ place);
    random.fill(&mut bytes[HEADER..SECTOR / 2]);
    bytes[SECTOR / 2..].fill(sequence as u8);
    let sum = checksum(&bytes[16..]);
    bytes[8..16].copy_from_slice(&sum);
    bytes
}

fn checksum(bytes: &[u8]) -> [u8; 8] {
    let mut sum = [0; 8];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_back_and_pieces_fit_together() {
        let mut whole = vec![0; 4 * SECTOR];
        fill(7, 3 * SECTOR_BYTES, &mut whole);
        assert_eq!(read(&whole[SECTOR..2 * SECTOR]), Some((7, 4)));
        let mut piece = vec![0; 1000];
        fill(7, 3 * SECTOR_BYTES + 100, &mut piece);
        assert_eq!(piece, whole[100..1100]);
        whole[40] ^= 1;
        assert_eq!(read(&whole[..SECTOR]), None);
        assert_eq!(read(&[0; SECTOR]), None);
        assert_eq!(parts(sequence(3, 9)), (3, 9));
    }
}
