//! One world from its seed to its end: built, shaken, and looked at. Must not know what is shaken how.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blockferry::store::MemoryState;
use bytes::Bytes;

use crate::destination_site::DestinationSite;
use crate::disk::DiskFile;
use crate::faults::Faults;
use crate::guest::Guest;
use crate::kept::KeptStore;
use crate::model::{CELL, Crash, fill};
use crate::random::{Random, mix};
use crate::site_lives::Lives;
use crate::slot::Slot;
use crate::source_site::SourceSite;
use crate::wiretap::{Tally, Wiretap};
use crate::world::{Side, Violation, World};
use crate::{BLOCK, panics};

/// Virtual time in which everything must have arrived once nothing goes wrong any more.
const ARRIVAL: Duration = Duration::from_secs(300);
/// In which every request must have been answered by then.
const ANSWERS: Duration = Duration::from_secs(60);

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    pub violation: Option<Violation>,
    pub fingerprint: (u64, u64),
    pub log: Vec<String>,
    pub tally: Tally,
    pub virtual_ms: u64,
}

/// Runs the world of a seed.
pub fn run(seed: u64, with_log: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let outcome = runtime.block_on(async {
        panics::forget();
        let world = Arc::new(World::new(seed, with_log));
        let mut tally = Tally::default();
        // What waits for ever must not make the test wait.
        let story = story(&world, &mut tally);
        tokio::select! {
            biased;
            () = world.violated.notified() => {}
            () = story => {}
        }
        if let Some(what) = panics::last() {
            world.fail("panic", what);
        }
        Outcome {
            violation: world.violation(),
            fingerprint: world.fingerprint(),
            log: world.take_log(),
            tally,
            virtual_ms: world.now_ms(),
        }
    });
    runtime.shutdown_background();
    outcome
}

/// Blocks of a volume: zeros, of its own, or such as other volumes have.
fn content(random: &mut Random, number: u64, blocks: u64, tail: u64) -> Vec<u8> {
    let mut content = Vec::with_capacity(((blocks + 1) * BLOCK) as usize);
    for block in 0..blocks {
        let kind = match random.below(10) {
            0..3 => None,
            3..7 => Some(mix(1000 + random.below(24))),
            _ => Some(mix(number << 20 | block << 8 | 77)),
        };
        match kind {
            None => content.extend(std::iter::repeat_n(0, BLOCK as usize)),
            Some(kind) if kind.is_multiple_of(2) => content.extend(fill(kind | 1, BLOCK as usize)),
            Some(kind) => (0..BLOCK / CELL as u64).for_each(|cell| content.extend(fill(mix(kind ^ cell) | 1, CELL))),
        }
    }
    content.extend(fill(mix(number ^ tail) | 1, (tail as usize) * CELL));
    content
}

/// What may be asked for, in blocks: each content once; what connections, lies and hang-ups lost, once more; and after every death what
/// the store and the file had not kept.
fn most_asked(tally: &Tally, deaths: u64, volumes: u64) -> u64 {
    // Blocks that guests ask for before the page has come may turn out to be content that is here already.
    let unknown = 40 + 16 * volumes;
    (tally.distinct + unknown) * (1 + deaths) + tally.lost
}

async fn story(world: &Arc<World>, tally: &mut Tally) {
    let volumes = 1 + world.below(3);
    let (mut slots, mut files) = (Vec::new(), Vec::new());
    let store = Arc::new(KeptStore::new());
    for number in 0..volumes {
        let content = world.random(|random| {
            let (blocks, tail) = (random.between(6, 40 / volumes), random.below(20));
            content(random, number, blocks, tail)
        });
        if world.percent(40) {
            let warm = |_: &&[u8]| world.percent(50);
            content.chunks(BLOCK as usize).filter(warm).for_each(|block| store.prewarm(&Bytes::copy_from_slice(block)));
        }
        let name = format!("vm{number}").parse().expect("a name");
        files.push(DiskFile::with_content(content.clone(), 1 + number));
        slots.push(Arc::new(Slot::new(name, number, content)));
    }
    let tap = Arc::new(Wiretap::new(world));
    let source = Arc::new(SourceSite {
        world: Arc::clone(world),
        name: "source".parse().expect("a name"),
        slots: slots.clone(),
        files,
        state: Arc::new(MemoryState::new()),
        boot: Default::default(),
        life: Default::default(),
    });
    let destination = Arc::new(DestinationSite {
        world: Arc::clone(world),
        name: "destination".parse().expect("a name"),
        slots: slots.clone(),
        files: Default::default(),
        state: Arc::new(MemoryState::new()),
        store,
        boot: Default::default(),
        source: Arc::clone(&source),
        tap: Arc::clone(&tap),
        wire: Default::default(),
    });
    let lives = Lives::new(world);
    tokio::spawn(Arc::clone(&lives).run_source(source));
    tokio::spawn(Arc::clone(&lives).run_destination(Arc::clone(&destination)));
    let mut guests = Vec::new();
    for slot in &slots {
        for number in 0..1 + world.below(3) {
            let (world, slot) = (Arc::clone(world), Arc::clone(slot));
            let requests = 20 + world.below(50);
            guests.push(tokio::spawn(Guest { world, slot, number, requests }.run()));
        }
    }
    let faults = Faults { world: Arc::clone(world), lives, destination: Arc::clone(&destination) };
    if world.is_quiet {
        faults.starve_bulk().await
    } else {
        faults.happen().await
    }
    world.note("all is well", [0; 3]);
    for slot in &slots {
        if tokio::time::timeout(ARRIVAL, slot.is_complete.wait()).await.is_err() {
            let served = slot.at(Side::Destination);
            let state = served.and_then(|served| served.volume.relocation()).map(|it| it.bulk().state());
            world.fail("arrival", format!("{} never arrives: {state:?}", slot.name));
            return;
        }
    }
    world.is_over.store(true, Ordering::Relaxed);
    for guest in guests {
        if tokio::time::timeout(ANSWERS, guest).await.is_err() {
            world.fail("answers", "a request is never answered".into());
            return;
        }
    }
    *tally = tap.tally();
    let most = most_asked(tally, *faults.lives.deaths.lock(), volumes);
    if tally.asked > most {
        world.fail("fetched twice", format!("{tally:?}: at most {most} should have been asked for"));
    }
    last_look(world, &destination).await;
}

/// Everything is at the destination, through its daemon, in the raw file, and after a power loss.
async fn last_look(world: &Arc<World>, destination: &DestinationSite) {
    for slot in &destination.slots {
        // It may be on its way back after the last crash.
        let served = async {
            loop {
                match slot.at(Side::Destination) {
                    Some(served) => return served,
                    None => world.rest(10, 10).await,
                }
            }
        };
        let Ok(served) = tokio::time::timeout(ANSWERS, served).await else {
            return world.fail("arrival", format!("{} is not served", slot.name));
        };
        let began = slot.model.lock().begin_read();
        let size = slot.model.lock().size_bytes();
        match served.volume.read(0, size as u32).await {
            Ok(data) => check(world, slot, "content", &data, began),
            Err(error) => world.fail("errors", format!("{}: {error}", slot.name)),
        }
        slot.model.lock().end_read(began);
        let began = slot.model.lock().now();
        match served.volume.flush().await {
            Ok(()) => slot.model.lock().flushed(began),
            Err(error) => world.fail("errors", format!("{}: {error}", slot.name)),
        }
        let file = destination.files.lock().get(&slot.number).cloned();
        let Some(file) = file else { return world.fail("arrival", format!("{} has no file", slot.name)) };
        let began = slot.model.lock().begin_read();
        check(world, slot, "raw file", &file.content(), began);
        slot.model.lock().end_read(began);
        world.random(|random| file.lose_power(random));
        slot.model.lock().crash(Crash::PowerLoss);
        let began = slot.model.lock().begin_read();
        check(world, slot, "raw file after a power loss", &file.content(), began);
    }
}

fn check(world: &World, slot: &Slot, check: &'static str, data: &[u8], began: u64) {
    if let Err(why) = slot.model.lock().check_read(0, data, began) {
        world.fail(check, format!("{}: {why}", slot.name));
    }
}
