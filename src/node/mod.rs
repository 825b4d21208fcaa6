//! A site's daemon: the one place where store, peers, volumes, NBD and the control socket are put together.
//! The other modules must not know each other's logic; this one must not contain any of it but the order of start and stop.

mod catalog;
mod databases;
mod debts;
mod entry;
mod export;
mod instances;
mod inventory;
mod listeners;
mod owned;
mod prewarm;
pub mod record;
mod record_v1;
mod refusal;
mod relocate;
mod site;
mod status;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::config::{Config, HostPort};
use crate::control::{ApiError, ControlServer, Site};
use crate::core::ids::Name;
use crate::core::scheduler::Limits;
use crate::fetch::{Fetch, PeerKey, VolumeKey, Waiting};
use crate::image::{Image, ImageError};
use crate::nbd::{NbdLimits, NbdListener, NbdServer};
use crate::source::{Hasher, SourceOptions, serve_link};
use crate::store::{RocksStore, State, StateDb, Store, StoreOptions};
use crate::transport::{Endpoint, EndpointOptions, Identity, KeepConnected, PeerTarget, Trust, keep_connected};
use crate::units::Patience;
use crate::volume::Volume;
use crate::workers::Workers;

use databases::Databases;
pub use entry::Entry;
use export::{Found, Served, VolumeExports};
pub use inventory::{Inventory, InventoryParts, Outside};
pub use listeners::nbd_listeners;
use record::VolumeRecord;

/// How long clients' requests and peers' connections may take to end at a shutdown.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);
/// How often the log says that guests still wait for a peer.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Reads, and as many changes, that wait for disks at a time: what a queue of a fast disk takes, and what `qemu-nbd` and
/// `nbdkit` allow themselves, too.
const DISK_THREADS: usize = 16;

/// Everything that a running site has.
pub struct Node {
    config: Config,
    identity: Identity,
    endpoint: Endpoint,
    inventory: Arc<Inventory>,
    store: Arc<dyn Store>,
    /// Hashing, compressing, decompressing and verifying.
    cpu_workers: Workers,
    /// Why the last relocation of a name came to nothing, for whoever waits for it.
    failures: Mutex<BTreeMap<Name, ApiError>>,
    /// Names that NBD clients asked for here in vain, and when.
    knocks: Mutex<HashMap<Name, Instant>>,
    links: Mutex<HashMap<PeerKey, KeepConnected>>,
    peer_views: Mutex<Vec<(PeerKey, crate::fetch::PeerView)>>,
    waiting: Mutex<BTreeMap<VolumeKey, Waiting>>,
    prewarms: prewarm::Jobs,
    next_job: AtomicU64,
    began: Instant,
    this: Weak<Node>,
}

/// Runs a site until SIGTERM or SIGINT; prints one line `ready ...` on stdout when everything is served. `listeners` are
/// those that [`nbd_listeners`] made of the configuration.
pub fn run(config: Config, listeners: Vec<NbdListener>) -> Result<()> {
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(crate::workers::run_soon)
        .build()
        .context("starting the runtime")?;
    let databases = Databases::default();
    let served = runtime.block_on(async {
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(async move {
            wait_for_signal().await;
            let _ = stop.send(true);
        });
        serve(config, listeners, &databases, stopped, |line| println!("{line}")).await
    });
    drop(runtime);
    if !databases.close() && served.is_ok() {
        tracing::debug!("threads still use the databases: everything is synced, so the process ends under them");
        // SAFETY: ends the process without running destructors, which is the point: nothing is left to be written.
        unsafe { nix::libc::_exit(0) }
    }
    served
}

/// Serves until `stopped`; `ready` is called with the line to print.
async fn serve(
    config: Config,
    listeners: Vec<NbdListener>,
    databases: &Databases,
    mut stopped: watch::Receiver<bool>,
    ready: impl FnOnce(&str),
) -> Result<()> {
    // First of all: a second daemon on the same state is noticed here.
    let control = ControlServer::bind(&config.control.socket)?;
    let node = Node::start(config, databases).await?;
    let nbd = node.listen_nbd(&listeners).await?;
    let (stop_control, mut control_stopped) = watch::channel(false);
    let site: Arc<dyn Site> = Arc::clone(&node) as Arc<dyn Site>;
    let control_socket = control.socket_path().to_owned();
    let control = tokio::spawn(control.serve(site, async move {
        let _ = control_stopped.wait_for(|stop| *stop).await;
    }));
    let mut line = format!(
        "ready site={} peer={} control={}",
        node.config.site.name,
        node.endpoint.local_addr()?,
        control_socket.display()
    );
    for uri in nbd.iter().flat_map(NbdServer::uris) {
        line.push_str(&format!(" nbd={uri}"));
    }
    ready(&line);
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(%error, "systemd was not told");
    }
    let accepting = tokio::spawn(node.clone().accept_peers());
    let watching = tokio::spawn(node.clone().watch());
    let _ = stopped.wait_for(|stop| *stop).await;
    tracing::info!("stopping: clients are answered, volumes are flushed");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    accepting.abort();
    watching.abort();
    if let Some(nbd) = nbd {
        nbd.shutdown().await;
    }
    node.shut_down().await;
    let _ = stop_control.send(true);
    let _ = tokio::time::timeout(Duration::from_secs(5), control).await;
    Ok(())
}

impl Node {
    async fn start(config: Config, databases: &Databases) -> Result<Arc<Node>> {
        let state_dir = &config.site.state_dir;
        let identity = Identity::load(state_dir)?;
        let state: Arc<dyn State> = Arc::new(StateDb::open(&state_dir.join("state"))?);
        let options = StoreOptions { capacity_bytes: config.store.capacity.bytes(), ..StoreOptions::default() };
        let store: Arc<dyn Store> = Arc::new(RocksStore::open(&state_dir.join("store"), options)?);
        databases.hold(&store, &state);
        let trust = Trust::new(config.peers.iter().map(|peer| (peer.fingerprint, peer.name.clone())));
        let endpoint = Endpoint::bind(
            &config.peer.listen.to_string(),
            identity.clone(),
            Arc::new(trust),
            EndpointOptions { idle_timeout: config.peer.idle_timeout, ..EndpointOptions::default() },
        )
        .await?;
        let limits = Limits { bulk_min_share: config.bulk.min_share.get(), ..Limits::default() };
        let fetch = Fetch::start(limits, Arc::clone(&store)).context("starting the store's threads")?;
        fetch.limit_site(config.bulk.rate.as_bytes_per_s());
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let disk_workers = Workers::start("disk", DISK_THREADS, 2).context("starting the disk's threads")?;
        let cpu_workers = Workers::start("cpu", cores.min(4), cores).context("starting the worker threads")?;
        let hasher = Hasher::start().context("starting the hasher")?;
        let parts = InventoryParts { site: config.site.name.clone(), fetch, state, disk_workers, hasher };
        let node = Arc::new_cyclic(|this: &Weak<Node>| Node {
            inventory: Inventory::new(parts, this.clone() as Weak<dyn Outside>),
            cpu_workers,
            failures: Mutex::default(),
            knocks: Mutex::default(),
            links: Mutex::default(),
            peer_views: Mutex::default(),
            waiting: Mutex::default(),
            prewarms: prewarm::Jobs::default(),
            next_job: AtomicU64::new(1),
            began: Instant::now(),
            config,
            identity,
            endpoint,
            store,
            this: this.clone(),
        });
        node.inventory.start().await?;
        Ok(node)
    }

    async fn listen_nbd(self: &Arc<Self>, listeners: &[NbdListener]) -> Result<Option<NbdServer>> {
        if listeners.is_empty() {
            return Ok(None);
        }
        let exports = Arc::new(VolumeExports(Arc::clone(self) as Arc<dyn Served>));
        let limits = NbdLimits { shutdown_grace: SHUTDOWN_GRACE / 2, ..NbdLimits::default() };
        Ok(Some(NbdServer::listen_with(listeners, exports, limits).await?))
    }

    async fn accept_peers(self: Arc<Self>) {
        let options = SourceOptions {
            site: self.config.site.name.clone(),
            zstd_level: match self.config.store.compression {
                crate::config::Compression::Auto => None,
                crate::config::Compression::Level(level) => Some(i32::from(level)),
            },
        };
        while let Some(new) = self.endpoint.accept().await {
            let catalog = Arc::clone(&self.inventory) as Arc<dyn crate::source::Catalog>;
            tokio::spawn(serve_link(new, catalog, self.hasher.clone(), self.cpu_workers.clone(), options.clone()));
        }
    }

    /// Dials a peer from now on, if it has an address and is not dialled already.
    fn ensure_dialled(self: &Arc<Self>, name: &Name) -> Option<PeerKey> {
        let at = self.config.peers.iter().position(|peer| peer.name == *name)?;
        let key = PeerKey(at as u32);
        let peer = &self.config.peers[at];
        let address: &HostPort = peer.address.as_ref()?;
        let mut links = self.links.lock();
        if let std::collections::hash_map::Entry::Vacant(place) = links.entry(key) {
            let target =
                PeerTarget { name: peer.name.clone(), address: address.to_string(), fingerprint: peer.fingerprint };
            let (new_links, keeper) = keep_connected(self.endpoint.clone(), target);
            let site = self.config.site.name.clone();
            let greeting = self.inventory.greeting(&peer.name);
            self.fetch.add_peer(key, peer.name.clone(), site, new_links, self.cpu_workers.clone(), greeting);
            place.insert(keeper);
        }
        Some(key)
    }

    fn default_image(&self, name: &Name) -> PathBuf {
        self.config.site.state_dir.join("volumes").join(format!("{name}.raw"))
    }

    /// Keeps rates and peers' views fresh for whoever asks.
    async fn watch(self: Arc<Self>) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let mut said = HashMap::new();
        loop {
            tick.tick().await;
            self.look_at_peers().await;
            let entries: Vec<Arc<Entry>> = self.volumes.lock().values().cloned().collect();
            for entry in entries {
                let Ok(volume) = entry.volume() else { continue };
                self.say_who_waits(&volume, &mut said);
                entry.rate.observe(&volume.snapshot(), volume.geometry());
            }
        }
    }

    /// Takes note of how connections fare and of what volumes wait for.
    async fn look_at_peers(&self) {
        let (views, waiting) = tokio::join!(self.fetch.peers(), self.fetch.waiting());
        *self.peer_views.lock() = views;
        *self.waiting.lock() = waiting;
    }

    /// An operator looks into the log: guests that hang because of a peer are said at once, and then every minute.
    fn say_who_waits(&self, volume: &Volume, said: &mut HashMap<VolumeKey, Instant>) {
        let Some(relocation) = volume.relocation() else { return };
        let (key, reads) = (relocation.key(), relocation.waiting_demands());
        let Some(waiting) = self.waiting.lock().get(&key).cloned().filter(|_| reads > 0) else {
            said.remove(&key);
            return;
        };
        if said.get(&key).is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
            said.insert(key, Instant::now());
            let patience = relocation.demand_timeout().map_or("for ever".to_owned(), |after| format!("{after:?}"));
            tracing::warn!(volume = %volume.name(), reads, patience, "guests wait for blocks: {waiting}");
        }
    }

    async fn shut_down(&self) {
        let entries: Vec<Arc<Entry>> = self.volumes.lock().values().cloned().collect();
        for entry in &entries {
            let _ = entry.stop.send(true);
        }
        for entry in &entries {
            let Ok(volume) = entry.volume() else { continue };
            if let Err(error) = volume.flush().await {
                tracing::error!(volume = %entry.name, %error, "the last flush failed");
            }
            let source = entry.source.lock().clone();
            if let Some(source) = source
                && let Err(error) = source.manifest.seal()
            {
                tracing::warn!(volume = %entry.name, %error, "the image will be hashed again after the restart");
            }
            // Nothing is written any more: whatever lies there at the next start is compared with this.
            volume.close();
            volume.closed().await;
            self.mark(entry, false, || true);
        }
        self.links.lock().clear();
        self.endpoint.close("the site is shutting down");
        let _ = tokio::time::timeout(Duration::from_secs(2), self.endpoint.wait_idle()).await;
        if let Err(error) = self.store.flush() {
            tracing::warn!(%error, "the store could not be flushed: what it held in memory will be fetched again");
        }
        if let Err(error) = self.state.sync() {
            tracing::error!(%error, "the state database could not be synced");
        }
    }
}

impl Served for Node {
    fn names(&self) -> Vec<String> {
        self.volumes.lock().keys().map(Name::to_string).collect()
    }

    fn find(&self, name: &str) -> Option<Result<Found, String>> {
        let name = name.parse().ok()?;
        let Some(entry) = self.entry(&name) else {
            self.note_knock(&name);
            return None;
        };
        // Before the look at who owns it: what changes behind that look is heard of.
        let withdrawals = entry.withdrawals.subscribe();
        if let Some(why) = entry.record().held.state.not_served() {
            self.note_knock(&name);
            return Some(Err(why));
        }
        match entry.volume() {
            Ok(volume) => Some(Ok(Found { volume, clients: Arc::clone(&entry.clients), withdrawals })),
            Err(why) => {
                let hint = "when it is mended, restart the daemon";
                Some(Err(format!("volume {name} cannot be served: {why}; {hint}")))
            }
        }
    }
}

/// The volumes are the inventory's, which the simulation runs, too.
impl std::ops::Deref for Node {
    type Target = Arc<Inventory>;
    fn deref(&self) -> &Arc<Inventory> {
        &self.inventory
    }
}

impl Outside for Node {
    fn dial(&self, peer: &Name) -> Option<PeerKey> {
        self.this.upgrade().and_then(|node| node.ensure_dialled(peer))
    }

    fn peer_name(&self, peer: PeerKey) -> Option<Name> {
        self.config.peers.get(peer.0 as usize).map(|peer| peer.name.clone())
    }

    fn is_granted(&self, peer: &Name, volume: &Name) -> bool {
        self.config.peer(peer).is_some_and(|peer| peer.volumes.includes(volume))
    }

    fn open_image(&self, record: &VolumeRecord) -> Result<Image, ImageError> {
        Image::open_known(&record.image, record.geometry.size_bytes)
    }

    fn delete_image(&self, record: &VolumeRecord, volume: Option<&Volume>) {
        owned::delete_made(record, volume);
    }

    fn demand_timeout(&self) -> Option<Duration> {
        match self.config.demand.timeout {
            Patience::Forever => None,
            Patience::For(timeout) => Some(timeout),
        }
    }

    fn draw(&self) -> [u8; 16] {
        random()
    }
}

/// Random bytes. Without entropy: nanoseconds and a counter do nearly as well for numbers that only have to differ.
fn random<const BYTES: usize>() -> [u8; BYTES] {
    use ring::rand::SecureRandom;
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut bytes = [0; BYTES];
    if ring::rand::SystemRandom::new().fill(&mut bytes).is_err() {
        let now = std::time::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_nanos());
        let count = COUNTER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let hash = blake3::hash(format!("{now} {count} {}", std::process::id()).as_bytes());
        bytes.iter_mut().zip(hash.as_bytes()).for_each(|(byte, random)| *byte = *random);
    }
    bytes
}

async fn wait_for_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (terminate, interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    match (terminate, interrupt) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}

/// RocksDB, sockets and images all want descriptors; the soft limit of many systems is 1,024.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let wanted = hard.min(65_536);
        if soft < wanted
            && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)
        {
            tracing::warn!(%error, "the limit of open files could not be raised");
        }
    }
}
