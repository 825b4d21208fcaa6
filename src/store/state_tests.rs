//! One set of promises for both state databases, then what is special about each.

use std::fs;
use std::path::Path;

use super::state::end_of_prefix;
use super::*;

fn on_each_kind(check: impl Fn(&dyn State)) {
    check(&MemoryState::new());
    let dir = tempfile::tempdir().expect("a folder");
    check(&StateDb::open(&dir.path().join("state")).expect("a database"));
}

fn keys(state: &dyn State, prefix: &[u8]) -> Vec<String> {
    let found = state.scan_prefix(prefix).expect("scan");
    found.into_iter().map(|(key, _)| String::from_utf8_lossy(&key).into_owned()).collect()
}

#[test]
fn what_is_put_is_got() {
    on_each_kind(|state| {
        assert_eq!(state.get(b"a").expect("get"), None);
        state.put(b"a", b"1").expect("put");
        state.put(b"b", b"").expect("put");
        state.put(b"a", b"2").expect("put");
        state.delete(b"not there").expect("delete");
        assert_eq!(state.get(b"a").expect("get"), Some(b"2".to_vec()));
        let found = state.multi_get(&[b"b", b"x", b"a"]).expect("get");
        assert_eq!(found, [Some(vec![]), None, Some(b"2".to_vec())]);
        assert!(state.multi_get(&[]).expect("get").is_empty());
        state.delete(b"a").expect("delete");
        assert_eq!(state.get(b"a").expect("get"), None);
    });
}

#[test]
fn scans_are_ordered_and_end_with_the_prefix() {
    on_each_kind(|state| {
        for key in [&b"v/b"[..], b"v/a", b"v", b"v/", b"w", b"v/\xff", b"v/\xff\xff", b"u/z", b"\xff", b"\xff\xff"] {
            state.put(key, key).expect("put");
        }
        assert_eq!(state.scan_prefix(b"v/").expect("scan").len(), 5);
        assert_eq!(keys(state, b"v/")[..3], ["v/", "v/a", "v/b"]);
        assert_eq!(state.scan_prefix(b"\xff").expect("scan").len(), 2);
        assert_eq!(state.scan_prefix(b"").expect("scan").len(), 10);
        assert!(state.scan_prefix(b"x").expect("scan").is_empty());
        let mut seen = 0;
        state
            .scan(b"v", &mut |key, value| {
                assert_eq!(key, value);
                seen += 1;
                seen < 2
            })
            .expect("scan");
        assert_eq!(seen, 2);
    });
}

#[test]
fn a_batch_is_applied_in_order() {
    on_each_kind(|state| {
        for key in ["a/1", "a/2", "b/1"] {
            state.put(key.as_bytes(), b"old").expect("put");
        }
        let mut batch = StateBatch::default();
        assert!(batch.is_empty());
        batch.put("a/3", "new");
        batch.delete_prefix("a/");
        batch.put("a/4", "new");
        batch.delete("b/1");
        assert_eq!(batch.changes().len(), 4);
        state.write_batch(batch, true).expect("write");
        assert_eq!(keys(state, b""), ["a/4"]);

        state.put(b"\xff\xffx", b"old").expect("put");
        let mut batch = StateBatch::default();
        batch.put(b"\xff\xffy", "new");
        batch.delete_prefix(b"\xff\xff");
        batch.put(b"\xff\xffz", "new");
        state.write_batch(batch, false).expect("write");
        assert_eq!(state.scan_prefix(b"\xff").expect("scan"), [(b"\xff\xffz".to_vec(), b"new".to_vec())]);

        let mut everything = StateBatch::default();
        everything.delete_prefix("");
        state.write_batch(everything, false).expect("write");
        assert!(keys(state, b"").is_empty());
    });
}

#[test]
fn prefixes_end_where_they_should() {
    assert_eq!(end_of_prefix(b"ab"), Some(b"ac".to_vec()));
    assert_eq!(end_of_prefix(b"a\xff\xff"), Some(b"b".to_vec()));
    assert_eq!(end_of_prefix(b"\xff\xff"), None);
    assert_eq!(end_of_prefix(b""), None);
}

#[test]
fn the_twin_loses_what_was_not_synced() {
    let state = MemoryState::new();
    state.put(b"a", b"1").expect("put");
    state.sync().expect("sync");
    state.put(b"a", b"2").expect("put");
    state.put(b"b", b"2").expect("put");
    assert_eq!(state.unsynced_batches(), 2);
    state.crash(1);
    assert_eq!(keys(&state, b""), ["a"]);
    assert_eq!(state.get(b"a").expect("get"), Some(b"2".to_vec()), "a power cut may also spare something");
    state.put(b"a", b"3").expect("put");
    state.lose_unsynced();
    assert_eq!(state.get(b"a").expect("get"), Some(b"2".to_vec()));
    let mut batch = StateBatch::default();
    batch.put("c", "4");
    state.put(b"b", b"4").expect("put");
    state.write_batch(batch, true).expect("write");
    state.lose_unsynced();
    assert_eq!(keys(&state, b""), ["a", "b", "c"], "a sync takes everything before it along");
    assert_eq!(state.syncs(), 2);
}

#[test]
fn the_twin_can_fail() {
    let state = MemoryState::new();
    state.put(b"a", b"1").expect("put");
    state.fail_with(Some("no space"));
    assert!(state.put(b"a", b"2").expect_err("it fails").to_string().contains("no space"));
    assert!(state.sync().is_err() && state.get(b"a").is_err() && state.scan_prefix(b"").is_err());
    state.fail_with(None);
    assert_eq!(state.get(b"a").expect("get"), Some(b"1".to_vec()));
}

#[test]
fn a_database_is_still_there_when_it_is_opened_again() {
    let dir = tempfile::tempdir().expect("a folder");
    for round in 0..3u8 {
        let state = StateDb::open(dir.path()).expect("a database");
        assert_eq!(state.scan_prefix(b"round/").expect("scan").len(), usize::from(round));
        state.put(&[b"round/", &[round][..]].concat(), &[round; 5000]).expect("put");
        state.sync().expect("sync");
    }
}

#[test]
fn what_was_written_survives_the_process() {
    // A copy of the files at any moment is what is left when the process is killed at that moment.
    let dir = tempfile::tempdir().expect("a folder");
    let state = StateDb::open(&dir.path().join("state")).expect("a database");
    state.put(b"a", b"1").expect("put");
    let copy = dir.path().join("copy");
    copy_folder(&dir.path().join("state"), &copy);
    let copied = StateDb::open(&copy).expect("a database");
    assert_eq!(copied.get(b"a").expect("get"), Some(b"1".to_vec()));
}

#[test]
fn a_torn_end_of_the_log_loses_the_last_batches_only() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("state");
    let state = StateDb::open_under(&path, Some("before")).expect("a database");
    for i in 0..100u32 {
        state.put(&i.to_be_bytes(), &[i as u8; 100]).expect("put");
    }
    for cut in [1, 50, 1000] {
        let copy = dir.path().join(format!("cut-{cut}"));
        copy_folder(&path, &copy);
        for entry in fs::read_dir(&copy).expect("a folder") {
            let log = entry.expect("an entry").path();
            if log.extension().is_some_and(|extension| extension == "log") {
                let bytes = fs::read(&log).expect("read");
                if bytes.len() > cut {
                    fs::write(&log, &bytes[..bytes.len() - cut]).expect("write");
                }
            }
        }
        // Under the same boot the kernel has all of it: who misses it looks at damage.
        let error = StateDb::open_under(&copy, Some("before")).err().expect("something is missing");
        assert!(error.to_string().contains("missing from its end"), "{error}");
        let found = StateDb::open_under(&copy, Some("after")).expect("a database").scan_prefix(b"").expect("scan");
        assert!((80..100).contains(&found.len()), "{} of 100 after cutting {cut} bytes", found.len());
        for (i, (key, _)) in (0u32..).zip(&found) {
            assert_eq!(key[..], i.to_be_bytes(), "never one from the middle");
        }
    }
}

/// Bits that flip in what was there for certain: RocksDB by itself would begin with the records in front of them.
#[test]
fn damage_to_what_was_written_is_no_torn_end() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("state");
    let state = StateDb::open(&path).expect("a database");
    for i in 0..100u32 {
        state.put(&i.to_be_bytes(), &[i as u8; 100]).expect("put");
    }
    state.sync().expect("sync");
    let refused = |name: &str, damage: &dyn Fn(&Path)| {
        let copy = dir.path().join(name);
        copy_folder(&path, &copy);
        for entry in fs::read_dir(&copy).expect("a folder") {
            damage(&entry.expect("an entry").path());
        }
        let before = fs::read_dir(&copy).expect("a folder").count();
        // A second attempt finds the same: nothing was tidied up by the first.
        for boot in ["now", "later"] {
            let error = StateDb::open_under(&copy, Some(boot)).err().unwrap_or_else(|| panic!("{name} is opened"));
            assert!(matches!(error, StateError::Unusable { .. }), "{name}: {error:?}");
        }
        let logs = |entry: &std::io::Result<fs::DirEntry>| {
            entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("LOG"))
        };
        let added = fs::read_dir(&copy).expect("a folder").filter(logs).count();
        assert!(fs::read_dir(&copy).expect("a folder").count() <= before + added, "{name}");
    };
    let is_log = |path: &Path| path.extension().is_some_and(|extension| extension == "log");
    refused("flipped", &|path| {
        if is_log(path) {
            let mut bytes = fs::read(path).expect("read");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
            fs::write(path, bytes).expect("write");
        }
    });
    refused("deleted", &|path| {
        if is_log(path) {
            fs::remove_file(path).expect("remove");
        }
    });
    refused("without-current", &|path| {
        if path.ends_with("CURRENT") {
            fs::remove_file(path).expect("remove");
        }
    });
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("copy");
    }
}

#[test]
fn state_that_cannot_be_opened_is_left_alone() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("state");
    let state = StateDb::open(&path).expect("a database");
    state.put(b"a", b"1").expect("put");
    let error = StateDb::open(&path).err().expect("it is locked");
    assert!(matches!(error, StateError::InUse { .. }), "{error:?}");
    drop(state);
    let current = fs::read(path.join("CURRENT")).expect("read");
    fs::write(path.join("CURRENT"), "garbage").expect("write");
    let error = StateDb::open(&path).err().expect("it is broken");
    assert!(matches!(error, StateError::Unusable { .. }), "{error:?}");
    assert!(error.to_string().contains("left as it is"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 1);
    fs::write(path.join("CURRENT"), current).expect("write");
    assert_eq!(StateDb::open(&path).expect("mended").get(b"a").expect("get"), Some(b"1".to_vec()));
}

#[test]
fn a_folder_that_is_deleted_under_the_database_is_no_panic() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("state");
    let state = StateDb::open(&path).expect("a database");
    state.put(b"a", b"1").expect("put");
    fs::remove_dir_all(&path).expect("remove");
    // Its files are open: it may go on for a while. It must not crash.
    for i in 0..3000u32 {
        let _ = state.put(&i.to_be_bytes(), &[0; 4096]);
    }
    let _ = (state.sync(), state.get(b"a"), state.scan_prefix(b""));
    let error = state.put(b"b", b"1").expect_err("a new log could not be made");
    assert!(matches!(error, StateError::Failed { .. }), "{error:?}");
}
