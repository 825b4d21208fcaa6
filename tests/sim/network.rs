//! A connection of chance between the two sites: the library's [`Link`], in order within a stream and in no order between streams.
//! Must not know what messages mean; [`crate::wiretap`] looks at them.

use std::sync::Arc;
use std::time::Duration;

use blockferry::core::ids::{Class, Name};
use blockferry::transport::{BoxFuture, DataTicket, Link, LinkError, LinkReceivers, NewLink, PathStats, TicketDuty};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::wiretap::Wiretap;
use crate::world::{Flag, Shared, Side};

/// Messages of bulk that wait in a sender; urgent ones in theirs.
const BULK_BACKLOG: usize = 6;
const URGENT_BACKLOG: usize = 64;
/// Frames that wait in a sender, and messages that wait for a receiver.
const CONTROL_QUEUE: usize = 8;
const CHANNEL: usize = 8;

/// A connection. Either side may learn later than the other that it is gone.
pub struct Wire {
    world: Shared,
    /// Nothing is delivered any more.
    dead: Flag,
    ended: [(Flag, Mutex<Option<LinkError>>); 2],
    tap: Arc<Wiretap>,
}

/// One direction's sending end.
struct Sender {
    wire: Arc<Wire>,
    from: Side,
    peer: Name,
    control: mpsc::Sender<Bytes>,
    urgent_out: mpsc::Sender<Bytes>,
    bulk_out: mpsc::Sender<Bytes>,
    urgent: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
}

/// Connects: the destination's end, the source's end, and the handle that breaks it.
pub fn connect(world: &Shared, tap: &Arc<Wiretap>, destination: &Name, source: &Name) -> (NewLink, NewLink, Arc<Wire>) {
    let wire = Arc::new(Wire {
        world: Arc::clone(world),
        dead: Flag::default(),
        ended: Default::default(),
        tap: Arc::clone(tap),
    });
    tap.connected();
    let (from_destination, to_source) = direction(&wire, Side::Destination, source);
    let (from_source, to_destination) = direction(&wire, Side::Source, destination);
    let at_destination = NewLink { link: from_destination, receivers: to_destination };
    let at_source = NewLink { link: from_source, receivers: to_source };
    (at_destination, at_source, wire)
}

fn direction(wire: &Arc<Wire>, from: Side, peer: &Name) -> (Arc<Sender>, LinkReceivers) {
    let (control, queue) = mpsc::channel(CONTROL_QUEUE);
    let (control_out, on_control) = mpsc::channel(CHANNEL);
    let (urgent_out, on_urgent) = mpsc::channel(CHANNEL);
    let (bulk_out, on_bulk) = mpsc::channel(CHANNEL);
    tokio::spawn(carry_control(Arc::clone(wire), from, queue, control_out));
    let sender = Sender {
        wire: Arc::clone(wire),
        from,
        peer: peer.clone(),
        control,
        urgent_out,
        bulk_out,
        urgent: Arc::new(Semaphore::new(URGENT_BACKLOG)),
        bulk: Arc::new(Semaphore::new(BULK_BACKLOG)),
    };
    (Arc::new(sender), LinkReceivers { control: on_control, urgent: on_urgent, bulk: on_bulk })
}

impl Wire {
    /// The path is dead: nothing arrives any more, and each side finds out at its own time.
    pub fn cut(self: &Arc<Self>) {
        if !self.dead.set() {
            return;
        }
        self.world.note("link cut", [0; 3]);
        self.tap.lost();
        for side in [Side::Source, Side::Destination] {
            let wire = Arc::clone(self);
            tokio::spawn(async move {
                let most_ms = if wire.world.percent(30) { 6000 } else { 300 };
                wire.world.rest(0, most_ms).await;
                wire.end(side, LinkError::TimedOut { after: Duration::from_secs(30) });
            });
        }
    }

    /// One side's process has ended.
    pub fn process_ended(self: &Arc<Self>, side: Side) {
        self.end(side, LinkError::ClosedByUs { reason: "the process has ended".into() });
        self.cut();
    }

    fn close(self: &Arc<Self>, by: Side, reason: &str) {
        self.end(by, LinkError::ClosedByUs { reason: reason.to_owned() });
        if self.dead.set() {
            self.world.note("link closed", [by as u64, 0, 0]);
            self.world.say(|| format!("by the {by:?}: {reason}"));
            self.tap.lost();
            let other = if by == Side::Source { Side::Destination } else { Side::Source };
            self.end(other, LinkError::ClosedByPeer { reason: reason.to_owned() });
        }
    }

    fn end(&self, side: Side, how: LinkError) {
        let (flag, kept) = &self.ended[side as usize];
        kept.lock().get_or_insert(how);
        flag.set();
    }

    pub async fn has_ended(&self, side: Side) -> LinkError {
        let (flag, how) = &self.ended[side as usize];
        flag.wait().await;
        how.lock().clone().unwrap_or(LinkError::Lost { detail: "unknown".into() })
    }

    fn delay_ms(&self, is_control: bool) -> u64 {
        let more_ms = self.world.weather.lock().network_delay_ms;
        self.world.random(|random| {
            let own_ms = random.between(1, if is_control { 4 } else { 12 });
            let late_ms = if !is_control && random.percent(5) { random.below(80) } else { 0 };
            own_ms + late_ms + if more_ms > 0 { random.below(more_ms) } else { 0 }
        })
    }

    async fn until_delivered(&self, bulk: Option<&mut TicketDuty>) {
        let Some(duty) = bulk else { return self.world.until(|weather| !weather.is_link_stalled).await };
        loop {
            let class = *duty.promoted.borrow_and_update();
            let is_free = self
                .world
                .until(|weather| !(weather.is_link_stalled || weather.is_bulk_starved && class == Class::Bulk));
            tokio::select! {
                biased;
                () = is_free => return,
                _ = duty.next_promotion() => {}
            }
        }
    }
}

async fn carry_control(wire: Arc<Wire>, from: Side, mut queue: mpsc::Receiver<Bytes>, out: mpsc::Sender<Bytes>) {
    let to = if from == Side::Source { Side::Destination } else { Side::Source };
    let carry = async {
        while let Some(frame) = queue.recv().await {
            tokio::time::sleep(Duration::from_millis(wire.delay_ms(true))).await;
            wire.until_delivered(None).await;
            wire.world
                .note("control", [from as u64, u64::from(frame.first().copied().unwrap_or(0)), frame.len() as u64]);
            wire.tap.control(from, &frame);
            if out.send(frame).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        () = wire.dead.wait() => {}
        () = carry => {}
    }
    // The receiver does not end before its side knows that the connection has.
    wire.has_ended(to).await;
    drop(out);
}

impl Sender {
    async fn ended(&self) -> LinkError {
        self.wire.has_ended(self.from).await
    }

    async fn queue(&self, class: Class, message: Bytes) -> Result<DataTicket, LinkError> {
        let backlog = if class == Class::Bulk { &self.bulk } else { &self.urgent };
        let Ok(permit) = Arc::clone(backlog).acquire_owned().await else { return Err(self.ended().await) };
        let (ticket, duty) = DataTicket::new(class);
        let out = if class == Class::Bulk { self.bulk_out.clone() } else { self.urgent_out.clone() };
        tokio::spawn(carry_data(Arc::clone(&self.wire), self.from, message, duty, out, permit));
        Ok(ticket)
    }
}

async fn carry_data(
    wire: Arc<Wire>,
    from: Side,
    message: Bytes,
    mut duty: TicketDuty,
    out: mpsc::Sender<Bytes>,
    _backlog: OwnedSemaphorePermit,
) {
    let to = if from == Side::Source { Side::Destination } else { Side::Source };
    let carry = async {
        tokio::time::sleep(Duration::from_millis(wire.delay_ms(false))).await;
        wire.until_delivered(Some(&mut duty)).await;
        let Ok(room) = out.reserve().await else { return };
        let message = wire.tap.data(from, message);
        wire.world.note("data", [from as u64, u64::from(message.first().copied().unwrap_or(0)), message.len() as u64]);
        room.send(message);
    };
    tokio::select! {
        biased;
        () = wire.dead.wait() => {
            wire.has_ended(to).await;
            duty.settle(Err(LinkError::TimedOut { after: Duration::from_secs(30) }));
        }
        () = carry => duty.settle(Ok(())),
    }
}

impl Link for Sender {
    fn peer(&self) -> &Name {
        &self.peer
    }

    fn send_control(&self, frame: Bytes) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(async move {
            tokio::select! {
                biased;
                ended = self.ended() => Err(ended),
                sent = self.control.send(frame) => match sent {
                    Ok(()) => Ok(()),
                    Err(_) => Err(self.ended().await),
                },
            }
        })
    }

    fn send_data(&self, class: Class, parts: Vec<Bytes>) -> BoxFuture<'_, Result<DataTicket, LinkError>> {
        Box::pin(async move {
            tokio::select! {
                biased;
                ended = self.ended() => Err(ended),
                queued = self.queue(class, Bytes::from(parts.concat())) => queued,
            }
        })
    }

    fn path(&self) -> PathStats {
        PathStats { rtt: Duration::from_millis(10), min_rtt: Duration::from_millis(2), ..PathStats::default() }
    }

    fn close(&self, reason: &str) {
        self.wire.close(self.from, reason);
    }

    fn closed(&self) -> BoxFuture<'_, LinkError> {
        Box::pin(self.ended())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.wire.close(self.from, "the link was dropped");
    }
}
