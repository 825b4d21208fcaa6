//! A volume over a real file, fetching over the transport's twin from a real source: what must hold while blocks arrive,
//! and each of the traps that others fell into as a case.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::*;
use crate::core::ids::{BlockId, Class, Incarnation, Nonce};
use crate::core::residency::Presence;
use crate::core::scheduler::Limits;
use crate::fetch::{Expected, Fetch, PeerKey, Stranger};
use crate::handover::{Answer, Question};
use crate::image::Overwrite;
use crate::source::{Catalog, Hasher, Manifest, Offered, Refused, SourceOptions, SourceVolume, serve_link};
use crate::store::{MemoryState, MemoryStore, Store};
use crate::transport::NewLink;
use crate::transport::memory::{Fault, pair_with_faults};

mod flush_panics;
mod through_pipes;

const BLOCK: u64 = 65536;
const INCARNATION: Incarnation = Incarnation([7; 16]);

/// A source site with one volume, and the destination's fetcher and store.
struct Sites {
    dir: tempfile::TempDir,
    content: Vec<u8>,
    catalog: Arc<OneVolume>,
    hasher: Hasher,
    workers: Workers,
    store: Arc<MemoryStore>,
    state: Arc<MemoryState>,
    fetch: Fetch,
    links: mpsc::Sender<NewLink>,
}

struct OneVolume {
    source: Arc<SourceVolume>,
    epoch: AtomicUsize,
}

impl Catalog for OneVolume {
    fn open(&self, _peer: &Name, _volume: &Name) -> Result<Offered, Refused> {
        let epoch = self.epoch.load(Ordering::Relaxed) as u64;
        Ok(Offered { opening: self.source.open(), epoch, is_read_only: false })
    }

    fn ask(&self, _: &Name, _: &Name, question: Question) -> BoxFuture<'static, Answer> {
        if let Question::TakeOver { epoch, .. } = question {
            self.epoch.store(epoch.0 as usize, Ordering::Relaxed);
        }
        Box::pin(std::future::ready(Answer::Done(question.epoch())))
    }

    fn greet(
        &self,
        _: &Arc<dyn crate::transport::Link>,
        _: Nonce,
        _: Nonce,
    ) -> Result<(), (crate::core::wire::Refusal, String)> {
        Ok(())
    }
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// 40 blocks and a short one: text, random bytes, zeros, duplicates.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; (40 * BLOCK + 1536) as usize];
    for (block, chunk) in bytes.chunks_mut(BLOCK as usize).enumerate() {
        let mut seed = (if block % 7 == 6 { 6 } else { block } as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        match block % 4 {
            0 => {}
            1 => chunk.iter_mut().enumerate().for_each(|(at, byte)| *byte = b"the quick brown fox "[(at + block) % 20]),
            _ => chunk.iter_mut().for_each(|byte| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                *byte = seed as u8;
            }),
        }
    }
    bytes
}

impl Sites {
    fn new() -> Sites {
        let dir = tempfile::tempdir().expect("a folder");
        let content = content();
        let path = dir.path().join("source.raw");
        std::fs::write(&path, &content).expect("writes");
        let image = Arc::new(Image::open_read(&path).expect("opens"));
        let geometry = Geometry::new(image.size_bytes(), BLOCK).expect("a geometry");
        let source_state: Arc<dyn State> = Arc::new(MemoryState::new());
        let manifest =
            Manifest::open(name("vm"), Incarnation([1; 16]), Arc::clone(&image), geometry, source_state, true)
                .expect("opens");
        let source =
            Arc::new(SourceVolume { name: name("vm"), image, geometry, manifest: Arc::new(manifest), generation: 1 });
        let workers = Workers::start("test", 2, 2).expect("threads");
        let store = Arc::new(MemoryStore::new(1 << 30));
        let fetch = Fetch::start(Limits::default(), Arc::clone(&store) as Arc<dyn Store>).expect("threads");
        let (links, new_links) = mpsc::channel(1);
        fetch.add_peer(PeerKey(0), name("source"), name("destination"), new_links, workers.clone(), Arc::new(Stranger));
        Sites {
            dir,
            content,
            catalog: Arc::new(OneVolume { source, epoch: AtomicUsize::new(1) }),
            hasher: Hasher::start().expect("a thread"),
            workers,
            store,
            state: Arc::new(MemoryState::new()),
            fetch,
            links,
        }
    }

    /// A new connection between the two, and the handle that breaks it.
    async fn connect(&self) -> Fault {
        let (here, there, fault) = pair_with_faults(name("destination"), name("source"));
        let options = SourceOptions { site: name("source"), zstd_level: None };
        let catalog = Arc::clone(&self.catalog) as Arc<dyn Catalog>;
        tokio::spawn(serve_link(there, catalog, self.hasher.clone(), self.workers.clone(), options));
        assert!(self.links.send(here).await.is_ok(), "the fetcher follows");
        fault
    }

    fn geometry(&self) -> Geometry {
        self.catalog.source.geometry
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("destination.raw")
    }

    /// A block may still be landing when the last client is gone, and holds the file as a process that has been killed does not.
    fn reopen(&self) -> Image {
        for _ in 0..2000 {
            match Image::open_write(&self.path()) {
                Err(ImageError::InUse { .. }) => std::thread::sleep(Duration::from_millis(5)),
                opened => return opened.expect("opens"),
            }
        }
        panic!("the destination's file was not let go within 10 seconds");
    }

    /// The destination's volume: new, or as it comes back after a restart.
    fn volume(&self, is_new: bool, demand_timeout: Option<Duration>) -> Arc<Volume> {
        let image = if is_new {
            Image::create(&self.path(), self.geometry().size_bytes, Overwrite::OnlyBlank).expect("creates")
        } else {
            self.reopen()
        };
        let parts = VolumeParts {
            name: name("vm"),
            incarnation: INCARNATION,
            image: Arc::new(image),
            geometry: self.geometry(),
            state: Arc::clone(&self.state) as Arc<dyn State>,
            workers: self.workers.clone(),
            is_owner: true,
        };
        let volume = Volume::relocating(parts, is_new).expect("restores");
        let expected = Expected { geometry: self.geometry(), generation: 1 };
        let key = self.fetch.attach(PeerKey(0), name("vm"), expected);
        volume.set_relocation(Arc::new(Relocation::new(self.fetch.clone(), key, self.geometry(), demand_timeout)));
        Arc::new(volume)
    }

    /// What a machine finds after a power loss: the file as it is (its tail of unsynced writes may be there or not; here it is), the
    /// state database as it was synced.
    fn crash(&self, volume: Arc<Volume>) {
        if let Some(relocation) = volume.relocation() {
            self.fetch.close(relocation.key());
        }
        self.state.lose_unsynced();
        // The file's lock goes with the last handle.
        drop(volume);
    }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not happen within 10 seconds");
}

async fn all_of(volume: &Volume) -> Vec<u8> {
    let size = volume.geometry().size_bytes;
    volume.read(0, size as u32).await.expect("reads").to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_arrives_under_what_the_guest_writes() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, None);
    let mut model = sites.content.clone();
    let copy = tokio::spawn(run_bulk(Arc::clone(&volume), true));
    let mut seed = 1u64;
    for turn in 0..200u64 {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let at = (seed >> 20) % (model.len() as u64 - 70_000);
        // Torn sectors now and then; a guest writes whole ones.
        let (at, len) = if turn % 5 == 0 { (at, 777) } else { (at & !511, 512 * (1 + turn % 60)) };
        let bytes = vec![turn as u8 + 1; len as usize];
        model[at as usize..(at + len) as usize].copy_from_slice(&bytes);
        match turn % 10 {
            9 => {
                model[at as usize..(at + len) as usize].fill(0);
                volume.write_zeroes(at, len, true, false).await.expect("zeroes");
            }
            _ => volume.write(at, bytes.into(), turn % 7 == 0).await.expect("writes"),
        }
        let from = (at / 2) as usize;
        let read = volume.read(from as u64, 70_000).await.expect("reads");
        assert!(read == model[from..from + 70_000], "turn {turn}: a read at {from} is wrong");
    }
    copy.await.expect("runs").expect("completes");
    assert!(volume.is_complete());
    assert!(all_of(&volume).await == model);
    assert!(std::fs::read(sites.path()).expect("reads") == model, "the file is an ordinary raw image");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thin_stays_thin() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, None);
    run_bulk(Arc::clone(&volume), true).await.expect("completes");
    let is_zero = |block: &&[u8]| crate::core::ids::is_zero(block);
    let zero_bytes: u64 = sites.content.chunks(BLOCK as usize).filter(is_zero).map(|block| block.len() as u64).sum();
    assert!(zero_bytes >= 10 * BLOCK);
    let allocated = volume.image().allocated_bytes().expect("asks");
    assert!(allocated <= sites.content.len() as u64 - zero_bytes + 4096, "{allocated} bytes are allocated");
    assert_eq!(volume.snapshot().moved.zero_bytes, zero_bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absent_is_never_zero_and_waits_only_for_its_own() {
    let sites = Sites::new();
    let volume = sites.volume(true, Some(Duration::from_millis(300)));
    // Nobody is there: an absent block is an error in the end, a resident one is there at once.
    volume.write(BLOCK, vec![7; 65536].into(), false).await.expect("a write never waits for the WAN");
    volume.write(2 * BLOCK + 512, vec![8; 1024].into(), true).await.expect("nor a part of a block");
    assert!(matches!(volume.read(3 * BLOCK, 4096).await, Err(VolumeError::TimedOut { .. })));
    assert_eq!(volume.read(BLOCK, 65536).await.expect("resident"), vec![7; 65536]);
    assert_eq!(volume.read(2 * BLOCK + 512, 1024).await.expect("valid sectors"), vec![8; 1024]);
    assert!(volume.read(2 * BLOCK, 1024).await.is_err(), "the sector in front is not");
    sites.connect().await;
    let read = volume.read(2 * BLOCK, 4096).await.expect("comes");
    let mut expected = sites.content[2 * BLOCK as usize..][..4096].to_vec();
    expected[512..1536].fill(8);
    assert!(read == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_link_costs_time_and_nothing_else() {
    let sites = Sites::new();
    let volume = sites.volume(true, None);
    let copy = tokio::spawn(run_bulk(Arc::clone(&volume), true));
    for _ in 0..5 {
        let fault = sites.connect().await;
        let before = volume.snapshot().absent_blocks;
        until("progress", || volume.snapshot().absent_blocks < before || volume.is_complete()).await;
        fault.cut();
    }
    let _fault = sites.connect().await;
    copy.await.expect("runs").expect("completes");
    assert!(all_of(&volume).await == sites.content);
    let moved = volume.snapshot().moved;
    assert!(moved.wire_raw_bytes <= sites.content.len() as u64, "{moved:?}: something was fetched twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_on_the_way_is_noticed_and_fetched_again() {
    let sites = Sites::new();
    let fault = sites.connect().await;
    let mut nth = 0;
    fault.tamper(move |_, message| {
        nth += 1;
        // Behind the type, the flight and the id: in the frame's payload.
        if nth % 3 == 0 && message.len() > 200 && message[0] == 1 {
            let at = 60 + (nth * 7919) % (message.len() - 60);
            message[at] ^= 0x40;
        }
    });
    let volume = sites.volume(true, None);
    let copy = tokio::spawn(run_bulk(Arc::clone(&volume), true));
    let read = volume.read(2 * BLOCK, 65536).await.expect("comes in the end");
    assert!(read == sites.content[2 * BLOCK as usize..3 * BLOCK as usize]);
    copy.await.expect("runs").expect("completes");
    assert!(all_of(&volume).await == sites.content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_store_is_noticed_and_a_lost_one_changes_nothing() {
    let sites = Sites::new();
    sites.connect().await;
    let first = sites.volume(true, None);
    run_bulk(Arc::clone(&first), true).await.expect("completes");
    let damaged = sites.content.chunks(BLOCK as usize).map(BlockId::of).filter(|id| sites.store.corrupt(id)).count();
    assert!(damaged > 10);
    sites.crash(first);
    std::fs::remove_file(sites.path()).expect("removes");
    let again = sites.volume(true, None);
    run_bulk(Arc::clone(&again), true).await.expect("completes");
    assert!(all_of(&again).await == sites.content);
    assert!(sites.store.stats().corrupt_dropped > 0);
    sites.crash(again);
    std::fs::remove_file(sites.path()).expect("removes");
    sites.store.fail_with(Some("the disk is gone"));
    let third = sites.volume(true, None);
    run_bulk(Arc::clone(&third), true).await.expect("completes without a store");
    assert!(all_of(&third).await == sites.content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_that_the_store_has_does_not_cross_the_wire() {
    let sites = Sites::new();
    sites.connect().await;
    let first = sites.volume(true, None);
    run_bulk(Arc::clone(&first), true).await.expect("completes");
    let distinct: HashMap<BlockId, usize> =
        sites.content.chunks(BLOCK as usize).map(|block| (BlockId::of(block), block.len())).collect();
    let distinct_bytes: usize = distinct.iter().filter(|(id, _)| !id.is_zero()).map(|(_, len)| len).sum();
    assert_eq!(first.snapshot().moved.wire_raw_bytes, distinct_bytes as u64, "each id crosses the wire once");
    sites.crash(first);
    std::fs::remove_file(sites.path()).expect("removes");
    let second = sites.volume(true, None);
    run_bulk(Arc::clone(&second), true).await.expect("completes");
    assert_eq!(second.snapshot().moved.wire_raw_bytes, 0);
    assert!(all_of(&second).await == sites.content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_flushed_survives_power_loss() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, None);
    let mut model = sites.content.clone();
    for block in [1u64, 5, 9, 13] {
        let at = block * BLOCK + 1024;
        model[at as usize..][..2048].fill(0xaa);
        volume.write(at, vec![0xaa; 2048].into(), false).await.expect("writes");
    }
    model[20 * BLOCK as usize..][..65536].fill(0xbb);
    volume.write(20 * BLOCK, vec![0xbb; 65536].into(), false).await.expect("writes");
    model[21 * BLOCK as usize..][..2 * 65536].fill(0);
    volume.trim(21 * BLOCK, 2 * BLOCK, false).await.expect("trims");
    volume.read(5 * BLOCK, 65536).await.expect("reads");
    volume.flush().await.expect("flushes");
    // Not flushed: old or new, never something else.
    volume.write(30 * BLOCK, vec![0xcc; 512].into(), false).await.expect("writes");
    sites.crash(volume);
    let volume = sites.volume(false, None);
    assert!(volume.has_guest_writes());
    let copy = run_bulk(Arc::clone(&volume), true);
    copy.await.expect("completes");
    let found = all_of(&volume).await;
    let unflushed = 30 * BLOCK as usize..30 * BLOCK as usize + 512;
    assert!(found[unflushed.clone()] == model[unflushed.clone()] || found[unflushed.clone()] == [0xcc; 512]);
    model[unflushed.clone()].copy_from_slice(&found[unflushed]);
    assert!(found == model);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn that_a_guest_wrote_is_remembered_though_residency_does_not_tell() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, None);
    volume.read(BLOCK, 65536).await.expect("reads");
    until("it lands", || volume.snapshot().absent_blocks == volume.snapshot().total_blocks - 1).await;
    volume.flush().await.expect("flushes");
    // Into a block that was fetched: no residency changes.
    volume.write(BLOCK, vec![0xaa; 4096].into(), true).await.expect("writes");
    assert_eq!(volume.snapshot().written_blocks, 0);
    sites.crash(volume);
    assert!(sites.volume(false, None).has_guest_writes(), "or cancelling would throw the write away");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_fetched_ahead_of_a_dead_link_holds_up_no_read() {
    let sites = Sites::new();
    let fault = sites.connect().await;
    let volume = sites.volume(true, Some(Duration::from_secs(20)));
    // Brings the page: from here on zero blocks are known.
    volume.read(BLOCK, 4096).await.expect("reads");
    until("the page is here", || {
        let relocation = volume.relocation().expect("relocating");
        relocation.pages.id_of(BlockIndex(4)) == Some(BlockId::ZERO)
    })
    .await;
    fault.cut();
    for _ in 0..8 {
        volume.prefetch(0, volume.geometry().size_bytes);
    }
    assert_eq!(volume.read(4 * BLOCK, 65536).await.expect("is known to be zero"), vec![0; 65536]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_waits_for_a_dead_peer_holds_up_nobody_who_gives_the_volume_up() {
    let sites = Sites::new();
    let volume = sites.volume(true, None);
    let writing = tokio::spawn({
        let volume = Arc::clone(&volume);
        async move { volume.write(5 * BLOCK + 100, vec![1; 100].into(), false).await }
    });
    let zeroing = tokio::spawn({
        let volume = Arc::clone(&volume);
        async move { volume.write_zeroes(7 * BLOCK + 100, 100, true, false).await }
    });
    until("both wait for their blocks", || volume.relocation().expect("relocating").waiting_demands() == 2).await;
    volume.bar();
    tokio::time::timeout(Duration::from_secs(20), volume.drained()).await.expect("nothing holds it up");
    for refused in [writing.await.expect("ends"), zeroing.await.expect("ends")] {
        assert!(matches!(refused, Err(VolumeError::NotOwner { .. })), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_killed_daemon() {
    let sites = Sites::new();
    let fault = sites.connect().await;
    let volume = sites.volume(true, None);
    let mut model = sites.content.clone();
    // Into a block that was fetched and is not marked yet, into an absent one, a part of one, and none of it flushed.
    volume.read(5 * BLOCK, 65536).await.expect("reads");
    until("the block lands", || volume.disk.bits().is_resident(BlockIndex(5))).await;
    for (at, len) in [(5 * BLOCK + 512, 512), (9 * BLOCK, 65536), (13 * BLOCK + 1024, 4096)] {
        model[at as usize..][..len].fill(0xab);
        volume.write(at, vec![0xab; len].into(), false).await.expect("writes");
    }
    model[17 * BLOCK as usize..][..65536].fill(0);
    volume.trim(17 * BLOCK, BLOCK, false).await.expect("trims");
    fault.cut();
    // Killed: the kernel keeps what was written to the file and to the database, synced or not.
    if let Some(relocation) = volume.relocation() {
        sites.fetch.close(relocation.key());
    }
    drop(volume);
    sites.connect().await;
    let volume = sites.volume(false, None);
    run_bulk(Arc::clone(&volume), true).await.expect("completes");
    assert!(all_of(&volume).await == model);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leftovers_of_a_crash_never_show_through_a_zero_block() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, None);
    // Block 4 is zero at the source; an unflushed write to it reaches the file, its residency does not reach the disk.
    assert!(crate::core::ids::is_zero(&sites.content[4 * BLOCK as usize..5 * BLOCK as usize]));
    volume.write(4 * BLOCK, vec![0xdd; 512].into(), false).await.expect("writes");
    sites.crash(volume);
    let volume = sites.volume(false, None);
    assert_eq!(volume.read(4 * BLOCK, 512).await.expect("reads"), vec![0; 512]);
    run_bulk(Arc::clone(&volume), true).await.expect("completes");
    assert_eq!(volume.read(4 * BLOCK, 512).await.expect("reads"), vec![0; 512], "what was read once stays");
}

/// A person gave up what never arrived; a block that was asked for before was on its way to the file all the time.
#[tokio::test]
async fn a_block_that_lands_after_it_was_given_up_does_not_undo_a_guests_write() {
    let sites = Sites::new();
    let volume = sites.volume(true, None);
    volume.unfence();
    let kept = vec![5; 512];
    volume.write(BLOCK, kept.clone().into(), false).await.expect("writes a part of a block");
    volume.fill_absent().await.expect("fills");
    volume.finish();
    let written = vec![9; BLOCK as usize];
    volume.write(2 * BLOCK, written.clone().into(), false).await.expect("writes");
    for block in [1, 2, 3] {
        let first = (block * BLOCK) as usize;
        let landed = volume.disk.land(BlockIndex(block), &sites.content[first..first + BLOCK as usize]);
        assert!(!landed.expect("comes too late"), "block {block}");
    }
    volume.disk.land_zeros(&[BlockIndex(2), BlockIndex(4)]).expect("come too late");
    let mut expected = vec![0; sites.content.len()];
    expected[BLOCK as usize..][..512].copy_from_slice(&kept);
    expected[2 * BLOCK as usize..][..BLOCK as usize].copy_from_slice(&written);
    assert!(all_of(&volume).await == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_ends_writes_and_flushes_go_on() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, None);
    // QEMU flushes at quit, on both sides, whether it ever wrote or not.
    volume.flush().await.expect("a flush by a client that never wrote");
    volume.fence().await.expect("fences");
    assert!(matches!(volume.write(0, vec![1; 512].into(), false).await, Err(VolumeError::NotOwner { .. })));
    assert!(matches!(volume.trim(0, BLOCK, false).await, Err(VolumeError::NotOwner { .. })));
    volume.flush().await.expect("flushes");
    assert!(volume.read(BLOCK, 512).await.expect("reads") == sites.content[BLOCK as usize..][..512]);
    volume.unfence();
    volume.write(0, vec![1; 512].into(), true).await.expect("writes again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_does_not_wait_for_bulk_that_is_stuck() {
    let sites = Sites::new();
    let fault = sites.connect().await;
    let volume = sites.volume(true, None);
    // Paused bulk: nothing moves but what the guest asks for.
    let relocation = volume.relocation().expect("relocating");
    relocation.bulk().set_paused(true);
    relocation.apply_pace();
    let copy = tokio::spawn(run_bulk(Arc::clone(&volume), true));
    for block in [39u64, 3, 17] {
        let read = volume.read(block * BLOCK, 65536).await.expect("reads");
        assert!(read == sites.content[(block * BLOCK) as usize..][..65536]);
    }
    assert_eq!(volume.snapshot().moved.wire_bytes[Class::Bulk as usize], 0);
    relocation.bulk().set_paused(false);
    relocation.apply_pace();
    copy.await.expect("runs").expect("completes");
    drop(fault);
    assert!(all_of(&volume).await == sites.content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_changes_at_the_source_fails_visibly() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, Some(Duration::from_secs(5)));
    assert!(volume.read(BLOCK, 4096).await.expect("reads") == sites.content[BLOCK as usize..][..4096]);
    // A block whose like is nowhere else: another one would come from the store, as what was announced.
    let path = sites.dir.path().join("source.raw");
    let file = std::fs::File::options().write(true).open(path).expect("opens");
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x11; 4096], 10 * BLOCK)
        .expect("writes behind the daemon's back");
    let error = volume.read(10 * BLOCK, 4096).await.expect_err("never wrong bytes");
    assert!(error.to_string().contains("changed"), "{error}");
    let relocation = volume.relocation().expect("relocating");
    let copy = tokio::spawn(run_bulk(Arc::clone(&volume), true));
    until(
        "the failure shows",
        || matches!(relocation.bulk().state(), BulkState::Failed(why) if why.contains("changed")),
    )
    .await;
    copy.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_failed_sync_nothing_is_served_that_the_disk_may_have_lost() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, None);
    volume.read(BLOCK, 512).await.expect("reads");
    volume.flush().await.expect("flushes");
    volume.is_sync_broken.store(true, Ordering::Release);
    assert!(matches!(volume.read(BLOCK, 512).await, Err(VolumeError::SyncFailed { .. })));
    assert!(volume.try_read_now(BLOCK, &mut [0; 512]).is_none());
    assert!(matches!(volume.flush().await, Err(VolumeError::SyncFailed { .. })));
    sites.crash(volume);
    let volume = sites.volume(false, None);
    run_bulk(Arc::clone(&volume), true).await.expect("completes after the restart");
    assert!(all_of(&volume).await == sites.content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trim_of_everything_completes_without_fetching() {
    let sites = Sites::new();
    sites.connect().await;
    let volume = sites.volume(true, None);
    volume.trim(0, volume.geometry().size_bytes, true).await.expect("trims");
    run_bulk(Arc::clone(&volume), true).await.expect("completes");
    assert_eq!(volume.snapshot().moved.wire_bytes.iter().sum::<u64>(), 0);
    assert!(crate::core::ids::is_zero(&all_of(&volume).await));
}

/// A question about all of a large disk is answered in parts: none of them is long in the making.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_extents_of_a_large_disk_are_told_in_parts() {
    let dir = tempfile::tempdir().expect("a folder");
    let size_bytes = 1 << 40;
    let parts = VolumeParts {
        name: name("large"),
        incarnation: INCARNATION,
        image: Arc::new(
            Image::create(&dir.path().join("large.raw"), size_bytes, crate::image::Overwrite::OnlyBlank)
                .expect("creates"),
        ),
        geometry: Geometry::new(size_bytes, BLOCK).expect("a geometry"),
        state: Arc::new(MemoryState::new()),
        workers: Workers::start("test", 2, 2).expect("threads"),
        is_owner: true,
    };
    let volume = Volume::relocating(parts, true).expect("a volume");
    volume.write(BLOCK, vec![1; BLOCK as usize].into(), false).await.expect("writes");
    for offset in [0, 512, size_bytes / 2] {
        let runs = volume.allocation(offset, size_bytes - offset, 2048).await.expect("looks");
        let covered: u64 = runs.iter().map(|(len, _)| len).sum();
        assert!((1 << 31..=1 << 33).contains(&covered), "{covered} bytes from {offset} on");
        assert!(runs.iter().all(|(_, is_zero)| !is_zero), "what is absent is not zero");
    }
}

/// What clients are told of residency is what is counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presence_adds_up_to_the_counters() {
    let dir = tempfile::tempdir().expect("a folder");
    let (blocks, tail_bytes) = (3000, 512);
    let size_bytes = blocks * BLOCK + tail_bytes;
    let parts = VolumeParts {
        name: name("vm"),
        incarnation: INCARNATION,
        image: Arc::new(
            Image::create(&dir.path().join("vm.raw"), size_bytes, crate::image::Overwrite::OnlyBlank).expect("creates"),
        ),
        geometry: Geometry::new(size_bytes, BLOCK).expect("a geometry"),
        state: Arc::new(MemoryState::new()),
        workers: Workers::start("test", 2, 2).expect("threads"),
        is_owner: true,
    };
    let volume = Volume::relocating(parts, true).expect("a volume");
    let sector: Bytes = vec![1; 512].into();
    volume.write(5 * BLOCK, vec![1; 2 * BLOCK as usize].into(), false).await.expect("writes");
    volume.write(1023 * BLOCK, vec![1; 3 * BLOCK as usize].into(), false).await.expect("writes");
    for at in [9 * BLOCK + 1024, 10 * BLOCK, 2047 * BLOCK] {
        volume.write(at, sector.clone(), false).await.expect("writes");
    }
    volume.write(blocks * BLOCK, sector, false).await.expect("writes");
    let runs = volume.presence(0, size_bytes, 100).await.expect("looks");
    assert_eq!(runs.iter().map(|(len, _)| len).sum::<u64>(), size_bytes);
    assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1), "{runs:?}");
    let blocks_of = |wanted: &[Presence]| -> u64 {
        runs.iter().filter(|(_, is)| wanted.contains(is)).map(|(len, _)| len.div_ceil(BLOCK)).sum()
    };
    let snapshot = volume.snapshot();
    assert_eq!(blocks_of(&[Presence::Absent, Presence::PartlyWritten]), snapshot.absent_blocks);
    assert_eq!(blocks_of(&[Presence::Written]), snapshot.written_blocks);
    assert_eq!(blocks_of(&[Presence::PartlyWritten]), 3);
    assert_eq!(snapshot.partial_blocks, 3);
    // In parts, beginning anywhere.
    let mut at = 700;
    let mut told = Vec::new();
    while at < size_bytes {
        let part = volume.presence(at, size_bytes - at, 2).await.expect("looks");
        assert!(!part.is_empty() && part.len() <= 2);
        at += part.iter().map(|(len, _)| len).sum::<u64>();
        told.extend(part);
    }
    assert_eq!(told.iter().map(|(len, _)| len).sum::<u64>(), size_bytes - 700);
    assert_eq!(told.iter().filter(|(_, is)| *is == Presence::PartlyWritten).count(), 2, "the first two are neighbours");
}

/// Time that moves only when it is told to: without this, it would leap to the next timer whenever the runtime waits for one
/// of the disk's threads.
struct Clock(std::sync::mpsc::Sender<()>);

impl Clock {
    fn hold() -> Clock {
        let (release, held) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || held.recv());
        tokio::time::pause();
        Clock(release)
    }

    async fn pass(&self, seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
        // Whoever is woken by that gets a turn, those who wait for threads, too.
        for _ in 0..20 {
            tokio::task::yield_now().await;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A link that is down for hours: reads of what is not here wait, whatever is here goes on, and the patience that is
/// configured has an end.
#[tokio::test]
async fn a_link_that_is_down_for_hours_is_waited_for_as_long_as_configured() {
    let sites = Sites::new();
    let clock = Clock::hold();
    let volume = sites.volume(true, Some(Duration::from_secs(3600)));
    let absent = |block: u64| {
        let volume = Arc::clone(&volume);
        tokio::spawn(async move { volume.read(block * BLOCK, 4096).await })
    };
    let first = absent(3);
    clock.pass(1).await;
    for hour in 0..59u64 {
        // Resident I/O does not know that anything is wrong.
        let bytes = vec![hour as u8 + 1; 65536];
        volume.write(BLOCK, bytes.clone().into(), true).await.expect("writes");
        assert_eq!(volume.read(BLOCK, 65536).await.expect("reads"), bytes);
        assert!(!first.is_finished(), "after {hour} minutes");
        clock.pass(60).await;
    }
    let relocation = volume.relocation().expect("there is one");
    assert_eq!(relocation.waiting_demands(), 1);
    clock.pass(61).await;
    let error = first.await.expect("runs").expect_err("an hour is over");
    let said = error.to_string();
    assert!(matches!(error, VolumeError::TimedOut { .. }), "{said}");
    assert!(said.contains("3600 s") && said.contains("source cannot be reached since"), "{said}");
    assert_eq!(relocation.waiting_demands(), 0);

    // One that began later waits for its own hour, and is answered if the link comes back within it.
    let second = absent(3);
    clock.pass(3000).await;
    assert!(!second.is_finished());
    sites.connect().await;
    // From here on time may pass by itself.
    drop(clock.0);
    tokio::time::resume();
    let read = second.await.expect("runs").expect("comes");
    assert!(read == sites.content[3 * BLOCK as usize..][..4096]);
}

/// `timeout = "forever"`: no outage is too long.
#[tokio::test]
async fn a_guest_may_wait_for_ever() {
    let sites = Sites::new();
    let clock = Clock::hold();
    let volume = sites.volume(true, None);
    let waiting = tokio::spawn({
        let volume = Arc::clone(&volume);
        async move { volume.read(2 * BLOCK, 4096).await }
    });
    for _ in 0..30 {
        clock.pass(24 * 3600).await;
        assert!(!waiting.is_finished());
    }
    sites.connect().await;
    drop(clock.0);
    tokio::time::resume();
    let read = waiting.await.expect("runs").expect("comes after a month");
    assert!(read == sites.content[2 * BLOCK as usize..][..4096]);
}
