//! The content store's twin in memory: for tests, with a way to damage blocks and to fail. Same promises, same policy:
//! what was put first goes first, and a block that is hit in the older half is put again.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Counters, Store, StoreError, StoreStats, add};
use crate::core::frame::Frame;
use crate::core::ids::BlockId;

/// A [`Store`] that forgets everything when it is dropped.
pub struct MemoryStore {
    capacity_bytes: u64,
    inner: Mutex<Inner>,
    counters: Counters,
}

#[derive(Default)]
struct Inner {
    frames: HashMap<BlockId, Kept>,
    /// Every put, the oldest first; those whose number is not the block's any more mean nothing.
    order: VecDeque<(u64, BlockId)>,
    next_number: u64,
    stored_bytes: u64,
    failure: Option<String>,
}

struct Kept {
    number: u64,
    frame: Frame,
}

impl MemoryStore {
    /// An empty store that drops its oldest blocks beyond `capacity_bytes` of frames.
    pub fn new(capacity_bytes: u64) -> MemoryStore {
        MemoryStore { capacity_bytes, inner: Mutex::default(), counters: Counters::default() }
    }

    /// From now on every call but [`Store::stats`] fails with this message; None ends it.
    pub fn fail_with(&self, message: Option<&str>) {
        self.inner.lock().failure = message.map(str::to_owned);
    }

    /// Damages a block; whether it was there.
    pub fn corrupt(&self, id: &BlockId) -> bool {
        let mut inner = self.inner.lock();
        let Some(kept) = inner.frames.get_mut(id) else { return false };
        let mut payload = kept.frame.payload.to_vec();
        match payload.last_mut() {
            Some(byte) => *byte ^= 0x80,
            None => payload.push(0x80),
        }
        kept.frame.payload = payload.into();
        true
    }

    fn fail(message: &str, doing: &'static str) -> StoreError {
        StoreError::Failed { dir: PathBuf::from("(memory)"), doing, message: message.to_owned() }
    }

    fn lock(&self, doing: &'static str) -> Result<parking_lot::MutexGuard<'_, Inner>, StoreError> {
        let inner = self.inner.lock();
        match &inner.failure {
            Some(message) => Err(Self::fail(message, doing)),
            None => Ok(inner),
        }
    }
}

impl Inner {
    fn insert(&mut self, id: BlockId, frame: Frame) {
        self.remove(&id);
        let number = self.next_number;
        self.next_number += 1;
        self.stored_bytes += frame.len_bytes() as u64;
        self.order.push_back((number, id));
        self.frames.insert(id, Kept { number, frame });
    }

    fn remove(&mut self, id: &BlockId) {
        if let Some(kept) = self.frames.remove(id) {
            self.stored_bytes -= kept.frame.len_bytes() as u64;
        }
    }

    fn make_room(&mut self, capacity_bytes: u64) {
        while self.stored_bytes > capacity_bytes {
            let Some((number, id)) = self.order.pop_front() else { break };
            if self.frames.get(&id).is_some_and(|kept| kept.number == number) {
                self.remove(&id);
            }
        }
    }

    /// Whether a block will be among the next to go.
    fn is_old(&self, kept: &Kept, capacity_bytes: u64) -> bool {
        self.stored_bytes > capacity_bytes / 2 && self.next_number - kept.number > self.frames.len() as u64 / 2
    }
}

impl Store for MemoryStore {
    fn contains(&self, ids: &[BlockId]) -> Result<Vec<bool>, StoreError> {
        let inner = self.lock("looking for blocks")?;
        Ok(ids.iter().map(|id| inner.frames.contains_key(id)).collect())
    }

    fn get(&self, ids: &[BlockId]) -> Result<Vec<Option<Bytes>>, StoreError> {
        let mut inner = self.lock("reading blocks")?;
        let mut found = Vec::with_capacity(ids.len());
        for id in ids {
            let Some(kept) = inner.frames.get(id) else {
                found.push(None);
                continue;
            };
            match kept.frame.decode_verified(id) {
                Ok(raw) => {
                    if inner.is_old(kept, self.capacity_bytes) {
                        let frame = kept.frame.clone();
                        inner.insert(*id, frame);
                        add(&self.counters.renewed, 1);
                    }
                    found.push(Some(raw));
                }
                Err(_) => {
                    inner.remove(id);
                    add(&self.counters.corrupt_dropped, 1);
                    found.push(None);
                }
            }
        }
        self.counters.looked_up(&found);
        Ok(found)
    }

    fn get_frames(&self, ids: &[BlockId]) -> Result<Vec<Option<Frame>>, StoreError> {
        let inner = self.lock("reading frames")?;
        let found: Vec<_> = ids.iter().map(|id| inner.frames.get(id).map(|kept| kept.frame.clone())).collect();
        self.counters.looked_up_frames(&found);
        Ok(found)
    }

    fn put(&self, blocks: &[(BlockId, Frame)]) -> Result<(), StoreError> {
        let mut inner = self.lock("writing blocks")?;
        for (id, frame) in blocks {
            debug_assert!(!id.is_zero(), "zero blocks are never stored");
            if !id.is_zero() {
                self.counters.put(frame);
                inner.insert(*id, frame.clone());
            }
        }
        inner.make_room(self.capacity_bytes);
        Ok(())
    }

    fn remove(&self, ids: &[BlockId]) -> Result<(), StoreError> {
        let mut inner = self.lock("removing blocks")?;
        ids.iter().for_each(|id| inner.remove(id));
        Ok(())
    }

    fn stats(&self) -> StoreStats {
        let inner = self.inner.lock();
        StoreStats {
            blocks_estimate: inner.frames.len() as u64,
            stored_bytes: inner.stored_bytes,
            capacity_bytes: self.capacity_bytes,
            memory_bytes: inner.stored_bytes,
            ..self.counters.stats()
        }
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.lock("flushing").map(|_| ())
    }
}
