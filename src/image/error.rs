//! What can be wrong with an image, sorted by who has to act. Must not know who asked.

use std::io;
use std::path::PathBuf;

use super::mark::WhyNot;

/// Why an image could not be opened, read or written. Every message names the path and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Nothing is there.
    #[error("image {path}: there is no such file; check the path (it is looked up by the daemon, not by the command)")]
    Missing {
        /// The path that was asked for.
        path: PathBuf,
    },
    /// It is there and may not be opened.
    #[error("image {path}: cannot be opened for {purpose}: {source}; check its permissions and those of its folder")]
    Unreadable {
        /// The path that was asked for.
        path: PathBuf,
        /// `reading` or `writing`.
        purpose: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A folder, a socket, an empty file.
    #[error("image {path}: {what}; give a raw image file or a block device")]
    NotAnImage {
        /// The path that was asked for.
        path: PathBuf,
        /// What it is instead.
        what: String,
    },
    /// The file has become shorter than it was when it was opened.
    #[error(
        "image {path}: ends at or before byte {offset}, {announced_bytes} bytes were announced; it was truncated while in use"
    )]
    Shorter {
        /// The image.
        path: PathBuf,
        /// The first missing byte.
        offset: u64,
        /// The size when it was opened.
        announced_bytes: u64,
    },
    /// The destination of a relocation exists already.
    #[error("image {path}: exists already; remove it or name another path with --image")]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// Somebody else has it open under a lock.
    #[error("image {path}: is in use ({holder}); stop that first")]
    InUse {
        /// The image.
        path: PathBuf,
        /// Who holds it, as far as the kernel tells.
        holder: String,
    },
    /// A block device that is smaller than the volume.
    #[error("image {path}: has {have_bytes} bytes, the volume needs {need_bytes}")]
    TooSmall {
        /// The destination.
        path: PathBuf,
        /// Its size.
        have_bytes: u64,
        /// What is needed.
        need_bytes: u64,
    },
    /// A block device that holds something.
    #[error("image {path}: holds {what}; name another device, or give --overwrite if nobody needs that any more")]
    Signature {
        /// The device.
        path: PathBuf,
        /// What was found on it.
        what: &'static str,
    },
    /// A symbolic link where a file is to be made.
    #[error(
        "image {path}: is a symbolic link, which may lead anywhere by the time the file is removed; name the file itself with --image"
    )]
    IsLink {
        /// The link.
        path: PathBuf,
    },
    /// Another image than the one that this site had under the path.
    #[error(
        "image {path}: {why}; put the right image back, or run `volume remove` and `volume add` if this one is meant"
    )]
    NotTheSame {
        /// The image.
        path: PathBuf,
        /// What differs.
        why: WhyNot,
    },
    /// The file system cannot lock.
    #[error(
        "image {path}: cannot be locked: {source}; its file system has no locks, which keep a second writer away: \
         put it on one that has (for NFS: mount it with locks, and run lockd)"
    )]
    NoLocks {
        /// The image.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// I/O on an opened image failed.
    #[error("image {path}: {doing} at byte {offset} failed: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The image.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl ImageError {
    /// Whether the file system has no room left (ENOSPC or EDQUOT): waiting or making room helps.
    pub fn is_no_space(&self) -> bool {
        match self {
            ImageError::Io { source, .. } | ImageError::Unreadable { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}
