//! The seeds of the corpus: well-formed streams of every kind for the fuzzers to spoil. Deterministic: the files under
//! `fuzz/corpus/` whose names begin with `seed-` are exactly these, which a test holds them to.

use super::Rng;
use super::judge::{Raw, request_magic};
use crate::core::nbd::ReplyStyle;
use crate::core::nbd::wire::{cmd, cmd_flag, opt};

/// A seed: target, file name, content.
pub type Seed = (&'static str, String, Vec<u8>);

/// All of them.
pub fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |target: &'static str, bytes: Vec<u8>| {
        let number = seeds.iter().filter(|(other, _, _): &&Seed| *other == target).count();
        seeds.push((target, format!("seed-{number:02}"), bytes));
    };
    handshakes(&mut |bytes| add("handshake", bytes));
    requests(&mut |bytes| add("requests", bytes));
    let mut rng = Rng(1);
    for number in 0..24usize {
        add("replies", noise(&mut rng, 40 + number * 16));
    }
    for number in 0..40usize {
        add("session", noise(&mut rng, 200 + number * 40));
    }
    for (target, document, kind) in [
        ("control", include_str!("../../../docs/wire.md"), "| control vector | bytes |"),
        ("data", include_str!("../../../docs/wire.md"), "| data vector | bytes |"),
        ("frame", include_str!("../../../docs/wire.md"), "| frame vector | bytes |"),
        ("residency", include_str!("../../../docs/formats.md"), "| residency vector | bytes |"),
    ] {
        vectors(document, kind).for_each(|bytes| add(target, bytes));
    }
    records().for_each(|row| add("records", row));
    seeds
}

/// The golden vectors of a document's table.
fn vectors<'a>(document: &'a str, heading: &'a str) -> impl Iterator<Item = Vec<u8>> + 'a {
    let rows = document.lines().skip_while(move |line| *line != heading).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|row| hex::decode(row.split('`').nth(1).expect("bytes in a row")).expect("hexadecimal"))
}

/// The rows of `docs/formats.md`, and those that version 1 wrote.
fn records() -> impl Iterator<Item = Vec<u8>> {
    let document = include_str!("../../../docs/formats.md");
    let rows = document.lines().skip_while(|line| *line != "| record vector | key | value |").skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let shown = rows.map(|row| {
        let value = row.split('`').nth_back(1).expect("a value in a row");
        hex::decode(value).unwrap_or_else(|_| value.as_bytes().to_vec())
    });
    let fixture = include_str!("../../../tests/fixtures/state-v1.jsonl").lines();
    let volumes = fixture.filter_map(|line| {
        let parts: Vec<&str> = line.split('"').collect();
        let part = |at: usize| hex::decode(parts[at]).expect("hexadecimal");
        part(3).starts_with(b"vol/").then(|| part(7))
    });
    shown.chain(volumes)
}

fn noise(rng: &mut Rng, len: usize) -> Vec<u8> {
    (0..len).map(|_| rng.next() as u8).collect()
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &option.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

fn info(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend((requests.len() as u16).to_be_bytes());
    requests.iter().for_each(|request| data.extend(request.to_be_bytes()));
    data
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query.as_bytes())));
    data
}

fn handshakes(add: &mut impl FnMut(Vec<u8>)) {
    let all = &["base:allocation", "blockferry:residency"];
    let structured = option(opt::STRUCTURED_REPLY, &[]);
    let extended = option(opt::EXTENDED_HEADERS, &[]);
    let go = option(opt::GO, &info("a", &[1, 2, 3]));
    let list = option(opt::LIST, &[]);
    let talks: &[&[&[u8]]] = &[
        &[&go],
        &[&structured, &go],
        &[&extended, &option(opt::SET_META_CONTEXT, &meta("a", all)), &go],
        &[&structured, &option(opt::SET_META_CONTEXT, &meta("b", all)), &go],
        &[&structured, &option(opt::SET_META_CONTEXT, &meta("", &["base:"])), &option(opt::GO, &info("", &[]))],
        &[&structured, &option(opt::LIST_META_CONTEXT, &meta("a", &[])), &option(opt::INFO, &info("b", &[3, 3, 9]))],
        &[&structured, &option(opt::LIST_META_CONTEXT, &meta("a", &["base:", "x:", "y"])), &go],
        &[&option(opt::EXPORT_NAME, b"a")],
        &[&extended, &option(opt::EXPORT_NAME, b"a")],
        &[&option(opt::EXPORT_NAME, b"none")],
        &[&list, &list, &option(opt::ABORT, b"bye")],
        &[&option(opt::STARTTLS, &[]), &option(99, b"what"), &go, b"\x25\x60\x95\x13"],
        &[
            &option(opt::GO, &info("later", &[])),
            &option(opt::GO, &info("going", &[])),
            &option(opt::GO, &info("no", &[])),
        ],
        &[&option(opt::LIST, b"x"), &option(opt::INFO, b"\0\0\0\x09a\0\0"), &option(opt::GO, b"\0\0\0\x01a\0\x07")],
        &[&option(opt::GO, &info(&"n".repeat(4097), &[])), &option(opt::GO, &info("\u{fffd}\0", &[]))],
        &[&option(opt::GO, &string(&[0xff, 0xfe])), b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"],
        &[&extended, &structured, &option(opt::SET_META_CONTEXT, b"\0\0\0\x01a\xff\xff\xff\xff"), &go],
        &[b"GET / HTTP/1.1\r\n\r\n"],
    ];
    for (nth, talk) in talks.iter().enumerate() {
        for (cuts, flags) in [(0u8, 3u32), (1, 1), (50, 0), (150, 3)] {
            // Which site answers changes along.
            let site = (nth * 37 + usize::from(cuts)) as u8;
            add([&[cuts, site][..], &flags.to_be_bytes(), &talk.concat()].concat());
        }
    }
}

fn requests(add: &mut impl FnMut(Vec<u8>)) {
    let kinds = [cmd::READ, cmd::WRITE, cmd::FLUSH, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES, cmd::BLOCK_STATUS, 99];
    let mut rng = Rng(2);
    for choices in 0u8..24 {
        let style_index = choices % 3;
        let style = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended][usize::from(style_index)];
        let mut bytes = vec![style_index, [0xbe, 0x7e, 0xff, 0x2a][usize::from(choices / 3 % 4)], choices / 6];
        for kind in kinds {
            let is_payload = style == ReplyStyle::Extended && (kind == cmd::WRITE || rng.below(4) == 0);
            let mut flags = [0, 0, cmd_flag::FUA, cmd_flag::DF, cmd_flag::REQ_ONE][rng.below(5)];
            flags |= if is_payload { cmd_flag::PAYLOAD_LEN } else { 0 };
            let payload = match kind {
                cmd::WRITE => noise(&mut rng, 24),
                cmd::BLOCK_STATUS if is_payload => [&512u64.to_be_bytes()[..], &[0; 4]].concat(),
                _ if is_payload => noise(&mut rng, 16),
                _ => Vec::new(),
            };
            let len_bytes = match kind {
                cmd::FLUSH if !is_payload => 0,
                _ if payload.is_empty() => [512, 1 << 20, 32 << 20, 0][rng.below(4)],
                _ => payload.len() as u64,
            };
            let offset = if kind == cmd::FLUSH { 0 } else { (rng.below(4) as u64) << 9 };
            let raw = Raw { magic: request_magic(style), flags, kind, cookie: rng.next(), offset, len_bytes };
            bytes.extend(raw.bytes(style));
            bytes.extend(payload);
        }
        let (magic, kind) = (request_magic(style), cmd::DISC);
        bytes.extend(Raw { magic, flags: 0, kind, cookie: 0, offset: 0, len_bytes: 0 }.bytes(style));
        add(bytes);
    }
}
