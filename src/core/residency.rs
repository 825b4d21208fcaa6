//! Residency: which blocks of a volume lie in its file, and which sectors of a block that the guest wrote in part.
//! Pure: must not know files, journals or who fetches. A stale 0 costs a fetch, a stale 1 is corruption: bits are
//! set only after the bytes are in the file, and reach the disk only after the bytes did (the volume's checkpoint).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use bitvec::prelude::*;

use crate::core::ids::{BlockIndex, SECTOR_BYTES};
use crate::core::manifest::Geometry;

/// Blocks in a chunk, the unit in which residency is kept on disk. A guest that writes here and there makes rows of up to 18 bytes a
/// block, twice a flush; a volume of 1 TiB has 65,536 rows to be read at a restart.
pub const CHUNK_BLOCKS: u64 = 256;

/// The valid sectors of a block that is absent but for what the guest wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectorMask(BitVec<u8, Lsb0>);

impl SectorMask {
    /// No sector of a block of `len_bytes` (the last sector may be short).
    pub fn empty(len_bytes: u32) -> SectorMask {
        SectorMask(bitvec![u8, Lsb0; 0; len_bytes.div_ceil(SECTOR_BYTES) as usize])
    }

    /// Marks the sectors of a byte range that begins at a sector and ends at one or at the block's end.
    pub fn set(&mut self, bytes: Range<u32>) {
        debug_assert!(bytes.start.is_multiple_of(SECTOR_BYTES), "writes are widened to sectors before");
        self.0[sectors(bytes)].fill(true);
    }

    /// Whether all sectors that a byte range touches are valid.
    pub fn covers(&self, bytes: Range<u32>) -> bool {
        self.0[sectors(bytes)].all()
    }

    /// Whether every sector is valid.
    pub fn is_full(&self) -> bool {
        self.0.all()
    }

    /// The byte ranges that are not valid, in order, in a block of `len_bytes`.
    pub fn missing(&self, len_bytes: u32) -> Vec<Range<u32>> {
        self.runs(false, len_bytes)
    }

    /// The byte ranges that are valid, in order, in a block of `len_bytes`.
    pub fn valid(&self, len_bytes: u32) -> Vec<Range<u32>> {
        self.runs(true, len_bytes)
    }

    fn runs(&self, wanted: bool, len_bytes: u32) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for sector in 0..self.0.len() as u32 {
            if self.0[sector as usize] == wanted {
                let bytes = sector * SECTOR_BYTES..((sector + 1) * SECTOR_BYTES).min(len_bytes);
                match runs.last_mut() {
                    Some(last) if last.end == bytes.start => last.end = bytes.end,
                    _ => runs.push(bytes),
                }
            }
        }
        runs
    }
}

fn sectors(bytes: Range<u32>) -> Range<usize> {
    (bytes.start / SECTOR_BYTES) as usize..bytes.end.div_ceil(SECTOR_BYTES) as usize
}

/// The two bits of every block, readable without a lock: what the hot path looks at.
///
/// Setting happens under the lock that guards [`Residency`]; the fences order a bit after the file's bytes for a
/// reader on another core.
#[derive(Debug)]
pub struct ResidentBits {
    resident: BitVec<AtomicU64, Lsb0>,
    written: BitVec<AtomicU64, Lsb0>,
    absent: AtomicU64,
    written_count: AtomicU64,
}

impl ResidentBits {
    /// All blocks absent.
    pub fn new(blocks: u64) -> ResidentBits {
        let zeros = || {
            let words = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
            let mut bits = BitVec::from_vec(words);
            bits.truncate(blocks as usize);
            bits
        };
        ResidentBits {
            resident: zeros(),
            written: zeros(),
            absent: AtomicU64::new(blocks),
            written_count: AtomicU64::new(0),
        }
    }

    /// Whether the whole block may be read from the file.
    pub fn is_resident(&self, block: BlockIndex) -> bool {
        let bit = self.resident[block.0 as usize];
        fence(Ordering::Acquire);
        bit
    }

    /// Whether all of a range of blocks may be read from the file.
    pub fn are_resident(&self, blocks: Range<u64>) -> bool {
        let all = self.resident[blocks.start as usize..blocks.end as usize].all();
        fence(Ordering::Acquire);
        all
    }

    /// Whether a guest wrote to the block before it was resident, to some of it or to all. What is written to it afterwards changes nothing.
    pub fn is_written(&self, block: BlockIndex) -> bool {
        self.written[block.0 as usize]
    }

    /// How many blocks are not resident (partly written ones included).
    pub fn absent(&self) -> u64 {
        self.absent.load(Ordering::Acquire)
    }

    /// How many resident blocks [`ResidentBits::is_written`].
    pub fn written(&self) -> u64 {
        self.written_count.load(Ordering::Relaxed)
    }

    /// The first absent block in a range.
    pub fn first_absent(&self, blocks: Range<u64>) -> Option<BlockIndex> {
        self.resident[blocks.start as usize..blocks.end as usize]
            .first_zero()
            .map(|at| BlockIndex(blocks.start + at as u64))
    }

    /// To be called under the lock that guards this volume's [`Residency`], after the bytes are in the file.
    fn set(&self, block: BlockIndex, is_written: bool) {
        let at = block.0 as usize;
        if self.resident[at] {
            return;
        }
        fence(Ordering::Release);
        self.resident.set_aliased(at, true);
        if is_written {
            self.written.set_aliased(at, true);
            self.written_count.fetch_add(1, Ordering::Relaxed);
        }
        self.absent.fetch_sub(1, Ordering::Release);
    }
}

/// What is to become of the bytes of a fetched block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Merge {
    /// The block became resident meanwhile: the guest's bytes are newer.
    Drop,
    /// Write all of it.
    Whole,
    /// Write these byte ranges; the rest is the guest's.
    Ranges(Vec<Range<u32>>),
}

/// Where a block's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// At the source.
    Absent,
    /// Here, and fetched whole. Guests may have written to them since.
    Present,
    /// Here, and a guest wrote to them before they had arrived.
    Written,
    /// What a guest wrote of them is here, the rest at the source.
    PartlyWritten,
}

/// Residency of one volume, as changed under its lock.
#[derive(Debug)]
pub struct Residency {
    geometry: Geometry,
    bits: std::sync::Arc<ResidentBits>,
    partial: BTreeMap<u64, SectorMask>,
    dirty: BTreeSet<u64>,
    /// Chunks that changed since their last row of any kind, durable or not.
    unnoted: BTreeSet<u64>,
}

impl Residency {
    /// All blocks absent.
    pub fn new(geometry: Geometry) -> Residency {
        Residency {
            geometry,
            bits: std::sync::Arc::new(ResidentBits::new(geometry.blocks())),
            partial: BTreeMap::new(),
            dirty: BTreeSet::new(),
            unnoted: BTreeSet::new(),
        }
    }

    /// The bits, to be looked at without the lock.
    pub fn bits(&self) -> std::sync::Arc<ResidentBits> {
        std::sync::Arc::clone(&self.bits)
    }

    /// How many absent blocks have sectors that the guest wrote.
    pub fn partial_blocks(&self) -> u64 {
        self.partial.len() as u64
    }

    /// What a block is now.
    pub fn presence(&self, block: BlockIndex) -> Presence {
        match (self.bits.is_resident(block), self.bits.is_written(block)) {
            (true, true) => Presence::Written,
            (true, false) => Presence::Present,
            (false, _) if self.partial.contains_key(&block.0) => Presence::PartlyWritten,
            (false, _) => Presence::Absent,
        }
    }

    /// The valid sectors of an absent block; None when it has none (or is resident).
    pub fn mask(&self, block: BlockIndex) -> Option<&SectorMask> {
        self.partial.get(&block.0)
    }

    /// Whether a guest wrote to any block that was absent.
    pub fn has_guest_writes(&self) -> bool {
        self.bits.written() > 0 || !self.partial.is_empty()
    }

    /// Bytes of all blocks that a guest wrote to while they were absent, as far as the guest's: of a block that has arrived since, all of it.
    pub fn guest_bytes(&self) -> u64 {
        let whole = self.bits.written() * u64::from(self.geometry.block_size.bytes());
        let partial = |(block, mask): (&u64, &SectorMask)| -> u64 {
            mask.valid(self.geometry.len_of(BlockIndex(*block))).iter().map(|range| range.len() as u64).sum()
        };
        (whole + self.partial.iter().map(partial).sum::<u64>()).min(self.geometry.size_bytes)
    }

    /// The guest's bytes of these sectors are in the file. Widens nothing: `bytes` begins at a sector and ends at one
    /// or at the block's end.
    pub fn record_write(&mut self, block: BlockIndex, bytes: Range<u32>) {
        if self.bits.is_resident(block) {
            return;
        }
        let len = self.geometry.len_of(block);
        let whole = bytes == (0..len);
        if !whole {
            let mask = self.partial.entry(block.0).or_insert_with(|| SectorMask::empty(len));
            mask.set(bytes);
            if !mask.is_full() {
                self.changed(block);
                return;
            }
        }
        self.partial.remove(&block.0);
        self.bits.set(block, true);
        self.changed(block);
    }

    /// What to do with a fetched block's bytes, as things stand under the lock.
    pub fn merge(&self, block: BlockIndex) -> Merge {
        if self.bits.is_resident(block) {
            return Merge::Drop;
        }
        match self.partial.get(&block.0) {
            None => Merge::Whole,
            Some(mask) => Merge::Ranges(mask.missing(self.geometry.len_of(block))),
        }
    }

    /// The bytes that [`Residency::merge`] named are in the file.
    pub fn record_fetched(&mut self, block: BlockIndex) {
        if self.bits.is_resident(block) {
            return;
        }
        let had_writes = self.partial.remove(&block.0).is_some();
        self.bits.set(block, had_writes);
        self.changed(block);
    }

    /// Takes the chunks that changed since the last call, in the form that is kept on disk. The caller syncs the file
    /// *after* this and makes the rows durable after that.
    pub fn take_dirty(&mut self) -> Vec<(u64, Vec<u8>)> {
        std::mem::take(&mut self.dirty).into_iter().map(|chunk| (chunk, self.chunk_row(chunk))).collect()
    }

    /// Of the chunks that blocks lie in, those that changed since their last row: rows that need not be durable, but must be
    /// written before a guest's write to one of these blocks is acknowledged, lest a restart of the daemon forgets it.
    pub fn take_unnoted(&mut self, blocks: Range<u64>) -> Vec<u64> {
        if self.unnoted.is_empty() || blocks.is_empty() {
            return Vec::new();
        }
        let chunks = blocks.start / CHUNK_BLOCKS..=(blocks.end - 1) / CHUNK_BLOCKS;
        let taken: Vec<u64> = self.unnoted.range(chunks).copied().collect();
        for chunk in &taken {
            self.unnoted.remove(chunk);
        }
        taken
    }

    /// Puts chunks back whose rows could not be written.
    pub fn mark_unnoted(&mut self, chunks: impl IntoIterator<Item = u64>) {
        self.unnoted.extend(chunks);
    }

    fn changed(&mut self, block: BlockIndex) {
        self.dirty.insert(block.0 / CHUNK_BLOCKS);
        self.unnoted.insert(block.0 / CHUNK_BLOCKS);
    }

    /// The first half of [`Residency::take_dirty`], for who cannot hold the lock while all rows are made: a row that is
    /// made later says more, never less.
    pub fn take_dirty_chunks(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.dirty)
    }

    /// Puts chunks back whose rows could not be made durable.
    pub fn mark_dirty(&mut self, chunks: impl IntoIterator<Item = u64>) {
        self.dirty.extend(chunks);
    }

    /// Whether anything is to be made durable.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// A chunk in the form that is kept on disk.
    pub fn chunk_row(&self, chunk: u64) -> Vec<u8> {
        let first = chunk * CHUNK_BLOCKS;
        let end = (first + CHUNK_BLOCKS).min(self.geometry.blocks());
        let mut row = vec![ROW_VERSION];
        for plane in [&self.bits.resident, &self.bits.written] {
            let mut bytes = [0u8; CHUNK_BLOCKS as usize / 8];
            for block in first..end {
                if plane[block as usize] {
                    bytes[((block - first) / 8) as usize] |= 1 << ((block - first) % 8);
                }
            }
            row.extend_from_slice(&bytes);
        }
        for (block, mask) in self.partial.range(first..end) {
            row.extend_from_slice(&((block - first) as u16).to_le_bytes());
            row.extend_from_slice(mask.0.as_raw_slice());
        }
        row
    }

    /// Takes over a row that [`Residency::take_dirty`] made, at start-up, on top of what other rows of the chunk said. A row that does not fit is an error: the volume must not
    /// be served by guessing.
    pub fn restore_chunk(&mut self, chunk: u64, row: &[u8]) -> Result<(), BadChunk> {
        let bad = |why| BadChunk { chunk, why };
        let first = chunk.checked_mul(CHUNK_BLOCKS).filter(|first| *first < self.geometry.blocks());
        let first = first.ok_or(bad("it lies behind the end of the volume"))?;
        let blocks = (self.geometry.blocks() - first).min(CHUNK_BLOCKS);
        const PLANE: usize = CHUNK_BLOCKS as usize / 8;
        let (version, rest) = row.split_first().ok_or(bad("it is empty"))?;
        if *version != ROW_VERSION {
            return Err(bad("it has an unknown version"));
        }
        if rest.len() < 2 * PLANE {
            return Err(bad("it is too short"));
        }
        let (resident, rest) = rest.split_at(PLANE);
        let (written, mut rest) = rest.split_at(PLANE);
        let bit = |plane: &[u8], at: u64| plane[(at / 8) as usize] >> (at % 8) & 1 == 1;
        for at in 0..CHUNK_BLOCKS {
            if bit(resident, at) {
                if at >= blocks {
                    return Err(bad("it marks blocks behind the end"));
                }
                self.bits.set(BlockIndex(first + at), bit(written, at));
                self.partial.remove(&(first + at));
            }
        }
        while !rest.is_empty() {
            let (at, after) = rest.split_first_chunk::<2>().ok_or(bad("a partial block is cut off"))?;
            let at = u64::from(u16::from_le_bytes(*at));
            if at >= blocks {
                return Err(bad("a partial block lies behind the end"));
            }
            let block = BlockIndex(first + at);
            let mut mask = SectorMask::empty(self.geometry.len_of(block));
            let len = mask.0.as_raw_slice().len();
            if after.len() < len {
                return Err(bad("a partial block is cut off"));
            }
            mask.0.as_raw_mut_slice().copy_from_slice(&after[..len]);
            if !self.bits.is_resident(block) {
                let merged = self.partial.entry(block.0).or_insert_with(|| mask.clone());
                *merged.0.as_mut_bitslice() |= mask.0.as_bitslice();
            }
            rest = &after[len..];
        }
        Ok(())
    }
}

/// 1 had 1,024 blocks in a chunk.
const ROW_VERSION: u8 = 2;

/// A residency row that cannot be what this program wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("residency chunk {chunk}: {why}")]
pub struct BadChunk {
    /// Which [`CHUNK_BLOCKS`] blocks.
    pub chunk: u64,
    /// What is wrong.
    pub why: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: u32 = 16384;

    fn geometry(size_bytes: u64) -> Geometry {
        Geometry::new(size_bytes, u64::from(BLOCK)).expect("a geometry")
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write { block: u64, first_sector: u32, sectors: u32 },
        Fetched { block: u64 },
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0u64..20, 0u32..32, 1u32..33).prop_map(|(block, first_sector, sectors)| Step::Write { block, first_sector, sectors }),
            2 => (0u64..20).prop_map(|block| Step::Fetched { block }),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        /// Bytes are modelled by who wrote the sector last: the guest's sectors must never be overwritten by a fetch, and a
        /// block is resident exactly when all of its sectors are somebody's.
        #[test]
        fn residency_agrees_with_a_model(steps in prop::collection::vec(step(), 0..200), tail in 1u32..BLOCK) {
            let size_bytes = 19 * u64::from(BLOCK) + u64::from(tail);
            let geometry = geometry(size_bytes);
            let mut residency = Residency::new(geometry);
            let mut rows: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
            let mut model: Vec<Vec<u8>> =
                (0..20).map(|b| vec![b'-'; geometry.len_of(BlockIndex(b)).div_ceil(SECTOR_BYTES) as usize]).collect();
            for step in steps {
                match step {
                    Step::Write { block, first_sector, sectors } => {
                        let len = geometry.len_of(BlockIndex(block));
                        let start = first_sector * SECTOR_BYTES;
                        let end = (start + sectors * SECTOR_BYTES).min(len);
                        if start >= end { continue; }
                        residency.record_write(BlockIndex(block), start..end);
                        for sector in super::sectors(start..end) { model[block as usize][sector] = b'g'; }
                    }
                    Step::Fetched { block } => {
                        let len = geometry.len_of(BlockIndex(block));
                        let ranges = match residency.merge(BlockIndex(block)) {
                            Merge::Drop => continue,
                            Merge::Whole => std::iter::once(0..len).collect(),
                            Merge::Ranges(ranges) => ranges,
                        };
                        for range in ranges {
                            for sector in super::sectors(range) {
                                prop_assert_eq!(model[block as usize][sector], b'-', "a fetch overwrote the guest");
                                model[block as usize][sector] = b'f';
                            }
                        }
                        residency.record_fetched(BlockIndex(block));
                    }
                    Step::Restart => {
                        rows.extend(residency.take_dirty());
                        prop_assert!(!residency.is_dirty());
                        residency = Residency::new(geometry);
                        for (chunk, row) in &rows { residency.restore_chunk(*chunk, row).expect("our own row"); }
                    }
                }
                let mut absent = 0;
                for block in 0..20u64 {
                    let whole = model[block as usize].iter().all(|s| *s != b'-');
                    prop_assert_eq!(residency.bits().is_resident(BlockIndex(block)), whole);
                    absent += u64::from(!whole);
                    if let Some(mask) = residency.mask(BlockIndex(block)) {
                        let valid: Vec<bool> = model[block as usize].iter().map(|s| *s != b'-').collect();
                        let have: Vec<bool> = mask.0.iter().by_vals().collect();
                        prop_assert_eq!(valid, have);
                    }
                }
                prop_assert_eq!(residency.bits().absent(), absent);
            }
        }

        #[test]
        fn damaged_rows_never_panic(row in prop::collection::vec(any::<u8>(), 0..400), chunk in 0u64..4) {
            let mut residency = Residency::new(geometry(20 * u64::from(BLOCK)));
            let _ = residency.restore_chunk(chunk, &row);
        }
    }

    #[test]
    fn a_trimmed_absent_range_finds_the_next_absent_block() {
        let mut residency = Residency::new(geometry(10 * u64::from(BLOCK)));
        residency.record_fetched(BlockIndex(0));
        residency.record_write(BlockIndex(1), 0..BLOCK);
        let bits = residency.bits();
        assert_eq!(bits.first_absent(0..10), Some(BlockIndex(2)));
        assert!(bits.are_resident(0..2) && !bits.are_resident(0..3));
        assert!(bits.is_written(BlockIndex(1)) && !bits.is_written(BlockIndex(0)));
        assert_eq!(bits.written(), 1);
    }
}
