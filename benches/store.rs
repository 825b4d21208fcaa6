//! The content store as it is set up, against RocksDB as it comes, in the same run: what counts is the ratio.
//!
//! Both keep the same frames (64 KiB blocks that do not shrink) under the same ids. `get` is timed with everything in the
//! page cache; `verified` adds what a caller pays for checking ids. `put` ends when the frames are handed over: flushes go
//! on in the background, and slow down what follows as they would in a daemon. What a put costs in the end (processor
//! time, bytes written) is printed first: on a busy machine it is steadier than time. `cargo bench --bench store`.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use blockferry::core::frame::Frame;
use blockferry::core::ids::BlockId;
use blockferry::store::{RocksStore, Store, StoreOptions};
use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use nix::sys::resource::{UsageWho, getrusage};
use rocksdb::{DB, Options, WaitForCompactOptions, WriteBatch};

const BLOCK_BYTES: usize = 64 << 10;
/// 256 MiB: several memtables of either.
const BLOCKS: u64 = 4096;
const BATCH: usize = 32;

fn block(number: u64) -> (BlockId, Frame) {
    let mut bytes = vec![0; BLOCK_BYTES];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    let raw = Bytes::from(bytes);
    (BlockId::of(&raw), Frame::encode(&raw, 1))
}

fn absent(number: u64) -> BlockId {
    BlockId(*blake3::hash(&(u64::MAX - number).to_le_bytes()).as_bytes())
}

/// RocksDB's defaults under the few calls that are compared.
struct Plain(DB);

impl Plain {
    fn open(dir: &Path) -> Plain {
        let mut options = Options::default();
        options.create_if_missing(true);
        Plain(DB::open(&options, dir).expect("a database"))
    }

    fn put(&self, blocks: &[(BlockId, Frame)]) {
        let mut batch = WriteBatch::default();
        for (id, frame) in blocks {
            batch.put(id.0, frame.to_bytes());
        }
        self.0.write(batch).expect("put");
    }

    fn get(&self, ids: &[BlockId]) -> Vec<Option<Frame>> {
        let frame = |value: Vec<u8>| Frame::from_bytes(&value.into()).expect("a frame");
        let values = self.0.multi_get(ids.iter().map(|id| id.0));
        values.into_iter().map(|value| value.expect("get").map(frame)).collect()
    }
}

/// Processor seconds of this process, and bytes that it has sent towards the disk.
fn spent() -> (f64, u64) {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("getrusage");
    let seconds = [usage.user_time(), usage.system_time()].map(|t| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6);
    let io = std::fs::read_to_string("/proc/self/io").expect("/proc/self/io");
    let written = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).and_then(|bytes| bytes.parse().ok());
    (seconds.iter().sum(), written.unwrap_or(0))
}

/// From the first put until nothing is left to do in the background.
fn print_cost(name: &str, dir: &Path, run: impl FnOnce(&Path, &dyn Fn(&mut dyn FnMut(&[(BlockId, Frame)])))) {
    let blocks: Vec<_> = (1 << 30..(1 << 30) + BLOCKS).map(block).collect();
    let (raw_bytes, (seconds, written), begin) = (blocks.len() * BLOCK_BYTES, spent(), Instant::now());
    run(dir, &|put| blocks.chunks(BATCH).for_each(put));
    let (now_seconds, now_written) = spent();
    println!(
        "put of {} MiB, {name}: {:.0} MB/s, {:.2} CPU-s/GiB, write amplification {:.2}",
        raw_bytes >> 20,
        raw_bytes as f64 / begin.elapsed().as_secs_f64() / 1e6,
        (now_seconds - seconds) * (1u64 << 30) as f64 / raw_bytes as f64,
        (now_written - written) as f64 / raw_bytes as f64,
    );
}

/// The time until the disk has the rest is the disk's: the rate limit is off.
fn unlimited() -> StoreOptions {
    StoreOptions { write_bytes_per_s: None, ..StoreOptions::default() }
}

fn cost(_: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder");
    print_cost("ours", &dir.path().join("ours"), |dir, blocks| {
        let store = RocksStore::open(dir, unlimited()).expect("a store");
        blocks(&mut |blocks| store.put(blocks).expect("put"));
        store.flush().expect("flush");
    });
    print_cost("defaults", &dir.path().join("plain"), |dir, blocks| {
        let plain = Plain::open(dir);
        blocks(&mut |blocks| plain.put(blocks));
        plain.0.flush().expect("flush");
        plain.0.wait_for_compact(&WaitForCompactOptions::default()).expect("wait");
    });
}

fn store(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder");
    let ours = RocksStore::open(&dir.path().join("ours"), StoreOptions::default()).expect("a store");
    let plain = Plain::open(&dir.path().join("plain"));
    let ids: Vec<BlockId> = (0..BLOCKS)
        .step_by(BATCH)
        .flat_map(|first| {
            let blocks: Vec<_> = (first..first + BATCH as u64).map(block).collect();
            ours.put(&blocks).expect("put");
            plain.put(&blocks);
            blocks.into_iter().map(|(id, _)| id).collect::<Vec<_>>()
        })
        .collect();
    ours.flush().expect("flush");
    plain.0.flush().expect("flush");
    // In no order, and each time others.
    let picks = |seed: u64, count: usize| -> Vec<usize> {
        (0..count as u64).map(|i| ((seed * 2_654_435_761 + i * 40_503) % BLOCKS) as usize).collect()
    };
    let misses = |seed: u64, count: usize| (0..count as u64).map(|i| absent(seed * 64 + i)).collect::<Vec<_>>();

    for (batch, name) in [(1, "1"), (BATCH, "32")] {
        let mut group = criterion.benchmark_group(format!("get hit, {name} at once"));
        group.throughput(Throughput::Bytes((batch * BLOCK_BYTES) as u64));
        let mut seed = 0;
        let mut next = || {
            seed += 1;
            picks(seed, batch).into_iter().map(|pick| ids[pick]).collect::<Vec<_>>()
        };
        group.bench_function("ours", |bencher| {
            bencher.iter_batched(&mut next, |ids| black_box(ours.get_frames(&ids).expect("get")), BatchSize::SmallInput)
        });
        group.bench_function("ours, verified", |bencher| {
            bencher.iter_batched(&mut next, |ids| black_box(ours.get(&ids).expect("get")), BatchSize::SmallInput)
        });
        group.bench_function("defaults", |bencher| {
            bencher.iter_batched(&mut next, |ids| black_box(plain.get(&ids)), BatchSize::SmallInput)
        });
        group.finish();

        let mut group = criterion.benchmark_group(format!("get miss, {name} at once"));
        group.throughput(Throughput::Elements(batch as u64));
        let mut seed = 0;
        let mut next = || {
            seed += 1;
            misses(seed, batch)
        };
        group.bench_function("ours", |bencher| {
            bencher.iter_batched(&mut next, |ids| black_box(ours.get_frames(&ids).expect("get")), BatchSize::SmallInput)
        });
        group.bench_function("defaults", |bencher| {
            bencher.iter_batched(&mut next, |ids| black_box(plain.get(&ids)), BatchSize::SmallInput)
        });
        group.finish();
    }

    let mut group = criterion.benchmark_group("contains hit, 32 at once");
    group.throughput(Throughput::Elements(BATCH as u64));
    let mut seed = 0;
    group.bench_function("ours", |bencher| {
        bencher.iter_batched(
            || {
                seed += 1;
                picks(seed, BATCH).into_iter().map(|pick| ids[pick]).collect::<Vec<_>>()
            },
            |ids| black_box(ours.contains(&ids).expect("contains")),
            BatchSize::SmallInput,
        )
    });
    group.finish();

    let mut group = criterion.benchmark_group("put, 32 at once");
    group.throughput(Throughput::Bytes((BATCH * BLOCK_BYTES) as u64));
    group.measurement_time(Duration::from_secs(8));
    let ours = RocksStore::open(&dir.path().join("ours-put"), unlimited()).expect("a store");
    let plain = Plain::open(&dir.path().join("plain-put"));
    let mut number = 1 << 40;
    let mut next = || {
        number += BATCH as u64;
        (number..number + BATCH as u64).map(block).collect::<Vec<_>>()
    };
    group.bench_function("ours", |bencher| {
        bencher.iter_batched(&mut next, |blocks| ours.put(&blocks).expect("put"), BatchSize::PerIteration)
    });
    ours.flush().expect("flush");
    group.bench_function("defaults", |bencher| {
        bencher.iter_batched(&mut next, |blocks| plain.put(&blocks), BatchSize::PerIteration)
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
    targets = cost, store
}
criterion_main!(benches);
