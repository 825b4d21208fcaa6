//! Reads and writes whose bytes go through pipes: the same gates as for all others, and nothing lost where they are refused.

use parking_lot::Mutex;

use super::*;

const LEN: usize = 100_000;

fn parts(dir: &tempfile::TempDir) -> VolumeParts {
    let path = dir.path().join("disk.raw");
    let image = Image::create(&path, 8 * BLOCK, Overwrite::OnlyBlank).expect("makes a file");
    let geometry = Geometry::new(8 * BLOCK, BLOCK).expect("a geometry");
    VolumeParts {
        name: name("vm"),
        incarnation: INCARNATION,
        image: Arc::new(image),
        geometry,
        state: Arc::new(MemoryState::new()),
        workers: Workers::start("test", 1, 1).expect("threads"),
        is_owner: true,
    }
}

fn filled(value: u8) -> Pipe {
    let mut pipe = Pipe::new().expect("a pipe");
    assert_eq!(pipe.put(&[value; LEN]).expect("put"), LEN);
    pipe
}

fn content(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; 8 * BLOCK as usize];
    volume.image().read_at(0, &mut bytes).expect("reads");
    bytes
}

/// Counts what it is told, and looks whether the bytes were there already.
struct Told(Mutex<Vec<(Range<u64>, bool)>>, std::fs::File);

impl WriteObserver for Told {
    fn note_write(&self, bytes: Range<u64>) -> Result<(), String> {
        let mut first = [0];
        std::os::unix::fs::FileExt::read_exact_at(&self.1, &mut first, bytes.start)
            .map_err(|error| error.to_string())?;
        self.0.lock().push((bytes, first != [0]));
        Ok(())
    }
}

#[tokio::test]
async fn a_fence_holds_for_pipes_and_waits_for_what_is_under_way() {
    let dir = tempfile::tempdir().expect("a folder");
    let volume = Volume::complete(parts(&dir));
    volume.fence().await.expect("fences");
    let mut pipe = filled(1);
    let refused = volume.write_from(77, &mut pipe, LEN).expect("an answer");
    assert!(matches!(refused, Err(VolumeError::NotOwner { .. })), "{refused:?}");
    assert_eq!(pipe.len_bytes(), LEN);
    assert!(is_zero(&content(&volume)));
    volume.unfence();
    volume.write_from(77, &mut pipe, LEN).expect("an answer").expect("writes");
    assert!(pipe.is_empty());
    let now = content(&volume);
    assert!(now[77..77 + LEN] == [1; LEN] && is_zero(&now[..77]) && is_zero(&now[77 + LEN..]));

    // The observer is told while the write counts as under way.
    struct Looks(Mutex<Option<Arc<Volume>>>);
    impl WriteObserver for Looks {
        fn note_write(&self, _: Range<u64>) -> Result<(), String> {
            let volume = self.0.lock().clone().ok_or("none")?;
            let mut fence = Box::pin(volume.fence());
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            let is_pending = fence.as_mut().poll(&mut cx).is_pending();
            if is_pending { Ok(()) } else { Err("a fence did not wait".to_owned()) }
        }
    }
    let volume = Arc::new(volume);
    let looks = Arc::new(Looks(Mutex::new(Some(Arc::clone(&volume)))));
    volume.set_observer(Some(Arc::clone(&looks) as Arc<dyn WriteObserver>));
    volume.write_from(0, &mut filled(2), LEN).expect("an answer").expect("writes");
    assert!(!volume.is_owner(), "it has been fenced meanwhile");
    volume.set_observer(None);
    looks.0.lock().take();
}

#[tokio::test]
async fn the_observer_is_told_of_what_comes_through_pipes() {
    let dir = tempfile::tempdir().expect("a folder");
    let volume = Volume::complete(parts(&dir));
    let told = Arc::new(Told(Mutex::default(), std::fs::File::open(dir.path().join("disk.raw")).expect("opens")));
    volume.set_observer(Some(Arc::clone(&told) as Arc<dyn WriteObserver>));
    let mut pipe = filled(3);
    {
        // While it is being changed: nothing is done, and nothing lost.
        let _changing = volume.writes.observer.write();
        assert!(volume.write_from(512, &mut pipe, LEN).is_none());
    }
    assert_eq!(pipe.len_bytes(), LEN);
    assert!(is_zero(&content(&volume)) && told.0.lock().is_empty());
    volume.write_from(512, &mut pipe, LEN).expect("an answer").expect("writes");
    let range = 512..512 + LEN as u64;
    assert_eq!(*told.0.lock(), [(range.clone(), false), (range, true)], "before and after");
}

#[tokio::test]
async fn blocks_that_are_not_here_go_through_no_pipe() {
    let dir = tempfile::tempdir().expect("a folder");
    let volume = Volume::relocating(parts(&dir), true).expect("a volume");
    assert!(!volume.takes_pipes());
    let mut pipe = filled(4);
    assert!(volume.write_from(0, &mut pipe, LEN).is_none());
    assert_eq!(pipe.len_bytes(), LEN);
    // All of block 1, and all but the last sector of block 2, all pages of which are in the page cache.
    let data = Bytes::from(vec![5; 2 * BLOCK as usize - 512]);
    volume.write(BLOCK, data, false).await.expect("writes");
    let mut pipe = Pipe::new().expect("a pipe");
    let before = volume.snapshot().reads.resident_bytes;
    assert!(volume.read_into(2 * BLOCK, BLOCK as u32 / 2, &mut pipe).is_none());
    assert!(volume.read_into(BLOCK + 4096, BLOCK as u32, &mut pipe).is_none());
    assert!(volume.read_into(BLOCK - 512, BLOCK as u32, &mut pipe).is_none());
    assert_eq!((pipe.len_bytes(), volume.snapshot().reads.resident_bytes), (0, before));
    // Some file systems cannot tell what is in the page cache.
    if volume.read_into(BLOCK, BLOCK as u32, &mut pipe).is_some() {
        let mut bytes = BytesMut::new();
        pipe.take(&mut bytes).expect("taken");
        assert!(bytes == [5; BLOCK as usize][..]);
        assert_eq!(volume.snapshot().reads.resident_bytes, before + BLOCK);
    }
}

/// The end of the file, a hole, and a disk that is shorter than it was: the ordinary read tells, and the pipe is as it was.
#[tokio::test]
async fn what_the_file_does_not_have_leaves_an_empty_pipe() {
    let dir = tempfile::tempdir().expect("a folder");
    let volume = Volume::complete(parts(&dir));
    let mut pipe = Pipe::new().expect("a pipe");
    assert!(volume.read_into(0, LEN as u32, &mut pipe).is_none() && pipe.is_empty(), "a hole");
    volume.write_here(0, &vec![6; 8 * BLOCK as usize], false).expect("an answer").expect("writes");
    let file = std::fs::File::options().write(true).open(dir.path().join("disk.raw")).expect("opens");
    file.set_len(3 * BLOCK + 100).expect("cuts");
    for (offset, len) in [(2 * BLOCK, 2 * BLOCK), (3 * BLOCK, BLOCK / 2), (5 * BLOCK, BLOCK)] {
        assert!(volume.read_into(offset, len as u32, &mut pipe).is_none() && pipe.is_empty(), "{len} at {offset}");
    }
}
