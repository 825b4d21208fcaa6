//! The manifest: the ordered block ids of an image, in pages of 1,024.
//! Pure: must not know where blocks lie or who asks.

use crate::core::ids::{BlockId, BlockIndex, BlockSize};

/// Ids in a page. At 64 KiB a page describes 64 MiB and has 32 KiB.
pub const PAGE_IDS: u64 = 1024;

/// The position of a page in its manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The page that describes a block.
    pub fn of(block: BlockIndex) -> PageIndex {
        PageIndex(block.0 / PAGE_IDS)
    }

    /// The blocks that this page of an image of `blocks` blocks describes.
    pub fn blocks(self, blocks: u64) -> std::ops::Range<u64> {
        // The number may be a peer's.
        let first = self.0.saturating_mul(PAGE_IDS).min(blocks);
        first..first.saturating_add(PAGE_IDS).min(blocks)
    }
}

/// How many pages describe `blocks` blocks.
pub fn pages_of(blocks: u64) -> u64 {
    blocks.div_ceil(PAGE_IDS)
}

/// BLAKE3 of a page's bytes; all-zero stands for a page of nothing but zero blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageId(pub [u8; 32]);

/// Up to 1,024 block ids in order; the last page of an image is short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page(Vec<BlockId>);

/// Why bytes are no page.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a manifest page of {have} bytes where {want} were expected")]
pub struct BadPage {
    /// Bytes that came.
    pub have: usize,
    /// Bytes that the image's geometry asks for.
    pub want: usize,
}

impl Page {
    /// A page of these ids (at most [`PAGE_IDS`]).
    pub fn new(ids: Vec<BlockId>) -> Page {
        assert!(ids.len() as u64 <= PAGE_IDS, "a page has at most {PAGE_IDS} ids");
        Page(ids)
    }

    /// The ids in order.
    pub fn ids(&self) -> &[BlockId] {
        &self.0
    }

    /// The id of a block that this page describes.
    pub fn id_of(&self, block: BlockIndex) -> Option<BlockId> {
        self.0.get((block.0 % PAGE_IDS) as usize).copied()
    }

    /// Whether all blocks are zero.
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(BlockId::is_zero)
    }

    /// 32 bytes an id, in order: what the page's own id is the hash of.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|id| id.0).collect()
    }

    /// The reverse of [`Page::to_bytes`]; `ids` is how many ids the image's geometry asks for.
    pub fn from_bytes(bytes: &[u8], ids: u64) -> Result<Page, BadPage> {
        let want = ids as usize * 32;
        if bytes.len() != want || ids > PAGE_IDS {
            return Err(BadPage { have: bytes.len(), want });
        }
        let (chunks, _) = bytes.as_chunks::<32>();
        Ok(Page(chunks.iter().map(|chunk| BlockId(*chunk)).collect()))
    }

    /// The page's own id.
    pub fn id(&self) -> PageId {
        if self.is_zero() { PageId([0; 32]) } else { PageId(*blake3::hash(&self.to_bytes()).as_bytes()) }
    }
}

/// The shape of an image: what both ends have to agree on before a block index means anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Geometry {
    /// Bytes in the image; not necessarily a multiple of anything.
    pub size_bytes: u64,
    /// Bytes in a block.
    pub block_size: BlockSize,
}

/// Why two numbers are no geometry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an image of {size_bytes} bytes in blocks of {block_size_bytes} is not possible: {why}")]
pub struct BadGeometry {
    /// The image's size.
    pub size_bytes: u64,
    /// The block's size.
    pub block_size_bytes: u64,
    /// What is wrong.
    pub why: &'static str,
}

impl Geometry {
    /// The largest image, in blocks: 16 TiB at 64 KiB, so that residency stays below 64 MiB of memory.
    pub const MAX_BLOCKS: u64 = 1 << 28;

    /// Checks what a peer or a file said.
    pub fn new(size_bytes: u64, block_size_bytes: u64) -> Result<Geometry, BadGeometry> {
        let bad = |why| BadGeometry { size_bytes, block_size_bytes, why };
        let block_size = BlockSize::new(block_size_bytes)
            .map_err(|_| bad("the block size must be a power of two from 16KiB to 1MiB"))?;
        if size_bytes == 0 {
            return Err(bad("it is empty"));
        }
        if block_size.blocks(size_bytes) > Self::MAX_BLOCKS {
            return Err(bad("it has more than 2^28 blocks; use larger blocks"));
        }
        Ok(Geometry { size_bytes, block_size })
    }

    /// How many blocks there are; the last may be short.
    pub fn blocks(&self) -> u64 {
        self.block_size.blocks(self.size_bytes)
    }

    /// How many manifest pages there are.
    pub fn pages(&self) -> u64 {
        pages_of(self.blocks())
    }

    /// Bytes in a block: 0 behind the end.
    pub fn len_of(&self, block: BlockIndex) -> u32 {
        self.block_size.len_of(block, self.size_bytes)
    }

    /// Where a block begins, in bytes.
    pub fn offset_of(&self, block: BlockIndex) -> u64 {
        self.block_size.offset_of(block)
    }

    /// How many ids a page has: 0 behind the end.
    pub fn ids_in(&self, page: PageIndex) -> u64 {
        let blocks = page.blocks(self.blocks());
        blocks.end - blocks.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pages_cover_every_block_once(size_bytes in 1u64..1 << 34, shift in 14u32..=20) {
            let geometry = Geometry::new(size_bytes, 1 << shift).expect("in range");
            let mut next = 0;
            for page in 0..geometry.pages() {
                let blocks = PageIndex(page).blocks(geometry.blocks());
                prop_assert_eq!(blocks.start, next);
                prop_assert!(blocks.end > blocks.start);
                prop_assert_eq!(PageIndex::of(BlockIndex(blocks.end - 1)), PageIndex(page));
                next = blocks.end;
            }
            prop_assert_eq!(next, geometry.blocks());
            prop_assert_eq!(geometry.ids_in(PageIndex(geometry.pages())), 0);
        }

        #[test]
        fn a_page_survives_its_bytes(ids in prop::collection::vec(any::<[u8; 32]>(), 0..1024)) {
            let page = Page::new(ids.into_iter().map(BlockId).collect());
            let bytes = page.to_bytes();
            let ids = page.ids().len() as u64;
            prop_assert!(Page::from_bytes(&bytes, ids + 1).is_err());
            prop_assert_eq!(Page::from_bytes(&bytes, ids), Ok(page));
        }
    }

    #[test]
    fn hostile_geometries_are_refused() {
        for (size, block) in [(0, 65536), (1, 0), (1, 65535), (1, 1 << 21), (u64::MAX, 65536), (1 << 43, 16384)] {
            assert!(Geometry::new(size, block).is_err(), "{size} in {block}");
        }
        assert_eq!(Geometry::new(16 << 40, 65536).expect("16 TiB").blocks(), Geometry::MAX_BLOCKS);
    }
}
