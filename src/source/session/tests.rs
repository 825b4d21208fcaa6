//! A source and peers that do not behave, over the transport's twin.

use futures::future::BoxFuture;

use super::*;
use crate::core::ids::{BlockIndex, Incarnation, Nonce};
use crate::core::manifest::Geometry;
use crate::core::wire::Want;
use crate::image::Image;
use crate::source::{Manifest, Refused, SourceVolume};
use crate::store::MemoryState;
use crate::transport::memory;

struct OneVolume(Arc<SourceVolume>);

impl Catalog for OneVolume {
    fn open(&self, _peer: &Name, volume: &Name) -> Result<Offered, Refused> {
        match *volume == self.0.name {
            true => Ok(Offered { opening: self.0.open(), epoch: 1, is_read_only: false }),
            false => Err((Refusal::UnknownVolume, 0, "none".into())),
        }
    }

    fn ask(&self, _: &Name, _: &Name, question: Question) -> BoxFuture<'static, Answer> {
        Box::pin(std::future::ready(Answer::Done(question.epoch())))
    }

    fn greet(&self, _: &Arc<dyn Link>, _: Nonce, _: Nonce) -> Result<(), (Refusal, String)> {
        Ok(())
    }
}

struct Peer {
    link: Arc<dyn Link>,
    receivers: LinkReceivers,
    manifest: Arc<Manifest>,
    _dir: tempfile::TempDir,
}

fn connect() -> Peer {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("image");
    std::fs::write(&path, vec![5; 3 << 16]).expect("writes");
    let image = Arc::new(Image::open_read(&path).expect("opens"));
    let geometry = Geometry::new(3 << 16, 1 << 16).expect("a geometry");
    let name: Name = "vm".parse().expect("a name");
    let state = Arc::new(MemoryState::new());
    let manifest =
        Manifest::open(name.clone(), Incarnation([1; 16]), Arc::clone(&image), geometry, state, false).expect("opens");
    let manifest = Arc::new(manifest);
    let volume = Arc::new(SourceVolume { name, image, geometry, manifest: Arc::clone(&manifest), generation: 1 });
    let (here, there) = memory::pair("b".parse().expect("a name"), "a".parse().expect("a name"));
    let workers = Workers::start("test", 1, 1).expect("threads");
    let options = SourceOptions { site: "a".parse().expect("a name"), zstd_level: Some(1) };
    tokio::spawn(serve_link(there, Arc::new(OneVolume(volume)), Hasher::start().expect("a thread"), workers, options));
    Peer { link: here.link, receivers: here.receivers, manifest, _dir: dir }
}

impl Peer {
    async fn send(&self, frame: Control) {
        self.link.send_control(frame.encode()).await.expect("sends");
    }

    async fn answer(&mut self) -> Option<Control> {
        let frame = tokio::time::timeout(Duration::from_secs(10), self.receivers.control.recv()).await;
        frame.expect("an answer or an end").map(|frame| Control::decode(frame).expect("a frame"))
    }

    async fn data(&mut self) -> Data {
        let message = tokio::time::timeout(Duration::from_secs(10), async {
            tokio::select! {
                message = self.receivers.urgent.recv() => message,
                message = self.receivers.bulk.recv() => message,
            }
        });
        Data::decode(message.await.expect("a message").expect("a message")).expect("well-formed")
    }

    async fn hello(&mut self) {
        self.send(hello(2, 2)).await;
        assert!(matches!(self.answer().await, Some(Control::Welcome { version: 2, .. })));
    }

    async fn open(&mut self) -> u32 {
        self.send(Control::Open { request: 7, volume: "vm".parse().expect("a name") }).await;
        match self.answer().await {
            Some(Control::Opened { request: 7, handle, .. }) => handle,
            other => panic!("{other:?}"),
        }
    }

    async fn reason_of_drop(mut self) -> String {
        assert_eq!(self.answer().await, None, "the connection ends");
        self.link.closed().await.to_string()
    }
}

fn hello(min_version: u16, max_version: u16) -> Control {
    let site = "b".parse().expect("a name");
    Control::Hello { min_version, max_version, site, last: Nonce::NONE, next: Nonce::NONE }
}

fn want(flight: u64, handle: u32, block: u64) -> Want {
    Want { flight, handle, class: Class::Bulk, block: BlockIndex(block) }
}

#[tokio::test]
async fn a_peer_of_another_version_is_told_so() {
    let mut peer = connect();
    peer.send(hello(8, 9)).await;
    match peer.answer().await {
        Some(Control::Unwelcome { refusal: Refusal::Version, why }) => {
            assert!(why.contains("8 to 9") && why.contains("update"), "{why}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn whoever_does_not_say_hello_is_dropped() {
    let peer = connect();
    peer.send(Control::Forget { flight: 1 }).await;
    assert!(peer.reason_of_drop().await.contains("Hello"));
    let peer = connect();
    peer.link.send_control(Bytes::from_static(b"GET / HTTP/1.1")).await.expect("sends");
    assert!(peer.reason_of_drop().await.contains("no sense"));
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_and_the_rest_is_served() {
    let mut peer = connect();
    peer.hello().await;
    peer.send(Control::Open { request: 1, volume: "other".parse().expect("a name") }).await;
    assert!(matches!(peer.answer().await, Some(Control::Refused { request: 1, refusal: Refusal::UnknownVolume, .. })));
    peer.send(Control::Reclaimed { request: 2, epoch: 2, volume: "vm".parse().expect("a name") }).await;
    assert!(matches!(peer.answer().await, Some(Control::Done { request: 2, epoch: 2 })), "the site answers it");
    let handle = peer.open().await;
    for bad in [want(10, handle, 3), want(10, handle, u64::MAX)] {
        peer.send(Control::Wants(vec![bad])).await;
        assert!(matches!(peer.data().await, Data::Failed { flight: 10, refusal: Refusal::BadRequest, .. }), "{bad:?}");
    }
    peer.send(Control::Wants(vec![want(10, handle + 1, 0)])).await;
    assert!(matches!(peer.data().await, Data::Failed { flight: 10, refusal: Refusal::UnknownVolume, .. }));
    peer.send(Control::Page { flight: 11, handle, page: PageIndex(u64::MAX) }).await;
    assert!(matches!(peer.data().await, Data::Failed { flight: 11, refusal: Refusal::BadRequest, .. }));
    peer.send(Control::Roots { flight: 12, handle, first: PageIndex(u64::MAX), count: u32::MAX }).await;
    assert!(matches!(peer.data().await, Data::Roots { flight: 12, entries, .. } if entries.is_empty()));
    peer.send(Control::Wants(vec![want(13, handle, 0)])).await;
    match peer.data().await {
        Data::Block { flight: 13, id, frame: Some(frame) } => {
            assert_eq!(frame.decode_verified(&id).expect("verifies"), vec![5; 1 << 16]);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_peer_that_wants_too_much_loses_its_connection() {
    let mut peer = connect();
    peer.hello().await;
    let handle = peer.open().await;
    let link = Arc::clone(&peer.link);
    tokio::spawn(async move {
        for frame in 0..200u64 {
            let wants = (0..1000).map(|nth| want(frame * 1000 + nth, handle, 0)).collect();
            if link.send_control(Control::Wants(wants).encode()).await.is_err() {
                return;
            }
        }
    });
    assert!(peer.reason_of_drop().await.contains("16384"));
}

#[tokio::test]
async fn a_handle_that_is_closed_is_no_more_and_makes_room_for_another() {
    let mut peer = connect();
    peer.hello().await;
    let kept = peer.open().await;
    // As often as it likes, in the end: a connection may live for years.
    for _ in 0..2 * MAX_HANDLES {
        let handle = peer.open().await;
        assert_ne!(handle, kept, "closing the one must not close the other");
        peer.send(Control::Close { handle }).await;
        peer.send(Control::Close { handle }).await;
    }
    let closed = peer.open().await;
    peer.send(Control::Close { handle: closed }).await;
    peer.send(Control::Wants(vec![want(1, closed, 0)])).await;
    assert!(matches!(peer.data().await, Data::Failed { flight: 1, refusal: Refusal::UnknownVolume, .. }));
    peer.send(Control::Wants(vec![want(2, kept, 0)])).await;
    assert!(matches!(peer.data().await, Data::Block { flight: 2, .. }));
}

#[tokio::test]
async fn what_was_opened_of_a_volume_that_is_taken_back_is_no_more() {
    let mut peer = connect();
    peer.hello().await;
    let handle = peer.open().await;
    peer.manifest.release().expect("releases");
    let questions = |handle| {
        let page = Control::Page { flight: 2, handle, page: PageIndex(0) };
        [
            Control::Wants(vec![want(1, handle, 0)]),
            page,
            Control::Roots { flight: 3, handle, first: PageIndex(0), count: 1 },
        ]
    };
    for question in questions(handle) {
        peer.send(question).await;
        assert!(!matches!(peer.data().await, Data::Failed { .. }), "what was opened before the hand-over serves it");
    }
    peer.manifest.take_back().expect("takes it back");
    for question in questions(handle) {
        peer.send(question.clone()).await;
        let answer = peer.data().await;
        assert!(matches!(answer, Data::Failed { refusal: Refusal::UnknownVolume, .. }), "{question:?}: {answer:?}");
    }
    let handle = peer.open().await;
    for question in questions(handle) {
        peer.send(question).await;
        assert!(!matches!(peer.data().await, Data::Failed { .. }));
    }
}

#[tokio::test]
async fn a_source_does_not_take_a_sources_frames() {
    let mut peer = connect();
    peer.hello().await;
    peer.send(Control::Done { request: 1, epoch: 1 }).await;
    assert!(peer.reason_of_drop().await.contains("only a source sends"));
}
