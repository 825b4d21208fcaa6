//! A client's parser of replies that takes nothing for granted: whatever the protocol forbids panics. Must not know how
//! replies are made.

use std::collections::HashMap;

use crate::core::nbd::wire::{chunk, cmd};
use crate::core::nbd::{MAX_EXTENTS, MAX_PAYLOAD_BYTES, MAX_STRING_BYTES, NbdErrno, ReplyStyle};

/// What was asked.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) kind: u16,
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
    pub(crate) dont_fragment: bool,
    pub(crate) one: bool,
    /// The ids that a BLOCK_STATUS has to be answered for.
    pub(crate) contexts: Vec<u32>,
}

/// A whole reply.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) errno: Option<NbdErrno>,
    pub(crate) data: Vec<u8>,
    /// Extents by context: lengths and flags.
    pub(crate) status: Vec<(u32, Vec<(u64, u32)>)>,
}

struct Open {
    asked: Asked,
    answer: Answer,
    /// Which bytes of a READ have come; as long as its data from the first of them on.
    covered: Vec<bool>,
    content_chunks: usize,
}

/// One connection's replies.
pub(crate) struct Answers {
    style: ReplyStyle,
    size_bytes: u64,
    open: HashMap<u64, Open>,
}

impl Answers {
    pub(crate) fn new(style: ReplyStyle, size_bytes: u64) -> Answers {
        Answers { style, size_bytes, open: HashMap::new() }
    }

    /// How many requests are unanswered.
    pub(crate) fn open(&self) -> usize {
        self.open.len()
    }

    /// A request is sent; its cookie is of no other that is open.
    pub(crate) fn expect(&mut self, cookie: u64, asked: Asked) {
        let open = Open { asked, answer: Answer::default(), covered: Vec::new(), content_chunks: 0 };
        let before = self.open.insert(cookie, open);
        assert!(before.is_none(), "a cookie is used twice");
    }

    /// Takes one reply or chunk from the front of `input`: how many bytes it has, and the answer if it is whole now. None:
    /// more input is needed.
    pub(crate) fn take(&mut self, input: &[u8]) -> Option<(usize, Option<(u64, Answer)>)> {
        let magic = be(input.get(..4)?) as u32;
        match self.style {
            ReplyStyle::Simple => self.simple(magic, input),
            ReplyStyle::Structured => {
                assert_eq!(magic, 0x668e_33ef, "a structured reply");
                let header = input.get(..20)?;
                self.chunk(input, 20, be(&header[8..16]), None, be(&header[16..20]))
            }
            ReplyStyle::Extended => {
                assert_eq!(magic, 0x6e8a_278c, "an extended reply");
                let header = input.get(..32)?;
                self.chunk(input, 32, be(&header[8..16]), Some(be(&header[16..24])), be(&header[24..32]))
            }
        }
    }

    fn simple(&mut self, magic: u32, input: &[u8]) -> Option<(usize, Option<(u64, Answer)>)> {
        assert_eq!(magic, 0x6744_6698, "a simple reply");
        let header = input.get(..16)?;
        let (error, cookie) = (be(&header[4..8]) as u32, be(&header[8..16]));
        let open = self.open.get(&cookie).expect("a reply to what is open");
        let len = if error == 0 && open.asked.kind == cmd::READ { open.asked.len_bytes as usize } else { 0 };
        let data = input.get(16..16 + len)?;
        let asked = &open.asked;
        assert!(asked.kind != cmd::BLOCK_STATUS || error != 0, "BLOCK_STATUS cannot succeed by a simple reply");
        let mut answer = Answer { data: data.to_vec(), ..Answer::default() };
        if error != 0 {
            answer.errno = Some(errno(asked, error));
        }
        self.open.remove(&cookie);
        Some((16 + len, Some((cookie, answer))))
    }

    fn chunk(
        &mut self,
        input: &[u8],
        header_bytes: usize,
        cookie: u64,
        offset: Option<u64>,
        len_bytes: u64,
    ) -> Option<(usize, Option<(u64, Answer)>)> {
        assert!(len_bytes <= u64::from(MAX_PAYLOAD_BYTES) + 8, "a chunk of {len_bytes} bytes");
        let (flags, kind) = (be(&input[4..6]) as u16, be(&input[6..8]) as u16);
        let body = input.get(header_bytes..header_bytes + len_bytes as usize)?;
        let open = self.open.get_mut(&cookie).expect("a reply to what is open");
        assert!(offset.is_none_or(|offset| offset == open.asked.offset), "the offset is the request's");
        assert_eq!(flags & !chunk::FLAG_DONE, 0, "unknown flags");
        let is_last = flags & chunk::FLAG_DONE != 0;
        match kind {
            chunk::NONE => assert!(is_last && body.is_empty(), "NONE is empty and the last"),
            chunk::OFFSET_DATA => {
                assert!(body.len() > 8, "data of nothing");
                open.fill(be(&body[..8]), &body[8..]);
            }
            chunk::OFFSET_HOLE => {
                assert_eq!(body.len(), 12);
                let len = be(&body[8..12]) as usize;
                assert!(len > 0, "a hole of nothing");
                open.fill(be(&body[..8]), &vec![0; len]);
            }
            chunk::BLOCK_STATUS => {
                assert_eq!(self.style, ReplyStyle::Structured);
                assert!(body.len() >= 12 && body.len() % 8 == 4, "{} bytes of extents", body.len());
                let extents = body[4..].chunks(8).map(|extent| (be(&extent[..4]), be(&extent[4..]) as u32)).collect();
                open.status(be(&body[..4]) as u32, extents, self.size_bytes);
            }
            chunk::BLOCK_STATUS_EXT => {
                assert_eq!(self.style, ReplyStyle::Extended);
                assert!(body.len() >= 24 && body.len() % 16 == 8, "{} bytes of extents", body.len());
                assert_eq!(be(&body[4..8]) as usize, body.len() / 16, "the number of extents");
                let extents = body[8..].chunks(16).map(|extent| {
                    assert!(extent[8..12] == [0; 4], "padding");
                    (be(&extent[..8]), be(&extent[12..]) as u32)
                });
                open.status(be(&body[..4]) as u32, extents.collect(), self.size_bytes);
            }
            chunk::ERROR => {
                assert!(body.len() >= 6, "an error of {} bytes", body.len());
                let message = &body[6..];
                assert_eq!(be(&body[4..6]) as usize, message.len());
                let message = std::str::from_utf8(message).expect("UTF-8");
                assert!(message.len() <= MAX_STRING_BYTES && !message.contains('\0'));
                assert!(open.answer.errno.is_none(), "two errors");
                open.answer.errno = Some(errno(&open.asked, be(&body[..4]) as u32));
            }
            other => panic!("a chunk of the unknown type {other}"),
        }
        let taken = header_bytes + body.len();
        if !is_last {
            return Some((taken, None));
        }
        let open = self.open.remove(&cookie).expect("it was open above");
        Some((taken, Some((cookie, open.whole()))))
    }
}

impl Open {
    fn fill(&mut self, offset: u64, bytes: &[u8]) {
        assert_eq!(self.asked.kind, cmd::READ, "data for another command than READ");
        self.content_chunks += 1;
        assert!(self.asked.len_bytes <= u64::from(MAX_PAYLOAD_BYTES), "a READ of {} bytes", self.asked.len_bytes);
        self.covered.resize(self.asked.len_bytes as usize, false);
        self.answer.data.resize(self.asked.len_bytes as usize, 0xee);
        assert!(!self.asked.dont_fragment || self.content_chunks == 1, "fragments in spite of DF");
        let at = offset.checked_sub(self.asked.offset).expect("data before the request's") as usize;
        assert!(at + bytes.len() <= self.covered.len(), "data beyond the request's");
        assert!(self.covered[at..at + bytes.len()].iter().all(|covered| !covered), "bytes come twice");
        self.covered[at..at + bytes.len()].fill(true);
        self.answer.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn status(&mut self, id: u32, extents: Vec<(u64, u32)>, size_bytes: u64) {
        assert_eq!(self.asked.kind, cmd::BLOCK_STATUS, "extents for another command than BLOCK_STATUS");
        assert!(self.asked.contexts.contains(&id), "context {id} was not asked for");
        assert!(self.answer.status.iter().all(|(other, _)| *other != id), "context {id} comes twice");
        assert!(extents.len() <= MAX_EXTENTS);
        assert!(extents.iter().all(|(len, _)| *len > 0), "an extent of nothing");
        assert!(extents.windows(2).all(|pair| pair[0].1 != pair[1].1), "neighbours with the same status");
        let but_last: u64 = extents[..extents.len() - 1].iter().map(|(len, _)| len).sum();
        assert!(but_last < self.asked.len_bytes, "extents begin behind the range");
        let end = u128::from(self.asked.offset) + extents.iter().map(|(len, _)| u128::from(*len)).sum::<u128>();
        assert!(end <= u128::from(size_bytes), "an extent ends beyond the export");
        if self.asked.one {
            assert!(extents.len() == 1 && extents[0].0 <= self.asked.len_bytes, "REQ_ONE");
        }
        self.answer.status.push((id, extents));
    }

    fn whole(self) -> Answer {
        let Open { asked, mut answer, covered, .. } = self;
        if answer.errno.is_some() {
            answer.data.clear();
            return answer;
        }
        let is_read = asked.kind == cmd::READ;
        assert!(!is_read || !covered.is_empty(), "a READ succeeds without its bytes");
        assert!(covered.iter().all(|covered| *covered), "a READ succeeds without some of its bytes");
        if asked.kind == cmd::BLOCK_STATUS {
            assert_eq!(answer.status.len(), asked.contexts.len(), "a chunk for every context");
        }
        answer
    }
}

/// The error, which has to be one that the protocol has, and allows here.
fn errno(asked: &Asked, number: u32) -> NbdErrno {
    let errno = NbdErrno::from_wire(number).unwrap_or_else(|| panic!("the unknown error {number}"));
    match errno {
        NbdErrno::Overflow => assert!(asked.kind == cmd::READ && asked.dont_fragment, "EOVERFLOW is for READ with DF"),
        NbdErrno::NotSup => assert_eq!(asked.kind, cmd::WRITE_ZEROES, "ENOTSUP is for WRITE_ZEROES with FAST_ZERO"),
        _ => {}
    }
    errno
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
