//! The destination: begins relocations, goes on with them after a restart, and completes them, put together as the daemon does.
//! Must not know the source's insides.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blockferry::core::ids::Name;
use blockferry::core::manifest::Geometry;
use blockferry::core::scheduler::Limits;
use blockferry::fetch::{Expected, Fetch, FetchError, PeerKey, VolumeKey};
use blockferry::image::Image;
use blockferry::source::{Manifest, SourceVolume};
use blockferry::store::{MemoryState, State, StateBatch, Store};
use blockferry::transport::NewLink;
use blockferry::volume::{Relocation, Volume, VolumeError, VolumeParts, run_bulk};
use blockferry::workers::{Urgency, Workers};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::disk::DiskFile;
use crate::kept::{KeptStore, OpenState, OpenStore};
use crate::model::Crash;
use crate::network::{self, Wire};
use crate::process::Process;
use crate::slot::Slot;
use crate::source_site::SourceSite;
use crate::wiretap::{DEMAND_FLIGHTS, READAHEAD_FLIGHTS, Wiretap};
use crate::world::{Shared, Side};

/// What outlives the destination's processes.
pub struct DestinationSite {
    pub world: Shared,
    pub name: Name,
    pub slots: Vec<Arc<Slot>>,
    pub files: Mutex<BTreeMap<u64, Arc<DiskFile>>>,
    pub state: Arc<MemoryState>,
    pub store: Arc<KeptStore>,
    pub boot: Mutex<u64>,
    pub source: Arc<SourceSite>,
    pub tap: Arc<Wiretap>,
    pub wire: Mutex<Option<Arc<Wire>>>,
}

/// One life of the destination.
pub struct DestinationLife {
    pub process: Arc<Process>,
    site: Arc<DestinationSite>,
    state: Arc<dyn State>,
    workers: Workers,
    fetch: Fetch,
    keys: Mutex<Vec<VolumeKey>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    phase: u8,
    epoch: u64,
    generation: u64,
    size_bytes: u64,
}

/// Phases of a relocation: asked for, owned, complete.
const ARRIVING: u8 = 1;
const TAKEN: u8 = 2;
const ARRIVED: u8 = 3;

const PEER: PeerKey = PeerKey(0);

impl Record {
    fn key(slot: &Slot) -> Vec<u8> {
        format!("vol/{}", slot.name).into_bytes()
    }

    fn load(state: &dyn State, slot: &Slot) -> Option<Record> {
        let row = state.get(&Record::key(slot)).ok()??;
        let number = |at: usize| row.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        Some(Record { phase: *row.first()?, epoch: number(1)?, generation: number(9)?, size_bytes: number(17)? })
    }

    fn save(self, state: &dyn State, slot: &Slot) -> Result<(), VolumeError> {
        let mut row = vec![self.phase];
        for number in [self.epoch, self.generation, self.size_bytes] {
            row.extend_from_slice(&number.to_le_bytes());
        }
        let mut batch = StateBatch::default();
        batch.put(Record::key(slot), row);
        Ok(state.write_batch(batch, true)?)
    }

    fn geometry(self) -> Geometry {
        Geometry::new(self.size_bytes, crate::BLOCK).expect("a geometry that was good before")
    }
}

impl DestinationSite {
    /// Starts a process: every volume that was here is served again at once.
    pub fn start(self: &Arc<Self>, process: &Arc<Process>) -> Arc<DestinationLife> {
        let state: Arc<dyn State> = Arc::new(OpenState {
            kept: Arc::clone(&self.state),
            process: Arc::clone(process),
            boot: format!("destination {}", self.boot.lock()).into(),
        });
        let store: Arc<dyn Store> = Arc::new(OpenStore { kept: Arc::clone(&self.store), process: Arc::clone(process) });
        let workers = process.workers();
        let limits =
            Limits { demand_flights: DEMAND_FLIGHTS, readahead_flights: READAHEAD_FLIGHTS, ..Limits::default() };
        let fetch = Fetch::start_in_runtime(limits, store, workers.clone());
        let (links, new_links) = mpsc::channel(1);
        fetch.add_peer(PEER, self.source.name.clone(), self.name.clone(), new_links, workers.clone());
        let life = Arc::new(DestinationLife {
            process: Arc::clone(process),
            site: Arc::clone(self),
            state,
            workers,
            fetch,
            keys: Mutex::default(),
            tasks: Mutex::default(),
        });
        life.spawn(Arc::clone(&life).look_after());
        life.spawn(dial(Arc::clone(self), Arc::clone(process), links));
        for slot in &self.slots {
            match Record::load(&*life.state, slot) {
                None => life.spawn(Arc::clone(&life).begin_until_begun(Arc::clone(slot))),
                Some(record) => life.restore(slot, record),
            }
        }
        life
    }

    /// After the death of a process: what is left.
    pub fn bury(&self, life: &DestinationLife, has_lost_power: bool) {
        life.tasks.lock().drain(..).for_each(|task| task.abort());
        life.keys.lock().drain(..).for_each(|key| life.fetch.close(key));
        if let Some(wire) = self.wire.lock().take() {
            wire.process_ended(Side::Destination);
        }
        self.world.random(|random| self.store.lose_some(random));
        let mut crash = if has_lost_power { Crash::PowerLoss } else { Crash::Killed };
        for file in self.files.lock().values() {
            if has_lost_power {
                self.world.random(|random| file.lose_power(random));
            } else if file.forget_given_up() {
                crash = Crash::DiskGaveUp;
            }
        }
        for slot in &self.slots {
            slot.serve_no_more(Side::Destination);
            if slot.holder() == Side::Destination {
                slot.model.lock().crash(crash);
            }
        }
        if has_lost_power {
            *self.boot.lock() += 1;
            self.state.crash(self.world.below(self.state.unsynced_batches() as u64 + 1) as usize);
        }
    }

    /// A daemon whose disk failed to sync is restarted when all is well again, as its messages ask for: while the state database fails, too,
    /// it cannot drop the rows that speak of bytes that are lost.
    async fn restart(&self, process: &Process) {
        self.world.until(|weather| !weather.is_state_failing).await;
        for slot in &self.slots {
            if let Some(served) = slot.at(Side::Destination) {
                let _ = served.volume.flush().await;
            }
        }
        // By now it may fail again; then the operator comes again, too.
        if process.is_alive() && !self.world.weather.lock().is_state_failing {
            self.world.say(|| "the operator restarts the destination".into());
            process.die();
        }
    }

    /// Whether the end of the daemon alone would be more than is promised: its disk has failed to sync, and it has not been able to drop
    /// the rows that speak of what was lost. docs/architecture.md names this hole.
    pub fn must_not_be_killed(&self) -> bool {
        self.slots.iter().any(|slot| {
            let rows = self.state.scan_prefix(format!("res/{}/live/", slot.name).as_bytes()).unwrap_or_default();
            !rows.is_empty() && self.file(slot).is_some_and(|file| file.has_failed_sync())
        })
    }

    fn file(&self, slot: &Slot) -> Option<Arc<DiskFile>> {
        self.files.lock().get(&slot.number).cloned()
    }
}

/// Keeps a connection to the source, as long as the weather allows.
async fn dial(site: Arc<DestinationSite>, process: Arc<Process>, links: mpsc::Sender<NewLink>) {
    loop {
        site.world.rest(1, 150).await;
        site.world.until(|weather| !weather.is_link_down).await;
        let Some(source) = site.source.life.lock().clone().filter(|life| life.process.is_alive()) else { continue };
        let (here, there, wire) = network::connect(&site.world, &site.tap, &site.name, &site.source.name);
        site.world.note("connected", [process.life, source.process.life, 0]);
        let source_ends = Arc::clone(&wire);
        tokio::spawn(async move {
            source.serve(there);
            source.process.death.wait().await;
            source_ends.process_ended(Side::Source);
        });
        *site.wire.lock() = Some(Arc::clone(&wire));
        if links.send(here).await.is_err() {
            return;
        }
        wire.has_ended(Side::Destination).await;
    }
}

impl DestinationLife {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().push(tokio::spawn(task));
    }

    fn parts(&self, slot: &Slot, image: Image, geometry: Geometry, is_owner: bool) -> VolumeParts {
        VolumeParts {
            name: slot.name.clone(),
            incarnation: slot.incarnation(),
            image: Arc::new(image),
            geometry,
            state: Arc::clone(&self.state),
            workers: self.workers.clone(),
            is_owner,
        }
    }

    fn world(&self) -> &Shared {
        &self.site.world
    }

    /// Something cannot be that is: unless the process died over it.
    fn fail(&self, what: String) {
        if self.process.is_alive() {
            self.world().fail("relocation", what);
        }
    }

    fn restore(self: &Arc<Self>, slot: &Arc<Slot>, record: Record) {
        let Some(file) = self.site.file(slot) else {
            return self.fail(format!("{}: a record without a file", slot.name));
        };
        let (image, geometry) = (file.open(&self.process, slot.name.as_str()), record.geometry());
        if record.phase == ARRIVED {
            let volume = Arc::new(Volume::complete(self.parts(slot, image, geometry, true)));
            slot.serve(Arc::clone(&volume), &self.process);
            self.spawn(Arc::clone(self).tell(Arc::clone(slot), record));
            return;
        }
        let volume = match Volume::relocating(self.parts(slot, image, geometry, record.phase == TAKEN), false) {
            Ok(volume) => Arc::new(volume),
            Err(error) => return self.fail(format!("{}: cannot be restored: {error}", slot.name)),
        };
        let key = self.fetch.attach(PEER, slot.name.clone(), Expected { geometry, generation: record.generation });
        self.attach(slot, &volume, key, geometry);
        self.spawn(Arc::clone(self).go_on(Arc::clone(slot), volume, key, record));
    }

    fn attach(&self, slot: &Slot, volume: &Arc<Volume>, key: VolumeKey, geometry: Geometry) {
        self.keys.lock().push(key);
        volume.set_relocation(Arc::new(Relocation::new(self.fetch.clone(), key, geometry, None)));
        slot.serve(Arc::clone(volume), &self.process);
    }

    async fn begin_until_begun(self: Arc<Self>, slot: Arc<Slot>) {
        self.world().rest(1, 1500).await;
        loop {
            match self.begin(&slot).await {
                Ok(()) => return,
                Err(error) => self.world().say(|| format!("{}: cannot be begun now: {error}", slot.name)),
            }
            self.world().rest(100, 1000).await;
        }
    }

    async fn begin(self: &Arc<Self>, slot: &Arc<Slot>) -> Result<(), VolumeError> {
        let remote = self.fetch.open(PEER, slot.name.clone()).await?;
        let (key, geometry) = (remote.key, remote.geometry);
        let file = DiskFile::new(geometry.size_bytes as usize, 100 + slot.number);
        // What an attempt left that never got as far as a record.
        self.site.files.lock().insert(slot.number, Arc::clone(&file));
        let image = file.open(&self.process, slot.name.as_str());
        let record = Record {
            phase: ARRIVING,
            epoch: remote.epoch + 1,
            generation: remote.generation,
            size_bytes: geometry.size_bytes,
        };
        let made = Volume::relocating(self.parts(slot, image, geometry, false), true)
            .and_then(|volume| record.save(&*self.state, slot).map(|()| Arc::new(volume)));
        let volume = made.inspect_err(|_| self.fetch.close(key))?;
        self.attach(slot, &volume, key, geometry);
        self.spawn(Arc::clone(self).go_on(Arc::clone(slot), volume, key, record));
        Ok(())
    }

    /// From the journalled intent to the end.
    async fn go_on(self: Arc<Self>, slot: Arc<Slot>, volume: Arc<Volume>, key: VolumeKey, mut record: Record) {
        if record.phase == ARRIVING {
            loop {
                match self.fetch.take_over(key, record.epoch).await {
                    Ok(_) => break,
                    Err(FetchError::Refused { refusal, .. }) if refusal.is_transient() => {}
                    Err(error) => return self.fail(format!("{}: the source does not let go: {error}", slot.name)),
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            record.phase = TAKEN;
            while let Err(error) = record.save(&*self.state, &slot) {
                self.world().say(|| format!("{}: {error}", slot.name));
                self.world().rest(50, 200).await;
                if !self.process.is_alive() {
                    return;
                }
            }
            slot.is_taken.store(true, Ordering::Relaxed);
            self.world().note("taken", [slot.number, record.epoch, 0]);
            volume.unfence();
        }
        slot.is_taken.store(true, Ordering::Relaxed);
        match run_bulk(Arc::clone(&volume), true).await {
            Ok(()) => {}
            Err(VolumeError::SyncFailed { .. }) => {
                self.process.needs_operator.set();
                return;
            }
            Err(error) => return self.fail(format!("{}: the copy has ended: {error}", slot.name)),
        }
        record.phase = ARRIVED;
        while let Err(error) = record.save(&*self.state, &slot) {
            self.world().say(|| format!("{}: {error}", slot.name));
            self.world().rest(50, 200).await;
            if !self.process.is_alive() {
                return;
            }
        }
        self.world().note("arrived", [slot.number, 0, 0]);
        let (of, state, geometry) = (Arc::clone(&volume), Arc::clone(&self.state), record.geometry());
        let begun = self.workers.run(Urgency::Background, move || -> Result<(), String> {
            of.forget_journal().map_err(|error| error.to_string())?;
            let (name, image) = (of.name().clone(), Arc::clone(of.image()));
            let manifest = Manifest::open_written(name.clone(), Arc::clone(&image), geometry, state);
            let manifest = Arc::new(manifest.map_err(|error| error.to_string())?);
            let source = SourceVolume { name, image, geometry, manifest, generation: 1 };
            of.set_observer(Some(Arc::new(source) as _));
            Ok(())
        });
        if let Some(Err(error)) = begun.await {
            self.world().say(|| format!("{}: cannot be a source: {error}", slot.name));
        }
        Arc::clone(&self).tell(slot, record).await;
        self.fetch.close(key);
    }

    /// Tells the source that it may let go, until it has heard.
    async fn tell(self: Arc<Self>, slot: Arc<Slot>, record: Record) {
        slot.is_taken.store(true, Ordering::Relaxed);
        slot.is_complete.set();
        loop {
            let told = async {
                let key = self.fetch.open(PEER, slot.name.clone()).await?.key;
                let told = tokio::time::timeout(Duration::from_secs(12), self.fetch.completed(key, record.epoch)).await;
                self.fetch.close(key);
                told.unwrap_or(Err(FetchError::Gone))
            };
            match told.await {
                Ok(_) => return,
                Err(error) => self.world().say(|| format!("{}: the source does not know yet: {error}", slot.name)),
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    }

    /// The operator comes when a disk has failed to sync.
    async fn look_after(self: Arc<Self>) {
        loop {
            self.process.needs_operator.wait().await;
            self.world().rest(50, 1000).await;
            self.site.restart(&self.process).await;
        }
    }
}
