//! Damage to what a source sends, and sources that lie, over the transport's twin in memory: below TLS there would be
//! nothing to see. Whatever comes, a read brings the source's bytes or an error, and once the damage ends everything
//! arrives.

use std::sync::Arc;
use std::time::Duration;

use blockferry::core::frame::Frame;
use blockferry::core::ids::{BlockId, Incarnation, Name, Nonce};
use blockferry::core::manifest::{Geometry, Page, PageId};
use blockferry::core::scheduler::Limits;
use blockferry::core::wire::{Data, Refusal, RootEntry};
use blockferry::fetch::{Expected, Fetch, PeerKey, Stranger};
use blockferry::handover::{Answer, Question};
use blockferry::image::{Image, Overwrite};
use blockferry::source::{Catalog, Hasher, Manifest, Offered, Refused, SourceOptions, SourceVolume, serve_link};
use blockferry::store::{MemoryState, MemoryStore, State, Store};
use blockferry::transport::memory::pair_with_faults;
use blockferry::volume::{Relocation, Volume, VolumeParts, run_bulk};
use blockferry::workers::Workers;
use bytes::Bytes;
use futures::future::BoxFuture;

use crate::disk::{BLOCK, Disk, assert_same, noise};

/// So long a guest's read waits in these tests: damage that never ends has to end in an error.
const PATIENCE: Duration = Duration::from_millis(150);

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

struct OneVolume(Arc<SourceVolume>);

impl Catalog for OneVolume {
    fn open(&self, _: &Name, _: &Name) -> Result<Offered, Refused> {
        Ok(Offered { opening: self.0.open(), epoch: 1, is_read_only: false })
    }

    fn ask(&self, _: &Name, _: &Name, question: Question) -> BoxFuture<'static, Answer> {
        Box::pin(std::future::ready(Answer::Done(question.epoch())))
    }

    fn greet(&self, _: &Arc<dyn blockferry::transport::Link>, _: Nonce, _: Nonce) -> Result<(), (Refusal, String)> {
        Ok(())
    }
}

/// What happens to a message; `None` leaves it alone.
type Damage = fn(nth: u64, message: &[u8]) -> Option<Vec<u8>>;

/// What of the messages is damaged: every one, or every third.
#[derive(Clone, Copy, PartialEq)]
enum Often {
    Always,
    EveryThird,
}

/// One row: reads and a copy while the damage lasts, then everything.
async fn row(what: &str, often: Often, damage: Damage) {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = Disk::mixed(500, 24, 1536);
    let path = dir.path().join("source.raw");
    disk.write_to(&path);
    let image = Arc::new(Image::open_read(&path).expect("opens"));
    let geometry = Geometry::new(image.size_bytes(), BLOCK as u64).expect("a geometry");
    let rows: Arc<dyn State> = Arc::new(MemoryState::new());
    let manifest =
        Manifest::open(name("vm"), Incarnation([1; 16]), Arc::clone(&image), geometry, rows, false).expect("opens");
    let source = SourceVolume { name: name("vm"), image, geometry, manifest: Arc::new(manifest), generation: 1 };
    let catalog = Arc::new(OneVolume(Arc::new(source))) as Arc<dyn Catalog>;

    let workers = Workers::start("wire", 2, 2).expect("threads");
    let store = Arc::new(MemoryStore::new(1 << 30)) as Arc<dyn Store>;
    let fetch = Fetch::start(Limits::default(), store).expect("threads");
    let (links, new_links) = tokio::sync::mpsc::channel(1);
    fetch.add_peer(PeerKey(0), name("a"), name("b"), new_links, workers.clone(), Arc::new(Stranger));
    let hasher = Hasher::start().expect("a thread");
    let connect = async || {
        let (here, there, fault) = pair_with_faults(name("b"), name("a"));
        let options = SourceOptions { site: name("a"), zstd_level: None };
        tokio::spawn(serve_link(there, Arc::clone(&catalog), hasher.clone(), workers.clone(), options));
        assert!(links.send(here).await.is_ok(), "the fetcher follows");
        fault
    };

    let parts = VolumeParts {
        name: name("vm"),
        incarnation: Incarnation([7; 16]),
        image: Arc::new(
            Image::create(&dir.path().join("b.raw"), geometry.size_bytes, Overwrite::OnlyBlank).expect("creates"),
        ),
        geometry,
        state: Arc::new(MemoryState::new()) as Arc<dyn State>,
        workers: workers.clone(),
        is_owner: true,
    };
    let volume = Arc::new(Volume::relocating(parts, true).expect("is made"));
    let key = fetch.attach(PeerKey(0), name("vm"), Expected { geometry, generation: 1 });
    volume.set_relocation(Arc::new(Relocation::new(fetch.clone(), key, geometry, Some(PATIENCE))));

    let fault = connect().await;
    let mut nth = 0;
    fault.tamper(move |_, message| {
        nth += 1;
        if (often == Often::Always || nth % 3 == 0)
            && let Some(damaged) = damage(nth, message)
        {
            *message = damaged;
        }
    });
    let copy = tokio::spawn(run_bulk(Arc::clone(&volume), true));
    let (mut right, mut errors) = (0, 0);
    for block in (0..25).map(|nth| nth * 11 % 25) {
        let offset = block * BLOCK;
        let len = (disk.bytes.len() - offset).min(BLOCK);
        match volume.read(offset as u64, len as u32).await {
            Ok(bytes) => {
                assert_same(&format!("{what}: block {block}"), &bytes, &disk.bytes[offset..offset + len]);
                right += 1;
            }
            Err(_) => errors += 1,
        }
        // It is the guest's own bytes that an error must not touch.
        if block == 7 {
            volume.write(offset as u64, Bytes::from(vec![7; 512]), true).await.expect("a write never waits");
        }
    }
    println!("{what}: {right} blocks read, {errors} errors");

    fault.no_tamper();
    // A connection that the damage had ended comes again; and what was refused for good is asked for again by the copy.
    fault.cut();
    let _fault = connect().await;
    let copied = tokio::time::timeout(Duration::from_secs(60), copy).await;
    copied.unwrap_or_else(|_| panic!("{what}: the copy did not end")).expect("runs").expect("completes");
    let mut expected = disk.bytes.clone();
    expected[7 * BLOCK..][..512].fill(7);
    let all = volume.read(0, expected.len() as u32).await.expect("reads");
    assert_same(&format!("{what}: in the end"), &all, &expected);
    assert_same(&format!("{what}: the file"), &std::fs::read(dir.path().join("b.raw")).expect("reads"), &expected);
}

fn flipped(message: &[u8], at: usize) -> Option<Vec<u8>> {
    let mut message = message.to_vec();
    *message.get_mut(at)? ^= 0x20;
    Some(message)
}

fn encoded(data: &Data) -> Option<Vec<u8>> {
    Some(data.encode().concat())
}

/// The block of a message that is one with a frame.
fn block(message: &[u8]) -> Option<(u64, BlockId, Frame)> {
    match Data::decode(Bytes::copy_from_slice(message)) {
        Ok(Data::Block { flight, id, frame: Some(frame) }) => Some((flight, id, frame)),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bits_flipped_on_the_way() {
    tokio::join!(
        row("a bit of the payload", Often::EveryThird, |nth, m| flipped(m, 60 + nth as usize % 300)),
        row("a bit of every payload", Often::Always, |nth, m| flipped(m, 60 + nth as usize % 300)),
        row("a bit of the frame's header", Often::EveryThird, |nth, m| flipped(m, 41 + nth as usize % 12)),
        row("a bit of the id", Often::EveryThird, |nth, m| flipped(m, 9 + nth as usize % 32)),
        row("a bit of the flight's number", Often::EveryThird, |nth, m| flipped(m, 1 + nth as usize % 8)),
        row("a bit of the type", Often::EveryThird, |_, m| flipped(m, 0)),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_cut_and_grown() {
    tokio::join!(
        row("cut in half", Often::EveryThird, |_, m| Some(m[..m.len() / 2].to_vec())),
        row("a byte short", Often::EveryThird, |_, m| Some(m[..m.len() - 1].to_vec())),
        row("a byte more", Often::EveryThird, |_, m| Some([m, &[0]].concat())),
        row("nothing left", Often::EveryThird, |_, _| Some(Vec::new())),
        row("garbage", Often::EveryThird, |nth, m| Some(noise(m.len(), nth))),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sources_that_lie_about_blocks() {
    tokio::join!(
        row("other bytes under the right id", Often::Always, |nth, m| {
            let (flight, id, _) = block(m)?;
            let frame = Some(Frame::encode(&Bytes::from(noise(BLOCK, nth)), 1));
            encoded(&Data::Block { flight, id, frame })
        }),
        row("zeros under the right id", Often::Always, |_, m| {
            let (flight, id, _) = block(m)?;
            let frame = Some(Frame::encode(&Bytes::from(vec![0; BLOCK]), 1));
            encoded(&Data::Block { flight, id, frame })
        }),
        row("no bytes under the right id", Often::Always, |_, m| {
            let (flight, id, _) = block(m)?;
            encoded(&Data::Block { flight, id, frame: None })
        }),
        row("a block of the wrong length", Often::Always, |_, m| {
            let (flight, id, frame) = block(m)?;
            let bytes = frame.decode_verified(&id).ok()?;
            encoded(&Data::Block { flight, id, frame: Some(Frame::encode(&bytes.slice(..bytes.len() / 2), 1)) })
        }),
        row("refusals that come and go", Often::EveryThird, |_, m| {
            let (flight, ..) = block(m)?;
            encoded(&Data::Failed { flight, refusal: Refusal::Busy, why: "not now".into() })
        }),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sources_that_lie_about_the_manifest() {
    tokio::join!(
        row("a page of the wrong shape", Often::Always, |_, m| {
            let Ok(Data::Page { flight, page, .. }) = Data::decode(Bytes::copy_from_slice(m)) else { return None };
            let frame = Frame::encode(&Bytes::from(noise(320, 1)), 1);
            encoded(&Data::Page { flight, page, frame })
        }),
        row("a page full of ids that are none", Often::EveryThird, |nth, m| {
            let Ok(Data::Page { flight, page, frame }) = Data::decode(Bytes::copy_from_slice(m)) else { return None };
            let bytes = frame.decode().ok()?;
            let page_of_noise = Page::from_bytes(&noise(bytes.len(), nth), (bytes.len() / 32) as u64).ok()?;
            let frame = Frame::encode(&Bytes::from(page_of_noise.to_bytes()), 1);
            encoded(&Data::Page { flight, page, frame })
        }),
        row("states of pages that are none", Often::Always, |_, m| {
            let Ok(Data::Roots { flight, first, entries }) = Data::decode(Bytes::copy_from_slice(m)) else {
                return None;
            };
            let entries = entries.iter().map(|_| RootEntry::Known(PageId([9; 32]))).collect();
            encoded(&Data::Roots { flight, first, entries })
        }),
    );
}
