//! The two databases of a site: the library's twins in memory, which end with the process that has them open. Must not know keys.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use blockferry::core::frame::Frame;
use blockferry::core::ids::BlockId;
use blockferry::store::{MemoryState, MemoryStore, State, StateBatch, StateError, Store, StoreError, StoreStats};
use bytes::Bytes;
use parking_lot::Mutex;

use crate::process::Process;
use crate::random::Random;
use crate::site::Site;
use crate::world::Side;

/// The state database as one process has it open.
pub struct OpenState {
    pub kept: Arc<MemoryState>,
    pub process: Arc<Process>,
    pub boot: Arc<str>,
    pub site: Arc<Site>,
}

impl OpenState {
    fn check(&self, is_effect: bool) -> Result<(), StateError> {
        let may = if is_effect { self.process.may_act() } else { self.process.is_alive() };
        let is_failing = is_effect
            && self.process.side == Side::Destination
            && !self.process.is_starting()
            && self.process.world.weather.lock().is_state_failing;
        if may && !is_failing {
            return Ok(());
        }
        let message = if may { "no room" } else { "the process has ended" };
        Err(StateError::Failed { dir: PathBuf::from("state"), doing: "a call", message: message.into() })
    }
}

impl State for OpenState {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.check(false)?;
        self.kept.get(key)
    }

    fn multi_get(&self, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>, StateError> {
        self.check(false)?;
        self.kept.multi_get(keys)
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), StateError> {
        self.check(false)?;
        self.kept.scan(prefix, visit)
    }

    fn write_batch(&self, batch: StateBatch, sync: bool) -> Result<(), StateError> {
        self.check(true)?;
        self.process
            .world
            .note("state write", [self.process.side as u64, batch.changes().len() as u64, u64::from(sync)]);
        self.kept.write_batch(batch.clone(), sync)?;
        self.site.journalled(&batch);
        Ok(())
    }

    fn sync(&self) -> Result<(), StateError> {
        self.check(true)?;
        self.kept.sync()
    }

    fn boot(&self) -> Option<Arc<str>> {
        Some(Arc::clone(&self.boot))
    }
}

/// The content store of a site.
pub struct KeptStore {
    blocks: MemoryStore,
    ids: Mutex<BTreeSet<BlockId>>,
}

impl KeptStore {
    pub fn new() -> KeptStore {
        KeptStore { blocks: MemoryStore::new(1 << 30), ids: Mutex::default() }
    }

    /// It loses some of its blocks, as it may whenever the daemon ends.
    pub fn lose_some(&self, random: &mut Random) {
        let percent = [0, 30, 100][random.below(3) as usize];
        let mut ids = self.ids.lock();
        let lost: Vec<BlockId> = ids.iter().filter(|_| random.percent(percent)).copied().collect();
        lost.iter().for_each(|id| {
            ids.remove(id);
        });
        let _ = self.blocks.remove(&lost);
    }

    /// Some of its blocks rot.
    pub fn rot(&self, random: &mut Random) {
        self.ids.lock().iter().filter(|_| random.percent(30)).for_each(|id| {
            self.blocks.corrupt(id);
        });
    }

    /// Puts a block there before the simulation begins.
    pub fn prewarm(&self, bytes: &Bytes) {
        let id = BlockId::of(bytes);
        if !id.is_zero() {
            self.ids.lock().insert(id);
            let _ = self.blocks.put(&[(id, Frame::encode(bytes, 1))]);
        }
    }
}

/// The same as one process has it open.
pub struct OpenStore {
    pub kept: Arc<KeptStore>,
    pub process: Arc<Process>,
}

impl OpenStore {
    fn check(&self) -> Result<(), StoreError> {
        if self.process.is_alive() {
            return Ok(());
        }
        let message = "the process has ended".into();
        Err(StoreError::Failed { dir: PathBuf::from("store"), doing: "a call", message })
    }
}

impl Store for OpenStore {
    fn contains(&self, ids: &[BlockId]) -> Result<Vec<bool>, StoreError> {
        self.check()?;
        self.kept.blocks.contains(ids)
    }

    fn get(&self, ids: &[BlockId]) -> Result<Vec<Option<Bytes>>, StoreError> {
        self.check()?;
        let found = self.kept.blocks.get(ids)?;
        let hits = found.iter().flatten().count() as u64;
        self.process.world.note("store get", [ids.len() as u64, hits, 0]);
        Ok(found)
    }

    fn get_frames(&self, ids: &[BlockId]) -> Result<Vec<Option<Frame>>, StoreError> {
        self.check()?;
        self.kept.blocks.get_frames(ids)
    }

    fn put(&self, blocks: &[(BlockId, Frame)]) -> Result<(), StoreError> {
        self.check()?;
        self.process.world.note("store put", [blocks.len() as u64, 0, 0]);
        self.kept.ids.lock().extend(blocks.iter().map(|(id, _)| *id));
        self.kept.blocks.put(blocks)
    }

    fn remove(&self, ids: &[BlockId]) -> Result<(), StoreError> {
        self.check()?;
        self.kept.blocks.remove(ids)
    }

    fn stats(&self) -> StoreStats {
        self.kept.blocks.stats()
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.check()
    }
}
