//! One pass over an image: reads it in chunks, and counts in all block sizes at once in a pool of workers.
//! Must not know how a report looks.
//!
//! Nothing that is counted depends on the order in which the workers get at the chunks of one image: whichever of two
//! equal blocks is met first, the bytes are the same. Images are read one after the other.

use std::collections::HashSet;
use std::panic::resume_unwind;
use std::thread;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::AnalyzeOptions;
use super::count::{Counts, Tally, Worker};
use super::seen::{Holder, Seen};
use crate::core::ids::BlockSize;
use crate::core::manifest::pages_of;
use crate::image::{Image, ImageError};

/// What is read at once, in bytes: a whole number of blocks of every size ([`BlockSize::MAX`]).
const CHUNK_BYTES: usize = 1 << 20;

/// What lasts from image to image.
pub(super) struct Pass<'a> {
    /// Ascending; `seen` and `seen_pages` have one entry for each.
    block_sizes: Vec<BlockSize>,
    seen: Vec<Seen>,
    seen_pages: Vec<HashSet<u128>>,
    zstd_level: i32,
    threads: usize,
    progress: Option<&'a dyn Fn(u64, u64)>,
    done_bytes: u64,
    total_bytes: u64,
}

/// A piece of an image, on its way to a worker.
struct Chunk {
    offset: u64,
    buffer: Vec<u8>,
    /// How much of `buffer` is the image's.
    len: usize,
}

impl<'a> Pass<'a> {
    /// `block_sizes` must be ascending and not empty; `total_bytes` is what progress counts towards.
    pub(super) fn new(block_sizes: Vec<BlockSize>, options: &AnalyzeOptions<'a>, total_bytes: u64) -> Pass<'a> {
        let processors = || thread::available_parallelism().map_or(1, usize::from);
        Pass {
            seen: block_sizes.iter().map(|_| Seen::new()).collect(),
            seen_pages: block_sizes.iter().map(|_| HashSet::new()).collect(),
            block_sizes,
            zstd_level: options.zstd_level,
            threads: if options.threads == 0 { processors() } else { options.threads },
            progress: options.progress,
            done_bytes: 0,
            total_bytes,
        }
    }

    pub(super) fn block_sizes(&self) -> &[BlockSize] {
        &self.block_sizes
    }

    /// Reads an image; what comes back has an entry for each block size. Holders must come in order.
    pub(super) fn read(&mut self, image: &Image, holder: Holder) -> Result<Vec<Tally>, ImageError> {
        let Pass { block_sizes, seen, seen_pages, zstd_level, threads, progress, done_bytes, total_bytes } = self;
        let mut progress = |bytes: u64| {
            *done_bytes += bytes;
            if let Some(progress) = progress {
                progress(*done_bytes, *total_bytes);
            }
        };
        let (to_workers, chunks) = unbounded::<Chunk>();
        // There are no other buffers: they bound what is read and not counted yet. Sends cannot fail, or mean that the
        // other side has gone on an error that is reported when it is joined.
        let (to_reader, buffers) = unbounded();
        for _ in 0..*threads * 2 {
            let _ = to_reader.send(vec![0u8; CHUNK_BYTES]);
        }

        let (hole_bytes, counts) = thread::scope(|scope| {
            let workers: Vec<_> = (0..*threads)
                .map(|_| {
                    let mut worker = Worker::new(block_sizes, seen, holder, *zstd_level);
                    let (chunks, to_reader) = (chunks.clone(), to_reader.clone());
                    scope.spawn(move || {
                        for Chunk { offset, buffer, len } in chunks {
                            worker.count(offset, &buffer[..len]);
                            let _ = to_reader.send(buffer);
                        }
                        worker.into_counts()
                    })
                })
                .collect();
            drop((chunks, to_reader));
            let hole_bytes = read_chunks(image, &buffers, to_workers, &mut progress);
            let mut sum = Counts::new(block_sizes.len());
            for worker in workers {
                sum += worker.join().unwrap_or_else(|panic| resume_unwind(panic));
            }
            (hole_bytes, sum)
        });

        let hole_bytes = hole_bytes?;
        let mut tallies = counts.tallies;
        for (i, tally) in tallies.iter_mut().enumerate() {
            tally.zero_bytes += hole_bytes;
            tally.pages = pages_of(block_sizes[i].blocks(image.size_bytes()));
            // Prewarming brings blocks, not manifests.
            if holder != Holder::PREWARMED {
                let new = counts.pages[i].values().filter(|page| seen_pages[i].insert(page.content));
                tally.new_page_ids = new.map(|page| page.ids).sum();
            }
        }
        Ok(tallies)
    }
}

/// Sends every chunk that holds data; returns the bytes of those that lie in holes altogether.
fn read_chunks(
    image: &Image,
    buffers: &Receiver<Vec<u8>>,
    to_workers: Sender<Chunk>,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, ImageError> {
    let (size_bytes, chunk_bytes) = (image.size_bytes(), CHUNK_BYTES as u64);
    let (mut offset, mut data_end, mut hole_bytes) = (0, 0, 0);
    while offset < size_bytes {
        if offset >= data_end {
            let data = image.next_data(offset)?.unwrap_or(size_bytes..size_bytes);
            let hole_end = if data.start < size_bytes { data.start - data.start % chunk_bytes } else { size_bytes };
            data_end = data.end;
            if hole_end > offset {
                hole_bytes += hole_end - offset;
                progress(hole_end - offset);
                offset = hole_end;
                continue;
            }
        }
        let Ok(mut buffer) = buffers.recv() else { break };
        let len = chunk_bytes.min(size_bytes - offset);
        image.read_at(offset, &mut buffer[..len as usize])?;
        let _ = to_workers.send(Chunk { offset, buffer, len: len as usize });
        progress(len);
        offset += len;
    }
    Ok(hole_bytes)
}
