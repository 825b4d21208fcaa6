//! What lies under an image: a file of the kernel's, or something else that behaves like one ([`Backend`]).
//! Must not know what is stored.

use std::fs::{File, Permissions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use super::{Image, Stamp};

/// A disk that is not the kernel's: a simulation, which may lose, tear and refuse. Calls mean what they mean for a sparse file.
pub trait Backend: std::fmt::Debug + Send + Sync + 'static {
    /// As pread(2): how many bytes were read; 0 at the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Fills `buf` if that needs no disk.
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Option<io::Result<()>>;
    /// Writes all of `bytes`, or a part of them and an error.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a range read as zeros.
    fn write_zeroes(&self, offset: u64, len_bytes: u64, may_punch: bool) -> io::Result<()>;
    /// Returns when everything that was written is durable.
    fn sync_data(&self) -> io::Result<()>;
    /// The first range of data that ends behind `from`, cut to begin there.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>>;
    /// What tells of changes.
    fn stamp(&self) -> io::Result<Stamp>;
    /// How much of it is no hole.
    fn allocated_bytes(&self) -> io::Result<u64>;
}

/// See the module. The file's calls are the hot path, so they are called directly.
#[derive(Debug)]
pub(super) enum Medium {
    File(File),
    Other(Box<dyn Backend>),
}

impl Medium {
    #[inline]
    pub(super) fn file(&self) -> Result<&File, &dyn Backend> {
        match self {
            Medium::File(file) => Ok(file),
            Medium::Other(other) => Err(&**other),
        }
    }

    #[inline]
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Medium::File(file) => file.read_at(buf, offset),
            Medium::Other(other) => other.read_at(buf, offset),
        }
    }

    #[inline]
    pub(super) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Medium::File(file) => file.write_all_at(bytes, offset),
            Medium::Other(other) => other.write_at(bytes, offset),
        }
    }

    pub(super) fn sync_data(&self) -> io::Result<()> {
        match self {
            Medium::File(file) => file.sync_data(),
            Medium::Other(other) => other.sync_data(),
        }
    }

    /// Gives a file its size, durably; one that `is_new` is its owner's alone, whatever the umask.
    pub(super) fn make(&self, size_bytes: u64, is_new: bool) -> io::Result<()> {
        match self {
            Medium::File(file) => {
                if is_new {
                    file.set_permissions(Permissions::from_mode(0o600))?;
                }
                file.set_len(size_bytes).and_then(|()| file.sync_all())
            }
            Medium::Other(_) => Ok(()),
        }
    }

    #[inline]
    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.file().map_or(-1, File::as_raw_fd)
    }
}

impl Image {
    /// An image of `size_bytes` over something that is no file. `path` is only a name.
    pub fn over(backend: Box<dyn Backend>, path: &Path, size_bytes: u64, is_writable: bool) -> Image {
        Image::new(Medium::Other(backend), path, size_bytes, false, is_writable)
    }
}
