//! A destination half-way through a relocation, stopped by SIGKILL, that can be put back as often as there are rows in a
//! table; and what may come of damage to it. Must not know what the damage is.

use std::fs;
use std::path::{Path, PathBuf};

use crate::disk::{BLOCK, Disk, assert_same, noise};
use crate::nbd_client::{NbdClient, Replies};
use crate::site::{Pair, eventually, link, text};

pub const BLOCKS: usize = 160;
/// Blocks of the front that have arrived.
pub const ARRIVED: usize = 80;

/// What may come of damage. Every outcome includes that no wrong byte is served.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// Everything is served; what was lost is fetched again.
    Serves,
    /// The daemon does not start; the last line of what it says has these words.
    Refuses(&'static [&'static str]),
    /// The daemon starts and serves other volumes; of this one the status says why not, with these words.
    Unserved(&'static [&'static str]),
    /// The daemon starts and does not know the volume: nothing of it is served.
    Forgotten,
    /// One of the two that serve nothing of it: which, depends on which byte was hit.
    NotServed(&'static [&'static str]),
}

pub struct HalfWay {
    pub pair: Pair,
    /// The volume's bytes: all that the guest wrote was acknowledged.
    pub model: Vec<u8>,
    /// A volume that `b` owns and that nobody moves.
    other: Vec<u8>,
    kept: tempfile::TempDir,
}

impl HalfWay {
    /// Blocks below [`ARRIVED`] are resident, the rest is absent but for what the guest wrote: all of it flushed, most of it
    /// before a restart, but the last write.
    pub fn make(seed: u64) -> HalfWay {
        let mut pair = Pair::start(link(400, 2));
        let disk = Disk::mixed(seed, BLOCKS, 777);
        // What the store knows lies in its files only after a restart.
        let template = pair.path("template.raw");
        disk.sibling(seed + 1, 2).write_to(&template);
        pair.b.ok(&["prewarm", "--image", text(&template)]);
        pair.b.stop();
        pair.b.start();
        let other = Disk::mixed(seed + 2, 20, 0);
        let other_path = pair.path("other.raw");
        other.write_to(&other_path);
        pair.b.ok(&["volume", "add", "other", "--image", text(&other_path)]);
        pair.add("vm", &disk);
        pair.relocate("vm", &["--no-bulk"]);

        let mut model = disk.bytes;
        let mut client = pair.b.nbd("vm");
        // In no order: nothing is read ahead.
        for nth in 0..ARRIVED {
            client.read((nth * 37 % ARRIVED * BLOCK) as u64, BLOCK);
        }
        let mut write = |client: &mut NbdClient, at: usize, len: usize| {
            let data = noise(len, (seed << 32) + at as u64);
            client.write(at as u64, &data);
            model[at..at + len].copy_from_slice(&data);
        };
        write(&mut client, 3 * BLOCK + 1000, 5000);
        write(&mut client, 100 * BLOCK, 2 * BLOCK);
        write(&mut client, 110 * BLOCK + 512, 4096);
        // A read is answered before its block is in the file.
        eventually("what was read is in the file", || match pair.b.status("vm")["blocks"]["absent"].as_u64() {
            Some(absent) if absent == (BLOCKS + 1 - ARRIVED - 2) as u64 => Ok(()),
            other => Err(format!("{other:?}")),
        });
        client.flush();
        drop(client);
        // From the log into a table.
        pair.b.stop();
        pair.b.start();
        let mut client = pair.b.nbd("vm");
        write(&mut client, 90 * BLOCK + 1024, 1536);
        write(&mut client, 130 * BLOCK, BLOCK);
        client.flush();
        write(&mut client, 110 * BLOCK + 8192, 512);
        client.flush();
        // 130 and two whole blocks at 100 are the guest's.
        assert_eq!(pair.b.status("vm")["blocks"]["absent"], BLOCKS + 1 - ARRIVED - 3, "what is absent is known");
        // Acknowledged, never flushed: a killed daemon keeps it all the same.
        write(&mut client, 140 * BLOCK + 512, 1024);
        pair.b.kill();
        drop(client);

        let kept = tempfile::tempdir().expect("a directory");
        copy(&pair.b.dir, &kept.path().join("b"));
        for image in images(&pair) {
            let name = image.file_name().expect("a name");
            fs::copy(&image, kept.path().join(name)).expect("copies");
            fs::hard_link(&image, itself(&image)).expect("links");
        }
        HalfWay { pair, model, other: other.bytes, kept }
    }

    /// Puts everything at the destination back to how it was when it was killed.
    pub fn restore(&mut self) {
        fs::remove_dir_all(&self.pair.b.dir).expect("removes");
        copy(&self.kept.path().join("b"), &self.pair.b.dir);
        for image in images(&self.pair) {
            let name = image.file_name().expect("a name").to_owned();
            let _ = fs::remove_dir(&image).or_else(|_| fs::remove_file(&image));
            // In place: another file of the same content would be another image.
            fs::copy(self.kept.path().join(name), itself(&image)).expect("copies");
            fs::hard_link(itself(&image), &image).expect("links");
        }
        // A state that was copied is another instance to the source, until a person says which is meant.
        self.pair.a.ok(&["peer", "accept", "b"]);
    }

    /// The destination's raw file.
    pub fn image(&self) -> PathBuf {
        self.pair.path("vm-at-b.raw")
    }

    /// One row: `damage` is done to the destination as it was left, then it is started.
    pub fn row(&mut self, what: &str, damage: &dyn Fn(&HalfWay), expected: Outcome) {
        self.restore();
        damage(self);
        println!("{what}: {expected:?}");
        self.expect(what, expected);
    }

    pub fn expect(&mut self, what: &str, expected: Outcome) {
        match expected {
            Outcome::Serves => {
                self.pair.b.start();
                self.assert_serves(what);
            }
            Outcome::Refuses(words) => return self.assert_refuses(what, words),
            Outcome::Unserved(words) => {
                self.pair.b.start();
                self.assert_unserved(what, words);
            }
            Outcome::Forgotten => {
                self.pair.b.start();
                self.assert_not_exported(what);
                self.pair.b.refused(&["status", "vm"], &["vm"]);
            }
            Outcome::NotServed(words) => {
                // A daemon that refuses ends by itself; one that serves has to be looked at.
                if self.pair.b.try_start().is_err() {
                    return self.assert_refuses(what, words);
                }
                self.assert_unserved(what, words);
            }
        }
        self.pair.b.kill();
    }

    fn assert_refuses(&self, what: &str, words: &[&str]) {
        let ran = self.pair.b.refused_start();
        let said = ran.err.trim_end().lines().last().unwrap_or_default().to_owned();
        println!("    {said}");
        assert!(matches!(ran.status.code(), Some(1 | 2)), "{what}: serve ended with {}: {}", ran.status, ran.err);
        assert!(!ran.err.contains("panicked"), "{what}: {}", ran.err);
        for word in words {
            assert!(said.contains(word), "{what}: no word of {word:?} in: {said}");
        }
    }

    fn assert_unserved(&self, what: &str, words: &[&str]) {
        let status = self.pair.b.status("vm");
        let reason = status["phase_reason"].as_str().expect("a reason");
        println!("    {reason}");
        assert_eq!(status["phase"], "failed", "{what}: {status}");
        for word in words {
            assert!(reason.contains(word), "{what}: no word of {word:?} in: {reason}");
        }
        self.assert_not_exported(what);
        assert_same(&format!("{what}: the other volume"), &self.pair.b.nbd("other").read_all(), &self.other);
    }

    fn assert_not_exported(&self, what: &str) {
        let client = NbdClient::unix(&self.pair.b.socket(), "vm", Replies::Simple);
        assert!(client.is_err(), "{what}: the volume is served");
    }

    fn assert_serves(&self, what: &str) {
        let mut client = self.pair.b.nbd("vm");
        assert_same(what, &client.read_all(), &self.model);
        assert_same(&format!("{what}: the other volume"), &self.pair.b.nbd("other").read_all(), &self.other);
        // And it can be written, which is what it is for.
        let data = noise(4096, 4);
        client.write(150 * BLOCK as u64, &data);
        client.flush();
        assert_same(&format!("{what}: a write"), &client.read(150 * BLOCK as u64, 4096), &data);
        assert!(!self.pair.b.log().contains("panicked"), "{what}: {}", self.pair.b.log());
    }
}

/// What lies outside of the site's directory.
fn images(pair: &Pair) -> [PathBuf; 2] {
    [pair.path("vm-at-b.raw"), pair.path("other.raw")]
}

/// The second name of an image's file, by which it outlives what is done to the first.
fn itself(image: &Path) -> PathBuf {
    image.with_extension("itself")
}

/// A directory with its files; sockets are left out.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("makes a directory");
    for entry in fs::read_dir(from).expect("reads a directory") {
        let entry = entry.expect("reads a directory");
        let kind = entry.file_type().expect("a kind");
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy(&entry.path(), &target);
        } else if kind.is_file() {
            fs::copy(entry.path(), target).expect("copies");
        }
    }
}
