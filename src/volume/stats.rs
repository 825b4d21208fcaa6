//! What a volume counts. Must not know who looks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;

use crate::core::ids::Class;
use crate::fetch::{Block, Origin};

/// Bytes that guests read, by where they came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Reads {
    pub resident_bytes: u64,
    pub zero_bytes: u64,
    pub store_bytes: u64,
    pub wire_bytes: u64,
    pub partial_bytes: u64,
}

/// Bytes that arrived, by how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Moved {
    pub zero_bytes: u64,
    pub store_bytes: u64,
    pub joined_bytes: u64,
    pub wire_raw_bytes: u64,
    /// As sent, by class: demand, readahead, bulk.
    pub wire_bytes: [u64; 3],
}

/// All counters of a volume at one moment.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Snapshot {
    pub total_blocks: u64,
    /// Partly written ones included.
    pub absent_blocks: u64,
    pub written_blocks: u64,
    pub partial_blocks: u64,
    pub reads: Reads,
    pub moved: Moved,
    /// Reads that had to fetch: count, and p50, p99, max in milliseconds.
    pub demand_count: u64,
    pub demand_ms: [f64; 3],
}

impl Snapshot {
    /// Of a volume of which nothing can be told: nothing of it is here.
    pub fn unknown(total_blocks: u64) -> Snapshot {
        Snapshot {
            total_blocks,
            absent_blocks: total_blocks,
            written_blocks: 0,
            partial_blocks: 0,
            reads: Reads::default(),
            moved: Moved::default(),
            demand_count: 0,
            demand_ms: [0.0; 3],
        }
    }
}

#[derive(Debug)]
pub(super) struct Stats {
    resident_bytes: AtomicU64,
    counts: Mutex<(Reads, Moved)>,
    demand_us: Mutex<Histogram<u64>>,
}

impl Default for Stats {
    fn default() -> Stats {
        // Two significant digits up to ten minutes: 10 KiB.
        let histogram = Histogram::new_with_bounds(1, 600_000_000, 2).expect("constant bounds that fit");
        Stats { resident_bytes: AtomicU64::new(0), counts: Mutex::default(), demand_us: Mutex::new(histogram) }
    }
}

impl Stats {
    pub(super) fn count_resident(&self, bytes: u64) {
        self.resident_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn count_reads(&self, count: impl FnOnce(&mut Reads)) {
        count(&mut self.counts.lock().0);
    }

    pub(super) fn count_zero_landed(&self, bytes: u64) {
        self.counts.lock().1.zero_bytes += bytes;
    }

    /// A block came by the wire: it has cost its bytes whether or not it is still needed.
    pub(super) fn count_arrived(&self, block: &Block) {
        if block.origin == Origin::Wire {
            let mut counts = self.counts.lock();
            counts.1.wire_raw_bytes += block.bytes.len() as u64;
            counts.1.wire_bytes[block.class as usize] += block.wire_bytes;
        }
    }

    /// A block landed that was still needed.
    pub(super) fn count_landed(&self, block: &Block) {
        let mut counts = self.counts.lock();
        let bytes = block.bytes.len() as u64;
        match block.origin {
            Origin::Zero => counts.1.zero_bytes += bytes,
            Origin::Store => counts.1.store_bytes += bytes,
            Origin::Joined => counts.1.joined_bytes += bytes,
            Origin::Wire | Origin::Shared => {}
        }
    }

    pub(super) fn count_demand(&self, took: Duration) {
        self.demand_us.lock().saturating_record(took.as_micros() as u64);
    }

    pub(super) fn snapshot(&self, total: u64, absent: u64, written: u64, partial: u64) -> Snapshot {
        let (mut reads, moved) = *self.counts.lock();
        reads.resident_bytes += self.resident_bytes.load(Ordering::Relaxed);
        let demand = self.demand_us.lock();
        let ms = |us: u64| us as f64 / 1000.0;
        let demand_ms = if demand.is_empty() {
            [0.0; 3]
        } else {
            [ms(demand.value_at_quantile(0.5)), ms(demand.value_at_quantile(0.99)), ms(demand.max())]
        };
        Snapshot {
            total_blocks: total,
            absent_blocks: absent,
            written_blocks: written,
            partial_blocks: partial,
            reads,
            moved,
            demand_count: demand.len(),
            demand_ms,
        }
    }
}

/// The classes in the order of the counters.
const _: () = assert!(Class::Demand as usize == 0 && Class::Readahead as usize == 1 && Class::Bulk as usize == 2);
