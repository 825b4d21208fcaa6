//! What is taken for the image that was noted.

use std::fs;
use std::os::unix::fs::FileExt;

use super::*;

fn identity(inode: u64) -> Identity {
    Identity::File { device: 1, inode, born_ns: Some(5), size_bytes: 1 << 20 }
}

fn disk(serial: &str) -> Identity {
    let ids = [("serial".to_owned(), serial.to_owned())].into();
    Identity::Device { number: 1, size_bytes: 1 << 20, ids }
}

fn mark(hash: &str) -> Mark {
    Mark { size_bytes: 1 << 20, hash: hash.into() }
}

#[test]
fn the_table_of_what_is_taken_for_the_same() {
    let (one, two) = (mark("1"), mark("2"));
    let noted = |identity, mark: Option<&Mark>| Noted { identity, mark: mark.cloned() };
    let same = Ok("same");
    for (noted, now, found, expected) in [
        (noted(identity(7), None), identity(7), None, same),
        (noted(identity(7), None), identity(7), Some(&one), same),
        (noted(identity(7), Some(&one)), identity(7), Some(&one), same),
        (noted(identity(7), Some(&one)), identity(7), Some(&two), Err("other content than when this site last had it")),
        (noted(identity(7), Some(&one)), identity(7), None, Err("not compared")),
        (noted(identity(7), None), identity(8), None, Err("inode 8, noted was 7, and what it held is not known")),
        (noted(identity(7), None), identity(8), Some(&one), Err("not known")),
        (noted(identity(7), Some(&one)), identity(8), Some(&one), Ok("same content")),
        (noted(identity(7), Some(&one)), identity(8), Some(&two), Err("last had it (another file lies there")),
        (noted(identity(7), Some(&one)), identity(8), None, Err("not compared")),
        (noted(disk("A"), None), disk("A"), None, same),
        (noted(disk("A"), Some(&one)), disk("B"), Some(&one), Err("serial is B, noted was A")),
        (noted(disk("A"), None), disk("B"), None, Err("another device")),
    ] {
        let judged = judge(&noted, &now, found);
        match (&judged, expected) {
            (Ok(Verdict::Same), Ok("same")) | (Ok(Verdict::SameContent(_)), Ok("same content")) => {}
            (Err(why), Err(words)) => assert!(why.to_string().contains(words), "{why}"),
            _ => panic!("{noted:?} and {now:?} with {found:?}: {judged:?}"),
        }
    }
}

#[test]
fn samples_cover_both_ends_and_stay_within() {
    for size in [1, 511, 4096, 4097, 100_000, 64 * 4096, 65 * 4096 + 512, 1 << 30, (1 << 40) + 512] {
        let at = positions(size);
        assert_eq!(at[0], 0, "{size}");
        assert!(at.len() as u64 <= SAMPLES + 1 && at.windows(2).all(|pair| pair[0] < pair[1]), "{size}: {at:?}");
        let last = at.last().expect("one");
        assert!(*last < size && size - last <= SAMPLE_BYTES, "{size}: {last}");
    }
    assert_eq!(positions(64 * 4096).len(), 64, "a small image is looked at as a whole");
}

#[test]
fn another_file_under_the_path_is_refused_unless_it_holds_the_same() {
    let dir = tempfile::tempdir().expect("a folder");
    let (path, copy) = (dir.path().join("a"), dir.path().join("b"));
    let bytes: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    fs::write(&path, &bytes).expect("writes");
    let noted = Image::open_write(&path).and_then(|image| image.note(true)).expect("notes");
    let look = || Image::open_write(&path).and_then(|image| image.recognise(&noted));
    assert_eq!(look().expect("untouched"), Verdict::Same);

    fs::copy(&path, &copy).expect("copies");
    fs::rename(&copy, &path).expect("renames");
    assert!(matches!(look().expect("a restored backup"), Verdict::SameContent(_)));

    fs::File::options().write(true).open(&path).and_then(|file| file.set_len(2 << 20)).expect("grows");
    assert!(matches!(look().expect("grown"), Verdict::SameContent(_)));

    fs::File::options().write(true).open(&path).and_then(|file| file.write_all_at(&[9], 1)).expect("writes");
    let refused = look().expect_err("another disk").to_string();
    assert!(refused.contains("other content") && refused.contains("put the right image back"), "{refused}");
    assert!(refused.contains(&path.display().to_string()), "{refused}");
}
