//! Every command with a daemon: its flags, its bounds, its errors, and what the disk holds afterwards.

use std::collections::HashMap;

use blockferry::core::nbd::wire::{cmd, cmd_flag};
use blockferry::core::nbd::{NbdErrno, ReplyStyle};

use crate::client::Client;
use crate::disk::{Rng, assert_same, noise};
use crate::kinds::{Kind, STYLES, on_both_kinds};
use crate::targets::judge::{Verdict, judge};

const KINDS: [u16; 9] =
    [cmd::READ, cmd::WRITE, cmd::FLUSH, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES, cmd::BLOCK_STATUS, 8, 0xffff];

/// Each command with each flag and at each bound: served, or refused by the protocol's own error, and the connection stays
/// in step either way.
#[test]
fn flags_and_bounds_of_every_command() {
    on_both_kinds(10, 40, |kind| {
        let size = kind.size_bytes();
        let ranges = [(4096, 512), (1, 3), (0, 0), (size, 0), (size - 512, 512), (size - 1, 1), (size - 511, 512)];
        let wild = [(size, 1), (u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 4096), (u64::MAX - 10, 11)];
        for style in STYLES {
            let mut client = Client::new(kind.connect(style, 1));
            let mut due = HashMap::new();
            for command in KINDS {
                let flags = [0, cmd_flag::FUA].into_iter().chain((1..16).map(|bit| 1 << bit));
                let by_flag = flags.flat_map(|flags| ranges[..2].iter().map(move |range| (flags, *range)));
                let by_range = ranges.iter().chain(&wild).map(|range| (0, *range));
                for (flags, (offset, len)) in by_flag.chain(by_range) {
                    let raw = client.raw(command, flags, offset, len);
                    match judge(&client.connection.session, &raw) {
                        // Selecting contexts by a payload has a check of its own.
                        Verdict::Serve { payload_bytes } if payload_bytes > 0 && command == cmd::BLOCK_STATUS => {}
                        Verdict::Serve { payload_bytes } => {
                            let payload = vec![command as u8; payload_bytes as usize];
                            due.insert(client.submit(&raw, &payload), (raw, None));
                        }
                        Verdict::Refuse { errno, payload_bytes } => {
                            // What would be a request if it were taken for one.
                            let payload = vec![0x25; payload_bytes as usize];
                            due.insert(client.submit(&raw, &payload), (raw, Some(errno)));
                        }
                        Verdict::HangUp | Verdict::Leave => unreachable!("none of these"),
                    }
                }
                for (cookie, answer) in client.connection.drain() {
                    let (raw, errno) = due.remove(&cookie).expect("it was sent");
                    // FAST_ZERO may be refused: then nothing was done.
                    let may_refuse = raw.kind == cmd::WRITE_ZEROES && raw.flags & cmd_flag::FAST_ZERO != 0;
                    let is_right = answer.errno == errno || may_refuse && answer.errno == Some(NbdErrno::NotSup);
                    assert!(is_right, "{style:?}: {raw:?} is answered by {:?}, not {errno:?}", answer.errno);
                }
                assert!(due.is_empty());
                assert_same("in step", &client.read(1 << 20, 512), &kind.bytes[1 << 20..][..512]);
            }
        }
    });
}

/// Reads and changes of every form beside a model of the disk, one after the other.
#[test]
fn what_is_written_is_read() {
    on_both_kinds(11, 60, |kind| {
        let mut model = kind.bytes.clone();
        let mut rng = Rng(11);
        let mut clients: Vec<Client> = STYLES.map(|style| Client::new(kind.connect(style, 0))).into();
        for turn in 0..240u64 {
            let client = &mut clients[rng.below(3) as usize];
            let len = [1, 511, 512, 4096, 70_000, 300_000][rng.below(6) as usize];
            let offset = rng.below(kind.size_bytes() - len);
            let offset = if rng.below(2) == 0 { offset / 512 * 512 } else { offset };
            let range = offset as usize..(offset + len) as usize;
            let fua = if rng.below(4) == 0 { cmd_flag::FUA } else { 0 };
            match rng.below(6) {
                0 | 1 => {
                    let data = noise(len as usize, turn);
                    assert_eq!(client.try_write(fua, offset, &data), None);
                    model[range].copy_from_slice(&data);
                }
                2 => {
                    let flags = fua | [0, cmd_flag::NO_HOLE][rng.below(2) as usize];
                    client.succeeds(cmd::WRITE_ZEROES, flags, offset, len);
                    model[range].fill(0);
                }
                3 => {
                    client.succeeds(cmd::TRIM, fua, offset, len);
                    // The edges may have stayed as they are; what is inside reads as one or the other.
                    let now = client.read(offset, len);
                    let is_one = now.iter().zip(&model[range.clone()]).all(|(now, was)| *now == 0 || now == was);
                    assert!(is_one, "TRIM of {len} at {offset}");
                    model[range].copy_from_slice(&now);
                }
                4 => client.succeeds(cmd::CACHE, fua, offset, len),
                _ => {
                    let flags = if client.style() == ReplyStyle::Simple { 0 } else { cmd_flag::DF };
                    let answer = client.call(cmd::READ, flags, offset, len);
                    assert_eq!(answer.errno, None);
                    assert_same("a read", &answer.data, &model[range]);
                }
            }
        }
        // On another connection than any of the writers'.
        let mut reader = Client::new(kind.connect(ReplyStyle::Structured, 0));
        reader.succeeds(cmd::FLUSH, 0, 0, 0);
        let half = kind.size_bytes() / 2;
        assert_same("the first half", &reader.read(0, half), &model[..half as usize]);
    });
}

/// Writes of several connections, acknowledged there, are flushed by one that never wrote.
#[test]
fn a_flush_covers_all_connections() {
    on_both_kinds(12, 40, |kind| {
        let mut writers: Vec<Client> = (0..6).map(|nth| Client::new(kind.connect(STYLES[nth % 3], 0))).collect();
        let mut other = Client::new(kind.connect(ReplyStyle::Simple, 0));
        for (nth, writer) in writers.iter_mut().enumerate() {
            writer.write((nth as u64) << 18, &noise(70_000, nth as u64));
        }
        other.succeeds(cmd::FLUSH, 0, 0, 0);
        for nth in 0..6 {
            assert_same("what another wrote", &other.read(nth << 18, 70_000), &noise(70_000, nth));
        }
    });
}

/// The whole disk's extents, in both lengths of descriptors: what is called zero reads as zeroes.
#[test]
fn extents_tell_the_truth() {
    on_both_kinds(13, 80, |kind| {
        for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
            let mut client = Client::new(kind.connect(style, 1));
            // Some of it is here, some of it is not.
            client.read(0, 1 << 20);
            client.succeeds(cmd::WRITE_ZEROES, 0, 1 << 19, 1 << 18);
            let mut model = kind.bytes.clone();
            model[1 << 19..][..1 << 18].fill(0);
            let (mut at, mut zeroes) = (0, 0);
            while at < kind.size_bytes() {
                let answer = client.call(cmd::BLOCK_STATUS, 0, at, kind.size_bytes() - at);
                assert_eq!(answer.errno, None);
                let [(_, extents)] = &answer.status[..] else { panic!("one context: {answer:?}") };
                for (len, flags) in extents {
                    let bytes = &model[at as usize..(at + len) as usize];
                    assert!(flags & !3 == 0, "unknown flags {flags}");
                    assert!(flags & 2 == 0 || bytes.iter().all(|byte| *byte == 0), "data at {at} is called zero");
                    zeroes += if flags & 2 == 0 { 0 } else { *len };
                    at += len;
                }
            }
            assert!(zeroes >= 1 << 18, "{zeroes} bytes are known to be zero");
            let one = client.call(cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, 1 << 19, 4096);
            assert_eq!(one.status[0].1, [(4096, 3)], "what was zeroed is a hole");
            if style == ReplyStyle::Extended {
                selected_by_payload(&mut client);
            }
        }
    });
}

fn selected_by_payload(client: &mut Client) {
    let id = client.connection.session.contexts[0].0;
    let payload = |len: u64, ids: &[u32]| {
        let mut bytes = len.to_be_bytes().to_vec();
        ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
        bytes
    };
    let size = client.connection.session.size_bytes;
    for (payload, errno) in [
        (payload(4096, &[id]), None),
        (payload(4096, &[id, id]), Some(NbdErrno::Inval)),
        (payload(4096, &[id + 77]), Some(NbdErrno::Inval)),
        (payload(0, &[id]), Some(NbdErrno::Inval)),
        (payload(size + 1, &[id]), Some(NbdErrno::Inval)),
        (payload(u64::MAX, &[id]), Some(NbdErrno::Inval)),
        (payload(4096, &[]), Some(NbdErrno::Inval)),
        (vec![0; 13], Some(NbdErrno::Inval)),
        (vec![0; 1 << 20], Some(NbdErrno::Inval)),
    ] {
        let raw = client.raw(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 512, payload.len() as u64);
        client.submit(&raw, &payload);
        let answers = client.connection.drain();
        assert_eq!(answers[0].1.errno, errno, "a payload of {} bytes", payload.len());
    }
}

/// Far more requests than are served at a time, in all forms, answered in any order.
#[test]
fn hundreds_of_requests_in_flight() {
    on_both_kinds(14, 160, |kind| {
        for style in STYLES {
            let mut client = Client::new(kind.connect(style, 1));
            let mut model = kind.bytes.clone();
            let mut due = HashMap::new();
            for nth in 0..900u64 {
                let offset = nth * 5632;
                let range = offset as usize..offset as usize + 5632;
                match nth % 9 {
                    0..4 => {
                        let raw = client.raw(cmd::READ, 0, offset, 5632);
                        due.insert(client.submit(&raw, &[]), Some(range));
                    }
                    4..6 => {
                        let data = noise(5632, nth);
                        let raw = client.raw(cmd::WRITE, 0, offset, 5632);
                        due.insert(client.submit(&raw, &data), None);
                        model[range].copy_from_slice(&data);
                    }
                    6 => {
                        let raw = client.raw(cmd::FLUSH, 0, 0, 0);
                        due.insert(client.submit(&raw, &[]), None);
                    }
                    7 => {
                        let raw = client.raw(cmd::WRITE_ZEROES, 0, offset, 5632);
                        due.insert(client.submit(&raw, &[]), None);
                        model[range].fill(0);
                    }
                    _ if style == ReplyStyle::Simple => {
                        let raw = client.raw(cmd::CACHE, 0, offset, 5632);
                        due.insert(client.submit(&raw, &[]), None);
                    }
                    _ => {
                        let raw = client.raw(cmd::BLOCK_STATUS, 0, offset, 5632);
                        due.insert(client.submit(&raw, &[]), None);
                    }
                }
            }
            for (cookie, answer) in client.connection.drain() {
                assert_eq!(answer.errno, None);
                if let Some(range) = due.remove(&cookie).expect("it was sent") {
                    assert_same("a read among hundreds", &answer.data, &kind.bytes[range]);
                }
            }
            assert_same("the disk afterwards", &client.read(0, 900 * 5632), &model[..900 * 5632]);
            // As it was, for the next form.
            client.write(0, &kind.bytes[..900 * 5632]);
        }
    });
}

/// Lengths that nobody means: an error or the end of that connection, and no memory for them.
#[test]
fn announced_lengths_are_not_believed() {
    on_both_kinds(15, 40, |kind| {
        let before = kind.peak_bytes();
        for style in STYLES {
            let mut client = Client::new(kind.connect(style, 1));
            for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES, cmd::BLOCK_STATUS] {
                for len in [(32 << 20) + 1, u64::from(u32::MAX)] {
                    let beyond = if command == cmd::WRITE_ZEROES { NbdErrno::NoSpc } else { NbdErrno::Inval };
                    assert_eq!(client.call(command, 0, 0, len).errno, Some(beyond), "{style:?} {command} {len}");
                }
            }
            // A byte too much: taken off the stream, and refused.
            if style != ReplyStyle::Extended {
                let data = vec![0x25; (32 << 20) + 1];
                assert_eq!(client.try_write(0, 0, &data), Some(NbdErrno::Inval));
            }
            assert_same("in step", &client.read(0, 512), &kind.bytes[..512]);
            // 4 GiB are announced, some of it comes, then nothing.
            let announced = client.raw(cmd::WRITE, 0, 0, u64::from(u32::MAX)).bytes(style);
            client.connection.raw(&announced);
            if style == ReplyStyle::Extended {
                assert!(client.connection.last_answers().is_empty(), "too much for a connection to go on");
            } else {
                client.connection.raw(&vec![7; 3 << 20]);
                assert!(client.connection.send());
            }
        }
        let grown = kind.peak_bytes().saturating_sub(before);
        assert!(grown < 100 << 20, "{grown} bytes for announcements of 4 GiB");
        still_as_it_was(kind);
    });
}

#[track_caller]
fn still_as_it_was(kind: &Kind) {
    let mut client = Client::new(kind.connect(ReplyStyle::Structured, 0));
    assert_same("the disk", &client.read(0, kind.size_bytes() / 2), &kind.bytes[..kind.bytes.len() / 2]);
}

/// Whoever vanishes in the middle of a payload has written nothing; whoever only closes the sending side gets all answers.
#[test]
fn clients_that_leave() {
    on_both_kinds(16, 40, |kind| {
        for style in STYLES {
            for (len, sent) in [(512, 511), (16 << 10, 1), (16 << 10, 16 << 10 >> 1), (1 << 20, 0), (8 << 20, 1 << 20)]
            {
                let mut client = Client::new(kind.connect(style, 0));
                let header = client.raw(cmd::WRITE, 0, 0, len).bytes(style);
                client.connection.raw(&header);
                client.connection.raw(&vec![0xaa; sent]);
                assert!(client.connection.send());
            }
            let mut client = Client::new(kind.connect(style, 0));
            for nth in 0..40 {
                let raw = client.raw(cmd::READ, 0, nth * 4096, 100_000);
                client.submit(&raw, &[]);
            }
            let answers = client.connection.last_answers();
            assert_eq!(answers.len(), 40, "a half-closed connection gets its answers");
            for (_, answer) in answers {
                assert_eq!(answer.errno, None);
            }
            let mut client = Client::new(kind.connect(style, 0));
            for nth in 0..10 {
                let raw = client.raw(cmd::READ, 0, nth * 4096, 4096);
                client.submit(&raw, &[]);
            }
            let disc = client.raw(cmd::DISC, 0, 0, 0).bytes(style);
            let late = client.raw(cmd::WRITE, 0, 0, 512).bytes(style);
            client.connection.raw(&[disc, late, vec![0xbb; 512]].concat());
            assert_eq!(client.connection.last_answers().len(), 10, "DISC waits for what was asked before");
        }
        still_as_it_was(kind);
    });
}
