//! One world from its seed to its end: built, shaken, and looked at. Must not know what is shaken how.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blockferry::handover::State;
use bytes::Bytes;

use crate::disk::DiskFile;
use crate::faults::Faults;
use crate::guest::Guest;
use crate::model::{CELL, Crash, fill};
use crate::operator::Operator;
use crate::people::People;
use crate::random::{Random, mix};
use crate::referee::Referee;
use crate::site::{Site, name_of};
use crate::site_lives::Lives;
use crate::slot::{Part, Slot};
use crate::wiretap::Tally;
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
pub fn content(random: &mut Random, number: u64, blocks: u64, tail: u64) -> Vec<u8> {
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
    let slots: Vec<Arc<Slot>> = (0..volumes)
        .map(|number| Arc::new(Slot::new(format!("vm{number}").parse().expect("a name"), number)))
        .collect();
    let mut sides = vec![Side::Source, Side::Destination];
    if !world.is_plain && world.percent(40) {
        sides.push(Side::Third);
    }
    let names = sides.iter().map(|side| (name_of(*side), *side)).collect();
    let referee = Arc::new(Referee::new(world, &slots, names));
    let sites: Vec<Arc<Site>> = sides.iter().map(|side| Site::new(world, *side, &referee, &slots)).collect();
    sites.iter().for_each(|site| *site.all.lock() = sites.clone());
    let _closing = Closing(sites.clone());
    let (source, destination) = (Arc::clone(&sites[0]), Arc::clone(&sites[1]));
    for slot in &slots {
        let content = world.random(|random| {
            let (blocks, tail) = (random.between(6, 40 / volumes), random.below(20));
            content(random, slot.number, blocks, tail)
        });
        if world.percent(40) {
            let warm = |_: &&[u8]| world.percent(50);
            let store = &destination.store;
            content.chunks(BLOCK as usize).filter(warm).for_each(|block| store.prewarm(&Bytes::copy_from_slice(block)));
        }
        source.files.lock().insert(image_of(slot), DiskFile::with_content(content, 1 + slot.number));
    }
    let lives = Lives::new(world);
    for site in &sites {
        tokio::spawn(Arc::clone(&lives).run(Arc::clone(site)));
    }
    for slot in &slots {
        let operator = Operator { world: Arc::clone(world), slot: Arc::clone(slot) };
        while let Err(why) = operator.add(&source, &image_of(slot)).await {
            world.say(|| format!("{}: cannot be added yet: {why}", slot.name));
            world.rest(1, 20).await;
        }
        if world.is_plain {
            tokio::spawn(operator.move_over(Arc::clone(&source), Arc::clone(&destination)));
        }
    }
    let mut people = Vec::new();
    let mut acting = Vec::new();
    for slot in slots.iter().filter(|_| !world.is_plain) {
        let one = People {
            world: Arc::clone(world),
            slot: Arc::clone(slot),
            sites: sites.clone(),
            lives: Arc::clone(&lives),
            swapped: Arc::default(),
        };
        acting.push(tokio::spawn(one.clone().act()));
        people.push(one);
    }
    let mut guests = Vec::new();
    for slot in &slots {
        for number in 0..1 + world.below(3) {
            let (world, slot, sites) = (Arc::clone(world), Arc::clone(slot), sites.clone());
            let requests = 20 + world.below(50);
            guests.push(tokio::spawn(Guest { world, slot, sites, number, requests }.run()));
        }
    }
    let faults = Faults { world: Arc::clone(world), lives, sites: sites.clone() };
    if world.is_quiet {
        faults.starve_bulk().await
    } else {
        faults.happen().await
    }
    world.note("all is well", [0; 3]);
    if !world.is_plain {
        for acting in acting {
            let _ = acting.await;
        }
        for one in &people {
            one.put_back().await;
        }
        for one in &people {
            one.settle().await;
        }
        world.is_over.store(true, Ordering::Relaxed);
        for guest in guests {
            if tokio::time::timeout(2 * ANSWERS, guest).await.is_err() {
                world.fail("answers", "a request is never answered".into());
                return;
            }
        }
        for slot in &slots {
            for site in sites.iter().filter(|site| slot.part(site.side).is_some_and(|part| part.is_owner())) {
                last_look(world, site, slot).await;
            }
        }
        return;
    }
    for slot in &slots {
        if tokio::time::timeout(ARRIVAL, slot.is_complete.wait()).await.is_err() {
            let served = destination.serves(slot);
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
    for slot in &slots {
        if tokio::time::timeout(ANSWERS, told(world, &source, slot)).await.is_err() {
            world.fail("debts", format!("{}: the source never hears that everything has arrived", slot.name));
        }
    }
    *tally = destination.tap(Side::Source).tally();
    let most = most_asked(tally, *faults.lives.deaths.lock(), volumes);
    if tally.asked > most {
        world.fail("fetched twice", format!("{tally:?}: at most {most} should have been asked for"));
    }
    for slot in &slots {
        last_look(world, &destination, slot).await;
    }
}

/// Lets go of what holds each other.
struct Closing(Vec<Arc<Site>>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.iter().for_each(|site| site.close());
    }
}

fn image_of(slot: &Slot) -> String {
    format!("{}.raw", slot.name)
}

/// Until the source knows that everything has arrived.
async fn told(world: &World, source: &Site, slot: &Slot) {
    loop {
        let state = slot.part(source.side).map(|part| part.held.lock().state.clone());
        if let None | Some(State::Released { is_completed: true, .. }) = state {
            return;
        }
        world.rest(10, 100).await;
    }
}

/// Everything is at its owner, through its daemon, in the raw file, and after a power loss.
async fn last_look(world: &Arc<World>, site: &Site, slot: &Slot) {
    // It may be on its way back after the last crash.
    let served = async {
        loop {
            match site.serves(slot) {
                Some(served) => return served,
                None => world.rest(10, 10).await,
            }
        }
    };
    let Ok(served) = tokio::time::timeout(ANSWERS, served).await else {
        return world.fail("arrival", format!("{} is not served", slot.name));
    };
    let began = served.part.model.lock().begin_read();
    let size = served.part.model.lock().size_bytes();
    match served.volume.read(0, size as u32).await {
        Ok(data) => check(world, slot, &served.part, "content", &data, began),
        Err(error) => world.fail("errors", format!("{}: {error}", slot.name)),
    }
    served.part.model.lock().end_read(began);
    let began = served.part.model.lock().now();
    match served.volume.flush().await {
        Ok(()) => served.part.model.lock().flushed(began),
        Err(error) => world.fail("errors", format!("{}: {error}", slot.name)),
    }
    let file = site.file(&served.part.image);
    let Some(file) = file else { return world.fail("arrival", format!("{} has no file", slot.name)) };
    let began = served.part.model.lock().begin_read();
    check(world, slot, &served.part, "raw file", &file.content(), began);
    served.part.model.lock().end_read(began);
    world.random(|random| file.lose_power(random));
    served.part.model.lock().crash(Crash::PowerLoss);
    let began = served.part.model.lock().begin_read();
    check(world, slot, &served.part, "raw file after a power loss", &file.content(), began);
}

fn check(world: &World, slot: &Slot, part: &Part, check: &'static str, data: &[u8], began: u64) {
    if let Err(why) = part.model.lock().check_read(0, data, began) {
        world.fail(check, format!("{}: {why}", slot.name));
    }
}
