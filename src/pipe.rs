//! Pipes in which pages lie: bytes go between a file and a socket through them without being copied into this process.
//! Must not know what the bytes are, nor whose.
//!
//! What is put in from a file are the page cache's own pages (splice(2), Linux 2.6.17; into Unix sockets without a copy since
//! 6.5): until they are taken out, a write to that place of the file shows in them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bytes::{BufMut, BytesMut};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{pipe2, read, write};

/// The most that is to be put into one pipe, in bytes.
pub const PIPE_MAX_BYTES: usize = 256 << 10;

/// What the kernel is asked for: room for so many bytes at any offset, in pages, of which it makes a power of two. Of an
/// unprivileged user's pipes, 64 MiB in all get more than two pages (pipe(7), `pipe-user-pages-soft`).
const CAPACITY_BYTES: i32 = 2 * PIPE_MAX_BYTES as i32;

/// A pipe and how much is in it. No call waits for the pipe itself.
#[derive(Debug)]
pub struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    len_bytes: usize,
}

impl Pipe {
    /// An empty pipe with room for [`PIPE_MAX_BYTES`]; an error where the system has few descriptors or no room left: a pipe saves a
    /// copy, and is not worth a database that cannot open its files.
    pub fn new() -> io::Result<Pipe> {
        let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        // The lowest free number is given out first.
        if into.as_raw_fd() as u64 >= limit / 4 * 3 {
            return Err(Errno::EMFILE.into());
        }
        let capacity = fcntl(&into, FcntlArg::F_SETPIPE_SZ(CAPACITY_BYTES))?;
        if capacity < CAPACITY_BYTES {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Pipe { out, into, len_bytes: 0 })
    }

    /// How many bytes are in it.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Whether nothing more can be put in now: the pages are in use, however little each holds.
    pub fn is_full(&self) -> bool {
        let mut asked = nix::libc::pollfd { fd: self.into.as_raw_fd(), events: nix::libc::POLLOUT, revents: 0 };
        // SAFETY: one entry that is ours during the call, on a descriptor that `self` keeps open; does not wait.
        let ready = unsafe { nix::libc::poll(&raw mut asked, 1, 0) };
        // Interrupted by a signal it does not know: whoever is told "full" copies, whoever is told "room" might wait for ever.
        ready != 1
    }

    /// Puts in the pages of a file from `offset` on, waiting for the disk if need be; returns how many bytes, 0 at the end
    /// of the file.
    pub fn put_from_file(&mut self, file: impl AsFd, offset: u64, len_bytes: usize) -> io::Result<usize> {
        let mut offset = offset as i64;
        let put = retry(|| splice(&file, Some(&mut offset), &self.into, None, len_bytes, SpliceFFlags::empty()))?;
        self.len_bytes += put;
        Ok(put)
    }

    /// Puts in what a socket has, at most `max_bytes`; returns how many bytes, 0 where nothing more comes. `WouldBlock`: the
    /// socket has nothing now, or the pipe is full.
    pub fn put_from_socket(&mut self, socket: BorrowedFd<'_>, max_bytes: usize) -> io::Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        let put = retry(|| splice(socket, None, &self.into, None, max_bytes, flags))?;
        self.len_bytes += put;
        Ok(put)
    }

    /// Puts in a copy of `bytes`, as much of it as there is room for; returns how much.
    pub fn put(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let put = retry(|| write(&self.into, bytes))?;
        self.len_bytes += put;
        Ok(put)
    }

    /// Writes the first bytes, at most `max_bytes`, to a file at `offset`; returns how many. Waits for the disk. After an error nothing
    /// has been taken out.
    pub fn take_to_file(&mut self, file: impl AsFd, offset: u64, max_bytes: usize) -> io::Result<usize> {
        let mut offset = offset as i64;
        let taken = retry(|| splice(&self.out, None, &file, Some(&mut offset), max_bytes, SpliceFFlags::empty()))?;
        self.len_bytes -= taken;
        Ok(taken)
    }

    /// Gives the first bytes to a socket; returns how many. `WouldBlock`: it takes none now. A socket that is closed raises SIGPIPE, which
    /// Rust's programs ignore from the beginning.
    pub fn take_to_socket(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        let taken = retry(|| splice(&self.out, None, socket, None, self.len_bytes, flags))?;
        self.len_bytes -= taken;
        Ok(taken)
    }

    /// Moves everything to the end of `buf`.
    pub fn take(&mut self, buf: &mut BytesMut) -> io::Result<()> {
        let begin = buf.len();
        buf.put_bytes(0, self.len_bytes);
        let mut done = begin;
        while !self.is_empty() {
            match retry(|| read(&self.out, &mut buf[done..])) {
                Ok(taken @ 1..) => {
                    done += taken;
                    self.len_bytes -= taken;
                }
                other => {
                    buf.truncate(done);
                    return Err(other.err().map_or(io::ErrorKind::UnexpectedEof.into(), io::Error::from));
                }
            }
        }
        Ok(())
    }
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at * 31 + at / 251) as u8).collect()
    }

    #[test]
    fn any_range_of_the_longest_length_goes_from_a_file_to_a_socket() {
        let file = tempfile::tempfile().expect("a file");
        let content = pattern(2 * PIPE_MAX_BYTES);
        file.write_all_at(&content, 0).expect("written");
        for offset in [0, 1, 511, 4095, 4096, 70_001] {
            let mut pipe = Pipe::new().expect("a pipe");
            let put = pipe.put_from_file(&file, offset, PIPE_MAX_BYTES).expect("put");
            assert_eq!((put, pipe.len_bytes()), (PIPE_MAX_BYTES, PIPE_MAX_BYTES), "at {offset}");
            let (ours, mut theirs) = UnixStream::pair().expect("sockets");
            ours.set_nonblocking(true).expect("set");
            let mut got = vec![0; PIPE_MAX_BYTES];
            let mut at = 0;
            while !pipe.is_empty() {
                match pipe.take_to_socket(ours.as_fd()) {
                    Ok(taken) => {
                        theirs.read_exact(&mut got[at..at + taken]).expect("read");
                        at += taken;
                    }
                    Err(error) => panic!("everything was read, yet {error}"),
                }
            }
            assert_eq!(got, content[offset as usize..][..PIPE_MAX_BYTES], "at {offset}");
        }
    }

    #[test]
    fn bytes_of_a_socket_and_of_memory_go_to_a_file_in_order() {
        let file = tempfile::tempfile().expect("a file");
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let content = pattern(50_000);
        theirs.write_all(&content[100..]).expect("sent");
        let mut pipe = Pipe::new().expect("a pipe");
        assert_eq!(pipe.put(&content[..100]).expect("put"), 100);
        while pipe.len_bytes() < content.len() {
            pipe.put_from_socket(ours.as_fd(), content.len() - pipe.len_bytes()).expect("put");
        }
        let empty = pipe.put_from_socket(ours.as_fd(), 1).expect_err("nothing is left");
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(pipe.take_to_file(&file, 1000, 30_000).expect("taken"), 30_000);
        let mut rest = BytesMut::from(&b"before"[..]);
        pipe.take(&mut rest).expect("taken");
        assert_eq!(rest[6..], content[30_000..]);
        let mut written = vec![0; 30_000];
        file.read_exact_at(&mut written, 1000).expect("read");
        assert_eq!(written, content[..30_000]);
        drop(theirs);
        assert_eq!(pipe.put_from_socket(ours.as_fd(), 1).expect("the end"), 0);
    }

    #[test]
    fn a_full_pipe_says_so() {
        let mut pipe = Pipe::new().expect("a pipe");
        assert!(!pipe.is_full());
        let mut puts = 0;
        let error = loop {
            // Nothing is merged across calls on a pipe that is filled from a socket; from memory it may be.
            match pipe.put(&[7; 4096]) {
                Ok(put) => puts += put,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(puts >= PIPE_MAX_BYTES && puts == pipe.len_bytes() && pipe.is_full());
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4096).expect("sized");
        let refused = pipe.put_from_file(&file, 0, 4096).expect_err("full");
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }
}
