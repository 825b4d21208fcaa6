//! How QUIC and its socket are set up for a path of up to 1 Gbit/s x 200 ms, and why. Must not know peers.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use socket2::{Domain, Protocol, Socket, Type};

use super::delay_controller::DelayControlFactory;
use super::endpoint::EndpointOptions;
use super::limits::{MAX_STREAMS, RECEIVE_WINDOW_BYTES, SEND_WINDOW_BYTES, STREAM_RECEIVE_WINDOW_BYTES};

/// Off by default in quinn: without it an idle link dies, and a dead path is noticed only when something is sent.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// quinn assumes 333 ms until the first sample: too patient with a lost first packet.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// The kernel's default of 208 KiB lost thousands of packets at 1 Gbit/s where this lost none; quinn leaves it alone.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// An acknowledgement for every eighth packet (quinn sends one when *more* than this arrived) instead of every second: the
/// way back is the guest's way, too. Losses are still reported at once. Less than the ten packets that quinn's pacer sends in
/// one go: else every such burst waits for the timer below, and the congestion control takes that for a queue.
const ACK_AFTER_PACKETS: u32 = 7;
/// ... or after this, the end of a reply included: less than the target queue of the congestion control.
const ACK_AFTER: Duration = Duration::from_millis(3);

/// quinn's settings for a connection.
pub(super) fn transport_config(options: &EndpointOptions) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .send_window(SEND_WINDOW_BYTES as u64)
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES as u32))
        .stream_receive_window(VarInt::from_u32(STREAM_RECEIVE_WINDOW_BYTES as u32))
        .max_concurrent_uni_streams(VarInt::from_u32(MAX_STREAMS as u32))
        // Neither is used: a peer that tries loses its connection.
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(KEEP_ALIVE.min(options.idle_timeout / 3)))
        .max_idle_timeout(Some(IdleTimeout::try_from(options.idle_timeout).unwrap_or(VarInt::MAX.into())))
        .initial_rtt(INITIAL_RTT)
        .congestion_controller_factory(Arc::new(DelayControlFactory));
    // `send_fairness` stays on: without it a stream that is being sent is finished first, whatever comes with a higher
    // priority meanwhile.
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(options.max_packet_bytes);
    config.mtu_discovery_config(Some(discovery));
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_AFTER_PACKETS)).max_ack_delay(Some(ACK_AFTER));
    config.ack_frequency_config(Some(acks));
    config
}

/// A UDP socket with large buffers; an IPv6 wildcard takes IPv4, too.
pub(super) fn bind_socket(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    enlarge_buffers(&socket);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn enlarge_buffers(socket: &Socket) {
    use nix::sys::socket::{setsockopt, sockopt};
    // The forced variants pass the system's limit, for root only; the others are cut to it silently.
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    }
    // The kernel reports twice what it was asked for.
    let receive = socket.recv_buffer_size().unwrap_or(0) / 2;
    if receive < SOCKET_BUFFER_BYTES / 2 {
        tracing::warn!(
            "the kernel allows only {} KiB of receive buffer; packets may be lost on fast links: \
             sysctl -w net.core.rmem_max={SOCKET_BUFFER_BYTES} net.core.wmem_max={SOCKET_BUFFER_BYTES}",
            receive >> 10
        );
    }
}
