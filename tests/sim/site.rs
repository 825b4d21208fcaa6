//! A site: the daemon's inventory of volumes over a disk, a database and a network of chance. It holds volumes in any role.
//! Must not know what operators and guests do with them.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use blockferry::core::ids::Name;
use blockferry::core::scheduler::Limits;
use blockferry::fetch::{Fetch, PeerKey};
use blockferry::handover::State as HeldState;
use blockferry::image::{Identity, Image, ImageError};
use blockferry::node::record::VolumeRecord;
use blockferry::node::{Inventory, InventoryParts, Outside};
use blockferry::source::{Catalog, Hasher, SourceOptions, serve_link};
use blockferry::store::{MemoryState, State, StateBatch, StateChange, Store};
use blockferry::transport::NewLink;
use blockferry::volume::Volume;
use blockferry::workers::Workers;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::disk::DiskFile;
use crate::kept::{KeptStore, OpenState, OpenStore};
use crate::model::Crash;
use crate::network::{self, Wire};
use crate::process::Process;
use crate::referee::Referee;
use crate::slot::{Served, Slot};
use crate::wiretap::{DEMAND_FLIGHTS, READAHEAD_FLIGHTS, Wiretap};
use crate::world::{Shared, Side};

/// What outlives a site's processes.
pub struct Site {
    pub world: Shared,
    pub side: Side,
    pub name: Name,
    /// By path.
    pub files: Mutex<BTreeMap<String, Arc<DiskFile>>>,
    pub state: Arc<MemoryState>,
    pub store: Arc<KeptStore>,
    pub referee: Arc<Referee>,
    pub slots: Vec<Arc<Slot>>,
    boot: Mutex<u64>,
    /// The process that runs now.
    life: Mutex<Option<Arc<Life>>>,
    /// All sites, this one, too; the position is the key. Emptied at the end, as they hold each other.
    pub all: Mutex<Vec<Arc<Site>>>,
    /// What this site's connections to each site pass by.
    taps: Mutex<BTreeMap<Side, Arc<Wiretap>>>,
    wires: Mutex<BTreeMap<Side, Arc<Wire>>>,
    /// Files that lie at these paths when it is next down.
    swaps: Mutex<Vec<(String, Arc<DiskFile>)>>,
}

/// One life of a site.
pub struct Life {
    pub process: Arc<Process>,
    pub site: Arc<Site>,
    pub inventory: Arc<Inventory>,
    pub fetch: Fetch,
    workers: Workers,
    hasher: Hasher,
    dialled: Mutex<Vec<PeerKey>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Site {
    pub fn new(world: &Shared, side: Side, referee: &Arc<Referee>, slots: &[Arc<Slot>]) -> Arc<Site> {
        Arc::new(Site {
            world: Arc::clone(world),
            side,
            name: name_of(side),
            files: Mutex::default(),
            state: Arc::new(MemoryState::new()),
            store: Arc::new(KeptStore::new()),
            referee: Arc::clone(referee),
            slots: slots.to_vec(),
            boot: Mutex::default(),
            life: Mutex::default(),
            all: Mutex::default(),
            taps: Mutex::default(),
            wires: Mutex::default(),
            swaps: Mutex::default(),
        })
    }

    /// The life that runs now.
    pub fn life(&self) -> Option<Arc<Life>> {
        self.life.lock().clone().filter(|life| life.process.is_alive())
    }

    /// What connections to another site pass by.
    pub fn tap(&self, to: Side) -> Arc<Wiretap> {
        let mut taps = self.taps.lock();
        Arc::clone(taps.entry(to).or_insert_with(|| Arc::new(Wiretap::new(&self.world))))
    }

    /// Connections that this site made.
    pub fn wires(&self) -> Vec<Arc<Wire>> {
        self.wires.lock().values().cloned().collect()
    }

    pub fn file(&self, path: &str) -> Option<Arc<DiskFile>> {
        self.files.lock().get(path).cloned()
    }

    /// A volume as guests find it here: as the daemon's NBD server does.
    pub fn serves(&self, slot: &Slot) -> Option<Served> {
        let life = self.life()?;
        let entry = life.inventory.entry(&slot.name)?;
        let (volume, part) = (entry.volume().ok()?, slot.part(self.side)?);
        (entry.record().incarnation == part.incarnation).then(|| Served {
            volume,
            process: Arc::clone(&life.process),
            part,
        })
    }

    /// A batch is in the database.
    pub fn journalled(&self, batch: &StateBatch) {
        let name = |key: &[u8]| std::str::from_utf8(key).ok()?.strip_prefix("vol/")?.parse::<Name>().ok();
        for change in batch.changes() {
            match change {
                StateChange::Put { key, value } if key.starts_with(b"vol/") => {
                    let content_of = |path: &str| self.file(path).map(|file| file.content());
                    match serde_json::from_slice::<VolumeRecord>(value) {
                        Ok(record) => self.referee.journalled(self.side, &record, &content_of),
                        Err(error) => self.world.fail("rows", error.to_string()),
                    }
                }
                StateChange::Delete { key } => {
                    if let Some(name) = name(key) {
                        self.referee.dropped(self.side, &name);
                    }
                }
                StateChange::DeletePrefix { prefix } if prefix.starts_with(b"vol/") => {
                    self.world.fail("rows", "records were deleted without a word about which".into());
                }
                _ => {}
            }
        }
    }

    /// Puts a file at a path when the site is next down.
    pub fn swap_at_restart(&self, path: &str, file: Arc<DiskFile>) {
        self.swaps.lock().push((path.to_owned(), file));
    }

    pub fn has_swaps(&self) -> bool {
        !self.swaps.lock().is_empty()
    }

    /// Starts a process. Returns when everything that is journalled is served again, or it has died over it.
    pub async fn start(self: &Arc<Self>, process: &Arc<Process>) -> Arc<Life> {
        let life = Life::new(self, process);
        *self.life.lock() = Some(Arc::clone(&life));
        let is_state_failing = self.world.weather.lock().is_state_failing;
        let started = tokio::select! {
            biased;
            () = process.death.wait() => Ok(()),
            started = life.inventory.start() => started,
        };
        if let Err(error) = started
            && process.is_alive()
        {
            self.world.fail("restart", format!("the {:?} cannot be started: {error}", self.side));
        }
        if process.is_alive() && !is_state_failing && !self.world.weather.lock().is_state_failing {
            self.look_at_what_came_back(&life);
        }
        life.spawn(Arc::clone(&life).look_after());
        life
    }

    /// A volume whose image is the one that it was is served again after every crash.
    fn look_at_what_came_back(&self, life: &Life) {
        for entry in life.inventory.entries() {
            let record = entry.record();
            let Err(why) = entry.volume() else { continue };
            let file = self.file(&record.image.display().to_string());
            let is_it = file
                .is_some_and(|file| matches!(record.noted, Some(Identity::File { inode, .. }) if inode == file.inode));
            let is_asked_for =
                matches!(record.held.state, HeldState::Asking { .. } | HeldState::GivingBack { was_owner: false, .. });
            if is_it && !is_asked_for {
                self.world.fail("restart", format!("{} at the {:?} is not served: {why}", record.name, self.side));
            }
        }
    }

    /// After the death of a process: what is left.
    pub fn bury(&self, life: &Life, has_lost_power: bool) {
        *self.life.lock() = None;
        life.tasks.lock().drain(..).for_each(|task| task.abort());
        for wire in std::mem::take(&mut *self.wires.lock()).into_values() {
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
        for part in self.slots.iter().filter_map(|slot| slot.part(self.side)) {
            part.model.lock().crash(crash);
        }
        self.files.lock().extend(self.swaps.lock().drain(..));
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
            if let Some(served) = self.serves(slot) {
                let _ = served.volume.flush().await;
            }
        }
        // By now it may fail again; then the operator comes again, too.
        if process.is_alive() && !self.world.weather.lock().is_state_failing {
            self.world.say(|| format!("the operator restarts the {:?}", self.side));
            process.die();
        }
    }

    /// Whether the end of the daemon alone would be more than is promised: its disk has failed to sync, and it has not been able to drop
    /// the rows that speak of what was lost. docs/architecture.md names this hole.
    pub fn must_not_be_killed(&self) -> bool {
        self.slots.iter().filter_map(|slot| slot.part(self.side)).any(|part| {
            let rows = self.state.scan_prefix(format!("res/{}/live/", part.incarnation).as_bytes());
            !rows.unwrap_or_default().is_empty() && self.file(&part.image).is_some_and(|file| file.has_failed_sync())
        })
    }

    /// At the end of a world: lets go of everything that holds on to it.
    pub fn close(&self) {
        if let Some(life) = self.life.lock().take() {
            life.process.die();
        }
        self.all.lock().clear();
    }

    fn to(&self, peer: &Name) -> Option<(PeerKey, Arc<Site>)> {
        let all = self.all.lock();
        let at = all.iter().position(|site| site.name == *peer)?;
        Some((PeerKey(at as u32), Arc::clone(&all[at])))
    }
}

/// What a site is called.
pub fn name_of(side: Side) -> Name {
    let name = match side {
        Side::Source => "source",
        Side::Destination => "destination",
        Side::Third => "third",
    };
    name.parse().expect("a name")
}

/// Keeps a connection to a peer, as long as the weather allows.
async fn dial(site: Arc<Site>, peer: Arc<Site>, process: Arc<Process>, links: mpsc::Sender<NewLink>) {
    loop {
        site.world.rest(1, 150).await;
        site.world.until(|weather| !weather.is_link_down).await;
        let Some(there_life) = peer.life().filter(|life| !life.process.is_starting()) else { continue };
        let tap = site.tap(peer.side);
        let (here, there, wire) = network::connect(&site.world, &tap, &site.name, &peer.name);
        site.world.note("connected", [process.life, there_life.process.life, site.side as u64]);
        let other_end = Arc::clone(&wire);
        tokio::spawn(async move {
            there_life.serve(there);
            there_life.process.death.wait().await;
            other_end.process_ended(Side::Source);
        });
        site.wires.lock().insert(peer.side, Arc::clone(&wire));
        if links.send(here).await.is_err() {
            return;
        }
        wire.has_ended(Side::Destination).await;
    }
}

impl Life {
    fn new(site: &Arc<Site>, process: &Arc<Process>) -> Arc<Life> {
        let state: Arc<dyn State> = Arc::new(OpenState {
            kept: Arc::clone(&site.state),
            process: Arc::clone(process),
            boot: format!("{} {}", site.name, site.boot.lock()).into(),
            site: Arc::clone(site),
        });
        let store: Arc<dyn Store> = Arc::new(OpenStore { kept: Arc::clone(&site.store), process: Arc::clone(process) });
        let workers = process.workers();
        let limits =
            Limits { demand_flights: DEMAND_FLIGHTS, readahead_flights: READAHEAD_FLIGHTS, ..Limits::default() };
        let fetch = Fetch::start_in_runtime(limits, store, workers.clone());
        let hasher = Hasher::start_in_runtime(workers.clone());
        let parts = InventoryParts {
            site: site.name.clone(),
            fetch: fetch.clone(),
            state,
            disk_workers: workers.clone(),
            hasher: hasher.clone(),
        };
        Arc::new_cyclic(|this: &Weak<Life>| Life {
            process: Arc::clone(process),
            site: Arc::clone(site),
            inventory: Inventory::new(parts, this.clone() as Weak<dyn Outside>),
            fetch,
            workers,
            hasher,
            dialled: Mutex::default(),
            tasks: Mutex::default(),
        })
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().push(tokio::spawn(task));
    }

    /// Serves a connection.
    fn serve(&self, link: NewLink) {
        let options = SourceOptions { site: self.site.name.clone(), zstd_level: None };
        let catalog = Arc::clone(&self.inventory) as Arc<dyn Catalog>;
        tokio::spawn(serve_link(link, catalog, self.hasher.clone(), self.workers.clone(), options));
    }

    /// The operator comes when a disk has failed to sync.
    async fn look_after(self: Arc<Self>) {
        loop {
            self.process.needs_operator.wait().await;
            self.site.world.rest(50, 1000).await;
            self.site.restart(&self.process).await;
        }
    }
}

impl Outside for Life {
    fn dial(&self, peer: &Name) -> Option<PeerKey> {
        let (key, there) = self.site.to(peer)?;
        let is_dialled = {
            let mut dialled = self.dialled.lock();
            let is_dialled = dialled.contains(&key);
            if !is_dialled {
                dialled.push(key);
            }
            is_dialled
        };
        if !is_dialled {
            let (links, new_links) = mpsc::channel(1);
            let (here, workers) = (self.site.name.clone(), self.workers.clone());
            self.fetch.add_peer(key, peer.clone(), here, new_links, workers, self.inventory.greeting(peer));
            self.spawn(dial(Arc::clone(&self.site), there, Arc::clone(&self.process), links));
        }
        Some(key)
    }

    fn peer_name(&self, peer: PeerKey) -> Option<Name> {
        self.site.all.lock().get(peer.0 as usize).map(|site| site.name.clone())
    }

    fn is_granted(&self, _peer: &Name, _volume: &Name) -> bool {
        true
    }

    fn open_image(&self, record: &VolumeRecord) -> Result<Image, ImageError> {
        let path = record.image.display().to_string();
        let file = self.site.file(&path).ok_or(ImageError::Missing { path: record.image.clone() })?;
        file.open(&self.process, &path).clipped(record.geometry.size_bytes)
    }

    fn delete_image(&self, record: &VolumeRecord, volume: Option<&Volume>) {
        let path = record.image.display().to_string();
        let noted = record.noted.clone().or_else(|| volume.and_then(|volume| volume.image().identity().ok()));
        let is_it = |file: &Arc<DiskFile>| match &noted {
            Some(Identity::File { inode, .. }) => *inode == file.inode,
            _ => false,
        };
        let mut files = self.site.files.lock();
        if self.process.may_act() && files.get(&path).is_some_and(is_it) {
            files.remove(&path);
        }
    }

    fn demand_timeout(&self) -> Option<Duration> {
        None
    }

    fn draw(&self) -> [u8; 16] {
        let (high, low) = self.site.world.random(|random| (random.next(), random.next()));
        (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
    }
}
