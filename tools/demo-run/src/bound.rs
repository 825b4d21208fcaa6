//! What has to cross the WAN at least, counted here without the program under test: the blocks that no earlier image
//! has, each compressed by itself. Must not know sites.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result};

use blockferry_lab::process::check_interrupt;

/// The level that the bound is defined with.
const ZSTD_LEVEL: i32 = 3;

/// What the images so far had.
#[derive(Default)]
pub struct Known(HashSet<blake3::Hash>);

/// Of one image, with regard to those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MustMove {
    /// Blocks that are not zero and in none of the earlier images; each counted once.
    pub blocks: u64,
    /// Their frames together, a block that does not shrink as it is.
    pub compressed_bytes: u64,
}

impl Known {
    /// Counts an image, and knows its blocks from then on.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn add(&mut self, image: &Path, block_bytes: u64) -> Result<MustMove> {
        let context = || format!("cannot read {}", image.display());
        let file = File::open(image).with_context(context)?;
        let size = file.metadata().with_context(context)?.size();
        let mut compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL).context("zstd")?;
        let mut must = MustMove::default();
        let mut block = vec![0; block_bytes as usize];
        for offset in (0..size).step_by(block_bytes as usize) {
            check_interrupt()?;
            let block = &mut block[..block_bytes.min(size - offset) as usize];
            file.read_exact_at(block, offset).with_context(context)?;
            if is_zero(block) || !self.0.insert(blake3::hash(block)) {
                continue;
            }
            let frame = compressor.compress(block).context("zstd")?;
            must.blocks += 1;
            must.compressed_bytes += frame.len().min(block.len()) as u64;
        }
        Ok(must)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(1024).all(|piece| piece.iter().fold(0, |sum, byte| sum | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let image = |name: &str, blocks: &[u8]| {
            let path = dir.path().join(name);
            let bytes: Vec<u8> = blocks.iter().flat_map(|byte| [*byte; 4096]).collect();
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let mut known = Known::default();
        let first = known.add(&image("first", &[1, 0, 2, 1]), 4096).unwrap();
        assert_eq!(first.blocks, 2);
        assert!(first.compressed_bytes > 0 && first.compressed_bytes < 200, "{first:?}");
        let second = known.add(&image("second", &[0, 2, 3, 3]), 4096).unwrap();
        assert_eq!(second.blocks, 1);
        assert_eq!(known.add(&image("third", &[3, 1]), 4096).unwrap(), MustMove::default());
    }
}
