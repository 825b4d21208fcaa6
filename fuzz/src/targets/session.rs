//! Target `session`: up to three clients on one disk behind a whole server, requests of all kinds interleaved, beside a
//! model of the disk's bytes. After each batch every answer is compared: its error with the one that is due, every
//! byte of a READ with what may stand there while the batch's writes are under way, and the disk with what was acknowledged.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::answers::{Answer, Asked};
use super::disk::{BAD_SECTOR, DISK_BYTES, Disk, Disks, Temper};
use super::drive::Connection;
use super::input::Input;
use super::judge::{Raw, Verdict, judge, request_magic};
use crate::core::nbd::wire::{cmd, cmd_flag};
use crate::core::nbd::{NbdErrno, ReplyStyle, Session};
use crate::nbd::{NbdLimits, NbdListen, NbdServer};

const CONNECTIONS: usize = 3;
const MAX_STEPS: usize = 400;
const MAX_BATCH: usize = 12;
/// The longest payload that is really sent.
const MAX_SENT_BYTES: u64 = 40 << 10;

/// See the module.
pub fn session(data: &[u8]) {
    thread_local! { static SITE: Site = Site::start(); }
    SITE.with(|site| {
        let mut input = Input::new(data);
        let mut run = Run::new(site, &mut input);
        for _ in 0..MAX_STEPS {
            if input.is_empty() {
                break;
            }
            run.step(&mut input);
        }
        run.drain();
        run.end();
    });
}

/// A server that many runs share.
struct Site {
    disks: Arc<Disks>,
    server: NbdServer,
    _runtime: tokio::runtime::Runtime,
    dir: tempfile::TempDir,
}

impl Site {
    fn start() -> Site {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let dir = tempfile::tempdir().expect("a directory");
        let disks = Arc::new(Disks::default());
        let listeners = [NbdListen::Unix(dir.path().join("s"))];
        let listening = NbdServer::listen(&listeners, Arc::clone(&disks) as Arc<_>, NbdLimits::default());
        let server = runtime.block_on(listening).expect("listens");
        Site { disks, server, _runtime: runtime, dir }
    }

    fn connect(&self, style: ReplyStyle, contexts: usize) -> Connection {
        Connection::open(&self.dir.path().join("s"), "disk", style, contexts)
    }

    /// The server has noticed that clients have gone: what they changed is done.
    fn settle(&self, connections: usize) {
        let begun = Instant::now();
        while self.server.connections() != connections {
            let now = self.server.connections();
            assert!(begun.elapsed() < Duration::from_secs(60), "{now} connections, not {connections}");
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// What a change puts into its range.
#[derive(Clone, Debug)]
enum Fill {
    Zero,
    Bytes(Vec<u8>),
}

/// A request that was sent.
struct Sent {
    raw: Raw,
    /// The error that it fails with.
    fails: Option<NbdErrno>,
    /// What it changes if it does not fail.
    change: Option<(Range<usize>, Fill)>,
    answer: Option<Answer>,
}

/// A change that is under way, or was a moment ago.
#[derive(Clone, Copy)]
struct Change<'a> {
    sent: &'a Sent,
    range: &'a Range<usize>,
    fill: &'a Fill,
}

impl<'a> Change<'a> {
    fn of(sent: &'a Sent) -> Option<Change<'a>> {
        let (range, fill) = sent.change.as_ref()?;
        Some(Change { sent, range, fill })
    }

    fn at(&self, at: usize) -> u8 {
        match self.fill {
            Fill::Zero => 0,
            Fill::Bytes(bytes) => bytes[at - self.range.start],
        }
    }
}

/// `range`, cut where a change begins or ends; with each piece, the changes that cover it.
fn pieces<'a>(range: Range<usize>, changes: &[Change<'a>]) -> Vec<(Range<usize>, Vec<Change<'a>>)> {
    let edges = changes.iter().flat_map(|change| [change.range.start, change.range.end]);
    let mut edges: Vec<usize> = edges.filter(|edge| range.contains(edge)).chain([range.start, range.end]).collect();
    edges.sort_unstable();
    edges.dedup();
    let piece = |pair: &[usize]| {
        let covering = changes.iter().filter(|change| change.range.contains(&pair[0]));
        (pair[0]..pair[1], covering.copied().collect())
    };
    edges.windows(2).map(piece).collect()
}

struct Run<'a> {
    site: &'a Site,
    disk: Arc<Disk>,
    connections: Vec<Connection>,
    /// The disk's bytes before this batch.
    model: Vec<u8>,
    /// This batch, by cookie.
    batch: HashMap<u64, Sent>,
    flushes: usize,
    next: u64,
}

impl<'a> Run<'a> {
    fn new(site: &'a Site, input: &mut Input<'_>) -> Run<'a> {
        let choices = input.u8();
        let bad = input.one_of(&[None, Some(NbdErrno::Io), Some(NbdErrno::NotSup), Some(NbdErrno::Overflow)]);
        let disk = Disk::new(Temper {
            at_once: input.u8(),
            delays: input.u8() % 8,
            bad,
            no_fast_zero: choices & 1 != 0,
            odd_extents: choices & 2 != 0,
            long_reads: choices & 4 != 0,
            read_only: choices & 0xf8 == 0xf8,
        });
        site.disks.insert("disk", &disk);
        let model = disk.bytes();
        let mut run = Run { site, disk, connections: Vec::new(), model, batch: HashMap::new(), flushes: 0, next: 0 };
        for _ in 0..=usize::from(input.u8()) % CONNECTIONS {
            let connection = run.connect(input);
            run.connections.push(connection);
        }
        run
    }

    fn connect(&self, input: &mut Input<'_>) -> Connection {
        let style = input.one_of(&[ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended]);
        let connection = self.site.connect(style, usize::from(input.u8() % 3));
        // The server counts a client a moment after it has told it so.
        self.site.settle(self.connections.len() + 1);
        connection
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let at = usize::from(input.u8()) % self.connections.len();
        match input.u8() {
            0..=24 => self.drain(),
            25..=32 => self.leave(at, input),
            _ => self.request(at, input),
        }
        if self.connections.iter().any(|connection| connection.open_requests() >= MAX_BATCH) {
            self.drain();
        }
    }

    fn request(&mut self, at: usize, input: &mut Input<'_>) {
        let kinds = [
            cmd::READ,
            cmd::WRITE,
            cmd::READ,
            cmd::WRITE,
            cmd::WRITE_ZEROES,
            cmd::TRIM,
            cmd::FLUSH,
            cmd::CACHE,
            cmd::BLOCK_STATUS,
            99,
        ];
        let kind = input.one_of(&kinds);
        let extended = self.connections[at].session.style == ReplyStyle::Extended;
        let mut flags = match input.u8() {
            choice @ 0..=63 => u16::from(choice),
            64..=70 => input.u16(),
            71..=120 => cmd_flag::FUA,
            _ => 0,
        };
        if extended && kind == cmd::WRITE && input.u8() > 32 {
            flags |= cmd_flag::PAYLOAD_LEN;
        }
        let (offset, mut len_bytes) = if kind == cmd::FLUSH && input.u8() > 8 {
            (0, 0)
        } else {
            let size = DISK_BYTES as u64;
            let offset = input.near(&[0, 512, 4096, BAD_SECTOR.start as u64, size / 2, size - 512, size]);
            (offset, input.near(&[1, 512, 512, 4096, 4096, 16 << 10, 20 << 10, size]))
        };
        if !extended {
            len_bytes &= 0xffff_ffff;
        }
        let style = self.connections[at].session.style;
        let raw = Raw { magic: request_magic(style), flags, kind, cookie: self.next, offset, len_bytes };
        self.next += 1;
        self.send(at, raw, input);
    }

    fn send(&mut self, at: usize, mut raw: Raw, input: &mut Input<'_>) {
        let session = self.connections[at].session.clone();
        let is_status_of = |raw: &Raw| raw.kind == cmd::BLOCK_STATUS && raw.flags & cmd_flag::PAYLOAD_LEN != 0;
        let mut status_payload = Vec::new();
        if is_status_of(&raw) && session.style == ReplyStyle::Extended {
            status_payload = raw.len_bytes.to_be_bytes().to_vec();
            for _ in 0..=input.u8() % 3 {
                status_payload.extend(u32::from(input.u8() % 3).to_be_bytes());
            }
            raw.len_bytes = status_payload.len() as u64;
        }
        let header = raw.bytes(session.style);
        let (mut fails, payload_bytes) = match judge(&session, &raw) {
            Verdict::Serve { payload_bytes } => (None, payload_bytes),
            Verdict::Refuse { errno, payload_bytes } => (Some(errno), payload_bytes),
            Verdict::HangUp | Verdict::Leave => {
                self.connections[at].raw(&header);
                return self.leave(at, input);
            }
        };
        if payload_bytes > MAX_SENT_BYTES {
            // More than is worth sending: the client vanishes in the middle of it.
            let part = vec![0x77; u64::from(input.u16()).min(payload_bytes - 1) as usize];
            self.connections[at].raw(&header);
            self.connections[at].raw(&part);
            return self.vanish(at, input);
        }
        let payload = if status_payload.is_empty() {
            let seed = input.u8();
            (0..payload_bytes).map(|nth| if seed & 7 == 0 { 0 } else { seed.wrapping_add((nth >> 6) as u8) }).collect()
        } else {
            status_payload
        };
        let mut asked = Asked {
            kind: raw.kind,
            offset: raw.offset,
            len_bytes: raw.len_bytes,
            dont_fragment: raw.flags & cmd_flag::DF != 0,
            one: raw.flags & cmd_flag::REQ_ONE != 0,
            contexts: session.contexts.iter().map(|context| context.0).collect(),
        };
        if fails.is_none() && is_status_of(&raw) {
            fails = judge_status(&session, &raw, &payload, &mut asked);
        }
        let mut sent = Sent { raw, fails, change: None, answer: None };
        if fails.is_none() {
            self.foresee(&mut sent, asked.len_bytes, &payload);
        }
        self.connections[at].request(raw.cookie, &header, &payload, asked);
        self.batch.insert(raw.cookie, sent);
    }

    /// What comes of a request that the server passes on to the disk.
    fn foresee(&self, sent: &mut Sent, len_bytes: u64, payload: &[u8]) {
        let Temper { bad, no_fast_zero, long_reads, at_once, .. } = self.disk.temper;
        let raw = &sent.raw;
        let flag = |bit: u16| raw.flags & bit != 0;
        if raw.kind == cmd::FLUSH {
            return;
        }
        let range = raw.offset as usize..(raw.offset + len_bytes) as usize;
        let touches_bad = range.start < BAD_SECTOR.end && range.end > BAD_SECTOR.start;
        let is_fast_zero = raw.kind == cmd::WRITE_ZEROES && flag(cmd_flag::FAST_ZERO);
        let is_whole = raw.kind == cmd::READ && flag(cmd_flag::DF);
        if is_fast_zero && no_fast_zero {
            sent.fails = Some(NbdErrno::NotSup);
        } else if touches_bad && bad.is_some() {
            sent.fails = bad.map(|errno| match errno {
                NbdErrno::NotSup if !is_fast_zero => NbdErrno::Inval,
                NbdErrno::Overflow if !is_whole => NbdErrno::Inval,
                errno => errno,
            });
        } else if raw.kind == cmd::READ && long_reads && len_bytes == 512 && at_once >> (raw.offset / 512 % 8) & 1 == 0
        {
            sent.fails = Some(NbdErrno::Io);
        } else {
            sent.change = match raw.kind {
                cmd::WRITE => Some((range, Fill::Bytes(payload.to_vec()))),
                cmd::WRITE_ZEROES | cmd::TRIM => Some((range, Fill::Zero)),
                _ => None,
            };
        }
    }

    /// Ends a connection in an orderly or a disorderly way; another takes its place.
    fn leave(&mut self, at: usize, input: &mut Input<'_>) {
        match input.u8() % 4 {
            0 => return self.vanish(at, input),
            1 => self.connections[at].raw(&[0xff; 40]),
            2 => {
                let style = self.connections[at].session.style;
                let magic = request_magic(style);
                let disc = Raw { magic, flags: 0, kind: cmd::DISC, cookie: 0, offset: 0, len_bytes: 0 };
                self.connections[at].raw(&disc.bytes(style));
            }
            // Nothing more is sent, and that is all.
            _ => {}
        }
        self.drain_others(at);
        let connection = self.connections.swap_remove(at);
        let open = connection.open_requests();
        let answers = connection.last_answers();
        assert_eq!(answers.len(), open, "whoever leaves gets the answers to what was sent before");
        self.note(answers);
        self.replace(input);
    }

    fn vanish(&mut self, at: usize, input: &mut Input<'_>) {
        self.drain_others(at);
        let mut connection = self.connections.swap_remove(at);
        let _ = connection.send();
        drop(connection);
        self.replace(input);
    }

    /// So that nothing but the leaving connection's requests is under way.
    fn drain_others(&mut self, leaving: usize) {
        for at in (0..self.connections.len()).filter(|at| *at != leaving).collect::<Vec<_>>() {
            let answers = self.connections[at].drain();
            self.note(answers);
        }
    }

    fn replace(&mut self, input: &mut Input<'_>) {
        self.site.settle(self.connections.len());
        self.check();
        let connection = self.connect(input);
        self.connections.push(connection);
    }

    fn note(&mut self, answers: Vec<(u64, Answer)>) {
        for (cookie, answer) in answers {
            self.batch.get_mut(&cookie).expect("it was sent").answer = Some(answer);
        }
    }

    /// Waits for all answers and compares them.
    fn drain(&mut self) {
        // All send before one of them reads: what is under way is under way at the same time.
        for connection in &mut self.connections {
            assert!(connection.send(), "the server hung up");
        }
        for at in 0..self.connections.len() {
            let answers = self.connections[at].drain();
            self.note(answers);
        }
        self.check();
    }

    /// Nothing is under way any more.
    fn check(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        let changes: Vec<Change<'_>> = batch.values().filter_map(Change::of).collect();
        for sent in batch.values() {
            let Some(answer) = &sent.answer else { continue };
            assert_eq!(answer.errno, sent.fails, "{:?}", sent.raw);
            let start = sent.raw.offset as usize;
            for (range, over) in pieces(start..start + answer.data.len(), &changes) {
                let read = &answer.data[range.start - start..range.end - start];
                self.check_bytes("a READ", read, range, &over);
            }
            if changes.is_empty() && !self.disk.temper.odd_extents {
                self.check_extents(sent, answer);
            }
        }
        let has_flushed = self.check_flushes(&batch);
        let (now, durable) = (self.disk.bytes(), self.disk.durable());
        for (range, over) in pieces(0..DISK_BYTES, &changes) {
            let (is_now, is_durable) = (&now[range.clone()], &durable[range.clone()]);
            self.check_bytes("the disk", is_now, range.clone(), &over);
            match over[..] {
                [] => assert!(!has_flushed || is_durable == is_now, "{range:?} is not durable after a flush"),
                [only] if only.sent.answer.is_some() => {
                    let is_there = is_now.iter().zip(range.clone()).all(|(byte, at)| *byte == only.at(at));
                    assert!(is_there, "{range:?} was acknowledged and is not there: {:?}", only.sent.raw);
                    let is_fua = only.sent.raw.flags & cmd_flag::FUA != 0;
                    assert!(!is_fua || is_durable == is_now, "{range:?} is not durable in spite of FUA");
                }
                _ => {}
            }
        }
        self.model = now;
    }

    /// Each byte is the one from before this batch, or what one of the changes under way puts there.
    fn check_bytes(&self, what: &str, bytes: &[u8], range: Range<usize>, over: &[Change<'_>]) {
        if bytes == &self.model[range.clone()] {
            return;
        }
        for (byte, at) in bytes.iter().zip(range) {
            let is_known = *byte == self.model[at] || over.iter().any(|change| change.at(at) == *byte);
            assert!(is_known, "{what} has {byte:#x} at {at}, which nobody wrote");
        }
    }

    /// Whether a flush was acknowledged.
    fn check_flushes(&mut self, batch: &HashMap<u64, Sent>) -> bool {
        let flushes = || batch.values().filter(|sent| sent.raw.kind == cmd::FLUSH && sent.fails.is_none());
        let (asked, answered) = (flushes().count(), flushes().filter(|sent| sent.answer.is_some()).count());
        let now = self.disk.flushes.load(Ordering::SeqCst);
        let new = now - std::mem::replace(&mut self.flushes, now);
        let is_right = (answered..=asked).contains(&new);
        assert!(is_right, "{new} flushes reached the disk, {asked} were asked for and {answered} acknowledged");
        answered > 0
    }

    /// What is said to read as zeroes does.
    fn check_extents(&self, sent: &Sent, answer: &Answer) {
        for (context, extents) in &answer.status {
            let mut at = sent.raw.offset as usize;
            for (len, flags) in extents {
                let bytes = &self.model[at..at + *len as usize];
                assert!(*context != 0 || flags & 2 == 0 || bytes.iter().all(|byte| *byte == 0), "data is called zero");
                at += *len as usize;
            }
        }
    }

    fn end(self) {
        let Run { site, connections, .. } = self;
        drop(connections);
        site.settle(0);
        site.disks.remove("disk");
    }
}

/// Judges the payload of a BLOCK_STATUS, and notes what it asks for.
fn judge_status(session: &Session, raw: &Raw, payload: &[u8], asked: &mut Asked) -> Option<NbdErrno> {
    let (len_bytes, ids) = payload.split_first_chunk::<8>().expect("its length was judged");
    let len_bytes = u64::from_be_bytes(*len_bytes);
    let ids: Vec<u32> = ids.as_chunks::<4>().0.iter().map(|id| u32::from_be_bytes(*id)).collect();
    let end = u128::from(raw.offset) + u128::from(len_bytes);
    let is_good = len_bytes > 0
        && end <= u128::from(session.size_bytes)
        && ids.iter().all(|id| session.contexts.iter().any(|context| context.0 == *id))
        && ids.iter().enumerate().all(|(at, id)| !ids[..at].contains(id));
    (asked.len_bytes, asked.contexts) = (len_bytes, ids);
    if is_good { None } else { Some(NbdErrno::Inval) }
}
