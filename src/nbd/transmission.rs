//! The transmission phase of one connection: reads requests, runs them, and sends replies in the order in which they are
//! ready. Must not know what an export is made of, nor which thread it is on.
//!
//! Everything happens in [`Transmission::poll`], which moves what can be moved in each direction and returns when all
//! of it has to wait. So a request that the export answers at once costs no task, no channel and no allocation, and the
//! replies to all requests that came in one segment leave in one system call. Work that may wait for the disk is handed
//! out as a [`Job`], to be run by the same thread without holding on to the connection.
//!
//! What a client can make this hold: its requests in flight (bounded in number, their payloads by [`Share`]), replies
//! that it does not take (requests are left in the socket from [`OUTPUT_HIGH_BYTES`] on), and one buffer of input.

mod pieces;
mod piped;

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::budget::Share;
use super::execute::{Finished, Outcome, SMALL_REQUEST_BYTES, StatusQuery, cost_bytes, execute};
use super::output::{MAX_SLICES, Output, SYNC_MAX_BYTES};
use super::socket::{Peer, Socket};
use super::{BoxFuture, Export, ReadData};
use crate::core::ids::is_zero;
use crate::core::nbd::{
    BadRequest, Command, ContextIndex, Fault, NbdErrno, Parsed, Request, Session, Tag, parse_status_payload,
};

use crate::pipe::Pipe;

use pieces::Pieces;
use piped::{PipedWrite, Pipes};

/// Input that is read at once while requests are small.
const INPUT_BYTES: usize = 64 << 10;

/// Input that is read at once after a large write: the next header and little of its payload, which then goes straight
/// into a buffer of its own.
const INPUT_AFTER_LARGE_BYTES: usize = 512;

/// So many requests without a long payload are taken for the end of those that have one.
const SHORT_REQUESTS: u32 = 4;

/// Payloads up to this length are taken from the input buffer; longer ones are read into their own.
const SMALL_PAYLOAD_BYTES: usize = 16 << 10;

/// Buffers for payloads that are kept: 8 of 128 KiB are what a client has in flight that reads ahead.
const SPARE_PAYLOADS: usize = 8;

/// Replies are sent when this much waits, even though more requests are at hand: so the client works on the first
/// replies while the next are made.
const FLUSH_BYTES: usize = 32 << 10;

/// No more requests are taken while this much waits to be sent.
const OUTPUT_HIGH_BYTES: usize = 512 << 10;

/// Why no more requests are taken from a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It sent DISC.
    Disconnected,
    /// It closed the connection, or its sending side.
    Closed,
    /// The connection broke.
    Broken(std::io::ErrorKind),
    /// It broke the protocol.
    Fault(Fault),
    /// The server is being shut down.
    Shutdown,
    /// What was served is gone.
    Withdrawn,
}

/// Where the next input goes.
enum Intake {
    /// A request header is next.
    Header,
    /// This request waits for its share of the budget.
    Budget(Request),
    /// The memory for this request is held by others: it is run in pieces.
    Pieces(Pieces),
    /// The short payload of this request is awaited in the input buffer.
    Small(Request),
    /// The long payload of this request is read into `payload`.
    Large { request: Request, payload: BytesMut },
    /// The payload of this request goes through a pipe.
    Piped(PipedWrite),
    /// This many bytes are dropped; then the request is answered with its error.
    Skip { left_bytes: u64, bad: BadRequest },
}

/// What [`Transmission::poll`] came to.
pub(super) enum Turn {
    /// Nothing can be moved; the task is woken when something can. `is_idle`: the client's next request is all that is
    /// waited for.
    Wait { is_idle: bool },
    /// This is to be done next, and its result handed to [`Transmission::job_done`].
    Run(Job),
    /// No more requests are taken, and all have been answered.
    Done,
}

/// A request that is run on the connection's own thread, which may have to wait for the disk.
pub(super) struct Job {
    request: Request,
    work: Work,
    /// What of the budget it has.
    taken_bytes: u64,
}

/// How a job is run.
enum Work {
    /// By [`Export::read_here`], [`Export::write_here`] or [`Export::flush_here`], with what is written, or has been read.
    Copied(BytesMut),
    /// By [`Export::read_into`].
    ReadPiped(Pipe),
    /// By [`Export::write_from`].
    WritePiped(Pipe),
}

impl Job {
    /// Runs it; None where the export would rather do it its slow way.
    pub(super) fn run(&mut self, export: &dyn Export) -> Option<Result<(), NbdErrno>> {
        match (self.request.command, &mut self.work) {
            (Command::Read { offset, len_bytes, .. }, Work::Copied(payload)) => {
                payload.resize(len_bytes as usize, 0);
                export.read_here(offset, payload)
            }
            (Command::Read { offset, len_bytes, .. }, Work::ReadPiped(pipe)) => {
                export.read_into(offset, len_bytes, pipe).map(Ok)
            }
            (Command::Write { offset, fua, .. }, Work::Copied(payload)) => export.write_here(offset, payload, fua),
            (Command::Write { offset, len_bytes, .. }, Work::WritePiped(pipe)) => {
                export.write_from(offset, pipe, len_bytes as usize)
            }
            (Command::Flush, _) => export.flush_here(),
            _ => None,
        }
    }
}

/// One connection in transmission.
pub(super) struct Transmission {
    peer: Peer,
    name: String,
    session: Session,
    export: Arc<dyn Export>,
    max_requests: usize,
    share: Share,

    input: BytesMut,
    intake: Intake,
    job: Option<Job>,
    /// Jobs that have been handed out and are not done yet: more than one only where one hangs.
    jobs_out: usize,
    /// Whether requests may be run on the connection's own thread, where they may wait for the disk.
    may_run_here: bool,
    /// There was more in the socket when a long payload had been read.
    is_followed: bool,
    input_step_bytes: usize,
    /// Requests without a long payload since the last with one.
    short_requests: u32,
    /// Buffers of earlier payloads, for the next: fresh memory costs a page fault every 4 KiB.
    spare_payloads: Vec<BytesMut>,
    pipes: Pipes,

    /// Requests that change nothing: dropped when the client has gone.
    reads: FuturesUnordered<BoxFuture<'static, Finished>>,
    /// Requests that do: always finished.
    changes: FuturesUnordered<BoxFuture<'static, Finished>>,
    /// Requests that have been run and not been answered yet. They count as running.
    finished: VecDeque<Finished>,

    output: Output,
    /// The socket took less than it was offered: more replies may pile up before it is tried again.
    output_blocked: bool,
    /// What of the budget comes back when the output has been sent up to a position.
    owed: VecDeque<(u64, u64)>,
    end: Option<End>,
}

impl Transmission {
    /// A session that has been negotiated; `input` is what came behind the handshake.
    pub(super) fn new(
        peer: Peer,
        session: Session,
        name: String,
        export: Arc<dyn Export>,
        input: BytesMut,
        share: Share,
        max_requests: usize,
    ) -> Transmission {
        Transmission {
            peer,
            name,
            session,
            export,
            max_requests,
            share,
            input,
            intake: Intake::Header,
            job: None,
            jobs_out: 0,
            may_run_here: true,
            is_followed: false,
            input_step_bytes: INPUT_BYTES,
            short_requests: SHORT_REQUESTS,
            spare_payloads: Vec::new(),
            pipes: Pipes::default(),
            reads: FuturesUnordered::new(),
            changes: FuturesUnordered::new(),
            finished: VecDeque::new(),
            output: Output::default(),
            output_blocked: false,
            owed: VecDeque::new(),
            end: None,
        }
    }

    /// What is served.
    pub(super) fn export(&self) -> &Arc<dyn Export> {
        &self.export
    }

    /// Says in the log that the client is here.
    pub(super) fn log_begin(&self) {
        tracing::debug!(peer = %self.peer, export = %self.name, style = ?self.session.style, "nbd client connected");
    }

    /// Says in the log how it ended; whether the client can still be told that it did.
    pub(super) fn log_end(&self) -> bool {
        match &self.end {
            Some(End::Fault(fault)) => {
                tracing::warn!(peer = %self.peer, export = %self.name, "nbd client dropped: {fault}");
            }
            Some(End::Withdrawn) => {
                tracing::info!(peer = %self.peer, export = %self.name, "nbd client hung up on: its volume is gone from here");
            }
            end => tracing::debug!(peer = %self.peer, export = %self.name, ?end, "nbd client left"),
        }
        !self.is_broken()
    }

    /// Takes no more requests because the server is being shut down.
    ///
    /// "On a server shutdown, the server SHOULD wait for inflight requests to be serviced prior to initiating a hard
    /// disconnect." Requests that were not read from the socket yet are not answered with NBD_ESHUTDOWN: the guest
    /// would see an I/O error, where a client that reconnects just sends them again.
    pub(super) fn shut_down(&mut self) {
        self.finish(End::Shutdown);
    }

    /// What is served is gone, and its client hung up on: nothing is answered any more. What changes the export is still finished.
    pub(super) fn withdraw(&mut self) {
        self.abandon(End::Withdrawn);
    }

    /// Whether from now on [`Turn::Run`] may come.
    pub(super) fn set_may_run_here(&mut self, may_run_here: bool) {
        self.may_run_here = may_run_here;
    }

    /// Moves what can be moved.
    pub(super) fn poll(&mut self, socket: &mut Socket, cx: &mut Context<'_>) -> Turn {
        loop {
            let finished = self.poll_finished(cx);
            // Requests first: replies to all that are at hand leave together.
            let taken = self.poll_input(socket, cx);
            if let Some(job) = self.job.take() {
                self.jobs_out += 1;
                return Turn::Run(job);
            }
            let sent = self.poll_output(socket, cx);
            let busy = !self.is_quiet() || self.output.waiting_bytes() > 0;
            if self.end.is_some() && !busy {
                return Turn::Done;
            }
            if !(finished || sent || taken) {
                return Turn::Wait { is_idle: !busy && matches!(self.intake, Intake::Header) };
            }
        }
    }

    /// A job has been run.
    pub(super) fn job_done(&mut self, job: Job, result: Option<Result<(), NbdErrno>>) {
        self.jobs_out -= 1;
        let Job { request, work, taken_bytes } = job;
        let mut payload = match work {
            Work::Copied(payload) => payload,
            Work::ReadPiped(pipe) => return self.piped_read_done(request, pipe, result.is_some()),
            Work::WritePiped(pipe) => return self.piped_write_done(request, pipe, result),
        };
        let Some(result) = result else {
            // A read goes on with a buffer of the export's own.
            let payload = matches!(request.command, Command::Write { .. }).then(|| payload.freeze());
            return self.start(request, taken_bytes, payload, None);
        };
        if self.is_broken() {
            return self.share.give_back(taken_bytes);
        }
        match (result, request.command) {
            (Err(errno), _) => self.reply_failure(request, errno),
            (Ok(()), Command::Read { .. }) => {
                self.reply_data(request, &ReadData::One(payload.freeze()));
                // The data is counted until it is sent.
                self.owed.push_back((self.output.queued_bytes(), taken_bytes));
                return self.settle();
            }
            (Ok(()), _) => self.output.put(self.session.style.done(request.tag).as_slice()),
        }
        // Parts of the input buffer are not worth keeping.
        if payload.len() > SMALL_PAYLOAD_BYTES && self.spare_payloads.len() < SPARE_PAYLOADS {
            payload.clear();
            self.spare_payloads.push(payload);
        }
        self.share.give_back(taken_bytes);
    }

    /// Whether a job is being run on another thread than the one that asks.
    pub(super) fn has_jobs_out(&self) -> bool {
        self.jobs_out > 0
    }

    /// Where input goes that is read past [`Transmission::poll`], and how much of it at once.
    pub(super) fn input_buffer(&mut self) -> (&mut BytesMut, usize) {
        self.input.reserve(self.input_step_bytes);
        (&mut self.input, self.input_step_bytes)
    }

    /// Takes no more requests; what was read of an unfinished one is forgotten.
    fn finish(&mut self, end: End) {
        if self.end.is_none() {
            self.end = Some(end);
        }
        self.intake = Intake::Header;
        self.input = BytesMut::new();
    }

    /// The client has gone: nobody waits for data any more. What changes the export is still finished, but not told.
    fn give_up(&mut self, error: &std::io::Error) {
        self.abandon(End::Broken(error.kind()));
    }

    fn abandon(&mut self, end: End) {
        self.finish(end.clone());
        self.end = Some(end);
        self.reads.clear();
        self.output.discard();
        self.settle();
    }

    // Replies.

    /// Turns requests that have been run into replies.
    fn poll_finished(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        // Futures are polled whether or not their replies can be sent: one that is left alone in the middle of its work may hold
        // what the requests of others wait for.
        loop {
            let finished = match self.reads.poll_next_unpin(cx) {
                Poll::Ready(Some(finished)) => finished,
                _ => match self.changes.poll_next_unpin(cx) {
                    Poll::Ready(Some(finished)) => finished,
                    _ => break,
                },
            };
            self.finished.push_back(finished);
        }
        // Replies are made only as fast as they are taken: until then, results wait here.
        while self.output.waiting_bytes() < OUTPUT_HIGH_BYTES
            && let Some(finished) = self.finished.pop_front()
        {
            moved = true;
            self.reply(finished);
        }
        moved
    }

    fn reply(&mut self, Finished { request, taken_bytes, outcome }: Finished) {
        if !self.is_broken() {
            let tag = request.tag;
            match outcome {
                Outcome::Done(Ok(())) => self.output.put(self.session.style.done(tag).as_slice()),
                Outcome::Data(Ok(data)) => self.reply_data(request, &data),
                Outcome::Status(Ok(contexts)) => match self.session.style.status(tag, &contexts) {
                    Some(reply) => self.output.put(&reply),
                    None => self.reply_error(tag, NbdErrno::Inval, "no metadata context was selected"),
                },
                Outcome::Part(result) => self.piece_done(request, result),
                Outcome::Done(Err(errno)) | Outcome::Data(Err(errno)) | Outcome::Status(Err(errno)) => {
                    self.reply_failure(request, errno);
                }
            }
        }
        self.owed.push_back((self.output.queued_bytes(), taken_bytes));
        self.settle();
    }

    fn reply_data(&mut self, request: Request, data: &ReadData) {
        let Command::Read { offset, len_bytes, dont_fragment } = request.command else { return };
        if data.len_bytes() != u64::from(len_bytes) {
            tracing::error!(
                export = %self.name, offset, len_bytes, got = data.len_bytes(),
                "an export returned another number of bytes than it was asked for; the read fails"
            );
            return self.reply_error(request.tag, NbdErrno::Io, "the server read the wrong number of bytes");
        }
        if !dont_fragment
            && data.pieces().iter().all(|piece| is_zero(piece))
            && let Some(hole) = self.session.style.hole(request.tag, offset, len_bytes)
        {
            return self.output.put(hole.as_slice());
        }
        self.output.put(self.session.style.data(request.tag, offset, len_bytes).as_slice());
        for piece in data.pieces() {
            self.output.put_shared(piece);
        }
    }

    fn reply_failure(&mut self, request: Request, errno: NbdErrno) {
        let errno = request.command.error_to_send(errno);
        self.reply_error(request.tag, errno, &errno.to_string());
    }

    fn reply_error(&mut self, tag: Tag, errno: NbdErrno, message: &str) {
        self.output.put(&self.session.style.error(tag, errno, message));
    }

    fn poll_output(&mut self, socket: &mut Socket, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        self.output_blocked = false;
        while self.output.waiting_bytes() > 0 {
            if let Some(pipe) = self.output.next_pipe() {
                match socket.poll_write_from(cx, pipe) {
                    Poll::Pending => {
                        self.output_blocked = true;
                        break;
                    }
                    Poll::Ready(Ok(len)) if len > 0 => {
                        self.output.sent_piped(len);
                        moved = true;
                    }
                    Poll::Ready(Ok(_)) => {
                        self.give_up(&std::io::ErrorKind::WriteZero.into());
                        return true;
                    }
                    Poll::Ready(Err(error)) => {
                        self.give_up(&error);
                        return true;
                    }
                }
                continue;
            }
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = self.output.slices(&mut slices);
            match socket.poll_write(cx, &slices[..count]) {
                Poll::Pending => {
                    self.output_blocked = true;
                    break;
                }
                Poll::Ready(Ok(0)) => {
                    self.give_up(&std::io::ErrorKind::WriteZero.into());
                    return true;
                }
                Poll::Ready(Ok(len)) => {
                    self.output.sent(len);
                    moved = true;
                }
                Poll::Ready(Err(error)) => {
                    self.give_up(&error);
                    return true;
                }
            }
        }
        if moved {
            self.settle();
        }
        moved
    }

    /// Gives back what requests took whose replies have been sent.
    fn settle(&mut self) {
        while let Some(&(position, bytes)) = self.owed.front() {
            if position > self.output.sent_bytes() {
                break;
            }
            self.owed.pop_front();
            self.share.give_back(bytes);
        }
    }

    // Requests.

    /// Takes requests until the input is used up, replies should be sent first, or something has to be waited for.
    fn poll_input(&mut self, socket: &mut Socket, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while self.end.is_none() && self.job.is_none() {
            if matches!(self.intake, Intake::Header) {
                let running = self.reads.len() + self.changes.len() + self.finished.len() + self.jobs_out;
                // Whatever makes room here wakes this task: it is polled for in `poll_finished` and `poll_output`.
                if running >= self.max_requests
                    || self.output.waiting_bytes() >= OUTPUT_HIGH_BYTES
                    || self.is_piped_full()
                {
                    return moved;
                }
                if self.output.waiting_bytes() >= FLUSH_BYTES && !self.output_blocked {
                    return true;
                }
            }
            match self.poll_step(cx) {
                Poll::Ready(true) => moved = true,
                // More input is needed: first send what there is.
                Poll::Ready(false) if self.output.waiting_bytes() > 0 && !self.output_blocked => return true,
                Poll::Ready(false) => match self.poll_fill(socket, cx) {
                    Poll::Ready(()) => moved = true,
                    Poll::Pending => return moved,
                },
                Poll::Pending => return moved,
            }
        }
        moved
    }

    /// One step with the input at hand; `false` when that is too little.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        match &mut self.intake {
            Intake::Header => match self.session.parse(&self.input) {
                Parsed::Incomplete => return Poll::Ready(false),
                Parsed::Fault(fault) => self.finish(End::Fault(fault)),
                Parsed::Bad(bad) => {
                    self.input.advance(self.session.header_bytes());
                    self.intake = Intake::Skip { left_bytes: bad.skip_bytes, bad };
                }
                Parsed::Request(request) => {
                    self.input.advance(self.session.header_bytes());
                    self.begin(request);
                }
            },
            Intake::Skip { left_bytes, bad } => {
                let dropped = (self.input.len() as u64).min(*left_bytes);
                self.input.advance(dropped as usize);
                *left_bytes -= dropped;
                if *left_bytes > 0 {
                    return Poll::Ready(false);
                }
                let bad = *bad;
                self.intake = Intake::Header;
                self.reply_error(bad.tag, bad.errno, bad.reason);
            }
            Intake::Budget(request) => {
                let request = *request;
                if self.share.poll_take(cost_bytes(&request.command), cx).is_ready() {
                    self.admitted(request);
                } else if self.share.is_empty()
                    && let Some(pieces) = Pieces::of(request)
                {
                    // What is missing is held by others, who may never give it back.
                    self.input_step_bytes = INPUT_BYTES;
                    self.intake = Intake::Pieces(pieces);
                } else {
                    return Poll::Pending;
                }
            }
            Intake::Pieces(_) => return self.poll_pieces(),
            Intake::Piped(_) => return Poll::Ready(self.step_piped_write()),
            Intake::Small(request) => {
                let request = *request;
                if self.input.len() < request.command.payload_bytes() as usize {
                    return Poll::Ready(false);
                }
                self.small_payload(request);
            }
            Intake::Large { payload, request } => {
                let wanted = request.command.payload_bytes() as usize;
                if payload.len() < wanted {
                    return Poll::Ready(false);
                }
                let (request, payload) = (*request, std::mem::take(payload));
                self.intake = Intake::Header;
                let large = wanted > SMALL_PAYLOAD_BYTES;
                self.input_step_bytes = if large { INPUT_AFTER_LARGE_BYTES } else { INPUT_BYTES };
                self.run_write(request, payload);
            }
        }
        Poll::Ready(true)
    }

    /// Reads more, to where it is needed.
    fn poll_fill(&mut self, socket: &mut Socket, cx: &mut Context<'_>) -> Poll<()> {
        let read = match &mut self.intake {
            Intake::Large { request, payload } => {
                let missing = request.command.payload_bytes() as usize - payload.len();
                let read = ready!(socket.poll_read(cx, payload, missing));
                self.is_followed = matches!(read, Ok(len) if len == missing) && socket.has_input();
                read
            }
            Intake::Piped(write) => {
                let missing = write.missing_bytes();
                match ready!(socket.poll_read_into(cx, &mut write.pipe, missing)) {
                    Ok(Some(len)) => Ok(len),
                    Ok(None) => {
                        self.leave_pipe();
                        return Poll::Ready(());
                    }
                    Err(error) => {
                        // If it is the socket's, the next read finds it, too.
                        tracing::debug!(%error, peer = %self.peer, "no splice for an nbd client: its longer requests are copied");
                        self.set_may_pipe(false);
                        self.leave_pipe();
                        return Poll::Ready(());
                    }
                }
            }
            intake => {
                let step = match intake {
                    Intake::Small(request) => {
                        let missing = request.command.payload_bytes() as usize - self.input.len();
                        self.input_step_bytes.max(missing)
                    }
                    Intake::Skip { .. } => INPUT_BYTES,
                    _ => self.input_step_bytes,
                };
                self.input.reserve(step);
                ready!(socket.poll_read(cx, &mut self.input, step))
            }
        };
        match read {
            Ok(0) if socket.is_abandoned(cx) => self.give_up(&std::io::ErrorKind::BrokenPipe.into()),
            Ok(0) => self.finish(End::Closed),
            Ok(_) => {}
            Err(error) => self.give_up(&error),
        }
        Poll::Ready(())
    }

    /// A request has been parsed, its header taken from the input.
    fn begin(&mut self, request: Request) {
        match request.command {
            // "The server MUST handle all outstanding requests, shut down the TLS session (if one is running), and
            // close the TCP session. A client MUST NOT send anything to the server after sending an NBD_CMD_DISC
            // command."
            Command::Disconnect => self.finish(End::Disconnected),
            Command::Read { .. } => {
                self.note_short();
                if !self.begin_piped_read(request) {
                    self.begin_copied_read(request);
                }
            }
            Command::Write { len_bytes, .. } if len_bytes as usize > SMALL_PAYLOAD_BYTES => {
                self.short_requests = 0;
                if !self.begin_piped_write(request) {
                    self.admit(request);
                }
            }
            Command::Write { .. } | Command::BlockStatusOf { .. } => {
                self.note_short();
                self.intake = Intake::Small(request);
            }
            Command::Flush if self.may_run_here && self.is_alone() => {
                self.note_short();
                self.job = Some(Job { request, work: Work::Copied(BytesMut::new()), taken_bytes: 0 });
            }
            _ => {
                self.note_short();
                self.admit(request);
            }
        }
    }

    /// A request without a long payload has come: after some of them, many are read at once again.
    fn note_short(&mut self) {
        self.short_requests = self.short_requests.saturating_add(1);
        if self.short_requests >= SHORT_REQUESTS {
            self.input_step_bytes = INPUT_BYTES;
        }
    }

    fn begin_copied_read(&mut self, request: Request) {
        let Command::Read { offset, len_bytes, dont_fragment } = request.command else { return };
        if len_bytes as usize > SYNC_MAX_BYTES || !self.read_now(request.tag, offset, len_bytes, dont_fragment) {
            self.admit(request);
        }
    }

    /// Whether the client waits for nothing else: a sync on this thread then holds up nobody.
    fn is_alone(&self) -> bool {
        self.is_quiet() && self.input.is_empty()
    }

    fn is_broken(&self) -> bool {
        matches!(self.end, Some(End::Broken(_) | End::Withdrawn))
    }

    fn is_quiet(&self) -> bool {
        self.reads.is_empty() && self.changes.is_empty() && self.finished.is_empty() && self.jobs_out == 0
    }

    /// The export's fast path, straight into the page that will be sent.
    fn read_now(&mut self, tag: Tag, offset: u64, len_bytes: u32, dont_fragment: bool) -> bool {
        let style = self.session.style;
        let (before, len) = (style.data_header_bytes(), len_bytes as usize);
        let room = self.output.room(before + len);
        match self.export.try_read_now(offset, &mut room[before..]) {
            None => return false,
            Some(Ok(())) => {
                let hole = if dont_fragment || len < 512 || !is_zero(&room[before..]) {
                    None
                } else {
                    style.hole(tag, offset, len_bytes)
                };
                let (header, with_data) = match hole {
                    Some(hole) => (hole, 0),
                    None => (style.data(tag, offset, len_bytes), len),
                };
                let header = header.as_slice();
                room[..header.len()].copy_from_slice(header);
                self.output.commit(header.len() + with_data);
            }
            Some(Err(errno)) => {
                let command = Command::Read { offset, len_bytes, dont_fragment };
                self.reply_failure(Request { tag, command }, errno);
            }
        }
        true
    }

    /// Lets a request begin as soon as the budget allows.
    fn admit(&mut self, request: Request) {
        if self.share.try_take(cost_bytes(&request.command)) {
            self.admitted(request);
        } else {
            self.intake = Intake::Budget(request);
        }
    }

    fn admitted(&mut self, request: Request) {
        self.intake = Intake::Header;
        match request.command {
            Command::Read { len_bytes, .. }
                if self.may_run_here && len_bytes as usize <= SYNC_MAX_BYTES && self.is_alone() =>
            {
                let taken_bytes = cost_bytes(&request.command);
                self.job = Some(Job { request, work: Work::Copied(BytesMut::new()), taken_bytes });
            }
            Command::Write { len_bytes, .. } => {
                let len = len_bytes as usize;
                // Only now, with its share taken, is there a buffer; and the system gives it memory as it is filled.
                let mut payload = self.spare_payloads.pop().unwrap_or_default();
                payload.reserve(len);
                let there = self.input.len().min(len);
                payload.extend_from_slice(&self.input[..there]);
                self.input.advance(there);
                self.intake = Intake::Large { request, payload };
            }
            _ => self.run_request(request, None),
        }
    }

    /// The whole payload of a short write or of a status request is in the input.
    fn small_payload(&mut self, request: Request) {
        let len = request.command.payload_bytes() as usize;
        match request.command {
            Command::Write { fua, .. } if self.may_run_here && (!fua || self.input.len() == len && self.is_quiet()) => {
                let payload = self.input.split_to(len);
                self.intake = Intake::Header;
                // Not worth waiting for, see below.
                let taken_bytes = if self.share.try_take(len as u64) { len as u64 } else { 0 };
                self.job = Some(Job { request, work: Work::Copied(payload), taken_bytes });
            }
            Command::Write { .. } => self.admit(request),
            Command::BlockStatusOf { offset, one, .. } => {
                let parsed = parse_status_payload(&self.session, offset, &self.input[..len]);
                self.input.advance(len);
                self.intake = Intake::Header;
                match parsed {
                    Ok((len_bytes, contexts)) => {
                        let command = Command::BlockStatus { offset, len_bytes, one };
                        // Not worth waiting for: the reserve of a connection is larger than all it can hold of these.
                        let taken_bytes =
                            if self.share.try_take(SMALL_REQUEST_BYTES) { SMALL_REQUEST_BYTES } else { 0 };
                        self.start(Request { tag: request.tag, command }, taken_bytes, None, Some(contexts));
                    }
                    Err((errno, reason)) => self.reply_error(request.tag, errno, reason),
                }
            }
            _ => self.intake = Intake::Header,
        }
    }

    /// The payload of a write is complete, and its share taken.
    fn run_write(&mut self, request: Request, payload: BytesMut) {
        if let Command::Write { len_bytes, fua, .. } = request.command
            && self.may_run_here
            && len_bytes as usize <= SYNC_MAX_BYTES
            // What fills the socket is better taken out of it while another thread writes.
            && !self.is_followed
            && if fua || len_bytes as usize > SMALL_PAYLOAD_BYTES { self.is_alone() } else { true }
        {
            let taken_bytes = cost_bytes(&request.command);
            self.job = Some(Job { request, work: Work::Copied(payload), taken_bytes });
            return;
        }
        self.run_request(request, Some(payload.freeze()));
    }

    /// Runs a request without waiting for its share, where waiting would hold up another.
    fn start_unshared(&mut self, request: Request, payload: Option<Bytes>) {
        let cost_bytes = cost_bytes(&request.command);
        let taken_bytes = if self.share.try_take(cost_bytes) { cost_bytes } else { 0 };
        self.start(request, taken_bytes, payload, None);
    }

    fn run_request(&mut self, request: Request, payload: Option<Bytes>) {
        self.start(request, cost_bytes(&request.command), payload, None);
    }

    fn start(
        &mut self,
        request: Request,
        taken_bytes: u64,
        payload: Option<Bytes>,
        contexts: Option<Vec<ContextIndex>>,
    ) {
        let export = Arc::clone(&self.export);
        let read_only =
            matches!(request.command, Command::Read { .. } | Command::Cache { .. } | Command::BlockStatus { .. });
        let query = matches!(request.command, Command::BlockStatus { .. }).then(|| StatusQuery {
            contexts: contexts.unwrap_or_else(|| self.session.contexts.clone()),
            size_bytes: self.session.size_bytes,
            max_extent_bytes: self.session.style.max_extent_bytes(),
        });
        let running: BoxFuture<'static, Finished> = Box::pin(async move {
            let outcome = execute(&*export, request.command, payload, query).await;
            Finished { request, taken_bytes, outcome }
        });
        if read_only { self.reads.push(running) } else { self.changes.push(running) }
    }
}
