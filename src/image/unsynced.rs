//! Which parts of an image were written since the last sync. Some file systems (OpenZFS did) tell of data only once it is written back: until
//! then it passes for a hole. Must not know files.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The smallest part that is kept account of.
const LEAST_PART_BYTES: u64 = 64 << 10;
/// The most parts: a sync looks at all of them.
const MOST_PARTS: u64 = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Unsynced {
    part_bytes: u64,
    /// A bit for each part that was written since the last sync began.
    fresh: Box<[AtomicU64]>,
    /// A bit for each part that was written before that, and is not known to be synced.
    syncing: Box<[AtomicU64]>,
    /// What an earlier process wrote is not known.
    is_unknown: AtomicBool,
}

impl Unsynced {
    pub(super) fn new(size_bytes: u64, is_unknown: bool) -> Unsynced {
        let part_bytes = size_bytes.div_ceil(MOST_PARTS).next_power_of_two().max(LEAST_PART_BYTES);
        let words = size_bytes.div_ceil(part_bytes).div_ceil(64);
        let none = || (0..words).map(|_| AtomicU64::new(0)).collect();
        Unsynced { part_bytes, fresh: none(), syncing: none(), is_unknown: AtomicBool::new(is_unknown) }
    }

    pub(super) fn is_unknown(&self) -> bool {
        self.is_unknown.load(Ordering::Acquire)
    }

    /// A write has ended, well or not. Before it is acknowledged.
    pub(super) fn wrote(&self, offset: u64, len_bytes: u64) {
        if len_bytes == 0 {
            return;
        }
        for part in offset / self.part_bytes..=(offset + len_bytes - 1) / self.part_bytes {
            let Some(word) = self.fresh.get((part / 64) as usize) else { return };
            let bit = 1 << (part % 64);
            // A sync that takes the bit away after this look began after the write.
            if word.load(Ordering::Acquire) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    /// Runs a sync. One at a time.
    pub(super) fn sync<E>(&self, sync: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        for (fresh, syncing) in self.fresh.iter().zip(&self.syncing) {
            // First there, then not here: whoever looks meanwhile finds it.
            let written = fresh.load(Ordering::Acquire);
            if written != 0 {
                syncing.fetch_or(written, Ordering::AcqRel);
                fresh.fetch_and(!written, Ordering::AcqRel);
            }
        }
        sync()?;
        self.syncing.iter().for_each(|word| word.store(0, Ordering::Release));
        self.is_unknown.store(false, Ordering::Release);
        Ok(())
    }

    /// The first range that ends behind `from` (cut to begin there) of what is not known to be synced, one part at most.
    pub(super) fn next(&self, from: u64) -> Option<Range<u64>> {
        let first = from / self.part_bytes;
        for index in (first / 64) as usize..self.fresh.len() {
            let mut word = self.fresh[index].load(Ordering::Acquire) | self.syncing[index].load(Ordering::Acquire);
            if index as u64 == first / 64 {
                word &= u64::MAX << (first % 64);
            }
            if word != 0 {
                let start = (index as u64 * 64 + u64::from(word.trailing_zeros())) * self.part_bytes;
                return Some(start.max(from)..start + self.part_bytes);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u64 = LEAST_PART_BYTES;

    #[test]
    fn what_was_written_counts_until_a_sync_that_began_later_has_succeeded() {
        let unsynced = Unsynced::new(200 * PART + 5, true);
        assert!(unsynced.is_unknown());
        assert_eq!(unsynced.next(0), None);
        unsynced.wrote(70 * PART + 9, 2);
        unsynced.wrote(200 * PART, 5);
        unsynced.wrote(3 * PART - 1, 2);
        assert_eq!(unsynced.next(0), Some(2 * PART..3 * PART));
        assert_eq!(unsynced.next(2 * PART + 7), Some(2 * PART + 7..3 * PART));
        assert_eq!(unsynced.next(3 * PART), Some(3 * PART..4 * PART));
        assert_eq!(unsynced.next(4 * PART), Some(70 * PART..71 * PART));
        assert_eq!(unsynced.next(71 * PART), Some(200 * PART..201 * PART));
        unsynced.sync(|| Err(())).expect_err("fails");
        assert_eq!(unsynced.next(0), Some(2 * PART..3 * PART), "nobody knows");
        unsynced
            .sync(|| {
                assert_eq!(unsynced.next(0), Some(2 * PART..3 * PART), "not yet");
                unsynced.wrote(5 * PART, 1);
                Ok::<(), ()>(())
            })
            .expect("syncs");
        assert_eq!(unsynced.next(0), Some(5 * PART..6 * PART), "it was written while the sync ran");
        assert!(!unsynced.is_unknown());
        unsynced.sync(|| Ok::<(), ()>(())).expect("syncs");
        assert_eq!(unsynced.next(0), None);
    }

    #[test]
    fn an_account_of_a_large_image_is_small() {
        let unsynced = Unsynced::new(1 << 40, false);
        assert_eq!((unsynced.part_bytes, unsynced.fresh.len()), (16 << 20, 1024));
        unsynced.wrote((1 << 40) - 1, 1);
        assert_eq!(unsynced.next(0), Some((1 << 40) - (16 << 20)..1 << 40));
        assert_eq!(Unsynced::new(0, false).next(0), None);
    }
}
