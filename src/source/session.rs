//! One peer that fetches from this site: its requests, its queue, and the two pumps that answer it.
//! Must not know what a peer does with its blocks.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::queue::{Item, Promoted, SendQueue};
use super::{Catalog, Hasher, Offered, Opening, SourceError};
use crate::core::frame::Frame;
use crate::core::ids::{Class, Name};
use crate::core::manifest::{Page, PageIndex};
use crate::core::wire::{Control, Data, MAX_ROOTS_PER_MESSAGE, Refusal, VERSIONS, choose_version};
use crate::handover::{Answer, Epoch, Question};
use crate::seeded_bugs::{Bug, is_planted};
use crate::transport::{DataTicket, Link, LinkReceivers, NewLink};
use crate::workers::{Urgency, Workers};

/// How long a new peer may take to say Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Blocks that are read and compressed at a time for one peer, per pump. Enough to keep the threads busy.
const URGENT_AT_A_TIME: usize = 16;
const BULK_AT_A_TIME: usize = 8;
/// Volumes that one peer may have opened on one connection.
const MAX_HANDLES: usize = 4096;
/// Pages of one peer that wait to be hashed. A page is 1,024 blocks; more would only queue.
const MAX_OPEN_PAGES: usize = 256;
/// Sent messages whose tickets are kept for a late promotion.
const MAX_TICKETS: usize = 2048;
/// zstd levels for bulk, the cheapest first: as high as still keeps ahead of the link.
const LEVELS: [i32; 4] = [1, 3, 6, 9];
/// Below this rate of what is sent, in bytes per second, level 1 saves no time that would matter: any core keeps ahead with level 3.
const SLOW_LINK_BYTES_PER_S: f64 = 32e6;
/// The index of level 3.
const LEAST_LEVEL_OF_SLOW_LINKS: usize = 1;
/// What is said of a handle that is none, or was closed while a want was on its way.
const NOT_OPEN: &str = "that volume is not open";
/// What a guest waits for is compressed quickly.
const DEMAND_LEVEL: i32 = 3;

/// What the configuration says.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// This site's name.
    pub site: Name,
    /// A fixed zstd level; None adapts to the link.
    pub zstd_level: Option<i32>,
}

struct Session {
    link: Arc<dyn Link>,
    hasher: Hasher,
    workers: Workers,
    options: SourceOptions,
    handles: Mutex<HashMap<u32, Opening>>,
    queue: Mutex<SendQueue>,
    tickets: Mutex<Tickets>,
    /// One for each class.
    news: [Notify; 3],
    promoted: Notify,
    next_handle: AtomicU32,
    open_pages: AtomicUsize,
    open_changes: AtomicUsize,
    bulk_level: AtomicUsize,
    /// Bulk bytes handed to the transport since the level was judged.
    bulk_bytes: AtomicU64,
}

#[derive(Default)]
struct Tickets {
    by_flight: HashMap<u64, DataTicket>,
    order: VecDeque<u64>,
}

/// Serves one connection until it ends. The reason is logged; nothing of the peer's outlives it.
pub async fn serve_link(
    new: NewLink,
    catalog: Arc<dyn Catalog>,
    hasher: Hasher,
    workers: Workers,
    options: SourceOptions,
) {
    let NewLink { link, mut receivers } = new;
    let peer = link.peer().clone();
    match welcome(&link, &mut receivers, &*catalog, &options.site).await {
        Ok(version) => tracing::info!(%peer, version, "a peer is connected and may fetch from here"),
        Err(why) => {
            tracing::warn!(%peer, why, "a peer was turned away");
            link.close(&why);
            return;
        }
    }
    let session = Arc::new(Session {
        link: Arc::clone(&link),
        hasher,
        workers,
        options,
        handles: Mutex::default(),
        queue: Mutex::default(),
        tickets: Mutex::default(),
        news: Default::default(),
        promoted: Notify::new(),
        next_handle: AtomicU32::new(1),
        open_pages: AtomicUsize::new(0),
        open_changes: AtomicUsize::new(0),
        bulk_level: AtomicUsize::new(LEAST_LEVEL_OF_SLOW_LINKS),
        bulk_bytes: AtomicU64::new(0),
    });
    let end = tokio::select! {
        biased;
        end = requests(&session, &catalog, &mut receivers) => end,
        // One for each, so that what a guest waits for never waits behind readahead that waits for the link.
        () = pump(&session, Class::Demand, URGENT_AT_A_TIME) => String::new(),
        () = pump(&session, Class::Readahead, URGENT_AT_A_TIME) => String::new(),
        () = pump(&session, Class::Bulk, BULK_AT_A_TIME) => String::new(),
        error = link.closed() => error.to_string(),
    };
    link.close(&end);
    tracing::info!(%peer, reason = %end, "a peer that fetched from here is gone");
}

async fn welcome(
    link: &Arc<dyn Link>,
    receivers: &mut LinkReceivers,
    catalog: &dyn Catalog,
    site: &Name,
) -> Result<u16, String> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, receivers.control.recv()).await;
    let first = first.map_err(|_| "it said nothing for 10 seconds".to_owned())?.ok_or("it hung up")?;
    let (min, max, last, next) = match Control::decode(first) {
        Ok(Control::Hello { min_version, max_version, last, next, .. }) => (min_version, max_version, last, next),
        Ok(_) => return Err("its first frame was no Hello".into()),
        Err(error) => return Err(format!("its first frame made no sense: {error}")),
    };
    let Some(version) = choose_version(min, max) else {
        let why = format!(
            "this site speaks protocol versions {} to {}, the peer {min} to {max}; update the older one",
            VERSIONS.start(),
            VERSIONS.end()
        );
        return Err(turn_away(link, Refusal::Version, why).await);
    };
    if let Err((refusal, why)) = catalog.greet(link, last, next) {
        return Err(turn_away(link, refusal, why).await);
    }
    let welcome = Control::Welcome { version, site: site.clone() };
    link.send_control(welcome.encode()).await.map_err(|error| error.to_string())?;
    Ok(version)
}

async fn turn_away(link: &Arc<dyn Link>, refusal: Refusal, why: String) -> String {
    let unwelcome = Control::Unwelcome { refusal, why: why.clone() };
    let _ = link.send_control(unwelcome.encode()).await;
    // Let the answer arrive before the connection is closed under it.
    let _ = tokio::time::timeout(Duration::from_secs(2), link.closed()).await;
    why
}

/// Handles requests until the peer hangs up or misbehaves; returns why.
async fn requests(session: &Arc<Session>, catalog: &Arc<dyn Catalog>, receivers: &mut LinkReceivers) -> String {
    let peer = session.link.peer().clone();
    while let Some(frame) = receivers.control.recv().await {
        let frame = match Control::decode(frame) {
            Ok(frame) => frame,
            Err(error) => return error.to_string(),
        };
        let answer = match frame {
            Control::Wants(wants) => {
                let mut queue = session.queue.lock();
                for want in wants {
                    if let Err(error) = queue.push(want) {
                        return error.to_string();
                    }
                }
                session.news.iter().for_each(Notify::notify_one);
                continue;
            }
            Control::Promote { flight, class } => {
                session.promote(flight, class);
                continue;
            }
            Control::Forget { flight } => {
                session.queue.lock().forget(flight);
                continue;
            }
            Control::Page { flight, handle, page } => {
                if session.open_pages.fetch_add(1, Ordering::Relaxed) >= MAX_OPEN_PAGES {
                    return format!("more than {MAX_OPEN_PAGES} pages wanted at a time");
                }
                let session = Arc::clone(session);
                tokio::spawn(async move {
                    session.send_page(flight, handle, page).await;
                    session.open_pages.fetch_sub(1, Ordering::Relaxed);
                });
                continue;
            }
            Control::Roots { flight, handle, first, count } => {
                if session.open_pages.fetch_add(1, Ordering::Relaxed) >= MAX_OPEN_PAGES {
                    return format!("more than {MAX_OPEN_PAGES} pages wanted at a time");
                }
                let session = Arc::clone(session);
                // Apart, as pages are: while it waits for the link, requests and promotions are read on.
                tokio::spawn(async move {
                    session.send_roots(flight, handle, first, count).await;
                    session.open_pages.fetch_sub(1, Ordering::Relaxed);
                });
                continue;
            }
            Control::Open { request, volume } => match catalog.open(&peer, &volume) {
                Ok(offered) => session.open(request, offered),
                Err((refusal, epoch, why)) => Control::Refused { request, refusal, epoch, why },
            },
            Control::Close { handle } => {
                session.handles.lock().remove(&handle);
                continue;
            }
            Control::TakeOver { request, epoch, take, volume } => {
                let question = Question::TakeOver { epoch: Epoch(epoch), take };
                match session.ask(catalog, request, &volume, question) {
                    Ok(()) => continue,
                    Err(why) => return why,
                }
            }
            Control::Completed { request, epoch, ref volume }
            | Control::GiveBack { request, epoch, ref volume }
            | Control::Reclaimed { request, epoch, ref volume } => {
                let epoch = Epoch(epoch);
                let question = match frame {
                    Control::Completed { .. } => Question::Completed { epoch },
                    Control::GiveBack { .. } => Question::GiveBack { epoch },
                    _ => Question::Reclaimed { epoch },
                };
                match session.ask(catalog, request, volume, question) {
                    Ok(()) => continue,
                    Err(why) => return why,
                }
            }
            Control::Hello { .. }
            | Control::Welcome { .. }
            | Control::Unwelcome { .. }
            | Control::Opened { .. }
            | Control::Done { .. }
            | Control::Refused { .. } => return "it sent a frame that only a source sends".into(),
        };
        if let Err(error) = session.link.send_control(answer.encode()).await {
            return error.to_string();
        }
    }
    "the peer hung up".into()
}

fn answer(request: u32, answer: Answer) -> Control {
    match answer {
        Answer::Done(epoch) => Control::Done { request, epoch: epoch.0 },
        Answer::Refused(holds, no) => {
            let epoch = holds.map_or(0, |epoch| epoch.0);
            Control::Refused { request, refusal: no.refusal(), epoch, why: no.to_string() }
        }
    }
}

fn failed(flight: u64, refusal: Refusal, why: String) -> Data {
    Data::Failed { flight, refusal, why }
}

/// Keeps a few items of a class under way.
async fn pump(session: &Arc<Session>, class: Class, at_a_time: usize) {
    let news = &session.news[class as usize];
    let mut under_way = FuturesUnordered::new();
    let mut waited = Duration::ZERO;
    let mut judged_at = Instant::now();
    loop {
        while under_way.len() < at_a_time {
            let Some((item, class)) = session.queue.lock().pop(&[class]) else { break };
            under_way.push(session.serve(item, class));
        }
        tokio::select! {
            biased;
            Some(wait) = under_way.next(), if !under_way.is_empty() => waited += wait,
            () = news.notified() => {}
        }
        if class == Class::Bulk && judged_at.elapsed() > Duration::from_millis(500) {
            session.judge_level(waited, judged_at.elapsed(), under_way.len());
            waited = Duration::ZERO;
            judged_at = Instant::now();
        }
    }
}

impl Session {
    /// Asks about the owner of a volume. In the order of the requests: the next one is looked at when this one is asked.
    fn ask(
        self: &Arc<Self>,
        catalog: &Arc<dyn Catalog>,
        request: u32,
        volume: &Name,
        question: Question,
    ) -> Result<(), String> {
        if self.open_changes.fetch_add(1, Ordering::Relaxed) >= MAX_HANDLES {
            return Err(format!("more than {MAX_HANDLES} questions of ownership open at a time"));
        }
        let asked = catalog.ask(self.link.peer(), volume, question);
        let session = Arc::clone(self);
        // Apart: while an image is flushed for it, guests of other volumes go on reading. When the connection ends, the question ends with it.
        tokio::spawn(async move {
            let told = async {
                let answer = answer(request, asked.await);
                let _ = session.link.send_control(answer.encode()).await;
            };
            tokio::select! {
                biased;
                () = told => {}
                _ = session.link.closed() => {}
            }
            session.open_changes.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(())
    }

    fn open(&self, request: u32, offered: Offered) -> Control {
        let Offered { opening, epoch, is_read_only } = offered;
        let mut handles = self.handles.lock();
        if handles.len() >= MAX_HANDLES {
            let why = format!("more than {MAX_HANDLES} volumes opened on one connection");
            return Control::Refused { request, refusal: Refusal::BadRequest, epoch, why };
        }
        // A number for each opening: who closes one of two keeps the other.
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        if let Ok(volume) = opening.volume() {
            self.hasher.hash_in_background(&volume);
        }
        let (geometry, generation) = (opening.geometry, opening.generation);
        handles.insert(handle, opening);
        Control::Opened { request, handle, geometry, generation, epoch, is_read_only }
    }

    fn promote(&self, flight: u64, class: Class) {
        let promoted = self.queue.lock().promote(flight, class);
        match promoted {
            Promoted::Requeued => self.news.iter().for_each(Notify::notify_one),
            Promoted::UnderWay | Promoted::Unknown if is_planted(Bug::PromotionLostAtSource) => {}
            Promoted::UnderWay => self.promoted.notify_waiters(),
            Promoted::Unknown => {
                if let Some(ticket) = self.tickets.lock().by_flight.get(&flight) {
                    ticket.promote(class);
                }
            }
        }
    }

    /// Reads, compresses and hands over one block; returns how long the transport made it wait.
    async fn serve(&self, item: Item, class: Class) -> Duration {
        let opening = self.handles.lock().get(&item.handle).cloned();
        let level = match class {
            Class::Bulk => self.options.zstd_level.unwrap_or(LEVELS[self.bulk_level.load(Ordering::Relaxed)]),
            _ => self.options.zstd_level.unwrap_or(DEMAND_LEVEL).min(DEMAND_LEVEL),
        };
        let message = match opening {
            None => failed(item.flight, Refusal::UnknownVolume, NOT_OPEN.into()),
            Some(opening) => {
                let urgency = if class == Class::Bulk { Urgency::Background } else { Urgency::Urgent };
                let built = self.workers.run(urgency, move || build(&opening, item, level)).await;
                built.unwrap_or_else(|| failed(item.flight, Refusal::Internal, "the source failed inside".into()))
            }
        };
        let begun = Instant::now();
        let parts = message.encode();
        if class == Class::Bulk {
            self.bulk_bytes.fetch_add(parts.iter().map(|part| part.len() as u64).sum(), Ordering::Relaxed);
        }
        let ticket = self.hand_over(item.flight, class, parts).await;
        let waited = begun.elapsed();
        let class_now = self.queue.lock().done(item.flight);
        if let Some((ticket, sent_as)) = ticket {
            if let Some(class_now) = class_now.filter(|now| now.is_more_urgent_than(sent_as)) {
                ticket.promote(class_now);
            }
            self.tickets.lock().keep(item.flight, ticket);
        }
        waited
    }

    /// Hands a message to the transport, in the class that it has by then: bulk and readahead wait for room, and a
    /// promotion ends that wait.
    async fn hand_over(&self, flight: u64, class: Class, parts: Vec<Bytes>) -> Option<(DataTicket, Class)> {
        loop {
            let class = self.queue.lock().class_of(flight).unwrap_or(class);
            let sent = self.link.send_data(class, parts.clone());
            tokio::pin!(sent);
            loop {
                let promoted = self.promoted.notified();
                tokio::pin!(promoted);
                promoted.as_mut().enable();
                if self.queue.lock().class_of(flight).is_some_and(|now| now != class) {
                    // Given up before it resolved, so nothing of it was sent.
                    break;
                }
                tokio::select! {
                    biased;
                    // An error means that the link is gone, which the session's end is told by others.
                    sent = &mut sent => return sent.ok().map(|ticket| (ticket, class)),
                    () = promoted => {}
                }
            }
        }
    }

    async fn send_roots(&self, flight: u64, handle: u32, first: PageIndex, count: u32) {
        let opening = self.handles.lock().get(&handle).cloned();
        let message = match opening {
            Some(opening) => {
                let count = u64::from(count).min(MAX_ROOTS_PER_MESSAGE as u64);
                let entries = opening.volume().and_then(|volume| {
                    let entries = volume.manifest.roots(first, count);
                    opening.check(&volume).map(|()| entries)
                });
                match entries {
                    Ok(entries) => Data::Roots { flight, first, entries },
                    Err(error) => failed(flight, error.refusal(), error.to_string()),
                }
            }
            None => failed(flight, Refusal::UnknownVolume, NOT_OPEN.into()),
        };
        let _ = self.link.send_data(Class::Readahead, message.encode()).await;
    }

    async fn send_page(&self, flight: u64, handle: u32, page: PageIndex) {
        let opening = self.handles.lock().get(&handle).cloned();
        let message = match opening {
            None => failed(flight, Refusal::UnknownVolume, NOT_OPEN.into()),
            Some(opening) if page.0 >= opening.geometry.pages() => {
                failed(flight, Refusal::BadRequest, format!("there is no manifest page {}", page.0))
            }
            Some(opening) => match self.page_of(&opening, page).await {
                Ok(hashed) => {
                    Data::Page { flight, page, frame: Frame::encode(&Bytes::from(hashed.to_bytes()), DEMAND_LEVEL) }
                }
                Err((refusal, why)) => failed(flight, refusal, why),
            },
        };
        let _ = self.link.send_data(Class::Readahead, message.encode()).await;
    }

    async fn page_of(&self, opening: &Opening, page: PageIndex) -> Result<Page, (Refusal, String)> {
        let told = |error: SourceError| (error.refusal(), error.to_string());
        let volume = opening.volume().map_err(told)?;
        let Some(hashed) = self.hasher.page(&volume, page).await else {
            return Err((Refusal::ShuttingDown, "the source is shutting down".into()));
        };
        let hashed = hashed.and_then(|hashed| opening.check(&volume).map(|()| hashed));
        hashed.map_err(|error| {
            if !matches!(error, SourceError::Gone { .. }) {
                tracing::warn!(volume = %volume.name, %error, "a manifest page could not be made");
            }
            told(error)
        })
    }

    /// Compresses harder while the link is what limits, less hard when the CPU does.
    fn judge_level(&self, waited: Duration, passed: Duration, under_way: usize) {
        if under_way == 0 {
            return;
        }
        let share = waited.as_secs_f64() / (passed.as_secs_f64() * BULK_AT_A_TIME as f64);
        let level = self.bulk_level.load(Ordering::Relaxed);
        let rate = self.bulk_bytes.swap(0, Ordering::Relaxed) as f64 / passed.as_secs_f64();
        let least = if rate < SLOW_LINK_BYTES_PER_S { LEAST_LEVEL_OF_SLOW_LINKS } else { 0 };
        let next = match share {
            share if share > 0.8 => (level + 1).min(LEVELS.len() - 1),
            share if share < 0.4 => level.saturating_sub(1).max(least),
            _ => level.max(least),
        };
        self.bulk_level.store(next, Ordering::Relaxed);
    }
}

impl Tickets {
    fn keep(&mut self, flight: u64, ticket: DataTicket) {
        self.by_flight.insert(flight, ticket);
        self.order.push_back(flight);
        if self.order.len() > MAX_TICKETS
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_flight.remove(&oldest);
        }
    }
}

/// The blocking part: read, hash, compress.
fn build(opening: &Opening, item: Item, level: i32) -> Data {
    if item.block.0 >= opening.geometry.blocks() {
        return failed(item.flight, Refusal::BadRequest, format!("there is no block {}", item.block.0));
    }
    let read = opening.volume().and_then(|volume| {
        let read = volume.read_block(item.block)?;
        opening.check(&volume).map(|()| read)
    });
    match read {
        Ok((id, bytes)) => {
            let frame = bytes.map(|bytes| Frame::encode(&Bytes::from(bytes), level));
            Data::Block { flight: item.flight, id, frame }
        }
        // The peer opens it anew, and hears why where that fails.
        Err(gone @ SourceError::Gone { .. }) => failed(item.flight, gone.refusal(), gone.to_string()),
        Err(error) => {
            tracing::warn!(volume = %opening.name, block = item.block.0, %error, "a block could not be read");
            failed(item.flight, error.refusal(), error.to_string())
        }
    }
}

#[cfg(test)]
mod tests;
