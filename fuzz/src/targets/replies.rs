//! Target `replies`: replies of every kind, with whatever an export may say, encoded one after the other and taken apart
//! again by [`Answers`].

use super::answers::{Answer, Answers, Asked};
use super::input::Input;
use crate::core::nbd::wire::cmd;
use crate::core::nbd::{Command, ContextIndex, Extent, NbdErrno, ReplyStyle, Tag, ZeroFlags, fit_extents};

const SIZES: [u64; 6] = [1 << 20, 1, 4096, (1 << 32) + 512, 1 << 50, u64::MAX];

/// See the module.
pub fn replies(data: &[u8]) {
    let mut input = Input::new(data);
    let style = input.one_of(&[ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended]);
    let size_bytes = input.one_of(&SIZES);
    let mut stream = Vec::new();
    let mut answers = Answers::new(style, size_bytes);
    let mut expected = Vec::new();
    while !input.is_empty() && expected.len() < 64 {
        let cookie = u64::from(input.u8()) << 56 | expected.len() as u64;
        let (asked, answer) = reply(&mut input, style, size_bytes, cookie, &mut stream);
        answers.expect(cookie, asked);
        expected.push((cookie, answer));
    }
    let mut at = 0;
    let mut got = Vec::new();
    while at < stream.len() {
        let (taken, whole) = answers.take(&stream[at..]).expect("a whole reply");
        // A beginning of it is never taken for more than that.
        for cut in [1, 15, 19, 31, taken - 1] {
            assert!(cut >= taken || answers_none(style, size_bytes, &stream[at..at + cut]));
        }
        at += taken;
        got.extend(whole);
    }
    assert_eq!(got, expected);
    assert_eq!(answers.open(), 0);
}

/// Too short to be looked at closely: no parser may need more than the header to know that.
fn answers_none(style: ReplyStyle, size_bytes: u64, bytes: &[u8]) -> bool {
    let header = match style {
        ReplyStyle::Simple => 16,
        ReplyStyle::Structured => 20,
        ReplyStyle::Extended => 32,
    };
    bytes.len() >= header || Answers::new(style, size_bytes).take(bytes).is_none()
}

/// Appends one reply to `stream`; returns what it answers, and how it has to be understood.
fn reply(
    input: &mut Input<'_>,
    style: ReplyStyle,
    size_bytes: u64,
    cookie: u64,
    stream: &mut Vec<u8>,
) -> (Asked, Answer) {
    let offset = input.near(&[0, 4096, size_bytes / 2, size_bytes]) % size_bytes;
    let to_end = size_bytes - offset;
    let tag = Tag { cookie, offset };
    let mut asked =
        Asked { kind: cmd::FLUSH, offset, len_bytes: 0, dont_fragment: false, one: false, contexts: Vec::new() };
    let mut answer = Answer::default();
    match input.u8() % 5 {
        0 => stream.extend(style.done(tag).as_slice()),
        1 => {
            let len = to_end.min(1 + u64::from(input.u16()) % 3000) as u32;
            (asked.kind, asked.len_bytes, asked.dont_fragment) = (cmd::READ, u64::from(len), input.flag());
            let header = style.data(tag, offset, len);
            assert_eq!(header.as_slice().len(), style.data_header_bytes());
            stream.extend(header.as_slice());
            answer.data = vec![input.u8(); len as usize];
            stream.extend(&answer.data);
        }
        2 => {
            let len = to_end.min(1 + u64::from(input.u16())) as u32;
            (asked.kind, asked.len_bytes) = (cmd::READ, u64::from(len));
            answer.data = vec![0; len as usize];
            match style.hole(tag, offset, len) {
                Some(hole) => stream.extend(hole.as_slice()),
                None => {
                    stream.extend(style.data(tag, offset, len).as_slice());
                    stream.extend(&answer.data);
                }
            }
        }
        3 => failure(input, style, tag, to_end, &mut asked, &mut answer, stream),
        _ => return status(input, style, size_bytes, tag, asked, stream),
    }
    (asked, answer)
}

/// Whatever an export fails with, what is sent is allowed for the command.
fn failure(
    input: &mut Input<'_>,
    style: ReplyStyle,
    tag: Tag,
    to_end: u64,
    asked: &mut Asked,
    answer: &mut Answer,
    stream: &mut Vec<u8>,
) {
    let errno = input.one_of(&NbdErrno::ALL);
    let len_bytes = to_end.min(512);
    let flags = ZeroFlags { may_punch: input.flag(), fast: input.flag() };
    let (offset, len) = (tag.offset, len_bytes as u32);
    let (kind, command) = match input.u8() % 4 {
        0 => (cmd::READ, Command::Read { offset, len_bytes: len, dont_fragment: flags.fast }),
        1 => (cmd::WRITE, Command::Write { offset, len_bytes: len, fua: false }),
        2 => (cmd::WRITE_ZEROES, Command::WriteZeroes { offset, len_bytes, flags, fua: false }),
        _ => (cmd::BLOCK_STATUS, Command::BlockStatus { offset, len_bytes, one: flags.fast }),
    };
    (asked.kind, asked.len_bytes, asked.dont_fragment) = (kind, len_bytes, kind == cmd::READ && flags.fast);
    let sent = command.error_to_send(errno);
    let is_reserved = matches!(errno, NbdErrno::Overflow | NbdErrno::NotSup);
    assert!(sent == errno || is_reserved && sent == NbdErrno::Inval);
    assert!(sent != NbdErrno::NotSup || flags.fast, "ENOTSUP without FAST_ZERO");
    let message =
        ["", "no", "ä", "\0", "a\0b", "🦀"][usize::from(input.u8()) % 6].repeat(usize::from(input.u16()) % 5000);
    stream.extend(style.error(tag, sent, &message));
    answer.errno = Some(sent);
}

fn status(
    input: &mut Input<'_>,
    style: ReplyStyle,
    size_bytes: u64,
    tag: Tag,
    mut asked: Asked,
    stream: &mut Vec<u8>,
) -> (Asked, Answer) {
    let to_end = size_bytes - tag.offset;
    asked.kind = cmd::BLOCK_STATUS;
    asked.len_bytes = input.near(&[1, 4096, to_end, 1 << 32]).clamp(1, to_end);
    asked.one = input.flag();
    let count = 1 + u32::from(input.u8() % 3);
    let mut contexts = Vec::new();
    for id in 0..count {
        let extents: Vec<Extent> = (0..input.u8() % 12)
            .map(|_| Extent::new(input.near(&[0, 512, asked.len_bytes, to_end, u64::MAX]), u32::from(input.u8() & 3)))
            .collect();
        let max = style.max_extent_bytes();
        let fitted = fit_extents(&extents, tag.offset, asked.len_bytes, size_bytes, max, asked.one);
        judge_fit(&extents, &fitted);
        contexts.push((ContextIndex(id * 3), fitted));
    }
    asked.contexts = contexts.iter().map(|(id, _)| id.0).collect();
    let mut answer = Answer::default();
    match style.status(tag, &contexts) {
        Some(reply) => {
            stream.extend(reply);
            let plain = |extents: &[Extent]| extents.iter().map(|extent| (extent.len_bytes, extent.flags)).collect();
            answer.status = contexts.iter().map(|(id, extents)| (id.0, plain(extents))).collect();
        }
        None => {
            assert_eq!(style, ReplyStyle::Simple);
            stream.extend(style.error(tag, NbdErrno::Inval, "no"));
            answer.errno = Some(NbdErrno::Inval);
        }
    }
    (asked, answer)
}

/// Every byte that an answer speaks of has the status that the export gave it.
fn judge_fit(said: &[Extent], fitted: &[Extent]) {
    let mut said = said.iter().filter(|extent| extent.len_bytes > 0).copied();
    let mut current = said.next();
    for extent in fitted {
        let mut left = extent.len_bytes;
        while left > 0 {
            // Where the export said nothing, the status is 0.
            let Some(here) = &mut current else {
                assert_eq!(extent.flags, 0);
                break;
            };
            assert_eq!(here.flags, extent.flags);
            let step = left.min(here.len_bytes);
            (left, here.len_bytes) = (left - step, here.len_bytes - step);
            if here.len_bytes == 0 {
                current = said.next();
            }
        }
    }
}
