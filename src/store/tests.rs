//! One set of promises for both stores, then what only the one on disk can break.

use std::fs;
use std::path::Path;

use super::*;

const MIB: u64 = 1 << 20;

fn raw(number: u64, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes.into()
}

/// A block that does not shrink, and its frame.
fn block(number: u64, len: usize) -> (BlockId, Frame) {
    let raw = raw(number, len);
    (BlockId::of(&raw), Frame::encode(&raw, 1))
}

fn small(capacity_bytes: u64) -> StoreOptions {
    StoreOptions { capacity_bytes, memory_bytes: 4 * MIB, write_bytes_per_s: None }
}

fn open(dir: &Path, capacity_bytes: u64) -> RocksStore {
    RocksStore::open(dir, small(capacity_bytes)).expect("a store")
}

/// Runs `check` on an empty store of each kind.
fn on_each_kind(capacity_bytes: u64, check: impl Fn(&dyn Store)) {
    check(&MemoryStore::new(capacity_bytes));
    let dir = tempfile::tempdir().expect("a folder");
    check(&open(&dir.path().join("store"), capacity_bytes));
}

#[test]
fn what_is_put_is_got() {
    on_each_kind(64 * MIB, |store| {
        // Some lie in blobs, some in the tree, some in either compressed.
        let mut blocks: Vec<_> = (0..200).map(|i| block(i, [65536, 512, 33, 16384][i as usize % 4])).collect();
        let text = Bytes::from(b"blockferry ".repeat(5000));
        blocks.push((BlockId::of(&text), Frame::encode(&text, 3)));
        let empty = Bytes::new();
        let absent = block(1000, 65536).0;
        store.put(&blocks).expect("put");
        for flush in [false, true] {
            if flush {
                store.flush().expect("flush");
            }
            let mut ids: Vec<_> = blocks.iter().map(|(id, _)| *id).collect();
            ids.insert(7, absent);
            let found = store.get(&ids).expect("get");
            let frames = store.get_frames(&ids).expect("get_frames");
            let there = store.contains(&ids).expect("contains");
            for (i, id) in ids.iter().enumerate() {
                assert_eq!(there[i], i != 7);
                assert_eq!(found[i].is_some(), i != 7);
                let bytes = found[i].as_ref().unwrap_or(&empty);
                assert!(i == 7 || BlockId::of(bytes) == *id);
                let frame = blocks.iter().find(|(put, _)| put == id).map(|(_, frame)| frame);
                assert_eq!(frames[i].as_ref(), frame);
            }
        }
        let stats = store.stats();
        assert_eq!((stats.hits, stats.misses, stats.puts), (4 * 201, 4, 201));
        assert_eq!(stats.put_raw_bytes * 4, stats.hit_raw_bytes);
        assert!(stats.put_stored_bytes < stats.put_raw_bytes, "{stats:?}");
        assert!(stats.stored_bytes >= stats.put_stored_bytes, "{stats:?}");
        assert_eq!((stats.blocks_estimate, stats.capacity_bytes), (201, 64 * MIB));
        assert_eq!((stats.corrupt_dropped, stats.renewed), (0, 0));
    });
}

#[test]
fn asking_for_nothing_and_asking_twice_are_fine() {
    on_each_kind(64 * MIB, |store| {
        assert!(store.get(&[]).expect("get").is_empty());
        assert!(store.contains(&[]).expect("contains").is_empty());
        store.put(&[]).expect("put");
        store.remove(&[]).expect("remove");
        let (id, frame) = block(1, 4096);
        store.put(&[(id, frame.clone()), (id, frame)]).expect("put");
        assert_eq!(store.get(&[id, id, BlockId::ZERO]).expect("get").iter().flatten().count(), 2);
        assert_eq!(store.contains(&[BlockId::ZERO]).expect("contains"), [false]);
    });
}

#[test]
fn what_is_removed_is_gone() {
    on_each_kind(64 * MIB, |store| {
        let blocks: Vec<_> = (0..10).map(|i| block(i, 8192)).collect();
        let ids: Vec<_> = blocks.iter().map(|(id, _)| *id).collect();
        store.put(&blocks).expect("put");
        store.flush().expect("flush");
        store.remove(&ids[..5]).expect("remove");
        store.remove(&ids[..1]).expect("removing what is not there");
        let want: Vec<_> = (0..10).map(|i| i >= 5).collect();
        assert_eq!(store.contains(&ids).expect("contains"), want);
        assert_eq!(store.get(&ids).expect("get").iter().map(Option::is_some).collect::<Vec<_>>(), want);
        store.put(&blocks[..1]).expect("put again");
        assert_eq!(store.contains(&ids[..1]).expect("contains"), [true]);
    });
}

#[test]
fn a_frame_of_another_block_is_dropped_and_counted() {
    on_each_kind(64 * MIB, |store| {
        let (good, frame) = block(1, 65536);
        let bad = BlockId([7; 32]);
        store.put(&[(good, frame.clone()), (bad, frame)]).expect("put");
        let found = store.get(&[bad, good]).expect("get");
        assert_eq!(found.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true]);
        assert_eq!(store.contains(&[bad, good]).expect("contains"), [false, true]);
        let stats = store.stats();
        assert_eq!((stats.corrupt_dropped, stats.hits, stats.misses), (1, 1, 1));
    });
}

#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "zero blocks are never stored")]
fn a_zero_block_is_a_bug() {
    let zeros = Bytes::from(vec![0; 65536]);
    let _ = MemoryStore::new(MIB).put(&[(BlockId::of(&zeros), Frame::encode(&zeros, 1))]);
}

#[test]
fn a_full_store_drops_the_oldest_and_keeps_what_is_hit() {
    let capacity = 32 * MIB;
    let check = |store: &dyn Store, settle: &dyn Fn()| {
        let len = 65536;
        let hot: Vec<_> = (0..20).map(|i| block(i, len)).collect();
        let hot_ids: Vec<_> = hot.iter().map(|(id, _)| *id).collect();
        store.put(&hot).expect("put");
        // Six times the capacity.
        let cold = 6 * capacity / len as u64;
        for first in (0..cold).step_by(16) {
            let blocks: Vec<_> = (first..first + 16).map(|i| block(1_000_000 + i, len)).collect();
            store.put(&blocks).expect("put");
            assert_eq!(store.get(&hot_ids).expect("get").iter().flatten().count(), 20, "after {first} blocks");
        }
        store.flush().expect("flush");
        settle();
        let stats = store.stats();
        assert!(stats.stored_bytes <= capacity + capacity / 8, "{stats:?}");
        assert!(stats.stored_bytes >= capacity / 2, "{stats:?}");
        // Each hot block about twice for each capacity that was put, not at every hit.
        let hits = stats.hits;
        assert!((6 * 20..hits / 4).contains(&stats.renewed), "{stats:?}");
        let is_there = |number: u64| store.contains(&[block(1_000_000 + number, len).0]).expect("contains")[0];
        assert!((0..cold / 2).all(|number| !is_there(number)), "old blocks are dropped");
        assert!((cold - 128..cold).all(is_there), "new blocks are kept");
    };
    check(&MemoryStore::new(capacity), &|| ());
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path(), capacity);
    check(&store, &|| store.wait_for_background());
}

#[test]
fn what_was_hit_while_the_disk_was_busy_is_put_again_with_the_next_blocks() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path(), 32 * MIB);
    let blocks: Vec<_> = (0..384).map(|i| block(i, 65536)).collect();
    let ids: Vec<_> = blocks.iter().map(|(id, _)| *id).collect();
    blocks.chunks(16).for_each(|blocks| store.put(blocks).expect("put"));
    // Two old ones (one twice), a young one, one that is removed, one that was never there.
    store.postpone(&[ids[0], ids[1], ids[383], ids[2], block(1000, 65536).0]);
    store.postpone(&[ids[0]]);
    store.remove(&ids[2..3]).expect("remove");
    store.put(&[]).expect("put");
    assert_eq!(store.stats().renewed, 0, "a put takes no more with it than it has itself");
    store.put(&(400..416).map(|i| block(i, 65536)).collect::<Vec<_>>()).expect("put");
    assert_eq!(store.stats().renewed, 2);
    assert_eq!(store.contains(&ids[..3]).expect("contains"), [true, true, false]);
    assert_eq!(store.get(&ids[..2]).expect("get").iter().flatten().count(), 2);
    assert_eq!(store.stats().renewed, 2, "they are young again");
    store.put(&[block(500, 65536)]).expect("put");
    assert_eq!(store.stats().renewed, 2, "once");
}

#[test]
fn the_twin_can_be_damaged_and_fail() {
    let store = MemoryStore::new(MIB);
    let blocks = [block(1, 4096), block(2, 4096)];
    let ids = blocks.each_ref().map(|(id, _)| *id);
    store.put(&blocks).expect("put");
    assert!(store.corrupt(&ids[0]));
    assert!(!store.corrupt(&BlockId([9; 32])));
    assert!(store.contains(&ids).expect("contains")[0], "nobody has noticed yet");
    assert_eq!(store.get(&ids).expect("get").iter().map(Option::is_some).collect::<Vec<_>>(), [false, true]);
    assert!(!store.corrupt(&ids[0]));
    store.fail_with(Some("the disk is on fire"));
    let error = store.get(&ids).expect_err("it fails");
    assert!(error.to_string().contains("on fire"), "{error}");
    assert!(store.put(&blocks).is_err() && store.contains(&ids).is_err() && store.remove(&ids).is_err());
    assert!(store.flush().is_err());
    store.fail_with(None);
    assert!(store.get(&ids).is_ok());
}

#[test]
fn a_store_is_still_there_when_it_is_opened_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("store");
    let blocks: Vec<_> = (0..50).map(|i| block(i, 65536)).collect();
    let ids: Vec<_> = blocks.iter().map(|(id, _)| *id).collect();
    {
        let store = open(&path, 64 * MIB);
        store.put(&blocks[..25]).expect("put");
        store.flush().expect("flush");
        // What a crash would lose, an orderly end does not.
        store.put(&blocks[25..]).expect("put");
    }
    let store = open(&path, 64 * MIB);
    assert_eq!(store.get(&ids).expect("get").iter().flatten().count(), 50);
}

#[test]
fn a_smaller_capacity_takes_effect_when_the_store_is_opened() {
    let dir = tempfile::tempdir().expect("a folder");
    let blocks: Vec<_> = (0..48 * MIB / 65536).map(|i| block(i, 65536)).collect();
    {
        let store = open(dir.path(), 256 * MIB);
        blocks.chunks(16).for_each(|blocks| store.put(blocks).expect("put"));
        store.flush().expect("flush");
        assert!(store.stats().stored_bytes >= 48 * MIB);
    }
    let store = open(dir.path(), 16 * MIB);
    store.put(&[block(1_000_000, 65536)]).expect("put");
    store.flush().expect("flush");
    store.wait_for_background();
    let stats = store.stats();
    assert!(stats.stored_bytes <= 18 * MIB, "{stats:?}");
}

#[test]
fn a_large_number_of_flushes_leaves_few_files_to_ask() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path(), 4096 * MIB);
    // Small blocks, and a flush after every few: 300 files, were they not merged.
    for first in (0..300 * 40).step_by(40) {
        let blocks: Vec<_> = (first..first + 40).map(|i| block(i, 2048)).collect();
        store.put(&blocks).expect("put");
        store.flush().expect("flush");
    }
    store.wait_for_background();
    let files = store.tree_files();
    assert!((1..=64).contains(&files), "{files} files");
    let ids: Vec<_> = (0..300 * 40).step_by(97).map(|i| block(i, 2048).0).collect();
    assert_eq!(store.get(&ids).expect("get").iter().flatten().count(), ids.len());
}

#[test]
fn a_store_that_is_open_elsewhere_is_said_to_be() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("store");
    let store = open(&path, 64 * MIB);
    let error = RocksStore::open(&path, small(64 * MIB)).err().expect("it is locked");
    assert!(matches!(error, StoreError::InUse { .. }), "{error:?}");
    assert!(error.to_string().contains("in use by another process"), "{error}");
    // And it was not moved aside.
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 1);
    drop(store);
    open(&path, 64 * MIB);
}

/// Damages the files of a closed store and opens it.
fn after_damage(damage: impl Fn(&Path)) -> (tempfile::TempDir, RocksStore, Vec<BlockId>) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("store");
    let blocks: Vec<_> = (0..40).map(|i| block(i, 65536)).collect();
    {
        let store = open(&path, 64 * MIB);
        store.put(&blocks).expect("put");
        store.flush().expect("flush");
    }
    for entry in fs::read_dir(&path).expect("a folder") {
        damage(&entry.expect("an entry").path());
    }
    let store = open(&path, 64 * MIB);
    (dir, store, blocks.into_iter().map(|(id, _)| id).collect())
}

fn has_name(path: &Path, text: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains(text))
}

#[test]
fn a_broken_database_is_moved_aside() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("CURRENT points nowhere", |path| {
            if has_name(path, "CURRENT") {
                fs::write(path, "MANIFEST-999999\n").expect("write");
            }
        }),
        ("the manifest is garbage", |path| {
            if has_name(path, "MANIFEST") {
                fs::write(path, [0x55; 4096]).expect("write");
            }
        }),
        ("the tree's files are gone", |path| {
            if has_name(path, ".sst") {
                fs::remove_file(path).expect("remove");
            }
        }),
        ("the tree's files are cut", |path| {
            if has_name(path, ".sst") {
                fs::write(path, b"short").expect("write");
            }
        }),
    ];
    for (name, damage) in damages {
        let (dir, store, ids) = after_damage(damage);
        assert!(dir.path().join("store.broken-1").is_dir(), "{name}");
        assert!(store.get(&ids).expect(name).iter().all(Option::is_none), "{name}");
        store.put(&[block(1, 65536)]).expect(name);
        assert!(store.get(&[block(1, 65536).0]).expect(name)[0].is_some(), "{name}");
    }
}

#[test]
fn a_second_broken_database_gets_another_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("store");
    for number in 1..=2 {
        drop(open(&path, 64 * MIB));
        fs::write(path.join("CURRENT"), "garbage").expect("write");
        drop(open(&path, 64 * MIB));
        assert!(dir.path().join(format!("store.broken-{number}")).is_dir());
    }
}

#[test]
fn flipped_bits_in_blobs_cost_those_blocks_only() {
    let (dir, store, ids) = after_damage(|path| {
        if has_name(path, ".blob") {
            let mut bytes = fs::read(path).expect("read");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(path, bytes).expect("write");
        }
    });
    assert!(!dir.path().join("store.broken-1").exists());
    let found = store.get(&ids).expect("get");
    let stats = store.stats();
    assert!((1..10).contains(&stats.corrupt_dropped), "{stats:?}");
    assert_eq!(found.iter().flatten().count() as u64, 40 - stats.corrupt_dropped);
    // Dropped: the next one to ask is told that they are not there.
    assert_eq!(store.contains(&ids).expect("contains").iter().filter(|there| **there).count() as u64, stats.hits);
}

#[test]
fn a_folder_that_is_deleted_under_the_store_is_an_error_and_no_panic() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("store");
    let store = open(&path, 64 * MIB);
    let blocks: Vec<_> = (0..40).map(|i| block(i, 65536)).collect();
    let ids: Vec<_> = blocks.iter().map(|(id, _)| *id).collect();
    store.put(&blocks).expect("put");
    store.flush().expect("flush");
    fs::remove_dir_all(&path).expect("remove");
    // Blobs are opened when they are first read.
    let error = store.get(&ids).expect_err("there are no files");
    assert!(matches!(error, StoreError::Failed { .. }), "{error:?}");
    let more: Vec<_> = (100..140).map(|i| block(i, 65536)).collect();
    let _ = store.put(&more);
    let error = store.flush().expect_err("there is no folder");
    assert!(error.to_string().contains("content store"), "{error}");
    assert!(store.put(&more).is_err(), "RocksDB takes no more after that");
    let _ = (store.contains(&ids), store.stats(), store.remove(&ids));
}

#[test]
fn a_place_where_nothing_can_be_made_is_an_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("file");
    fs::write(&file, "no folder").expect("write");
    for path in [file.clone(), file.join("store")] {
        let error = RocksStore::open(&path, small(MIB)).err().expect("a file is in the way");
        assert!(matches!(error, StoreError::Unusable { .. }), "{error:?}");
    }
    assert!(file.is_file());
}

#[test]
fn threads_share_a_store() {
    on_each_kind(256 * MIB, |store| {
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                scope.spawn(move || {
                    for i in 0..50 {
                        let (id, frame) = block(thread * 25 + i, 4096);
                        store.put(&[(id, frame)]).expect("put");
                        assert_eq!(store.get(&[id]).expect("get")[0].as_ref().map(|raw| BlockId::of(raw)), Some(id));
                    }
                });
            }
        });
        assert_eq!(store.stats().hits, 200);
    });
}
