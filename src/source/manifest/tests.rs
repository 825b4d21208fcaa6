//! What is remembered of an image, and when it must be forgotten.

use std::os::unix::fs::FileExt;

use std::time::{Duration, UNIX_EPOCH};

use super::rest::TIMESTAMP_GRAIN;
use super::*;
use crate::image::Stamp;
use crate::store::MemoryState;

const INCARNATION: Incarnation = Incarnation([7; 16]);

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

    /// Somebody else writes.
    fn change(&self, offset: u64, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(self.path()).expect("opens");
        file.write_all_at(bytes, offset).expect("writes behind our back");
    }

    fn open(&self) -> Manifest {
        let image = Arc::new(Image::open_write(&self.path()).expect("opens"));
        let geometry = Geometry::new(SIZE, BLOCK).expect("a geometry");
        let state = Arc::clone(&self.state) as Arc<dyn State>;
        Manifest::open("vm".parse().expect("a name"), INCARNATION, image, geometry, state, self.is_released)
            .expect("opens")
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
fn an_image_that_is_changed_while_it_rests_is_hashed_anew() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    std::thread::sleep(TIMESTAMP_GRAIN);
    lab.change(2 * BLOCK, &[9; 512]);
    manifest.look().expect("is no error");
    assert_eq!(manifest.roots(PageIndex(0), 1), [RootEntry::Unknown]);
    let mut expected = vec![1; BLOCK as usize];
    expected[..512].fill(9);
    let page = manifest.page(PageIndex(0)).expect("hashes");
    assert_eq!(page.id_of(BlockIndex(2)), Some(BlockId::of(&expected)));
    hash_all(&manifest);
    assert_eq!(manifest.hashed_pages(), 3);
}

#[test]
fn what_was_changed_at_rest_is_released_as_it_is() {
    let lab = Lab::new();
    let manifest = Arc::new(lab.open());
    hash_all(&manifest);
    std::thread::sleep(TIMESTAMP_GRAIN);
    // Over data, and into what was a hole.
    lab.change(2 * BLOCK, &[9; BLOCK as usize]);
    lab.change(1024 * BLOCK, &[9; BLOCK as usize]);
    manifest.release().expect("releases");
    assert_eq!(
        manifest.roots(PageIndex(0), 3),
        [RootEntry::Unknown, RootEntry::Unknown, RootEntry::Unknown],
        "nothing of before is announced"
    );
    let nines = BlockId::of(&[9; BLOCK as usize]);
    assert_eq!((serve(&manifest, 2), serve(&manifest, 1024)), (Ok(nines), Ok(nines)));
    assert_eq!(manifest.page(PageIndex(1)).expect("hashes").id_of(BlockIndex(1024)), Some(nines));
    hash_all(&manifest);
    assert_eq!(serve(&manifest, 3), Ok(id_of_ones()));
}

#[test]
fn an_image_that_was_cut_is_not_released() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    std::fs::File::options().write(true).open(lab.path()).and_then(|file| file.set_len(SIZE - 1)).expect("cuts");
    let error = manifest.release().expect_err("a byte is missing").to_string();
    assert!(error.contains(&SIZE.to_string()), "{error}");
    assert!(!manifest.is_released());
}

#[test]
fn a_damaged_row_costs_a_hash() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    let expected = manifest.page(PageIndex(0)).expect("a page");
    let mut row = lab.state.get(&manifest.rows.indexed("page/", 0)).expect("gets").expect("a row");
    row[100] ^= 1;
    lab.state.put(&manifest.rows.indexed("page/", 0), &row).expect("puts");
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
    let manifest = Manifest::open_written(name, INCARNATION, Arc::clone(&image), geometry, state).expect("opens");
    // A write that nobody noted, into what was a hole.
    image.write_at(1024 * BLOCK, &[9; 512]).expect("writes");
    write(&manifest, 0, &[7; 512]);
    hash_all(&manifest);
    let page = manifest.page(PageIndex(1)).expect("is known");
    assert!(!page.is_zero());
    manifest.look().expect("nothing was promised yet");
}

/// What a peer is told of a block, or why not.
fn serve(manifest: &Arc<Manifest>, block: u64) -> Result<BlockId, String> {
    let (image, geometry) = (Arc::clone(&manifest.image), manifest.geometry);
    let name = "vm".parse().expect("a name");
    let volume = crate::source::SourceVolume { name, image, geometry, manifest: Arc::clone(manifest), generation: 1 };
    volume.read_block(BlockIndex(block)).map(|(id, _)| id).map_err(|error| error.to_string())
}

fn id_of_ones() -> BlockId {
    BlockId::of(&[1; BLOCK as usize])
}

#[test]
fn a_touch_of_a_released_image_harms_nobody() {
    use std::os::unix::fs::PermissionsExt;
    for is_restarted in [false, true] {
        let mut lab = Lab::new();
        let mut manifest = Arc::new(lab.open());
        manifest.release().expect("releases");
        std::thread::sleep(TIMESTAMP_GRAIN);
        std::fs::set_permissions(lab.path(), std::fs::Permissions::from_mode(0o640)).expect("chmod");
        std::fs::hard_link(lab.path(), lab.dir.path().join("link")).expect("links");
        if is_restarted {
            drop(manifest);
            lab.is_released = true;
            manifest = Arc::new(lab.open());
        }
        assert_eq!(serve(&manifest, 2), Ok(id_of_ones()), "the page is not hashed yet");
        manifest.page(PageIndex(0)).expect("hashes");
        assert_eq!(serve(&manifest, 3), Ok(id_of_ones()));
        // As touch does: a suspicion, and ids to tell by.
        std::fs::File::options()
            .write(true)
            .open(lab.path())
            .and_then(|file| file.set_modified(UNIX_EPOCH))
            .expect("touches");
        assert_eq!(serve(&manifest, 4), Ok(id_of_ones()));
        let refused = serve(&manifest, 2048).expect_err("nothing tells what it held");
        assert!(refused.contains("block 2048") && refused.contains("not known"), "{refused}");
        assert!(matches!(manifest.page(PageIndex(2)), Err(SourceError::Changed { .. })));
    }
}

#[test]
fn a_released_image_that_is_grown_goes_on() {
    let mut lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    manifest.release().expect("releases");
    drop(manifest);
    lab.is_released = true;
    std::thread::sleep(TIMESTAMP_GRAIN);
    let grow = |size| std::fs::File::options().write(true).open(lab.path()).and_then(|file| file.set_len(size));
    grow(SIZE + 4096).expect("grows");
    let manifest = Arc::new(lab.open());
    assert_eq!(serve(&manifest, 2), Ok(id_of_ones()));
    assert_eq!(serve(&manifest, 2 * 1024 + 5), Ok(BlockId::of(&[2; 100])), "the last block ends where it did");
    grow(SIZE).expect("is cut again");
    assert_eq!(serve(&manifest, 2), Ok(id_of_ones()));
}

#[test]
fn a_block_of_a_released_image_is_what_was_announced_or_refused() {
    for (is_restarted, sets_time_back) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut lab = Lab::new();
        let mut manifest = Arc::new(lab.open());
        hash_all(&manifest);
        manifest.release().expect("releases");
        let (stamp, roots) = (manifest.image.stamp().expect("asks").expect("a file"), manifest.roots(PageIndex(0), 3));
        std::thread::sleep(TIMESTAMP_GRAIN);
        lab.change(3 * BLOCK, &[9; 512]);
        if sets_time_back {
            let time = UNIX_EPOCH + Duration::from_nanos(u64::try_from(stamp.mtime_ns).expect("after 1970"));
            std::fs::File::options()
                .write(true)
                .open(lab.path())
                .and_then(|file| file.set_modified(time))
                .expect("sets times");
        }
        if is_restarted {
            drop(manifest);
            lab.is_released = true;
            manifest = Arc::new(lab.open());
        }
        assert_eq!(serve(&manifest, 2), Ok(id_of_ones()), "is as it was");
        for _ in 0..2 {
            let refused = serve(&manifest, 3).expect_err("is another");
            assert!(refused.contains("block 3") && refused.contains("announced"), "{refused}");
        }
        assert_eq!(manifest.roots(PageIndex(0), 3), roots, "what was announced stays");
    }
}

#[test]
fn another_file_under_a_released_images_path_is_not_served() {
    let mut lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    manifest.release().expect("releases");
    let modified = std::fs::metadata(lab.path()).and_then(|meta| meta.modified()).expect("asks");
    drop(manifest);
    let other = lab.dir.path().join("other");
    let file = std::fs::File::create(&other).expect("creates");
    file.set_len(SIZE).expect("grows");
    file.write_all_at(&[5; 3 * BLOCK as usize], 2 * BLOCK).expect("writes");
    file.set_modified(modified).expect("sets times");
    drop(file);
    std::fs::rename(&other, lab.path()).expect("renames");
    lab.is_released = true;
    let manifest = Arc::new(lab.open());
    assert!(serve(&manifest, 2).is_err());
    assert_eq!(serve(&manifest, 1), Ok(BlockId::ZERO), "is what was announced");
    assert!(serve(&manifest, 2053).is_err(), "its end is not what was announced");
}

#[test]
fn what_was_sent_before_its_page_was_hashed_is_announced_as_well() {
    let mut lab = Lab::new();
    let mut manifest = Arc::new(lab.open());
    manifest.release().expect("releases");
    assert_eq!(serve(&manifest, 2), Ok(id_of_ones()));
    drop(manifest);
    lab.is_released = true;
    let stamp = std::fs::metadata(lab.path()).and_then(|meta| meta.modified()).expect("asks");
    lab.change(2 * BLOCK, &[9; 512]);
    std::fs::File::options()
        .write(true)
        .open(lab.path())
        .and_then(|file| file.set_modified(stamp))
        .expect("sets times");
    manifest = Arc::new(lab.open());
    assert!(serve(&manifest, 2).expect_err("another").contains("block 2"));
    assert!(matches!(manifest.page(PageIndex(0)), Err(SourceError::Changed { .. })), "the page would say otherwise");
    lab.change(2 * BLOCK, &[1; 512]);
    std::fs::File::options()
        .write(true)
        .open(lab.path())
        .and_then(|file| file.set_modified(stamp))
        .expect("sets times");
    manifest.page(PageIndex(0)).expect("is as it was");
    assert_eq!(serve(&manifest, 2), Ok(id_of_ones()));
    assert_eq!(
        lab.state
            .scan_prefix(&manifest.rows.indexed("told/", 0)[..manifest.rows.indexed("told/", 0).len() - 8])
            .expect("scans")
            .len(),
        0
    );
}

#[test]
fn a_damaged_row_of_a_released_image_is_mended_or_nothing_is_believed() {
    let mut lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    manifest.release().expect("releases");
    let expected = manifest.page(PageIndex(0)).expect("a page");
    drop(manifest);
    lab.is_released = true;
    let manifest = Arc::new(lab.open());
    let key = manifest.rows.indexed("page/", 0);
    let mut row = lab.state.get(&key).expect("gets").expect("a row");
    row[100] ^= 1;
    lab.state.put(&key, &row).expect("puts");
    assert_eq!(manifest.page(PageIndex(0)).expect("hashes"), expected);
    lab.state.put(&key, &row).expect("puts");
    lab.change(3 * BLOCK, &[9; 512]);
    assert!(matches!(manifest.page(PageIndex(0)), Err(SourceError::Changed { .. })));
}

#[test]
fn what_comes_back_and_is_written_is_announced_anew() {
    let lab = Lab::new();
    let manifest = Arc::new(lab.open());
    manifest.release().expect("releases");
    assert_eq!(serve(&manifest, 2), Ok(id_of_ones()));
    write(&manifest, 2 * BLOCK, &[7; BLOCK as usize]);
    manifest.image.sync_data().expect("syncs");
    manifest.release().expect("releases again");
    assert_eq!(serve(&manifest, 2), Ok(BlockId::of(&[7; BLOCK as usize])));
}

/// The hand-over is withdrawn while its release is under way, and a guest that is let in again writes.
#[test]
fn a_release_that_a_guest_overtook_releases_nothing_and_the_next_one_announces_what_is_there() {
    let lab = Lab::new();
    let manifest = Arc::new(lab.open());
    hash_all(&manifest);
    manifest.rest().expect("rests");
    write(&manifest, 2 * BLOCK, &[7; BLOCK as usize]);
    assert!(matches!(manifest.release_resting(), Err(SourceError::Written { .. })));
    assert!(!manifest.is_released() && !manifest.is_sealed());
    // The guest goes on, and the next hand-over comes about.
    write(&manifest, 3 * BLOCK, &[8; BLOCK as usize]);
    manifest.image.sync_data().expect("syncs");
    manifest.release().expect("releases");
    drop(manifest);
    let lab = Lab { is_released: true, ..lab };
    let manifest = Arc::new(lab.open());
    let page = manifest.page(PageIndex(0)).expect("hashes");
    for (block, byte) in [(2, 7), (3, 8), (4, 1)] {
        let id = BlockId::of(&[byte; BLOCK as usize]);
        assert_eq!(page.id_of(BlockIndex(block)), Some(id), "block {block} as it is announced after a restart");
        assert_eq!(serve(&manifest, block), Ok(id));
    }
}

/// Two hash a page at a time: the one who began before a guest's write must not take the other's state for its own.
#[test]
fn an_id_from_before_a_write_is_not_kept_though_the_page_is_being_hashed_again() {
    let lab = Lab::new();
    let manifest = lab.open();
    let page = PageIndex(0);
    let written_at = manifest.written_at[0].load(Ordering::Acquire);
    manifest.pages[0].store(HASHING, Ordering::Release);
    let hashed = manifest.hash_blocks(page).expect("hashes");
    write(&manifest, 2 * BLOCK, &[7; BLOCK as usize]);
    manifest.pages[0].store(HASHING, Ordering::Release);
    assert!(!manifest.keep(page, &hashed, written_at).expect("is not kept"));
    assert_eq!(manifest.roots(page, 1), [RootEntry::Unknown]);
}

/// It was found to be another, by what was noted of its content; its times say nothing.
#[test]
fn a_released_image_that_is_known_to_be_another_serves_what_was_announced_alone() {
    let mut lab = Lab::new();
    let manifest = lab.open();
    manifest.page(PageIndex(0)).expect("hashes");
    manifest.release().expect("releases");
    drop(manifest);
    lab.is_released = true;
    let before = std::fs::metadata(lab.path()).expect("looks").modified().expect("has a time");
    lab.change(SIZE - 100, &[3; 100]);
    std::fs::File::options().write(true).open(lab.path()).expect("opens").set_modified(before).expect("sets it back");
    let manifest = Arc::new(lab.open());
    manifest.suspect();
    assert_eq!(serve(&manifest, 2), Ok(id_of_ones()), "it is what was announced");
    serve(&manifest, 2 * 1024 + 5).expect_err("nobody knows what it was");
    assert!(matches!(manifest.page(PageIndex(2)), Err(SourceError::Changed { .. })));
    // Given back, it is what it is.
    manifest.take_back().expect("takes it back");
    serve(&manifest, 2 * 1024 + 5).expect("is this site's own");
}

#[test]
fn a_manifest_that_is_closed_writes_no_rows_and_answers_nothing() {
    let lab = Lab::new();
    let manifest = Arc::new(lab.open());
    manifest.page(PageIndex(0)).expect("hashes");
    manifest.close();
    manifest.forget_rows().expect("forgets");
    assert!(matches!(manifest.hash_page(PageIndex(2)), Err(SourceError::Gone { .. })));
    assert!(matches!(manifest.page(PageIndex(0)), Err(SourceError::Gone { .. })));
    assert!(matches!(manifest.release(), Err(SourceError::Gone { .. })));
    assert!(serve(&manifest, 2).is_err());
    manifest.note_write(0..4096).expect("is nobody's any more");
    assert_eq!(lab.state.scan_prefix(b"hash/").expect("scans").len(), 0);
}

#[test]
fn rows_of_another_incarnation_are_not_seen() {
    let lab = Lab::new();
    let manifest = lab.open();
    hash_all(&manifest);
    drop(manifest);
    let image = Arc::new(Image::open_write(&lab.path()).expect("opens"));
    let geometry = Geometry::new(SIZE, BLOCK).expect("a geometry");
    let state = Arc::clone(&lab.state) as Arc<dyn State>;
    let name = "vm".parse().expect("a name");
    let other = Manifest::open(name, Incarnation([8; 16]), image, geometry, state, false).expect("opens");
    assert_eq!(other.roots(PageIndex(0), 1), [RootEntry::Unknown]);
    drop(other);
    assert_eq!(lab.open().hashed_pages(), 3, "and they stay");
}

/// Rows as `docs/formats.md` shows them: their keys and values, byte for byte.
#[test]
fn rows_are_what_the_document_says() {
    let state = Arc::new(MemoryState::new());
    let rows = Rows::new("vm".parse().expect("a name"), INCARNATION, Arc::clone(&state) as Arc<dyn State>);
    let check = |name: &str| {
        let (key, value) = state.scan_prefix(b"").expect("scans").pop().expect("one row");
        let value = if value.starts_with(b"{") { String::from_utf8(value).expect("JSON") } else { hex::encode(value) };
        let line = format!("\n| {name} | `{}` | `{value}` |\n", key.escape_ascii());
        assert!(include_str!("../../../docs/formats.md").contains(&line), "docs/formats.md has no row {line}");
        rows.forget().expect("forgets");
    };
    let geometry = Geometry::new(57344, 16384).expect("a geometry");
    let (mtime_ns, ctime_ns) = (1_700_000_000_123_456_789, 1_700_000_000_987_654_321);
    let stamp = Stamp { device: 2049, inode: 1_048_577, size_bytes: 57344, mtime_ns, ctime_ns };
    let sealed = rows::Sealed { stamp: Some(stamp.clone()), geometry };
    rows.put_sealed(&sealed).expect("writes");
    let read = rows.sealed().expect("reads").expect("is there");
    assert_eq!((read.stamp, read.geometry), (Some(stamp), geometry));
    check("stamp, a file");
    rows.put_sealed(&rows::Sealed { stamp: None, geometry }).expect("writes");
    assert!(rows.sealed().expect("reads").expect("is there").stamp.is_none());
    check("stamp, a device");
    let page = Page::new(vec![BlockId([0x11; 32]), BlockId::ZERO]);
    rows.put_page(PageIndex(5), &page).expect("writes");
    assert_eq!(rows.page_ids().expect("reads"), [(5, page.id())]);
    assert_eq!(rows.page(PageIndex(5), 2).expect("reads").expect("is there").id(), page.id());
    check("page of two blocks");
    rows.put_page(PageIndex(6), &Page::new(vec![BlockId::ZERO])).expect("writes");
    assert_eq!(rows.page_ids().expect("reads"), [(6, PageId([0; 32]))]);
    check("page of zeros");
    rows.put_told(0x0102, BlockId([0x11; 32])).expect("writes");
    assert_eq!(rows.told().expect("reads"), [(0x0102, BlockId([0x11; 32]))]);
    check("told");
    rows.put_told(0x0102, BlockId([0x11; 32])).expect("writes");
    rows.put_released([6].into_iter(), &sealed).expect("writes");
    assert_eq!(rows.page_ids().expect("reads"), [(6, PageId([0; 32]))], "as a page that was hashed");
    assert!(rows.told().expect("reads").is_empty(), "that was an earlier release");
    assert!(rows.sealed().expect("reads").is_some());
}
