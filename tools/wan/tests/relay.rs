//! The relay with real sockets on loopback. Nothing here depends on how fast the machine is.

use std::net::UdpSocket;
use std::time::Duration;

use blockferry_wan::{DirectionStats, LinkChange, LinkOptions, Probability, Wan, WanOptions, WanStats};

/// Long enough for the slowest machine; only a failure waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Long enough that a datagram which were let through would have come on most machines; a slow one can only hide a bug.
const SILENCE: Duration = Duration::from_millis(100);

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn start(target: &UdpSocket, link: LinkOptions) -> Wan {
    Wan::start(WanOptions::new(target.local_addr().unwrap(), link)).unwrap()
}

fn client(wan: &Wan) -> UdpSocket {
    let client = socket();
    client.connect(wan.local_addr()).unwrap();
    client
}

fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 65_536];
    let len = socket.recv(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

fn assert_silent(socket: &UdpSocket) {
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    assert!(socket.recv(&mut [0; 2000]).is_err());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
}

/// Asks until the counters say so: a datagram that has been received may be counted an instant later.
fn settled(wan: &Wan, is_settled: impl Fn(&WanStats) -> bool) -> WanStats {
    for _ in 0..2000 {
        let stats = wan.stats().unwrap();
        if is_settled(&stats) {
            return stats;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("never: {:?}", wan.stats());
}

#[test]
fn carries_both_ways_and_counts() {
    let target = socket();
    let wan = start(&target, LinkOptions { rate: "100Mbit/s".parse().ok(), ..Default::default() });
    let client = client(&wan);
    client.send(b"hello").unwrap();
    let mut buffer = [0; 100];
    let (len, from) = target.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"hello");
    target.send_to(b"good day", from).unwrap();
    assert_eq!(receive(&client), b"good day");
    let stats = settled(&wan, |s| s.up.delivered_packets == 1 && s.down.delivered_packets == 1);
    assert_eq!((stats.up.payload_bytes, stats.up.wire_bytes), (5, 33));
    assert_eq!((stats.down.payload_bytes, stats.down.wire_bytes), (8, 36));
    assert_eq!((stats.clients, stats.up.dropped_relay, stats.down.dropped_relay), (1, 0, 0));
    wan.reset().unwrap();
    assert_eq!(wan.stats().unwrap().up, DirectionStats::default());
}

#[test]
fn datagrams_of_every_size_arrive_in_order() {
    let target = socket();
    let wan = start(&target, LinkOptions { delay: Duration::from_millis(1), ..Default::default() });
    let client = client(&wan);
    for size in [0usize, 1, 1200, 1472, 9000, 65_507] {
        let payload: Vec<u8> = (0..size).map(|i| i as u8).collect();
        for copy in 0..3u8 {
            client.send(&payload).unwrap();
            client.send(&[copy; 2]).unwrap();
            assert_eq!(receive(&target), payload, "{size}");
            assert_eq!(receive(&target), [copy; 2]);
        }
    }
}

#[test]
fn clients_do_not_mix() {
    let target = socket();
    let wan = start(&target, LinkOptions::default());
    let clients: Vec<UdpSocket> = (0..20).map(|_| client(&wan)).collect();
    for (i, client) in clients.iter().enumerate() {
        client.send(&[i as u8]).unwrap();
    }
    for _ in &clients {
        let mut buffer = [0; 10];
        let (len, from) = target.recv_from(&mut buffer).unwrap();
        target.send_to(&[&buffer[..len], b"!"].concat(), from).unwrap();
    }
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(receive(client), [i as u8, b'!']);
    }
    assert_eq!(wan.stats().unwrap().clients, 20);
}

#[test]
fn the_table_is_bounded_and_forgets_the_idle() {
    let target = socket();
    let wan = Wan::start(WanOptions {
        max_clients: 1,
        idle: Duration::from_millis(1),
        ..WanOptions::new(target.local_addr().unwrap(), LinkOptions::default())
    })
    .unwrap();
    let (first, second) = (client(&wan), client(&wan));
    first.send(b"1").unwrap();
    second.send(b"2").unwrap();
    assert_eq!(receive(&target), b"1");
    settled(&wan, |s| s.refused_packets == 1);
    settled(&wan, |s| s.clients == 0);
    second.send(b"3").unwrap();
    assert_eq!(receive(&target), b"3");
}

#[test]
fn a_cut_silences_and_a_mend_restores() {
    let target = socket();
    let wan = start(&target, LinkOptions::default());
    let client = client(&wan);
    wan.cut().unwrap();
    client.send(b"lost").unwrap();
    settled(&wan, |s| s.up.dropped_cut == 1 && s.up.cut && s.down.cut);
    wan.mend().unwrap();
    client.send(b"found").unwrap();
    assert_eq!(receive(&target), b"found");
}

#[test]
fn a_cut_takes_what_is_on_its_way() {
    let target = socket();
    let wan = start(&target, LinkOptions { delay: Duration::from_millis(300), ..Default::default() });
    let client = client(&wan);
    client.send(b"lost").unwrap();
    settled(&wan, |s| s.up.packets == 1);
    wan.cut().unwrap();
    let stats = settled(&wan, |s| s.up.dropped_cut == 1);
    assert_eq!(stats.up.delivered_packets, 0);
    assert_silent(&target);
}

#[test]
fn what_is_set_applies() {
    let target = socket();
    let wan = start(&target, LinkOptions::default());
    let client = client(&wan);
    wan.set(LinkChange { loss: Probability::new(1.0), ..Default::default() }).unwrap();
    client.send(b"lost").unwrap();
    settled(&wan, |s| s.up.dropped_loss == 1);
    wan.set(LinkChange { loss: Probability::new(0.0), ..Default::default() }).unwrap();
    client.send(b"found").unwrap();
    assert_eq!(receive(&target), b"found");
}

#[test]
fn a_target_that_restarts_is_found_again() {
    let target = socket();
    let address = target.local_addr().unwrap();
    let wan = start(&target, LinkOptions::default());
    let client = client(&wan);
    client.send(b"1").unwrap();
    assert_eq!(receive(&target), b"1");
    drop(target);
    for _ in 0..10 {
        client.send(b"nobody is there").unwrap();
    }
    settled(&wan, |s| s.up.delivered_packets + s.up.dropped_relay == 11);
    let target = UdpSocket::bind(address).unwrap();
    target.set_read_timeout(Some(PATIENCE)).unwrap();
    for _ in 0..3 {
        client.send(b"2").unwrap();
        assert_eq!(receive(&target), b"2");
    }
}

#[test]
fn an_address_in_use_is_a_clear_error() {
    let taken = socket();
    let address = taken.local_addr().unwrap();
    let options = WanOptions { listen: address, ..WanOptions::new(address, LinkOptions::default()) };
    let error = Wan::start(options).unwrap_err().to_string();
    assert!(error.contains(&address.to_string()) && error.contains("--listen"), "{error}");
}

#[test]
fn a_dropped_relay_is_gone() {
    let target = socket();
    let wan = start(&target, LinkOptions::default());
    let (address, handle) = (wan.local_addr(), wan.handle());
    drop(wan);
    UdpSocket::bind(address).unwrap();
    assert!(handle.ask(blockferry_wan::relay::Request::Stats).is_err());
}
