//! Target `requests`: three bytes choose what was negotiated, then come requests with their payloads. Every header is
//! judged twice, by the server's parser and by [`judge`], and so are all its beginnings.

use super::input::Input;
use super::judge::{Raw, Verdict, judge, request_magic};
use crate::core::nbd::wire::{cmd, cmd_flag, transmission};
use crate::core::nbd::{
    Command, ContextIndex, Fault, NbdErrno, Parsed, REQUEST_HEADER_MAX_BYTES, ReplyStyle, Session, parse_status_payload,
};

/// See the module.
pub fn requests(data: &[u8]) {
    let mut input = Input::new(data);
    let session = negotiated(&mut input);
    let mut stream = input.rest();
    let header_bytes = session.header_bytes();
    assert!(header_bytes <= REQUEST_HEADER_MAX_BYTES);
    while !stream.is_empty() {
        let starts_right = {
            let magic = request_magic(session.style).to_be_bytes();
            let there = stream.len().min(4);
            there < 4 || stream[..there] == magic[..there]
        };
        if stream.len() < header_bytes && starts_right {
            assert_eq!(session.parse(stream), Parsed::Incomplete);
            return;
        }
        if !starts_right {
            assert!(matches!(session.parse(stream), Parsed::Fault(Fault::Magic(_))));
            return;
        }
        for cut in 0..header_bytes {
            assert_eq!(session.parse(&stream[..cut]), Parsed::Incomplete, "a beginning is not a header");
        }
        let raw = Raw::read(session.style, stream);
        let parsed = session.parse(&stream[..header_bytes]);
        assert_eq!(session.parse(stream), parsed, "what follows a header makes no difference");
        let payload_bytes = compare(&session, &raw, parsed);
        let Some(payload_bytes) = payload_bytes else { return };
        let rest = &stream[header_bytes..];
        let Some((payload, next)) = usize::try_from(payload_bytes).ok().and_then(|len| rest.split_at_checked(len))
        else {
            return;
        };
        if let Parsed::Request(request) = parsed
            && let Command::BlockStatusOf { offset, .. } = request.command
        {
            compare_status(&session, offset, payload);
        }
        stream = next;
    }
}

/// A session of any kind.
fn negotiated(input: &mut Input<'_>) -> Session {
    let style = input.one_of(&[ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended]);
    let choices = input.u8();
    let mut flags = transmission::HAS_FLAGS | transmission::SEND_FLUSH | transmission::SEND_TRIM;
    for (bit, flag) in [
        transmission::READ_ONLY,
        transmission::SEND_FUA,
        transmission::SEND_WRITE_ZEROES,
        transmission::SEND_FAST_ZERO,
        transmission::SEND_CACHE,
    ]
    .into_iter()
    .enumerate()
    {
        // Rare: most of what there is to see is behind it.
        let is_set = if flag == transmission::READ_ONLY { choices & 7 == 7 } else { choices >> bit & 1 == 1 };
        flags |= if is_set { flag } else { 0 };
    }
    if style != ReplyStyle::Simple {
        flags |= transmission::SEND_DF;
    }
    if style == ReplyStyle::Extended {
        flags |= transmission::BLOCK_STATUS_PAYLOAD;
    }
    let contexts: &[u32] = match choices >> 6 {
        _ if style == ReplyStyle::Simple => &[],
        0 => &[],
        1 => &[0],
        2 => &[0, 1],
        _ => &[7],
    };
    let size_bytes = input.one_of(&[1 << 30, 0, 1, 511, 1 << 20, (1 << 32) + 1, u64::MAX >> 1, u64::MAX]);
    Session { style, flags, size_bytes, contexts: contexts.iter().map(|id| ContextIndex(*id)).collect() }
}

/// The payload that follows, unless the connection ends.
fn compare(session: &Session, raw: &Raw, parsed: Parsed) -> Option<u64> {
    let verdict = judge(session, raw);
    match (parsed, verdict) {
        (Parsed::Fault(_), Verdict::HangUp) => None,
        (Parsed::Bad(bad), Verdict::Refuse { errno, payload_bytes }) => {
            assert_eq!((bad.errno, bad.skip_bytes), (errno, payload_bytes), "{raw:?}");
            assert_eq!((bad.tag.cookie, bad.tag.offset), (raw.cookie, raw.offset));
            assert!(!bad.reason.is_empty());
            Some(payload_bytes)
        }
        (Parsed::Request(request), verdict) => {
            assert_eq!((request.tag.cookie, request.tag.offset), (raw.cookie, raw.offset));
            if verdict == Verdict::Leave {
                assert_eq!(request.command, Command::Disconnect);
                return None;
            }
            let Verdict::Serve { payload_bytes } = verdict else { panic!("{request:?} is served, not {verdict:?}") };
            assert_eq!(u64::from(request.command.payload_bytes()), payload_bytes);
            compare_command(raw, request.command);
            Some(payload_bytes)
        }
        (parsed, verdict) => panic!("{raw:?}: {parsed:?}, not {verdict:?}"),
    }
}

fn compare_command(raw: &Raw, command: Command) {
    let flag = |bit: u16| raw.flags & bit != 0;
    let range = (raw.offset, raw.len_bytes);
    match (raw.kind, command) {
        (cmd::READ, Command::Read { offset, len_bytes, dont_fragment }) => {
            assert_eq!(((offset, u64::from(len_bytes)), dont_fragment), (range, flag(cmd_flag::DF)));
        }
        (cmd::WRITE, Command::Write { offset, len_bytes, fua }) => {
            assert_eq!(((offset, u64::from(len_bytes)), fua), (range, flag(cmd_flag::FUA)));
        }
        (cmd::FLUSH, Command::Flush) => {}
        (cmd::TRIM, Command::Trim { offset, len_bytes, fua }) => {
            assert_eq!(((offset, len_bytes), fua), (range, flag(cmd_flag::FUA)));
        }
        (cmd::CACHE, Command::Cache { offset, len_bytes }) => assert_eq!((offset, len_bytes), range),
        (cmd::WRITE_ZEROES, Command::WriteZeroes { offset, len_bytes, flags, fua }) => {
            assert_eq!(((offset, len_bytes), fua), (range, flag(cmd_flag::FUA)));
            assert_eq!((flags.may_punch, flags.fast), (!flag(cmd_flag::NO_HOLE), flag(cmd_flag::FAST_ZERO)));
        }
        (cmd::BLOCK_STATUS, Command::BlockStatus { offset, len_bytes, one }) => {
            assert_eq!(((offset, len_bytes), one), (range, flag(cmd_flag::REQ_ONE)));
        }
        (cmd::BLOCK_STATUS, Command::BlockStatusOf { offset, payload_bytes, one }) => {
            assert_eq!(((offset, u64::from(payload_bytes)), one), (range, flag(cmd_flag::REQ_ONE)));
            assert!(flag(cmd_flag::PAYLOAD_LEN));
        }
        (kind, command) => panic!("command {kind} is taken for {command:?}"),
    }
}

/// "duplicate or unknown metacontext ids" are EINVAL, and so is a range that does not fit.
fn compare_status(session: &Session, offset: u64, payload: &[u8]) {
    let (len_bytes, ids) = payload.split_first_chunk::<8>().expect("12 bytes or more");
    let len_bytes = u64::from_be_bytes(*len_bytes);
    let ids: Vec<u32> = ids.as_chunks::<4>().0.iter().map(|id| u32::from_be_bytes(*id)).collect();
    let is_good = len_bytes > 0
        && u128::from(offset) + u128::from(len_bytes) <= u128::from(session.size_bytes)
        && ids.iter().all(|id| session.contexts.iter().any(|context| context.0 == *id))
        && ids.iter().enumerate().all(|(at, id)| !ids[..at].contains(id));
    match parse_status_payload(session, offset, payload) {
        Ok((len, contexts)) => {
            assert!(is_good);
            assert_eq!(len, len_bytes);
            assert_eq!(contexts.iter().map(|context| context.0).collect::<Vec<_>>(), ids);
        }
        Err((errno, _)) => {
            assert!(!is_good);
            assert_eq!(errno, NbdErrno::Inval);
        }
    }
}
