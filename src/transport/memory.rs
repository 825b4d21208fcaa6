//! The in-memory twin of a link: the same trait, bounds and orders without sockets or encryption, and faults on demand. For
//! the tests of the layers above; must not know quinn.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, mpsc, watch};

use super::limits::*;
use super::link::{DataTicket, Link, LinkError, LinkReceivers, NewLink, PathStats, TicketDuty};
use crate::core::ids::{Class, Name};

/// Bulk that waits in a twin's sender, in bytes: QUIC's bound for an empty congestion window, and room for two messages.
const BULK_BACKLOG_BYTES: usize = 2 * MAX_DATA_MESSAGE_BYTES;

/// Changes a data message on its way.
type Tamper = dyn FnMut(Class, &mut Vec<u8>) + Send;

/// Two sites and the link between them: the first element is held by `name_a` and leads to `name_b`, the second the other
/// way round. Needs a tokio runtime.
pub fn pair(name_a: Name, name_b: Name) -> (NewLink, NewLink) {
    let (a, b, _) = pair_with_faults(name_a, name_b);
    (a, b)
}

/// The same, and the handle that makes it fail.
pub fn pair_with_faults(name_a: Name, name_b: Name) -> (NewLink, NewLink, Fault) {
    let wire = Arc::new(Wire::default());
    let (from_a, to_b) = direction(&wire, true);
    let (from_b, to_a) = direction(&wire, false);
    let link = |peer: Name, lane: Arc<Lane>, is_first: bool| -> Arc<dyn Link> {
        Arc::new(MemoryLink { peer, wire: wire.clone(), lane, is_first })
    };
    let a = NewLink { link: link(name_b, from_a, true), receivers: to_a };
    let b = NewLink { link: link(name_a, from_b, false), receivers: to_b };
    (a, b, Fault { wire })
}

/// Makes the link between two twins fail. Cheap to clone.
#[derive(Clone)]
pub struct Fault {
    wire: Arc<Wire>,
}

impl Fault {
    /// Ends the link as a dead path would: every call fails, all receivers end.
    pub fn cut(&self) {
        self.wire.end(Ended::Cut);
    }

    /// Delivers nothing until [`Fault::unstall`]; senders go on until their bounds.
    pub fn stall(&self) {
        self.wire.stalled.send_replace(true);
    }

    /// Delivers again.
    pub fn unstall(&self) {
        self.wire.stalled.send_replace(false);
    }

    /// From now on every data message passes through `tamper` before it is delivered, in both directions.
    pub fn tamper(&self, tamper: impl FnMut(Class, &mut Vec<u8>) + Send + 'static) {
        *self.wire.tamper.lock() = Some(Box::new(tamper));
    }

    /// Data messages pass unchanged again.
    pub fn no_tamper(&self) {
        *self.wire.tamper.lock() = None;
    }
}

/// How a wire ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ended {
    Cut,
    Closed { by_first: bool, reason: String },
}

impl Ended {
    fn seen_by(self, first: bool) -> LinkError {
        match self {
            Ended::Cut => LinkError::TimedOut { after: Duration::ZERO },
            Ended::Closed { by_first, reason } if by_first == first => LinkError::ClosedByUs { reason },
            Ended::Closed { reason, .. } => LinkError::ClosedByPeer { reason },
        }
    }
}

/// What both directions share.
#[derive(Default)]
struct Wire {
    ended: watch::Sender<Option<Ended>>,
    stalled: watch::Sender<bool>,
    tamper: Mutex<Option<Box<Tamper>>>,
}

impl Wire {
    fn end(&self, how: Ended) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(how);
            }
            first
        });
    }

    async fn has_ended(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        // The sender lives as long as `self`.
        match ended.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().unwrap_or(Ended::Cut),
            Err(_) => Ended::Cut,
        }
    }
}

/// One direction, as its sender sees it.
struct Lane {
    control: mpsc::Sender<Bytes>,
    queue: Mutex<VecDeque<Queued>>,
    queued: Notify,
    demand: Arc<Semaphore>,
    readahead: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
    sent: Mutex<PathStats>,
}

struct Queued {
    /// The class that it was sent as: it decides the receiver.
    class: Class,
    message: Bytes,
    duty: TicketDuty,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Queued {
    /// The class that it is sent at by now.
    fn urgency(&self) -> Class {
        *self.duty.promoted.borrow()
    }
}

fn direction(wire: &Arc<Wire>, from_first: bool) -> (Arc<Lane>, LinkReceivers) {
    let (control, control_queue) = mpsc::channel(CONTROL_QUEUE_FRAMES);
    let (control_out, on_control) = mpsc::channel(CONTROL_CHANNEL_FRAMES);
    let (urgent_out, on_urgent) = mpsc::channel(URGENT_CHANNEL_MESSAGES);
    let (bulk_out, on_bulk) = mpsc::channel(BULK_CHANNEL_MESSAGES);
    let budget = |bytes| Arc::new(Semaphore::new(kib_permits(bytes) as usize));
    let lane = Arc::new(Lane {
        control,
        queue: Mutex::default(),
        queued: Notify::new(),
        demand: budget(URGENT_BACKLOG_BYTES),
        readahead: budget(URGENT_BACKLOG_BYTES),
        bulk: budget(BULK_BACKLOG_BYTES),
        sent: Mutex::new(PathStats {
            rtt: Duration::from_micros(1),
            min_rtt: Duration::from_micros(1),
            cwnd_bytes: BULK_BACKLOG_BYTES as u64,
            ..PathStats::default()
        }),
    });
    let carried = carry_control(wire.clone(), control_queue, control_out);
    tokio::spawn(until_ended(wire.clone(), lane.clone(), from_first, carried));
    let carried = carry_data(wire.clone(), lane.clone(), urgent_out, bulk_out);
    tokio::spawn(until_ended(wire.clone(), lane.clone(), from_first, carried));
    (lane, LinkReceivers { control: on_control, urgent: on_urgent, bulk: on_bulk })
}

/// Runs a carrier; dropping it at the wire's end ends the receivers, and its own end (nobody listens) ends the wire.
async fn until_ended(wire: Arc<Wire>, lane: Arc<Lane>, from_first: bool, carrier: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        _ = wire.has_ended() => {}
        () = carrier => wire.end(Ended::Closed { by_first: !from_first, reason: "a receiver was dropped".into() }),
    }
    let error = wire.has_ended().await.seen_by(from_first);
    // Nothing joins the queue of a wire that has ended: `MemoryLink::queue` looks under the same lock.
    let queue = std::mem::take(&mut *lane.queue.lock());
    for queued in queue {
        queued.duty.settle(Err(error.clone()));
    }
}

async fn not_stalled(wire: &Wire) {
    let mut stalled = wire.stalled.subscribe();
    // Fails only without its sender, which is in `wire`.
    let _ = stalled.wait_for(|stalled| !stalled).await;
}

async fn carry_control(wire: Arc<Wire>, mut queue: mpsc::Receiver<Bytes>, out: mpsc::Sender<Bytes>) {
    while let Some(frame) = queue.recv().await {
        not_stalled(&wire).await;
        if out.send(frame).await.is_err() {
            return;
        }
    }
}

/// Delivers the most urgent message for whose receiver there is room: stalled bulk holds up nobody.
async fn carry_data(wire: Arc<Wire>, lane: Arc<Lane>, urgent: mpsc::Sender<Bytes>, bulk: mpsc::Sender<Bytes>) {
    loop {
        not_stalled(&wire).await;
        let (mut wait_urgent, mut wait_bulk) = (false, false);
        let mut picked = None;
        {
            let mut queue = lane.queue.lock();
            for class in Class::ALL {
                // The oldest of the class first; one whose receiver is full lets the others pass.
                let found = queue.iter().position(|queued| {
                    let full = if queued.class == Class::Bulk { wait_bulk } else { wait_urgent };
                    queued.urgency() == class && !full
                });
                let Some(at) = found else { continue };
                let out = if queue[at].class == Class::Bulk { &bulk } else { &urgent };
                match out.clone().try_reserve_owned() {
                    Ok(room) => picked = queue.remove(at).map(|queued| (queued, room)),
                    Err(mpsc::error::TrySendError::Closed(_)) => return,
                    Err(mpsc::error::TrySendError::Full(_)) if queue[at].class == Class::Bulk => wait_bulk = true,
                    Err(mpsc::error::TrySendError::Full(_)) => wait_urgent = true,
                }
                if picked.is_some() {
                    break;
                }
            }
        }
        if let Some((queued, room)) = picked {
            let mut message = queued.message.clone();
            if let Some(tamper) = wire.tamper.lock().as_mut() {
                let mut bytes = message.to_vec();
                tamper(queued.class, &mut bytes);
                message = Bytes::from(bytes);
            }
            room.send(message);
            queued.duty.settle(Ok(()));
            continue;
        }
        tokio::select! {
            () = lane.queued.notified() => {}
            room = urgent.reserve(), if wait_urgent => if room.is_err() { return },
            room = bulk.reserve(), if wait_bulk => if room.is_err() { return },
        }
    }
}

struct MemoryLink {
    peer: Name,
    wire: Arc<Wire>,
    lane: Arc<Lane>,
    is_first: bool,
}

impl MemoryLink {
    async fn ended(&self) -> LinkError {
        self.wire.has_ended().await.seen_by(self.is_first)
    }

    async fn queue(&self, class: Class, parts: Vec<Bytes>) -> Result<DataTicket, LinkError> {
        let message = Bytes::from(parts.concat());
        if message.len() > MAX_DATA_MESSAGE_BYTES {
            return Err(LinkError::TooLarge { bytes: message.len(), most: MAX_DATA_MESSAGE_BYTES });
        }
        let budget = match class {
            Class::Demand => &self.lane.demand,
            Class::Readahead => &self.lane.readahead,
            Class::Bulk => &self.lane.bulk,
        };
        let permit = budget.clone().acquire_many_owned(kib_permits(message.len())).await;
        let permit = permit.map_err(|_| LinkError::Lost { detail: "the link was dropped".into() })?;
        let (ticket, duty) = DataTicket::new(class);
        {
            let mut sent = self.lane.sent.lock();
            sent.sent_packets += 1;
            sent.udp_tx_bytes += message.len() as u64;
        }
        let queued = Queued { class, message, duty, _permit: permit };
        {
            let mut queue = self.lane.queue.lock();
            let ended = self.wire.ended.borrow().clone();
            match ended {
                Some(ended) => queued.duty.settle(Err(ended.seen_by(self.is_first))),
                None => queue.push_back(queued),
            }
        }
        self.lane.queued.notify_one();
        Ok(ticket)
    }
}

impl Link for MemoryLink {
    fn peer(&self) -> &Name {
        &self.peer
    }

    fn send_control(&self, frame: Bytes) -> BoxFuture<'_, Result<(), LinkError>> {
        async move {
            if frame.len() > MAX_CONTROL_FRAME_BYTES {
                return Err(LinkError::TooLarge { bytes: frame.len(), most: MAX_CONTROL_FRAME_BYTES });
            }
            tokio::select! {
                biased;
                ended = self.ended() => Err(ended),
                sent = self.lane.control.send(frame) => match sent {
                    Ok(()) => Ok(()),
                    Err(_) => Err(self.ended().await),
                },
            }
        }
        .boxed()
    }

    fn send_data(&self, class: Class, parts: Vec<Bytes>) -> BoxFuture<'_, Result<DataTicket, LinkError>> {
        async move {
            tokio::select! {
                biased;
                ended = self.ended() => Err(ended),
                queued = self.queue(class, parts) => queued,
            }
        }
        .boxed()
    }

    fn path(&self) -> PathStats {
        *self.lane.sent.lock()
    }

    fn close(&self, reason: &str) {
        self.wire.end(Ended::Closed { by_first: self.is_first, reason: reason.to_owned() });
    }

    fn closed(&self) -> BoxFuture<'_, LinkError> {
        self.ended().boxed()
    }
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        self.close("the link was dropped");
    }
}
