//! Longer reads and writes whose bytes go between the socket and the export's file through a pipe, uncopied. Must not know what
//! is at the ends of the pipe.
//!
//! A write begins when its payload is complete, as every other does: a client that goes away in the middle leaves no trace.
//! The pages in a pipe are the kernel's and few, so they take no share of the budget.

use bytes::BytesMut;

use super::{INPUT_AFTER_LARGE_BYTES, Intake, Job, Transmission, Work};
use crate::core::nbd::{Command, NbdErrno, Request};
use crate::pipe::{PIPE_MAX_BYTES, Pipe};

/// Shorter requests are copied: the system calls that a pipe takes cost as much.
const MIN_BYTES: usize = 32 << 10;

/// Pipes of a connection: one is sent while the next is filled.
const MAX_PIPES: usize = 2;

/// The pipes of a connection that are not in use.
#[derive(Default)]
pub(super) struct Pipes {
    /// Whether the socket takes pipes, and the system has some.
    is_allowed: bool,
    spare: Vec<Pipe>,
    /// Those in use, too.
    made: usize,
}

/// A WRITE whose payload comes into a pipe.
pub(super) struct PipedWrite {
    pub(super) request: Request,
    pub(super) pipe: Pipe,
}

impl PipedWrite {
    /// What of the payload has not come yet, in bytes.
    pub(super) fn missing_bytes(&self) -> usize {
        self.request.command.payload_bytes() as usize - self.pipe.len_bytes()
    }
}

impl Transmission {
    /// Whether requests may use pipes, which their socket has to take.
    pub(in crate::nbd) fn set_may_pipe(&mut self, may_pipe: bool) {
        self.pipes.is_allowed = may_pipe;
    }

    /// Where the rest of a payload goes, and how much it is, if that is all that is waited for.
    pub(in crate::nbd) fn pipe_input(&mut self) -> Option<(&mut Pipe, usize)> {
        let is_quiet = self.is_quiet();
        match &mut self.intake {
            Intake::Piped(write) if is_quiet => {
                let missing = write.missing_bytes();
                Some((&mut write.pipe, missing))
            }
            _ => None,
        }
    }

    /// Whether as many replies wait in pipes as may: what else is read would be copied for nothing.
    pub(super) fn is_piped_full(&self) -> bool {
        self.output.pipes() >= MAX_PIPES
    }

    /// An empty pipe for a request of this length, if it is one for that.
    fn take_pipe(&mut self, len_bytes: u32) -> Option<Pipe> {
        if !self.pipes.is_allowed || !self.may_run_here || !(MIN_BYTES..=PIPE_MAX_BYTES).contains(&(len_bytes as usize))
        {
            return None;
        }
        if let Some(pipe) = self.output.drained_pipe().or_else(|| self.pipes.spare.pop()) {
            return Some(pipe);
        }
        if self.pipes.made >= MAX_PIPES {
            return None;
        }
        match Pipe::new() {
            Ok(pipe) => {
                self.pipes.made += 1;
                Some(pipe)
            }
            Err(error) => {
                tracing::debug!(%error, peer = %self.peer, "no pipe for an nbd client: its longer requests are copied");
                self.pipes.is_allowed = false;
                None
            }
        }
    }

    /// Only a pipe with nothing in it is of further use.
    fn keep_pipe(&mut self, pipe: Pipe) {
        if pipe.is_empty() {
            self.pipes.spare.push(pipe);
        } else {
            self.pipes.made -= 1;
        }
    }

    /// Lets a read be run into a pipe, if it is one for that.
    pub(super) fn begin_piped_read(&mut self, request: Request) -> bool {
        let Command::Read { len_bytes, .. } = request.command else { return false };
        let Some(pipe) = self.take_pipe(len_bytes) else { return false };
        self.job = Some(Job { request, work: Work::ReadPiped(pipe), taken_bytes: 0 });
        true
    }

    /// A read has been run into a pipe, or was not possible so.
    pub(super) fn piped_read_done(&mut self, request: Request, pipe: Pipe, is_read: bool) {
        let Command::Read { offset, len_bytes, .. } = request.command else { return };
        if self.is_broken() {
            return;
        }
        if is_read && pipe.len_bytes() == len_bytes as usize {
            self.output.put(self.session.style.data(request.tag, offset, len_bytes).as_slice());
            return self.output.put_piped(pipe);
        }
        self.keep_pipe(pipe);
        if self.may_run_here && matches!(self.intake, Intake::Header) {
            self.begin_copied_read(request);
        } else {
            // It hung, and another thread is in the middle of the next request.
            self.start_unshared(request, None);
        }
    }

    /// Takes the payload of a write into a pipe, if it is one for that.
    pub(super) fn begin_piped_write(&mut self, request: Request) -> bool {
        let Command::Write { len_bytes, fua, .. } = request.command else { return false };
        // What is in the input has been copied already.
        let there = self.input.len();
        if fua || there > INPUT_AFTER_LARGE_BYTES || !self.export.takes_pipes() {
            return false;
        }
        let Some(mut pipe) = self.take_pipe(len_bytes) else { return false };
        if there > 0 && !matches!(pipe.put(&self.input), Ok(put) if put == there) {
            self.keep_pipe(pipe);
            return false;
        }
        self.input.clear();
        self.intake = Intake::Piped(PipedWrite { request, pipe });
        true
    }

    /// Lets a write be run whose payload is complete; `false` where it is not.
    pub(super) fn step_piped_write(&mut self) -> bool {
        match std::mem::replace(&mut self.intake, Intake::Header) {
            Intake::Piped(write) if write.missing_bytes() == 0 => {
                let PipedWrite { request, pipe } = write;
                // The next header, and nothing of the payload behind it.
                self.input_step_bytes = self.session.header_bytes();
                self.job = Some(Job { request, work: Work::WritePiped(pipe), taken_bytes: 0 });
                true
            }
            other => {
                self.intake = other;
                false
            }
        }
    }

    /// The pipe is full of pages that hold too little for the payload to have room: the rest is copied.
    pub(super) fn leave_pipe(&mut self) {
        let Intake::Piped(PipedWrite { request, mut pipe }) = std::mem::replace(&mut self.intake, Intake::Header)
        else {
            return;
        };
        if let Err(error) = pipe.take(&mut self.input) {
            return self.give_up(&error);
        }
        self.keep_pipe(pipe);
        self.input_step_bytes = INPUT_AFTER_LARGE_BYTES;
        self.intake = Intake::Budget(request);
    }

    /// A write has been run out of a pipe; None: the export would rather do it its slow way, and has taken nothing.
    pub(super) fn piped_write_done(&mut self, request: Request, mut pipe: Pipe, result: Option<Result<(), NbdErrno>>) {
        let mut payload = BytesMut::new();
        if result.is_none()
            && let Err(error) = pipe.take(&mut payload)
        {
            return self.give_up(&error);
        }
        self.keep_pipe(pipe);
        match result {
            None => self.start_unshared(request, Some(payload.freeze())),
            Some(_) if self.is_broken() => {}
            Some(Ok(())) => self.output.put(self.session.style.done(request.tag).as_slice()),
            Some(Err(errno)) => self.reply_failure(request, errno),
        }
    }
}
