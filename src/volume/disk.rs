//! One volume's file and residency together, in blocking calls: the order of bytes and bits is decided here.
//! Must not know fetches, clients or threads.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::VolumeError;
use super::life::Life;
use crate::core::ids::{BlockIndex, SECTOR_BYTES};
use crate::core::manifest::Geometry;
use crate::core::residency::{Merge, Residency, ResidentBits, SectorMask};
use crate::image::{Image, ImageError};
use crate::seeded_bugs::{Bug, is_planted};

/// Locks over blocks that are not resident: a guest's write and the landing of the same block take turns. Never taken for
/// a resident block, never held across a fetch.
const STRIPES: usize = 64;
/// Fetched bytes after which the kernel is asked to begin writing: saved up for a second they would be a sync during which every
/// write and many reads of the file system stand still.
const WRITEBACK_BYTES: u64 = 4 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) image: Arc<Image>,
    pub(super) geometry: Geometry,
    bits: Arc<ResidentBits>,
    residency: Mutex<Residency>,
    stripes: [Mutex<()>; STRIPES],
    landed_bytes: AtomicU64,
    life: Arc<Life>,
    /// Whether absent regions may hold something else than zeros: a block device, or what a crash left behind.
    may_hold_residue: bool,
    /// Writes into absent blocks that failed: a part of each may be in the file, and is residue there.
    failed_writes: AtomicU64,
}

impl Disk {
    pub(super) fn new(
        image: Arc<Image>,
        residency: Residency,
        geometry: Geometry,
        life: Arc<Life>,
        may_hold_residue: bool,
    ) -> Disk {
        Disk {
            life,
            landed_bytes: AtomicU64::new(0),
            failed_writes: AtomicU64::new(0),
            may_hold_residue: may_hold_residue || image.is_block_device(),
            image,
            geometry,
            bits: residency.bits(),
            residency: Mutex::new(residency),
            stripes: std::array::from_fn(|_| Mutex::new(())),
        }
    }

    pub(super) fn bits(&self) -> &ResidentBits {
        &self.bits
    }

    /// An error unless a block that was fetched is as long as it must be. A longer one would be written over what a guest wrote behind it.
    pub(super) fn check_len(&self, block: BlockIndex, got_bytes: usize) -> Result<(), VolumeError> {
        let expected_bytes = self.geometry.len_of(block);
        if got_bytes == expected_bytes as usize {
            return Ok(());
        }
        Err(VolumeError::BlockLength { volume: self.life.volume().clone(), block: block.0, got_bytes, expected_bytes })
    }

    pub(super) fn residency(&self) -> MutexGuard<'_, Residency> {
        self.residency.lock()
    }

    /// The blocks that a byte range touches.
    pub(super) fn blocks_of(&self, offset: u64, len_bytes: u64) -> Range<u64> {
        let size = self.geometry.block_size;
        size.index_of(offset).0..size.index_of(offset + len_bytes - 1).0 + 1
    }

    /// The part of a byte range that lies in one block, as bytes of that block.
    pub(super) fn within(&self, block: BlockIndex, offset: u64, len_bytes: u64) -> Range<u32> {
        let first = self.geometry.offset_of(block);
        let start = offset.max(first) - first;
        let end = (offset + len_bytes).min(first + u64::from(self.geometry.len_of(block))) - first;
        start as u32..end as u32
    }

    /// Whether these bytes of a block may be read from the file now. Once true, it stays true.
    pub(super) fn is_readable(&self, block: BlockIndex, bytes: Range<u32>) -> bool {
        let is_covered = |mask: &SectorMask| mask.covers(bytes) || is_planted(Bug::SectorMaskIgnored);
        self.bits.is_resident(block) || self.residency.lock().mask(block).is_some_and(is_covered)
    }

    /// Whether a write of these bytes can be remembered by sectors.
    pub(super) fn is_sector_aligned(&self, block: BlockIndex, bytes: &Range<u32>) -> bool {
        bytes.start.is_multiple_of(SECTOR_BYTES)
            && (bytes.end.is_multiple_of(SECTOR_BYTES) || bytes.end == self.geometry.len_of(block))
    }

    /// A guest's write within one block; aligned to sectors unless the block is resident.
    pub(super) fn write(&self, block: BlockIndex, at: u32, data: &[u8]) -> Result<(), ImageError> {
        let offset = self.geometry.offset_of(block) + u64::from(at);
        if self.bits.is_resident(block) {
            return self.image.write_at(offset, data);
        }
        let _turn = self.stripes[block.0 as usize % STRIPES].lock();
        self.image.write_at(offset, data).inspect_err(|_| {
            self.failed_writes.fetch_add(1, Ordering::AcqRel);
        })?;
        self.residency.lock().record_write(block, at..at + data.len() as u32);
        Ok(())
    }

    /// Makes whole blocks read as zeros, as a guest's write does.
    pub(super) fn zero_blocks(&self, blocks: Range<u64>, may_punch: bool) -> Result<(), ImageError> {
        let zeroed = self.zero_blocks_by(blocks, |offset, len_bytes| {
            self.image.write_zeroes(offset, len_bytes, may_punch).map(|()| true)
        });
        zeroed.map(drop)
    }

    /// As [`Disk::zero_blocks`], but only where that takes no writing. False, and nothing done, where it would.
    pub(super) fn zero_blocks_fast(&self, blocks: Range<u64>, may_punch: bool) -> Result<bool, ImageError> {
        self.zero_blocks_by(blocks, |offset, len_bytes| self.image.write_zeroes_fast(offset, len_bytes, may_punch))
    }

    fn zero_blocks_by(
        &self,
        blocks: Range<u64>,
        zero: impl FnOnce(u64, u64) -> Result<bool, ImageError>,
    ) -> Result<bool, ImageError> {
        if blocks.is_empty() {
            return Ok(true);
        }
        let offset = self.geometry.offset_of(BlockIndex(blocks.start));
        let end = self.geometry.offset_of(BlockIndex(blocks.end)).min(self.geometry.size_bytes);
        let is_resident = self.bits.are_resident(blocks.clone());
        // In the order of their numbers, as every other taker of several would; there is none.
        let mut stripes: Vec<usize> = (blocks.start..blocks.end.min(blocks.start + STRIPES as u64))
            .map(|block| block as usize % STRIPES)
            .collect();
        stripes.sort_unstable();
        let _turns: Vec<_> = if is_resident {
            Vec::new()
        } else {
            stripes.into_iter().map(|stripe| self.stripes[stripe].lock()).collect()
        };
        if !zero(offset, end - offset)? {
            return Ok(false);
        }
        if !is_resident {
            let mut residency = self.residency.lock();
            for block in blocks {
                let block = BlockIndex(block);
                residency.record_write(block, 0..self.geometry.len_of(block));
            }
        }
        Ok(true)
    }

    /// Puts a verified block under what the guest wrote meanwhile. Returns whether it was still needed. Of a volume that is over the
    /// file is not touched, nor by a block of another length.
    pub(super) fn land(&self, block: BlockIndex, bytes: &[u8]) -> Result<bool, VolumeError> {
        let _pass = self.life.enter()?;
        self.check_len(block, bytes.len())?;
        if self.bits.is_resident(block) {
            return Ok(false);
        }
        let _turn = self.stripes[block.0 as usize % STRIPES].lock();
        let offset = self.geometry.offset_of(block);
        // Not one expression with the match: the residency lock must not be held while the file is written.
        let merge = self.residency.lock().merge(block);
        if is_planted(Bug::PresenceBeforeData) {
            self.residency.lock().record_fetched(block);
        }
        match merge {
            Merge::Ranges(_) if is_planted(Bug::FetchedOverGuests) => self.image.write_at(offset, bytes)?,
            Merge::Drop => return Ok(false),
            Merge::Whole => self.image.write_at(offset, bytes)?,
            Merge::Ranges(ranges) => {
                for range in ranges {
                    let part = &bytes[range.start as usize..range.end as usize];
                    self.image.write_at(offset + u64::from(range.start), part)?;
                }
            }
        }
        self.residency.lock().record_fetched(block);
        let before = self.landed_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if before / WRITEBACK_BYTES != (before + bytes.len() as u64) / WRITEBACK_BYTES {
            self.image.begin_writeback();
        }
        Ok(true)
    }

    /// As [`Disk::land`] for blocks, in order, that are known to be zero: nothing is written where the file has a hole anyway.
    /// Returns how many bytes of blocks were still needed.
    pub(super) fn land_zeros(&self, blocks: &[BlockIndex]) -> Result<u64, VolumeError> {
        let _pass = self.life.enter()?;
        let mut landed_bytes = 0;
        // One look at all of them spares a look at each. What a guest writes into one of them from here on is not residue, unless it fails.
        let failed_writes = self.failed_writes.load(Ordering::Acquire);
        let may_hold_residue = match (blocks.first(), blocks.last()) {
            (Some(first), Some(last)) if self.may_hold_residue || failed_writes > 0 => {
                let end = self.geometry.offset_of(*last) + u64::from(self.geometry.len_of(*last));
                !self.image.is_hole(self.geometry.offset_of(*first)..end)?
            }
            _ => false,
        };
        for block in blocks {
            if self.bits.is_resident(*block) {
                continue;
            }
            let _turn = self.stripes[block.0 as usize % STRIPES].lock();
            let offset = self.geometry.offset_of(*block);
            let len = self.geometry.len_of(*block);
            let merge = self.residency.lock().merge(*block);
            let ranges = match merge {
                Merge::Drop => continue,
                Merge::Whole => std::iter::once(0..len).collect(),
                Merge::Ranges(ranges) => ranges,
            };
            let may_hold_residue = may_hold_residue || self.failed_writes.load(Ordering::Acquire) != failed_writes;
            if may_hold_residue && !is_planted(Bug::ResidueUnderZeros) {
                for range in ranges {
                    let start = offset + u64::from(range.start);
                    let len_bytes = u64::from(range.end - range.start);
                    if !self.image.is_hole(start..start + len_bytes)? {
                        self.image.write_zeroes(start, len_bytes, true)?;
                    }
                }
            }
            self.residency.lock().record_fetched(*block);
            landed_bytes += u64::from(len);
        }
        Ok(landed_bytes)
    }

    /// From now on the file is right as it is: what is on its way into an absent block comes too late. Returns when what has begun has ended.
    pub(super) fn give_up_absent(&self) {
        let (mut from, blocks) = (0, self.geometry.blocks());
        while let Some(block) = self.bits.first_absent(from..blocks) {
            // A landing looks and writes in one turn: it has either ended by now, or finds the block resident.
            let _turn = self.stripes[block.0 as usize % STRIPES].lock();
            self.residency.lock().record_fetched(block);
            from = block.0 + 1;
        }
    }

    /// Makes the file hold zeros wherever an absent block has nothing of a guest's. The block stays absent. Returns its length.
    pub(super) fn zero_absent(&self, block: BlockIndex) -> Result<u64, VolumeError> {
        let _pass = self.life.enter()?;
        let _turn = self.stripes[block.0 as usize % STRIPES].lock();
        let (offset, len) = (self.geometry.offset_of(block), self.geometry.len_of(block));
        let merge = self.residency.lock().merge(block);
        let ranges = match merge {
            Merge::Drop => return Ok(0),
            Merge::Whole => std::iter::once(0..len).collect(),
            Merge::Ranges(ranges) => ranges,
        };
        for range in ranges {
            let (start, len_bytes) = (offset + u64::from(range.start), u64::from(range.end - range.start));
            if !self.image.is_hole(start..start + len_bytes)? {
                self.image.write_zeroes(start, len_bytes, true)?;
            }
        }
        Ok(u64::from(len))
    }

    /// Fills `out` with these bytes of a block whose fetched content is `base` (None: zeros), under what the guest wrote.
    pub(super) fn read_over(
        &self,
        block: BlockIndex,
        bytes: Range<u32>,
        base: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<(), ImageError> {
        let offset = self.geometry.offset_of(block);
        if self.bits.is_resident(block) {
            return self.image.read_at(offset + u64::from(bytes.start), out);
        }
        match base {
            Some(base) => out.copy_from_slice(&base[bytes.start as usize..bytes.end as usize]),
            None => out.fill(0),
        }
        let len = self.geometry.len_of(block);
        // Bits and masks change together under this lock. A block without a mask that is resident by now has landed since
        // the look above, and what the guest wrote before is in the file only.
        let valid = {
            let residency = self.residency.lock();
            if self.bits.is_resident(block) { None } else { Some(residency.mask(block).map(|mask| mask.valid(len))) }
        };
        let Some(valid) = valid else { return self.image.read_at(offset + u64::from(bytes.start), out) };
        for range in valid.unwrap_or_default() {
            let start = range.start.max(bytes.start);
            let end = range.end.min(bytes.end);
            if start < end {
                let part = &mut out[(start - bytes.start) as usize..(end - bytes.start) as usize];
                self.image.read_at(offset + u64::from(start), part)?;
            }
        }
        // What the guest has written since is under way at the same time as this read: its old and its new bytes are right.
        Ok(())
    }
}

#[cfg(test)]
mod tests;
