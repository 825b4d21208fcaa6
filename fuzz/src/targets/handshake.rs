//! Target `handshake`: two bytes of choices, then what a client sends. Played in pieces and as a whole, with an
//! operator's exports that are as strange as an operator can make them.

use bytes::BytesMut;

use super::input::{Input, pieces};
use crate::core::nbd::wire::{handshake as flag, info, opt, rep, transmission};
use crate::core::nbd::{
    ExportFacts, MAX_OPTION_BYTES, MAX_STRING_BYTES, Negotiation, Refusal, ReplyStyle, Session, Step,
};

/// See the module.
pub fn handshake(data: &[u8]) {
    let mut input = Input::new(data);
    let (cuts, site) = (input.u8(), input.u8());
    let stream = input.rest();
    let whole = play(stream, 0, site);
    assert_eq!(play(stream, cuts, site), whole, "how the stream is cut makes a difference");
    judge(stream, site, &whole);
}

#[derive(Debug, PartialEq)]
struct Played {
    output: Vec<u8>,
    /// None: more input is wanted.
    end: Option<Step>,
    /// How much of the stream was taken.
    taken: usize,
}

fn play(stream: &[u8], cuts: u8, site: u8) -> Played {
    let (mut machine, mut buffer, mut output) = (Negotiation::new(), BytesMut::new(), BytesMut::new());
    let (mut at, mut piece) = (0, pieces(cuts));
    loop {
        let before = output.len();
        match machine.step(&mut buffer, &mut output) {
            Step::NeedInput => {
                assert!(cuts == 0 || buffer.len() <= MAX_OPTION_BYTES + 16, "{} bytes are kept", buffer.len());
                if at == stream.len() {
                    return Played { output: output.to_vec(), end: None, taken: at - buffer.len() };
                }
                let end = at + piece().min(stream.len() - at);
                buffer.extend_from_slice(&stream[at..end]);
                at = end;
            }
            Step::AskNames => {
                out_of_turn(&mut machine, &mut output, site, true);
                machine.answer_names(&names(site), &mut output);
            }
            Step::AskExport(name) => {
                out_of_turn(&mut machine, &mut output, site, false);
                let found = look_up(&name, site);
                machine.answer_export(found.as_ref().map_err(Clone::clone), &mut output);
                assert!(output.len() - before < 64 << 10, "{} bytes answer one option", output.len() - before);
            }
            end => {
                out_of_turn(&mut machine, &mut output, site, true);
                out_of_turn(&mut machine, &mut output, site, false);
                assert_eq!(machine.step(&mut buffer, &mut output), end, "an end is one for good");
                return Played { output: output.to_vec(), end: Some(end), taken: at - buffer.len() };
            }
        }
    }
}

/// An answer to the question that was not asked changes nothing.
fn out_of_turn(machine: &mut Negotiation, output: &mut BytesMut, site: u8, is_export: bool) {
    let before = output.len();
    if is_export {
        machine.answer_export(Err(Refusal::Shutdown), output);
    } else {
        machine.answer_names(&names(site), output);
    }
    assert_eq!(output.len(), before, "an answer out of turn was sent");
}

fn names(site: u8) -> Vec<String> {
    match site % 4 {
        0 => vec!["a".to_owned(), "b".to_owned()],
        1 => Vec::new(),
        2 => vec!["ü".repeat(2000); 3],
        _ => (0..300).map(|number| number.to_string()).collect(),
    }
}

fn look_up(name: &str, site: u8) -> Result<ExportFacts, Refusal> {
    match name {
        "" if site & 4 == 0 => Ok(facts("a", site)),
        "a" | "b" => Ok(facts(name, site)),
        "later" => Err(Refusal::NotNow("ä\0".repeat(3000))),
        "going" => Err(Refusal::Shutdown),
        _ => Err(Refusal::Unknown),
    }
}

fn facts(name: &str, site: u8) -> ExportFacts {
    let contexts: &[&str] = match site >> 3 & 3 {
        0 => &["base:allocation"],
        1 => &["base:allocation", "blockferry:residency"],
        2 => &[],
        _ => &["base:allocation", "x:", ":", ""],
    };
    ExportFacts {
        name: name.to_owned(),
        description: if site & 32 == 0 { "a disk".to_owned() } else { "ß\u{1f980}".repeat(3000) },
        size_bytes: if site & 64 == 0 { 1 << 30 } else { u64::MAX },
        read_only: name == "b",
        preferred_block_bytes: [4096, 0, 513, 1 << 31][usize::from(site >> 6)],
        contexts: contexts.iter().map(|context| (*context).to_owned()).collect(),
    }
}

/// One reply to an option.
struct OptionReply<'a> {
    option: u32,
    kind: u32,
    data: &'a [u8],
}

/// Walks along the options that the client sent and the replies to them.
fn judge(stream: &[u8], site: u8, played: &Played) {
    let mut sent = stream;
    let mut got = &played.output[..];
    let take_u32 = |rest: &mut &[u8]| {
        let (word, tail) = rest.split_first_chunk::<4>()?;
        *rest = tail;
        Some(u32::from_be_bytes(*word))
    };
    let Some(client_flags) = take_u32(&mut sent) else {
        assert!(played.output.is_empty() && played.end.is_none());
        return;
    };
    let known = u32::from(flag::FIXED_NEWSTYLE | flag::NO_ZEROES);
    if client_flags & !known != 0 {
        assert!(got.is_empty() && matches!(played.end, Some(Step::Close(_))), "unknown flags are answered");
        return;
    }
    let mut style = ReplyStyle::Simple;
    let mut selected: Option<(String, Vec<u32>)> = None;
    loop {
        if !b"IHAVEOPT".starts_with(&sent[..sent.len().min(8)]) {
            assert!(got.is_empty() && matches!(played.end, Some(Step::Close(_))), "garbage is answered");
            return;
        }
        if sent.len() < 16 {
            assert!(got.is_empty() && played.end.is_none(), "an incomplete option is answered");
            return;
        }
        sent = &sent[8..];
        let (Some(option), Some(len)) = (take_u32(&mut sent), take_u32(&mut sent)) else { return };
        let is_refused =
            len as usize > MAX_OPTION_BYTES || option == opt::EXPORT_NAME && len as usize > MAX_STRING_BYTES;
        if is_refused {
            assert!(got.is_empty() && matches!(played.end, Some(Step::Close(_))), "{len} bytes of data are taken");
            return;
        }
        let Some((data, tail)) = sent.split_at_checked(len as usize) else {
            assert!(got.is_empty() && played.end.is_none(), "an incomplete option is answered");
            return;
        };
        sent = tail;
        if option == opt::EXPORT_NAME {
            let found = std::str::from_utf8(data).ok().and_then(|name| look_up(name, site).ok());
            match &played.end {
                Some(Step::Enter(session)) => {
                    assert_ne!(style, ReplyStyle::Extended, "EXPORT_NAME after EXTENDED_HEADERS");
                    let facts = found.expect("there is such an export");
                    let zeroes = if client_flags & u32::from(flag::NO_ZEROES) == 0 { 124 } else { 0 };
                    assert_eq!(got.len(), 10 + zeroes);
                    assert_eq!(got[..8], facts.size_bytes.to_be_bytes());
                    assert_eq!(got[8..10], session.flags.to_be_bytes());
                    assert!(got[10..].iter().all(|byte| *byte == 0));
                    judge_session(session, style, &facts, selected.as_ref());
                }
                Some(Step::Close(_)) => {
                    assert!(got.is_empty());
                    assert!(found.is_none() || style == ReplyStyle::Extended, "an export was not served");
                }
                other => panic!("EXPORT_NAME led to {other:?}"),
            }
            return;
        }
        let replies = replies_to(option, &mut got);
        let last = replies.last().expect("one at least");
        judge_replies(&replies, names(site).len());
        let is_ack = last.kind == rep::ACK;
        match option {
            opt::ABORT => {
                assert!(is_ack && got.is_empty() && matches!(played.end, Some(Step::Close(_))));
                return;
            }
            opt::STRUCTURED_REPLY if is_ack => style = ReplyStyle::Structured,
            opt::EXTENDED_HEADERS if is_ack => style = ReplyStyle::Extended,
            opt::SET_META_CONTEXT => {
                assert!(!is_ack || style != ReplyStyle::Simple, "contexts without structured replies");
                let name = data.get(4..).and_then(|rest| {
                    let len = u32::from_be_bytes(*data.first_chunk()?) as usize;
                    std::str::from_utf8(rest.get(..len)?).ok()
                });
                let facts = name.and_then(|name| look_up(name, site).ok());
                let ids: Vec<u32> = replies[..replies.len() - 1]
                    .iter()
                    .map(|reply| u32::from_be_bytes(*reply.data.first_chunk().expect("an id")))
                    .collect();
                assert!(ids.iter().enumerate().all(|(at, id)| !ids[..at].contains(id)), "an id twice: {ids:?}");
                selected = if is_ack { facts.map(|facts| (facts.name, ids)) } else { None };
            }
            opt::GO if is_ack => {
                let Some(Step::Enter(session)) = &played.end else { panic!("GO led to {:?}", played.end) };
                assert!(got.is_empty(), "bytes behind GO");
                assert_eq!(played.taken, stream.len() - sent.len(), "requests were taken for options");
                let (size_bytes, flags) = exported(&replies);
                assert_eq!((size_bytes, flags), (session.size_bytes, session.flags));
                let name = data.get(4..data.len() - 2 - 2 * usize::from(count_of(data))).expect("a name");
                let facts = look_up(std::str::from_utf8(name).expect("text"), site).expect("an export");
                judge_session(session, style, &facts, selected.as_ref());
                return;
            }
            opt::INFO if is_ack => {
                exported(&replies);
            }
            opt::LIST
            | opt::LIST_META_CONTEXT
            | opt::STRUCTURED_REPLY
            | opt::EXTENDED_HEADERS
            | opt::INFO
            | opt::GO => {}
            _ => assert_eq!(last.kind, rep::ERR_UNSUP, "an unknown option"),
        }
    }
}

/// The number of information requests in the data of a well-formed GO.
fn count_of(data: &[u8]) -> u16 {
    let len = u32::from_be_bytes(*data.first_chunk().expect("a length")) as usize;
    u16::from_be_bytes([data[4 + len], data[5 + len]])
}

fn replies_to<'a>(option: u32, got: &mut &'a [u8]) -> Vec<OptionReply<'a>> {
    let mut replies = Vec::new();
    loop {
        let header = got.first_chunk::<20>().expect("a reply to every option");
        let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        assert_eq!(header[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        assert_eq!(word(8), option, "the reply is to another option");
        let (data, rest) = got[20..].split_at(word(16) as usize);
        *got = rest;
        let kind = word(12);
        replies.push(OptionReply { option, kind, data });
        if kind == rep::ACK || kind & rep::ERROR_BIT != 0 {
            return replies;
        }
    }
}

fn judge_replies(replies: &[OptionReply<'_>], names: usize) {
    let text = |bytes: &[u8]| {
        let text = std::str::from_utf8(bytes).expect("UTF-8");
        assert!(text.len() <= MAX_STRING_BYTES && !text.contains('\0'), "a string of {} bytes", text.len());
    };
    let mut infos = Vec::new();
    for reply in replies {
        match (reply.option, reply.kind) {
            (_, rep::ACK) => assert!(reply.data.is_empty()),
            (_, error) if error & rep::ERROR_BIT != 0 => text(reply.data),
            (opt::LIST, rep::SERVER) => {
                let len = u32::from_be_bytes(*reply.data.first_chunk().expect("a length"));
                text(&reply.data[4..4 + len as usize]);
                text(&reply.data[4 + len as usize..]);
            }
            (opt::INFO | opt::GO, rep::INFO) => {
                let kind = u16::from_be_bytes(*reply.data.first_chunk().expect("a type"));
                assert!(!infos.contains(&kind), "information {kind} twice");
                infos.push(kind);
                match kind {
                    info::EXPORT => assert_eq!(reply.data.len(), 12),
                    info::NAME | info::DESCRIPTION => text(&reply.data[2..]),
                    info::BLOCK_SIZE => {
                        let size = |at: usize| u32::from_be_bytes(*reply.data[at..].first_chunk().expect("a size"));
                        let (min, preferred, max) = (size(2), size(6), size(10));
                        assert!(reply.data.len() == 14 && min.is_power_of_two() && min <= 64 << 10);
                        assert!(preferred.is_power_of_two() && preferred >= 512.max(min) && preferred <= max);
                        assert!(max == u32::MAX || max.is_multiple_of(min));
                    }
                    other => panic!("information of the unknown type {other}"),
                }
            }
            (opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT, rep::META_CONTEXT) => text(&reply.data[4..]),
            (option, kind) => panic!("a reply of type {kind:#x} to option {option}"),
        }
    }
    assert!(replies.len() <= names.max(4) + 1);
}

fn exported(replies: &[OptionReply<'_>]) -> (u64, u16) {
    let export = replies.iter().find(|reply| reply.kind == rep::INFO && reply.data.starts_with(&[0, 0]));
    let data = export.expect("NBD_INFO_EXPORT is always sent").data;
    let size = u64::from_be_bytes(*data[2..].first_chunk().expect("a size"));
    (size, u16::from_be_bytes(*data[10..].first_chunk().expect("flags")))
}

fn judge_session(session: &Session, style: ReplyStyle, facts: &ExportFacts, selected: Option<&(String, Vec<u32>)>) {
    assert_eq!(session.style, style);
    assert_eq!(session.size_bytes, facts.size_bytes);
    let has = |flag: u16| session.flags & flag != 0;
    assert!(has(transmission::HAS_FLAGS));
    assert_eq!(has(transmission::READ_ONLY), facts.read_only);
    assert_eq!(has(transmission::SEND_DF), style != ReplyStyle::Simple);
    // "MUST NOT [...] unless extended headers and at least one metadata context were negotiated".
    let may_select = style == ReplyStyle::Extended && !session.contexts.is_empty();
    assert_eq!(has(transmission::BLOCK_STATUS_PAYLOAD), may_select);
    assert_eq!(session.flags & (1 << 4 | 1 << 9 | 7 << 13), 0, "a flag that nobody defined, or that nothing serves");
    let ids: Vec<u32> = session.contexts.iter().map(|context| context.0).collect();
    match selected {
        Some((name, selected)) if *name == facts.name => assert_eq!(ids, *selected),
        _ => assert!(ids.is_empty(), "contexts that were not selected for this export"),
    }
    assert!(ids.iter().all(|id| (*id as usize) < facts.contexts.len()));
}
