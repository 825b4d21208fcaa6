//! Handshakes, byte by byte, with a daemon.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::kinds::{EXPORT, Kind, on_both_kinds};
use blockferry::core::nbd::wire::{handshake, info, opt, rep};

/// Longer than any answer takes that comes at all.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client that says what it is told to say.
struct Talk(UnixStream);

impl Talk {
    /// Connected; the greeting is what it has to be.
    fn begin(kind: &Kind) -> Talk {
        let mut stream = UnixStream::connect(kind.socket()).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        assert_eq!(flags, handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        Talk(stream)
    }

    fn with_flags(kind: &Kind, flags: u32) -> Talk {
        let mut talk = Talk::begin(kind);
        talk.say(&flags.to_be_bytes());
        talk
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("sends");
    }

    fn hear(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).expect("an answer");
        bytes
    }

    /// The replies to an option: types and data, up to the final one.
    fn replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let header = self.hear(20);
            let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            assert_eq!((&header[..8], word(8)), (&0x0003_e889_0455_65a9u64.to_be_bytes()[..], option));
            let data = self.hear(word(16) as usize);
            replies.push((word(12), data));
            if word(12) == rep::ACK || word(12) & rep::ERROR_BIT != 0 {
                return replies;
            }
        }
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.say(&option_bytes(option, data));
        self.replies(option)
    }

    /// The type of the final reply.
    #[track_caller]
    fn expect(&mut self, option: u32, data: &[u8], kind: u32) {
        let replies = self.ask(option, data);
        assert_eq!(replies.last().map(|(kind, _)| *kind), Some(kind), "option {option}: {replies:x?}");
    }

    /// The server closes without another byte.
    #[track_caller]
    fn expect_end(mut self) {
        let mut rest = Vec::new();
        // With input unread it is a reset.
        match self.0.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "the connection stays open"),
        }
        assert!(rest.is_empty(), "{} bytes that nobody asked for", rest.len());
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &option.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

fn info_of(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend((requests.len() as u16).to_be_bytes());
    requests.iter().for_each(|request| data.extend(request.to_be_bytes()));
    data
}

fn meta_of(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query.as_bytes())));
    data
}

#[test]
fn every_way_into_transmission() {
    on_both_kinds(1, 20, |kind| {
        // EXPORT_NAME: size and flags, then zeroes unless they were declined. The default export is the only one.
        for (flags, zeroes) in [(3u32, 0), (1, 124), (0, 124), (2, 0)] {
            for name in [EXPORT, ""] {
                let mut talk = Talk::with_flags(kind, flags);
                talk.say(&option_bytes(opt::EXPORT_NAME, name.as_bytes()));
                let answer = talk.hear(10 + zeroes);
                assert_eq!(answer[..8], kind.size_bytes().to_be_bytes());
                assert!(answer[10..].iter().all(|byte| *byte == 0));
                assert_sector(&mut talk, kind);
            }
        }
        for name in [EXPORT, ""] {
            let mut talk = Talk::with_flags(kind, 3);
            let requests = [info::NAME, info::BLOCK_SIZE, info::DESCRIPTION, 77, info::NAME];
            let told = talk.ask(opt::INFO, &info_of(name, &requests));
            assert_eq!(talk.ask(opt::GO, &info_of(name, &requests)), told, "INFO and GO say the same");
            let of = |kind: u16| {
                let mut all =
                    told.iter().filter(|(reply, data)| *reply == rep::INFO && data[..2] == kind.to_be_bytes());
                let found = all.next().map(|(_, data)| data[2..].to_vec());
                assert!(all.next().is_none(), "information {kind} twice");
                found.unwrap_or_default()
            };
            assert_eq!(of(info::EXPORT)[..8], kind.size_bytes().to_be_bytes());
            assert_eq!(of(info::NAME), EXPORT.as_bytes());
            assert!(!of(info::DESCRIPTION).is_empty());
            let sizes: Vec<u32> =
                of(info::BLOCK_SIZE).as_chunks().0.iter().map(|size| u32::from_be_bytes(*size)).collect();
            assert_eq!((sizes[0], sizes[2]), (1, 32 << 20));
            assert!(sizes[1].is_power_of_two() && sizes[1] >= 512);
            assert_sector(&mut talk, kind);
        }
        // All at once: the requests wait behind the options.
        let mut talk = Talk::begin(kind);
        let go = option_bytes(opt::GO, &info_of(EXPORT, &[]));
        talk.say(&[&3u32.to_be_bytes()[..], &option_bytes(opt::LIST, &[]), &go, &read_sector(7)].concat());
        let names = talk.replies(opt::LIST);
        assert_eq!(names[0], (rep::SERVER, string(EXPORT.as_bytes())));
        talk.replies(opt::GO);
        assert_answer(&mut talk, kind, 7);
        // And byte by byte.
        let mut talk = Talk::begin(kind);
        for byte in [&3u32.to_be_bytes()[..], &go, &read_sector(8)].concat() {
            talk.say(&[byte]);
        }
        talk.replies(opt::GO);
        assert_answer(&mut talk, kind, 8);
        // Who says that nothing more comes still gets the answer.
        let mut talk = Talk::with_flags(kind, 3);
        talk.say(&[&go[..], &read_sector(9)].concat());
        talk.0.shutdown(Shutdown::Write).expect("shuts down");
        talk.replies(opt::GO);
        assert_answer(&mut talk, kind, 9);
        talk.expect_end();
    });
}

/// READ of the first sector, in the compact form.
fn read_sector(cookie: u64) -> Vec<u8> {
    [&0x2560_9513u32.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes(), &[0; 8], &512u32.to_be_bytes()].concat()
}

#[track_caller]
fn assert_answer(talk: &mut Talk, kind: &Kind, cookie: u64) {
    let answer = talk.hear(16 + 512);
    assert_eq!(answer[..16], [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat());
    assert!(answer[16..] == kind.bytes[..512], "the first sector");
}

#[track_caller]
fn assert_sector(talk: &mut Talk, kind: &Kind) {
    talk.say(&read_sector(1));
    assert_answer(talk, kind, 1);
}

#[test]
fn after_an_error_the_handshake_goes_on() {
    on_both_kinds(2, 20, |kind| {
        let mut talk = Talk::with_flags(kind, 3);
        let long = "n".repeat(4097);
        let not_text = [&string(&[0xff, 0xfe])[..], &[0, 0]].concat();
        for (option, data, kind) in [
            (99, vec![], rep::ERR_UNSUP),
            (99, vec![1; 60_000], rep::ERR_UNSUP),
            (u32::MAX, vec![1], rep::ERR_UNSUP),
            (opt::LIST, vec![0], rep::ERR_INVALID),
            (opt::STRUCTURED_REPLY, vec![0; 9], rep::ERR_INVALID),
            (opt::EXTENDED_HEADERS, vec![0; 9], rep::ERR_INVALID),
            (opt::GO, vec![], rep::ERR_INVALID),
            (opt::GO, b"\0\0\0\x02vm".to_vec(), rep::ERR_INVALID),
            (opt::GO, b"\0\0\0\x02vm\0\x01".to_vec(), rep::ERR_INVALID),
            (opt::GO, b"\0\0\0\x02vm\0\0\0".to_vec(), rep::ERR_INVALID),
            (opt::INFO, b"\xff\xff\xff\xffvm\0\0".to_vec(), rep::ERR_INVALID),
            (opt::INFO, info_of(&long, &[]), rep::ERR_INVALID),
            (opt::GO, info_of("v\0m", &[]), rep::ERR_INVALID),
            (opt::GO, not_text, rep::ERR_INVALID),
            (opt::GO, info_of("ghost", &[]), rep::ERR_UNKNOWN),
            (opt::INFO, info_of("ghost", &[1]), rep::ERR_UNKNOWN),
            // Contexts need more than simple replies.
            (opt::SET_META_CONTEXT, meta_of(EXPORT, &["base:allocation"]), rep::ERR_INVALID),
        ] {
            talk.expect(option, &data, kind);
        }
        talk.expect(opt::LIST, &[], rep::ACK);
        talk.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
        for (data, kind) in [
            (meta_of("ghost", &["base:allocation"]), rep::ERR_UNKNOWN),
            (b"\0\0\0\x02vm".to_vec(), rep::ERR_INVALID),
            (b"\0\0\0\x02vm\0\0\0\x02\0\0\0\x01a".to_vec(), rep::ERR_INVALID),
            (b"\0\0\0\x02vm\xff\xff\xff\xff".to_vec(), rep::ERR_INVALID),
            (b"\0\0\0\x02vm\0\0\0\0\0".to_vec(), rep::ERR_INVALID),
        ] {
            talk.expect(opt::SET_META_CONTEXT, &data, kind);
            talk.expect(opt::LIST_META_CONTEXT, &data, kind);
        }
        talk.expect(opt::EXTENDED_HEADERS, &[], rep::ACK);
        talk.expect(opt::STRUCTURED_REPLY, &[], rep::ERR_EXT_HEADER_REQD);
        talk.expect(opt::INFO, &info_of(EXPORT, &[]), rep::ACK);
        talk.expect(opt::ABORT, b"and good-bye", rep::ACK);
        talk.expect_end();
    });
}

#[test]
fn metadata_contexts_are_listed_and_selected() {
    on_both_kinds(3, 20, |kind| {
        let mut talk = Talk::with_flags(kind, 3);
        talk.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
        let base = (rep::META_CONTEXT, b"\0\0\0\0base:allocation".to_vec());
        for queries in [&[][..], &["base:"], &["base:allocation"], &["nobody:knows", "base:", "base:"]] {
            let listed = talk.ask(opt::LIST_META_CONTEXT, &meta_of(EXPORT, queries));
            assert_eq!(listed.iter().filter(|reply| **reply == base).count(), 1, "{queries:?}: {listed:x?}");
        }
        let listed = talk.ask(opt::LIST_META_CONTEXT, &meta_of(EXPORT, &["nobody:knows", "base:no", "base", ""]));
        assert_eq!(listed, [(rep::ACK, vec![])]);
        for queries in [&[][..], &["base:"], &["nobody:knows"]] {
            let selected = talk.ask(opt::SET_META_CONTEXT, &meta_of(EXPORT, queries));
            assert_eq!(selected, [(rep::ACK, vec![])], "{queries:?} selects nothing");
        }
        let selected = talk.ask(opt::SET_META_CONTEXT, &meta_of("", &["base:allocation"]));
        assert_eq!((selected.len(), &selected[0].1[4..]), (2, &b"base:allocation"[..]), "the default export's");
    });
}

#[test]
fn violations_end_that_connection_and_no_other() {
    on_both_kinds(4, 20, |kind| {
        let mut other = Talk::with_flags(kind, 3);
        for flags in [4u32, 0x8000_0003, u32::MAX] {
            Talk::with_flags(kind, flags).expect_end();
        }
        for bytes in [
            // 4 GiB of option data are announced; a name that is too long; no option at all.
            &b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"[..],
            b"IHAVEOPT\0\0\0\x63\x7f\xff\xff\xff",
            b"IHAVEOPT\0\0\0\x01\0\0\x10\x01",
            b"IHAVEOPS",
            b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n",
            &option_bytes(opt::EXPORT_NAME, b"ghost"),
            &option_bytes(opt::EXPORT_NAME, &[0xff]),
            &[option_bytes(opt::EXTENDED_HEADERS, &[]), option_bytes(opt::EXPORT_NAME, b"vm")].concat(),
        ] {
            let mut talk = Talk::with_flags(kind, 3);
            talk.say(bytes);
            if bytes.starts_with(b"IHAVEOPT\0\0\0\x0b") {
                talk.replies(opt::EXTENDED_HEADERS);
            }
            talk.expect_end();
        }
        // Who stops in the middle of it is not waited for.
        for cut in [0, 3, 4, 11, 19, 21] {
            let mut talk = Talk::begin(kind);
            let bytes = [&3u32.to_be_bytes()[..], &option_bytes(opt::GO, &info_of(EXPORT, &[]))].concat();
            talk.say(&bytes[..cut]);
            talk.0.shutdown(Shutdown::Write).expect("shuts down");
            talk.expect_end();
        }
        let options = option_bytes(opt::LIST, &[]).repeat(2000);
        other.say(&options);
        for _ in 0..2000 {
            other.replies(opt::LIST);
        }
        other.expect(opt::GO, &info_of(EXPORT, &[]), rep::ACK);
        assert_sector(&mut other, kind);
    });
}
