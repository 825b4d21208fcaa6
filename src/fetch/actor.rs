//! The one owner of the scheduler and of who waits for what. It decides nothing: it turns messages into the scheduler's
//! inputs and the scheduler's actions into messages.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::Instant;

use super::lanes::StoreLanes;
use super::link::Arrived;
use super::{
    Ask, BULK_BUDGET_KIB, Block, Budgeted, Command, Expected, FetchError, Heard, Origin, PeerKey, PeerView, Remote,
    Reply, VolumeKey, Waiting as WaitingFor,
};
use crate::core::frame::Frame;
use crate::core::ids::{BlockId, Class, Name};
use crate::core::manifest::Page;
use crate::core::scheduler::{Action, Failure, FlightId, Landed, Limits, Now, Place, Scheduler, WaiterId, WantBlock};
use crate::core::wire::{Control, MAX_WANTS_PER_FRAME, Refusal, Want};
use crate::handover;
use crate::transport::Link;

/// How often windows are set anew and rates are judged.
const TICK: Duration = Duration::from_millis(250);
/// The least time between two openings of a volume because what was opened is gone.
const REOPEN_GONE: Duration = Duration::from_secs(1);
/// A peer that refuses to open a volume (it was restarted without it, say) is asked again this often.
const REOPEN: Duration = Duration::from_secs(5);
/// Numbers of pages and roots on the wire, apart from those of blocks.
const ASK_FLIGHTS: u64 = 1 << 63;
/// A question that was never sent is kept under a number of its own; once sent, under its request's.
const UNSENT: u64 = 1 << 62;
/// Pages and roots that one peer is asked for at a time, of all volumes together: a source hashes them one after the
/// other, and hangs up on a peer that asks for more than 256.
const MAX_OPEN_PAGES: usize = 128;
/// Blocks that came without a share of bulk's memory and wait to be written to the store, in bytes. Beyond it they are
/// not kept: the store is a cache.
const MAX_UNSTORED_BYTES: usize = 64 << 20;

struct Peer {
    name: Name,
    link: Option<Arc<dyn Link>>,
    /// Control frames on their way into the link.
    outgoing: Option<UnboundedSender<Bytes>>,
    generation: u64,
    last_error: Option<String>,
    /// Since when there is no connection.
    down_since: Option<SystemTime>,
    connects: u64,
    /// Volumes whose Open has not been answered on this connection.
    opening: usize,
    is_announced: bool,
    raw_bulk_bytes: u64,
    raw_bulk_rate: f64,
    outbox: Vec<Want>,
}

struct Volume {
    peer: PeerKey,
    name: Name,
    expected: Option<Expected>,
    handle: Option<u32>,
    waiting: Option<Reply<Remote>>,
    is_scheduled: bool,
    reopen_at: Option<Now>,
    /// When the peer last said that what was opened is gone.
    gone_at: Option<Now>,
    /// Why the peer does not open it, and since when.
    refused: Option<(String, SystemTime)>,
}

struct Question {
    to: To,
    what: Ask,
    is_sent: bool,
    /// The handle that it was sent with, if it is of a volume.
    sent_with: Option<u32>,
}

/// Whom a question goes to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    /// The peer of a volume that is open there.
    Volume(VolumeKey),
    /// A peer; the number is the asker's.
    Peer(PeerKey, u64),
}

struct Waiting {
    reply: Reply<Block>,
    len_bytes: u32,
    expected: Option<BlockId>,
}

struct Actor {
    began: Instant,
    scheduler: Scheduler,
    lanes: StoreLanes,
    peers: BTreeMap<PeerKey, Peer>,
    volumes: BTreeMap<VolumeKey, Volume>,
    questions: BTreeMap<u64, Question>,
    next_question: u64,
    /// Opens on the wire by their number, also of volumes that were closed since: their answers are counted.
    opens: HashMap<u32, (PeerKey, VolumeKey)>,
    next_request: u32,
    /// The handles that flights under way were sent with.
    sent_with: HashMap<FlightId, u32>,
    /// Handles that are given up with the next frames.
    closing: Vec<(PeerKey, u32)>,
    /// Who wants to know what peers say of their volumes' epochs.
    heard: Option<UnboundedSender<Heard>>,
    waiters: HashMap<WaiterId, Waiting>,
    /// Verified and not in the store yet, with whoever sent it: answered from here.
    unstored: HashMap<BlockId, (Bytes, PeerKey)>,
    unstored_bytes: usize,
    budget: Arc<Semaphore>,
}

/// Runs until every [`super::Fetch`] is dropped.
pub(super) async fn run(
    limits: Limits,
    lanes: StoreLanes,
    mut inbox: UnboundedReceiver<Command>,
    budget: Arc<Semaphore>,
) {
    let mut actor = Actor {
        began: Instant::now(),
        scheduler: Scheduler::new(limits),
        lanes,
        peers: BTreeMap::new(),
        volumes: BTreeMap::new(),
        questions: BTreeMap::new(),
        next_question: 1,
        opens: HashMap::new(),
        next_request: 1,
        sent_with: HashMap::new(),
        closing: Vec::new(),
        heard: None,
        waiters: HashMap::new(),
        unstored: HashMap::new(),
        unstored_bytes: 0,
        budget,
    };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let deadline = actor.scheduler.deadline().map(|at| actor.began + at);
        let timer = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // In this order: commands never stop while there is much to do, and the clock's turn comes seldom.
            biased;
            _ = tick.tick() => actor.tick(),
            command = inbox.recv() => {
                let Some(command) = command else { return };
                actor.handle(command);
                // One frame of wants for everything that is there already.
                for _ in 0..256 {
                    let Ok(command) = inbox.try_recv() else { break };
                    actor.handle(command);
                }
            }
            () = timer => {
                let now = actor.now();
                actor.scheduler.tick(now);
            }
        }
        actor.act();
    }
}

impl Actor {
    fn now(&self) -> Now {
        self.began.elapsed()
    }

    fn handle(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::AddPeer { peer, name } => {
                self.peers.insert(
                    peer,
                    Peer {
                        name,
                        link: None,
                        outgoing: None,
                        generation: 0,
                        last_error: None,
                        down_since: Some(SystemTime::now()),
                        connects: 0,
                        opening: 0,
                        is_announced: false,
                        raw_bulk_bytes: 0,
                        raw_bulk_rate: 0.0,
                        outbox: Vec::new(),
                    },
                );
            }
            Command::Link { peer, generation, new } => self.link_up(peer, generation, new),
            Command::LinkLost { peer, generation, why } => self.link_lost(peer, generation, why),
            Command::LinkTrouble { peer, why } => {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.last_error = Some(why);
                }
            }
            Command::Control { peer, generation, frame } => {
                if self.peers.get(&peer).is_some_and(|p| p.generation == generation && p.link.is_some()) {
                    self.control(peer, frame);
                }
            }
            Command::Arrived { peer, generation, message } => {
                // A block of an earlier connection is as good as any; its number is not: the scheduler has asked again.
                if self.peers.get(&peer).is_some_and(|p| p.generation == generation) {
                    self.arrived(peer, message);
                }
            }
            Command::Open { key, peer, name, expected, reply } => {
                if !self.peers.contains_key(&peer)
                    && let Some(reply) = reply
                {
                    let _ = reply.send(Err(FetchError::UnknownPeer));
                    return;
                }
                if expected.is_some() {
                    self.scheduler.add_volume(key, peer);
                }
                let volume = Volume {
                    peer,
                    name,
                    expected,
                    handle: None,
                    waiting: reply,
                    is_scheduled: expected.is_some(),
                    reopen_at: None,
                    gone_at: None,
                    refused: None,
                };
                self.volumes.insert(key, volume);
                self.send_open(key);
            }
            Command::Ask { key, what } => {
                self.question(To::Volume(key), what);
            }
            Command::AskPeer { number, peer, what } => {
                if !self.peers.contains_key(&peer) {
                    return what.fail(FetchError::UnknownPeer);
                }
                self.question(To::Peer(peer, number), what);
            }
            Command::Withdraw { number } => {
                self.questions.retain(|_, question| !matches!(question.to, To::Peer(_, asker) if asker == number));
            }
            Command::Listen { heard } => self.heard = Some(heard),
            Command::Want { want, reply } => self.want(now, want, reply),
            Command::Cancel { waiter } => {
                self.waiters.remove(&waiter);
                self.scheduler.cancel(now, waiter);
            }
            Command::LookedUp { flight, hit, budget } => {
                let landed = self.scheduler.looked_up(now, flight, hit.is_some());
                if let (Some(landed), Some(bytes)) = (landed, hit) {
                    self.answer(landed, &bytes, Origin::Store, None, 0, None, &budget);
                }
            }
            Command::Stored { ids } => {
                for id in ids {
                    let stored = self.unstored.remove(&id).map_or(0, |(bytes, _)| bytes.len());
                    self.unstored_bytes = self.unstored_bytes.saturating_sub(stored);
                }
            }
            Command::Pace { key, is_paused, rate_bytes_per_s } => {
                self.scheduler.set_paused(now, key, is_paused);
                self.scheduler.set_rate(now, key, rate_bytes_per_s);
            }
            Command::LimitSite { bytes_per_s } => self.scheduler.set_site_rate(now, bytes_per_s),
            Command::Close { key } => self.close(now, key),
            Command::Peers { reply } => {
                let _ = reply.send(self.peers.iter().map(|(key, peer)| (*key, peer.view())).collect());
            }
            Command::Waiting { reply } => {
                let waiting = self.volumes.iter().filter_map(|(key, volume)| Some((*key, self.waiting_for(volume)?)));
                let _ = reply.send(waiting.collect());
            }
        }
    }

    fn question(&mut self, to: To, what: Ask) {
        let number = UNSENT | self.next_question;
        self.next_question += 1;
        self.questions.insert(number, Question { to, what, is_sent: false, sent_with: None });
        self.send_unsent();
    }

    /// The peer that a question goes to; None if its volume is gone.
    fn peer_of(&self, to: To) -> Option<PeerKey> {
        match to {
            To::Volume(key) => self.volumes.get(&key).map(|volume| volume.peer),
            To::Peer(peer, _) => Some(peer),
        }
    }

    fn hear(&self, peer: PeerKey, volume: &Name, epoch: u64) {
        if let Some(heard) = self.heard.as_ref().filter(|_| epoch > 0) {
            let _ = heard.send(Heard { peer, volume: volume.clone(), epoch });
        }
    }

    fn link_up(&mut self, key: PeerKey, generation: u64, link: Arc<dyn Link>) {
        let Some(peer) = self.peers.get_mut(&key) else { return };
        peer.outgoing = Some(forward(Arc::clone(&link)));
        peer.link = Some(link);
        peer.generation = generation;
        peer.connects += 1;
        peer.last_error = None;
        peer.down_since = None;
        peer.opening = 0;
        peer.is_announced = false;
        tracing::info!(peer = %peer.name, connects = peer.connects, "connected");
        let volumes: Vec<VolumeKey> =
            self.volumes.iter().filter(|(_, volume)| volume.peer == key).map(|(key, _)| *key).collect();
        for volume in volumes {
            self.send_open(volume);
        }
        self.announce(key);
        self.send_unsent();
    }

    fn link_lost(&mut self, key: PeerKey, generation: u64, why: String) {
        let now = self.now();
        let Some(peer) = self.peers.get_mut(&key) else { return };
        if peer.generation > generation {
            return;
        }
        tracing::warn!(peer = %peer.name, why, "the connection is lost or did not come about");
        peer.last_error = Some(why);
        peer.down_since.get_or_insert_with(SystemTime::now);
        peer.link = None;
        peer.outgoing = None;
        peer.is_announced = false;
        peer.outbox.clear();
        for volume in self.volumes.values_mut().filter(|volume| volume.peer == key) {
            volume.handle = None;
        }
        self.opens.retain(|_, (peer, _)| *peer != key);
        // They were the lost connection's.
        self.closing.retain(|(peer, _)| *peer != key);
        let volumes = &self.volumes;
        for question in self.questions.values_mut() {
            let is_of_peer = match question.to {
                To::Volume(of) => volumes.get(&of).is_some_and(|volume| volume.peer == key),
                To::Peer(peer, _) => peer == key,
            };
            if is_of_peer {
                question.is_sent = false;
            }
        }
        self.scheduler.peer_down(now, key);
        let scheduler = &self.scheduler;
        self.sent_with.retain(|flight, _| scheduler.asked(*flight).is_some());
    }

    fn send_open(&mut self, key: VolumeKey) {
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        let Some(peer) = self.peers.get_mut(&volume.peer) else { return };
        if peer.link.is_none() {
            return;
        }
        volume.reopen_at = None;
        let request = self.next_request;
        self.next_request = self.next_request.wrapping_add(1);
        self.opens.insert(request, (volume.peer, key));
        if !peer.is_announced {
            peer.opening += 1;
        }
        let frame = Control::Open { request, volume: volume.name.clone() };
        peer.send(&frame);
    }

    /// Wants are sent once every volume has been opened on this connection, so that none is refused needlessly.
    fn announce(&mut self, key: PeerKey) {
        let now = self.now();
        let Some(peer) = self.peers.get_mut(&key) else { return };
        if peer.link.is_some() && peer.opening == 0 && !peer.is_announced {
            peer.is_announced = true;
            self.scheduler.peer_up(now, key);
        }
    }

    fn control(&mut self, key: PeerKey, frame: Control) {
        match frame {
            Control::Opened { request, handle, geometry, generation, epoch, is_read_only } => {
                let Some(volume_key) = self.take_open(key, request) else { return };
                if !self.volumes.contains_key(&volume_key) {
                    // Closed while its answer was on the way.
                    self.closing.push((key, handle));
                }
                let remote = Remote { key: volume_key, geometry, generation, epoch, is_read_only };
                self.opened(volume_key, remote, handle);
                self.after_open(key);
            }
            Control::Done { request, epoch } => {
                let number = u64::from(request);
                let is_of_pages = self.questions.get(&number).is_some_and(|question| question.what.is_of_pages());
                if self.is_asked(key, number)
                    && !is_of_pages
                    && let Some(Question { what, .. }) = self.questions.remove(&number)
                    && let Ask::Owner(_, _, reply) = what
                {
                    let _ = reply.send(Ok(epoch));
                }
            }
            Control::Refused { request, refusal, epoch, why } => {
                let Some(peer) = self.peers.get(&key).map(|peer| peer.name.clone()) else { return };
                let error = FetchError::Refused { peer, refusal, epoch, why };
                if let Some(volume_key) = self.take_open(key, request) {
                    if let Some(volume) = self.volumes.get(&volume_key) {
                        self.hear(key, &volume.name, epoch);
                    }
                    self.open_refused(volume_key, error);
                    self.after_open(key);
                } else if self.is_asked(key, u64::from(request))
                    && let Some(question) = self.questions.remove(&u64::from(request))
                {
                    question.what.fail(error);
                }
            }
            other => {
                tracing::warn!(?other, "the peer sent a frame that only a destination sends; the connection is closed");
                if let Some(link) = self.peers.get(&key).and_then(|peer| peer.link.as_ref()) {
                    link.close("a frame that only a destination sends");
                }
            }
        }
    }

    /// The volume of an Open that this peer was sent. Numbers are guessed easily: one peer must not answer for another.
    fn take_open(&mut self, peer: PeerKey, request: u32) -> Option<VolumeKey> {
        self.opens.get(&request).filter(|(asked, _)| *asked == peer)?;
        self.opens.remove(&request).map(|(_, volume)| volume)
    }

    /// Whether this peer was sent the question of this number on the present connection.
    fn is_asked(&self, peer: PeerKey, number: u64) -> bool {
        self.questions.get(&number).is_some_and(|question| question.is_sent && self.peer_of(question.to) == Some(peer))
    }

    fn after_open(&mut self, key: PeerKey) {
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.opening = peer.opening.saturating_sub(1);
        }
        self.announce(key);
    }

    fn opened(&mut self, key: VolumeKey, remote: Remote, handle: u32) {
        let Some(volume) = self.volumes.get(&key) else { return };
        self.hear(volume.peer, &volume.name, remote.epoch);
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        let found = Expected { geometry: remote.geometry, generation: remote.generation };
        if let Some(expected) = volume.expected.filter(|expected| *expected != found) {
            let why = format!(
                "it is no longer the image whose relocation was begun ({} bytes, generation {}; it was {} bytes, generation {})",
                found.geometry.size_bytes, found.generation, expected.geometry.size_bytes, expected.generation
            );
            self.closing.push((volume.peer, handle));
            let Some(peer) = self.peers.get(&volume.peer).map(|peer| peer.name.clone()) else { return };
            let error = FetchError::Inconsistent { peer, volume: volume.name.clone(), why };
            self.open_refused(key, error);
            return;
        }
        volume.expected = Some(found);
        volume.refused = None;
        volume.handle = Some(handle);
        if !std::mem::replace(&mut volume.is_scheduled, true) {
            self.scheduler.add_volume(key, volume.peer);
        }
        if let Some(waiting) = volume.waiting.take() {
            let _ = waiting.send(Ok(remote));
        }
        self.send_unsent();
    }

    fn open_refused(&mut self, key: VolumeKey, error: FetchError) {
        let now = self.now();
        let Some(volume) = self.volumes.get_mut(&key) else { return };
        match volume.waiting.take() {
            // The first time, the one who asked decides.
            Some(waiting) => {
                let _ = waiting.send(Err(error));
                self.volumes.remove(&key);
            }
            // Later on, data depends on it: it is asked for again until somebody gives it up.
            None => {
                tracing::warn!(volume = %volume.name, %error, "the volume cannot be opened at the peer now; trying again");
                if let Some(peer) = self.peers.get_mut(&volume.peer) {
                    peer.last_error = Some(error.to_string());
                }
                let since = volume.refused.take().map_or_else(SystemTime::now, |(_, since)| since);
                volume.refused = Some((error.to_string(), since));
                volume.reopen_at = Some(now + REOPEN);
            }
        }
    }

    fn waiting_for(&self, volume: &Volume) -> Option<WaitingFor> {
        let peer = self.peers.get(&volume.peer)?;
        match (peer.down_since, &volume.refused) {
            (Some(since), _) => {
                let why = peer.last_error.clone().unwrap_or_default();
                Some(WaitingFor { peer: peer.name.clone(), why, since, is_connected: false })
            }
            (None, Some((why, since))) => {
                Some(WaitingFor { peer: peer.name.clone(), why: why.clone(), since: *since, is_connected: true })
            }
            (None, None) => None,
        }
    }

    /// Sends every question that can be sent now, the oldest first; of pages only so many.
    fn send_unsent(&mut self) {
        let mut open_pages: BTreeMap<PeerKey, usize> = BTreeMap::new();
        let mut unsent = Vec::new();
        for (number, question) in &self.questions {
            let peer = self.peer_of(question.to);
            let is_of_pages = question.what.is_of_pages();
            match peer {
                Some(peer) if question.is_sent => *open_pages.entry(peer).or_default() += usize::from(is_of_pages),
                peer => unsent.push((*number, peer.filter(|_| is_of_pages))),
            }
        }
        for (number, pages_of) in unsent {
            let open = pages_of.map(|peer| open_pages.entry(peer).or_default());
            match open {
                Some(open) if *open >= MAX_OPEN_PAGES => {}
                Some(open) => *open += usize::from(self.send_question(number)),
                None => drop(self.send_question(number)),
            }
        }
    }

    /// Returns whether it could be sent.
    fn send_question(&mut self, number: u64) -> bool {
        let Some(question) = self.questions.get_mut(&number) else { return false };
        let (peer, handle) = match question.to {
            To::Peer(peer, _) => (peer, None),
            To::Volume(key) => match self.volumes.get(&key) {
                Some(Volume { peer, handle: Some(handle), .. }) => (*peer, Some(*handle)),
                Some(_) => return false,
                None => {
                    if let Some(question) = self.questions.remove(&number) {
                        question.what.fail(FetchError::Gone);
                    }
                    return false;
                }
            },
        };
        let Some(peer) = self.peers.get_mut(&peer).filter(|peer| peer.link.is_some()) else { return false };
        // Opens and questions take their numbers from one counter: an answer fits one of them only.
        let (request, flight) = (self.next_request, self.next_request);
        self.next_request = self.next_request.wrapping_add(1);
        let sent_with = handle;
        let handle = handle.unwrap_or_default();
        let frame = match &question.what {
            Ask::Owner(volume, asked, _) => {
                let volume = volume.clone();
                match *asked {
                    handover::Question::TakeOver { epoch, take } => {
                        Control::TakeOver { request, epoch: epoch.0, take, volume }
                    }
                    handover::Question::GiveBack { epoch } => Control::GiveBack { request, epoch: epoch.0, volume },
                    handover::Question::Completed { epoch } => Control::Completed { request, epoch: epoch.0, volume },
                    handover::Question::Reclaimed { epoch } => Control::Reclaimed { request, epoch: epoch.0, volume },
                }
            }
            Ask::Page(page, _) => Control::Page { flight: ASK_FLIGHTS | u64::from(flight), handle, page: *page },
            Ask::Roots(first, count, _) => {
                Control::Roots { flight: ASK_FLIGHTS | u64::from(flight), handle, first: *first, count: *count }
            }
        };
        question.is_sent = true;
        question.sent_with = sent_with;
        peer.send(&frame);
        if let Some(question) = self.questions.remove(&number) {
            self.questions.insert(u64::from(request), question);
        }
        true
    }

    fn want(&mut self, now: Now, want: WantBlock, reply: Reply<Block>) {
        if !self.volumes.contains_key(&want.place.volume) {
            let _ = reply.send(Err(FetchError::Gone));
            return;
        }
        if let Some(id) = want.id
            && let Some((bytes, sender)) = self.unstored.get(&id).cloned()
        {
            if bytes.len() != want.len_bytes as usize {
                let _ = reply.send(Err(self.wrong_length(Some(sender), &want.place, id, bytes.len(), want.len_bytes)));
                return;
            }
            let (origin, class) = (Origin::Joined, want.class);
            let _ = reply.send(Ok(Block { id, bytes, origin, wire_bytes: 0, class, budget: None }));
            return;
        }
        self.waiters.insert(want.waiter, Waiting { reply, len_bytes: want.len_bytes, expected: want.id });
        self.scheduler.want(now, want);
    }

    fn arrived(&mut self, peer: PeerKey, message: Arrived) {
        let now = self.now();
        // Numbers are guessed easily: one peer must not answer for another. What was asked for on an earlier
        // connection, or is not wanted any more, ends here, too.
        let number = message.flight();
        let is_asked = match number & ASK_FLIGHTS {
            0 => self.scheduler.asked(FlightId(number)) == Some(peer),
            _ => self.is_asked(peer, number & !ASK_FLIGHTS),
        };
        if !is_asked {
            return;
        }
        let sent_with = match number & ASK_FLIGHTS {
            0 => self.sent_with.remove(&FlightId(number)),
            _ => self.questions.get(&(number & !ASK_FLIGHTS)).and_then(|question| question.sent_with),
        };
        match message {
            Arrived::Block { flight, id, bytes, frame, wire_bytes, budget } => {
                let flight = FlightId(flight);
                if let Some(expected) = self.scheduler.id_of(flight).filter(|expected| *expected != id) {
                    let why = format!(
                        "block {expected:?} was announced and {id:?} came: the image was changed at the source"
                    );
                    self.refuse(now, flight, peer, Refusal::ImageChanged, why);
                    return;
                }
                let Some(landed) = self.scheduler.arrived(now, flight, wire_bytes) else { return };
                let sender = peer;
                if landed.class == Class::Bulk
                    && let Some(peer) = self.peers.get_mut(&peer)
                {
                    peer.raw_bulk_bytes += bytes.len() as u64;
                }
                match frame {
                    Some(frame) => {
                        self.answer(landed, &bytes, Origin::Wire, Some(sender), wire_bytes, Some(id), &budget);
                        if budget.is_some() || self.unstored_bytes < MAX_UNSTORED_BYTES {
                            self.unstored_bytes += bytes.len();
                            if let Some((before, _)) = self.unstored.insert(id, (bytes, sender)) {
                                self.unstored_bytes = self.unstored_bytes.saturating_sub(before.len());
                            }
                            self.lanes.put(id, frame, budget);
                        }
                    }
                    None => self.answer(landed, &Bytes::new(), Origin::Zero, Some(sender), wire_bytes, Some(id), &None),
                }
            }
            Arrived::Damaged { flight, why } if flight & ASK_FLIGHTS == 0 => {
                tracing::warn!(flight, why, "a block failed its check and is asked for again");
                let landed = self.scheduler.failed(now, FlightId(flight), Failure::Transient);
                debug_assert!(landed.is_none());
            }
            Arrived::Failed { flight, refusal: Refusal::UnknownVolume, why } => {
                self.gone_at_peer(now, flight, sent_with, &why);
            }
            Arrived::Failed { flight, refusal, why } if flight & ASK_FLIGHTS == 0 => {
                self.refuse(now, FlightId(flight), peer, refusal, why);
            }
            Arrived::Damaged { flight, why } => self.ask_again(flight, &why),
            Arrived::Failed { flight, refusal, why } => {
                if refusal.is_transient() {
                    self.ask_again(flight, &why);
                } else if let Some(question) = self.questions.remove(&(flight & !ASK_FLIGHTS))
                    && let Some(peer) = self.peers.get(&peer)
                {
                    question.what.fail(FetchError::Refused { peer: peer.name.clone(), refusal, epoch: 0, why });
                }
            }
            Arrived::Page { flight, page, bytes, frame } => {
                self.page_arrived(flight, page, &bytes, frame);
                self.send_unsent();
            }
            Arrived::Roots { flight, first, entries } => {
                let number = flight & !ASK_FLIGHTS;
                let is_wanted = matches!(self.questions.get(&number), Some(Question { what: Ask::Roots(at, ..), .. }) if *at == first);
                if is_wanted
                    && let Some(Question { what: Ask::Roots(_, _, reply), .. }) = self.questions.remove(&number)
                {
                    let _ = reply.send(Ok(entries));
                }
            }
        }
    }

    fn page_arrived(&mut self, flight: u64, page: crate::core::manifest::PageIndex, bytes: &[u8], frame: Frame) {
        let number = flight & !ASK_FLIGHTS;
        let Some(Question { to: To::Volume(key), what: Ask::Page(wanted, _), .. }) = self.questions.get(&number) else {
            return;
        };
        let geometry = self.volumes.get(key).and_then(|volume| volume.expected).map(|expected| expected.geometry);
        let parsed = geometry.map(|geometry| Page::from_bytes(bytes, geometry.ids_in(page)));
        match parsed {
            Some(Ok(parsed)) if *wanted == page => {
                if let Some(Question { what: Ask::Page(_, reply), .. }) = self.questions.remove(&number) {
                    let _ = reply.send(Ok((parsed, frame)));
                }
            }
            _ => self.ask_again(flight, "a manifest page of the wrong shape"),
        }
    }

    /// Asks a failed question again a little later, on whatever connection there is then.
    fn ask_again(&mut self, flight: u64, why: &str) {
        let number = flight & !ASK_FLIGHTS;
        tracing::warn!(why, "a manifest page did not come and is asked for again");
        if let Some(question) = self.questions.get_mut(&number) {
            question.is_sent = false;
        }
    }

    /// What was opened is not there any more: the volume was given up there, or taken back. It is opened anew, which tells what holds, and
    /// what was asked for comes then. `sent_with` tells answers to what was asked before that: those say nothing new.
    fn gone_at_peer(&mut self, now: Now, flight: u64, sent_with: Option<u32>, why: &str) {
        let key = match flight & ASK_FLIGHTS {
            0 => self.scheduler.place_of(FlightId(flight)).map(|place| place.volume),
            _ => self.questions.get(&(flight & !ASK_FLIGHTS)).and_then(|question| match question.to {
                To::Volume(key) => Some(key),
                To::Peer(..) => None,
            }),
        };
        if let Some((key, volume)) = key.and_then(|key| Some((key, self.volumes.get_mut(&key)?)))
            && volume.handle.is_some()
            && volume.handle == sent_with
        {
            self.closing.extend(volume.handle.take().map(|handle| (volume.peer, handle)));
            // A peer that says so each time is not asked as fast as it answers.
            match volume.gone_at.map(|at| at + REOPEN_GONE).filter(|again_at| *again_at > now) {
                Some(again_at) => volume.reopen_at = Some(again_at),
                None => {
                    volume.gone_at = Some(now);
                    self.send_open(key);
                }
            }
        }
        match flight & ASK_FLIGHTS {
            0 => drop(self.scheduler.failed(now, FlightId(flight), Failure::Transient)),
            _ => self.ask_again(flight, why),
        }
    }

    fn refuse(&mut self, now: Now, flight: FlightId, peer: PeerKey, refusal: Refusal, why: String) {
        let failure = if refusal.is_transient() { Failure::Transient } else { Failure::Permanent };
        if let Some(landed) = self.scheduler.failed(now, flight, failure)
            && let Some(peer) = self.peers.get(&peer)
        {
            for waiter in landed.waiters {
                if let Some(waiting) = self.waiters.remove(&waiter.id) {
                    let error = FetchError::Refused { peer: peer.name.clone(), refusal, epoch: 0, why: why.clone() };
                    let _ = waiting.reply.send(Err(error));
                }
            }
        }
    }

    /// An id that fits bytes of another length than the volume's block has: of a volume of another block size, or a lying
    /// source. Where the store had them, it is the volume's peer that announced the id.
    fn wrong_length(&self, sender: Option<PeerKey>, place: &Place, id: BlockId, have: usize, want: u32) -> FetchError {
        let announcer = || self.volumes.get(&place.volume).map(|volume| volume.peer);
        let Some(peer) = sender.or_else(announcer).and_then(|peer| self.peers.get(&peer)) else {
            return FetchError::Gone;
        };
        tracing::warn!(peer = %peer.name, ?id, "a block of {have} bytes came for one of {want}");
        let why = "a block of the wrong length came".to_owned();
        FetchError::Refused { peer: peer.name.clone(), refusal: Refusal::BadRequest, epoch: 0, why }
    }

    #[expect(clippy::too_many_arguments, reason = "what is known of one block")]
    fn answer(
        &mut self,
        landed: Landed,
        bytes: &Bytes,
        origin: Origin,
        sender: Option<PeerKey>,
        wire_bytes: u64,
        id: Option<BlockId>,
        budget: &Budgeted,
    ) {
        let mut asked_first = None;
        for waiter in landed.waiters {
            let Some(waiting) = self.waiters.remove(&waiter.id) else { continue };
            let bytes =
                if origin == Origin::Zero { Bytes::from(vec![0; waiting.len_bytes as usize]) } else { bytes.clone() };
            let id = id.or(waiting.expected).unwrap_or_default();
            if bytes.len() != waiting.len_bytes as usize {
                let error = self.wrong_length(sender, &waiter.place, id, bytes.len(), waiting.len_bytes);
                let _ = waiting.reply.send(Err(error));
                continue;
            }
            let (origin, wire_bytes) = match asked_first {
                None => (origin, wire_bytes),
                Some(volume) if volume == waiter.place.volume && origin == Origin::Wire => (Origin::Shared, 0),
                Some(_) if origin == Origin::Wire => (Origin::Joined, 0),
                Some(_) => (origin, 0),
            };
            asked_first.get_or_insert(waiter.place.volume);
            // Guests' requests hold on to it for as long as a client likes, and are bounded elsewhere.
            let budget = if waiter.class == Class::Bulk { budget.clone() } else { None };
            let _ = waiting.reply.send(Ok(Block { id, bytes, origin, wire_bytes, class: landed.class, budget }));
        }
    }

    fn close(&mut self, now: Now, key: VolumeKey) {
        if let Some(Volume { peer, handle: Some(handle), .. }) = self.volumes.remove(&key) {
            self.closing.push((peer, handle));
        }
        for waiter in self.scheduler.remove_volume(now, key) {
            if let Some(waiting) = self.waiters.remove(&waiter.id) {
                let _ = waiting.reply.send(Err(FetchError::Gone));
            }
        }
        let gone: Vec<u64> =
            self.questions.iter().filter(|(_, q)| q.to == To::Volume(key)).map(|(number, _)| *number).collect();
        for number in gone {
            if let Some(question) = self.questions.remove(&number) {
                question.what.fail(FetchError::Gone);
            }
        }
    }

    fn tick(&mut self) {
        let now = self.now();
        for (key, peer) in &mut self.peers {
            let Some(link) = &peer.link else { continue };
            let rate = peer.raw_bulk_bytes as f64 / TICK.as_secs_f64();
            peer.raw_bulk_bytes = 0;
            // Falls slowly and rises at once: a pause must not shut the window.
            peer.raw_bulk_rate = rate.max(peer.raw_bulk_rate * 0.9);
            let rtt = link.path().rtt.as_secs_f64();
            let window = 2.0 * peer.raw_bulk_rate * (rtt + TICK.as_secs_f64());
            let mut window = (window as u64).clamp(MIN_BULK_WINDOW, MAX_BULK_WINDOW);
            // A disk that is slower than the link: no more is asked for than there is memory for, so that nothing that is
            // promoted meanwhile waits behind what has no room.
            let budget_bytes = (BULK_BUDGET_KIB as u64) << 10;
            let waiting_bytes = budget_bytes.saturating_sub((self.budget.available_permits() as u64) << 10);
            if waiting_bytes > budget_bytes / 4 {
                window = window.min(budget_bytes - waiting_bytes.min(budget_bytes));
            }
            self.scheduler.set_bulk_window(now, *key, window);
        }
        let due: Vec<VolumeKey> = self
            .volumes
            .iter()
            .filter(|(_, volume)| volume.reopen_at.is_some_and(|at| at <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in due {
            self.send_open(key);
        }
        self.send_unsent();
        self.scheduler.tick(now);
    }

    /// Carries out what the scheduler decided, until it has nothing more to say.
    fn act(&mut self) {
        while let Some(action) = self.scheduler.poll_action() {
            match action {
                Action::LookUp { flight, id, class } => {
                    let len_bytes = self.scheduler.len_of(flight).unwrap_or_default();
                    self.lanes.look_up(flight, id, class, len_bytes);
                }
                Action::Send { flight, peer, place, class } => {
                    let handle = self.volumes.get(&place.volume).and_then(|volume| volume.handle);
                    match (handle, self.peers.get_mut(&peer)) {
                        (Some(handle), Some(peer)) => {
                            self.sent_with.insert(flight, handle);
                            peer.outbox.push(Want { flight: flight.0, handle, class, block: place.block });
                        }
                        // It could not be opened on this connection; the scheduler comes back to it.
                        _ => {
                            let now = self.now();
                            let _ = self.scheduler.failed(now, flight, Failure::Transient);
                        }
                    }
                }
                Action::Promote { flight, peer, class } => {
                    if let Some(peer) = self.peers.get_mut(&peer) {
                        peer.flush_wants();
                        peer.send(&Control::Promote { flight: flight.0, class });
                    }
                }
                Action::Forget { flight, peer } => {
                    self.sent_with.remove(&flight);
                    if let Some(peer) = self.peers.get_mut(&peer) {
                        peer.flush_wants();
                        peer.send(&Control::Forget { flight: flight.0 });
                    }
                }
            }
        }
        for peer in self.peers.values_mut() {
            peer.flush_wants();
        }
        // Behind what the scheduler takes back for them: otherwise the source would refuse it.
        for (peer, handle) in self.closing.drain(..) {
            if let Some(peer) = self.peers.get_mut(&peer) {
                peer.send(&Control::Close { handle });
            }
        }
    }
}

/// Raw bytes of bulk under way with a peer before its rate is known: a quarter of a second at 64 MB/s.
const MIN_BULK_WINDOW: u64 = 16 << 20;
/// The most, which 1 Gbit/s x 200 ms at a compression of 1:3 needs. The source keeps them as 40-byte wants.
const MAX_BULK_WINDOW: u64 = 128 << 20;

impl Peer {
    fn view(&self) -> PeerView {
        let path = self.link.as_ref().map(|link| link.path());
        PeerView {
            is_up: self.link.is_some(),
            last_error: self.last_error.clone(),
            rtt: path.as_ref().map(|path| path.rtt),
            cwnd_bytes: path.as_ref().map(|path| path.cwnd_bytes),
            connects: self.connects,
        }
    }

    /// In order, without waiting: what we send is small and bounded by what may be in flight.
    fn send(&mut self, frame: &Control) {
        if let Some(outgoing) = &self.outgoing {
            let _ = outgoing.send(frame.encode());
        }
    }

    fn flush_wants(&mut self) {
        if self.outbox.is_empty() {
            return;
        }
        let mut wants = std::mem::take(&mut self.outbox);
        // What a guest waits for stands in front.
        wants.sort_by_key(|want| want.class);
        for some in wants.chunks(MAX_WANTS_PER_FRAME) {
            self.send(&Control::Wants(some.to_vec()));
        }
    }
}

/// Feeds a link's bounded queue, so that a slow link never holds up the actor.
fn forward(link: Arc<dyn Link>) -> UnboundedSender<Bytes> {
    let (outgoing, mut frames) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(frame) = frames.recv().await {
            if link.send_control(frame).await.is_err() {
                return;
            }
        }
    });
    outgoing
}

impl Ask {
    fn is_of_pages(&self) -> bool {
        matches!(self, Ask::Page(..) | Ask::Roots(..))
    }

    fn fail(self, error: FetchError) {
        match self {
            Ask::Owner(_, _, reply) => drop(reply.send(Err(error))),
            Ask::Page(_, reply) => drop(reply.send(Err(error))),
            Ask::Roots(_, _, reply) => drop(reply.send(Err(error))),
        }
    }
}
