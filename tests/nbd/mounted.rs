//! The export as a file, by nbdfuse, and as a disk with a file system on it: what a user of the whole chain sees. Needs FUSE,
//! the second part also root and loop devices; left out by name where they are missing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::disk::{Disk, Rng, assert_same, noise};
use crate::kinds::{EXPORT, Kind};
use crate::peers::{fine, is_missing};
use crate::site::{eventually, run, skipped, text};

/// nbdfuse, and the file under which the export is seen; both end with it.
struct Fuse {
    child: Child,
    folder: tempfile::TempDir,
}

impl Fuse {
    fn mount(kind: &Kind) -> Fuse {
        let folder = tempfile::Builder::new().prefix("fuse").tempdir().expect("a directory");
        let mut nbdfuse = Command::new("nbdfuse");
        nbdfuse.arg(folder.path().join("disk")).arg(kind.site().uri(EXPORT));
        std::fs::write(folder.path().join("disk"), b"").expect("makes a mount point");
        let child = nbdfuse.stdin(Stdio::null()).stderr(Stdio::inherit()).spawn().expect("nbdfuse starts");
        let mut fuse = Fuse { child, folder };
        eventually("nbdfuse has mounted the export", || {
            if let Some(status) = fuse.child.try_wait().expect("can be waited for") {
                panic!("nbdfuse ended with {status}");
            }
            match std::fs::metadata(fuse.file()) {
                Ok(metadata) if metadata.len() == kind.size_bytes() => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        fuse
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("disk")
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let unmounted = Command::new("fusermount3").arg("-u").arg(self.file()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            let _ = Command::new("fusermount3").arg("-uz").arg(self.file()).status();
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

fn cannot_fuse(test: &str) -> bool {
    if is_missing(test, "nbdfuse") || is_missing(test, "fusermount3") {
        return true;
    }
    let is_closed = OpenOptions::new().read(true).write(true).open("/dev/fuse").is_err();
    if is_closed {
        skipped(test, "/dev/fuse cannot be opened");
    }
    is_closed
}

/// Random reads, writes, holes, zeroes and syncs through the kernel, beside a model: what `fsx` does, on a file that cannot
/// change its size.
#[test]
fn a_file_by_nbdfuse_behaves_like_one() {
    if cannot_fuse("a_file_by_nbdfuse_behaves_like_one") {
        return;
    }
    let disk = Disk::mixed(60, 60, 3 * 512);
    for kind in [Kind::complete(&disk), Kind::relocating(&disk)] {
        let fuse = Fuse::mount(&kind);
        let file = File::options().read(true).write(true).open(fuse.file()).expect("opens");
        let mut model = kind.bytes.clone();
        let mut rng = Rng(61);
        for turn in 0..1500u64 {
            let longest = [100, 5000, 66_000][rng.below(3) as usize];
            let len = 1 + rng.below(longest) as usize;
            let at = rng.below((model.len() - len) as u64);
            let range = at as usize..at as usize + len;
            match rng.below(10) {
                0..5 => {
                    let mut got = vec![0; len];
                    file.read_exact_at(&mut got, at).expect("reads");
                    assert_same(&format!("turn {turn}, {len} bytes at {at}"), &got, &model[range]);
                }
                5..9 => {
                    let data = noise(len, turn);
                    file.write_all_at(&data, at).expect("writes");
                    model[range].copy_from_slice(&data);
                }
                _ if turn % 2 == 0 => file.sync_data().expect("syncs"),
                _ => {
                    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    // It becomes a TRIM, which leaves alone what is less than a sector. Where this nbdfuse cannot, nothing
                    // is done.
                    let (start, end) = (range.start.next_multiple_of(512), range.end / 512 * 512);
                    let len = end.saturating_sub(start);
                    if len > 0 && fallocate(&file, punch, start as i64, len as i64).is_ok() {
                        model[start..end].fill(0);
                    }
                }
            }
        }
        file.sync_all().expect("syncs");
        drop(file);
        drop(fuse);
        assert_same("the volume", &kind.site().nbd(EXPORT).read_all(), &model);
    }
}

/// A loop device, until dropped.
struct Loop(String);

impl Loop {
    fn attach(file: &Path) -> Option<Loop> {
        let ran = run(Command::new("losetup").args(["--find", "--show"]).arg(file));
        ran.status.success().then(|| Loop(ran.out.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// A mounted file system, until dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn mount(device: &Loop, at: &'a Path) -> Mounted<'a> {
        fine(Command::new("mount").arg(&device.0).arg(at));
        Mounted(at)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

/// mkfs, files, an unmount, fsck, and the same files again.
#[test]
fn a_file_system_on_the_export_holds_its_files() {
    let test = "a_file_system_on_the_export_holds_its_files";
    if cannot_fuse(test) || ["losetup", "mkfs.ext4", "fsck.ext4", "mount"].iter().any(|tool| is_missing(test, tool)) {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return skipped(test, "loop devices and mounts need root");
    }
    let disk = Disk::mixed(62, 400, 0);
    for kind in [Kind::complete(&disk), Kind::relocating(&disk)] {
        let fuse = Fuse::mount(&kind);
        let Some(device) = Loop::attach(&fuse.file()) else {
            return skipped(test, "there is no loop device to be had");
        };
        fine(Command::new("mkfs.ext4").args(["-q", "-F", &device.0]));
        let folder = tempfile::Builder::new().prefix("mnt").tempdir().expect("a directory");
        {
            let mounted = Mounted::mount(&device, folder.path());
            for nth in 0..200u64 {
                let path = mounted.0.join(format!("file-{nth}"));
                std::fs::write(&path, noise((nth * 311) as usize, nth)).expect("writes a file");
                if nth % 3 == 0 {
                    std::fs::remove_file(&path).expect("removes a file");
                }
            }
        }
        fine(Command::new("fsck.ext4").args(["-f", "-n", &device.0]));
        {
            let mounted = Mounted::mount(&device, folder.path());
            for nth in (0..200u64).filter(|nth| nth % 3 != 0) {
                let path = mounted.0.join(format!("file-{nth}"));
                assert_same(text(&path), &std::fs::read(&path).expect("reads"), &noise((nth * 311) as usize, nth));
            }
        }
    }
}
