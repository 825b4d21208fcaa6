//! What is the same thing.

use super::*;

fn file(device: u64, inode: u64, born_ns: Option<u64>) -> Identity {
    Identity::File { device, inode, born_ns, size_bytes: 4096 }
}

fn device(ids: &[(&str, &str)]) -> Identity {
    let ids = ids.iter().map(|(name, id)| (name.to_string(), id.to_string())).collect();
    Identity::Device { number: 1792, size_bytes: 4096, ids }
}

fn word(noted: &Identity, now: &Identity) -> &'static str {
    match noted.is_same_thing(now) {
        Sameness::Same => "same",
        Sameness::Unsure(why) | Sameness::Other(why) if why.is_empty() => "without a reason",
        Sameness::Unsure(_) => "unsure",
        Sameness::Other(_) => "other",
    }
}

#[test]
fn files_are_told_apart_by_their_inode_and_its_birth() {
    let noted = file(1, 7, Some(100));
    for (now, expected) in [
        (file(1, 7, Some(100)), "same"),
        (file(2, 7, Some(100)), "same"),
        (file(1, 7, Some(101)), "unsure"),
        (file(1, 8, Some(100)), "unsure"),
        (file(1, 7, None), "same"),
        (file(2, 7, None), "unsure"),
        (device(&[]), "unsure"),
    ] {
        assert_eq!(word(&noted, &now), expected, "{now:?}");
    }
    let grown = Identity::File { device: 1, inode: 7, born_ns: Some(100), size_bytes: 8192 };
    assert_eq!(word(&noted, &grown), "same");
}

#[test]
fn devices_are_told_apart_by_what_is_behind_them() {
    let disk = device(&[("wwid", "naa.1"), ("serial", "A")]);
    for (now, expected) in [
        (device(&[("wwid", "naa.1"), ("serial", "A")]), "same"),
        (device(&[("wwid", "naa.1")]), "same"),
        (device(&[("wwid", "naa.2"), ("serial", "A")]), "other"),
        (device(&[("serial", "B")]), "other"),
        (device(&[]), "unsure"),
        (device(&[("dm/uuid", "LVM-x")]), "unsure"),
    ] {
        assert_eq!(word(&disk, &now), expected, "{now:?}");
    }
    assert_eq!(word(&device(&[]), &device(&[])), "unsure");
    let looped = device(&[("loop/inode", "7"), ("loop/device", "1")]);
    assert_eq!(word(&looped, &looped), "same");
    assert_eq!(word(&looped, &device(&[("loop/inode", "8"), ("loop/device", "1")])), "other");
    assert_eq!(word(&looped, &device(&[("loop/inode", "7"), ("loop/device", "2")])), "unsure");
    let part = device(&[("partition", "1")]);
    assert_eq!(word(&part, &part), "unsure", "a number of a partition names no disk");
}

#[test]
fn a_file_that_is_renamed_stays_itself_and_a_copy_is_another() {
    let dir = tempfile::tempdir().expect("a folder");
    let (path, copy) = (dir.path().join("a"), dir.path().join("b"));
    fs::write(&path, [1; 4096]).expect("writes");
    let noted = Image::open_write(&path).and_then(|image| image.identity()).expect("an identity");
    fs::copy(&path, &copy).expect("copies");
    fs::rename(&path, dir.path().join("c")).expect("renames");
    let moved = Image::open_write(&dir.path().join("c")).and_then(|image| image.identity()).expect("an identity");
    assert_eq!(noted.is_same_thing(&moved), Sameness::Same);
    let copied = Image::open_write(&copy).and_then(|image| image.identity()).expect("an identity");
    assert!(matches!(noted.is_same_thing(&copied), Sameness::Unsure(_)));
    let row = serde_json::to_vec(&noted).expect("a row");
    assert_eq!(serde_json::from_slice::<Identity>(&row).expect("reads back"), noted);
}
