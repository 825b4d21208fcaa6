//! Where bytes lie: raw files and block devices, sparse-aware, with positioned I/O.
//! Must not know peers, volumes or residency.

mod backend;
mod claim;
mod error;
mod identity;
mod mark;
mod open;
mod signature;
mod unlink;
mod unsynced;

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::BytesMut;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub use backend::Backend;
use backend::Medium;
use claim::Claim;
pub use error::ImageError;
pub use identity::{Identity, Sameness};
pub use mark::{Mark, Noted, Verdict, WhyNot, judge};
pub use open::Overwrite;
use unlink::Place;
pub use unlink::Unlinked;
use unsynced::Unsynced;

use crate::pipe::Pipe;
use crate::seeded_bugs::{Bug, is_planted};

/// An opened raw image. Positioned I/O only, so that any number of threads may share it.
#[derive(Debug)]
pub struct Image {
    file: Medium,
    path: PathBuf,
    size_bytes: u64,
    is_block_device: bool,
    is_writable: bool,
    read_only_why: Option<String>,
    /// Where it was made, if it was.
    made_at: Option<Place>,
    /// The last: the file is closed before it is free for others.
    _claim: Option<Claim>,
    /// Whether a sync failed: the kernel has dropped what it could not write, and tells so once. Held while one runs.
    syncing: Mutex<bool>,
    unsynced: Unsynced,
}

/// What tells whether a file is still the one that was hashed: any write through the kernel changes one of these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Device and inode: another file under the same path is another image.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
    /// In bytes.
    pub size_bytes: u64,
    /// Time of the last change of content, nanoseconds since the epoch.
    pub mtime_ns: i128,
    /// Time of the last change of inode or content: unlike mtime it cannot be set back by a program.
    pub ctime_ns: i128,
}

/// The kernel makes a folio of its page cache as large as the write that brings it, and ext4 looks at all 4 KiB buffers of a
/// folio in every later small write to it: 36 % of a 4 KiB write's time where the file had been filled by writes of 256 KiB.
const PIECE_BYTES: usize = 64 << 10;

/// Of the page cache.
const PAGE_BYTES: u64 = 4 << 10;

/// The same number on all architectures that blockferry runs on.
const SYS_CACHESTAT: nix::libc::c_long = 451;

/// From linux/fs.h, since Linux 6.14.
const RWF_DONTCACHE: i32 = 0x80;

impl Image {
    fn new(file: Medium, path: &Path, size_bytes: u64, is_block_device: bool, is_writable: bool) -> Image {
        let (path, read_only_why) = (path.to_owned(), None);
        Image {
            file,
            path,
            size_bytes,
            is_block_device,
            is_writable,
            read_only_why,
            made_at: None,
            _claim: None,
            syncing: Mutex::new(false),
            // What is only read is somebody else's to sync.
            unsynced: Unsynced::new(size_bytes, is_writable),
        }
    }

    /// Size in bytes, as it was when the image was opened; of what is larger, the part that is the volume's ([`Image::open_known`]).
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Why it is not writable, where that was tried ([`Image::open_best`]).
    pub fn read_only_why(&self) -> Option<&str> {
        self.read_only_why.as_deref()
    }

    /// Whether [`Image::create`] made the file: one that lay there before is not ours to remove.
    pub fn was_made(&self) -> bool {
        self.made_at.is_some()
    }

    /// Whether this is a block device: it has no holes and no trustworthy mtime.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// Fills `buf` from `offset`. A file that ends earlier than it did when it was opened is
    /// [`ImageError::Shorter`]: missing bytes are never made up.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => {
                    return Err(ImageError::Shorter {
                        path: self.path.clone(),
                        offset: offset + done as u64,
                        announced_bytes: self.size_bytes,
                    });
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io("reading", offset, error)),
            }
        }
        Ok(())
    }

    /// As [`Image::read_at`], for what will not soon be read again: leaves in the page cache what was there and adds nothing to it
    /// (RWF_DONTCACHE, where the kernel and the file system know it), so that hashing an image pushes nothing else out.
    pub fn read_once_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let vector = nix::libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: one vector over `buf`, which is exclusively ours during the call, on a descriptor that `self` keeps open.
        let count = unsafe { nix::libc::preadv2(self.file.as_raw_fd(), &vector, 1, offset as i64, RWF_DONTCACHE) };
        // Refused, or less than all: the ordinary read finds out.
        let done = usize::try_from(count).unwrap_or(0).min(buf.len());
        self.read_at(offset + done as u64, &mut buf[done..])
    }

    /// Fills `buf` if the page cache has all of it (RWF_NOWAIT); None if the disk would have to be waited for, or the file
    /// system cannot tell.
    pub fn read_cached_at(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), ImageError>> {
        if let Err(other) = self.file.file() {
            return other
                .read_cached_at(buf, offset)
                .map(|read| read.map_err(|error| self.io("reading", offset, error)));
        }
        let vector = nix::libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: one vector over `buf`, which is exclusively ours during the call, on a descriptor that `self` keeps open.
        let count =
            unsafe { nix::libc::preadv2(self.file.as_raw_fd(), &vector, 1, offset as i64, nix::libc::RWF_NOWAIT) };
        // Less than all: the rest is not cached, or the file was truncated; the ordinary read finds out.
        (count == buf.len() as isize).then_some(Ok(()))
    }

    /// Puts a range into an empty pipe, uncopied, if the page cache has all of it; None, and nothing put, otherwise or where that cannot
    /// be told (cachestat(2), Linux 6.5). Hardly ever waits for the disk: for a page that is just being read.
    pub fn read_cached_into(&self, offset: u64, len_bytes: usize, pipe: &mut Pipe) -> Option<()> {
        let file = self.file.file().ok().filter(|_| pipe.is_empty() && self.is_cached(offset, len_bytes))?;
        while pipe.len_bytes() < len_bytes {
            let put = pipe.put_from_file(file, offset + pipe.len_bytes() as u64, len_bytes - pipe.len_bytes());
            if !matches!(put, Ok(1..)) {
                // The file ended, or an error: the ordinary read tells.
                let _ = pipe.take(&mut BytesMut::new());
                return None;
            }
        }
        Some(())
    }

    fn is_cached(&self, offset: u64, len_bytes: usize) -> bool {
        // From linux/mman.h: `struct cachestat_range` and `struct cachestat`.
        let range = [offset, len_bytes as u64];
        let mut stat = [0u64; 5];
        // SAFETY: a descriptor that `self` keeps open, two and five integers of 64 bits in the order of the fields, no flags.
        let told =
            unsafe { nix::libc::syscall(SYS_CACHESTAT, self.file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0) };
        let pages = (offset + len_bytes as u64).div_ceil(PAGE_BYTES) - offset / PAGE_BYTES;
        // The first field: `nr_cache`.
        told == 0 && stat[0] == pages
    }

    /// Writes the first `len_bytes` of a pipe at `offset`. None, and nothing taken out, where that is not possible. After an
    /// error an unknown part is written and taken out.
    pub fn write_from(&self, offset: u64, pipe: &mut Pipe, len_bytes: usize) -> Option<Result<(), ImageError>> {
        debug_assert!(offset + len_bytes as u64 <= self.size_bytes, "bounds are checked at the NBD edge");
        let file = self.file.file().ok()?;
        let mut done = 0;
        let written = loop {
            if done == len_bytes {
                break Ok(());
            }
            let piece = (len_bytes - done).min(PIECE_BYTES);
            match pipe.take_to_file(file, offset + done as u64, piece) {
                Ok(0) => break Err(self.io("writing", offset, std::io::ErrorKind::WriteZero.into())),
                Ok(taken) => done += taken,
                // No such call on this file system.
                Err(error) if done == 0 && error.kind() == std::io::ErrorKind::InvalidInput => return None,
                Err(error) => break Err(self.io("writing", offset + done as u64, error)),
            }
        };
        self.unsynced.wrote(offset, len_bytes as u64);
        Some(written)
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        debug_assert!(offset + bytes.len() as u64 <= self.size_bytes, "bounds are checked at the NBD edge");
        let mut at = offset;
        let mut done = Ok(());
        for piece in bytes.chunks(PIECE_BYTES) {
            done = self.file.write_all_at(piece, at).map_err(|error| self.io("writing", at, error));
            if done.is_err() {
                break;
            }
            at += piece.len() as u64;
        }
        self.unsynced.wrote(offset, bytes.len() as u64);
        done
    }

    /// As [`Image::write_zeroes`], but only where that takes no writing; false, and nothing done, where it would.
    pub fn write_zeroes_fast(&self, offset: u64, len_bytes: u64, may_punch: bool) -> Result<bool, ImageError> {
        // What lies behind the volume's end is not the volume's.
        let end = (offset.saturating_add(len_bytes)).min(self.size_bytes);
        let len_bytes = end.saturating_sub(offset);
        if len_bytes == 0 {
            return Ok(true);
        }
        let file = match self.file.file() {
            Ok(file) => file,
            Err(other) => {
                let done = other.write_zeroes(offset, len_bytes, may_punch);
                return done.map(|()| true).map_err(|error| self.io("zeroing", offset, error));
            }
        };
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let modes: &[FallocateFlags] = if may_punch { &[punch, zero] } else { &[zero] };
        for mode in modes {
            match retry_interrupted(|| fallocate(file.as_fd(), *mode, offset as i64, len_bytes as i64)) {
                Ok(()) => return Ok(true),
                Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENODEV) => {}
                Err(errno) => return Err(self.io("zeroing", offset, errno.into())),
            }
        }
        Ok(false)
    }

    /// Makes a range read as zeros: by a hole where `may_punch` and the file system can, by allocated zeros otherwise.
    pub fn write_zeroes(&self, offset: u64, len_bytes: u64, may_punch: bool) -> Result<(), ImageError> {
        if self.write_zeroes_fast(offset, len_bytes, may_punch)? {
            return Ok(());
        }
        let zeros = vec![0u8; len_bytes.min(1 << 20) as usize];
        let (mut at, end) = (offset, offset.saturating_add(len_bytes).min(self.size_bytes));
        while at < end {
            let step = (end - at).min(zeros.len() as u64);
            self.write_at(at, &zeros[..step as usize])?;
            at += step;
        }
        Ok(())
    }

    /// Waits until everything that was written is durable (fdatasync). Once it has failed it fails for good: the kernel drops what it could
    /// not write, and tells that to one caller only; the next call would succeed without it.
    pub fn sync_data(&self) -> Result<(), ImageError> {
        // One at a time: of two that wait for the same bytes the kernel tells one alone that they are lost.
        let mut has_failed = self.syncing.lock();
        if *has_failed {
            let lost = std::io::Error::other("an earlier sync failed, and what it was to write may be lost");
            return Err(self.io("syncing", 0, lost));
        }
        self.unsynced.sync(|| self.file.sync_data()).map_err(|error| {
            *has_failed = !is_planted(Bug::FailedSyncForgotten);
            self.io("syncing", 0, error)
        })
    }

    /// Asks the kernel to begin writing what is dirty, without waiting for it: the next [`Image::sync_data`] finds less to do and holds up
    /// nobody for long. Advice only.
    pub fn begin_writeback(&self) {
        if self.file.file().is_err() {
            return;
        }
        // SAFETY: plain integers and a descriptor that `self` keeps open; 0, 0 means all of the file.
        unsafe {
            nix::libc::sync_file_range(self.file.as_raw_fd(), 0, 0, nix::libc::SYNC_FILE_RANGE_WRITE);
        }
    }

    /// The first range of data that ends behind `from` (cut to begin there), or None when only holes follow. Where the
    /// file system cannot tell, everything is data; so is what was written and not synced, which may pass for a hole.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, ImageError> {
        if from >= self.size_bytes {
            return Ok(None);
        }
        if self.is_block_device {
            return Ok(Some(from..self.size_bytes));
        }
        // What a killed daemon wrote is in the kernel's cache. If it cannot be synced, no hole is believed.
        if self.unsynced.is_unknown() && self.sync_data().is_err() {
            return Ok(Some(from..self.size_bytes));
        }
        let told = self.next_data_told(from)?;
        let unsynced = self.unsynced.next(from).filter(|_| !is_planted(Bug::UnsyncedHolesBelieved));
        Ok(match (told, unsynced) {
            (Some(told), Some(unsynced)) if unsynced.start < told.start => Some(unsynced),
            (Some(told), _) => Some(told),
            (None, unsynced) => unsynced,
        }
        .map(|data| data.start..data.end.min(self.size_bytes)))
    }

    /// What the file system tells of that.
    fn next_data_told(&self, from: u64) -> Result<Option<Range<u64>>, ImageError> {
        let file = match self.file.file() {
            Ok(file) => file,
            Err(other) => {
                let data = other.next_data(from).map_err(|error| self.io("looking for data in", from, error))?;
                let data = data.map(|data| data.start..data.end.min(self.size_bytes));
                return Ok(data.filter(|data| data.start < data.end));
            }
        };
        let start = match lseek(file.as_fd(), from as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some(from..self.size_bytes)),
            Err(errno) => return Err(self.io("looking for data in", from, errno.into())),
        };
        let end = match lseek(file.as_fd(), start as i64, Whence::SeekHole) {
            Ok(end) => (end as u64).min(self.size_bytes),
            Err(Errno::ENXIO) => self.size_bytes,
            Err(errno) => return Err(self.io("looking for holes in", start, errno.into())),
        };
        Ok((start < end).then_some(start..end))
    }

    /// Whether a range is known to lie in a hole, so that it reads as zeros without being read.
    pub fn is_hole(&self, range: Range<u64>) -> Result<bool, ImageError> {
        Ok(self.next_data(range.start)?.is_none_or(|data| data.start >= range.end))
    }

    /// What the file looks like now; None for a block device, which has no trustworthy times.
    pub fn stamp(&self) -> Result<Option<Stamp>, ImageError> {
        if self.is_block_device {
            return Ok(None);
        }
        let file = match self.file.file() {
            Ok(file) => file,
            Err(other) => return other.stamp().map(Some).map_err(|error| self.io("examining", 0, error)),
        };
        let meta = file.metadata().map_err(|error| self.io("examining", 0, error))?;
        let ns = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        Ok(Some(Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            size_bytes: meta.len(),
            mtime_ns: ns(meta.mtime(), meta.mtime_nsec()),
            ctime_ns: ns(meta.ctime(), meta.ctime_nsec()),
        }))
    }

    /// How much was written to a block device since the machine's start, by whomever and in units of the kernel's: moves with any write that
    /// has reached it. None where that cannot be told, and for files, which have a [`Stamp`].
    pub fn device_writes(&self) -> Option<u64> {
        let file = self.file.file().ok().filter(|_| self.is_block_device)?;
        let number = file.metadata().ok()?.rdev();
        let (major, minor) = (nix::libc::major(number), nix::libc::minor(number));
        let stat = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
        // From the kernel's Documentation/block/stat.rst, counted from 0: sectors written, and discarded.
        let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
        Some(fields.get(6)?.wrapping_add(fields.get(13).copied().unwrap_or(0)))
    }

    /// How many bytes of the file are allocated; the size for a block device.
    pub fn allocated_bytes(&self) -> Result<u64, ImageError> {
        if self.is_block_device {
            return Ok(self.size_bytes);
        }
        let file = match self.file.file() {
            Ok(file) => file,
            Err(other) => return other.allocated_bytes().map_err(|error| self.io("examining", 0, error)),
        };
        let meta = file.metadata().map_err(|error| self.io("examining", 0, error))?;
        Ok(meta.blocks() * 512)
    }

    /// [`ImageError::Shorter`] if it has become shorter than it was when it was opened.
    pub fn check_size(&self) -> Result<(), ImageError> {
        let (offset, announced_bytes) = (self.medium_bytes()?, self.size_bytes);
        match offset < announced_bytes {
            true => Err(ImageError::Shorter { path: self.path.clone(), offset, announced_bytes }),
            false => Ok(()),
        }
    }

    /// How large the file or device is by now.
    pub(in crate::image) fn medium_bytes(&self) -> Result<u64, ImageError> {
        match self.file.file() {
            // Seeking to the end gives the size of a file and of a block device alike; I/O is positioned, so nobody minds.
            Ok(file) => match lseek(file.as_fd(), 0, Whence::SeekEnd) {
                Ok(end) => Ok(end as u64),
                Err(errno) => Err(self.io("examining", 0, errno.into())),
            },
            Err(_) => Ok(self.size_bytes),
        }
    }

    /// The descriptor, for drivers that submit I/O by other means; -1 if there is none ([`Image::over`]).
    pub fn raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    fn io(&self, doing: &'static str, offset: u64, source: std::io::Error) -> ImageError {
        ImageError::Io { doing, path: self.path.clone(), offset, source }
    }
}

fn retry_interrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests;
