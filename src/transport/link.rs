//! What a connection between two sites offers, whatever carries it: [`Link`], its receivers, its errors. Must not know
//! quinn.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};

use super::identity::Fingerprint;
use crate::core::ids::{Class, Name};

/// One live connection to one peer; cheap to share. It ends when either side closes it or the path is dead for the idle
/// timeout; then every call fails with the reason and the receivers end.
pub trait Link: Send + Sync + 'static {
    /// Who is at the other end, by the configuration that lists its fingerprint.
    fn peer(&self) -> &Name;

    /// Where it is, as far as that is known.
    fn address(&self) -> Option<SocketAddr> {
        None
    }

    /// Sends a frame of at most [`MAX_CONTROL_FRAME_BYTES`](super::MAX_CONTROL_FRAME_BYTES), above every class of data,
    /// reliably and in order with the other frames. Resolves when it is queued; waits while the bounded queue is full.
    fn send_control(&self, frame: Bytes) -> BoxFuture<'_, Result<(), LinkError>>;

    /// Sends one message, the concatenation of `parts`, of at most
    /// [`MAX_DATA_MESSAGE_BYTES`](super::MAX_DATA_MESSAGE_BYTES). Messages overtake each other; the peer receives each
    /// whole or not at all.
    ///
    /// Resolves when the message has its stream and the background task that writes it; the bytes stay in memory until
    /// they are acknowledged. Bulk waits here first, while about two congestion windows of bulk are unacknowledged or the
    /// peer's consumer lags far behind; demand and readahead wait only for their own, generous budgets.
    /// Dropping the future before it resolves sends nothing; dropping the ticket afterwards changes nothing.
    fn send_data(&self, class: Class, parts: Vec<Bytes>) -> BoxFuture<'_, Result<DataTicket, LinkError>>;

    /// What the path looks like at the moment.
    fn path(&self) -> PathStats;

    /// Ends the link at once; what is queued is lost. The peer is told `reason`.
    fn close(&self, reason: &str);

    /// Resolves when the link has ended, with the reason.
    fn closed(&self) -> BoxFuture<'_, LinkError>;
}

/// What a live link hands to its owner.
pub struct NewLink {
    /// The sending side.
    pub link: Arc<dyn Link>,
    /// The receiving side.
    pub receivers: LinkReceivers,
}

/// What arrives. Each ends (`None`) when the link is dead. Whoever does not read slows the peer down, in that channel only:
/// stalled bulk never holds up the other two. Dropping one of them closes the link.
#[derive(Debug)]
pub struct LinkReceivers {
    /// Control frames, in order.
    pub control: mpsc::Receiver<Bytes>,
    /// Messages that were sent as demand or readahead.
    pub urgent: mpsc::Receiver<Bytes>,
    /// Messages that were sent as bulk, promoted meanwhile or not.
    pub bulk: mpsc::Receiver<Bytes>,
}

/// A message under way.
#[derive(Debug)]
pub struct DataTicket {
    promoted: watch::Sender<Class>,
    acked: oneshot::Receiver<Result<(), LinkError>>,
}

/// The end of a [`DataTicket`] that the sending task holds: whoever implements [`Link`].
#[derive(Debug)]
pub struct TicketDuty {
    /// The class to send at from now on.
    pub promoted: watch::Receiver<Class>,
    acked: oneshot::Sender<Result<(), LinkError>>,
}

impl DataTicket {
    /// For a message that was sent as `class`.
    pub fn new(class: Class) -> (DataTicket, TicketDuty) {
        let (promoted, on_promoted) = watch::channel(class);
        let (on_acked, acked) = oneshot::channel();
        (DataTicket { promoted, acked }, TicketDuty { promoted: on_promoted, acked: on_acked })
    }

    /// Raises the message to `class`, as far as its bytes still lie in the sender; never lowers it. The peer still
    /// receives it in the channel of the class that it was sent as.
    pub fn promote(&self, class: Class) {
        self.promoted.send_if_modified(|current| {
            let raises = class.is_more_urgent_than(*current);
            if raises {
                *current = class;
            }
            raises
        });
    }

    /// Resolves when the peer's transport acknowledged the whole message; its consumer may not have seen it yet.
    pub async fn acked(self) -> Result<(), LinkError> {
        self.acked.await.unwrap_or(Err(LinkError::Lost { detail: "the sending task ended early".into() }))
    }
}

impl TicketDuty {
    /// Waits for the next promotion; for ever once the ticket is gone.
    pub async fn next_promotion(&mut self) -> Class {
        match self.promoted.changed().await {
            Ok(()) => *self.promoted.borrow_and_update(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Answers [`DataTicket::acked`].
    pub fn settle(self, outcome: Result<(), LinkError>) {
        // Nobody has to wait for it.
        let _ = self.acked.send(outcome);
    }
}

/// A link's path at one moment. Times are round trips; counters run from the link's start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PathStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// The smallest round-trip time of the link's life.
    pub min_rtt: Duration,
    /// Bytes that may be in the network at once.
    pub cwnd_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets that were lost, as far as it is known.
    pub lost_packets: u64,
    /// Bytes of UDP payload sent.
    pub udp_tx_bytes: u64,
    /// Bytes of UDP payload received.
    pub udp_rx_bytes: u64,
}

/// Why a link ended, or could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// By [`Link::close`] or with the endpoint.
    #[error("closed by this side: {reason}")]
    ClosedByUs {
        /// As given to [`Link::close`].
        reason: String,
    },
    /// The peer closed it.
    #[error("closed by the peer: {reason}")]
    ClosedByPeer {
        /// The peer's words; not to be trusted, at most 200 characters, no control characters.
        reason: String,
    },
    /// Nothing came from the peer for so long.
    #[error("nothing was heard from the peer for {} s: is it running, is the network up?", .after.as_secs_f32())]
    TimedOut {
        /// The time that it was given.
        after: Duration,
    },
    /// The connection broke otherwise.
    #[error("the connection broke: {detail}")]
    Lost {
        /// The transport's words.
        detail: String,
    },
    /// The peer broke the rules of the transport.
    #[error("the peer violated the protocol: {detail}; do both sites run compatible versions of blockferry?")]
    Violation {
        /// What it did.
        detail: String,
    },
    /// The message was not sent.
    #[error("a message of {bytes} bytes is too large: at most {most} can be sent")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The bound.
        most: usize,
    },
    /// The address is not an address, or its name is unknown.
    #[error("cannot resolve {address:?}: {detail}; an address is HOST:PORT")]
    Resolve {
        /// As configured.
        address: String,
        /// The resolver's words.
        detail: String,
    },
    /// Nobody answers there.
    #[error("no answer from {address} within {} s: is blockferry running there, does a firewall drop UDP?", .after.as_secs_f32())]
    NoAnswer {
        /// Where.
        address: SocketAddr,
        /// The time that it was given.
        after: Duration,
    },
    /// The connection could not be made for another reason.
    #[error("cannot connect to {address}: {detail}")]
    Dial {
        /// Where.
        address: SocketAddr,
        /// Why.
        detail: String,
    },
    /// Somebody else answers there, or the peer has a new identity.
    #[error(
        "{address} is not the {peer} that is configured: expected {expected}, presented {presented}; if {peer} has a new \
         identity, compare with what `blockferry init` prints there and change its `fingerprint` in the configuration here"
    )]
    WrongFingerprint {
        /// The peer that was dialled.
        peer: Name,
        /// Where.
        address: SocketAddr,
        /// As configured.
        expected: Fingerprint,
        /// Of the certificate that was presented.
        presented: Fingerprint,
    },
    /// The peer does not list this site.
    #[error(
        "{peer} at {address} refuses this site: its configuration does not list {own}; add it there, to the [[peers]] \
         entry of this site"
    )]
    NotListed {
        /// The peer that was dialled.
        peer: Name,
        /// Where.
        address: SocketAddr,
        /// This site's fingerprint.
        own: Fingerprint,
    },
}

/// Makes words from the network fit for a log.
pub(super) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let words: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    if words.is_empty() { "no reason given".into() } else { words }
}
