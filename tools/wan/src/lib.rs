//! A wide-area network in user space, for tests and demos: a UDP relay with a bottleneck rate, a delay, jitter, random
//! loss, a tail-drop queue and a switch that cuts the link. It needs no privileges and counts every byte itself, so
//! that what a program claims to have sent can be checked from outside.
//!
//! The emulation is the pure [`link::Link`]; the driver in [`relay`] only moves datagrams at the times it says.
//! Must not know: what the datagrams carry.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use blockferry_wan::{LinkOptions, Wan, WanOptions};
//! let link = LinkOptions { rate: Some("100Mbit/s".parse()?), ..LinkOptions::default() };
//! let link = link.with_rtt(Duration::from_millis(40));
//! let wan = Wan::start(WanOptions::new("127.0.0.1:9000".parse()?, link))?;
//! println!("clients send to {}", wan.local_addr());
//! wan.cut()?;
//! wan.mend()?;
//! println!("{} bytes went up", wan.stats()?.up.wire_bytes);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod batch;
pub mod cli;
pub mod clients;
pub mod control;
pub mod control_socket;
pub mod error;
pub mod held;
pub mod link;
pub mod precision;
pub mod relay;
pub mod rng;
pub mod selftest;
pub mod sockets;
pub mod stats;
pub mod units;
pub mod wan;

pub use error::WanError;
pub use link::{LinkChange, LinkOptions, Queue};
pub use stats::{DirectionStats, WanStats};
pub use units::{Probability, Rate, Span};
pub use wan::{Direction, Wan, WanHandle, WanOptions};
