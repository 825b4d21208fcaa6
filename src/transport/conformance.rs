//! What every link must do, whatever carries it: the same tests for QUIC over loopback and for the in-memory twin.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::limits::*;
use super::link::{DataTicket, Link, LinkError, LinkReceivers, NewLink};
use super::{Endpoint, EndpointOptions, Identity, PeerTarget, Trust, memory};
use crate::core::ids::{Class, Name};

/// Longer than anything here takes: a test that hangs fails, with its line.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

macro_rules! soon {
    ($future:expr) => {
        tokio::time::timeout($crate::transport::conformance::PATIENCE, $future).await.expect("it must not hang")
    };
}
pub(super) use soon;

pub(super) fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// Two ends, and what keeps them alive.
pub(super) struct Pair {
    pub(super) a: NewLink,
    pub(super) b: NewLink,
    _endpoints: Option<(Endpoint, Endpoint)>,
}

fn memory_pair() -> Pair {
    let (a, b) = memory::pair(name("a"), name("b"));
    Pair { a, b, _endpoints: None }
}

pub(super) async fn quic_pair() -> Pair {
    let (of_a, of_b) = (Identity::generate().expect("made"), Identity::generate().expect("made"));
    let trust_a = Arc::new(Trust::new([(of_b.fingerprint(), name("b"))]));
    let trust_b = Arc::new(Trust::new([(of_a.fingerprint(), name("a"))]));
    let options = EndpointOptions::default();
    let a = Endpoint::bind("127.0.0.1:0", of_a, trust_a, options.clone()).await.expect("bound");
    let b = Endpoint::bind("127.0.0.1:0", of_b, trust_b, options).await.expect("bound");
    let address = b.local_addr().expect("bound").to_string();
    let target = PeerTarget { name: name("b"), address, fingerprint: b.fingerprint() };
    let (dialled, accepted) = tokio::join!(a.connect(&target), b.accept());
    Pair { a: dialled.expect("connected"), b: accepted.expect("accepted"), _endpoints: Some((a, b)) }
}

/// Runs one conformance test over both carriers.
macro_rules! conformance {
    ($($test:ident),* $(,)?) => {
        mod over_memory {
            $(#[tokio::test] async fn $test() { super::$test(super::memory_pair()).await; })*
        }
        mod over_quic {
            $(#[tokio::test] async fn $test() { super::$test(super::quic_pair().await).await; })*
        }
    };
}

conformance!(
    control_keeps_its_order,
    control_waits_when_nobody_reads,
    data_of_every_class_arrives_whole,
    parts_are_joined,
    oversized_messages_are_refused,
    the_largest_messages_pass,
    stalled_bulk_holds_up_nobody,
    stalled_urgent_holds_up_nobody_else,
    bulk_waits_for_its_consumer,
    many_small_bulk_messages_leave_room,
    a_promoted_message_arrives_in_its_channel,
    closing_is_told_to_both_sides,
    a_dropped_link_closes,
    a_dropped_receiver_closes,
    tickets_end_with_the_link,
    many_at_once_both_ways,
);

fn payload(bytes: usize, seed: usize) -> Bytes {
    (0..bytes).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed) as u8).collect()
}

async fn send(link: &Arc<dyn Link>, class: Class, bytes: Bytes) -> DataTicket {
    soon!(link.send_data(class, vec![bytes])).expect("sent")
}

/// Sends bulk until the link lets no more through; returns how many bytes went. `settled` says whether it really waits:
/// everything that runs by itself must have had its turn.
async fn fill_with_bulk(link: &Arc<dyn Link>, message: &Bytes) -> usize {
    let mut sent = 0;
    loop {
        let sending = link.send_data(Class::Bulk, vec![message.clone()]);
        match tokio::time::timeout(Duration::from_millis(500), sending).await {
            Ok(ticket) => drop(ticket.expect("alive")),
            Err(_) => return sent,
        }
        sent += message.len();
        assert!(sent < 256 << 20, "bulk must wait for its consumer");
    }
}

async fn control_keeps_its_order(mut pair: Pair) {
    let sending = async {
        for number in 0..500u32 {
            let frame = [number.to_le_bytes().to_vec(), vec![7; number as usize % 300]].concat();
            soon!(pair.a.link.send_control(frame.into())).expect("sent");
        }
        soon!(pair.a.link.send_control(Bytes::new())).expect("an empty frame is a frame");
    };
    let receiving = async {
        for number in 0..500u32 {
            let frame = soon!(pair.b.receivers.control.recv()).expect("alive");
            assert_eq!(frame[..4], number.to_le_bytes());
            assert_eq!(frame.len(), 4 + number as usize % 300);
        }
        assert!(soon!(pair.b.receivers.control.recv()).expect("alive").is_empty());
    };
    tokio::join!(sending, receiving);
    assert_eq!((pair.a.link.peer().as_str(), pair.b.link.peer().as_str()), ("b", "a"));
}

async fn control_waits_when_nobody_reads(mut pair: Pair) {
    let frame = payload(64 << 10, 1);
    let mut sent = 0;
    while tokio::time::timeout(Duration::from_millis(500), pair.a.link.send_control(frame.clone())).await.is_ok() {
        sent += 1;
        assert!(sent < 1000, "the queue must be bounded");
    }
    assert!(sent >= CONTROL_QUEUE_FRAMES);
    for _ in 0..sent {
        assert_eq!(soon!(pair.b.receivers.control.recv()).expect("alive"), frame);
    }
}

async fn data_of_every_class_arrives_whole(mut pair: Pair) {
    for (seed, class) in Class::ALL.into_iter().enumerate() {
        let bytes = payload(65536 + seed, seed);
        let ticket = send(&pair.a.link, class, bytes.clone()).await;
        let receiver = match class {
            Class::Bulk => &mut pair.b.receivers.bulk,
            Class::Demand | Class::Readahead => &mut pair.b.receivers.urgent,
        };
        assert_eq!(soon!(receiver.recv()).expect("alive"), bytes);
        assert_eq!(soon!(ticket.acked()), Ok(()));
    }
    let path = pair.a.link.path();
    assert!(path.cwnd_bytes > 0 && path.udp_tx_bytes >= 3 * 65536 && path.rtt > Duration::ZERO, "{path:?}");
}

async fn parts_are_joined(mut pair: Pair) {
    let parts = vec![Bytes::from_static(b"head"), Bytes::new(), payload(200_000, 3), Bytes::from_static(b"tail")];
    soon!(pair.a.link.send_data(Class::Demand, parts.clone())).expect("sent");
    soon!(pair.a.link.send_data(Class::Demand, vec![])).expect("an empty message is a message");
    let mut received =
        [soon!(pair.b.receivers.urgent.recv()).expect("alive"), soon!(pair.b.receivers.urgent.recv()).expect("alive")];
    // Messages may overtake each other.
    received.sort_by_key(Bytes::len);
    assert_eq!(received, [Bytes::new(), Bytes::from(parts.concat())]);
}

async fn oversized_messages_are_refused(mut pair: Pair) {
    let control = soon!(pair.a.link.send_control(vec![0; MAX_CONTROL_FRAME_BYTES + 1].into()));
    assert!(matches!(control, Err(LinkError::TooLarge { .. })));
    let data = soon!(pair.a.link.send_data(Class::Bulk, vec![vec![0; MAX_DATA_MESSAGE_BYTES].into(), vec![0].into()]));
    assert!(matches!(data, Err(LinkError::TooLarge { .. })));
    // The link lives on.
    soon!(pair.a.link.send_control(Bytes::from_static(b"x"))).expect("sent");
    assert_eq!(soon!(pair.b.receivers.control.recv()).expect("alive"), "x");
}

async fn the_largest_messages_pass(mut pair: Pair) {
    let (frame, message) = (payload(MAX_CONTROL_FRAME_BYTES, 5), payload(MAX_DATA_MESSAGE_BYTES, 6));
    soon!(pair.a.link.send_control(frame.clone())).expect("sent");
    for class in Class::ALL {
        send(&pair.a.link, class, message.clone()).await;
    }
    assert_eq!(soon!(pair.b.receivers.control.recv()).expect("alive"), frame);
    assert_eq!(soon!(pair.b.receivers.bulk.recv()).expect("alive"), message);
    assert_eq!(soon!(pair.b.receivers.urgent.recv()).expect("alive"), message);
    assert_eq!(soon!(pair.b.receivers.urgent.recv()).expect("alive"), message);
}

async fn stalled_bulk_holds_up_nobody(mut pair: Pair) {
    fill_with_bulk(&pair.a.link, &payload(512 << 10, 1)).await;
    for seed in 0..50 {
        let bytes = payload(64 << 10, seed);
        send(&pair.a.link, Class::Demand, bytes.clone()).await;
        assert_eq!(soon!(pair.b.receivers.urgent.recv()).expect("alive"), bytes);
        soon!(pair.a.link.send_control(bytes.clone())).expect("sent");
        assert_eq!(soon!(pair.b.receivers.control.recv()).expect("alive"), bytes);
    }
}

async fn stalled_urgent_holds_up_nobody_else(mut pair: Pair) {
    let bytes = payload(64 << 10, 1);
    for _ in 0..2 * URGENT_CHANNEL_MESSAGES {
        send(&pair.a.link, Class::Readahead, bytes.clone()).await;
    }
    send(&pair.a.link, Class::Bulk, bytes.clone()).await;
    assert_eq!(soon!(pair.b.receivers.bulk.recv()).expect("alive"), bytes);
    soon!(pair.a.link.send_control(bytes.clone())).expect("sent");
    assert_eq!(soon!(pair.b.receivers.control.recv()).expect("alive"), bytes);
}

async fn bulk_waits_for_its_consumer(mut pair: Pair) {
    let message = payload(512 << 10, 1);
    let sent = fill_with_bulk(&pair.a.link, &message).await;
    assert!(sent <= BULK_CREDIT_BYTES as usize + BULK_CHANNEL_MESSAGES * message.len() * 2, "{sent}");
    let more = async {
        for _ in 0..200 {
            send(&pair.a.link, Class::Bulk, message.clone()).await;
        }
    };
    let read = async {
        for _ in 0..sent / message.len() + 200 {
            assert_eq!(soon!(pair.b.receivers.bulk.recv()).expect("alive").len(), message.len());
        }
    };
    tokio::join!(more, read);
}

async fn many_small_bulk_messages_leave_room(mut pair: Pair) {
    fill_with_bulk(&pair.a.link, &payload(100, 1)).await;
    send(&pair.a.link, Class::Demand, Bytes::from_static(b"urgent")).await;
    assert_eq!(soon!(pair.b.receivers.urgent.recv()).expect("alive"), "urgent");
}

async fn a_promoted_message_arrives_in_its_channel(mut pair: Pair) {
    let bytes = payload(1 << 20, 1);
    let ticket = send(&pair.a.link, Class::Bulk, bytes.clone()).await;
    ticket.promote(Class::Readahead);
    ticket.promote(Class::Demand);
    ticket.promote(Class::Bulk);
    assert_eq!(soon!(pair.b.receivers.bulk.recv()).expect("alive"), bytes);
    assert_eq!(soon!(ticket.acked()), Ok(()));
}

async fn all_end(receivers: &mut LinkReceivers) {
    while soon!(receivers.control.recv()).is_some() {}
    while soon!(receivers.urgent.recv()).is_some() {}
    while soon!(receivers.bulk.recv()).is_some() {}
}

async fn closing_is_told_to_both_sides(mut pair: Pair) {
    pair.a.link.close("maintenance at noon");
    let by_us = LinkError::ClosedByUs { reason: "maintenance at noon".into() };
    let by_peer = LinkError::ClosedByPeer { reason: "maintenance at noon".into() };
    assert_eq!(soon!(pair.a.link.closed()), by_us);
    assert_eq!(soon!(pair.b.link.closed()), by_peer);
    assert_eq!(soon!(pair.a.link.send_control(Bytes::new())), Err(by_us));
    assert_eq!(soon!(pair.b.link.send_data(Class::Demand, vec![])).err(), Some(by_peer));
    all_end(&mut pair.a.receivers).await;
    all_end(&mut pair.b.receivers).await;
}

async fn a_dropped_link_closes(mut pair: Pair) {
    drop(pair.a.link);
    assert!(matches!(soon!(pair.b.link.closed()), LinkError::ClosedByPeer { .. }));
    all_end(&mut pair.a.receivers).await;
    all_end(&mut pair.b.receivers).await;
}

async fn a_dropped_receiver_closes(mut pair: Pair) {
    drop(pair.b.receivers.urgent);
    send(&pair.a.link, Class::Demand, Bytes::from_static(b"to nobody")).await;
    let error = soon!(pair.a.link.closed());
    assert_eq!(error, LinkError::ClosedByPeer { reason: "a receiver was dropped".into() });
    all_end(&mut pair.a.receivers).await;
}

async fn tickets_end_with_the_link(pair: Pair) {
    let mut tickets = Vec::new();
    for _ in 0..100 {
        tickets.push(send(&pair.a.link, Class::Readahead, payload(64 << 10, 1)).await);
    }
    pair.a.link.close("enough");
    // Some were delivered before; none may hang.
    for ticket in tickets {
        let outcome = soon!(ticket.acked());
        assert!(matches!(outcome, Ok(()) | Err(LinkError::ClosedByUs { .. })), "{outcome:?}");
    }
}

async fn many_at_once_both_ways(pair: Pair) {
    async fn flood(link: Arc<dyn Link>) {
        let sending = (0..600usize).map(|number| {
            let link = link.clone();
            async move {
                let class = Class::ALL[number % 3];
                let ticket = send(&link, class, payload(number * 97, number)).await;
                assert_eq!(soon!(ticket.acked()), Ok(()));
            }
        });
        futures::future::join_all(sending).await;
    }
    async fn drain(receivers: &mut LinkReceivers) {
        let mut bytes = 0;
        for _ in 0..600 {
            let message = tokio::select! {
                message = receivers.urgent.recv() => message,
                message = receivers.bulk.recv() => message,
                () = tokio::time::sleep(PATIENCE) => panic!("it must not hang"),
            };
            bytes += message.expect("alive").len();
        }
        assert_eq!(bytes, (0..600).map(|number| number * 97).sum::<usize>());
    }
    let Pair { a, b, _endpoints } = pair;
    let (mut to_a, mut to_b) = (a.receivers, b.receivers);
    tokio::join!(flood(a.link.clone()), flood(b.link.clone()), drain(&mut to_a), drain(&mut to_b));
}

#[tokio::test]
async fn a_cut_twin_ends_everything() {
    let (mut a, mut b, fault) = memory::pair_with_faults(name("a"), name("b"));
    let waiting = a.link.closed();
    fault.cut();
    assert!(matches!(soon!(waiting), LinkError::TimedOut { .. }));
    assert!(soon!(a.link.send_control(Bytes::new())).is_err());
    assert!(soon!(b.link.send_data(Class::Demand, vec![])).is_err());
    all_end(&mut a.receivers).await;
    all_end(&mut b.receivers).await;
}

#[tokio::test]
async fn a_stalled_twin_delivers_by_class_afterwards_and_promotion_counts() {
    let (a, mut b, fault) = memory::pair_with_faults(name("a"), name("b"));
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    fault.tamper({
        let order = order.clone();
        move |class, bytes| {
            order.lock().push((class, bytes.clone()));
            bytes.push(b'!');
        }
    });
    fault.stall();
    let mut tickets = Vec::new();
    for (class, text) in [(Class::Bulk, "1"), (Class::Bulk, "2"), (Class::Readahead, "3"), (Class::Demand, "4")] {
        tickets.push(send(&a.link, class, Bytes::from_static(text.as_bytes())).await);
    }
    tickets[1].promote(Class::Demand);
    assert!(tokio::time::timeout(Duration::from_millis(50), b.receivers.urgent.recv()).await.is_err());
    fault.unstall();
    for ticket in tickets {
        assert_eq!(soon!(ticket.acked()), Ok(()));
    }
    let carried: Vec<(Class, String)> =
        order.lock().iter().map(|(class, bytes)| (*class, String::from_utf8_lossy(bytes).into_owned())).collect();
    let expected = [(Class::Bulk, "2"), (Class::Demand, "4"), (Class::Readahead, "3"), (Class::Bulk, "1")]
        .map(|(c, t)| (c, t.into()));
    assert_eq!(carried, expected);
    assert_eq!(soon!(b.receivers.urgent.recv()).expect("alive"), "4!");
    assert_eq!(soon!(b.receivers.bulk.recv()).expect("alive"), "2!");
    fault.no_tamper();
    send(&a.link, Class::Demand, Bytes::from_static(b"5")).await;
    assert_eq!(soon!(b.receivers.urgent.recv()).expect("alive"), "3!");
    assert_eq!(soon!(b.receivers.urgent.recv()).expect("alive"), "5");
}
