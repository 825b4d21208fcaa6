//! The sending side of a QUIC connection: [`Link`] over quinn. Must not know how the connection was made.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use quinn::{Connection, ConnectionError, SendStream, StoppedError, VarInt, WriteError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::backlog::{BulkGate, Underway};
use super::limits::*;
use super::link::{DataTicket, Link, LinkError, NewLink, PathStats, TicketDuty, printable};
use super::quic_receive;
use crate::core::ids::{Class, Name};

/// The first byte of a stream: the number of a class, or one of these.
pub(super) const CONTROL_STREAM: u8 = 0x80;
/// Totals of bulk credit, 8 bytes each, little-endian. The first one also says "you are let in": a client's handshake
/// completes before the server has looked at its certificate.
pub(super) const CREDIT_STREAM: u8 = 0x81;

/// Codes that close a connection; the reason text says more.
const CLOSE_NORMAL: VarInt = VarInt::from_u32(0);
const CLOSE_VIOLATION: VarInt = VarInt::from_u32(1);

/// What the tasks of one connection share.
pub(super) struct Shared {
    pub(super) connection: Connection,
    pub(super) gate: BulkGate,
    /// Whether the peer's first credit has come.
    pub(super) let_in: watch::Sender<bool>,
    /// Why this side ended it, if it did.
    ended_here: OnceLock<LinkError>,
    idle_timeout: Duration,
}

impl Shared {
    pub(super) fn violation(&self, detail: &str) {
        tracing::warn!("closing the connection with {}: {detail}", self.connection.remote_address());
        self.end(LinkError::Violation { detail: detail.to_owned() }, CLOSE_VIOLATION, detail);
    }

    pub(super) fn close(&self, reason: &str) {
        self.end(LinkError::ClosedByUs { reason: reason.to_owned() }, CLOSE_NORMAL, reason);
    }

    fn end(&self, how: LinkError, code: VarInt, reason: &str) {
        // quinn would forget why a connection is dead already.
        if self.connection.close_reason().is_none() {
            let _ = self.ended_here.set(how);
            self.connection.close(code, reason.as_bytes());
        }
    }

    /// The congestion window.
    fn window_bytes(&self) -> u64 {
        self.connection.stats().path.cwnd
    }

    pub(super) async fn ended(&self) -> LinkError {
        self.explain(self.connection.closed().await)
    }

    pub(super) fn explain(&self, error: ConnectionError) -> LinkError {
        match error {
            ConnectionError::LocallyClosed => self
                .ended_here
                .get()
                .cloned()
                .unwrap_or_else(|| LinkError::ClosedByUs { reason: "the endpoint closed".into() }),
            ConnectionError::ApplicationClosed(close) => LinkError::ClosedByPeer { reason: printable(&close.reason) },
            ConnectionError::TimedOut => LinkError::TimedOut { after: self.idle_timeout },
            // Found by quinn: too many streams, a stream of a kind that is not allowed, more data than allowed.
            ConnectionError::TransportError(error) => LinkError::Violation { detail: error.to_string() },
            other => LinkError::Lost { detail: other.to_string() },
        }
    }
}

struct QuicLink {
    peer: Name,
    shared: Arc<Shared>,
    control: mpsc::Sender<Bytes>,
    demand: Arc<Semaphore>,
    readahead: Arc<Semaphore>,
    /// Messages so far.
    messages: AtomicU64,
}

/// Starts the tasks of an authenticated connection, and waits until the peer has let this side in. The caller bounds the
/// time; dropping the future closes the connection.
pub(super) async fn establish(
    connection: Connection,
    peer: Name,
    idle_timeout: Duration,
) -> Result<NewLink, LinkError> {
    let (let_in, mut on_let_in) = watch::channel(false);
    let shared =
        Arc::new(Shared { connection, gate: BulkGate::default(), let_in, ended_here: OnceLock::new(), idle_timeout });
    let unless_let_in = CloseUnlessKept(Some(&shared));
    let (control, control_queue) = mpsc::channel(CONTROL_QUEUE_FRAMES);
    let (credit, on_credit) = watch::channel(BULK_CREDIT_BYTES);
    let credit_stream = open(&shared, CREDIT_STREAM).await?;
    tokio::spawn(announce_credit(credit_stream, on_credit));
    let control_stream = open(&shared, CONTROL_STREAM).await?;
    tokio::spawn(write_control(control_stream, control_queue));
    let receivers = quic_receive::start(shared.clone(), credit);
    tokio::select! {
        ended = shared.ended() => return Err(ended),
        let_in = on_let_in.wait_for(|let_in| *let_in) => {
            // The sender lives in `shared`, which is here.
            let_in.map_err(|_| LinkError::Lost { detail: "the receiving task ended early".into() })?;
        }
    }
    unless_let_in.keep();
    let link = Arc::new(QuicLink {
        peer,
        shared,
        control,
        demand: Arc::new(Semaphore::new(kib_permits(URGENT_BACKLOG_BYTES) as usize)),
        readahead: Arc::new(Semaphore::new(kib_permits(URGENT_BACKLOG_BYTES) as usize)),
        messages: AtomicU64::new(0),
    });
    Ok(NewLink { link, receivers })
}

/// Closes the connection unless told to keep it.
struct CloseUnlessKept<'a>(Option<&'a Shared>);

impl CloseUnlessKept<'_> {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseUnlessKept<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            shared.close("the peer was not let in in time");
        }
    }
}

/// Opens one of the two streams that live as long as the connection.
async fn open(shared: &Shared, kind: u8) -> Result<SendStream, LinkError> {
    let mut stream = shared.connection.open_uni().await.map_err(|error| shared.explain(error))?;
    // Fails only for a stream that is closed already; then the write tells.
    let _ = stream.set_priority(CONTROL_PRIORITY);
    stream.write_all(&[kind]).await.map_err(|error| explain_write(shared, error))?;
    Ok(stream)
}

fn explain_write(shared: &Shared, error: WriteError) -> LinkError {
    match error {
        WriteError::ConnectionLost(error) => shared.explain(error),
        other => LinkError::Violation { detail: format!("a stream was refused: {other}") },
    }
}

/// Ends with the connection or with the last sender of frames.
async fn write_control(mut stream: SendStream, mut queue: mpsc::Receiver<Bytes>) {
    while let Some(frame) = queue.recv().await {
        let mut chunks = Vec::with_capacity(2);
        chunks.push(Bytes::copy_from_slice(&(frame.len() as u32).to_le_bytes()));
        push_chunks(&mut chunks, frame);
        if stream.write_all_chunks(&mut chunks).await.is_err() {
            return;
        }
    }
}

async fn announce_credit(mut stream: SendStream, mut credit: watch::Receiver<u64>) {
    loop {
        let total = *credit.borrow_and_update();
        if stream.write_all(&total.to_le_bytes()).await.is_err() || credit.changed().await.is_err() {
            return;
        }
    }
}

/// In pieces that are given back early when they are acknowledged.
fn push_chunks(chunks: &mut Vec<Bytes>, mut part: Bytes) {
    while part.len() > WRITE_CHUNK_BYTES {
        chunks.push(part.split_to(WRITE_CHUNK_BYTES));
    }
    if !part.is_empty() {
        chunks.push(part);
    }
}

/// What a message under way gives back when it is acknowledged.
enum Budget {
    Bulk(Underway),
    Urgent { _permit: OwnedSemaphorePermit },
}

impl QuicLink {
    async fn ended(&self) -> LinkError {
        self.shared.ended().await
    }

    async fn start_message(&self, class: Class, parts: Vec<Bytes>) -> Result<DataTicket, LinkError> {
        let bytes: usize = parts.iter().map(Bytes::len).sum();
        if bytes > MAX_DATA_MESSAGE_BYTES {
            return Err(LinkError::TooLarge { bytes, most: MAX_DATA_MESSAGE_BYTES });
        }
        let mut header = BytesMut::with_capacity(DATA_HEADER_BYTES);
        header.put_u8(class as u8);
        header.put_uint_le(bytes as u64, DATA_HEADER_BYTES - 1);
        let mut chunks = Vec::with_capacity(parts.len() + 1);
        chunks.push(header.freeze());
        parts.into_iter().for_each(|part| push_chunks(&mut chunks, part));

        let open = async || self.shared.connection.open_uni().await.map_err(|error| self.shared.explain(error));
        let urgent = match class {
            Class::Demand => Some(&self.demand),
            Class::Readahead => Some(&self.readahead),
            Class::Bulk => None,
        };
        let (stream, budget) = match urgent {
            Some(budget) => {
                let permit = budget.clone().acquire_many_owned(kib_permits(bytes)).await;
                let permit = permit.map_err(|_| LinkError::Lost { detail: "the link was dropped".into() })?;
                (open().await?, Budget::Urgent { _permit: permit })
            }
            None => {
                let turn = self.shared.gate.pass(bytes, || self.shared.window_bytes()).await;
                (open().await?, Budget::Bulk(turn.take()))
            }
        };
        // Nothing waits from here on: either nothing was sent or the message is on its way.
        let number = self.messages.fetch_add(1, Ordering::Relaxed);
        let _ = stream.set_priority(priority(class, number));
        let (ticket, duty) = DataTicket::new(class);
        tokio::spawn(write_message(self.shared.clone(), Outgoing { number, stream, chunks }, budget, duty));
        Ok(ticket)
    }
}

/// A message that has its stream.
struct Outgoing {
    number: u64,
    stream: SendStream,
    chunks: Vec<Bytes>,
}

impl Outgoing {
    fn promote(&self, class: Class) {
        // Fails only for a stream that is done.
        let _ = self.stream.set_priority(priority(class, self.number));
    }
}

async fn write_message(shared: Arc<Shared>, message: Outgoing, mut budget: Budget, mut duty: TicketDuty) {
    if let Budget::Bulk(under_way) = &mut budget {
        tokio::select! {
            biased;
            class = duty.next_promotion() => message.promote(class),
            () = shared.gate.may_write(under_way, || shared.window_bytes()) => {}
            // The write will say why.
            _ = shared.ended() => {}
        }
    }
    let outcome = write_and_wait(&shared, message, &mut duty).await;
    drop(budget);
    duty.settle(outcome);
}

async fn write_and_wait(shared: &Shared, mut message: Outgoing, duty: &mut TicketDuty) -> Result<(), LinkError> {
    loop {
        // Dropping a write that was not done loses nothing: what quinn has taken is cut off from `chunks`.
        tokio::select! {
            written = message.stream.write_all_chunks(&mut message.chunks) => {
                written.map_err(|error| explain_write(shared, error))?;
                break;
            }
            class = duty.next_promotion() => message.promote(class),
        }
    }
    // Fails only if the peer stopped the stream, which `stopped` reports.
    let _ = message.stream.finish();
    let mut stopped = std::pin::pin!(message.stream.stopped());
    loop {
        tokio::select! {
            stopped = &mut stopped => return match stopped {
                Ok(None) => Ok(()),
                Ok(Some(_)) => Err(LinkError::Violation { detail: "a message was refused".into() }),
                Err(StoppedError::ConnectionLost(error)) => Err(shared.explain(error)),
                Err(other) => Err(LinkError::Lost { detail: other.to_string() }),
            },
            class = duty.next_promotion() => message.promote(class),
        }
    }
}

impl Link for QuicLink {
    fn address(&self) -> Option<std::net::SocketAddr> {
        Some(self.shared.connection.remote_address())
    }

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
                sent = self.control.send(frame) => match sent {
                    Ok(()) => Ok(()),
                    // The writer ended, and it does only when the connection did.
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
                started = self.start_message(class, parts) => started,
            }
        }
        .boxed()
    }

    fn path(&self) -> PathStats {
        let stats = self.shared.connection.stats();
        PathStats {
            rtt: stats.path.rtt,
            min_rtt: self.shared.connection.min_rtt(),
            cwnd_bytes: stats.path.cwnd,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            udp_tx_bytes: stats.udp_tx.bytes,
            udp_rx_bytes: stats.udp_rx.bytes,
        }
    }

    fn close(&self, reason: &str) {
        self.shared.close(reason);
    }

    fn closed(&self) -> BoxFuture<'_, LinkError> {
        self.ended().boxed()
    }
}

impl Drop for QuicLink {
    fn drop(&mut self) {
        self.shared.close("the link was dropped");
    }
}
