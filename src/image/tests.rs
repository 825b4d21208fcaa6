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
    let nowhere = Image::create(&dir.path().join("no/such/x"), 4096).expect_err("no folder");
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
    let image = Image::create(&path, (1 << 20) + 512).expect("creates");
    assert_eq!(fs::metadata(&path).expect("there").len(), (1 << 20) + 512);
    assert_eq!(image.allocated_bytes().expect("asks"), 0);
    let in_use = Image::create(&path, 1 << 20).expect_err("in use");
    assert!(matches!(in_use, ImageError::InUse { .. }), "{in_use}");
    assert!(matches!(Image::open_write(&path), Err(ImageError::InUse { .. })));
    drop(image);
    let exists = Image::create(&path, 1 << 20).expect_err("exists");
    assert!(matches!(exists, ImageError::Exists { .. }), "{exists}");
    Image::open_write(&path).expect("opens once it is free");
}

#[test]
fn a_destination_that_a_crash_left_empty_is_taken() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("new");
    for left_bytes in [0, 1 << 20] {
        File::create(&path).and_then(|file| file.set_len(left_bytes)).expect("made");
        let image = Image::create(&path, 1 << 20).expect("takes what holds nothing");
        assert_eq!((image.size_bytes(), fs::metadata(&path).expect("there").len()), (1 << 20, 1 << 20));
        assert!(matches!(Image::create(&path, 1 << 20), Err(ImageError::InUse { .. })));
    }
    // Something is in it, be it a zero.
    Image::open_write(&path).and_then(|image| image.write_at(70_000, &[0])).expect("writes");
    let exists = Image::create(&path, 1 << 20).expect_err("exists");
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
