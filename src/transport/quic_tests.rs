//! What only QUIC has: who is let in, dialling again, peers that break the rules. Over loopback, on ports of the system's
//! choice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, VarInt};

use super::conformance::{PATIENCE, name, quic_pair, soon};
use super::limits::*;
use super::link::{LinkError, NewLink};
use super::tls::{self, Pin, PinVerifier};
use super::{Endpoint, EndpointOptions, Fingerprint, Identity, PeerTarget, Trust, keep_connected};
use crate::core::ids::Class;

fn options() -> EndpointOptions {
    EndpointOptions { handshake_timeout: Duration::from_secs(20), ..EndpointOptions::default() }
}

async fn site(identity: &Identity, listen: &str, peers: &[(&str, Fingerprint)]) -> Endpoint {
    let trust = Trust::new(peers.iter().map(|(peer, fingerprint)| (*fingerprint, name(peer))));
    Endpoint::bind(listen, identity.clone(), Arc::new(trust), options()).await.expect("bound")
}

fn target(peer: &str, endpoint: &Endpoint, fingerprint: Fingerprint) -> PeerTarget {
    let address = endpoint.local_addr().expect("bound").to_string();
    PeerTarget { name: name(peer), address, fingerprint }
}

fn identity() -> Identity {
    Identity::generate().expect("made")
}

#[tokio::test]
async fn an_unlisted_peer_gets_nothing_and_is_told_why() {
    let (of_server, of_stranger) = (identity(), identity());
    let server = site(&of_server, "127.0.0.1:0", &[]).await;
    let stranger = site(&of_stranger, "127.0.0.1:0", &[]).await;
    let outcome = soon!(stranger.connect(&target("server", &server, of_server.fingerprint())));
    let error = outcome.err().expect("refused");
    assert!(matches!(&error, LinkError::NotListed { own, .. } if *own == of_stranger.fingerprint()), "{error:?}");
    assert!(error.to_string().contains(&of_stranger.fingerprint().to_string()), "{error}");
    let accepted = tokio::time::timeout(Duration::from_millis(200), server.accept()).await;
    assert!(accepted.is_err(), "nothing may be handed over");
}

#[tokio::test]
async fn a_peer_that_is_listed_later_is_let_in_without_a_restart() {
    let (of_server, of_client) = (identity(), identity());
    let trust = Arc::new(Trust::default());
    let server = Endpoint::bind("127.0.0.1:0", of_server.clone(), trust.clone(), options()).await.expect("bound");
    let client = site(&of_client, "127.0.0.1:0", &[]).await;
    let target = target("server", &server, of_server.fingerprint());
    assert!(soon!(client.connect(&target)).is_err());
    trust.insert(of_client.fingerprint(), name("late"));
    let (dialled, accepted) = tokio::join!(client.connect(&target), server.accept());
    assert_eq!(dialled.expect("connected").link.peer().as_str(), "server");
    assert_eq!(accepted.expect("accepted").link.peer().as_str(), "late");
    trust.replace([]);
    assert!(soon!(client.connect(&target)).is_err(), "sessions are not resumed past the verifier");
}

#[tokio::test]
async fn a_server_with_another_fingerprint_is_refused_with_both() {
    let (of_server, of_client, expected) = (identity(), identity(), identity().fingerprint());
    let server = site(&of_server, "127.0.0.1:0", &[("client", of_client.fingerprint())]).await;
    let client = site(&of_client, "127.0.0.1:0", &[]).await;
    let error = soon!(client.connect(&target("server", &server, expected))).err().expect("refused");
    let presented = of_server.fingerprint();
    assert!(matches!(&error, LinkError::WrongFingerprint { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains(&format!("expected {expected}")) && text.contains(&format!("presented {presented}")),
        "{text}"
    );
}

#[tokio::test]
async fn bad_addresses_are_told_apart() {
    let client = site(&identity(), "127.0.0.1:0", &[]).await;
    let fingerprint = identity().fingerprint();
    for address in ["", "nonsense", "127.0.0.1", "[::1]:1"] {
        let target = PeerTarget { name: name("x"), address: address.into(), fingerprint };
        let error = soon!(client.connect(&target)).err().expect("refused");
        assert!(matches!(error, LinkError::Resolve { .. }), "{address}: {error}");
    }
    let busy = client.local_addr().expect("bound").to_string();
    let refused = Endpoint::bind(&busy, identity(), Arc::default(), options()).await.err().expect("taken");
    assert!(refused.to_string().contains("another daemon"), "{refused}");
    assert!(Endpoint::bind("nonsense", identity(), Arc::default(), options()).await.is_err());
}

#[tokio::test]
async fn silence_is_no_answer() {
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("bound");
    let short = EndpointOptions { handshake_timeout: Duration::from_millis(300), ..options() };
    let client = Endpoint::bind("127.0.0.1:0", identity(), Arc::default(), short).await.expect("bound");
    let address = silent.local_addr().expect("bound").to_string();
    let target = PeerTarget { name: name("x"), address, fingerprint: client.fingerprint() };
    let error = soon!(client.connect(&target)).err().expect("nobody is there");
    assert!(matches!(error, LinkError::NoAnswer { .. }), "{error}");
}

#[tokio::test]
async fn a_link_comes_back_after_the_server_restarts_on_the_same_port() {
    let (of_server, of_client) = (identity(), identity());
    let peers = [("client", of_client.fingerprint())];
    let server = site(&of_server, "127.0.0.1:0", &peers).await;
    let listen = server.local_addr().expect("bound").to_string();
    let quick = EndpointOptions { handshake_timeout: Duration::from_millis(500), ..options() };
    let client = Endpoint::bind("127.0.0.1:0", of_client, Arc::default(), quick).await.expect("bound");
    let (mut links, keeper) = keep_connected(client, target("server", &server, of_server.fingerprint()));

    let mut first = soon!(links.recv()).expect("connected");
    let accepted = soon!(server.accept()).expect("accepted");
    assert_eq!(keeper.last_error(), None);
    server.close("restarting");
    soon!(server.wait_idle());
    drop((server, accepted));
    assert_eq!(soon!(first.link.closed()), LinkError::ClosedByPeer { reason: "restarting".into() });
    assert!(soon!(first.receivers.control.recv()).is_none());

    let server = soon!(bind_again(&listen, &of_server, peers[0].1, &options()));
    let second = soon!(links.recv()).expect("connected again");
    let mut accepted = soon!(server.accept()).expect("accepted");
    soon!(second.link.send_control(Bytes::from_static(b"back"))).expect("sent");
    assert_eq!(soon!(accepted.receivers.control.recv()).expect("alive"), "back");
    assert_eq!(keeper.last_error(), None);
    drop(keeper);
    assert!(soon!(links.recv()).is_none());
}

#[tokio::test]
async fn one_port_accepts_and_dials() {
    let (of_a, of_b) = (identity(), identity());
    let a = site(&of_a, "127.0.0.1:0", &[("b", of_b.fingerprint())]).await;
    let b = site(&of_b, "127.0.0.1:0", &[("a", of_a.fingerprint())]).await;
    let (to_b, to_a) = (target("b", &b, of_b.fingerprint()), target("a", &a, of_a.fingerprint()));
    let (from_a, at_b) = tokio::join!(a.connect(&to_b), b.accept());
    let (from_b, at_a) = tokio::join!(b.connect(&to_a), a.accept());
    let links = [from_a.expect("up"), at_b.expect("up"), from_b.expect("up"), at_a.expect("up")];
    assert_eq!(links.each_ref().map(|new| new.link.peer().as_str()), ["b", "a", "a", "b"]);
    b.close("over");
    assert!(soon!(b.accept()).is_none());
    assert_eq!(soon!(links[0].link.closed()), LinkError::ClosedByPeer { reason: "over".into() });
    soon!(b.wait_idle());
}

#[tokio::test]
async fn a_client_that_stops_half_way_does_not_hold_up_the_next() {
    let (of_server, of_client) = (identity(), identity());
    let server = site(&of_server, "127.0.0.1:0", &[("client", of_client.fingerprint())]).await;
    let address = server.local_addr().expect("bound");
    // Listed, authenticated, and then silent: it never gives the first credit.
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(raw_connection(&of_client, address, of_server.fingerprint()).await);
    }
    let junk = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("bound");
    for length in [1, 100, 1200] {
        junk.send_to(&vec![0xc3; length], address).await.expect("sent");
    }
    let client = site(&of_client, "127.0.0.1:0", &[]).await;
    let target = target("server", &server, of_server.fingerprint());
    let (dialled, accepted) = soon!(async { tokio::join!(client.connect(&target), server.accept()) });
    dialled.expect("connected");
    accepted.expect("accepted");
}

#[tokio::test]
async fn bulk_flows_at_more_than_a_window_at_a_time() {
    let mut pair = quic_pair().await;
    let message = Bytes::from(vec![9; 1 << 20]);
    let sending = async {
        for _ in 0..150 {
            soon!(pair.a.link.send_data(Class::Bulk, vec![message.clone()])).expect("sent");
        }
    };
    let reading = async {
        for _ in 0..150 {
            assert_eq!(soon!(pair.b.receivers.bulk.recv()).expect("alive").len(), message.len());
        }
    };
    tokio::join!(sending, reading);
    let path = pair.a.link.path();
    assert!(path.udp_tx_bytes > 150 << 20 && path.sent_packets > 100_000, "{path:?}");
    let back = pair.b.link.path();
    assert!(back.sent_packets * 4 < path.sent_packets, "acknowledgements must be few: {back:?} for {path:?}");
}

/// A quinn connection that speaks TLS correctly and nothing else.
async fn raw_connection(
    identity: &Identity,
    address: std::net::SocketAddr,
    expected: Fingerprint,
) -> (quinn::Endpoint, Connection) {
    let tls = tls::client_config(identity, PinVerifier::new(Pin::Only(expected))).expect("a configuration");
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().expect("an address")).expect("bound");
    let config = quinn::ClientConfig::new(Arc::new(tls));
    let connecting = endpoint.connect_with(config, address, "blockferry").expect("started");
    let connection = soon!(connecting).expect("connected");
    (endpoint, connection)
}

/// A victim, and an authenticated peer that may send it anything.
async fn hostile() -> (Endpoint, NewLink, quinn::Endpoint, Connection) {
    let (of_victim, of_hostile) = (identity(), identity());
    let victim = site(&of_victim, "127.0.0.1:0", &[("hostile", of_hostile.fingerprint())]).await;
    let address = victim.local_addr().expect("bound");
    let (endpoint, connection) = raw_connection(&of_hostile, address, of_victim.fingerprint()).await;
    let credit = [&[0x81][..], &u64::MAX.to_le_bytes()].concat();
    let mut stream = soon!(connection.open_uni()).expect("open");
    soon!(stream.write_all(&credit)).expect("written");
    let accepted = soon!(victim.accept()).expect("let in");
    // Kept open for ever: its end would be a violation of its own.
    tokio::spawn(async move {
        let _ = stream.stopped().await;
    });
    (victim, accepted, endpoint, connection)
}

/// What each of these streams, sent whole, leads to.
#[tokio::test]
async fn peers_that_break_the_rules_lose_their_connection_with_a_reason() {
    let header = |class: u8, length: usize| [&[class][..], &(length as u32).to_le_bytes()[..3]].concat();
    let too_long = MAX_DATA_MESSAGE_BYTES + 1;
    let table: Vec<(&str, Vec<u8>)> = vec![
        ("within the kind of a stream", vec![]),
        ("unknown kind 0x07", vec![7]),
        ("within the length of a message", vec![0, 1]),
        ("within a message", [header(0, 10), vec![1; 9]].concat()),
        ("longer than it said", [header(1, 10), vec![1; 11]].concat()),
        ("more than 1114112", [header(2, too_long), vec![1; 11]].concat()),
        ("more than 1048576", [vec![0x80], u32::MAX.to_le_bytes().to_vec()].concat()),
        ("within a control frame", [vec![0x80], 5u32.to_le_bytes().to_vec(), vec![1]].concat()),
        ("a second credit stream", [vec![0x81], u64::MAX.to_le_bytes().to_vec()].concat()),
    ];
    for (expected, bytes) in table {
        let (_victim, accepted, _endpoint, connection) = hostile().await;
        let mut stream = soon!(connection.open_uni()).expect("open");
        soon!(stream.write_all(&bytes)).expect("written");
        stream.finish().expect("once");
        let error = soon!(accepted.link.closed());
        assert!(matches!(&error, LinkError::Violation { .. }), "{expected}: {error:?}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        let told = soon!(connection.closed()).to_string();
        assert!(told.contains(expected), "{expected}: the peer was told {told}");
    }
}

#[tokio::test]
async fn stream_kinds_and_credit_are_bounded() {
    // A bidirectional stream: quinn does not even let it be opened.
    let (_victim, _accepted, _endpoint, connection) = hostile().await;
    assert!(tokio::time::timeout(Duration::from_millis(100), connection.open_bi()).await.is_err());
    // Streams that stay open: as many as allowed, not one more.
    let mut open = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(300), connection.open_uni()).await {
        open.push(stream.expect("alive"));
        assert!(open.len() <= MAX_STREAMS);
    }
    assert!(open.len() >= MAX_STREAMS - 2, "{}", open.len());
    connection.close(VarInt::from_u32(0), b"");

    // Bulk beyond its credit, while nobody reads.
    let (_victim, accepted, _endpoint, connection) = hostile().await;
    let message = [&[2, 0, 0, 16][..], &vec![0; 1 << 20]].concat();
    let flood = async {
        loop {
            let Ok(mut stream) = connection.open_uni().await else { return };
            if stream.write_all(&message).await.is_err() {
                return;
            }
        }
    };
    soon!(flood);
    let error = soon!(accepted.link.closed()).to_string();
    assert!(error.contains("more bulk than its credit"), "{error}");
}

/// A relay that can be silenced stands for the network.
struct Relay {
    address: String,
    cut: Arc<AtomicBool>,
    carrying: tokio::task::JoinHandle<()>,
}

impl Relay {
    async fn between(client: &Endpoint, server: &Endpoint) -> Relay {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let (from, to) = (client.local_addr().expect("bound"), server.local_addr().expect("bound"));
        let address = socket.local_addr().expect("bound").to_string();
        let cut = Arc::new(AtomicBool::new(false));
        let is_cut = cut.clone();
        let carrying = tokio::spawn(async move {
            let mut packet = vec![0; 65536];
            loop {
                // Sending to a port that nobody has any more comes back as an error of the next receive.
                let Ok((length, sender)) = socket.recv_from(&mut packet).await else { continue };
                if !is_cut.load(Ordering::SeqCst) {
                    let receiver = if sender == from { to } else { from };
                    let _ = socket.send_to(&packet[..length], receiver).await;
                }
            }
        });
        Relay { address, cut, carrying }
    }

    fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.carrying.abort();
    }
}

/// Opens the port of an endpoint that ends: it is free when the old one's last task is gone.
async fn bind_again(listen: &str, identity: &Identity, client: Fingerprint, options: &EndpointOptions) -> Endpoint {
    loop {
        let trust = Arc::new(Trust::new([(client, name("client"))]));
        match Endpoint::bind(listen, identity.clone(), trust, options.clone()).await {
            Ok(endpoint) => break endpoint,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

#[tokio::test]
async fn a_peer_that_was_killed_and_is_back_ends_its_old_links() {
    let (of_server, of_client) = (identity(), identity());
    // Far beyond the patience of this test.
    let patient = EndpointOptions { idle_timeout: 10 * PATIENCE, ..options() };
    let trust = Arc::new(Trust::new([(of_client.fingerprint(), name("client"))]));
    let server = Endpoint::bind("127.0.0.1:0", of_server.clone(), trust, patient.clone()).await.expect("bound");
    let client =
        Endpoint::bind("127.0.0.1:0", of_client.clone(), Arc::default(), patient.clone()).await.expect("bound");
    let listen = server.local_addr().expect("bound").to_string();
    let relay = Relay::between(&client, &server).await;
    let target =
        PeerTarget { name: name("server"), address: relay.address.clone(), fingerprint: of_server.fingerprint() };
    let (dialled, accepted) = soon!(async { tokio::join!(client.connect(&target), server.accept()) });
    let (dialled, accepted) = (dialled.expect("connected"), accepted.expect("accepted"));

    // Killed: the client hears nothing of its end.
    relay.cut(true);
    server.close("killed");
    soon!(server.wait_idle());
    drop((server, accepted));
    let server = soon!(bind_again(&listen, &of_server, of_client.fingerprint(), &patient));
    relay.cut(false);

    // Nobody sends anything but keep-alives.
    let error = soon!(dialled.link.closed());
    assert!(matches!(&error, LinkError::Lost { detail } if detail.contains("reset")), "{error:?}");
    let (again, accepted) = soon!(async { tokio::join!(client.connect(&target), server.accept()) });
    assert!(again.is_ok() && accepted.is_some());
}

#[tokio::test]
async fn a_dead_path_is_noticed() {
    let (of_server, of_client) = (identity(), identity());
    let server = site(&of_server, "127.0.0.1:0", &[("client", of_client.fingerprint())]).await;
    let short = EndpointOptions { idle_timeout: Duration::from_millis(1500), ..options() };
    let client = Endpoint::bind("127.0.0.1:0", of_client, Arc::default(), short).await.expect("bound");
    let relay = Relay::between(&client, &server).await;
    let target =
        PeerTarget { name: name("server"), address: relay.address.clone(), fingerprint: of_server.fingerprint() };
    let (dialled, accepted) = soon!(async { tokio::join!(client.connect(&target), server.accept()) });
    let (mut dialled, _accepted) = (dialled.expect("connected"), accepted.expect("accepted"));
    // Kept alive far beyond the timeout without anything to say ...
    assert!(tokio::time::timeout(Duration::from_secs(3), dialled.link.closed()).await.is_err());
    // ... and dead when nothing comes any more.
    relay.cut(true);
    assert!(matches!(soon!(dialled.link.closed()), LinkError::TimedOut { .. }));
    assert!(soon!(dialled.receivers.bulk.recv()).is_none());
}
