//! A flush that panics in the middle has taken residency that will never be written: nothing may be acknowledged as durable after
//! it, neither to those who ask later nor to those who waited for their turn meanwhile.

use std::task::{Context, Waker};

use super::*;
use crate::image::{Backend, Stamp};

/// What is called in the middle of a sync, once.
type AtSync = Box<dyn FnOnce() + Send>;

/// A file in memory, of whose syncs the next one may do something else first.
#[derive(Default)]
struct Panicky {
    bytes: parking_lot::Mutex<Vec<u8>>,
    at_sync: Arc<parking_lot::Mutex<Option<AtSync>>>,
    syncs: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Panicky {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Panicky")
    }
}

impl Backend for Panicky {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        buf.copy_from_slice(&self.bytes.lock()[offset as usize..][..buf.len()]);
        Ok(buf.len())
    }
    fn read_cached_at(&self, _: &mut [u8], _: u64) -> Option<std::io::Result<()>> {
        None
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.bytes.lock()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len_bytes: u64, _: bool) -> std::io::Result<()> {
        self.bytes.lock()[offset as usize..][..len_bytes as usize].fill(0);
        Ok(())
    }
    fn sync_data(&self) -> std::io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        let at_sync = self.at_sync.lock().take();
        if let Some(at_sync) = at_sync {
            at_sync();
        }
        Ok(())
    }
    fn next_data(&self, from: u64) -> std::io::Result<Option<Range<u64>>> {
        Ok(Some(from..self.bytes.lock().len() as u64))
    }
    fn stamp(&self) -> std::io::Result<Stamp> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn allocated_bytes(&self) -> std::io::Result<u64> {
        Ok(self.bytes.lock().len() as u64)
    }
}

/// A volume in relocation, a guest of which has written one block and flushed it: the next writes and flushes may stay on
/// its thread.
struct Scene {
    volume: Arc<Volume>,
    at_sync: Arc<parking_lot::Mutex<Option<AtSync>>>,
    syncs: Arc<AtomicUsize>,
    state: Arc<MemoryState>,
}

impl Scene {
    async fn new() -> Scene {
        let disk = Panicky { bytes: vec![0; 8 * BLOCK as usize].into(), ..Panicky::default() };
        let (at_sync, syncs) = (Arc::clone(&disk.at_sync), Arc::clone(&disk.syncs));
        let state = Arc::new(MemoryState::new());
        let parts = parts(Image::over(Box::new(disk), "panicky".as_ref(), 8 * BLOCK, true), &state);
        let volume = Arc::new(Volume::relocating(parts, true).expect("a volume"));
        volume.write(0, vec![1; BLOCK as usize].into(), true).await.expect("writes");
        Scene { volume, at_sync, syncs, state }
    }

    fn panic_at_next_sync(&self, first: impl FnOnce() + Send + 'static) {
        *self.at_sync.lock() = Some(Box::new(move || {
            first();
            panic!("on purpose: a bug in the middle of a sync");
        }));
    }

    /// Nothing is acknowledged as durable any more, by whichever way it is asked for, nor is the disk bothered again.
    async fn expect_poisoned(self) {
        let syncs = self.syncs.load(Ordering::Relaxed);
        let page: Bytes = vec![3; 4096].into();
        for _ in 0..2 {
            assert!(self.volume.flush_here().is_none(), "left to the flush that says why");
            assert!(matches!(self.volume.flush().await, Err(VolumeError::SyncFailed { .. })));
            assert!(self.volume.write_here(3 * BLOCK, &page, true).is_none());
            let written = self.volume.write(3 * BLOCK, page.clone(), true).await;
            assert!(matches!(written, Err(VolumeError::SyncFailed { .. })), "{written:?}");
            assert!(matches!(self.volume.write_zeroes(0, 4096, true, true).await, Err(VolumeError::SyncFailed { .. })));
            assert!(matches!(self.volume.fence().await, Err(VolumeError::SyncFailed { .. })));
            self.volume.unfence();
        }
        assert_eq!(self.syncs.load(Ordering::Relaxed), syncs);
        // What was flushed before is known after a power loss, and nothing else is.
        self.state.lose_unsynced();
        drop(self.volume);
        let disk = Panicky { bytes: vec![0; 8 * BLOCK as usize].into(), ..Panicky::default() };
        let image = Image::over(Box::new(disk), "panicky".as_ref(), 8 * BLOCK, true);
        let volume = Volume::relocating(parts(image, &self.state), false).expect("restores");
        let present: Vec<u64> = (0..8).filter(|block| volume.disk.bits().is_resident(BlockIndex(*block))).collect();
        assert_eq!(present, [0]);
    }
}

fn parts(image: Image, state: &Arc<MemoryState>) -> VolumeParts {
    VolumeParts {
        name: name("vm"),
        incarnation: INCARNATION,
        image: Arc::new(image),
        geometry: Geometry::new(8 * BLOCK, BLOCK).expect("a geometry"),
        state: Arc::clone(state) as Arc<dyn State>,
        workers: Workers::start("test", 1, 1).expect("threads"),
        is_owner: true,
    }
}

#[tokio::test]
async fn a_flush_that_panics_on_the_clients_thread_poisons_the_volume() {
    let scene = Scene::new().await;
    scene.volume.write_here(BLOCK, &[2; BLOCK as usize], false).expect("nothing to wait for").expect("writes");
    scene.panic_at_next_sync(|| {});
    let flushed = scene.volume.flush_here().expect("no other flush is under way");
    assert!(matches!(flushed, Err(VolumeError::ShuttingDown)), "{flushed:?}");
    scene.expect_poisoned().await;
}

#[tokio::test]
async fn a_write_whose_fua_panics_on_the_clients_thread_poisons_the_volume() {
    let scene = Scene::new().await;
    scene.panic_at_next_sync(|| {});
    let written = scene.volume.write_here(BLOCK, &[2; BLOCK as usize], true).expect("nothing to wait for");
    assert!(matches!(written, Err(VolumeError::ShuttingDown)), "{written:?}");
    scene.expect_poisoned().await;
}

#[tokio::test]
async fn a_flush_that_waits_for_one_that_panics_fails_and_does_not_hang() {
    let scene = Scene::new().await;
    scene.volume.write_here(BLOCK, &[2; BLOCK as usize], false).expect("nothing to wait for").expect("writes");
    let volume = Arc::clone(&scene.volume);
    let mut waiting = Box::pin(async move { volume.flush().await });
    let (asked, answered) = std::sync::mpsc::channel();
    scene.panic_at_next_sync({
        // It asks in the middle of the sync, and then waits until that is over: no threads, no luck.
        move || {
            let is_waiting = waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
            asked.send((is_waiting, waiting)).expect("the test waits");
        }
    });
    let flushed = scene.volume.flush_here().expect("no other flush is under way");
    assert!(matches!(flushed, Err(VolumeError::ShuttingDown)), "{flushed:?}");
    let (is_waiting, waiting) = answered.recv().expect("the sync began");
    assert!(is_waiting, "one sync at a time");
    let waited = tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("has its turn");
    assert!(matches!(waited, Err(VolumeError::SyncFailed { .. })), "{waited:?}");
    scene.expect_poisoned().await;
}

/// Asks again for its flush in the very moment in which it is woken, while whoever woke it is still unwinding.
struct AtOnce {
    waiting: parking_lot::Mutex<Option<futures::future::BoxFuture<'static, Result<(), VolumeError>>>>,
    answer: std::sync::mpsc::Sender<Result<(), VolumeError>>,
}

impl std::task::Wake for AtOnce {
    fn wake(self: Arc<Self>) {
        if let Some(waiting) = self.waiting.lock().take() {
            let done = std::thread::spawn(move || futures::executor::block_on(waiting)).join();
            let _ = done.map(|done| self.answer.send(done));
        }
    }
}

/// The next sync panics, and a flush waits for its turn meanwhile: what that is told, however early it is woken.
fn wait_for_the_one_that_panics(scene: &Scene) -> std::sync::mpsc::Receiver<Result<(), VolumeError>> {
    let volume = Arc::clone(&scene.volume);
    let (answer, answered) = std::sync::mpsc::channel();
    scene.panic_at_next_sync(move || {
        let mut waiting: futures::future::BoxFuture<_> = Box::pin(async move { volume.flush().await });
        let at_once = Arc::new(AtOnce { waiting: parking_lot::Mutex::new(None), answer });
        let waker = Waker::from(Arc::clone(&at_once));
        assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending(), "one sync at a time");
        *at_once.waiting.lock() = Some(waiting);
    });
    answered
}

#[tokio::test]
async fn whoever_waits_is_not_faster_than_the_poison() {
    let scene = Scene::new().await;
    scene.volume.write_here(BLOCK, &[2; BLOCK as usize], false).expect("nothing to wait for").expect("writes");
    let answered = wait_for_the_one_that_panics(&scene);
    scene.volume.flush_here().expect("no other flush is under way").expect_err("panics");
    let waited = answered.recv_timeout(Duration::from_secs(10)).expect("has its turn");
    assert!(matches!(waited, Err(VolumeError::SyncFailed { .. })), "{waited:?}");
    scene.expect_poisoned().await;
}

#[tokio::test]
async fn nor_faster_than_that_of_a_flush_on_another_thread() {
    let scene = Scene::new().await;
    scene.volume.write_here(BLOCK, &[2; BLOCK as usize], false).expect("nothing to wait for").expect("writes");
    let answered = wait_for_the_one_that_panics(&scene);
    scene.volume.flush().await.expect_err("panics");
    let waited = answered.recv_timeout(Duration::from_secs(10)).expect("has its turn");
    assert!(matches!(waited, Err(VolumeError::SyncFailed { .. })), "{waited:?}");
    scene.expect_poisoned().await;
}

#[tokio::test]
async fn a_flush_that_panics_when_its_client_is_gone_poisons_the_volume() {
    let scene = Scene::new().await;
    scene.volume.write_here(BLOCK, &[2; BLOCK as usize], false).expect("nothing to wait for").expect("writes");
    let (begun, begins) = std::sync::mpsc::channel();
    let (gone, hangs_up) = std::sync::mpsc::channel::<()>();
    scene.panic_at_next_sync(move || {
        begun.send(()).expect("the test waits");
        let _ = hangs_up.recv();
    });
    let mut flush = Box::pin(scene.volume.flush());
    assert!(flush.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    begins.recv().expect("the sync begins");
    drop(flush);
    drop(gone);
    // Has its turn after the one that panics.
    let next = scene.volume.flush().await;
    assert!(matches!(next, Err(VolumeError::SyncFailed { .. })), "{next:?}");
    scene.expect_poisoned().await;
}
