//! The source: its volumes, complete and served, and its end of the hand-over, put together as the daemon does.
//! Must not know the destination's insides.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockferry::core::ids::Name;
use blockferry::core::manifest::Geometry;
use blockferry::core::wire::Refusal;
use blockferry::source::{Catalog, Hasher, Manifest, Refused, SourceOptions, SourceVolume, serve_link};
use blockferry::store::{MemoryState, State};
use blockferry::transport::{BoxFuture, NewLink};
use blockferry::volume::{Volume, VolumeParts};
use blockferry::workers::Workers;
use parking_lot::Mutex;

use crate::disk::DiskFile;
use crate::kept::OpenState;
use crate::model::Crash;
use crate::process::Process;
use crate::slot::Slot;
use crate::world::{Shared, Side};

/// What outlives the source's processes.
pub struct SourceSite {
    pub world: Shared,
    pub name: Name,
    pub slots: Vec<Arc<Slot>>,
    pub files: Vec<Arc<DiskFile>>,
    pub state: Arc<MemoryState>,
    pub boot: Mutex<u64>,
    /// The process that runs now.
    pub life: Mutex<Option<Arc<SourceLife>>>,
}

/// One life of the source.
pub struct SourceLife {
    pub process: Arc<Process>,
    slots: Vec<Arc<Slot>>,
    state: Arc<dyn State>,
    workers: Workers,
    hasher: Hasher,
    entries: BTreeMap<String, Entry>,
    name: Name,
}

struct Entry {
    slot: Arc<Slot>,
    volume: Arc<Volume>,
    source: Arc<SourceVolume>,
    record: Mutex<Record>,
    turn: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy)]
struct Record {
    epoch: u64,
    is_released: bool,
    is_completed: bool,
}

const GENERATION: u64 = 7;

impl Record {
    fn key(slot: &Slot) -> Vec<u8> {
        format!("vol/{}", slot.name).into_bytes()
    }

    fn load(state: &dyn State, slot: &Slot) -> Option<Record> {
        let row = state.get(&Record::key(slot)).ok()?;
        Some(match row.as_deref() {
            Some([epoch, released, completed]) => {
                Record { epoch: u64::from(*epoch), is_released: *released > 0, is_completed: *completed > 0 }
            }
            _ => Record { epoch: 1, is_released: false, is_completed: false },
        })
    }

    fn save(self, state: &dyn State, slot: &Slot) -> Result<(), Refused> {
        let mut batch = blockferry::store::StateBatch::default();
        batch.put(Record::key(slot), vec![self.epoch as u8, u8::from(self.is_released), u8::from(self.is_completed)]);
        state.write_batch(batch, true).map_err(|error| (Refusal::Internal, error.to_string()))
    }
}

impl SourceSite {
    /// Starts a process. None if it died over it.
    pub fn start(&self, process: &Arc<Process>) -> Option<Arc<SourceLife>> {
        let state: Arc<dyn State> = Arc::new(OpenState {
            kept: Arc::clone(&self.state),
            process: Arc::clone(process),
            boot: format!("source {}", self.boot.lock()).into(),
        });
        let workers = process.workers();
        let hasher = Hasher::start_in_runtime(workers.clone());
        let mut entries = BTreeMap::new();
        for (slot, file) in self.slots.iter().zip(&self.files) {
            let record = Record::load(&*state, slot)?;
            let image = Arc::new(file.open(process, slot.name.as_str()));
            let geometry = Geometry::new(image.size_bytes(), crate::BLOCK).ok()?;
            let volume = Arc::new(Volume::complete(VolumeParts {
                name: slot.name.clone(),
                incarnation: slot.incarnation(),
                image: Arc::clone(&image),
                geometry,
                state: Arc::clone(&state),
                workers: workers.clone(),
                is_owner: !record.is_released,
            }));
            let manifest =
                Manifest::open(slot.name.clone(), Arc::clone(&image), geometry, Arc::clone(&state), record.is_released);
            let source = Arc::new(SourceVolume {
                name: slot.name.clone(),
                image,
                geometry,
                manifest: Arc::new(manifest.ok()?),
                generation: GENERATION,
            });
            volume.set_observer(Some(Arc::clone(&source) as _));
            hasher.hash_in_background(&source);
            slot.serve(Arc::clone(&volume), process);
            let (slot, record) = (Arc::clone(slot), Mutex::new(record));
            let entry = Entry { slot, volume, source, record, turn: tokio::sync::Mutex::default() };
            entries.insert(entry.slot.name.to_string(), entry);
        }
        let (process, slots, name) = (Arc::clone(process), self.slots.clone(), self.name.clone());
        Some(Arc::new(SourceLife { process, slots, state, workers, hasher, entries, name }))
    }

    /// After the death of a process: what is left.
    pub fn bury(&self, has_lost_power: bool) {
        *self.life.lock() = None;
        for (slot, file) in self.slots.iter().zip(&self.files) {
            slot.serve_no_more(Side::Source);
            if has_lost_power {
                self.world.random(|random| file.lose_power(random));
            }
            if slot.holder() == Side::Source {
                slot.model.lock().crash(if has_lost_power { Crash::PowerLoss } else { Crash::Killed });
            }
        }
        if has_lost_power {
            *self.boot.lock() += 1;
            self.state.crash(self.world.below(self.state.unsynced_batches() as u64 + 1) as usize);
        }
    }
}

impl SourceLife {
    /// Serves a connection.
    pub fn serve(self: &Arc<Self>, link: NewLink) {
        let options = SourceOptions { site: self.name.clone(), zstd_level: None };
        let catalog = Arc::clone(self) as Arc<dyn Catalog>;
        tokio::spawn(serve_link(link, catalog, self.hasher.clone(), self.workers.clone(), options));
    }

    fn entry(&self, volume: &Name) -> Result<&Entry, Refused> {
        let found = self.entries.get(volume.as_str()).filter(|_| !self.slots.is_empty());
        found.ok_or((Refusal::UnknownVolume, format!("there is no volume {volume}")))
    }
}

impl Catalog for SourceLife {
    fn open(&self, _peer: &Name, volume: &Name) -> Result<(Arc<SourceVolume>, u64), Refused> {
        let entry = self.entry(volume)?;
        Ok((Arc::clone(&entry.source), entry.record.lock().epoch))
    }

    fn take_over<'a>(&'a self, _peer: &'a Name, volume: &'a Name, epoch: u64) -> BoxFuture<'a, Result<u64, Refused>> {
        Box::pin(async move {
            let entry = self.entry(volume)?;
            let _turn = entry.turn.lock().await;
            let record = *entry.record.lock();
            match record {
                Record { is_released: true, epoch: at, .. } if at == epoch => return Ok(epoch),
                Record { is_released: false, epoch: at, .. } if at + 1 == epoch => {}
                _ => return Err((Refusal::NotOwner, format!("volume {volume} is at epoch {}", record.epoch))),
            }
            let internal = |error: String| (Refusal::Internal, error);
            let source = Arc::clone(&entry.source);
            let sealed = async {
                entry.volume.fence().await.map_err(|error| internal(error.to_string()))?;
                let rest = move || source.manifest.check_unchanged().and_then(|()| source.manifest.seal());
                let rested = self.workers.run_apart(&tokio::runtime::Handle::current(), rest).await;
                rested.map_err(|_| internal("ended".into()))?.map_err(|error| internal(error.to_string()))
            };
            if let Err(refused) = sealed.await {
                entry.volume.unfence();
                return Err(refused);
            }
            let next = Record { epoch, is_released: true, is_completed: false };
            next.save(&*self.state, &entry.slot)?;
            *entry.record.lock() = next;
            entry.slot.is_released.store(true, Ordering::Relaxed);
            self.process.world.note("released", [entry.slot.number, epoch, 0]);
            Ok(epoch)
        })
    }

    fn completed<'a>(&'a self, _peer: &'a Name, volume: &'a Name, epoch: u64) -> BoxFuture<'a, Result<u64, Refused>> {
        Box::pin(async move {
            let entry = self.entry(volume)?;
            let _turn = entry.turn.lock().await;
            let record = *entry.record.lock();
            if !record.is_released || record.epoch != epoch {
                return Err((Refusal::NotOwner, format!("volume {volume} is not on its way")));
            }
            let next = Record { is_completed: true, ..record };
            next.save(&*self.state, &entry.slot)?;
            *entry.record.lock() = next;
            Ok(epoch)
        })
    }

    fn give_back<'a>(&'a self, _peer: &'a Name, volume: &'a Name, _epoch: u64) -> BoxFuture<'a, Result<u64, Refused>> {
        Box::pin(async move { Err((Refusal::BadRequest, format!("nobody gives volume {volume} back here"))) })
    }
}
