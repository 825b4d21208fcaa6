//! What is remembered of an image, and when it must be forgotten.

use std::os::unix::fs::FileExt;

use super::*;
use crate::store::MemoryState;

const BLOCK: u64 = 16384;
/// Three pages, the last one short; the second is a hole.
const SIZE: u64 = 2 * 1024 * BLOCK + 5 * BLOCK + 100;

struct Lab {
    dir: tempfile::TempDir,
    state: Arc<MemoryState>,
    is_released: bool,
}

impl Lab {
    fn new() -> Lab {
        let (dir, state) = (tempfile::tempdir().expect("a folder"), Arc::new(MemoryState::new()));
        let lab = Lab { dir, state, is_released: false };
        let file = std::fs::File::create(lab.path()).expect("creates");
        file.set_len(SIZE).expect("grows");
        file.write_all_at(&[1; 3 * BLOCK as usize], 2 * BLOCK).expect("writes");
        file.write_all_at(&[2; 100], SIZE - 100).expect("writes");
        lab
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("image")
    }

    fn open(&self) -> Manifest {
        let image = Arc::new(Image::open_write(&self.path()).expect("opens"));
        let geometry = Geometry::new(SIZE, BLOCK).expect("a geometry");
        let state = Arc::clone(&self.state) as Arc<dyn State>;
        Manifest::open("vm".parse().expect("a name"), image, geometry, state, self.is_released).expect("opens")
    }
}

fn hash_all(manifest: &Manifest) {
    let mut from = PageIndex(0);
    while let Some(page) = manifest.next_unknown(from) {
        manifest.hash_page(page).expect("hashes");
        from = PageIndex(page.0 + 1);
    }
}

/// A guest's write, as a volume makes it.
fn write(manifest: &Manifest, offset: u64, bytes: &[u8]) {
    let range = offset..offset + bytes.len() as u64;
    manifest.note_write(range.clone()).expect("notes");
    manifest.image.write_at(offset, bytes).expect("writes");
    manifest.note_write(range).expect("notes");
}

#[test]
fn holes_are_known_at_once_and_ids_are_those_of_the_bytes() {
    let lab = Lab::new();
    let manifest = lab.open();
    assert_eq!(manifest.roots(PageIndex(0), 9), [RootEntry::Unknown, RootEntry::Zero, RootEntry::Unknown]);
    let first = manifest.page(PageIndex(0)).expect("hashes");
    assert_eq!(first.ids().len(), 1024);
    for (block, id) in first.ids().iter().enumerate() {
        let expected = if (2..5).contains(&block) { BlockId::of(&[1; BLOCK as usize]) } else { BlockId::ZERO };
        assert_eq!(*id, expected, "block {block}");
    }
    let last = manifest.page(PageIndex(2)).expect("hashes");
    assert_eq!(last.ids().len(), 6);
    assert_eq!(last.ids()[5], BlockId::of(&[2; 100]), "the short block is hashed as it is");
    assert_eq!(manifest.hashed_pages(), 3);
    assert_eq!(manifest.roots(PageIndex(0), 1), [RootEntry::Known(first.id())]);
}

#[test]
fn an_unchanged_image_is_never_hashed_twice() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    let roots = manifest.roots(PageIndex(0), 3);
    drop(manifest);
    let again = lab.open();
    assert_eq!(again.hashed_pages(), 3);
    assert_eq!(again.roots(PageIndex(0), 3), roots);
    assert_eq!(
        again.page(PageIndex(0)).expect("from the database").id_of(BlockIndex(2)),
        Some(BlockId::of(&[1; BLOCK as usize]))
    );
}

#[test]
fn an_image_that_somebody_changed_is_hashed_anew() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    drop(manifest);
    let file = std::fs::File::options().write(true).open(lab.path()).expect("opens");
    file.write_all_at(&[9; 512], 3 * BLOCK).expect("writes");
    let again = lab.open();
    assert_eq!(again.hashed_pages(), 1, "only the hole is known");
    assert_ne!(again.page(PageIndex(0)).expect("hashes").id_of(BlockIndex(3)), Some(BlockId::of(&[1; BLOCK as usize])));
}

#[test]
fn a_guests_write_is_forgotten_even_if_the_machine_dies_right_after_it() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    let stamp = manifest.image.stamp().expect("asks").expect("a file");
    write(&manifest, 2 * BLOCK, &[7; 512]);
    assert_eq!(manifest.roots(PageIndex(0), 1), [RootEntry::Unknown]);
    drop(manifest);
    // Worst case: the bytes are on the disk, the times are not, and of the database only what was synced.
    lab.state.lose_unsynced();
    let times = std::fs::FileTimes::new()
        .set_modified(UNIX_EPOCH + Duration::from_nanos(u64::try_from(stamp.mtime_ns).expect("after 1970")));
    std::fs::File::options().write(true).open(lab.path()).and_then(|file| file.set_times(times)).expect("sets times");
    let again = lab.open();
    let mut expected = vec![1; BLOCK as usize];
    expected[..512].fill(7);
    assert_eq!(again.page(PageIndex(0)).expect("hashes").id_of(BlockIndex(2)), Some(BlockId::of(&expected)));
}

#[test]
fn what_was_written_and_sealed_is_known_after_a_restart() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    write(&manifest, 2 * BLOCK, &[7; 512]);
    manifest.image.sync_data().expect("syncs");
    manifest.seal().expect("seals");
    assert_eq!(manifest.next_unknown(PageIndex(0)), Some(PageIndex(0)));
    hash_all(&manifest);
    drop(manifest);
    let again = lab.open();
    assert_eq!(again.hashed_pages(), 3);
    let mut expected = vec![1; BLOCK as usize];
    expected[..512].fill(7);
    assert_eq!(again.page(PageIndex(0)).expect("kept").id_of(BlockIndex(2)), Some(BlockId::of(&expected)));
}

#[test]
fn a_sealed_image_that_changes_is_an_error() {
    let lab = Lab::new();
    let manifest = lab.open();
    manifest.hash_page(PageIndex(0)).expect("hashes");
    std::thread::sleep(TIMESTAMP_GRAIN);
    let file = std::fs::File::options().write(true).open(lab.path()).expect("opens");
    file.write_all_at(&[9; 512], 0).expect("writes behind our back");
    assert!(matches!(manifest.check_unchanged(), Err(SourceError::Changed { .. })));
    assert!(matches!(manifest.hash_page(PageIndex(2)), Err(SourceError::Changed { .. })));
}

#[test]
fn a_damaged_row_costs_a_hash() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    let expected = manifest.page(PageIndex(0)).expect("a page");
    let mut row = lab.state.get(&manifest.page_key(PageIndex(0))).expect("gets").expect("a row");
    row[100] ^= 1;
    lab.state.put(&manifest.page_key(PageIndex(0)), &row).expect("puts");
    assert_eq!(manifest.page(PageIndex(0)).expect("hashes"), expected);
}

#[test]
fn rows_that_a_write_overtook_are_not_believed_after_a_restart() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    // Hashed anew between two writes: the second one's page must not be found under the seal.
    write(&manifest, 2 * BLOCK, &[7; 512]);
    manifest.hash_page(PageIndex(0)).expect("hashes");
    write(&manifest, 3 * BLOCK, &[8; 512]);
    manifest.seal().expect("seals");
    drop(manifest);
    let again = lab.open();
    assert_eq!(again.roots(PageIndex(0), 1), [RootEntry::Unknown]);
    assert!(matches!(again.roots(PageIndex(2), 1)[..], [RootEntry::Known(_)]), "the others are");
}

#[test]
fn an_image_that_is_written_while_it_is_opened_is_not_believed() {
    let lab = Lab::new();
    let sealed = lab.open();
    hash_all(&sealed);
    drop(sealed);
    let image = Arc::new(Image::open_write(&lab.path()).expect("opens"));
    let geometry = Geometry::new(SIZE, BLOCK).expect("a geometry");
    let state = Arc::clone(&lab.state) as Arc<dyn State>;
    let name = "vm".parse().expect("a name");
    let manifest = Manifest::open_written(name, Arc::clone(&image), geometry, state).expect("opens");
    // A write that nobody noted, into what was a hole.
    image.write_at(1024 * BLOCK, &[9; 512]).expect("writes");
    write(&manifest, 0, &[7; 512]);
    hash_all(&manifest);
    let page = manifest.page(PageIndex(1)).expect("is known");
    assert!(!page.is_zero());
    manifest.check_unchanged().expect("nothing was promised yet");
}

#[test]
fn a_released_image_that_changed_while_nobody_looked_is_not_served() {
    let mut lab = Lab::new();
    let manifest = lab.open();
    manifest.seal().expect("seals");
    drop(manifest);
    lab.is_released = true;
    let again = lab.open();
    again.page(PageIndex(0)).expect("as it was");
    drop(again);
    std::thread::sleep(TIMESTAMP_GRAIN);
    let file = std::fs::File::options().write(true).open(lab.path()).expect("opens");
    file.write_all_at(&[9; 512], 3 * BLOCK).expect("writes");
    for _ in 0..2 {
        let changed = lab.open();
        assert!(matches!(changed.check_unchanged(), Err(SourceError::Changed { .. })));
        assert!(matches!(changed.page(PageIndex(2)), Err(SourceError::Changed { .. })));
    }
}
