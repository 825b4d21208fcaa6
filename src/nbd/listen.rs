//! Addresses to listen on, and how a Unix socket's file is taken and given up. Must not know NBD.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};

use super::NbdTls;
use super::socket::Socket;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdListen {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// `host:port`; port 0 takes any free one.
    Tcp(String),
}

/// Where to listen, and what about TLS.
#[derive(Clone, Debug)]
pub struct NbdListener {
    /// Where.
    pub at: NbdListen,
    /// Whether clients may or have to use TLS.
    pub tls: NbdTls,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddr {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A TCP address, with the port that was taken.
    Tcp(SocketAddr),
}

impl fmt::Display for NbdAddr {
    /// As the part of an NBD URI before the export's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri(&NbdTls::Off))
    }
}

impl NbdAddr {
    /// As the part of an NBD URI before the export's name; `nbds`, which insists on TLS, where the listener does.
    pub(super) fn uri(&self, tls: &NbdTls) -> String {
        let scheme = if matches!(tls, NbdTls::Required(_)) { "nbds" } else { "nbd" };
        match self {
            NbdAddr::Unix(path) => format!("{scheme}+unix:///?socket={}", path.display()),
            NbdAddr::Tcp(addr) => format!("{scheme}://{addr}/"),
        }
    }
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// No address was given.
    #[error("there is no address to serve NBD on: name at least one in [nbd] listen")]
    NoAddress,
    /// Somebody listens there.
    #[error("cannot serve NBD on {}: another process listens there; stop it, or \
             choose another path in [nbd] listen", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The path is taken by something that is no socket.
    #[error("cannot serve NBD on {}: a file that is no socket is there, and is left alone; \
             choose another path in [nbd] listen", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system gave no thread.
    #[error("cannot serve NBD: no thread for the watch over clients: {0}; raise the limit of threads")]
    NoThread(io::Error),
    /// The system refused.
    #[error("cannot serve NBD on {address}: {source}; check the address in [nbd] listen and the permissions")]
    Io {
        /// Path, or host and port.
        address: String,
        /// What it said.
        source: io::Error,
    },
}

/// An open listener.
pub(super) enum Listener {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener, SocketAddr),
}

impl Listener {
    /// Opens one. A Unix socket's file that nobody listens on any more is replaced.
    pub(super) async fn open(listen: &NbdListen) -> Result<Listener, ListenError> {
        match listen {
            NbdListen::Unix(path) => {
                clear_stale(path)?;
                let io_error = |source| ListenError::Io { address: path.display().to_string(), source };
                let listener = UnixListener::bind(path).map_err(io_error)?;
                let file = SocketFile::of(path).map_err(io_error)?;
                Ok(Listener::Unix(listener, file))
            }
            NbdListen::Tcp(address) => {
                let io_error = |source| ListenError::Io { address: address.clone(), source };
                let listener = TcpListener::bind(address.as_str()).await.map_err(io_error)?;
                let addr = listener.local_addr().map_err(io_error)?;
                Ok(Listener::Tcp(listener, addr))
            }
        }
    }

    /// Where it listens.
    pub(super) fn addr(&self) -> NbdAddr {
        match self {
            Listener::Unix(_, file) => NbdAddr::Unix(file.path.clone()),
            Listener::Tcp(_, addr) => NbdAddr::Tcp(*addr),
        }
    }

    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Unix(listener, _) => listener.accept().await.map(|(stream, _)| Socket::Unix(stream)),
            Listener::Tcp(listener, _) => listener.accept().await.map(|(stream, _)| Socket::Tcp(stream)),
        }
    }
}

/// The file of a Unix socket that this process bound; removed with it, unless another has taken its place by then.
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<SocketFile> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(SocketFile { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Ok(now) = std::fs::symlink_metadata(&self.path)
            && (now.dev(), now.ino()) == (self.device, self.inode)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket's file that was left by a process that is gone. Two starters at the same moment can both find it
/// stale; then the second's `bind` fails, or the first loses its file and is unreachable: the same race that every
/// server without a lock file has, and the daemon locks its state directory.
fn clear_stale(path: &Path) -> Result<(), ListenError> {
    let io_error = |source| ListenError::Io { address: path.display().to_string(), source };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        // Nobody listens: "connection refused" is what a socket without a listener answers.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(io_error),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(io_error(error)),
        // Accepted, or its backlog is full: somebody does.
        _ => Err(ListenError::InUse { path: path.to_owned() }),
    }
}
