//! The relay's counters, as the control socket prints them. Field names are an interface.
//! Must not know: how they come about.

use serde::{Deserialize, Serialize};

/// One direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DirectionStats {
    /// Datagrams that came in.
    pub offered_packets: u64,
    /// Datagrams that passed the bottleneck: delivered, on their way, or lost behind it.
    pub packets: u64,
    /// Their payload.
    pub payload_bytes: u64,
    /// Their payload and 28 bytes of IP and UDP headers each: what the WAN carried.
    pub wire_bytes: u64,
    /// Datagrams handed to the other side.
    pub delivered_packets: u64,
    /// Dropped because the queue before the bottleneck was full.
    pub dropped_queue: u64,
    /// Lost at random behind the bottleneck.
    pub dropped_loss: u64,
    /// Lost because the link was cut when they came or were due.
    pub dropped_cut: u64,
    /// Larger than the MTU.
    pub dropped_mtu: u64,
    /// Lost by the relay or the kernel for want of room or time, or because nobody listens at the target. While the
    /// target runs this is 0, or the machine was too slow for the emulation to be trusted.
    pub dropped_relay: u64,
    /// The longest time that a packet waited before the bottleneck.
    pub max_queue_delay_ms: f64,
    /// What waits before the bottleneck now, in wire bytes.
    pub queue_bytes: u64,
    /// Whether this direction is cut now.
    pub cut: bool,
}

/// The whole relay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WanStats {
    /// Since the start or the last reset.
    pub elapsed_s: f64,
    /// Clients in the table now.
    pub clients: usize,
    /// Datagrams of new clients that found the table full.
    pub refused_packets: u64,
    /// CPU time of the relay's thread since its start.
    pub cpu_s: f64,
    /// The longest time that a datagram left later than the link said, since the start or the last reset.
    pub max_late_ms: f64,
    /// From the clients to the target.
    pub up: DirectionStats,
    /// From the target to the clients.
    pub down: DirectionStats,
}
