//! The NBD protocol, pure: numbers, byte-exact codec, negotiation and the checks that every request has to pass.
//! Must not know sockets, tokio, clocks, or what lies behind an export.
//!
//! Quotations are from `doc/proto.md` of the NBD project (the text of the extension `EXTENDED_HEADERS` included).
//!
//! - [`Negotiation`] is the handshake as a machine: bytes in, bytes out, questions about exports in between.
//! - [`Session`] is what the handshake agreed on; [`Session::parse`] takes one request header off the stream and
//!   either checks it into a [`Command`] or says which error answers it. All bounds checks are made here, once.
//! - [`ReplyStyle`] encodes replies in the form that was negotiated; [`fit_extents`] makes what an export says about
//!   its extents into what the protocol allows to be sent.

mod errno;
mod extents;
mod limits;
mod negotiation;
mod option;
mod reply;
mod request;
pub mod wire;

#[cfg(test)]
mod negotiation_tests;
#[cfg(test)]
mod tests;

pub use errno::NbdErrno;
pub use extents::{Extent, fit_extents};
pub use limits::{
    DEFAULT_PREFERRED_BYTES, MAX_EXTENTS, MAX_OPTION_BYTES, MAX_PAYLOAD_BYTES, MAX_STRING_BYTES, MIN_BLOCK_BYTES,
    REQUEST_HEADER_MAX_BYTES,
};
pub use negotiation::{CloseReason, ExportFacts, Negotiation, Refusal, Step, TlsPolicy};
pub use reply::{Header, ReplyStyle};
pub use request::{
    BadRequest, Command, ContextIndex, Fault, Parsed, Request, Session, Tag, ZeroFlags, parse_status_payload,
};
