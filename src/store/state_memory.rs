//! The state database's twin in memory: for tests, with a way to lose what was not synced and to fail.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::state::{State, StateBatch, StateChange, StateError, end_of_prefix};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// A [`State`] that knows what a power cut would leave of it.
#[derive(Default)]
pub struct MemoryState(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    live: Map,
    durable: Map,
    /// What separates `live` from `durable`, in order.
    unsynced: Vec<StateBatch>,
    syncs: u64,
    /// Power cuts so far: each begins another boot.
    power_cuts: u64,
    failure: Option<String>,
}

impl MemoryState {
    /// An empty one.
    pub fn new() -> MemoryState {
        MemoryState::default()
    }

    /// A power cut: loses what was not synced.
    pub fn lose_unsynced(&self) {
        self.crash(0);
    }

    /// A power cut that came when `survivors` batches since the last sync had reached the disk by themselves.
    pub fn crash(&self, survivors: usize) {
        let mut inner = self.0.lock();
        let Inner { live, durable, unsynced, power_cuts, .. } = &mut *inner;
        unsynced.drain(..).take(survivors).for_each(|batch| apply(durable, &batch));
        *live = durable.clone();
        *power_cuts += 1;
    }

    /// How many batches a power cut could lose.
    pub fn unsynced_batches(&self) -> usize {
        self.0.lock().unsynced.len()
    }

    /// How many syncs there were.
    pub fn syncs(&self) -> u64 {
        self.0.lock().syncs
    }

    /// From now on every call of [`State`] fails with this message, and changes nothing; None ends it.
    pub fn fail_with(&self, message: Option<&str>) {
        self.0.lock().failure = message.map(str::to_owned);
    }

    fn lock(&self, doing: &'static str) -> Result<MutexGuard<'_, Inner>, StateError> {
        let inner = self.0.lock();
        match &inner.failure {
            Some(message) => {
                Err(StateError::Failed { dir: PathBuf::from("(memory)"), doing, message: message.clone() })
            }
            None => Ok(inner),
        }
    }
}

impl Inner {
    fn sync(&mut self) {
        self.syncs += 1;
        let Inner { durable, unsynced, .. } = self;
        unsynced.drain(..).for_each(|batch| apply(durable, &batch));
    }
}

fn apply(map: &mut Map, batch: &StateBatch) {
    for change in batch.changes() {
        match change {
            StateChange::Put { key, value } => {
                map.insert(key.clone(), value.clone());
            }
            StateChange::Delete { key } => {
                map.remove(key);
            }
            StateChange::DeletePrefix { prefix } => {
                let keys: Vec<_> = with_prefix(map, prefix).map(|(key, _)| key.clone()).collect();
                for key in keys {
                    map.remove(&key);
                }
            }
        }
    }
}

fn with_prefix<'a>(map: &'a Map, prefix: &[u8]) -> impl Iterator<Item = (&'a Vec<u8>, &'a Vec<u8>)> {
    let end = end_of_prefix(prefix).map_or(Bound::Unbounded, Bound::Excluded);
    map.range((Bound::Included(prefix.to_vec()), end))
}

impl State for MemoryState {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        Ok(self.lock("reading")?.live.get(key).cloned())
    }

    fn multi_get(&self, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>, StateError> {
        let inner = self.lock("reading")?;
        Ok(keys.iter().map(|key| inner.live.get(*key).cloned()).collect())
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), StateError> {
        let inner = self.lock("scanning")?;
        for (key, value) in with_prefix(&inner.live, prefix) {
            if !visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn write_batch(&self, batch: StateBatch, sync: bool) -> Result<(), StateError> {
        let mut inner = self.lock("writing")?;
        apply(&mut inner.live, &batch);
        inner.unsynced.push(batch);
        if sync {
            inner.sync();
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StateError> {
        self.lock("syncing")?.sync();
        Ok(())
    }

    fn boot(&self) -> Option<Arc<str>> {
        Some(format!("boot-{}", self.0.lock().power_cuts).into())
    }
}
