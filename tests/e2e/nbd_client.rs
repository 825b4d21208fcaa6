//! A small raw NBD client: fixed newstyle, GO, simple or structured replies, any number of requests in flight. Nothing
//! that it waits for is waited for without a bound. Must not know blockferry.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;

/// Longer than any answer takes that comes at all.
const PATIENCE: Duration = Duration::from_secs(90);

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;
const FLAG_FUA: u16 = 1;

/// What the server says: the bytes of a READ (empty for other commands), or its errno.
pub type Outcome = Result<Vec<u8>, u32>;

/// A request that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cookie(u64);

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Replies {
    Simple,
    Structured,
}

pub struct NbdClient {
    writer: Box<dyn Write + Send>,
    open: Open,
    answers: Receiver<(Cookie, Outcome)>,
    early: HashMap<Cookie, Outcome>,
    next: u64,
    pub size_bytes: u64,
}

/// Offsets and lengths of what is under way, by cookie; commands that bring no data have the length 0.
type Open = Arc<Mutex<HashMap<Cookie, (u64, usize)>>>;

impl NbdClient {
    /// Connects to a unix socket; the error is what the server said of the export.
    pub fn unix(socket: &Path, export: &str, replies: Replies) -> io::Result<NbdClient> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut reader = stream.try_clone()?;
        let size_bytes = negotiate(&mut reader, &mut &stream, export, replies)?;
        stream.set_read_timeout(None)?;
        Ok(NbdClient::new(Box::new(stream), Box::new(reader), size_bytes))
    }

    pub fn tcp(addr: SocketAddr, export: &str, replies: Replies) -> io::Result<NbdClient> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut reader = stream.try_clone()?;
        let size_bytes = negotiate(&mut reader, &mut &stream, export, replies)?;
        stream.set_read_timeout(None)?;
        Ok(NbdClient::new(Box::new(stream), Box::new(reader), size_bytes))
    }

    fn new(writer: Box<dyn Write + Send>, reader: Box<dyn Read + Send>, size_bytes: u64) -> NbdClient {
        let open = Open::default();
        let (answer, answers) = channel();
        let reader = io::BufReader::with_capacity(256 << 10, reader);
        let mut replies = Answers { reader, open: Arc::clone(&open), partial: HashMap::new() };
        // Ends with the connection, or when nobody takes the answers any more.
        std::thread::spawn(move || {
            while let Ok(reply) = replies.next() {
                if answer.send(reply).is_err() {
                    return;
                }
            }
        });
        NbdClient { writer, open, answers, early: HashMap::new(), next: 1, size_bytes }
    }

    fn send(&mut self, command: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> Cookie {
        let cookie = Cookie(self.next);
        self.next += 1;
        let brings = if command == READ { len as usize } else { 0 };
        self.open.lock().expect("no poison").insert(cookie, (offset, brings));
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        request.extend_from_slice(&flags.to_be_bytes());
        request.extend_from_slice(&command.to_be_bytes());
        request.extend_from_slice(&cookie.0.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&len.to_be_bytes());
        request.extend_from_slice(data);
        self.writer.write_all(&request).expect("the server takes requests: is the connection still there?");
        cookie
    }

    pub fn submit_read(&mut self, offset: u64, len: usize) -> Cookie {
        self.send(READ, 0, offset, len as u32, &[])
    }

    pub fn submit_write(&mut self, offset: u64, data: &[u8], fua: bool) -> Cookie {
        self.send(WRITE, if fua { FLAG_FUA } else { 0 }, offset, data.len() as u32, data)
    }

    pub fn submit_write_zeroes(&mut self, offset: u64, len: usize) -> Cookie {
        self.send(WRITE_ZEROES, 0, offset, len as u32, &[])
    }

    pub fn submit_flush(&mut self) -> Cookie {
        self.send(FLUSH, 0, 0, 0, &[])
    }

    /// The answer, if it comes within `limit`.
    pub fn wait_for(&mut self, cookie: Cookie, limit: Duration) -> Option<Outcome> {
        if let Some(outcome) = self.early.remove(&cookie) {
            return Some(outcome);
        }
        loop {
            match self.answers.recv_timeout(limit) {
                Ok((other, outcome)) if other == cookie => return Some(outcome),
                Ok((other, outcome)) => drop(self.early.insert(other, outcome)),
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => panic!("the server hung up with {cookie:?} unanswered"),
            }
        }
    }

    /// Returns when the server has hung up, of its own accord.
    #[track_caller]
    pub fn wait_for_hang_up(&mut self) {
        match self.answers.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Disconnected) => {}
            other => panic!("the server has not hung up: {other:?}"),
        }
    }

    #[track_caller]
    pub fn wait(&mut self, cookie: Cookie) -> Outcome {
        self.wait_for(cookie, PATIENCE).unwrap_or_else(|| panic!("no answer to {cookie:?} within {PATIENCE:?}"))
    }

    #[track_caller]
    pub fn try_read(&mut self, offset: u64, len: usize) -> Outcome {
        let cookie = self.submit_read(offset, len);
        self.wait(cookie)
    }

    #[track_caller]
    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.try_read(offset, len).unwrap_or_else(|errno| panic!("READ of {len} at {offset}: errno {errno}"))
    }

    #[track_caller]
    pub fn try_write(&mut self, offset: u64, data: &[u8]) -> Result<(), u32> {
        let cookie = self.submit_write(offset, data, false);
        self.wait(cookie).map(drop)
    }

    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.try_write(offset, data).unwrap_or_else(|errno| panic!("WRITE at {offset}: errno {errno}"));
    }

    #[track_caller]
    pub fn flush(&mut self) {
        let cookie = self.submit_flush();
        self.wait(cookie).unwrap_or_else(|errno| panic!("FLUSH: errno {errno}"));
    }

    /// The whole disk, with several reads under way.
    #[track_caller]
    pub fn read_all(&mut self) -> Vec<u8> {
        let (step, depth) = (256 << 10, 8);
        let mut bytes = Vec::with_capacity(self.size_bytes as usize);
        let mut under_way = std::collections::VecDeque::new();
        let mut at = 0;
        while at < self.size_bytes || !under_way.is_empty() {
            while at < self.size_bytes && under_way.len() < depth {
                let len = (self.size_bytes - at).min(step);
                under_way.push_back((at, self.submit_read(at, len as usize)));
                at += len;
            }
            let (offset, cookie) = under_way.pop_front().expect("one is under way");
            let part = self.wait(cookie).unwrap_or_else(|errno| panic!("READ at {offset}: errno {errno}"));
            bytes.extend_from_slice(&part);
        }
        bytes
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        let mut disc = [0; 28];
        disc[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
        disc[6..8].copy_from_slice(&DISC.to_be_bytes());
        // The server may be gone already.
        let _ = self.writer.write_all(&disc);
    }
}

fn negotiate(reader: &mut impl Read, writer: &mut impl Write, export: &str, replies: Replies) -> io::Result<u64> {
    let mut greeting = [0; 18];
    reader.read_exact(&mut greeting)?;
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT", "the server greets");
    let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
    assert_eq!(flags & 3, 3, "fixed newstyle, no zeroes");
    writer.write_all(&3u32.to_be_bytes())?;
    if replies == Replies::Structured {
        option(writer, 8, &[])?;
        let (kind, _) = option_reply(reader)?;
        assert_eq!(kind, 1, "structured replies are granted");
    }
    let name = export.as_bytes();
    let go = [&(name.len() as u32).to_be_bytes()[..], name, &0u16.to_be_bytes()].concat();
    option(writer, 7, &go)?;
    let mut size_bytes = None;
    loop {
        let (kind, data) = option_reply(reader)?;
        match kind {
            1 => return size_bytes.ok_or_else(|| io::Error::other("GO without the export's size")),
            3 if data.starts_with(&[0, 0]) => {
                size_bytes = data.get(2..10).and_then(|size| size.try_into().ok()).map(u64::from_be_bytes);
            }
            3 => {}
            refused => {
                let why = String::from_utf8_lossy(&data).into_owned();
                return Err(io::Error::other(format!("export {export} was refused ({refused:#x}): {why}")));
            }
        }
    }
}

fn option(writer: &mut impl Write, option: u32, data: &[u8]) -> io::Result<()> {
    let len = (data.len() as u32).to_be_bytes();
    writer.write_all(&[&b"IHAVEOPT"[..], &option.to_be_bytes(), &len, data].concat())
}

fn option_reply(reader: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; 20];
    reader.read_exact(&mut header)?;
    assert_eq!(header[..8], 0x0003_e889_0455_65a9u64.to_be_bytes(), "an option's reply");
    let mut data = vec![0; be32(&header[16..]) as usize];
    reader.read_exact(&mut data)?;
    Ok((be32(&header[12..]), data))
}

/// Puts answers together: a structured one may come in several chunks, and those of several answers may be mixed.
struct Answers {
    reader: io::BufReader<Box<dyn Read + Send>>,
    open: Open,
    partial: HashMap<Cookie, (Vec<u8>, Option<u32>)>,
}

impl Answers {
    fn next(&mut self) -> io::Result<(Cookie, Outcome)> {
        loop {
            let magic: [u8; 4] = self.exactly()?;
            if magic == 0x6744_6698u32.to_be_bytes() {
                return self.simple();
            }
            assert_eq!(magic, 0x668e_33efu32.to_be_bytes(), "a reply begins");
            if let Some(whole) = self.chunk()? {
                return Ok(whole);
            }
        }
    }

    fn simple(&mut self) -> io::Result<(Cookie, Outcome)> {
        let header: [u8; 12] = self.exactly()?;
        let (errno, cookie) = (be32(&header), Cookie(be64(&header[4..])));
        let (_, len) = self.close(cookie);
        if errno != 0 {
            return Ok((cookie, Err(errno)));
        }
        Ok((cookie, Ok(self.bytes(len)?)))
    }

    fn chunk(&mut self) -> io::Result<Option<(Cookie, Outcome)>> {
        let header: [u8; 16] = self.exactly()?;
        let (flags, kind) = (be16(&header), be16(&header[2..]));
        let cookie = Cookie(be64(&header[4..]));
        let payload = self.bytes(be32(&header[12..]) as usize)?;
        let asked = self.open.lock().expect("no poison").get(&cookie).copied();
        let (offset, len) = asked.unwrap_or_else(|| panic!("a chunk for {cookie:?}, which is not open"));
        // What no chunk fills must not pass for zeros.
        let (data, errno) = self.partial.entry(cookie).or_insert_with(|| (vec![0xee; len], None));
        match kind {
            0 => {}
            1 => data[(be64(&payload) - offset) as usize..][..payload.len() - 8].copy_from_slice(&payload[8..]),
            2 => data[(be64(&payload) - offset) as usize..][..be32(&payload[8..]) as usize].fill(0),
            error if error & 0x8000 != 0 => *errno = Some(be32(&payload)),
            unknown => panic!("a chunk of the unknown type {unknown}"),
        }
        if flags & 1 == 0 {
            return Ok(None);
        }
        self.close(cookie);
        let whole = self.partial.remove(&cookie);
        Ok(whole.map(|(data, errno)| (cookie, errno.map_or(Ok(data), Err))))
    }

    fn close(&self, cookie: Cookie) -> (u64, usize) {
        let asked = self.open.lock().expect("no poison").remove(&cookie);
        asked.unwrap_or_else(|| panic!("an answer to {cookie:?}, which is not open"))
    }

    fn exactly<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from(be32(bytes)) << 32 | u64::from(be32(&bytes[4..]))
}
