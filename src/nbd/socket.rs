//! A connected stream of either kind, polled. Must not know NBD.

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use rustls::ServerConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UnixStream};

use super::tls::{TlsSession, TlsSocket};
use crate::pipe::Pipe;

/// What the kernel should hold of replies for one client; it cuts this to its own limit.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// A connection to a client.
pub(super) enum Socket {
    /// On a Unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
    /// Over TLS on one of the others.
    Tls(Box<TlsSocket>),
}

/// Who is at the other end, for logs.
#[derive(Clone, Debug)]
pub(super) struct Peer(String);

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Socket {
    /// Sets what every connection needs. Failures are not fatal: the connection works, a little worse.
    pub(super) fn tune(&self) {
        match self {
            Socket::Unix(stream) => {
                let _ = SockRef::from(stream).set_send_buffer_size(SEND_BUFFER_BYTES);
            }
            Socket::Tcp(stream) => {
                // "both the client and server SHOULD disable Nagle's algorithm".
                let _ = stream.set_nodelay(true);
                // A client whose machine died would hold its slot for ever.
                let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(60));
                let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive.with_interval(Duration::from_secs(10)));
            }
            Socket::Tls(tls) => tls.socket().tune(),
        }
    }

    /// Who is there.
    pub(super) fn peer(&self) -> Peer {
        Peer(match self {
            Socket::Unix(stream) => match stream.peer_cred().ok().and_then(|cred| cred.pid()) {
                Some(pid) => format!("process {pid}"),
                None => "a local process".to_owned(),
            },
            Socket::Tcp(stream) => match stream.peer_addr() {
                Ok(addr) => addr.to_string(),
                Err(_) => "a client that has gone".to_owned(),
            },
            Socket::Tls(tls) => return tls.socket().peer(),
        })
    }

    /// Takes the socket to another runtime: gives it up in this one.
    pub(super) fn detach(self) -> io::Result<DetachedSocket> {
        Ok(match self {
            Socket::Unix(stream) => DetachedSocket::Unix(stream.into_std()?),
            Socket::Tcp(stream) => DetachedSocket::Tcp(stream.into_std()?),
            Socket::Tls(tls) => {
                let (socket, session) = tls.into_parts();
                DetachedSocket::Tls(Box::new((socket.detach()?, session)))
            }
        })
    }

    /// Reads at most `max_bytes` to the end of `buf`, which may grow. 0 bytes: the client sends no more.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut BytesMut,
        max_bytes: usize,
    ) -> Poll<io::Result<usize>> {
        let mut limited = buf.limit(max_bytes);
        match self {
            Socket::Unix(stream) => Future::poll(pin!(stream.read_buf(&mut limited)), cx),
            Socket::Tcp(stream) => Future::poll(pin!(stream.read_buf(&mut limited)), cx),
            Socket::Tls(tls) => tls.poll_read(cx, limited.into_inner(), max_bytes),
        }
    }

    /// As [`Socket::poll_read`], but without asking the reactor, so that nobody is woken later.
    pub(super) fn read_now(&mut self, buf: &mut BytesMut, max_bytes: usize) -> ReadNow {
        let fd = match self {
            Socket::Unix(stream) => stream.as_raw_fd(),
            Socket::Tcp(stream) => stream.as_raw_fd(),
            // Its bytes come through its session.
            Socket::Tls(_) => return ReadNow::Ended,
        };
        let spare = buf.spare_capacity_mut();
        let len = spare.len().min(max_bytes);
        // SAFETY: at most `len` bytes are written, to memory that is exclusively ours during the call; the descriptor is
        // open as long as the stream.
        let count = unsafe { nix::libc::recv(fd, spare.as_mut_ptr().cast(), len, nix::libc::MSG_DONTWAIT) };
        match count {
            1.. => {
                // SAFETY: so many bytes have been written behind what was there.
                unsafe { buf.set_len(buf.len() + count as usize) };
                ReadNow::Some
            }
            -1 if matches!(
                io::Error::last_os_error().kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
            {
                ReadNow::None
            }
            _ => ReadNow::Ended,
        }
    }

    /// Whether bytes can go between this and a file through a [`Pipe`].
    pub(super) fn takes_pipes(&self) -> bool {
        matches!(self, Socket::Unix(_))
    }

    /// As [`Socket::poll_read`], into a pipe. None: the pipe has no room for more.
    pub(super) fn poll_read_into(
        &mut self,
        cx: &mut Context<'_>,
        pipe: &mut Pipe,
        max_bytes: usize,
    ) -> Poll<io::Result<Option<usize>>> {
        let Socket::Unix(stream) = self else { return Poll::Ready(Ok(None)) };
        loop {
            ready!(stream.poll_read_ready(cx))?;
            let read = stream.try_io(Interest::READABLE, || match pipe.put_from_socket(stream.as_fd(), max_bytes) {
                // The reactor must not be told that the socket is empty when it is the pipe that is full; and a full pipe says nothing
                // of the socket, whose client may have gone: asked again, it would say the same for ever.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && pipe.is_full() => Ok(None),
                read => read.map(Some),
            });
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read),
            }
        }
    }

    /// As [`Socket::poll_read_into`], but without asking the reactor.
    pub(super) fn read_into_now(&mut self, pipe: &mut Pipe, max_bytes: usize) -> ReadNow {
        let Socket::Unix(stream) = self else { return ReadNow::Ended };
        match pipe.put_from_socket(stream.as_fd(), max_bytes) {
            Ok(1..) => ReadNow::Some,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ReadNow::None,
            _ => ReadNow::Ended,
        }
    }

    /// Writes some of what is in a pipe that is not empty.
    pub(super) fn poll_write_from(&mut self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        let Socket::Unix(stream) = self else { return Poll::Ready(Err(io::ErrorKind::Unsupported.into())) };
        loop {
            ready!(stream.poll_write_ready(cx))?;
            match stream.try_io(Interest::WRITABLE, || pipe.take_to_socket(stream.as_fd())) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    /// Whether there is something to be read now, as far as that can be told.
    pub(super) fn has_input(&self) -> bool {
        match self {
            Socket::Unix(stream) => has_input(stream),
            Socket::Tcp(stream) => has_input(stream),
            Socket::Tls(tls) => tls.socket().has_input(),
        }
    }

    /// What a second handle of this connection can be made of, if that is possible.
    pub(super) fn twin(&self) -> Option<Twin> {
        match self {
            Socket::Unix(stream) => Some(Twin::Unix(stream.as_raw_fd())),
            Socket::Tcp(stream) => Some(Twin::Tcp(stream.as_raw_fd())),
            // The session cannot be in two places.
            Socket::Tls(_) => None,
        }
    }

    /// Whether the client, of whom no more input comes, takes no output either. Over TCP that cannot be told before
    /// something is sent.
    pub(super) fn is_abandoned(&self, cx: &mut Context<'_>) -> bool {
        match self {
            Socket::Unix(stream) => {
                let ready = pin!(stream.ready(Interest::WRITABLE));
                matches!(Future::poll(ready, cx), Poll::Ready(Ok(ready)) if ready.is_write_closed())
            }
            Socket::Tcp(_) => false,
            Socket::Tls(tls) => tls.socket().is_abandoned(cx),
        }
    }

    /// Writes some of `slices` (not all of them empty). Whoever was answered "pending" offers the same bytes again,
    /// others only behind them: over TLS they may have been encrypted already.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match (self, slices) {
            (Socket::Unix(stream), [one]) => Pin::new(stream).poll_write(cx, one),
            (Socket::Tcp(stream), [one]) => Pin::new(stream).poll_write(cx, one),
            (Socket::Unix(stream), many) => Pin::new(stream).poll_write_vectored(cx, many),
            (Socket::Tcp(stream), many) => Pin::new(stream).poll_write_vectored(cx, many),
            (Socket::Tls(tls), slices) => tls.poll_write(cx, slices),
        }
    }

    /// Reads at most `max_bytes` to the end of `buf`.
    pub(super) async fn read(&mut self, buf: &mut BytesMut, max_bytes: usize) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_read(cx, buf, max_bytes)).await
    }

    /// Writes all of `bytes`.
    pub(super) async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match std::future::poll_fn(|cx| self.poll_write(cx, &[IoSlice::new(bytes)])).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => bytes = &bytes[written..],
            }
        }
        Ok(())
    }

    /// Does the TLS handshake as a server; from then on everything is encrypted. A client that fails it is told why.
    pub(super) async fn start_tls(self, config: &Arc<ServerConfig>) -> io::Result<Socket> {
        match TlsSocket::accept(self, config).await {
            Ok(tls) => Ok(Socket::Tls(Box::new(tls))),
            Err((socket, error)) => {
                socket.close(Duration::from_secs(1)).await;
                Err(error)
            }
        }
    }

    /// Ends the connection at once, in both directions; the client notices now, whenever the socket itself is closed.
    pub(super) fn hang_up(&self) {
        // It fails where the client was faster.
        match self {
            Socket::Unix(stream) => drop(SockRef::from(stream).shutdown(std::net::Shutdown::Both)),
            Socket::Tcp(stream) => drop(SockRef::from(stream).shutdown(std::net::Shutdown::Both)),
            Socket::Tls(tls) => tls.socket().hang_up(),
        }
    }

    /// Ends the connection so that the client gets what was sent: closing a TCP socket with unread input would reset
    /// it, and the last replies with it. So: say that nothing more comes, then wait for the client to close, but not
    /// long.
    pub(super) async fn close(self, linger: Duration) {
        let end = async {
            // "The client or the server drops the TCP session (in which case it SHOULD shut down the TLS session
            // first)." What the client says after that need not be decrypted.
            let mut socket = match self {
                Socket::Tls(tls) => tls.say_goodbye().await?,
                plain => plain,
            };
            match &mut socket {
                Socket::Unix(stream) => stream.shutdown().await?,
                Socket::Tcp(stream) => stream.shutdown().await?,
                Socket::Tls(_) => {}
            }
            let mut rest = BytesMut::with_capacity(16 << 10);
            while socket.read(&mut rest, 16 << 10).await? > 0 {
                rest.clear();
            }
            io::Result::Ok(())
        };
        let _ = tokio::time::timeout(linger, end).await;
    }
}

fn has_input(stream: &impl AsRawFd) -> bool {
    let mut waiting: nix::libc::c_int = 0;
    // SAFETY: writes one integer; the descriptor is open as long as the stream.
    let told = unsafe { nix::libc::ioctl(stream.as_raw_fd(), nix::libc::FIONREAD, &raw mut waiting) };
    told == 0 && waiting > 0
}

/// What came of [`Socket::read_now`].
pub(super) enum ReadNow {
    /// Something was read.
    Some,
    /// There is nothing now.
    None,
    /// Nothing more comes; [`Socket::poll_read`] tells why.
    Ended,
}

/// The descriptor of a [`Socket`] that somebody else owns.
#[derive(Clone, Copy)]
pub(super) enum Twin {
    Unix(RawFd),
    Tcp(RawFd),
}

impl Twin {
    /// Another handle of the same connection.
    ///
    /// # Safety
    /// The socket that this was made from is still open.
    pub(super) unsafe fn open(self) -> io::Result<DetachedSocket> {
        let (Twin::Unix(fd) | Twin::Tcp(fd)) = self;
        // SAFETY: open, says the caller.
        let handle = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        Ok(match self {
            Twin::Unix(_) => DetachedSocket::Unix(handle.into()),
            Twin::Tcp(_) => DetachedSocket::Tcp(handle.into()),
        })
    }
}

/// A [`Socket`] between two runtimes.
pub(super) enum DetachedSocket {
    /// On a Unix socket.
    Unix(std::os::unix::net::UnixStream),
    /// Over TCP.
    Tcp(std::net::TcpStream),
    /// Over TLS on one of the others: the session goes along.
    Tls(Box<(DetachedSocket, TlsSession)>),
}

impl DetachedSocket {
    /// Registers the socket with the runtime that this is called in.
    pub(super) fn attach(self) -> io::Result<Socket> {
        Ok(match self {
            DetachedSocket::Unix(stream) => Socket::Unix(UnixStream::from_std(stream)?),
            DetachedSocket::Tcp(stream) => Socket::Tcp(TcpStream::from_std(stream)?),
            DetachedSocket::Tls(both) => {
                let (socket, session) = *both;
                Socket::Tls(Box::new(TlsSocket::from_parts(socket.attach()?, session)))
            }
        })
    }
}
