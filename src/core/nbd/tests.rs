//! Codec tests: layouts byte by byte, and properties that hold for any input.

use proptest::prelude::*;

use super::wire::{cmd, cmd_flag, transmission};
use super::*;

const SIZE_BYTES: u64 = 1 << 30;

fn session(style: ReplyStyle) -> Session {
    let mut flags = transmission::HAS_FLAGS
        | transmission::SEND_FLUSH
        | transmission::SEND_FUA
        | transmission::SEND_TRIM
        | transmission::SEND_WRITE_ZEROES
        | transmission::SEND_FAST_ZERO
        | transmission::SEND_CACHE;
    if style != ReplyStyle::Simple {
        flags |= transmission::SEND_DF;
    }
    if style == ReplyStyle::Extended {
        flags |= transmission::BLOCK_STATUS_PAYLOAD;
    }
    Session { style, flags, size_bytes: SIZE_BYTES, contexts: vec![ContextIndex(0), ContextIndex(2)] }
}

fn header(style: ReplyStyle, flags: u16, kind: u16, cookie: u64, offset: u64, len_bytes: u64) -> Vec<u8> {
    let extended = style == ReplyStyle::Extended;
    let magic = if extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    if extended {
        bytes.extend(len_bytes.to_be_bytes());
    } else {
        bytes.extend((len_bytes as u32).to_be_bytes());
    }
    bytes
}

fn parse(style: ReplyStyle, flags: u16, kind: u16, offset: u64, len_bytes: u64) -> Parsed {
    session(style).parse(&header(style, flags, kind, 7, offset, len_bytes))
}

fn errno(parsed: Parsed) -> Option<NbdErrno> {
    match parsed {
        Parsed::Bad(bad) => Some(bad.errno),
        _ => None,
    }
}

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

#[test]
fn a_compact_request_as_the_specification_draws_it() {
    let bytes = [
        0x25, 0x60, 0x95, 0x13, // magic
        0x00, 0x01, // FUA
        0x00, 0x01, // WRITE
        1, 2, 3, 4, 5, 6, 7, 8, // cookie
        0, 0, 0, 0, 0, 0, 0x10, 0, // offset
        0, 0, 2, 0, // length
    ];
    assert_eq!(
        session(ReplyStyle::Simple).parse(&bytes),
        Parsed::Request(Request {
            tag: Tag { cookie: 0x0102_0304_0506_0708, offset: 4096 },
            command: Command::Write { offset: 4096, len_bytes: 512, fua: true },
        })
    );
}

#[test]
fn an_extended_request_as_the_specification_draws_it() {
    let bytes = [
        0x21, 0xe4, 0x1c, 0x71, // magic
        0x00, 0x00, 0x00, 0x04, // TRIM
        0xff, 0, 0, 0, 0, 0, 0, 1, // cookie
        0, 0, 0, 0, 0, 0, 0, 0, // offset
        0, 0, 0, 0, 0x40, 0, 0, 0, // length
    ];
    assert_eq!(
        session(ReplyStyle::Extended).parse(&bytes),
        Parsed::Request(Request {
            tag: Tag { cookie: 0xff00_0000_0000_0001, offset: 0 },
            command: Command::Trim { offset: 0, len_bytes: SIZE_BYTES, fua: false },
        })
    );
}

#[test]
fn replies_byte_by_byte() {
    let tag = Tag { cookie: 0x0102_0304_0506_0708, offset: 0x1000 };
    let cookie = [1, 2, 3, 4, 5, 6, 7, 8];
    let cat = |parts: &[&[u8]]| parts.concat();

    assert_eq!(ReplyStyle::Simple.done(tag).as_slice(), cat(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], &cookie]));
    assert_eq!(
        ReplyStyle::Simple.error(tag, NbdErrno::NoSpc, "full"),
        cat(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28], &cookie])
    );
    assert!(ReplyStyle::Simple.hole(tag, 0x1000, 512).is_none());

    let structured = [0x66, 0x8e, 0x33, 0xef];
    assert_eq!(ReplyStyle::Structured.done(tag).as_slice(), cat(&[&structured, &[0, 1, 0, 0], &cookie, &[0, 0, 0, 0]]));
    assert_eq!(
        ReplyStyle::Structured.data(tag, 0x1000, 512).as_slice(),
        cat(&[&structured, &[0, 1, 0, 1], &cookie, &[0, 0, 2, 8], &[0, 0, 0, 0, 0, 0, 0x10, 0]])
    );
    assert_eq!(
        ReplyStyle::Structured.error(tag, NbdErrno::Inval, "no"),
        cat(&[&structured, &[0, 1, 0x80, 1], &cookie, &[0, 0, 0, 8], &[0, 0, 0, 22], &[0, 2], b"no"])
    );
    assert_eq!(
        ReplyStyle::Structured.status(
            tag,
            &[
                (ContextIndex(0), vec![Extent::new(4096, 3), Extent::new(512, 0)]),
                (ContextIndex(5), vec![Extent::new(1, 9)])
            ]
        ),
        Some(cat(&[
            &structured,
            &[0, 0, 0, 5],
            &cookie,
            &[0, 0, 0, 20],
            &[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0, 0, 0],
            &structured,
            &[0, 1, 0, 5],
            &cookie,
            &[0, 0, 0, 12],
            &[0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 9],
        ]))
    );

    let extended = [0x6e, 0x8a, 0x27, 0x8c];
    let offset = [0, 0, 0, 0, 0, 0, 0x10, 0];
    assert_eq!(
        ReplyStyle::Extended.hole(tag, 0x1000, 512).map(|header| header.as_slice().to_vec()),
        Some(cat(&[&extended, &[0, 1, 0, 2], &cookie, &offset, &[0, 0, 0, 0, 0, 0, 0, 12], &offset, &[0, 0, 2, 0]]))
    );
    assert_eq!(
        ReplyStyle::Extended.status(tag, &[(ContextIndex(1), vec![Extent::new(1 << 40, 2)])]),
        Some(cat(&[
            &extended,
            &[0, 1, 0, 6],
            &cookie,
            &offset,
            &[0, 0, 0, 0, 0, 0, 0, 24],
            &[0, 0, 0, 1, 0, 0, 0, 1],
            &[0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
        ]))
    );
    for style in STYLES {
        assert_eq!(style.data(tag, 0x1000, 1).as_slice().len(), style.data_header_bytes());
    }
}

#[test]
fn ranges_end_where_the_export_does() {
    for style in STYLES {
        let payload = if style == ReplyStyle::Extended { cmd_flag::PAYLOAD_LEN } else { 0 };
        for (kind, flags, beyond) in [
            (cmd::READ, 0, NbdErrno::Inval),
            (cmd::WRITE, payload, NbdErrno::NoSpc),
            (cmd::TRIM, 0, NbdErrno::Inval),
            (cmd::CACHE, 0, NbdErrno::Inval),
            (cmd::WRITE_ZEROES, 0, NbdErrno::NoSpc),
            (cmd::BLOCK_STATUS, 0, NbdErrno::Inval),
        ] {
            assert_eq!(errno(parse(style, flags, kind, SIZE_BYTES - 1, 1)), None, "{style:?} {kind}");
            for (offset, len_bytes) in
                [(SIZE_BYTES, 1), (SIZE_BYTES - 1, 2), (u64::MAX, 1), (u64::MAX - 511, 1024), (1 << 63, 4096)]
            {
                assert_eq!(
                    errno(parse(style, flags, kind, offset, len_bytes)),
                    Some(beyond),
                    "{style:?} {kind} {offset}"
                );
            }
            assert_eq!(errno(parse(style, flags, kind, 0, 0)), Some(NbdErrno::Inval));
        }
        assert_eq!(errno(parse(style, 0, cmd::FLUSH, 0, 0)), None);
        assert_eq!(errno(parse(style, 0, cmd::FLUSH, 0, 1)), Some(NbdErrno::Inval));
        assert_eq!(errno(parse(style, 0, cmd::TRIM, 0, SIZE_BYTES)), None, "the whole disk");
    }
}

#[test]
fn payloads_of_refused_requests_are_skipped_and_endless_ones_end_the_connection() {
    let over = u64::from(MAX_PAYLOAD_BYTES) + 1;
    let Parsed::Bad(bad) = parse(ReplyStyle::Simple, 0, cmd::WRITE, 0, u64::from(u32::MAX)) else {
        panic!("a compact write of 4 GiB is refused");
    };
    assert_eq!((bad.errno, bad.skip_bytes), (NbdErrno::Inval, u64::from(u32::MAX)));
    assert_eq!(
        parse(ReplyStyle::Extended, cmd_flag::PAYLOAD_LEN, cmd::WRITE, 0, over),
        Parsed::Fault(Fault::Payload(over))
    );
    assert_eq!(
        parse(ReplyStyle::Extended, cmd_flag::PAYLOAD_LEN, cmd::READ, 0, u64::MAX),
        Parsed::Fault(Fault::Payload(u64::MAX))
    );
    let Parsed::Bad(bad) = parse(ReplyStyle::Extended, cmd_flag::PAYLOAD_LEN, cmd::READ, 0, 4096) else {
        panic!("a read takes no payload");
    };
    assert_eq!((bad.errno, bad.skip_bytes), (NbdErrno::Inval, 4096));
    // The clients of QEMU do not set the flag.
    assert!(matches!(
        parse(ReplyStyle::Extended, 0, cmd::WRITE, 0, 4096),
        Parsed::Request(Request { command: Command::Write { len_bytes: 4096, .. }, .. })
    ));
}

#[test]
fn flags_are_taken_only_where_they_were_offered() {
    for (style, flags, kind, fails) in [
        (ReplyStyle::Simple, cmd_flag::DF, cmd::READ, true),
        (ReplyStyle::Structured, cmd_flag::DF, cmd::READ, false),
        (ReplyStyle::Structured, cmd_flag::PAYLOAD_LEN, cmd::WRITE, true),
        (ReplyStyle::Structured, cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO, cmd::WRITE_ZEROES, false),
        (ReplyStyle::Structured, cmd_flag::NO_HOLE, cmd::TRIM, true),
        (ReplyStyle::Structured, cmd_flag::REQ_ONE, cmd::BLOCK_STATUS, false),
        (ReplyStyle::Structured, cmd_flag::FUA, cmd::READ, false),
        (ReplyStyle::Structured, 1 << 15, cmd::READ, true),
        (ReplyStyle::Structured, 0, 99, true),
    ] {
        assert_eq!(errno(parse(style, flags, kind, 0, 512)).is_some(), fails, "{style:?} {flags:#x} {kind}");
    }
    let mut plain = session(ReplyStyle::Structured);
    plain.contexts.clear();
    assert_eq!(errno(plain.parse(&header(plain.style, 0, cmd::BLOCK_STATUS, 1, 0, 512))), Some(NbdErrno::Inval));
    plain.flags |= transmission::READ_ONLY;
    for kind in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
        assert_eq!(errno(plain.parse(&header(plain.style, 0, kind, 1, 0, 512))), Some(NbdErrno::Perm));
    }
}

#[test]
fn reserved_errors_are_sent_only_where_they_are_documented() {
    let zero =
        |fast| Command::WriteZeroes { offset: 0, len_bytes: 1, flags: ZeroFlags { may_punch: true, fast }, fua: false };
    let read = |dont_fragment| Command::Read { offset: 0, len_bytes: 1, dont_fragment };
    assert_eq!(zero(true).error_to_send(NbdErrno::NotSup), NbdErrno::NotSup);
    assert_eq!(zero(false).error_to_send(NbdErrno::NotSup), NbdErrno::Inval);
    assert_eq!(read(true).error_to_send(NbdErrno::Overflow), NbdErrno::Overflow);
    assert_eq!(read(false).error_to_send(NbdErrno::Overflow), NbdErrno::Inval);
    assert_eq!(Command::Flush.error_to_send(NbdErrno::Io), NbdErrno::Io);
    for errno in NbdErrno::ALL {
        assert_eq!(NbdErrno::from_wire(errno.to_wire()), Some(errno));
    }
}

#[test]
fn status_payloads() {
    let session = session(ReplyStyle::Extended);
    let payload = |len_bytes: u64, ids: &[u32]| {
        let mut bytes = len_bytes.to_be_bytes().to_vec();
        ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
        bytes
    };
    assert_eq!(parse_status_payload(&session, 0, &payload(4096, &[2])), Ok((4096, vec![ContextIndex(2)])));
    for (len_bytes, ids) in [(4096, &[1][..]), (4096, &[0, 0]), (4096, &[]), (0, &[0]), (SIZE_BYTES + 1, &[0])] {
        assert!(parse_status_payload(&session, 0, &payload(len_bytes, ids)).is_err(), "{len_bytes} {ids:?}");
    }
    for cut in 0..12 {
        assert!(parse_status_payload(&session, 0, &payload(4096, &[0])[..cut]).is_err());
    }
    for (len_bytes, fails) in [(11, true), (12, false), (13, true), (16, false), (1 << 20, true)] {
        let parsed = parse(ReplyStyle::Extended, cmd_flag::PAYLOAD_LEN, cmd::BLOCK_STATUS, 0, len_bytes);
        assert_eq!(errno(parsed).is_some(), fails, "{len_bytes}");
    }
}

#[test]
fn error_messages_are_cut_at_a_character() {
    let tag = Tag { cookie: 0, offset: 0 };
    let reply = ReplyStyle::Structured.error(tag, NbdErrno::Io, &"ä".repeat(5000));
    assert_eq!(reply.len(), 20 + 6 + MAX_STRING_BYTES);
    assert!(std::str::from_utf8(&reply[26..]).is_ok());
    assert_eq!(ReplyStyle::Structured.error(tag, NbdErrno::Io, "a\0b").len(), 27, "no NUL");
}

proptest! {
    /// Whatever comes: no panic, and what is accepted lies within the export.
    #[test]
    fn accepted_requests_lie_within_the_export(
        style in prop::sample::select(STYLES.to_vec()),
        flags in prop_oneof![0u16..64, any::<u16>()],
        kind in prop_oneof![0u16..9, any::<u16>()],
        offset in prop_oneof![0..2 * SIZE_BYTES, any::<u64>()],
        len_bytes in prop_oneof![0u64..1 << 26, 0..2 * SIZE_BYTES, any::<u64>()],
        cookie: u64,
    ) {
        let bytes = header(style, flags, kind, cookie, offset, len_bytes);
        match session(style).parse(&bytes) {
            Parsed::Incomplete => prop_assert!(false, "a whole header"),
            Parsed::Fault(_) => prop_assert!(style == ReplyStyle::Extended),
            Parsed::Bad(bad) => prop_assert_eq!(bad.tag, Tag { cookie, offset }),
            Parsed::Request(request) => {
                prop_assert_eq!(request.tag, Tag { cookie, offset });
                let range = match request.command {
                    Command::Read { offset, len_bytes, .. } | Command::Write { offset, len_bytes, .. } => {
                        prop_assert!(len_bytes <= MAX_PAYLOAD_BYTES);
                        Some((offset, u64::from(len_bytes)))
                    }
                    Command::Trim { offset, len_bytes, .. }
                    | Command::Cache { offset, len_bytes }
                    | Command::WriteZeroes { offset, len_bytes, .. }
                    | Command::BlockStatus { offset, len_bytes, .. } => Some((offset, len_bytes)),
                    Command::Disconnect | Command::Flush | Command::BlockStatusOf { .. } => None,
                };
                if let Some((offset, len_bytes)) = range {
                    prop_assert!(len_bytes > 0);
                    prop_assert!(offset.checked_add(len_bytes).is_some_and(|end| end <= SIZE_BYTES));
                }
            }
        }
    }

    /// A beginning of a header is never taken for a whole one, nor for garbage.
    #[test]
    fn garbage_and_beginnings(style in prop::sample::select(STYLES.to_vec()), bytes: Vec<u8>, cut in 0usize..32) {
        let _ = session(style).parse(&bytes);
        let whole = header(style, 0, cmd::READ, 1, 0, 512);
        let cut = cut.min(whole.len() - 1);
        prop_assert_eq!(session(style).parse(&whole[..cut]), Parsed::Incomplete);
    }

    /// Whatever an export says about its extents, the answer is one that the protocol allows.
    #[test]
    fn extents_fit(
        extents in prop::collection::vec((prop_oneof![0u64..10_000, any::<u64>()], 0u32..4), 0..40),
        offset in 0u64..100_000,
        len_bytes in 1u64..200_000,
        one: bool,
        max_len_bytes in prop_oneof![Just(512u64), Just(u64::MAX)],
    ) {
        let size_bytes = 120_000;
        let extents: Vec<Extent> = extents.into_iter().map(|(len, flags)| Extent::new(len, flags)).collect();
        let fitted = fit_extents(&extents, offset, len_bytes, size_bytes, max_len_bytes, one);
        prop_assert!(!fitted.is_empty());
        prop_assert!(!one || fitted.len() == 1 && fitted[0].len_bytes <= len_bytes);
        prop_assert!(fitted.iter().all(|extent| (1..=max_len_bytes).contains(&extent.len_bytes)));
        prop_assert!(fitted.windows(2).all(|pair| pair[0].flags != pair[1].flags));
        let sum: u64 = fitted.iter().map(|extent| extent.len_bytes).sum();
        prop_assert!(offset + sum <= size_bytes);
        let but_last = sum - fitted[fitted.len() - 1].len_bytes;
        prop_assert!(but_last < len_bytes);
        // Every byte has the status that the export gave it.
        let flags_at = |at: u64| {
            let mut end = 0u64;
            extents.iter().find(|extent| { end = end.saturating_add(extent.len_bytes); at < end }).map(|e| e.flags)
        };
        let mut at = 0;
        for extent in &fitted {
            if let Some(flags) = flags_at(at) {
                prop_assert_eq!(flags, extent.flags);
                prop_assert_eq!(flags_at(at + extent.len_bytes - 1), Some(flags));
            }
            at += extent.len_bytes;
        }
    }
}
