//! Handshakes, played against the machine alone.

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;

mod tls;

use super::wire::{IHAVEOPT, OPTION_REPLY_MAGIC, info, opt, rep, transmission};
use super::*;

fn facts(name: &str) -> ExportFacts {
    ExportFacts {
        name: name.to_owned(),
        description: "a disk".to_owned(),
        size_bytes: 1 << 30,
        read_only: name == "ro",
        preferred_block_bytes: 65536,
        contexts: vec!["base:allocation".to_owned(), "blockferry:residency".to_owned()],
    }
}

/// Exports `a` (the default) and `ro`; `later` is not ready.
fn look_up(name: &str) -> Result<ExportFacts, Refusal> {
    match name {
        "" | "a" => Ok(facts("a")),
        "ro" => Ok(facts("ro")),
        "later" => Err(Refusal::NotNow("its image is not there yet".to_owned())),
        _ => Err(Refusal::Unknown),
    }
}

/// How a handshake went.
#[derive(Debug, PartialEq)]
struct Outcome {
    output: Vec<u8>,
    end: Option<Step>,
    /// What was not taken of the input.
    rest: Vec<u8>,
}

/// Plays `input` in pieces of the given lengths, in turn.
fn play(input: &[u8], pieces: &[usize]) -> Outcome {
    play_to(&mut Negotiation::new(), input, pieces)
}

/// The same, to this machine.
fn play_to(machine: &mut Negotiation, input: &[u8], pieces: &[usize]) -> Outcome {
    let (mut buffer, mut output) = (BytesMut::new(), BytesMut::new());
    let (mut at, mut turn) = (0, 0);
    loop {
        match machine.step(&mut buffer, &mut output) {
            Step::NeedInput => {
                assert!(buffer.len() <= MAX_OPTION_BYTES + 16, "{} bytes are kept", buffer.len());
                if at == input.len() {
                    return Outcome { output: output.to_vec(), end: None, rest: buffer.to_vec() };
                }
                let piece = if pieces.is_empty() { input.len() } else { pieces[turn % pieces.len()].max(1) };
                let end = (at + piece).min(input.len());
                buffer.put_slice(&input[at..end]);
                (at, turn) = (end, turn + 1);
            }
            Step::AskNames => machine.answer_names(&["a".to_owned(), "ro".to_owned()], &mut output),
            Step::AskExport(name) => {
                let found = look_up(&name);
                machine.answer_export(found.as_ref().map_err(Clone::clone), &mut output);
            }
            end => {
                buffer.put_slice(&input[at..]);
                return Outcome { output: output.to_vec(), end: Some(end), rest: buffer.to_vec() };
            }
        }
    }
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn info_data(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend((requests.len() as u16).to_be_bytes());
    requests.iter().for_each(|request| bytes.extend(request.to_be_bytes()));
    bytes
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        bytes.extend((query.len() as u32).to_be_bytes());
        bytes.extend(query.as_bytes());
    }
    bytes
}

/// Client flags and options, played at once.
fn talk(options: &[Vec<u8>]) -> Outcome {
    let mut input = 3u32.to_be_bytes().to_vec();
    options.iter().for_each(|bytes| input.extend(bytes));
    play(&input, &[])
}

/// The replies in `output`: option, type, data.
fn replies(mut output: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut got = Vec::new();
    while !output.is_empty() {
        assert_eq!(output[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes([output[at], output[at + 1], output[at + 2], output[at + 3]]);
        let end = 20 + word(16) as usize;
        got.push((word(8), word(12), output[20..end].to_vec()));
        output = &output[end..];
    }
    got
}

/// The reply types in `output`.
fn kinds(output: &[u8]) -> Vec<u32> {
    replies(output).into_iter().map(|(_, kind, _)| kind).collect()
}

fn entered(outcome: &Outcome) -> &Session {
    match &outcome.end {
        Some(Step::Enter(session)) => session,
        other => panic!("not in transmission: {other:?}"),
    }
}

#[test]
fn the_greeting() {
    assert_eq!(&Negotiation::greeting()[..], b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn go_tells_what_was_asked_for() {
    let data = info_data("a", &[info::BLOCK_SIZE, info::NAME, 0x7777, info::DESCRIPTION]);
    let outcome = talk(&[option(opt::GO, &data), b"next".to_vec()]);
    let session = entered(&outcome);
    assert_eq!((session.style, session.size_bytes), (ReplyStyle::Simple, 1 << 30));
    assert_eq!(session.flags & transmission::SEND_DF, 0, "without structured replies");
    assert_eq!(outcome.rest, b"next", "what follows are requests");
    let mut export = vec![0, 0];
    export.extend((1u64 << 30).to_be_bytes());
    export.extend(session.flags.to_be_bytes());
    assert_eq!(
        replies(&outcome.output),
        [
            (opt::GO, rep::INFO, export),
            (opt::GO, rep::INFO, b"\0\x01a".to_vec()),
            (opt::GO, rep::INFO, b"\0\x02a disk".to_vec()),
            (opt::GO, rep::INFO, vec![0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 2, 0, 0, 0]),
            (opt::GO, rep::ACK, vec![]),
        ]
    );
}

#[test]
fn export_name_is_answered_with_or_without_zeroes() {
    for (flags, len) in [(1u32, 134), (3, 10), (0, 134), (2, 10)] {
        let mut input = flags.to_be_bytes().to_vec();
        input.extend(option(opt::EXPORT_NAME, b"a"));
        let outcome = play(&input, &[]);
        entered(&outcome);
        assert_eq!(outcome.output.len(), len);
        assert_eq!(outcome.output[..8], (1u64 << 30).to_be_bytes());
        assert!(outcome.output[10..].iter().all(|byte| *byte == 0));
    }
    let outcome = talk(&[option(opt::EXPORT_NAME, b"b")]);
    assert_eq!(outcome.end, Some(Step::Close(CloseReason::Refused("b".to_owned()))));
    assert!(outcome.output.is_empty());
}

#[test]
fn the_handshake_goes_on_after_an_error() {
    let outcome = talk(&[
        option(opt::GO, &info_data("b", &[])),
        option(opt::GO, &info_data("later", &[])),
        option(opt::STARTTLS, &[]),
        option(4711, &[1; 5000]),
        option(opt::LIST, b"data"),
        option(opt::STRUCTURED_REPLY, b"data"),
        option(opt::INFO, &info_data("a\0", &[])),
        option(opt::INFO, &[0, 0, 0, 9, b'a', 0, 0]),
        option(opt::GO, &info_data("", &[])),
    ]);
    assert_eq!(entered(&outcome).style, ReplyStyle::Simple, "what was refused is not in force");
    assert_eq!(
        kinds(&outcome.output)[..8],
        [
            rep::ERR_UNKNOWN,
            rep::ERR_POLICY,
            rep::ERR_UNSUP,
            rep::ERR_UNSUP,
            rep::ERR_INVALID,
            rep::ERR_INVALID,
            rep::ERR_INVALID,
            rep::ERR_INVALID
        ]
    );
    assert_eq!(replies(&outcome.output)[1].2, b"its image is not there yet");
}

#[test]
fn list_and_abort() {
    let outcome = talk(&[option(opt::LIST, &[]), option(opt::ABORT, b"bye"), option(opt::LIST, &[])]);
    assert_eq!(outcome.end, Some(Step::Close(CloseReason::Aborted)));
    assert_eq!(
        replies(&outcome.output),
        [
            (opt::LIST, rep::SERVER, b"\0\0\0\x01a".to_vec()),
            (opt::LIST, rep::SERVER, b"\0\0\0\x02ro".to_vec()),
            (opt::LIST, rep::ACK, vec![]),
            (opt::ABORT, rep::ACK, vec![]),
        ]
    );
}

#[test]
fn violations_close_the_connection() {
    for (input, what) in [
        (b"GET ".to_vec(), "client flags of another protocol"),
        (4u32.to_be_bytes().to_vec(), "an unknown client flag"),
        ([&3u32.to_be_bytes()[..], b"X"].concat(), "an option without its magic, from its first byte on"),
        ([&3u32.to_be_bytes()[..], &option(opt::EXPORT_NAME, &[b'a'; 4097])].concat(), "a name that is too long"),
        ([&3u32.to_be_bytes()[..], &option(opt::EXPORT_NAME, b"\xff")].concat(), "a name that is no text"),
        (
            [&3u32.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &[0, 0, 0, 7], &[0xff; 4]].concat(),
            "an option of 4 GiB, closed before its data comes",
        ),
    ] {
        let outcome = play(&input, &[]);
        assert!(matches!(outcome.end, Some(Step::Close(CloseReason::Violation(_)))), "{what}: {outcome:?}");
        assert!(outcome.output.is_empty(), "{what}");
    }
}

#[test]
fn extended_headers_take_precedence() {
    let outcome = talk(&[
        option(opt::STRUCTURED_REPLY, &[]),
        option(opt::EXTENDED_HEADERS, &[]),
        option(opt::STRUCTURED_REPLY, &[]),
        option(opt::SET_META_CONTEXT, &meta_data("ro", &["base:allocation"])),
        option(opt::GO, &info_data("ro", &[])),
    ]);
    let session = entered(&outcome);
    assert_eq!(session.style, ReplyStyle::Extended);
    for flag in [transmission::SEND_DF, transmission::BLOCK_STATUS_PAYLOAD, transmission::READ_ONLY] {
        assert_ne!(session.flags & flag, 0);
    }
    assert_eq!(kinds(&outcome.output)[..3], [rep::ACK, rep::ACK, rep::ERR_EXT_HEADER_REQD]);
    let outcome = talk(&[option(opt::EXTENDED_HEADERS, &[]), option(opt::GO, &info_data("a", &[]))]);
    let flags = entered(&outcome).flags;
    assert_eq!(flags & transmission::BLOCK_STATUS_PAYLOAD, 0, "there is no context to choose from");
    let outcome = talk(&[option(opt::EXTENDED_HEADERS, &[]), option(opt::EXPORT_NAME, b"a")]);
    assert!(matches!(outcome.end, Some(Step::Close(CloseReason::Violation(_)))));
}

#[test]
fn metadata_contexts_are_selected_for_one_export() {
    let structured = option(opt::STRUCTURED_REPLY, &[]);
    let set = |name: &str, queries: &[&str]| option(opt::SET_META_CONTEXT, &meta_data(name, queries));
    let go = |name: &str| option(opt::GO, &info_data(name, &[]));
    let contexts = |options: &[Vec<u8>]| entered(&talk(options)).contexts.clone();
    let both = ["blockferry:residency", "x-other:y", "base:allocation", "base:allocation"];

    assert_eq!(contexts(&[structured.clone(), set("a", &both), go("a")]), [ContextIndex(0), ContextIndex(1)]);
    assert_eq!(contexts(&[structured.clone(), set("a", &both[..1]), go("")]), [ContextIndex(1)], "the default export");
    assert_eq!(contexts(&[structured.clone(), set("a", &both), go("ro")]), [], "another export");
    assert_eq!(contexts(&[structured.clone(), set("a", &both), set("a", &[]), go("a")]), [], "replaced");
    assert_eq!(contexts(&[structured.clone(), set("a", &both), set("b", &both), go("a")]), [], "replaced by a failure");
    assert_eq!(contexts(&[structured.clone(), set("a", &["base:", "base:Allocation"]), go("a")]), []);
    assert_eq!(contexts(&[set("a", &both), structured.clone(), go("a")]), [], "too early");

    let list = |queries: &[&str]| {
        let outcome = talk(&[structured.clone(), option(opt::LIST_META_CONTEXT, &meta_data("a", queries))]);
        let mut got = replies(&outcome.output);
        assert_eq!(got.pop().map(|reply| reply.1), Some(rep::ACK));
        got.drain(1..).map(|reply| String::from_utf8_lossy(&reply.2[4..]).into_owned()).collect::<Vec<_>>()
    };
    assert_eq!(list(&[]), ["base:allocation", "blockferry:residency"]);
    assert_eq!(list(&["base:"]), ["base:allocation"]);
    assert_eq!(list(&["blockferry:", "base:nothing"]), ["blockferry:residency"]);
    assert_eq!(list(&["x:", "", ":", "nocolon"]), [""; 0]);
}

#[test]
fn malformed_meta_options_are_invalid() {
    let good = meta_data("a", &["base:allocation"]);
    let mut long = good.clone();
    long[9..13].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut many = good.clone();
    many[5..9].copy_from_slice(&u32::MAX.to_be_bytes());
    for data in [&good[..good.len() - 1], &[&good[..], b"x"].concat(), &long, &many, &[], &[0; 7]] {
        let outcome = talk(&[option(opt::STRUCTURED_REPLY, &[]), option(opt::SET_META_CONTEXT, data)]);
        assert_eq!(kinds(&outcome.output), [rep::ACK, rep::ERR_INVALID], "{data:?}");
    }
}

#[test]
fn answers_that_nobody_asked_for_change_nothing() {
    let (mut machine, mut output) = (Negotiation::new(), BytesMut::new());
    machine.answer_names(&["a".to_owned()], &mut output);
    machine.answer_export(Ok(&facts("a")), &mut output);
    assert!(output.is_empty());
    assert_eq!(machine.step(&mut BytesMut::new(), &mut output), Step::NeedInput);
}

/// Options of all kinds, well-formed and not.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop::sample::select(vec!["a", "", "ro", "later", "b"]);
    let query = prop::sample::select(vec!["base:allocation", "base:", "blockferry:residency", "x:y"]);
    prop_oneof![
        (name.clone(), prop::collection::vec(0u16..6, 0..4), prop::bool::ANY)
            .prop_map(|(name, asked, go)| option(if go { opt::GO } else { opt::INFO }, &info_data(name, &asked))),
        (name, prop::collection::vec(query, 0..4), 9u32..11)
            .prop_map(|(name, queries, kind)| option(kind, &meta_data(name, &queries))),
        (0u32..14, prop::collection::vec(any::<u8>(), 0..60)).prop_map(|(kind, data)| option(kind, &data)),
        (0u32..14).prop_map(|kind| option(kind, &[])),
    ]
}

proptest! {
    /// However the input is cut, the handshake goes the same way.
    #[test]
    fn cuts_make_no_difference(
        options in prop::collection::vec(any_option(), 0..8),
        pieces in prop::collection::vec(1usize..40, 1..10),
        tail: Vec<u8>,
    ) {
        let mut input = 3u32.to_be_bytes().to_vec();
        options.iter().for_each(|bytes| input.extend(bytes));
        input.extend(tail);
        prop_assert_eq!(play(&input, &pieces), play(&input, &[]));
    }

    /// Garbage neither panics nor piles up (`play` checks what is kept).
    #[test]
    fn garbage_is_bounded(
        start in prop::sample::select(vec![vec![], vec![0, 0, 0, 3], [&[0, 0, 0, 1][..], b"IHAVEOPT"].concat()]),
        garbage in prop::collection::vec(any::<u8>(), 0..5000),
        pieces in prop::collection::vec(1usize..900, 1..6),
    ) {
        play(&[start, garbage].concat(), &pieces);
    }

    /// Announced lengths are not believed.
    #[test]
    fn announced_lengths_are_not_allocated(
        kind in 0u32..14,
        len: u32,
        data in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut input = 3u32.to_be_bytes().to_vec();
        input.extend(IHAVEOPT.to_be_bytes());
        input.extend(kind.to_be_bytes());
        input.extend(len.to_be_bytes());
        input.extend(&data);
        let outcome = play(&input, &[17]);
        if len as usize > MAX_OPTION_BYTES {
            prop_assert!(matches!(outcome.end, Some(Step::Close(_))));
        }
    }
}
