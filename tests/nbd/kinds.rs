//! What the checks are made against: a served volume that is complete, and one that is still being relocated. Must not
//! know NBD.

use std::path::PathBuf;

use crate::disk::Disk;
use crate::site::{Pair, Site, link, text};
use crate::targets::drive::Connection;
use blockferry::core::nbd::ReplyStyle;

pub const EXPORT: &str = "vm";

const FILE: &str = "disk.raw";

/// All forms that can be negotiated.
pub const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

#[expect(clippy::large_enum_variant, reason = "one of each is ever made")]
enum Home {
    Complete { site: Site, dir: tempfile::TempDir },
    Relocating(Pair),
}

/// One kind of volume, served.
pub struct Kind {
    pub name: &'static str,
    /// What the disk holds, apart from what the check writes.
    pub bytes: Vec<u8>,
    home: Home,
}

impl Kind {
    pub fn complete(disk: &Disk) -> Kind {
        let dir = tempfile::Builder::new().prefix("ferry").tempdir().expect("a directory");
        let mut site = Site::new(dir.path(), "a");
        site.start();
        let path = dir.path().join(FILE);
        disk.write_to(&path);
        site.ok(&["volume", "add", EXPORT, "--image", text(&path)]);
        Kind { name: "complete", bytes: disk.bytes.clone(), home: Home::Complete { site, dir } }
    }

    /// Nothing is copied but what is read: it stays incomplete for as long as the check takes.
    pub fn relocating(disk: &Disk) -> Kind {
        let pair = Pair::start(link(1000, 2));
        pair.add(EXPORT, disk);
        pair.relocate(EXPORT, &["--no-bulk"]);
        Kind { name: "relocating", bytes: disk.bytes.clone(), home: Home::Relocating(pair) }
    }

    pub fn site(&self) -> &Site {
        match &self.home {
            Home::Complete { site, .. } => site,
            Home::Relocating(pair) => &pair.b,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.site().socket()
    }

    pub fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The raw file, where it holds all of the disk.
    pub fn file(&self) -> Option<PathBuf> {
        match &self.home {
            Home::Complete { dir, .. } => Some(dir.path().join(FILE)),
            Home::Relocating(_) => None,
        }
    }

    /// A client in transmission, with the first `contexts` metadata contexts.
    pub fn connect(&self, style: ReplyStyle, contexts: usize) -> Connection {
        Connection::open(&self.socket(), EXPORT, style, contexts)
    }

    /// The most memory that the daemon ever had, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.site().pid())).expect("the daemon runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib << 10
    }

    /// Nothing went wrong on the way.
    pub fn assert_unfinished(&self) {
        if let Home::Relocating(pair) = &self.home {
            let status = pair.b.status(EXPORT);
            let absent = status["blocks"]["absent"].as_u64().expect("a count");
            assert!(absent > 0, "the volume is complete: {status}");
        }
    }
}

/// Runs `check` against both kinds, each with a fresh disk.
#[track_caller]
pub fn on_both_kinds(seed: u64, blocks: usize, check: impl Fn(&Kind)) {
    // The size is a multiple of sectors, not of blocks.
    let disk = Disk::mixed(seed, blocks, 3 * 512);
    for kind in [Kind::complete(&disk), Kind::relocating(&disk)] {
        eprintln!("on a volume that is {}", kind.name);
        check(&kind);
        kind.assert_unfinished();
    }
}
