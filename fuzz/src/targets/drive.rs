//! A client that sends what it is told and checks every reply. Must not know what the disk holds.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::answers::{Answer, Answers, Asked};
use crate::core::nbd::wire::{opt, rep};
use crate::core::nbd::{ContextIndex, ReplyStyle, Session};

/// Longer than any answer takes; a server that stalls fails the run.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection in transmission.
pub(crate) struct Connection {
    stream: UnixStream,
    pub(crate) session: Session,
    answers: Answers,
    input: Vec<u8>,
    unsent: Vec<u8>,
}

impl Connection {
    /// Negotiates `style` and, where it has them, the first `contexts` metadata contexts.
    pub(crate) fn open(socket: &Path, export: &str, style: ReplyStyle, contexts: usize) -> Connection {
        let mut stream = UnixStream::connect(socket).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut hello = 3u32.to_be_bytes().to_vec();
        match style {
            ReplyStyle::Simple => {}
            ReplyStyle::Structured => option(&mut hello, opt::STRUCTURED_REPLY, &[]),
            ReplyStyle::Extended => option(&mut hello, opt::EXTENDED_HEADERS, &[]),
        }
        let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
        let contexts = if style == ReplyStyle::Simple { 0 } else { contexts };
        if contexts > 0 {
            let mut data = name.clone();
            data.extend((contexts as u32).to_be_bytes());
            for query in &["base:allocation", "blockferry:residency"][..contexts] {
                data.extend((query.len() as u32).to_be_bytes());
                data.extend(query.as_bytes());
            }
            option(&mut hello, opt::SET_META_CONTEXT, &data);
        }
        option(&mut hello, opt::GO, &[&name[..], &[0, 0]].concat());
        stream.write_all(&hello).expect("sends");
        let mut session = Session { style, flags: 0, size_bytes: 0, contexts: Vec::new() };
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header).expect("an option's reply");
            let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let mut data = vec![0; word(16) as usize];
            stream.read_exact(&mut data).expect("its data");
            match (word(8), word(12)) {
                (opt::GO, rep::ACK) => break,
                (_, rep::ACK) => {}
                (opt::GO, rep::INFO) if data.starts_with(&[0, 0]) => {
                    session.size_bytes = u64::from_be_bytes(*data[2..].first_chunk().expect("a size"));
                    session.flags = u16::from_be_bytes(*data[10..].first_chunk().expect("flags"));
                }
                (_, rep::META_CONTEXT) => {
                    session.contexts.push(ContextIndex(u32::from_be_bytes(*data.first_chunk().expect("an id"))));
                }
                (option, kind) => panic!("a reply of type {kind:#x} to option {option}"),
            }
        }
        assert_eq!(session.contexts.len(), contexts);
        let answers = Answers::new(style, session.size_bytes);
        Connection { stream, session, answers, input: Vec::new(), unsent: Vec::new() }
    }

    /// Queues a request whose answer is `asked`.
    pub(crate) fn request(&mut self, cookie: u64, header: &[u8], payload: &[u8], asked: Asked) {
        self.answers.expect(cookie, asked);
        self.raw(header);
        self.raw(payload);
    }

    /// Queues bytes that nobody will answer.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.unsent.extend(bytes);
    }

    /// Requests without an answer.
    pub(crate) fn open_requests(&self) -> usize {
        self.answers.open()
    }

    /// Sends what is queued; false if the server has hung up.
    pub(crate) fn send(&mut self) -> bool {
        let unsent = std::mem::take(&mut self.unsent);
        self.stream.write_all(&unsent).is_ok()
    }

    /// Sends what is queued and waits for every answer.
    pub(crate) fn drain(&mut self) -> Vec<(u64, Answer)> {
        assert!(self.send(), "the server hung up");
        let mut got = Vec::new();
        while self.answers.open() > 0 {
            got.extend(self.take());
            if self.answers.open() > 0 {
                assert!(self.fill() > 0, "the server hung up with {} requests unanswered", self.answers.open());
            }
        }
        assert!(self.input.is_empty(), "bytes that nobody asked for");
        got
    }

    /// As [`Connection::drain`], but takes answers while it sends, in segments of at most so many bytes: more may be under way
    /// than sockets hold.
    pub(crate) fn drain_in_segments(&mut self, segment_bytes: usize) -> Vec<(u64, Answer)> {
        let unsent = std::mem::take(&mut self.unsent);
        let mut stream = self.stream.try_clone().expect("another handle");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for segment in unsent.chunks(segment_bytes) {
                    stream.write_all(segment).expect("the server takes requests");
                }
            });
            self.drain()
        })
    }

    /// Sends what is queued and nothing more; what is answered until the server closes.
    pub(crate) fn last_answers(mut self) -> Vec<(u64, Answer)> {
        // It may have hung up in the middle of this.
        let _ = self.send();
        let _ = self.stream.shutdown(Shutdown::Write);
        let mut got = Vec::new();
        loop {
            got.extend(self.take());
            if self.fill() == 0 {
                return got;
            }
        }
    }

    fn take(&mut self) -> Vec<(u64, Answer)> {
        let (mut got, mut at) = (Vec::new(), 0);
        while let Some((taken, whole)) = self.answers.take(&self.input[at..]) {
            at += taken;
            got.extend(whole);
        }
        self.input.drain(..at);
        got
    }

    fn fill(&mut self) -> usize {
        let mut buf = [0; 64 << 10];
        match self.stream.read(&mut buf) {
            Ok(len) => {
                self.input.extend(&buf[..len]);
                len
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("{} requests are unanswered: {error}", self.answers.open()),
        }
    }
}

fn option(bytes: &mut Vec<u8>, option: u32, data: &[u8]) {
    bytes.extend(b"IHAVEOPT");
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
}
