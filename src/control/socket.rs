//! The control socket's file: made so that nobody but its owner can ever connect, and so that two daemons cannot share
//! it.
//! Must not know what is said over it.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody has it.
    #[error(
        "the control socket {} belongs to a running daemon: stop that one, or give this site its own [control] socket",
        .0.display()
    )]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{} is no socket, and is left alone: move it away, or set [control] socket to another path", .0.display())]
    NotASocket(PathBuf),
    /// The system says no.
    #[error("cannot {action} {}: {source}: check the path and its permissions", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
}

/// A listening control socket. Dropping it removes its file.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

/// The socket's file, and the lock that makes it ours. The lock file stays behind: removing it would let two daemons
/// lock two files of the same name.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    _lock: File,
}

impl ControlSocket {
    /// Makes and listens on the socket at `path`, mode 0600, and its directory (0700) if that is missing. A socket that
    /// a killed daemon left behind is replaced. Must be called within a tokio runtime.
    pub fn bind(path: &Path) -> Result<ControlSocket, SocketError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| SocketError::Io { action, path, source }
        };
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(parent);
            made.map_err(failed("make the directory", parent))?;
        }
        // The lock decides between two daemons that start together; the probe finds a listener that takes no lock.
        let lock = lock(path)?;
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(failed("remove the old socket", path))?;
                }
                Err(error) => return Err(failed("probe the old socket", path)(error)),
                Ok(_) => return Err(SocketError::InUse(path.to_owned())),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at", path)(error)),
        }
        // Not earlier: dropping it removes the file, which until here could be somebody else's.
        let file = SocketFile { path: path.to_owned(), _lock: lock };
        // Between bind and listen every connection is refused, so nobody can slip in before the mode is set.
        let listener = (|| {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            socket.bind(&SockAddr::unix(path)?)?;
            std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
            socket.listen(128)?;
            socket.set_nonblocking(true)?;
            UnixListener::from_std(socket.into())
        })()
        .map_err(failed("make the control socket", path))?;
        Ok(ControlSocket { listener, file })
    }

    /// The path it was made at.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    pub(super) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Nobody else may have put one there while we held the lock; if the removal fails, the next start replaces it.
        let is_socket = std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.file_type().is_socket());
        if is_socket && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the control socket stays behind");
        }
    }
}

fn lock(path: &Path) -> Result<File, SocketError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let failed = |source| SocketError::Io { action: "lock", path: lock_path.clone(), source };
    let opened = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
    let file = opened.map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(SocketError::InUse(path.to_owned())),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_owner_can_connect_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("made/on/the/way/c.sock");
        let socket = ControlSocket::bind(&path).expect("bound");
        let mode = |path: &Path| std::fs::metadata(path).expect("is there").permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(&dir.path().join("made")), 0o700);
        assert_eq!(socket.path(), path);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_running_daemon_keeps_its_socket() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("c.sock");
        let first = ControlSocket::bind(&path).expect("bound");
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::InUse(_))));
        assert!(UnixStream::connect(&path).is_ok(), "the first one must not have been disturbed");
        drop(first);
        ControlSocket::bind(&path).expect("free again");
    }

    #[tokio::test]
    async fn a_listener_without_the_lock_is_respected_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("c.sock");
        let foreign = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::InUse(_))));
        drop(foreign);
        assert!(path.exists(), "a closed socket leaves its file");
        ControlSocket::bind(&path).expect("replaced");
    }

    #[tokio::test]
    async fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("c.sock");
        std::fs::write(&path, "precious").expect("written");
        assert!(matches!(ControlSocket::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
        let below = path.join("c.sock");
        let error = ControlSocket::bind(&below).expect_err("a file is no directory").to_string();
        assert!(error.contains("make the directory"), "{error}");
    }
}
