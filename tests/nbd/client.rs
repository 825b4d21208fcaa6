//! Requests in one line each, over the client that checks every reply. Must not know what is behind the socket.

use blockferry::core::nbd::wire::{cmd, cmd_flag};
use blockferry::core::nbd::{NbdErrno, ReplyStyle};

use crate::targets::answers::{Answer, Asked};
use crate::targets::drive::Connection;
use crate::targets::judge::{Raw, request_magic};

/// A connection and the number of its next request.
pub struct Client {
    pub connection: Connection,
    next: u64,
}

impl Client {
    pub fn new(connection: Connection) -> Client {
        Client { connection, next: 1 }
    }

    pub fn style(&self) -> ReplyStyle {
        self.connection.session.style
    }

    /// A request with the next cookie; a WRITE says that it has a payload where it can.
    pub fn raw(&mut self, kind: u16, flags: u16, offset: u64, len_bytes: u64) -> Raw {
        self.next += 1;
        let style = self.style();
        let counts_payload = style == ReplyStyle::Extended && kind == cmd::WRITE;
        let flags = flags | if counts_payload { cmd_flag::PAYLOAD_LEN } else { 0 };
        // What a cookie is made of is nobody's business but the client's.
        let cookie = self.next.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Raw { magic: request_magic(style), flags, kind, cookie, offset, len_bytes }
    }

    /// Queues it.
    pub fn submit(&mut self, raw: &Raw, payload: &[u8]) -> u64 {
        let session = &self.connection.session;
        let is_status_of = raw.kind == cmd::BLOCK_STATUS && raw.flags & cmd_flag::PAYLOAD_LEN != 0;
        let mut asked = Asked {
            kind: raw.kind,
            offset: raw.offset,
            len_bytes: raw.len_bytes,
            dont_fragment: raw.flags & cmd_flag::DF != 0,
            one: raw.flags & cmd_flag::REQ_ONE != 0,
            contexts: session.contexts.iter().map(|context| context.0).collect(),
        };
        if let Some((len, ids)) = payload.split_first_chunk::<8>().filter(|_| is_status_of) {
            asked.len_bytes = u64::from_be_bytes(*len);
            asked.contexts = ids.as_chunks().0.iter().map(|id| u32::from_be_bytes(*id)).collect();
        }
        let header = raw.bytes(session.style);
        self.connection.request(raw.cookie, &header, payload, asked);
        raw.cookie
    }

    /// One request and its answer, nothing else under way.
    pub fn call(&mut self, kind: u16, flags: u16, offset: u64, len_bytes: u64) -> Answer {
        let raw = self.raw(kind, flags, offset, len_bytes);
        self.submit(&raw, &[]);
        self.only()
    }

    fn only(&mut self) -> Answer {
        let mut answers = self.connection.drain();
        assert_eq!(answers.len(), 1);
        answers.remove(0).1
    }

    #[track_caller]
    pub fn read(&mut self, offset: u64, len_bytes: u64) -> Vec<u8> {
        let answer = self.call(cmd::READ, 0, offset, len_bytes);
        assert_eq!(answer.errno, None, "READ of {len_bytes} at {offset}");
        answer.data
    }

    pub fn try_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Option<NbdErrno> {
        let raw = self.raw(cmd::WRITE, flags, offset, data.len() as u64);
        self.submit(&raw, data);
        self.only().errno
    }

    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(self.try_write(0, offset, data), None, "WRITE of {} at {offset}", data.len());
    }

    #[track_caller]
    pub fn succeeds(&mut self, kind: u16, flags: u16, offset: u64, len_bytes: u64) {
        let answer = self.call(kind, flags, offset, len_bytes);
        assert_eq!(answer.errno, None, "command {kind} with flags {flags:#x}, {len_bytes} bytes at {offset}");
    }
}
