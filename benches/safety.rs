//! What safety costs at the volume, without network or NBD: 4 KiB written and flushed on volumes in relocation and on
//! complete ones, and on plain files. What counts is the ratios, which are printed in the end.
//!
//! Whichever of them criterion measures, all of them get short turns, one after the other: a disk that has a slow second is slow for
//! all. Some write where the file has its room already, for it was filled before, so that allocation is not measured; the others write to
//! blocks that nobody has written before, as absent ones are. Each is compared with those that do as it does. A plain file
//! with a row of RocksDB's synced beside it is the limit of a write to an absent block: the bytes, and the note that they are
//! there, both durable.
//!
//! Files lie in the target directory, or in `BENCH_DIR`; never on a tmpfs: a sync does nothing there, so that what is
//! added to it would pass for everything. `cargo bench --bench safety`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockferry::core::ids::{Incarnation, Name, Nonce};
use blockferry::core::manifest::Geometry;
use blockferry::core::residency::Presence;
use blockferry::core::scheduler::Limits;
use blockferry::core::wire::Refusal;
use blockferry::fetch::{Expected, Fetch, PeerKey, Stranger};
use blockferry::handover::{Answer, Question};
use blockferry::image::{Image, Overwrite};
use blockferry::source::{Catalog, Hasher, Manifest, Offered, Refused, SourceOptions, SourceVolume, serve_link};
use blockferry::store::{MemoryState, MemoryStore, State, StateDb};
use blockferry::transport::{Link, memory};
use blockferry::volume::{Relocation, Volume, VolumeParts};
use blockferry::workers::Workers;
use bytes::Bytes;
use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use futures::future::BoxFuture;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use rocksdb::{DB, Options, WriteOptions};
use tokio::runtime::Runtime;

const PAGE_BYTES: usize = 4096;
const BLOCK_BYTES: u64 = 64 << 10;
/// Of what has its room already.
const FILLED_BYTES: u64 = 64 << 20;
/// Of what has not: holes cost nothing. More blocks than can be synced one by one in the time.
const SPARSE_BYTES: u64 = 32 << 30;
/// Writes of a turn that are counted, at most.
const TURN: u64 = 16;
/// Writes in front of them that are not: the first sync also waits for what the one before left to do.
const WARM_UP: u64 = 2;
/// What a chunk of 1,024 blocks takes in the state database, if few of them were written in part.
const ROW_BYTES: usize = 300;

/// What is written to.
enum Disk {
    Volume(Arc<Volume>),
    Plain(File),
    PlainAndRow(File, DB),
}

/// Whether the bytes that are written have their room in the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Filled,
    /// Each write goes to a block that was never written.
    Hole,
}

struct Target {
    name: &'static str,
    disk: Disk,
    room: Room,
    writes: u64,
    /// Of every write that was counted, in microseconds.
    times: Vec<f64>,
    /// The mean of each full turn.
    turns: Vec<f64>,
}

impl Target {
    fn new(name: &'static str, disk: Disk, room: Room) -> Target {
        Target { name, disk, room, writes: 0, times: Vec::new(), turns: Vec::new() }
    }

    /// All over the disk, no place twice before all others were written.
    fn next_offset(&mut self) -> u64 {
        let (places, bytes) = match self.room {
            Room::Filled => (FILLED_BYTES / PAGE_BYTES as u64, PAGE_BYTES as u64),
            Room::Hole => (SPARSE_BYTES / BLOCK_BYTES, BLOCK_BYTES),
        };
        assert!(self.room == Room::Filled || self.writes < places, "{}: no block is left unwritten", self.name);
        self.writes += 1;
        // The number of places is a power of two, and the factor is odd.
        (self.writes * 0x9e37_79b1) % places * bytes
    }

    fn write_and_flush(&mut self, runtime: &Runtime, page: &[u8]) -> Duration {
        let offset = self.next_offset();
        let begun = Instant::now();
        match &self.disk {
            // As the NBD server does for a client that waits for its answer: on its own thread where that is all it takes.
            Disk::Volume(volume) => {
                let later = || runtime.block_on(volume.write(offset, Bytes::copy_from_slice(page), false));
                volume.write_here(offset, page, false).unwrap_or_else(later).expect("writes");
                volume.flush_here().unwrap_or_else(|| runtime.block_on(volume.flush())).expect("flushes");
            }
            Disk::Plain(file) => {
                file.write_all_at(page, offset).expect("writes");
                file.sync_data().expect("syncs");
            }
            Disk::PlainAndRow(file, db) => {
                file.write_all_at(page, offset).expect("writes");
                file.sync_data().expect("syncs");
                let mut durably = WriteOptions::default();
                durably.set_sync(true);
                let chunk = offset / BLOCK_BYTES / 1024;
                db.put_opt(chunk.to_be_bytes(), &page[..ROW_BYTES], &durably).expect("puts");
            }
        }
        begun.elapsed()
    }

    fn turn(&mut self, runtime: &Runtime, writes: u64) -> Duration {
        let mut page = [0; PAGE_BYTES];
        let mut taken = Duration::ZERO;
        for nth in 0..WARM_UP + writes {
            page[..8].copy_from_slice(&self.writes.to_le_bytes());
            let time = self.write_and_flush(runtime, &page);
            if nth >= WARM_UP {
                taken += time;
                self.times.push(time.as_secs_f64() * 1e6);
            }
        }
        if writes == TURN {
            self.turns.push(taken.as_secs_f64() * 1e6 / TURN as f64);
        }
        taken
    }

    /// The middle of the turns' ratios of means. Not of medians: a sync takes one of two times here and there, a fifth of a
    /// millisecond or a tick of the kernel's clock.
    fn ratio(&self, other: &Target) -> f64 {
        middle(self.turns.iter().zip(&other.turns).map(|(mine, its)| mine / its).collect())
    }
}

fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Everybody in turns; the time of the one that is measured.
fn in_turns(targets: &mut [Target], runtime: &Runtime, measured: usize, writes: u64) -> Duration {
    let mut taken = Duration::ZERO;
    for (nth, begin) in (0..writes).step_by(TURN as usize).enumerate() {
        for place in 0..targets.len() {
            // Another one begins each time.
            let place = (place + nth) % targets.len();
            let time = targets[place].turn(runtime, TURN.min(writes - begin));
            if place == measured {
                taken += time;
            }
        }
    }
    taken
}

/// What volumes need, as a site has it: one state database, threads, a runtime.
struct Site<'a> {
    dir: &'a Path,
    state: Arc<dyn State>,
    workers: Workers,
    runtime: &'a Runtime,
}

impl Site<'_> {
    fn parts(&self, name: &str, image: Image) -> VolumeParts {
        let geometry = Geometry::new(image.size_bytes(), BLOCK_BYTES).expect("a geometry");
        let state = Arc::clone(&self.state);
        let workers = self.workers.clone();
        let mut incarnation = [0; 16];
        name.bytes().enumerate().for_each(|(at, byte)| incarnation[at % 16] ^= byte);
        let (name, incarnation) = (named(name), Incarnation(incarnation));
        VolumeParts { name, incarnation, image: Arc::new(image), geometry, state, workers, is_owner: true }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.raw"))
    }

    fn filled(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fill(&path, FILLED_BYTES);
        path
    }

    fn sparse(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let made = File::create(&path).and_then(|file| file.set_len(SPARSE_BYTES));
        made.expect("a file with holes");
        path
    }

    fn complete(&self, name: &str, path: &Path) -> Disk {
        Disk::Volume(Arc::new(Volume::complete(self.parts(name, Image::open_write(path).expect("opens")))))
    }

    fn plain(&self, path: &Path) -> Disk {
        Disk::Plain(File::options().write(true).open(path).expect("opens"))
    }

    fn plain_and_row(&self, path: &Path) -> Disk {
        let mut options = Options::default();
        options.create_if_missing(true);
        let db = DB::open(&options, path.with_extension("rows")).expect("a database");
        Disk::PlainAndRow(File::options().write(true).open(path).expect("opens"), db)
    }

    /// Nobody is there to fetch from: writes of whole sectors do not ask.
    fn absent(&self, name: &str) -> Disk {
        let image = Image::create(&self.path(name), SPARSE_BYTES, Overwrite::OnlyBlank).expect("creates");
        Disk::Volume(Arc::new(Volume::relocating(self.parts(name, image), true).expect("a volume")))
    }

    /// The blocks that are written have been fetched; as many again have not.
    fn arrived(&self, name: &str) -> Disk {
        let parts =
            self.parts(name, Image::create(&self.path(name), 2 * FILLED_BYTES, Overwrite::OnlyBlank).expect("creates"));
        let geometry = parts.geometry;
        let source = OneVolume::filled(&self.path("source"), geometry);
        let fetch = Fetch::start(Limits::default(), Arc::new(MemoryStore::new(0))).expect("threads");
        let (links, new_links) = tokio::sync::mpsc::channel(1);
        fetch.add_peer(
            PeerKey(0),
            named("source"),
            named("destination"),
            new_links,
            self.workers.clone(),
            Arc::new(Stranger),
        );
        let (here, there) = memory::pair(named("destination"), named("source"));
        let options = SourceOptions { site: named("source"), zstd_level: None };
        let hasher = Hasher::start().expect("a thread");
        self.runtime.spawn(serve_link(there, Arc::new(source), hasher, self.workers.clone(), options));
        let volume = Volume::relocating(parts, true).expect("a volume");
        let key = fetch.attach(PeerKey(0), named(name), Expected { geometry, generation: 1 });
        volume.set_relocation(Arc::new(Relocation::new(fetch, key, geometry, Some(Duration::from_secs(60)))));
        self.runtime.block_on(async {
            assert!(links.send(here).await.is_ok(), "the fetcher follows");
            for at in (0..FILLED_BYTES).step_by(1 << 20) {
                volume.read(at, 1 << 20).await.expect("reads");
            }
            // Who reads has its answer before the file has the block.
            let all_present = [(FILLED_BYTES, Presence::Present)];
            while volume.presence(0, FILLED_BYTES, 2).await.expect("looks") != all_present {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            volume.flush().await.expect("flushes");
        });
        Disk::Volume(Arc::new(volume))
    }
}

/// A source of one volume, which nobody takes over.
struct OneVolume(Arc<SourceVolume>);

impl OneVolume {
    /// Its first blocks hold data, the others none.
    fn filled(path: &Path, geometry: Geometry) -> OneVolume {
        fill(path, FILLED_BYTES);
        let longer = File::options().write(true).open(path).and_then(|file| file.set_len(geometry.size_bytes));
        longer.expect("grows");
        let image = Arc::new(Image::open_read(path).expect("opens"));
        let (name, state) = (named("source"), Arc::new(MemoryState::new()));
        let manifest = Manifest::open(name.clone(), Incarnation([1; 16]), Arc::clone(&image), geometry, state, false)
            .expect("a manifest");
        OneVolume(Arc::new(SourceVolume { name, image, geometry, manifest: Arc::new(manifest), generation: 1 }))
    }
}

impl Catalog for OneVolume {
    fn open(&self, _: &Name, _: &Name) -> Result<Offered, Refused> {
        Ok(Offered { opening: self.0.open(), epoch: 1, is_read_only: false })
    }

    fn ask(&self, _: &Name, _: &Name, question: Question) -> BoxFuture<'static, Answer> {
        Box::pin(std::future::ready(Answer::Done(question.epoch())))
    }

    fn greet(&self, _: &Arc<dyn Link>, _: Nonce, _: Nonce) -> Result<(), (Refusal, String)> {
        Ok(())
    }
}

fn named(text: &str) -> Name {
    text.parse().expect("a name")
}

/// Random bytes, a block at a time: the size of a write shows in every later one (see [`Image::write_at`]).
fn fill(path: &Path, size_bytes: u64) {
    let file = File::create(path).expect("a file");
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    let mut random = blake3::Hasher::new().update(path.as_os_str().as_encoded_bytes()).finalize_xof();
    for at in (0..size_bytes).step_by(bytes.len()) {
        random.fill(&mut bytes);
        file.write_all_at(&bytes, at).expect("writes");
    }
    file.sync_all().expect("syncs");
}

/// What a target is compared with: those that have, or have not, their room in the file as it does.
fn compared(targets: &[Target], room: Room) -> [&Target; 3] {
    let mut alike = targets.iter().filter(|target| target.room == room);
    std::array::from_fn(|_| alike.next().expect("the table begins with them"))
}

fn print(targets: &[Target]) {
    if targets.iter().any(|target| target.turns.is_empty()) {
        println!("4 KiB write and flush: too few writes for ratios");
        return;
    }
    println!("4 KiB write and flush                  mean us  median us  to complete  to plain  to plain and row");
    for target in targets {
        let [plain, row, complete] = compared(targets, target.room).map(|other| target.ratio(other));
        let mean = target.times.iter().sum::<f64>() / target.times.len() as f64;
        let median = middle(target.times.clone());
        let name = target.name;
        println!("{name:<36}{mean:>10.0}{median:>11.0}{complete:>13.2}{plain:>10.2}{row:>18.2}");
    }
    println!("ratios: the middle of {} turns; filled against filled, holes against holes", targets[0].turns.len());
}

fn safety(criterion: &mut Criterion) {
    let home = std::env::var_os("BENCH_DIR").map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    std::fs::create_dir_all(&home).expect("a folder");
    if statfs(&home).expect("a file system").filesystem_type() == TMPFS_MAGIC {
        println!("safety: not measured: {} is a tmpfs, where a sync does nothing; set BENCH_DIR", home.display());
        return;
    }
    let dir = tempfile::Builder::new().prefix("safety-").tempdir_in(&home).expect("a folder");
    let runtime = Runtime::new().expect("a runtime");
    let _within = runtime.enter();
    let site = Site {
        dir: dir.path(),
        state: Arc::new(StateDb::open(&dir.path().join("state")).expect("a database")),
        workers: Workers::start("bench", 2, 2).expect("threads"),
        runtime: &runtime,
    };
    let mut targets = [
        Target::new("plain file, filled", site.plain(&site.filled("plain")), Room::Filled),
        Target::new("plain file and row, filled", site.plain_and_row(&site.filled("row")), Room::Filled),
        Target::new("complete, filled", site.complete("complete", &site.filled("complete")), Room::Filled),
        Target::new("in relocation, arrived", site.arrived("arrived"), Room::Filled),
        Target::new("plain file, holes", site.plain(&site.sparse("plain-holes")), Room::Hole),
        Target::new("plain file and row, holes", site.plain_and_row(&site.sparse("row-holes")), Room::Hole),
        Target::new("complete, holes", site.complete("complete-holes", &site.sparse("complete-holes")), Room::Hole),
        Target::new("in relocation, absent", site.absent("absent"), Room::Hole),
    ];
    let mut group = criterion.benchmark_group("4 KiB write and flush");
    group.sampling_mode(SamplingMode::Flat);
    for measured in 0..targets.len() {
        group.bench_function(targets[measured].name, |bencher| {
            bencher.iter_custom(|writes| in_turns(&mut targets, &runtime, measured, writes));
        });
    }
    group.finish();
    print(&targets);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
    targets = safety
}
criterion_main!(benches);
