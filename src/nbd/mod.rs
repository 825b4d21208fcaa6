//! The NBD front end: sockets, sessions, errors as a client sees them. What is served is behind two small traits.
//! Must not know the store, fetching, or QUIC; the protocol itself is in [`crate::core::nbd`].
//!
//! ```text
//! listener --accept--> handshake (task on the caller's runtime, with a deadline)
//!                          | Negotiation asks Exports
//!                          v
//!                      transmission (a thread of its own): requests in, replies out, Export in between
//! ```

mod budget;
mod connection;
mod credentials;
mod execute;
mod handshake;
mod listen;
mod output;
mod server;
mod socket;
mod tls;
mod transmission;
mod watch;

#[cfg(test)]
mod piped_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;

use std::sync::Arc;

use bytes::Bytes;
pub use futures::future::BoxFuture;

use crate::pipe::Pipe;

pub use crate::core::nbd::{ContextIndex, Extent, NbdErrno, ZeroFlags};
pub use credentials::{NbdCredentials, NbdCredentialsError, NbdTls, NbdTlsFiles};
pub use listen::{ListenError, NbdAddr, NbdListen, NbdListener};
pub use server::{NbdLimits, NbdServer};

/// A disk as NBD clients see it. Every range that a method is given lies within [`Export::size_bytes`] and is not
/// empty: the caller has checked. Requests run concurrently and in no order; the order that clients rely on is that of
/// [`Export::flush`].
///
/// The futures are polled on the thread of their client, inside a runtime that ends with the connection: what has to
/// outlive the request belongs on threads or on a runtime of the export's own, not into a bare `tokio::spawn`.
pub trait Export: Send + Sync + 'static {
    /// The size, in bytes. Asked once a handshake: it must not shrink while clients are connected.
    fn size_bytes(&self) -> u64;

    /// Whether clients are told that writes will be refused, asked once a handshake. Where it may change while a client
    /// is connected (a volume that is handed over), say `false` and answer writes with [`NbdErrno::Perm`].
    fn is_read_only(&self) -> bool;

    /// For people, at most 4096 bytes.
    fn description(&self) -> String;

    /// The size at which requests are efficient: a power of two from 512 to 64 KiB.
    fn preferred_block_bytes(&self) -> u32;

    /// The names of the metadata contexts, such as `base:allocation`; a [`ContextIndex`] is a position in this list,
    /// which has to be the same each time.
    fn contexts(&self) -> Vec<String> {
        vec![crate::core::nbd::wire::BASE_ALLOCATION.to_owned()]
    }

    /// Reads `len_bytes` (at most 32 MiB) from `offset`. The future is dropped unfinished when the client has gone.
    fn read(&self, offset: u64, len_bytes: u32) -> BoxFuture<'_, Result<ReadData, NbdErrno>>;

    /// Writes `data` (at most 32 MiB) at `offset`; with `fua`, returns when it is durable. Not dropped unfinished,
    /// except where a shutdown runs out of time; the same holds for the other methods that change something.
    fn write(&self, offset: u64, data: Bytes, fua: bool) -> BoxFuture<'_, Result<(), NbdErrno>>;

    /// Returns when everything is durable that was acknowledged before the call, on whatever connection: all exports
    /// advertise CAN_MULTI_CONN, by which "the effects of NBD_CMD_FLUSH and NBD_CMD_FLAG_FUA MUST be visible across all
    /// connections". Succeeds for a client that never wrote, and on a read-only export.
    fn flush(&self) -> BoxFuture<'_, Result<(), NbdErrno>>;

    /// Discards; the length may be that of the whole export.
    fn trim(&self, offset: u64, len_bytes: u64, fua: bool) -> BoxFuture<'_, Result<(), NbdErrno>>;

    /// Makes the range read as zeroes; the length may be that of the whole export. [`NbdErrno::NotSup`], and nothing
    /// done, where `flags.fast` is set and it would take as long as writing.
    fn write_zeroes(
        &self,
        offset: u64,
        len_bytes: u64,
        flags: ZeroFlags,
        fua: bool,
    ) -> BoxFuture<'_, Result<(), NbdErrno>>;

    /// A hint that the range will be read; may return before it has been fetched.
    fn cache(&self, offset: u64, len_bytes: u64) -> BoxFuture<'_, Result<(), NbdErrno>>;

    /// The extents of `context` from `offset` on, consecutive, at most `max_extents`, covering at most about
    /// `len_bytes`; fewer than would cover it are fine. See [`crate::core::nbd::fit_extents`] for what need not be
    /// perfect.
    fn extents(
        &self,
        context: ContextIndex,
        offset: u64,
        len_bytes: u64,
        max_extents: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdErrno>>;

    /// The fast path of a read (at most 128 KiB): fills `buf` at once, on the session's own thread, if nothing but the
    /// page cache is needed for it. `None`: take [`Export::read`]. A call that waits holds up its own client only.
    fn try_read_now(&self, _offset: u64, _buf: &mut [u8]) -> Option<Result<(), NbdErrno>> {
        None
    }

    /// The fast path of a write (at most 128 KiB), on the session's own thread. It may wait for the disk: a session that
    /// hangs in it for long goes on on another thread meanwhile. `None`, and nothing done: take [`Export::write`].
    fn write_here(&self, _offset: u64, _data: &[u8], _fua: bool) -> Option<Result<(), NbdErrno>> {
        None
    }

    /// The second fast path of a read (at most 128 KiB), for when [`Export::try_read_now`] finds that the disk has to be waited
    /// for: likewise.
    fn read_here(&self, _offset: u64, _buf: &mut [u8]) -> Option<Result<(), NbdErrno>> {
        None
    }

    /// The fast path of a longer read (at most [`crate::pipe::PIPE_MAX_BYTES`]), uncopied: puts the range into an empty pipe, if nothing but the
    /// page cache is needed for it. What is in the pipe may still change as the disk does, until the client has it.
    /// `None`, and nothing put: take [`Export::try_read_now`].
    fn read_into(&self, _offset: u64, _len_bytes: u32, _pipe: &mut Pipe) -> Option<()> {
        None
    }

    /// Whether [`Export::write_from`] is worth trying.
    fn takes_pipes(&self) -> bool {
        false
    }

    /// The fast path of a part of a longer write, uncopied: writes the first `len_bytes` of a pipe, waiting as
    /// [`Export::write_here`] does. `None`, and nothing taken out: take [`Export::write`].
    fn write_from(&self, _offset: u64, _pipe: &mut Pipe, _len_bytes: usize) -> Option<Result<(), NbdErrno>> {
        None
    }

    /// The fast path of a flush, likewise.
    fn flush_here(&self) -> Option<Result<(), NbdErrno>> {
        None
    }

    /// Where the export may be withdrawn while clients are connected: completes when that happens, or at once if it has. Its clients are then
    /// hung up on without an answer; their reads are dropped, their changes still run to their end. Asked once a connection; must not
    /// hold on to the export.
    fn withdrawn(&self) -> Option<BoxFuture<'static, ()>> {
        None
    }
}

/// What a server offers.
pub trait Exports: Send + Sync + 'static {
    /// All names, for LIST.
    fn names(&self) -> Vec<String>;

    /// The export of this name.
    fn open(&self, name: &str) -> Result<Arc<dyn Export>, OpenError>;

    /// The name of the export that a client gets when it names none.
    fn default_export(&self) -> Option<String>;
}

/// Why an export cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is none of that name.
    #[error("there is no export of this name")]
    Unknown,
    /// It exists, but cannot be served now; the reason is sent to the client.
    #[error("the export cannot be served now: {0}")]
    NotNow(String),
}

/// The bytes that a read returned: in one piece, or in consecutive pieces that need not be copied together.
#[derive(Clone, Debug)]
pub enum ReadData {
    /// All of them.
    One(Bytes),
    /// Pieces, in order.
    Many(Vec<Bytes>),
}

impl ReadData {
    /// The pieces, in order.
    pub fn pieces(&self) -> &[Bytes] {
        match self {
            ReadData::One(bytes) => std::slice::from_ref(bytes),
            ReadData::Many(pieces) => pieces,
        }
    }

    /// How many bytes there are.
    pub fn len_bytes(&self) -> u64 {
        self.pieces().iter().map(|piece| piece.len() as u64).sum()
    }
}

impl From<Bytes> for ReadData {
    fn from(bytes: Bytes) -> ReadData {
        ReadData::One(bytes)
    }
}

impl From<Vec<Bytes>> for ReadData {
    fn from(pieces: Vec<Bytes>) -> ReadData {
        ReadData::Many(pieces)
    }
}
