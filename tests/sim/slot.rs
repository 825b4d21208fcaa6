//! A volume as guests know it: where it is served at the moment, and what it may hold. Must not know how sites work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockferry::core::ids::{Incarnation, Name};
use blockferry::volume::Volume;
use parking_lot::Mutex;

use crate::model::Model;
use crate::process::Process;
use crate::world::{Flag, Side};

/// See the module.
pub struct Slot {
    pub name: Name,
    pub number: u64,
    pub model: Mutex<Model>,
    served: [Mutex<Option<Arc<Served>>>; 2],
    /// The source has journalled that it let go.
    pub is_released: AtomicBool,
    /// The destination has journalled that it took over: from here on the bytes that count are there.
    pub is_taken: AtomicBool,
    /// Every block is at the destination, by its own journal.
    pub is_complete: Flag,
}

/// A volume in one life of one site.
pub struct Served {
    pub volume: Arc<Volume>,
    pub process: Arc<Process>,
}

impl Slot {
    pub fn new(name: Name, number: u64, content: Vec<u8>) -> Slot {
        Slot {
            name,
            number,
            model: Mutex::new(Model::new(content)),
            served: Default::default(),
            is_released: AtomicBool::new(false),
            is_taken: AtomicBool::new(false),
            is_complete: Flag::default(),
        }
    }

    /// The same in every life: none of its relocations is given up.
    pub fn incarnation(&self) -> Incarnation {
        Incarnation(u128::from(self.number).to_be_bytes())
    }

    pub fn serve(&self, volume: Arc<Volume>, process: &Arc<Process>) {
        *self.served[process.side as usize].lock() = Some(Arc::new(Served { volume, process: Arc::clone(process) }));
    }

    pub fn serve_no_more(&self, side: Side) {
        *self.served[side as usize].lock() = None;
    }

    pub fn at(&self, side: Side) -> Option<Arc<Served>> {
        self.served[side as usize].lock().clone().filter(|served| served.process.is_alive())
    }

    /// Which site has the bytes that count.
    pub fn holder(&self) -> Side {
        if self.is_taken.load(Ordering::Relaxed) { Side::Destination } else { Side::Source }
    }

    /// Where a guest goes now.
    pub fn current(&self) -> Option<Arc<Served>> {
        if self.holder() == Side::Destination {
            return self.at(Side::Destination);
        }
        self.at(Side::Source).filter(|_| !self.is_released.load(Ordering::Relaxed))
    }

    /// Where a guest must be refused.
    pub fn not_owner(&self) -> Option<Arc<Served>> {
        match self.holder() {
            Side::Destination => self.at(Side::Source),
            Side::Source => self.at(Side::Destination),
        }
    }
}
