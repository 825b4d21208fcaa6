//! Sources that send blocks of another length than a volume's, over the transport's twin: nobody gets such a block, and the
//! peer that sent it is named.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::core::wire::{Control, Data};
use crate::store::{MemoryStore, StoreError, StoreStats};
use crate::transport::memory;

/// A store that takes its time to write: until it is let go, what came is answered from memory.
struct Slow {
    inner: MemoryStore,
    is_let_go: AtomicBool,
}

impl Store for Slow {
    fn contains(&self, ids: &[BlockId]) -> Result<Vec<bool>, StoreError> {
        self.inner.contains(ids)
    }
    fn get(&self, ids: &[BlockId]) -> Result<Vec<Option<Bytes>>, StoreError> {
        self.inner.get(ids)
    }
    fn get_frames(&self, ids: &[BlockId]) -> Result<Vec<Option<Frame>>, StoreError> {
        self.inner.get_frames(ids)
    }
    fn put(&self, blocks: &[(BlockId, Frame)]) -> Result<(), StoreError> {
        while !self.is_let_go.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inner.put(blocks)
    }
    fn remove(&self, ids: &[BlockId]) -> Result<(), StoreError> {
        self.inner.remove(ids)
    }
    fn stats(&self) -> StoreStats {
        self.inner.stats()
    }
    fn flush(&self) -> Result<(), StoreError> {
        self.inner.flush()
    }
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// Answers every want with the same block, whatever was asked for.
async fn answer_with(new: NewLink, block: Bytes) {
    let NewLink { link, mut receivers } = new;
    while let Some(frame) = receivers.control.recv().await {
        let geometry = Geometry::new(1 << 20, 65536).expect("a geometry");
        let answer = match Control::decode(frame).expect("a frame") {
            Control::Hello { .. } => Control::Welcome { version: 2, site: name("liar") },
            Control::Open { request, .. } => {
                Control::Opened { request, handle: 1, geometry, generation: 1, epoch: 1, is_read_only: false }
            }
            Control::Wants(wants) => {
                for want in wants {
                    let frame = Some(Frame::encode(&block, 1));
                    let data = Data::Block { flight: want.flight, id: BlockId::of(&block), frame };
                    link.send_data(want.class, data.encode()).await.expect("sends");
                }
                continue;
            }
            _ => continue,
        };
        link.send_control(answer.encode()).await.expect("sends");
    }
}

async fn fetch_from_a_liar(block: Bytes) -> (Fetch, VolumeKey, Arc<Slow>) {
    let store = Arc::new(Slow { inner: MemoryStore::new(1 << 30), is_let_go: AtomicBool::new(false) });
    let fetch = Fetch::start(Limits::default(), Arc::clone(&store) as Arc<dyn Store>).expect("threads");
    let workers = Workers::start("test", 1, 1).expect("threads");
    // The first of the peers has nothing to do with it, and no connection.
    let (_, no_links) = mpsc::channel(1);
    fetch.add_peer(PeerKey(0), name("innocent"), name("b"), no_links, workers.clone(), Arc::new(Stranger));
    let (links, new_links) = mpsc::channel(1);
    fetch.add_peer(PeerKey(1), name("liar"), name("b"), new_links, workers, Arc::new(Stranger));
    let (here, there) = memory::pair(name("b"), name("liar"));
    tokio::spawn(answer_with(there, block));
    assert!(links.send(here).await.is_ok(), "the fetcher follows");
    let remote = fetch.open(PeerKey(1), name("vm")).await.expect("opens");
    (fetch, remote.key, store)
}

fn assert_blamed(answer: Result<Block, FetchError>) {
    match answer {
        Err(FetchError::Refused { peer, refusal: Refusal::BadRequest, .. }) => assert_eq!(peer, name("liar")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_block_of_the_wrong_length_names_the_peer_that_sent_it() {
    let (fetch, key, store) = fetch_from_a_liar(vec![7; 32768].into()).await;
    assert_blamed(fetch.want(key, BlockIndex(0), None, Class::Demand, 65536).await);
    store.is_let_go.store(true, Ordering::Release);
}

#[tokio::test]
async fn a_block_that_is_not_stored_yet_is_of_the_right_length_or_nobodys() {
    let block = Bytes::from(vec![7; 65536]);
    let id = BlockId::of(&block);
    let (fetch, key, store) = fetch_from_a_liar(block).await;
    let first = fetch.want(key, BlockIndex(0), None, Class::Demand, 65536).await.expect("comes");
    assert_eq!(first.id, id);
    let joined = fetch.want(key, BlockIndex(1), Some(id), Class::Demand, 65536).await.expect("is there");
    assert_eq!(joined.origin, Origin::Joined);
    // The last block of a volume, say, whose page was made up.
    assert_blamed(fetch.want(key, BlockIndex(2), Some(id), Class::Demand, 512).await);
    store.is_let_go.store(true, Ordering::Release);
}
