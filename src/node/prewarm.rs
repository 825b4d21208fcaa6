//! Fills the store from images at this site, on threads of its own. Must not know peers nor volumes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::Node;
use crate::control::{ApiError, ErrorKind, JobId, PrewarmStatus};
use crate::core::frame::Frame;
use crate::core::ids::{BlockId, BlockSize};
use crate::image::Image;
use crate::store::Store;

/// Blocks that are looked up and written in one call to the store.
const BATCH: usize = 64;
/// Jobs that are remembered after their end.
const MAX_JOBS: usize = 256;
/// zstd level for blocks that are stored but not sent.
const LEVEL: i32 = 3;

#[derive(Default)]
pub(super) struct Jobs(Mutex<BTreeMap<JobId, Arc<Mutex<PrewarmStatus>>>>);

impl Jobs {
    pub(super) fn status(&self, job: JobId) -> Option<PrewarmStatus> {
        Some(self.0.lock().get(&job)?.lock().clone())
    }

    fn add(&self, job: JobId, status: PrewarmStatus) -> Arc<Mutex<PrewarmStatus>> {
        let status = Arc::new(Mutex::new(status));
        let mut jobs = self.0.lock();
        while jobs.len() >= MAX_JOBS {
            let ended = jobs.iter().find(|(_, status)| status.lock().done).map(|(job, _)| *job);
            match ended {
                Some(ended) => jobs.remove(&ended),
                None => break,
            };
        }
        jobs.insert(job, Arc::clone(&status));
        status
    }
}

impl Node {
    /// Opens all images, so that a wrong name is noticed at once, and begins to read them.
    pub(super) fn begin_prewarm(self: &Arc<Self>, job: JobId, paths: Vec<PathBuf>) -> Result<(), ApiError> {
        let invalid = |what: String| ApiError::new(ErrorKind::Invalid, what, "");
        if paths.is_empty() {
            return Err(invalid("no image was given".into()));
        }
        let mut images = Vec::new();
        for path in &paths {
            images.push(Image::open_read(path).map_err(|error| invalid(error.to_string()))?);
        }
        let status = self.prewarms.add(
            job,
            PrewarmStatus {
                images: paths,
                bytes_done: 0,
                bytes_total: images.iter().map(Image::size_bytes).sum(),
                blocks_new: 0,
                blocks_known: 0,
                blocks_zero: 0,
                done: false,
                error: None,
            },
        );
        let (store, block_size) = (Arc::clone(&self.store), self.config.store.block_size);
        let spawned = std::thread::Builder::new().name("prewarm".into()).spawn(move || {
            crate::workers::yield_to_guests();
            let done = images.iter().try_for_each(|image| fill(&*store, image, block_size, &status));
            let done = done.and_then(|()| store.flush().map_err(|error| error.to_string()));
            let mut status = status.lock();
            status.done = true;
            status.error = done.err();
        });
        spawned.map(drop).map_err(|error| ApiError::new(ErrorKind::Internal, format!("no thread: {error}"), ""))
    }
}

fn fill(store: &dyn Store, image: &Image, block_size: BlockSize, status: &Mutex<PrewarmStatus>) -> Result<(), String> {
    let block_bytes = u64::from(block_size.bytes());
    let before = image.stamp().map_err(|error| error.to_string())?;
    let mut at = 0;
    while at < image.size_bytes() {
        let data = image.next_data(at).map_err(|error| error.to_string())?;
        let start = data.map_or(image.size_bytes(), |data| data.start - data.start % block_bytes).max(at);
        {
            let mut status = status.lock();
            status.bytes_done += start - at;
            status.blocks_zero += (start - at).div_ceil(block_bytes);
        }
        at = start;
        let mut batch = Vec::with_capacity(BATCH);
        let mut bytes_read = 0;
        while at < image.size_bytes() && batch.len() < BATCH {
            let len = (image.size_bytes() - at).min(block_bytes);
            let mut block = vec![0; len as usize];
            image.read_at(at, &mut block).map_err(|error| error.to_string())?;
            batch.push((BlockId::of(&block), Bytes::from(block)));
            at += len;
            bytes_read += len;
            let next = image.next_data(at).map_err(|error| error.to_string())?;
            if next.is_none_or(|data| data.start >= at + block_bytes) {
                break;
            }
        }
        let zeros = batch.iter().filter(|(id, _)| id.is_zero()).count();
        batch.retain(|(id, _)| !id.is_zero());
        let ids: Vec<BlockId> = batch.iter().map(|(id, _)| *id).collect();
        let known = store.contains(&ids).map_err(|error| error.to_string())?;
        let mut seen = std::collections::HashSet::new();
        let new: Vec<(BlockId, Frame)> = batch
            .iter()
            .zip(&known)
            .filter(|((id, _), known)| !**known && seen.insert(*id))
            .map(|((id, bytes), _)| (*id, Frame::encode(bytes, LEVEL)))
            .collect();
        store.put(&new).map_err(|error| error.to_string())?;
        let mut status = status.lock();
        status.bytes_done += bytes_read;
        status.blocks_new += new.len() as u64;
        status.blocks_known += (ids.len() - new.len()) as u64;
        status.blocks_zero += zeros as u64;
    }
    // What was stored is right whatever happened: blocks are kept by what they hold. But the operator wants to know.
    if image.stamp().map_err(|error| error.to_string())? != before {
        return Err(format!(
            "image {}: was changed while it was being read; what was read is in the store, prewarm again for the rest",
            image.path().display()
        ));
    }
    Ok(())
}
