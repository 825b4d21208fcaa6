//! How much of some images would not have to cross the WAN, step by step, before anything is moved.
//! Must not know stores, peers or volumes: it reads images and counts.
//!
//! The steps are taken in the order in which a relocation takes them, and every byte is counted in exactly one:
//! a block that is all **zero**; one that was met earlier **within** the same image; one that an earlier image of the
//! list has (**across**); one that only a **prewarmed** image has; the **unique** rest, of which zstd makes the
//! compressed bytes. They add up to the images' size.

mod count;
mod pass;
mod report;
mod seen;

use std::path::{Path, PathBuf};

pub use report::{ImageSavings, ImageSize, Link, Report, Savings, SizeSavings, WireModel};

use crate::core::ids::BlockSize;
use crate::image::{Image, ImageError};
use pass::Pass;
use seen::Holder;

/// What to work out, and how.
pub struct AnalyzeOptions<'a> {
    /// In any order; each is reported once, the smallest first. All are worked out in one pass over each image.
    pub block_sizes: Vec<BlockSize>,
    /// zstd level for the unique blocks (-7 to 22).
    pub zstd_level: i32,
    /// Worker threads; 0 for one a processor.
    pub threads: usize,
    /// The link to predict times for, in bits per second.
    pub link_bits_per_s: Option<u64>,
    /// The link's round trip, in milliseconds; without it none is counted.
    pub rtt_ms: Option<f64>,
    /// Called now and then from the calling thread: bytes done (holes included), bytes in all images together.
    pub progress: Option<&'a dyn Fn(u64, u64)>,
}

impl Default for AnalyzeOptions<'_> {
    /// 16 to 256 KiB, level 3, a thread a processor, no link.
    fn default() -> Self {
        let kib = [16u64, 32, 64, 128, 256];
        AnalyzeOptions {
            block_sizes: kib.iter().filter_map(|kib| BlockSize::new(kib << 10).ok()).collect(),
            zstd_level: 3,
            threads: 0,
            link_bits_per_s: None,
            rtt_ms: None,
            progress: None,
        }
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum AnalyzeError {
    /// An image could not be opened or read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Nothing to look at.
    #[error("no image was given: name at least one that would be relocated")]
    NoImages,
    /// Nothing to count in.
    #[error("no block size was given: name at least one, from 16KiB to 1MiB")]
    NoBlockSizes,
    /// More images than can be told apart.
    #[error("{0} images are too many for one analysis: give at most {max}", max = u32::MAX - 1)]
    TooManyImages(usize),
    /// A link on which nothing would ever arrive.
    #[error("{0}: give a rate above 0 and a round trip of 0 ms or more")]
    BadLink(String),
}

/// Reads `prewarmed`, then `images` in order, each once, and counts. Memory is about 27 bytes a distinct block and
/// block size, whatever the images' size; holes cost nothing.
///
/// # Errors
/// All images are opened before the first is read, so that a wrong name is noticed at once.
pub fn analyze(
    images: &[PathBuf],
    prewarmed: &[PathBuf],
    options: &AnalyzeOptions<'_>,
) -> Result<Report, AnalyzeError> {
    if images.is_empty() {
        return Err(AnalyzeError::NoImages);
    }
    if u32::try_from(images.len()).is_err() {
        return Err(AnalyzeError::TooManyImages(images.len()));
    }
    let link = checked_link(options)?;
    let mut block_sizes = options.block_sizes.clone();
    block_sizes.sort_by_key(|size| size.bytes());
    block_sizes.dedup();
    if block_sizes.is_empty() {
        return Err(AnalyzeError::NoBlockSizes);
    }

    let opened = open_all(images)?;
    let opened_prewarmed = open_all(prewarmed)?;
    let total_bytes = opened.iter().chain(&opened_prewarmed).map(Image::size_bytes).sum();
    let mut pass = Pass::new(block_sizes, options, total_bytes);
    for image in &opened_prewarmed {
        pass.read(image, Holder::PREWARMED)?;
    }
    let mut by_image = Vec::with_capacity(opened.len());
    for (holder, image) in (1..).map(Holder).zip(&opened) {
        by_image.push(pass.read(image, holder)?);
    }
    Ok(Report::new(
        sizes_of(&opened),
        sizes_of(&opened_prewarmed),
        options.zstd_level,
        link,
        pass.block_sizes(),
        by_image,
    ))
}

fn checked_link(options: &AnalyzeOptions<'_>) -> Result<Option<Link>, AnalyzeError> {
    let rtt_ms = options.rtt_ms.unwrap_or(0.0);
    if !(rtt_ms.is_finite() && rtt_ms >= 0.0) {
        return Err(AnalyzeError::BadLink(format!("a round trip of {rtt_ms} ms is not possible")));
    }
    match options.link_bits_per_s {
        Some(0) => Err(AnalyzeError::BadLink("on a link of 0 bit/s nothing arrives".into())),
        Some(bits_per_s) => Ok(Some(Link { bits_per_s, rtt_ms })),
        None => Ok(None),
    }
}

fn open_all(paths: &[PathBuf]) -> Result<Vec<Image>, ImageError> {
    paths.iter().map(|path| Image::open_read(Path::new(path))).collect()
}

fn sizes_of(images: &[Image]) -> Vec<ImageSize> {
    let size =
        |image: &Image| ImageSize { path: image.path().to_string_lossy().into_owned(), size_bytes: image.size_bytes() };
    images.iter().map(size).collect()
}

#[cfg(test)]
mod tests;
