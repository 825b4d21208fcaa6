//! The receiving side of a QUIC connection: reads streams as hostile input and sorts them into bounded channels. Must not
//! know how the connection was made.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use quinn::{ReadExactError, RecvStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::limits::*;
use super::link::LinkReceivers;
use super::quic_link::{CONTROL_STREAM, CREDIT_STREAM, Shared};
use crate::core::ids::Class;

/// Why a stream's task ended before its time.
enum StreamEnd {
    /// The peer broke a rule: the connection goes.
    Violation(String),
    /// Our consumer is gone: so goes the connection.
    NobodyListens,
    /// The connection is gone already.
    ConnectionLost,
}

struct Sorter {
    shared: Arc<Shared>,
    control: mpsc::Sender<Bytes>,
    urgent: mpsc::Sender<Bytes>,
    bulk: mpsc::Sender<Bytes>,
    urgent_reading: Semaphore,
    bulk_credit: BulkAccount,
    has_control_stream: AtomicBool,
    has_credit_stream: AtomicBool,
}

/// Bulk credit from the giver's side, since the link's start.
struct BulkAccount {
    admitted: AtomicU64,
    consumed: AtomicU64,
    announced: watch::Sender<u64>,
}

/// Starts reading; ends with the connection.
pub(super) fn start(shared: Arc<Shared>, announced: watch::Sender<u64>) -> LinkReceivers {
    let (control, on_control) = mpsc::channel(CONTROL_CHANNEL_FRAMES);
    let (urgent, on_urgent) = mpsc::channel(URGENT_CHANNEL_MESSAGES);
    let (bulk, on_bulk) = mpsc::channel(BULK_CHANNEL_MESSAGES);
    let sorter = Sorter {
        shared,
        control,
        urgent,
        bulk,
        urgent_reading: Semaphore::new(kib_permits(URGENT_READ_BYTES) as usize),
        bulk_credit: BulkAccount { admitted: AtomicU64::new(0), consumed: AtomicU64::new(0), announced },
        has_control_stream: AtomicBool::new(false),
        has_credit_stream: AtomicBool::new(false),
    };
    tokio::spawn(accept_streams(Arc::new(sorter)));
    LinkReceivers { control: on_control, urgent: on_urgent, bulk: on_bulk }
}

/// One task a stream (at most `MAX_STREAMS`), so that none waits for another. When the connection dies they are dropped,
/// and with them the channels' senders.
async fn accept_streams(sorter: Arc<Sorter>) {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            accepted = sorter.shared.connection.accept_uni() => match accepted {
                Ok(stream) => {
                    let sorter = sorter.clone();
                    streams.spawn(async move { sorter.read_stream(stream).await });
                }
                Err(_) => return,
            },
            Some(ended) = streams.join_next() => match ended {
                Ok(Ok(())) | Ok(Err(StreamEnd::ConnectionLost)) => {}
                Ok(Err(StreamEnd::Violation(detail))) => sorter.shared.violation(&detail),
                Ok(Err(StreamEnd::NobodyListens)) => sorter.shared.close("a receiver was dropped"),
                Err(panicked) => sorter.shared.close(&format!("reading failed: {panicked}")),
            },
        }
    }
}

impl Sorter {
    async fn read_stream(&self, mut stream: RecvStream) -> Result<(), StreamEnd> {
        let mut kind = [0];
        read_exact(&mut stream, &mut kind, "the kind of a stream").await?;
        match (kind[0], Class::from_wire(kind[0])) {
            (CONTROL_STREAM, _) => {
                first_of_its_kind(&self.has_control_stream, "control")?;
                self.read_control(stream).await
            }
            (CREDIT_STREAM, _) => {
                first_of_its_kind(&self.has_credit_stream, "credit")?;
                self.read_credit(stream).await
            }
            (_, Some(class)) => self.read_message(class, stream).await,
            (unknown, None) => Err(StreamEnd::Violation(format!("a stream of unknown kind {unknown:#04x}"))),
        }
    }

    async fn read_control(&self, mut stream: RecvStream) -> Result<(), StreamEnd> {
        loop {
            let mut header = [0; CONTROL_HEADER_BYTES];
            read_exact(&mut stream, &mut header, "the length of a control frame").await?;
            let length = u32::from_le_bytes(header) as usize;
            if length > MAX_CONTROL_FRAME_BYTES {
                let detail = format!("a control frame of {length} bytes, more than {MAX_CONTROL_FRAME_BYTES}");
                return Err(StreamEnd::Violation(detail));
            }
            // Room first: a consumer that stalls leaves the frame unread, and flow control stops the peer.
            let room = self.control.reserve().await.map_err(|_| StreamEnd::NobodyListens)?;
            let mut frame = BytesMut::zeroed(length);
            read_exact(&mut stream, &mut frame, "a control frame").await?;
            room.send(frame.freeze());
        }
    }

    async fn read_credit(&self, mut stream: RecvStream) -> Result<(), StreamEnd> {
        loop {
            let mut total = [0; 8];
            read_exact(&mut stream, &mut total, "bulk credit").await?;
            if !self.shared.gate.set_credit(u64::from_le_bytes(total)) {
                return Err(StreamEnd::Violation("bulk credit was taken back".into()));
            }
            self.shared.let_in.send_replace(true);
        }
    }

    async fn read_message(&self, class: Class, mut stream: RecvStream) -> Result<(), StreamEnd> {
        let mut header = [0; DATA_HEADER_BYTES];
        read_exact(&mut stream, &mut header[..DATA_HEADER_BYTES - 1], "the length of a message").await?;
        let length = u32::from_le_bytes(header) as usize;
        if length > MAX_DATA_MESSAGE_BYTES {
            let detail = format!("a {class:?} message of {length} bytes, more than {MAX_DATA_MESSAGE_BYTES}");
            return Err(StreamEnd::Violation(detail));
        }
        match class {
            Class::Demand | Class::Readahead => {
                let reading = self.urgent_reading.acquire_many(kib_permits(length)).await;
                let _reading = reading.map_err(|_| StreamEnd::ConnectionLost)?;
                let message = read_rest(&mut stream, length).await?;
                self.urgent.send(message).await.map_err(|_| StreamEnd::NobodyListens)
            }
            Class::Bulk => {
                // What the credit admits is read at once: it fits in memory, and leaves quinn's window to the others.
                self.bulk_credit.admit(length)?;
                let message = read_rest(&mut stream, length).await?;
                self.bulk.send(message).await.map_err(|_| StreamEnd::NobodyListens)?;
                self.bulk_credit.consume(length);
                Ok(())
            }
        }
    }
}

impl BulkAccount {
    fn admit(&self, length: usize) -> Result<(), StreamEnd> {
        let charge = bulk_charge(length);
        let admitted = self.admitted.fetch_add(charge, Ordering::AcqRel) + charge;
        if admitted > *self.announced.borrow() {
            return Err(StreamEnd::Violation("more bulk than its credit allows".into()));
        }
        Ok(())
    }

    fn consume(&self, length: usize) {
        let charge = bulk_charge(length);
        let earned = self.consumed.fetch_add(charge, Ordering::AcqRel) + charge + BULK_CREDIT_BYTES;
        self.announced.send_if_modified(|announced| {
            let step = earned >= *announced + BULK_CREDIT_STEP_BYTES;
            if step {
                *announced = earned;
            }
            step
        });
    }
}

fn first_of_its_kind(seen: &AtomicBool, kind: &str) -> Result<(), StreamEnd> {
    if seen.swap(true, Ordering::AcqRel) {
        return Err(StreamEnd::Violation(format!("a second {kind} stream")));
    }
    Ok(())
}

async fn read_rest(stream: &mut RecvStream, length: usize) -> Result<Bytes, StreamEnd> {
    let mut message = BytesMut::zeroed(length);
    read_exact(stream, &mut message, "a message").await?;
    match stream.read_chunk(1, true).await {
        Ok(None) => Ok(message.freeze()),
        Ok(Some(_)) => Err(StreamEnd::Violation("a message longer than it said".into())),
        Err(quinn::ReadError::ConnectionLost(_)) => Err(StreamEnd::ConnectionLost),
        Err(error) => Err(StreamEnd::Violation(format!("a stream broke off: {error}"))),
    }
}

async fn read_exact(stream: &mut RecvStream, into: &mut [u8], what: &str) -> Result<(), StreamEnd> {
    match stream.read_exact(into).await {
        Ok(()) => Ok(()),
        Err(ReadExactError::ReadError(quinn::ReadError::ConnectionLost(_))) => Err(StreamEnd::ConnectionLost),
        Err(error) => Err(StreamEnd::Violation(format!("a stream ended within {what}: {error}"))),
    }
}
