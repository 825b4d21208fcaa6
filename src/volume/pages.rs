//! A relocation's view of the source's manifest: pages loaded as they are needed. Must not know what is read or written.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OnceCell;

use crate::core::ids::{BlockId, BlockIndex};
use crate::core::manifest::{Geometry, Page, PageId, PageIndex};
use crate::core::wire::RootEntry;
use crate::fetch::{Fetch, FetchError, VolumeKey};

/// Pages in memory at a time and volume: 8 MiB, 16 GiB of image at 64 KiB blocks.
const CACHED_PAGES: usize = 256;
/// States of pages asked for at a time.
const ROOTS_AT_A_TIME: u64 = 4096;

pub(super) struct Pages {
    fetch: Fetch,
    key: VolumeKey,
    geometry: Geometry,
    roots: Mutex<Arc<OnceCell<Vec<RootEntry>>>>,
    cache: Mutex<Cache>,
    /// What the source announced of its pages in this life, by the page and by its state, in two messages: all zero for a page of zeros.
    announced: Mutex<HashMap<u64, PageId>>,
}

#[derive(Default)]
struct Cache {
    pages: HashMap<u64, Arc<OnceCell<Arc<Page>>>>,
    order: VecDeque<u64>,
}

impl Pages {
    pub(super) fn new(fetch: Fetch, key: VolumeKey, geometry: Geometry) -> Pages {
        Pages { fetch, key, geometry, roots: Mutex::default(), cache: Mutex::default(), announced: Mutex::default() }
    }

    /// The id of a block, if its page is here.
    pub(super) fn id_of(&self, block: BlockIndex) -> Option<BlockId> {
        let page = PageIndex::of(block);
        let roots = Arc::clone(&self.roots.lock());
        if let Some(RootEntry::Zero) = roots.get().and_then(|roots| roots.get(page.0 as usize)) {
            return Some(BlockId::ZERO);
        }
        let cell = self.cache.lock().pages.get(&page.0).cloned()?;
        cell.get()?.id_of(block)
    }

    /// A page, fetched if it is not here; everybody who asks meanwhile waits for the same answer.
    pub(super) async fn load(&self, page: PageIndex) -> Result<Arc<Page>, FetchError> {
        let roots = Arc::clone(&self.roots.lock());
        let known = match self.fill(&roots).await?.get(page.0 as usize) {
            Some(RootEntry::Zero) => {
                return Ok(Arc::new(Page::new(vec![BlockId::ZERO; self.geometry.ids_in(page) as usize])));
            }
            Some(RootEntry::Known(id)) => Some(*id),
            _ => None,
        };
        let cell = {
            let mut cache = self.cache.lock();
            match cache.pages.get(&page.0) {
                Some(cell) => Arc::clone(cell),
                None => cache.insert(page.0),
            }
        };
        cell.get_or_try_init(|| self.fetch_page(page, known)).await.cloned()
    }

    async fn fetch_page(&self, page: PageIndex, root: Option<PageId>) -> Result<Arc<Page>, FetchError> {
        let kept = self.announced.lock().get(&page.0).copied();
        let fetched = self.fetch.page(self.key, page, kept.or(root), self.geometry.ids_in(page)).await?;
        let told = fetched.id();
        let announced = match kept {
            Some(kept) => kept,
            None if root == Some(told) => told,
            // The page alone, or its state alone, may have been damaged on the way: asked again, each tells of the other.
            None => match self.fetch.roots(self.key, page, 1).await?.first() {
                Some(RootEntry::Known(id)) => *id,
                Some(RootEntry::Zero) => PageId([0; 32]),
                // Nothing bears it out: it is forgotten as soon as a block is another ([`Pages::forget_doubtful`]).
                Some(RootEntry::Unknown) | None => return Ok(Arc::new(fetched)),
            },
        };
        // A source may find that its image was changed, and say so. What it announced stays what the volume is: to believe another page
        // would be to make one disk of two. What was said only once was not announced.
        let announced = match announced == told {
            true => *self.announced.lock().entry(page.0).or_insert(told),
            false => announced,
        };
        if announced != told {
            let (announced, told) = (hex::encode(announced.0), hex::encode(told.0));
            return Err(FetchError::Contradiction { page: page.0, announced, told });
        }
        Ok(Arc::new(fetched))
    }

    /// A block came that is not the announced one. Pages that nothing bears out are asked for anew: they may have been damaged on the way.
    pub(super) fn forget_doubtful(&self) {
        let announced = self.announced.lock();
        let mut cache = self.cache.lock();
        cache.pages.retain(|page, _| announced.contains_key(page));
        let Cache { pages, order } = &mut *cache;
        order.retain(|page| pages.contains_key(page));
    }

    /// What the source knew of its pages when it was first asked; unknown pages are hashed when they are asked for.
    async fn fill<'a>(&self, roots: &'a OnceCell<Vec<RootEntry>>) -> Result<&'a Vec<RootEntry>, FetchError> {
        roots
            .get_or_try_init(|| async {
                let mut roots = Vec::with_capacity(self.geometry.pages() as usize);
                while (roots.len() as u64) < self.geometry.pages() {
                    let count = (self.geometry.pages() - roots.len() as u64).min(ROOTS_AT_A_TIME);
                    let mut some = self.fetch.roots(self.key, PageIndex(roots.len() as u64), count as u32).await?;
                    some.truncate(count as usize);
                    if some.is_empty() {
                        // A source that tells nothing: the pages themselves will.
                        roots.resize(self.geometry.pages() as usize, RootEntry::Unknown);
                    }
                    roots.append(&mut some);
                }
                Ok(roots)
            })
            .await
    }
}

impl Cache {
    fn insert(&mut self, page: u64) -> Arc<OnceCell<Arc<Page>>> {
        if self.order.len() >= CACHED_PAGES
            && let Some(oldest) = self.order.pop_front()
        {
            self.pages.remove(&oldest);
        }
        let cell = Arc::new(OnceCell::new());
        self.pages.insert(page, Arc::clone(&cell));
        self.order.push_back(page);
        cell
    }
}
