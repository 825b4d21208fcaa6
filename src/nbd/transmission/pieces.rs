//! Large requests in pieces, one after the other, when others hold the memory for them: nobody who announces much and sends
//! nothing, or takes no replies, can hold up anybody else for ever. Slower than at once, and in no need of the pool.
//! Must not know how the memory is shared.

use std::task::Poll;

use bytes::Bytes;

use super::{Intake, OUTPUT_HIGH_BYTES, Transmission};
use crate::core::nbd::{Command, NbdErrno, ReplyStyle, Request};
use crate::nbd::ReadData;
use crate::nbd::execute::{Finished, Outcome};

/// The longest piece: what a connection may hold without asking is more.
const PIECE_BYTES: u32 = 128 << 10;

/// A READ or a WRITE that is run in pieces.
pub(super) struct Pieces {
    request: Request,
    len_bytes: u32,
    /// The bytes of the pieces that have been run or are being run.
    begun_bytes: u32,
    is_running: bool,
    /// What the first piece to fail said: the rest of a WRITE is taken off the stream.
    failed: Option<NbdErrno>,
}

impl Pieces {
    /// For a request that is worth it.
    pub(super) fn of(request: Request) -> Option<Pieces> {
        match request.command {
            Command::Read { len_bytes, .. } | Command::Write { len_bytes, .. } if len_bytes > PIECE_BYTES => {
                Some(Pieces { request, len_bytes, begun_bytes: 0, is_running: false, failed: None })
            }
            _ => None,
        }
    }
}

impl Transmission {
    /// Begins the next piece; `false` when the input at hand is too little for it.
    pub(super) fn poll_pieces(&mut self) -> Poll<bool> {
        let is_quiet = self.is_quiet();
        let Intake::Pieces(pieces) = &mut self.intake else { return Poll::Ready(true) };
        if pieces.is_running {
            return Poll::Pending;
        }
        let (request, at) = (pieces.request, pieces.begun_bytes);
        let len = PIECE_BYTES.min(pieces.len_bytes - at);
        let export = self.export.clone();
        match request.command {
            Command::Read { offset, .. } => {
                // No other reply may come in between, and no more is read than is taken.
                if !is_quiet || self.output.waiting_bytes() >= OUTPUT_HIGH_BYTES {
                    return Poll::Pending;
                }
                self.reads.push(Box::pin(async move {
                    let read = export.read(offset + u64::from(at), len).await;
                    Finished { request, taken_bytes: 0, outcome: Outcome::Part(read.map(Some)) }
                }));
            }
            Command::Write { .. } if len == 0 => {
                let failed = pieces.failed;
                self.intake = Intake::Header;
                match failed {
                    None => self.output.put(self.session.style.done(request.tag).as_slice()),
                    Some(errno) => self.reply_failure(request, errno),
                }
                return Poll::Ready(true);
            }
            Command::Write { offset, fua, .. } => {
                if self.input.len() < len as usize {
                    return Poll::Ready(false);
                }
                let data: Bytes = self.input.split_to(len as usize).freeze();
                if pieces.failed.is_some() {
                    pieces.begun_bytes += len;
                    return Poll::Ready(true);
                }
                self.changes.push(Box::pin(async move {
                    let written = export.write(offset + u64::from(at), data, fua).await;
                    Finished { request, taken_bytes: 0, outcome: Outcome::Part(written.map(|()| None)) }
                }));
            }
            // There are no pieces of anything else.
            _ => {
                self.intake = Intake::Header;
                return Poll::Ready(true);
            }
        }
        pieces.begun_bytes += len;
        pieces.is_running = true;
        Poll::Ready(true)
    }

    /// A piece has been run.
    pub(super) fn piece_done(&mut self, request: Request, result: Result<Option<ReadData>, NbdErrno>) {
        // Nothing more is taken from the client: the rest of its request was forgotten.
        let Intake::Pieces(pieces) = &mut self.intake else { return };
        pieces.is_running = false;
        let end = pieces.begun_bytes;
        let is_last = end == pieces.len_bytes;
        let Command::Read { offset, len_bytes, dont_fragment } = request.command else {
            pieces.failed = pieces.failed.or(result.err());
            return;
        };
        let start = (end - 1) / PIECE_BYTES * PIECE_BYTES;
        let style = self.session.style;
        let is_one_chunk = style == ReplyStyle::Simple || dont_fragment;
        let data = match result {
            Ok(Some(data)) if data.len_bytes() == u64::from(end - start) => data,
            // "If an error occurs while reading after the server has already sent out the reply header with an error field
            // set to zero (i.e., signalling no error), the server MUST immediately initiate a hard disconnect".
            _ if is_one_chunk && start > 0 => return self.give_up(&std::io::ErrorKind::InvalidData.into()),
            failed => {
                self.intake = Intake::Header;
                return self.reply_failure(request, failed.err().unwrap_or(NbdErrno::Io));
            }
        };
        if !is_one_chunk {
            self.output.put(style.part(request.tag, offset + u64::from(start), end - start).as_slice());
        } else if start == 0 {
            self.output.put(style.data(request.tag, offset, len_bytes).as_slice());
        }
        for piece in data.pieces() {
            self.output.put_shared(piece);
        }
        if is_last {
            self.intake = Intake::Header;
            if !is_one_chunk {
                self.output.put(style.done(request.tag).as_slice());
            }
        }
    }
}
