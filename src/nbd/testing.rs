//! Doubles for tests: a disk in memory that can hold requests back, and a client that sends exactly what it is told.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};

use super::{
    BoxFuture, ContextIndex, Export, Exports, Extent, NbdErrno, NbdLimits, NbdListen, NbdServer, OpenError, ReadData,
    ZeroFlags,
};
use crate::core::ids::is_zero;
use crate::core::nbd::wire::{self, chunk, opt, rep};
use crate::core::nbd::{Negotiation, ReplyStyle};
use crate::pipe::Pipe;

/// A disk in memory.
pub(super) struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    pub(super) read_only: AtomicBool,
    /// Serve reads and writes by the fast path.
    pub(super) at_once: AtomicBool,
    /// Offers pipes, but takes none when it comes to that.
    pub(super) declines_pipes: AtomicBool,
    /// What writes out of pipes fail with.
    pub(super) refusal: Mutex<Option<NbdErrno>>,
    /// Requests that were served through pipes.
    pub(super) piped: AtomicUsize,
    /// The next write on its client's thread hangs until this is told, or dropped.
    stuck: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
    /// Requests whose offset lies here wait.
    held: watch::Sender<Range<u64>>,
    /// Reads wait until this many have come, then are answered in the reverse order.
    reverse: Mutex<Option<(usize, Vec<oneshot::Sender<()>>)>>,
    pub(super) flushes: AtomicUsize,
    pub(super) writes_begun: AtomicUsize,
    pub(super) writes_done: AtomicUsize,
    pub(super) reads_begun: AtomicUsize,
}

impl MemoryDisk {
    pub(super) fn new(size_bytes: usize) -> Arc<MemoryDisk> {
        Arc::new(MemoryDisk {
            bytes: Mutex::new(vec![0; size_bytes]),
            read_only: AtomicBool::new(false),
            at_once: AtomicBool::new(false),
            declines_pipes: AtomicBool::new(false),
            refusal: Mutex::new(None),
            piped: AtomicUsize::new(0),
            stuck: Mutex::new(None),
            held: watch::Sender::new(0..0),
            reverse: Mutex::new(None),
            flushes: AtomicUsize::new(0),
            writes_begun: AtomicUsize::new(0),
            writes_done: AtomicUsize::new(0),
            reads_begun: AtomicUsize::new(0),
        })
    }

    /// The next write that is served on its client's thread hangs there until the sender is used or dropped.
    pub(super) fn hang_next_write(&self) -> std::sync::mpsc::Sender<()> {
        let (release, stuck) = std::sync::mpsc::channel();
        *self.stuck.lock() = Some(stuck);
        release
    }

    /// Each run of 8 bytes holds its own offset, so that every block is told by its content.
    pub(super) fn patterned(size_bytes: usize) -> Arc<MemoryDisk> {
        let disk = MemoryDisk::new(size_bytes);
        disk.bytes.lock().copy_from_slice(&pattern(0, size_bytes));
        disk
    }

    pub(super) fn hold(&self, range: Range<u64>) {
        self.held.send_replace(range);
    }

    pub(super) fn answer_reads_in_reverse(&self, count: usize) {
        *self.reverse.lock() = Some((count, Vec::new()));
    }

    pub(super) fn bytes_at(&self, offset: usize, len: usize) -> Vec<u8> {
        self.bytes.lock()[offset..offset + len].to_vec()
    }

    async fn wait(&self, offset: u64) {
        // Not asked when nothing is held: tokio's channels may put a task off, which would change the order.
        if !self.held.borrow().contains(&offset) {
            return;
        }
        let mut held = self.held.subscribe();
        let _ = held.wait_for(|range| !range.contains(&offset)).await;
    }

    async fn wait_for_turn(&self) {
        let turn = {
            let mut reverse = self.reverse.lock();
            let Some((count, waiting)) = &mut *reverse else { return };
            let (sender, turn) = oneshot::channel();
            waiting.push(sender);
            if waiting.len() == *count
                && let Some(last) = waiting.pop()
            {
                let _ = last.send(());
            }
            turn
        };
        let _ = turn.await;
        if let Some((_, waiting)) = &mut *self.reverse.lock()
            && let Some(next) = waiting.pop()
        {
            let _ = next.send(());
        }
    }

    fn hang_if_told(&self) {
        let stuck = self.stuck.lock().take();
        if let Some(stuck) = stuck {
            self.writes_begun.fetch_add(1, Ordering::SeqCst);
            let _ = stuck.recv();
        }
    }

    fn fill(&self, offset: u64, len_bytes: u64, value: u8) {
        self.bytes.lock()[offset as usize..(offset + len_bytes) as usize].fill(value);
    }
}

/// What a patterned disk holds.
pub(super) fn pattern(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len).map(|at| ((at / 8 * 8) as u64 | 1 << 56).to_be_bytes()[at % 8]).collect()
}

impl Export for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::SeqCst)
    }

    fn description(&self) -> String {
        "memory".to_owned()
    }

    fn preferred_block_bytes(&self) -> u32 {
        4096
    }

    fn read(&self, offset: u64, len_bytes: u32) -> BoxFuture<'_, Result<ReadData, NbdErrno>> {
        self.reads_begun.fetch_add(1, Ordering::SeqCst);
        async move {
            self.wait(offset).await;
            self.wait_for_turn().await;
            let data = self.bytes_at(offset as usize, len_bytes as usize);
            let (head, tail) = data.split_at(data.len() / 3);
            Ok(vec![Bytes::copy_from_slice(head), Bytes::copy_from_slice(tail)].into())
        }
        .boxed()
    }

    fn write(&self, offset: u64, data: Bytes, _fua: bool) -> BoxFuture<'_, Result<(), NbdErrno>> {
        self.writes_begun.fetch_add(1, Ordering::SeqCst);
        async move {
            self.wait(offset).await;
            self.bytes.lock()[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
            self.writes_done.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
        .boxed()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), NbdErrno>> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        async { Ok(()) }.boxed()
    }

    fn trim(&self, offset: u64, len_bytes: u64, _fua: bool) -> BoxFuture<'_, Result<(), NbdErrno>> {
        self.fill(offset, len_bytes, 0);
        async { Ok(()) }.boxed()
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len_bytes: u64,
        flags: ZeroFlags,
        _fua: bool,
    ) -> BoxFuture<'_, Result<(), NbdErrno>> {
        // "Fast" is refused, and so is NO_HOLE, wrongly: the session has to send what the protocol allows.
        let result = if flags.fast || !flags.may_punch { Err(NbdErrno::NotSup) } else { Ok(()) };
        if result.is_ok() {
            self.fill(offset, len_bytes, 0);
        }
        async move { result }.boxed()
    }

    fn cache(&self, _offset: u64, _len_bytes: u64) -> BoxFuture<'_, Result<(), NbdErrno>> {
        async { Ok(()) }.boxed()
    }

    fn extents(
        &self,
        _context: ContextIndex,
        offset: u64,
        len_bytes: u64,
        max_extents: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdErrno>> {
        let bytes = self.bytes_at(offset as usize, len_bytes as usize);
        let blocks = bytes.chunks(4096).take(max_extents);
        let extents = blocks.map(|block| Extent::new(block.len() as u64, if is_zero(block) { 3 } else { 0 })).collect();
        async move { Ok(extents) }.boxed()
    }

    fn try_read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), NbdErrno>> {
        self.at_once.load(Ordering::SeqCst).then(|| {
            buf.copy_from_slice(&self.bytes_at(offset as usize, buf.len()));
            Ok(())
        })
    }

    fn read_into(&self, offset: u64, len_bytes: u32, pipe: &mut Pipe) -> Option<()> {
        if !self.at_once.load(Ordering::SeqCst) || self.declines_pipes.load(Ordering::SeqCst) {
            return None;
        }
        self.piped.fetch_add(1, Ordering::SeqCst);
        let bytes = self.bytes_at(offset as usize, len_bytes as usize);
        assert_eq!(pipe.put(&bytes).expect("an empty pipe"), bytes.len());
        Some(())
    }

    fn takes_pipes(&self) -> bool {
        self.at_once.load(Ordering::SeqCst)
    }

    fn write_from(&self, offset: u64, pipe: &mut Pipe, len_bytes: usize) -> Option<Result<(), NbdErrno>> {
        self.hang_if_told();
        if self.declines_pipes.load(Ordering::SeqCst) {
            return None;
        }
        self.piped.fetch_add(1, Ordering::SeqCst);
        if let Some(errno) = *self.refusal.lock() {
            return Some(Err(errno));
        }
        let mut bytes = bytes::BytesMut::new();
        pipe.take(&mut bytes).expect("a pipe with something in it");
        self.bytes.lock()[offset as usize..offset as usize + len_bytes].copy_from_slice(&bytes);
        Some(Ok(()))
    }

    fn write_here(&self, offset: u64, data: &[u8], _fua: bool) -> Option<Result<(), NbdErrno>> {
        self.hang_if_told();
        self.at_once.load(Ordering::SeqCst).then(|| {
            self.bytes.lock()[offset as usize..offset as usize + data.len()].copy_from_slice(data);
            Ok(())
        })
    }
}

/// Exports by name; the default is the only one.
pub(super) struct Disks(pub(super) Vec<(&'static str, Arc<MemoryDisk>)>);

impl Exports for Disks {
    fn names(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| (*name).to_owned()).collect()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>, OpenError> {
        match self.0.iter().find(|(other, _)| *other == name) {
            Some((_, disk)) => Ok(Arc::clone(disk) as Arc<dyn Export>),
            None if name == "later" => Err(OpenError::NotNow("not yet".to_owned())),
            None => Err(OpenError::Unknown),
        }
    }

    fn default_export(&self) -> Option<String> {
        (self.0.len() == 1).then(|| self.0[0].0.to_owned())
    }
}

/// A server on a Unix socket in a directory of its own.
pub(super) struct Served {
    pub(super) server: NbdServer,
    pub(super) path: PathBuf,
    pub(super) _dir: tempfile::TempDir,
}

pub(super) async fn serve(disk: &Arc<MemoryDisk>) -> Served {
    serve_with(disk, NbdLimits::default()).await
}

pub(super) async fn serve_with(disk: &Arc<MemoryDisk>, limits: NbdLimits) -> Served {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("nbd.sock");
    let exports = Arc::new(Disks(vec![("disk", Arc::clone(disk))]));
    let server = NbdServer::listen(&[NbdListen::Unix(path.clone())], exports, limits).await.expect("listens");
    Served { server, path, _dir: dir }
}

/// A reply, whole.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Reply {
    pub(super) cookie: u64,
    pub(super) error: u32,
    pub(super) data: Vec<u8>,
    pub(super) holes: usize,
    /// Extents of each context: length and flags.
    pub(super) status: Vec<(u32, Vec<(u64, u32)>)>,
}

/// A client that checks nothing and sends what it is told.
pub(super) struct Client {
    pub(super) stream: UnixStream,
    pub(super) style: ReplyStyle,
    /// The lengths of reads under way, which a simple reply does not say.
    reads: HashMap<u64, usize>,
}

impl Client {
    /// In transmission with export `disk`.
    pub(super) async fn connect(path: &Path, style: ReplyStyle) -> Client {
        Client::connect_with(path, style, &[]).await
    }

    /// With metadata contexts.
    pub(super) async fn connect_with(path: &Path, style: ReplyStyle, contexts: &[&str]) -> Client {
        let mut stream = greeted(path).await;
        stream.write_all(&3u32.to_be_bytes()).await.expect("sends");
        Client::go(stream, style, contexts).await
    }

    /// Behind greeting, flags and, where there is TLS, STARTTLS.
    pub(super) async fn go(mut stream: UnixStream, style: ReplyStyle, contexts: &[&str]) -> Client {
        match style {
            ReplyStyle::Simple => {}
            ReplyStyle::Structured => ask(&mut stream, opt::STRUCTURED_REPLY, &[]).await,
            ReplyStyle::Extended => ask(&mut stream, opt::EXTENDED_HEADERS, &[]).await,
        }
        if !contexts.is_empty() {
            let mut data = b"\0\0\0\x04disk".to_vec();
            data.extend((contexts.len() as u32).to_be_bytes());
            for context in contexts {
                data.extend((context.len() as u32).to_be_bytes());
                data.extend(context.as_bytes());
            }
            ask(&mut stream, opt::SET_META_CONTEXT, &data).await;
        }
        ask(&mut stream, opt::GO, b"\0\0\0\x04disk\0\0").await;
        Client { stream, style, reads: HashMap::new() }
    }

    /// The header of a request.
    pub(super) fn header(&self, kind: u16, flags: u16, cookie: u64, offset: u64, len_bytes: u64) -> Vec<u8> {
        let extended = self.style == ReplyStyle::Extended;
        let magic = if extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if extended {
            bytes.extend(len_bytes.to_be_bytes());
        } else {
            bytes.extend((len_bytes as u32).to_be_bytes());
        }
        bytes
    }

    /// Sends a request without payload.
    pub(super) async fn send(&mut self, kind: u16, flags: u16, cookie: u64, offset: u64, len_bytes: u64) {
        if kind == wire::cmd::READ {
            self.reads.insert(cookie, len_bytes as usize);
        }
        let header = self.header(kind, flags, cookie, offset, len_bytes);
        self.stream.write_all(&header).await.expect("sends");
    }

    /// Sends a WRITE.
    pub(super) async fn send_write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        let mut bytes = self.header(wire::cmd::WRITE, 0, cookie, offset, data.len() as u64);
        bytes.extend(data);
        self.stream.write_all(&bytes).await.expect("sends");
    }

    /// Sends a request without payload and takes its reply.
    pub(super) async fn call(&mut self, kind: u16, flags: u16, offset: u64, len_bytes: u64) -> Reply {
        self.send(kind, flags, 77, offset, len_bytes).await;
        self.reply().await
    }

    pub(super) async fn read(&mut self, offset: u64, len_bytes: u64) -> Vec<u8> {
        let reply = self.call(wire::cmd::READ, 0, offset, len_bytes).await;
        assert_eq!(reply.error, 0);
        reply.data
    }

    pub(super) async fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.send_write(78, offset, data).await;
        self.reply().await.error
    }

    /// What is written can be read back; returns it.
    pub(super) async fn write_and_read_back(&mut self, offset: u64, len_bytes: usize) -> Vec<u8> {
        let data = pattern(offset as usize + 8, len_bytes);
        assert_eq!(self.write(offset, &data).await, 0);
        assert!(self.read(offset, len_bytes as u64).await == data, "{:?} {offset} {len_bytes}", self.style);
        data
    }

    /// Flushes, says goodbye, and is let go.
    pub(super) async fn leave(mut self) {
        assert_eq!(self.call(wire::cmd::FLUSH, 0, 0, 0).await.error, 0);
        self.send(wire::cmd::DISC, 0, 0, 0, 0).await;
        self.expect_end().await;
    }

    /// The next whole reply.
    pub(super) async fn reply(&mut self) -> Reply {
        let mut reply = Reply::default();
        loop {
            let magic = self.stream.read_u32().await.expect("a reply");
            if magic == wire::SIMPLE_REPLY_MAGIC {
                assert_eq!(self.style, ReplyStyle::Simple);
                reply.error = self.stream.read_u32().await.expect("an error");
                reply.cookie = self.stream.read_u64().await.expect("a cookie");
                let len = self.reads.remove(&reply.cookie).filter(|_| reply.error == 0).unwrap_or(0);
                reply.data = self.take(len).await;
                return reply;
            }
            let extended = self.style == ReplyStyle::Extended;
            assert_eq!(magic, if extended { wire::EXTENDED_REPLY_MAGIC } else { wire::STRUCTURED_REPLY_MAGIC });
            let flags = self.stream.read_u16().await.expect("flags");
            let kind = self.stream.read_u16().await.expect("a type");
            reply.cookie = self.stream.read_u64().await.expect("a cookie");
            let len = if extended {
                self.stream.read_u64().await.expect("an offset");
                self.stream.read_u64().await.expect("a length") as usize
            } else {
                self.stream.read_u32().await.expect("a length") as usize
            };
            let body = self.take(len).await;
            let word = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().expect("4 bytes"));
            let long = |at: usize| u64::from_be_bytes(body[at..at + 8].try_into().expect("8 bytes"));
            match kind {
                chunk::NONE => {}
                chunk::OFFSET_DATA => reply.data.extend(&body[8..]),
                chunk::OFFSET_HOLE => {
                    reply.data.resize(reply.data.len() + word(8) as usize, 0);
                    reply.holes += 1;
                }
                chunk::BLOCK_STATUS => {
                    let extents = (4..len).step_by(8).map(|at| (u64::from(word(at)), word(at + 4)));
                    reply.status.push((word(0), extents.collect()));
                }
                chunk::BLOCK_STATUS_EXT => {
                    let extents = (8..len).step_by(16).map(|at| (long(at), long(at + 8) as u32));
                    reply.status.push((word(0), extents.collect()));
                }
                _ => reply.error = word(0),
            }
            if flags & chunk::FLAG_DONE != 0 {
                return reply;
            }
        }
    }

    async fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).await.expect("the rest of a reply");
        bytes
    }

    /// The server closes, without another byte.
    pub(super) async fn expect_end(&mut self) {
        expect_end(&mut self.stream).await;
    }
}

pub(super) async fn expect_end(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    // A connection that is closed with input unread is reset.
    let _ = stream.read_to_end(&mut rest).await;
    assert!(rest.is_empty(), "{} bytes that nobody asked for", rest.len());
}

/// Connected, the greeting taken.
pub(super) async fn greeted(path: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).await.expect("connects");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.expect("a greeting");
    assert_eq!(greeting, Negotiation::greeting());
    stream
}

/// Sends an option and takes its replies up to the final one, which has to be ACK.
pub(super) async fn ask(stream: &mut UnixStream, option: u32, data: &[u8]) {
    assert_eq!(ask_for(stream, option, data).await, rep::ACK);
}

/// The type of the final reply.
pub(super) async fn ask_for(stream: &mut UnixStream, option: u32, data: &[u8]) -> u32 {
    let mut bytes = wire::IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes).await.expect("sends");
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header).await.expect("an option reply");
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let mut body = vec![0; word(16) as usize];
        stream.read_exact(&mut body).await.expect("its data");
        if word(12) == rep::ACK || word(12) & rep::ERROR_BIT != 0 {
            return word(12);
        }
    }
}

/// Waits until `ready`, which another task or thread brings about.
pub(super) async fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let patience = std::time::Duration::from_secs(60);
    let waited = async {
        while !ready() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    assert!(tokio::time::timeout(patience, waited).await.is_ok(), "{what} never happened");
}
