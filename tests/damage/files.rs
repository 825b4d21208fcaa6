//! Damage to files of the destination, done while it is stopped: kind x file, each with its outcome.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::disk::{BLOCK, noise};
use crate::half_way::{ARRIVED, BLOCKS, HalfWay, Outcome};
use Outcome::{Forgotten, NotServed, Refuses, Serves, Unserved};

/// What is done to a file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// One bit in the middle.
    Bit,
    /// A bit in every 512 bytes.
    Bits,
    CutInHalf,
    Emptied,
    Deleted,
    Garbage,
    /// Garbage behind the end, as a torn write leaves it.
    Tail,
}
use Kind::{Bit, Bits, CutInHalf, Deleted, Emptied, Garbage, Tail};

impl Kind {
    fn to(self, path: &Path) {
        let bytes = fs::read(path).expect("reads");
        let len = bytes.len();
        let mut new = bytes.clone();
        match self {
            Bit => {
                if let Some(byte) = new.get_mut(len / 2) {
                    *byte ^= 0x04;
                }
            }
            Bits => new.iter_mut().step_by(512).for_each(|byte| *byte ^= 0x04),
            CutInHalf => new.truncate(len / 2),
            Emptied => new.clear(),
            Garbage => new = noise(len, 7),
            Tail => new.extend(noise(300, 8)),
            Deleted => return fs::remove_file(path).expect("removes"),
        }
        // In place: the file's identity is not what is damaged.
        fs::write(path, new).expect("writes");
    }
}

/// The files of a directory that `pattern` means: a name, or `*` and an end, or a beginning and `*`.
fn files(dir: &Path, pattern: &str) -> Vec<PathBuf> {
    let is_meant = |name: &str| match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => name.ends_with(end),
        (_, Some(start)) => name.starts_with(start),
        _ => name == pattern,
    };
    let entries = fs::read_dir(dir).expect("reads a directory").map(|entry| entry.expect("reads a directory").path());
    let mut found: Vec<PathBuf> = entries
        .filter(|path| path.is_file() && path.file_name().and_then(|name| name.to_str()).is_some_and(is_meant))
        .collect();
    found.sort();
    found
}

type Row = (&'static str, &'static [Kind], Outcome);

/// Every row of a table, one after the other. A pattern that means no file would be a row that tests nothing.
fn run(seed: u64, folder: &str, table: &[Row]) {
    let mut half_way = HalfWay::make(seed);
    for (pattern, kinds, outcome) in table {
        for kind in *kinds {
            let what = format!("{kind:?} of {folder}/{pattern}");
            let damage = |half_way: &HalfWay| {
                let found = files(&half_way.pair.b.dir.join(folder), pattern);
                assert!(!found.is_empty(), "{what}: there is no such file");
                found.iter().for_each(|path| kind.to(path));
            };
            half_way.row(&what, &damage, *outcome);
        }
    }
}

const ALL: &[Kind] = &[Bit, Bits, CutInHalf, Emptied, Deleted, Garbage, Tail];

/// The store is a cache: whatever happens to it costs bytes on the WAN, never more.
#[test]
fn the_store() {
    run(
        300,
        "store",
        &[
            ("*.blob", ALL, Serves),
            ("*.sst", ALL, Serves),
            ("MANIFEST*", ALL, Serves),
            ("CURRENT", ALL, Serves),
            ("OPTIONS*", &[Garbage, Deleted], Serves),
            ("LOCK", &[Deleted], Serves),
        ],
    );
}

#[test]
fn the_store_as_a_whole() {
    let mut half_way = HalfWay::make(310);
    let store = |half_way: &HalfWay| half_way.pair.b.dir.join("store");
    half_way.row("the store deleted", &|h| fs::remove_dir_all(store(h)).expect("removes"), Serves);
    let empty = |h: &HalfWay| {
        fs::remove_dir_all(store(h)).expect("removes");
        fs::create_dir(store(h)).expect("makes");
    };
    half_way.row("the store emptied", &empty, Serves);
    let file = |h: &HalfWay| {
        fs::remove_dir_all(store(h)).expect("removes");
        fs::write(store(h), "no store").expect("writes");
    };
    half_way.row("a file in the store's place", &file, Refuses(&["store"]));

    // Under the daemon's feet: it goes on, and nothing is lost.
    half_way.restore();
    half_way.pair.b.start();
    fs::remove_dir_all(store(&half_way)).expect("removes");
    let mut client = half_way.pair.b.nbd("vm");
    crate::disk::assert_same("the store deleted while it is open", &client.read_all(), &half_way.model);
    drop(client);
    half_way.pair.b.kill();
    half_way.expect("the store deleted while it was open, after a restart", Serves);
}

/// The state database says which blocks are the guest's: what is missing there must not be taken for absent.
#[test]
fn the_state_database() {
    const SAYS: &[&str] = &["state"];
    run(
        320,
        "state",
        &[
            ("*.log", &[Bit, Bits, CutInHalf, Emptied, Deleted, Garbage], NotServed(SAYS)),
            // A killed process may leave this, and what is in front of it is whole.
            ("*.log", &[Tail], Serves),
            ("*.sst", &[Bit, Bits, CutInHalf, Emptied, Deleted, Garbage], NotServed(SAYS)),
            ("MANIFEST*", &[Bit, Bits, CutInHalf, Emptied, Deleted, Garbage], NotServed(SAYS)),
            ("CURRENT", &[Bit, Bits, CutInHalf, Emptied, Deleted, Garbage], Refuses(SAYS)),
            // Nothing depends on these.
            ("OPTIONS*", &[Garbage, Deleted], Serves),
            ("LOCK", &[Deleted], Serves),
            ("WRITTEN", ALL, Serves),
        ],
    );
}

#[test]
fn the_state_database_as_a_whole() {
    let mut half_way = HalfWay::make(330);
    let state = |half_way: &HalfWay| half_way.pair.b.dir.join("state");
    half_way.row("the state database deleted", &|h| fs::remove_dir_all(state(h)).expect("removes"), Forgotten);
    // The source has let go: nobody makes a fresh copy without what the guest wrote.
    half_way.restore();
    fs::remove_dir_all(state(&half_way)).expect("removes");
    half_way.pair.b.start();
    let again = half_way.pair.path("again.raw");
    half_way.pair.b.refused(&["relocate", "a/vm", "--image", crate::site::text(&again)], &["vm"]);
    half_way.pair.b.kill();
    let file = |h: &HalfWay| {
        fs::remove_dir_all(state(h)).expect("removes");
        fs::write(state(h), "no database").expect("writes");
    };
    half_way.row("a file in the state database's place", &file, Refuses(&["state"]));
}

/// What lies where blocks are absent is nobody's: it must never be served.
#[test]
fn the_raw_file() {
    let mut half_way = HalfWay::make(340);
    let garbage = |half_way: &HalfWay| {
        let file = File::options().write(true).open(half_way.image()).expect("opens");
        // Absent as a whole; not the sectors that the guest wrote, nor the whole blocks that are its.
        let kept = |block: usize| matches!(block, 90 | 100 | 101 | 110 | 130 | 140);
        for block in (ARRIVED..BLOCKS).filter(|block| !kept(*block)) {
            file.write_all_at(&noise(BLOCK, block as u64), (block * BLOCK) as u64).expect("writes");
        }
        // And in front of and behind the guest's sectors of a block.
        file.write_all_at(&noise(512, 1), (110 * BLOCK) as u64).expect("writes");
        file.write_all_at(&noise(3072, 2), (110 * BLOCK + 4608) as u64).expect("writes");
        file.write_all_at(&noise(777, 3), (BLOCKS * BLOCK) as u64).expect("writes");
    };
    half_way.row("garbage where blocks are absent", &garbage, Serves);
    const NAMES: &[&str] = &["vm-at-b.raw"];
    // What lies behind the volume's end is not the volume's.
    half_way.row("Tail of the raw file", &|h| Tail.to(&h.image()), Serves);
    // Nobody can tell whether a file that was in use is what it was when another one has come in its place.
    let replaced = |h: &HalfWay| {
        let copy = h.image().with_extension("copy");
        fs::copy(h.image(), &copy).expect("copies");
        fs::rename(copy, h.image()).expect("renames");
    };
    let says = &["vm-at-b.raw", "another file lies there", "put the right image back"];
    half_way.row("a copy in the raw file's place", &replaced, Unserved(says));
    for kind in [CutInHalf, Emptied, Deleted] {
        half_way.row(&format!("{kind:?} of the raw file"), &|h| kind.to(&h.image()), Unserved(NAMES));
    }
    let folder = |h: &HalfWay| {
        fs::remove_file(h.image()).expect("removes");
        fs::create_dir(h.image()).expect("makes");
    };
    half_way.row("a folder in the raw file's place", &folder, Unserved(NAMES));
}

#[test]
fn who_the_site_is() {
    run(
        350,
        ".",
        &[
            ("identity.key", &[Bits, CutInHalf, Emptied, Deleted, Garbage], Refuses(&["identity.key"])),
            ("identity.crt", &[Bits, CutInHalf, Emptied, Deleted, Garbage], Refuses(&["identity.crt"])),
        ],
    );
}

/// The configuration is written anew by every start of a test's site, so a copy is damaged.
#[test]
fn the_configuration() {
    let half_way = HalfWay::make(360);
    let site = &half_way.pair.b;
    let good = fs::read_to_string(site.dir.join("blockferry.toml")).expect("there is one");
    let copy = site.dir.join("copy.toml");
    let rows: [(&str, String, &str); 6] = [
        ("emptied", String::new(), "name"),
        ("cut in half", good[..good.len() / 2].to_owned(), "copy.toml"),
        ("garbage", "\u{1}\u{2}[[[".to_owned(), "copy.toml"),
        ("a letter changed in a key", good.replacen("state_dir", "stote_dir", 1), "stote_dir"),
        ("a letter changed in a fingerprint", good.replacen("sha256:", "sha255:", 1), "fingerprint"),
        ("a letter changed in a section", good.replacen("[nbd]", "[nbb]", 1), "nbb"),
    ];
    for (what, text, word) in rows {
        fs::write(&copy, text).expect("writes");
        let mut serve = crate::site::blockferry();
        let ran = crate::site::run(serve.args(["serve", "--config"]).arg(&copy));
        println!("{what}:\n    {}", ran.err.trim_end());
        assert_eq!(ran.status.code(), Some(2), "{what}: {}", ran.err);
        assert_eq!(ran.err.trim_end().lines().count(), 1, "{what}: {}", ran.err);
        assert!(ran.err.contains(word), "{what}: no word of {word:?} in: {}", ran.err);
    }
    fs::remove_file(&copy).expect("removes");
    let mut serve = crate::site::blockferry();
    let ran = crate::site::run(serve.args(["serve", "--config"]).arg(&copy));
    assert_eq!(ran.status.code(), Some(2), "deleted: {}", ran.err);
    assert!(ran.err.contains("copy.toml"), "{}", ran.err);
}
