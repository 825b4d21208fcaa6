//! Pure decisions: ids and units, manifest, residency, fetch scheduler, wire codec, NBD codec and negotiation.
//! Must not know tokio, quinn, files, clocks or randomness: time and bytes come in as arguments.

pub mod frame;
pub mod ids;
pub mod manifest;
pub mod nbd;
pub mod residency;
pub mod scheduler;
pub mod wire;
