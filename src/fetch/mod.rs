//! Drives the fetch scheduler: the store before the wire, one flight per id, every block verified before anybody gets it.
//! Must not know NBD, nor where a volume keeps its blocks.

mod actor;
mod lanes;
mod link;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::core::frame::Frame;
use crate::core::ids::{BlockId, BlockIndex, Class, Name, Nonce};
use crate::core::manifest::{Geometry, Page, PageId, PageIndex};
use crate::core::scheduler::{Limits, Place, WaiterId, WantBlock};
use crate::core::wire::{Refusal, RootEntry};
use crate::handover::Question;
use crate::store::Store;
use crate::transport::NewLink;
use crate::workers::Workers;

pub use crate::core::scheduler::{PeerKey, VolumeKey};

/// Where a block came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The peer said that it is zero: nothing crossed the wire but that.
    Zero,
    /// This site's store.
    Store,
    /// The peer.
    Wire,
    /// The peer, but another volume had asked already: it crossed the wire once for both.
    Joined,
    /// As [`Origin::Wire`], and somebody else of the same volume was answered as that.
    Shared,
}

/// A verified block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its id.
    pub id: BlockId,
    /// Its bytes: all of the block, zeros included.
    pub bytes: Bytes,
    /// Where it came from.
    pub origin: Origin,
    /// Bytes of the message that brought it; 0 unless `origin` is [`Origin::Wire`].
    pub wire_bytes: u64,
    /// As what it travelled in the end.
    pub class: Class,
    /// Counts the bytes against the memory for bulk until they have landed.
    pub budget: Option<Arc<tokio::sync::OwnedSemaphorePermit>>,
}

/// Why a block, a page or an answer did not come.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// The peer says no, and asking again will not help.
    #[error("peer {peer}: {why}")]
    Refused {
        /// Who.
        peer: Name,
        /// Why, for programs.
        refusal: Refusal,
        /// The epoch that holds there; 0 where it said none.
        epoch: u64,
        /// Why, for people.
        why: String,
    },
    /// The peer's image is not what it announced.
    #[error("peer {peer}, volume {volume}: {why}")]
    Inconsistent {
        /// Who.
        peer: Name,
        /// Which volume.
        volume: Name,
        /// What does not fit.
        why: String,
    },
    /// A source announced a page of a manifest anew, and otherwise than before.
    #[error(
        "the source contradicts itself: page {page} of the manifest was announced as {announced}, and {told} came; its image was changed: \
         put back what it was, or cancel the relocation"
    )]
    Contradiction {
        /// Which page.
        page: u64,
        /// Its id as it was announced first, in hex.
        announced: String,
        /// What came later.
        told: String,
    },
    /// The volume was given up, or the site is shutting down.
    #[error("the volume was given up while the block was on its way")]
    Gone,
    /// No such peer is configured.
    #[error("no peer of that name is configured")]
    UnknownPeer,
}

/// A volume at a peer, as it was opened.
#[derive(Clone, Debug)]
pub struct Remote {
    /// What to call it from now on.
    pub key: VolumeKey,
    /// Its shape.
    pub geometry: Geometry,
    /// The source's count of contents.
    pub generation: u64,
    /// The epoch at which the source owns it, or has released it to us.
    pub epoch: u64,
    /// Whether its guests may only read it.
    pub is_read_only: bool,
}

/// What a peer says of a volume's epoch without having been asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Who.
    pub peer: PeerKey,
    /// Of which volume.
    pub volume: Name,
    /// Which epoch holds there.
    pub epoch: u64,
}

/// Which instance of this site a peer is told that it talks to. Calls may wait for the disk.
pub trait Greeting: Send + Sync + 'static {
    /// What the peer last accepted, and what it is told now.
    fn offer(&self) -> Result<(Nonce, Nonce), String>;
    /// The peer took note.
    fn accepted(&self);
    /// The peer says that another instance was there since.
    fn turned_away(&self, why: &str);
}

/// A greeting without a memory: for tests, and for whoever asks for nothing but blocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stranger;

impl Greeting for Stranger {
    fn offer(&self) -> Result<(Nonce, Nonce), String> {
        Ok(Default::default())
    }

    fn accepted(&self) {}

    fn turned_away(&self, _: &str) {}
}

/// What must still hold when a volume is opened again after a lost link or a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its shape.
    pub geometry: Geometry,
    /// The source's count of contents.
    pub generation: u64,
}

/// How a peer's connection fares.
#[derive(Clone, Debug, Default)]
pub struct PeerView {
    /// Whether blocks can be asked for now.
    pub is_up: bool,
    /// Why not, as far as is known.
    pub last_error: Option<String>,
    /// Smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// The sender's window in bytes (ours: requests).
    pub cwnd_bytes: Option<u64>,
    /// Times that the connection was made.
    pub connects: u64,
}

/// What keeps a volume's absent blocks from coming, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The peer that is waited for.
    pub peer: Name,
    /// What is the matter with it, as far as is known; empty if nothing is.
    pub why: String,
    /// Since when.
    pub since: SystemTime,
    /// Whether there is a connection: then it is the volume that the peer does not open.
    pub is_connected: bool,
}

impl std::fmt::Display for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = if self.is_connected { "does not open the volume" } else { "cannot be reached" };
        write!(f, "{} {what} since {}", self.peer, humantime::format_rfc3339_seconds(self.since))?;
        if self.why.is_empty() { Ok(()) } else { write!(f, ": {}", self.why) }
    }
}

/// A handle to the site's one fetcher; cheap to share.
#[derive(Clone)]
pub struct Fetch {
    inner: Arc<Inner>,
}

struct Inner {
    commands: mpsc::UnboundedSender<Command>,
    next_waiter: AtomicU64,
    next_volume: AtomicU32,
    store: lanes::StoreLanes,
    budget: Arc<tokio::sync::Semaphore>,
}

/// A share of the memory for bulk, held by everybody who holds the bytes.
type Budgeted = Option<Arc<tokio::sync::OwnedSemaphorePermit>>;

/// Bytes of bulk blocks (raw) between their arrival, from the store or the wire, and the volume's file, in KiB.
const BULK_BUDGET_KIB: usize = 64 << 10;

/// What travels to the actor.
enum Command {
    AddPeer { peer: PeerKey, name: Name },
    Link { peer: PeerKey, generation: u64, new: Arc<dyn crate::transport::Link> },
    LinkLost { peer: PeerKey, generation: u64, why: String },
    LinkTrouble { peer: PeerKey, why: String },
    Control { peer: PeerKey, generation: u64, frame: crate::core::wire::Control },
    Arrived { peer: PeerKey, generation: u64, message: link::Arrived },
    Open { key: VolumeKey, peer: PeerKey, name: Name, expected: Option<Expected>, reply: Option<Reply<Remote>> },
    Ask { key: VolumeKey, what: Ask },
    AskPeer { number: u64, peer: PeerKey, what: Ask },
    Withdraw { number: u64 },
    Listen { heard: mpsc::UnboundedSender<Heard> },
    Want { want: WantBlock, reply: Reply<Block> },
    Cancel { waiter: WaiterId },
    LookedUp { flight: crate::core::scheduler::FlightId, hit: Option<Bytes>, budget: Budgeted },
    Stored { ids: Vec<BlockId> },
    Pace { key: VolumeKey, is_paused: bool, rate_bytes_per_s: Option<u64> },
    LimitSite { bytes_per_s: Option<u64> },
    Close { key: VolumeKey },
    Peers { reply: oneshot::Sender<Vec<(PeerKey, PeerView)>> },
    Waiting { reply: oneshot::Sender<BTreeMap<VolumeKey, Waiting>> },
}

type Reply<T> = oneshot::Sender<Result<T, FetchError>>;

/// A question; asked again on every new connection until it is answered.
enum Ask {
    /// Who owns a volume, or is to.
    Owner(Name, Question, Reply<u64>),
    Page(PageIndex, Reply<(Page, Frame)>),
    Roots(PageIndex, u32, Reply<Vec<RootEntry>>),
}

impl Fetch {
    /// Starts the actor and the threads that read and write the store. Ends when the last handle is dropped.
    pub fn start(limits: Limits, store: Arc<dyn Store>) -> std::io::Result<Fetch> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let budget = Arc::new(tokio::sync::Semaphore::new(BULK_BUDGET_KIB));
        let lanes = lanes::StoreLanes::start(store, Arc::clone(&budget), commands.downgrade())?;
        Ok(Fetch::over(limits, lanes, commands, inbox, budget))
    }

    /// As [`Fetch::start`] without threads: `workers` run the store's calls.
    pub fn start_in_runtime(limits: Limits, store: Arc<dyn Store>, workers: Workers) -> Fetch {
        let (commands, inbox) = mpsc::unbounded_channel();
        let budget = Arc::new(tokio::sync::Semaphore::new(BULK_BUDGET_KIB));
        let lanes = lanes::StoreLanes::start_in_runtime(store, Arc::clone(&budget), commands.downgrade(), workers);
        Fetch::over(limits, lanes, commands, inbox, budget)
    }

    fn over(
        limits: Limits,
        lanes: lanes::StoreLanes,
        commands: mpsc::UnboundedSender<Command>,
        inbox: mpsc::UnboundedReceiver<Command>,
        budget: Arc<tokio::sync::Semaphore>,
    ) -> Fetch {
        tokio::spawn(actor::run(limits, lanes.clone(), inbox, Arc::clone(&budget)));
        let (next_waiter, next_volume) = (AtomicU64::new(1), AtomicU32::new(1));
        Fetch { inner: Arc::new(Inner { commands, next_waiter, next_volume, store: lanes, budget }) }
    }

    /// A peer whose connections come out of `links`, each replacing the one before.
    pub fn add_peer(
        &self,
        peer: PeerKey,
        name: Name,
        site: Name,
        links: mpsc::Receiver<NewLink>,
        workers: Workers,
        greeting: Arc<dyn Greeting>,
    ) {
        self.send(Command::AddPeer { peer, name });
        let budget = Arc::clone(&self.inner.budget);
        let hello = link::Hello { site, greeting };
        link::follow(peer, hello, links, workers, budget, self.inner.commands.downgrade());
    }

    /// Something kept a connection from coming about: shown as the peer's last error.
    pub fn note_trouble(&self, peer: PeerKey, why: String) {
        self.send(Command::LinkTrouble { peer, why });
    }

    /// Takes up a volume that was opened before this daemon was restarted: blocks can be wanted at once, and come when the
    /// peer can be reached.
    pub fn attach(&self, peer: PeerKey, name: Name, expected: Expected) -> VolumeKey {
        let key = VolumeKey(self.inner.next_volume.fetch_add(1, Ordering::Relaxed));
        self.send(Command::Open { key, peer, name, expected: Some(expected), reply: None });
        key
    }

    /// Opens a peer's volume, now or as soon as the peer can be reached.
    pub async fn open(&self, peer: PeerKey, name: Name) -> Result<Remote, FetchError> {
        let key = VolumeKey(self.inner.next_volume.fetch_add(1, Ordering::Relaxed));
        let guard = CloseOnDrop { fetch: self, key, is_armed: true };
        let opened = self.request(|reply| Command::Open { key, peer, name, expected: None, reply: Some(reply) }).await;
        let mut guard = guard;
        guard.is_armed = opened.is_err();
        opened
    }

    /// Asks a peer who owns a volume, or is to, now or as soon as it can be reached; the answer is the epoch that holds there. Dropping
    /// it withdraws the question, as far as it is not on its way.
    pub async fn ask(&self, peer: PeerKey, volume: Name, question: Question) -> Result<u64, FetchError> {
        let number = self.inner.next_waiter.fetch_add(1, Ordering::Relaxed);
        let withdraw = WithdrawOnDrop { fetch: self, number };
        let asked = self.request(|reply| {
            let what = Ask::Owner(volume, question, reply);
            Command::AskPeer { number, peer, what }
        });
        let answer = asked.await;
        std::mem::forget(withdraw);
        answer
    }

    /// What peers say of their volumes' epochs when they open them, or refuse to. Whoever asked last hears it.
    pub fn listen(&self) -> mpsc::UnboundedReceiver<Heard> {
        let (heard, hears) = mpsc::unbounded_channel();
        self.send(Command::Listen { heard });
        hears
    }

    /// What the source knows of its manifest's pages.
    pub async fn roots(&self, key: VolumeKey, first: PageIndex, count: u32) -> Result<Vec<RootEntry>, FetchError> {
        self.request(|reply| Command::Ask { key, what: Ask::Roots(first, count, reply) }).await
    }

    /// A manifest page: a page is content, so that one that a sibling brought is not sent again.
    pub async fn page(
        &self,
        key: VolumeKey,
        page: PageIndex,
        id: Option<PageId>,
        ids: u64,
    ) -> Result<Page, FetchError> {
        if let Some(id) = id
            && let Some(bytes) = self.inner.store.get(BlockId(id.0)).await
            && let Ok(kept) = Page::from_bytes(&bytes, ids)
        {
            return Ok(kept);
        }
        let (page, frame) = self.request(|reply| Command::Ask { key, what: Ask::Page(page, reply) }).await?;
        if !page.is_zero() {
            self.inner.store.put(BlockId(page.id().0), frame, None);
        }
        Ok(page)
    }

    /// Wants a block. Dropping the answer gives the want up.
    pub fn want(&self, key: VolumeKey, block: BlockIndex, id: Option<BlockId>, class: Class, len_bytes: u32) -> Wanted {
        let waiter = WaiterId(self.inner.next_waiter.fetch_add(1, Ordering::Relaxed));
        let (reply, answer) = oneshot::channel();
        let place = Place { volume: key, block };
        self.send(Command::Want { want: WantBlock { waiter, place, id, class, len_bytes }, reply });
        Wanted { answer, cancel: Some((self.inner.commands.clone(), waiter)) }
    }

    /// Pauses, resumes and limits a volume's bulk.
    pub fn pace(&self, key: VolumeKey, is_paused: bool, rate_bytes_per_s: Option<u64>) {
        self.send(Command::Pace { key, is_paused, rate_bytes_per_s });
    }

    /// Bounds the bulk of all volumes together, in wire bytes per second.
    pub fn limit_site(&self, bytes_per_s: Option<u64>) {
        self.send(Command::LimitSite { bytes_per_s });
    }

    /// Nothing more is wanted of this volume.
    pub fn close(&self, key: VolumeKey) {
        self.send(Command::Close { key });
    }

    /// How the peers' connections fare.
    pub async fn peers(&self) -> Vec<(PeerKey, PeerView)> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Peers { reply });
        answer.await.unwrap_or_default()
    }

    /// What keeps volumes from being fetched now; those that nothing keeps are not among them.
    pub async fn waiting(&self) -> BTreeMap<VolumeKey, Waiting> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Waiting { reply });
        answer.await.unwrap_or_default()
    }

    fn send(&self, command: Command) {
        // It fails only while the runtime is going down; the caller's reply slot tells it so.
        let _ = self.inner.commands.send(command);
    }

    async fn request<T>(&self, make: impl FnOnce(Reply<T>) -> Command) -> Result<T, FetchError> {
        let (reply, answer) = oneshot::channel();
        self.send(make(reply));
        answer.await.unwrap_or(Err(FetchError::Gone))
    }
}

/// The answer to [`Fetch::want`], to be awaited.
#[must_use = "dropping it gives the want up"]
pub struct Wanted {
    answer: oneshot::Receiver<Result<Block, FetchError>>,
    cancel: Option<(mpsc::UnboundedSender<Command>, WaiterId)>,
}

impl Future for Wanted {
    type Output = Result<Block, FetchError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.answer).poll(cx).map(|answer| {
            self.cancel = None;
            answer.unwrap_or(Err(FetchError::Gone))
        })
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        if let Some((commands, waiter)) = self.cancel.take() {
            let _ = commands.send(Command::Cancel { waiter });
        }
    }
}

struct WithdrawOnDrop<'a> {
    fetch: &'a Fetch,
    number: u64,
}

impl Drop for WithdrawOnDrop<'_> {
    fn drop(&mut self) {
        self.fetch.send(Command::Withdraw { number: self.number });
    }
}

struct CloseOnDrop<'a> {
    fetch: &'a Fetch,
    key: VolumeKey,
    is_armed: bool,
}

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        if self.is_armed {
            self.fetch.close(self.key);
        }
    }
}

#[cfg(test)]
mod tests;
