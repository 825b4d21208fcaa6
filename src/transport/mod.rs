//! Streams with a class between two authenticated sites: QUIC ([`Endpoint`], the only user of quinn) and an in-memory twin
//! ([`memory`]). Must not know what blocks, volumes or messages mean: payloads are opaque bytes.
//!
//! ```text
//! upper layers --[Link]--> quic_link ---(one uni stream a message)---> quic_receive --[LinkReceivers]--> upper layers
//!                            | backlog: how much bulk may be under way
//!                            | delay_control: how much may be in the network
//! ```

mod backlog;
mod delay_control;
mod delay_controller;
mod endpoint;
mod identity;
mod limits;
mod link;
pub mod memory;
mod quic_link;
mod quic_receive;
mod reconnect;
mod tls;
mod tuning;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod delay_simulation;
#[cfg(test)]
mod delay_tests;
#[cfg(test)]
mod quic_tests;

pub use futures::future::BoxFuture;

pub use endpoint::{BindError, Endpoint, EndpointOptions, PeerTarget};
pub use identity::{BadFingerprint, Fingerprint, Identity, IdentityError, Trust};
pub use limits::{MAX_CONTROL_FRAME_BYTES, MAX_DATA_MESSAGE_BYTES};
pub use link::{DataTicket, Link, LinkError, LinkReceivers, NewLink, PathStats, TicketDuty};
pub use reconnect::{Backoff, KeepConnected, keep_connected};
