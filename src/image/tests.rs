//! Images on a real file system.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;

use super::*;

fn sparse(dir: &tempfile::TempDir, name: &str, size_bytes: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).and_then(|file| file.set_len(size_bytes)).expect("a temporary file");
    path
}

#[test]
fn holes_are_seen_and_data_is_cut_to_the_question() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sparse(&dir, "a", 8 << 20);
    let image = Image::open_write(&path).expect("opens");
    assert_eq!(image.next_data(0).expect("asks"), None);
    image.write_at(4 << 20, &[7u8; 4096]).expect("writes");
    let data = image.next_data(0).expect("asks").expect("data");
    assert!(data.start <= 4 << 20 && data.end >= (4 << 20) + 4096, "{data:?}");
    assert_eq!(image.next_data((4 << 20) + 1).expect("asks").expect("data").start, (4 << 20) + 1);
    assert!(image.is_hole(0..65536).expect("asks"));
    assert!(!image.is_hole(4 << 20..(4 << 20) + 1).expect("asks"));
    image.write_zeroes(4 << 20, 4096, true).expect("punches");
    let mut buf = [1u8; 4096];
    image.read_at(4 << 20, &mut buf).expect("reads");
    assert_eq!(buf, [0u8; 4096]);
}

#[test]
fn a_truncated_image_is_an_error_and_never_zeros() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sparse(&dir, "a", 1 << 20);
    let image = Image::open_read(&path).expect("opens");
    File::options().write(true).open(&path).and_then(|f| f.set_len(4096)).expect("truncates");
    let mut buf = [0u8; 8192];
    let error = image.read_at(0, &mut buf).expect_err("too short");
    assert!(matches!(error, ImageError::Shorter { offset: 4096, .. }), "{error}");
}

#[test]
fn what_is_no_image_is_refused_with_its_reason() {
    let dir = tempfile::tempdir().expect("a folder");
    let missing = Image::open_read(&dir.path().join("none")).expect_err("missing");
    assert!(matches!(missing, ImageError::Missing { .. }), "{missing}");
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    for (path, words) in [
        (dir.path(), "is a folder; give a raw image file"),
        (&pipe, "neither a regular file nor a block device"),
        (&socket, "neither a regular file nor a block device"),
        (Path::new("/dev/null"), "neither a regular file nor a block device"),
    ] {
        for opened in [Image::open_read(path), Image::open_write(path)] {
            let error = opened.expect_err("no image");
            assert!(matches!(error, ImageError::NotAnImage { .. }), "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    }
    let empty = sparse(&dir, "empty", 0);
    assert!(Image::open_read(&empty).expect_err("empty").to_string().contains("empty"));
    let qcow2 = dir.path().join("q");
    fs::write(&qcow2, b"QFI\xfb0000").expect("writes");
    assert!(Image::open_read(&qcow2).expect_err("qcow2").to_string().contains("raw"));
    let nowhere = Image::create(&dir.path().join("no/such/x"), 4096, Overwrite::OnlyBlank).expect_err("no folder");
    assert!(nowhere.to_string().contains("folder"), "{nowhere}");
    if !nix::unistd::geteuid().is_root() {
        let secret = sparse(&dir, "secret", 4096);
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o0)).expect("chmod");
        assert!(matches!(Image::open_read(&secret), Err(ImageError::Unreadable { .. })));
    }
}

#[test]
fn a_destination_is_never_overwritten_nor_shared() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("new");
    let image = Image::create(&path, (1 << 20) + 512, Overwrite::OnlyBlank).expect("creates");
    assert_eq!(fs::metadata(&path).expect("there").len(), (1 << 20) + 512);
    assert_eq!(image.allocated_bytes().expect("asks"), 0);
    let in_use = Image::create(&path, 1 << 20, Overwrite::OnlyBlank).expect_err("in use");
    assert!(matches!(in_use, ImageError::InUse { .. }), "{in_use}");
    assert!(matches!(Image::open_write(&path), Err(ImageError::InUse { .. })));
    drop(image);
    let exists = Image::create(&path, 1 << 20, Overwrite::OnlyBlank).expect_err("exists");
    assert!(matches!(exists, ImageError::Exists { .. }), "{exists}");
    Image::open_write(&path).expect("opens once it is free");
}

#[test]
fn a_destination_that_a_crash_left_empty_is_taken() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("new");
    for left_bytes in [0, 1 << 20] {
        File::create(&path).and_then(|file| file.set_len(left_bytes)).expect("made");
        let image = Image::create(&path, 1 << 20, Overwrite::OnlyBlank).expect("takes what holds nothing");
        assert_eq!((image.size_bytes(), fs::metadata(&path).expect("there").len()), (1 << 20, 1 << 20));
        assert!(matches!(Image::create(&path, 1 << 20, Overwrite::OnlyBlank), Err(ImageError::InUse { .. })));
    }
    // Something is in it, be it a zero.
    Image::open_write(&path).and_then(|image| image.write_at(70_000, &[0])).expect("writes");
    let exists = Image::create(&path, 1 << 20, Overwrite::OnlyBlank).expect_err("exists");
    assert!(matches!(exists, ImageError::Exists { .. }), "{exists}");
    assert_eq!(fs::metadata(&path).expect("still there").len(), 1 << 20);
}

#[test]
fn the_stamp_moves_with_a_write() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sparse(&dir, "a", 1 << 20);
    let image = Image::open_write(&path).expect("opens");
    let before = image.stamp().expect("asks");
    File::options().write(true).open(&path).and_then(|f| f.set_len(2 << 20)).expect("grows");
    assert_ne!(before, image.stamp().expect("asks"));
}

#[test]
fn what_was_made_is_private_and_only_what_was_made_is_removed() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("new");
    let image = Image::create(&path, 1 << 20, Overwrite::OnlyBlank).expect("creates");
    assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    assert!(image.was_made());
    // Somebody else's file has its name.
    fs::rename(&path, dir.path().join("moved")).expect("renames");
    assert_eq!(image.unlink_if_ours().expect("looks"), Unlinked::NotThere);
    fs::write(&path, "precious").expect("writes");
    assert_eq!(image.unlink_if_ours().expect("looks"), Unlinked::Another);
    let known = image.identity().expect("an identity");
    assert_eq!(Image::unlink_known(&path, &known).expect("looks"), Unlinked::Another);
    fs::remove_file(&path).expect("removes");
    std::os::unix::fs::symlink(dir.path().join("moved"), &path).expect("links");
    assert_eq!(image.unlink_if_ours().expect("looks"), Unlinked::Another, "a link is not what it leads to");
    assert_eq!(Image::unlink_known(&path, &known).expect("looks"), Unlinked::Another);
    assert_eq!(Image::unlink_known(&dir.path().join("moved"), &known).expect("removes"), Unlinked::Done);

    // Its folder is called otherwise by now.
    let (folder, other) = (dir.path().join("d1"), dir.path().join("d2"));
    fs::create_dir(&folder).expect("makes");
    let image = Image::create(&folder.join("x"), 1 << 20, Overwrite::OnlyBlank).expect("creates");
    fs::rename(&folder, &other).expect("renames");
    fs::create_dir(&folder).expect("makes");
    fs::write(folder.join("x"), "precious").expect("writes");
    assert_eq!(image.unlink_if_ours().expect("removes"), Unlinked::Done);
    assert!(folder.join("x").exists() && !other.join("x").exists());

    // A blank file that was there before.
    let path = sparse(&dir, "blank", 0);
    let image = Image::create(&path, 1 << 20, Overwrite::OnlyBlank).expect("takes it");
    assert!(!image.was_made());
    assert_eq!(image.unlink_if_ours().expect("looks"), Unlinked::NotMade);
    assert!(path.exists());
}

#[test]
fn no_file_is_made_through_a_link() {
    let dir = tempfile::tempdir().expect("a folder");
    let (link, target) = (dir.path().join("link"), dir.path().join("target"));
    std::os::unix::fs::symlink(&target, &link).expect("links");
    for is_dangling in [true, false] {
        let refused = Image::create(&link, 1 << 20, Overwrite::OnlyBlank).expect_err("a link");
        assert!(matches!(refused, ImageError::IsLink { .. }), "{refused}");
        assert_eq!(target.exists(), !is_dangling);
        sparse(&dir, "target", 0);
    }
}

#[test]
fn what_is_larger_than_the_volume_is_clipped_to_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a");
    fs::write(&path, vec![7; 1 << 20]).expect("writes");
    let size = (1 << 19) + 512;
    let image = Image::open_known(&path, size).expect("opens");
    assert_eq!(image.size_bytes(), size);
    assert_eq!(image.next_data(4096).expect("asks"), Some(4096..size));
    assert_eq!(image.next_data(size).expect("asks"), None);
    image.write_zeroes(size - 512, 4096, true).expect("zeroes");
    image.write_zeroes(size, 4096, true).expect("has nothing to zero");
    let bytes = fs::read(&path).expect("reads");
    assert_eq!(bytes[size as usize - 512..size as usize], [0; 512]);
    assert!(bytes[size as usize..].iter().all(|byte| *byte == 7), "what lies behind the end is not the volume's");
    drop(image);
    let small = Image::open_known(&path, (1 << 20) + 1).expect_err("too small");
    assert!(matches!(small, ImageError::TooSmall { .. }), "{small}");
}

#[test]
fn one_file_under_two_names_has_one_writer() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sparse(&dir, "a", 1 << 20);
    let link = dir.path().join("b");
    fs::hard_link(&path, &link).expect("links");
    let image = Image::open_write(&path).expect("opens");
    assert!(matches!(Image::open_write(&link), Err(ImageError::InUse { .. })));
    drop(image);
    Image::open_write(&link).expect("opens once it is free");
}

/// A loop device over a file, or None, with a message, where there is none to be had.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Option<Loop> {
        let made = std::process::Command::new("losetup").args(["-f", "--show"]).arg(path).output();
        match made {
            Ok(made) if made.status.success() => Some(Loop(String::from_utf8_lossy(&made.stdout).trim().to_owned())),
            _ => {
                eprintln!("skipped: no loop device can be had here");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn a_device_has_one_writer_under_however_many_nodes() {
    let dir = tempfile::tempdir().expect("a folder");
    let Some(device) = Loop::over(&sparse(&dir, "a", 1 << 20)) else { return };
    let image = Image::open_write(device.path()).expect("opens");
    let twin = dir.path().join("twin");
    let number = fs::metadata(device.path()).expect("there").rdev();
    let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
    if let Err(error) = nix::sys::stat::mknod(&twin, nix::sys::stat::SFlag::S_IFBLK, mode, number) {
        eprintln!("skipped: no device node can be made here: {error}");
        return;
    }
    assert!(matches!(Image::open_write(&twin), Err(ImageError::InUse { .. })));
    drop(image);
    let image = Image::open_write(&twin).expect("opens once it is free");
    assert!(matches!(image.identity(), Ok(Identity::Device { ids, .. }) if ids.contains_key("loop/inode")));
    let before = image.device_writes();
    image.write_at(0, &[1; 4096]).and_then(|()| image.sync_data()).expect("writes");
    assert!(before.is_some() && image.device_writes() != before, "a write shows: {before:?}");
}

#[test]
fn a_device_that_holds_something_is_not_overwritten_unasked() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sparse(&dir, "a", 1 << 20);
    fs::write(&path, [b"LUKS\xba\xbe".as_slice(), &[0; 1 << 20]].concat()).expect("writes");
    let Some(device) = Loop::over(&path) else { return };
    let refused = Image::create(device.path(), 1 << 19, Overwrite::OnlyBlank).expect_err("holds something");
    assert!(matches!(refused, ImageError::Signature { .. }), "{refused}");
    assert!(refused.to_string().contains("LUKS") && refused.to_string().contains("--overwrite"), "{refused}");
    let image = Image::create(device.path(), 1 << 19, Overwrite::Anything).expect("a person said so");
    assert_eq!((image.size_bytes(), image.was_made()), (1 << 19, false));
    assert_eq!(image.unlink_if_ours().expect("looks"), Unlinked::NotMade);
}

#[test]
fn another_disk_behind_a_devices_name_is_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let (one, two) = (sparse(&dir, "one", 1 << 20), sparse(&dir, "two", 1 << 20));
    let (Some(first), Some(second)) = (Loop::over(&one), Loop::over(&two)) else { return };
    let noted = Image::open_write(first.path()).and_then(|image| image.note(true)).expect("notes");
    let image = Image::open_write(second.path()).expect("opens");
    assert!(matches!(image.recognise(&noted), Err(ImageError::NotTheSame { .. })), "though both are blank");
    drop(image);
    let image = Image::open_write(first.path()).expect("opens");
    assert_eq!(image.recognise(&noted).expect("is the same"), Verdict::Same);
}

/// A disk of which nothing matters but how it syncs.
struct Syncs<F>(F);

impl<F> std::fmt::Debug for Syncs<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a disk that syncs as it is told")
    }
}

impl<F: Fn() -> std::io::Result<()> + Send + Sync + 'static> Backend for Syncs<F> {
    fn read_at(&self, _: &mut [u8], _: u64) -> std::io::Result<usize> {
        Ok(0)
    }
    fn read_cached_at(&self, _: &mut [u8], _: u64) -> Option<std::io::Result<()>> {
        None
    }
    fn write_at(&self, _: &[u8], _: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> std::io::Result<()> {
        Ok(())
    }
    fn sync_data(&self) -> std::io::Result<()> {
        (self.0)()
    }
    fn next_data(&self, _: u64) -> std::io::Result<Option<std::ops::Range<u64>>> {
        Ok(None)
    }
    fn stamp(&self) -> std::io::Result<Stamp> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn allocated_bytes(&self) -> std::io::Result<u64> {
        Ok(0)
    }
}

/// The kernel tells of what it lost once.
fn fails_once() -> impl Fn() -> std::io::Result<()> {
    let told = std::sync::atomic::AtomicBool::new(false);
    move || match told.swap(true, std::sync::atomic::Ordering::SeqCst) {
        true => Ok(()),
        false => Err(std::io::Error::from_raw_os_error(nix::libc::EIO)),
    }
}

#[test]
fn a_sync_that_failed_for_one_fails_for_all() {
    let image = Image::over(Box::new(Syncs(fails_once())), Path::new("disk"), 1 << 20, true);
    image.sync_data().expect_err("the disk fails");
    let error = image.sync_data().expect_err("what was lost stays lost").to_string();
    assert!(error.contains("earlier sync failed"), "{error}");
}

#[test]
fn of_two_syncs_at_once_that_fail_both_fail() {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
    let (within, fails) = (AtomicU32::new(0), fails_once());
    // A disk that loses what two wait for, and tells one of them, as the kernel does.
    let syncs = move || {
        within.fetch_add(1, SeqCst);
        // For the other one, who may come; not for ever.
        for _ in 0..200 {
            if within.load(SeqCst) == 2 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        fails()
    };
    let image = Image::over(Box::new(Syncs(syncs)), Path::new("disk"), 1 << 20, true);
    std::thread::scope(|scope| {
        let (one, other) = (scope.spawn(|| image.sync_data()), scope.spawn(|| image.sync_data()));
        for synced in [one, other] {
            synced.join().expect("does not panic").expect_err("what it waited for is lost");
        }
    });
}
