//! TLS over a socket, the server's side, polled: rustls makes and reads the records, nothing here knows cryptography.
//! Must not know NBD.
//!
//! The session is plain data beside the socket, so that both can be taken from one runtime to another together.

use std::io::{self, BufRead, IoSlice, Write};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use rustls::{ServerConfig, ServerConnection};

use super::socket::Socket;

/// Ciphertext that is read from the socket at once: several records of 16 KiB.
const RECEIVE_BYTES: usize = 64 << 10;

/// Plaintext that is encrypted at once: eight records, which leave in one system call.
const SEND_BYTES: usize = 128 << 10;

/// A connection that TLS runs on.
pub(super) struct TlsSocket {
    socket: Socket,
    session: TlsSession,
}

/// What TLS knows of a connection, besides the socket.
pub(super) struct TlsSession {
    connection: ServerConnection,
    /// Ciphertext that has not been looked at.
    received: BytesMut,
    /// Plaintext that was encrypted, and of which the caller has not been told yet.
    accepted_bytes: usize,
}

impl TlsSocket {
    /// Does the handshake. When it fails the client has been told why, as far as it listens.
    pub(super) async fn accept(socket: Socket, config: &Arc<ServerConfig>) -> Result<TlsSocket, (Socket, io::Error)> {
        let mut connection = match ServerConnection::new(Arc::clone(config)) {
            Ok(connection) => connection,
            Err(error) => return Err((socket, io::Error::other(error))),
        };
        connection.set_buffer_limit(Some(SEND_BYTES));
        let session = TlsSession { connection, received: BytesMut::new(), accepted_bytes: 0 };
        let mut tls = TlsSocket { socket, session };
        match std::future::poll_fn(|cx| tls.poll_handshake(cx)).await {
            Ok(()) => Ok(tls),
            Err(error) => Err((tls.socket, error)),
        }
    }

    /// Socket and session, one by one.
    pub(super) fn into_parts(self) -> (Socket, TlsSession) {
        (self.socket, self.session)
    }

    /// What [`TlsSocket::into_parts`] took apart.
    pub(super) fn from_parts(socket: Socket, session: TlsSession) -> TlsSocket {
        TlsSocket { socket, session }
    }

    /// What TLS runs on.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Says that nothing more comes; what is left is the bare socket, to be closed.
    pub(super) async fn say_goodbye(mut self) -> io::Result<Socket> {
        self.session.connection.send_close_notify();
        std::future::poll_fn(|cx| self.poll_send(cx)).await?;
        Ok(self.socket)
    }

    /// As [`Socket::poll_read`]. A connection that ends without TLS's own goodbye ends all the same: requests say how
    /// long they are, so that nothing is taken for whole that was cut off.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut BytesMut,
        max_bytes: usize,
    ) -> Poll<io::Result<usize>> {
        let mut taken = 0;
        loop {
            let mut reader = self.session.connection.reader();
            match reader.fill_buf() {
                Ok([]) => return Poll::Ready(Ok(taken)),
                Ok(plain) => {
                    let len = plain.len().min(max_bytes - taken);
                    buf.extend_from_slice(&plain[..len]);
                    reader.consume(len);
                    taken += len;
                    if taken == max_bytes {
                        return Poll::Ready(Ok(taken));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // What is at hand is decrypted first: one call then takes all that one system call brought.
                    if self.session.received.is_empty() {
                        if taken > 0 {
                            return Poll::Ready(Ok(taken));
                        }
                        if ready!(self.poll_receive(cx))? == 0 {
                            return Poll::Ready(Ok(0));
                        }
                    }
                    if let Err(error) = self.digest(cx) {
                        // It is found again by the next call, when what came before it has been taken.
                        return Poll::Ready(if taken > 0 { Ok(taken) } else { Err(error) });
                    }
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// As [`Socket::poll_write`]: bytes count as written when the socket has taken their last record. Until then the
    /// same bytes have to be offered again, which is what a caller does who was told that none were written.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.session.accepted_bytes == 0 {
            ready!(self.poll_send(cx))?;
            self.session.accepted_bytes = self.session.connection.writer().write_vectored(slices)?;
        }
        ready!(self.poll_send(cx))?;
        Poll::Ready(Ok(std::mem::take(&mut self.session.accepted_bytes)))
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_send(cx))?;
            if !self.session.connection.is_handshaking() {
                return Poll::Ready(Ok(()));
            }
            if self.session.received.is_empty() && ready!(self.poll_receive(cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            self.digest(cx)?;
        }
    }

    /// Reads ciphertext; 0 bytes: the client sends no more.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.session.received.reserve(RECEIVE_BYTES);
        self.socket.poll_read(cx, &mut self.session.received, RECEIVE_BYTES)
    }

    /// Gives rustls some of the ciphertext at hand (not empty).
    fn digest(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        self.session.connection.read_tls(&mut (&mut self.session.received).reader())?;
        let processed = self.session.connection.process_new_packets();
        // An alert, or the answer to a change of keys: sent now if it can be, else before what is written next.
        if self.session.connection.wants_write() {
            let _ = self.poll_send(cx);
        }
        match processed {
            Ok(_) => Ok(()),
            Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }

    /// Sends all records that are ready.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.session.connection.wants_write() {
            let mut records = Records { socket: &mut self.socket, cx };
            match self.session.connection.write_tls(&mut records) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The socket as rustls writes to it.
struct Records<'a, 'b> {
    socket: &'a mut Socket,
    cx: &'a mut Context<'b>,
}

impl Write for Records<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.socket.poll_write(self.cx, slices) {
            Poll::Ready(written) => written,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
