//! A volume's name, and what each site has of it: by its journal, and by the bytes that it may hold. Must not know how sites work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use blockferry::core::ids::{Incarnation, Name};
use blockferry::handover::Held;
use blockferry::volume::Volume;
use parking_lot::Mutex;

use crate::model::Model;
use crate::process::Process;
use crate::world::{Flag, SIDES, Side};

/// See the module.
pub struct Slot {
    pub name: Name,
    pub number: u64,
    parts: Mutex<[Option<Arc<Part>>; SIDES]>,
    /// Every block is at the destination, by its own journal.
    pub is_complete: Flag,
    /// A person's decision was carried out after which there may be no owner, or two.
    pub is_decided: Flag,
    /// It was added once: who adds it again decides something.
    pub has_begun: Flag,
}

/// A volume at one site, from its first row to its last.
pub struct Part {
    pub side: Side,
    pub incarnation: Incarnation,
    pub image: String,
    /// Which content it descends from: another one for every image that was added.
    pub lineage: AtomicU64,
    /// As it is in the journal.
    pub held: Mutex<Held>,
    pub model: Mutex<Model>,
    /// What it was when it was handed over.
    pub released: Mutex<Option<Model>>,
    /// Whether a guest's write was acknowledged here since it came; and how many may have been: that is not known yet, or never will be.
    pub was_written: AtomicBool,
    pub may_be_written: AtomicU32,
    /// So many people say that writes may be thrown away; that it may go; that the other side is lost. Who was refused says so no more.
    pub may_discard: AtomicU32,
    pub may_go: AtomicU32,
    pub may_reclaim: AtomicU32,
    /// It owns the volume no more.
    pub is_over: Flag,
}

impl Part {
    pub fn is_owner(&self) -> bool {
        self.held.lock().state.is_owner()
    }
}

/// A volume in one life of one site.
pub struct Served {
    pub volume: Arc<Volume>,
    pub process: Arc<Process>,
    pub part: Arc<Part>,
}

impl Slot {
    pub fn new(name: Name, number: u64) -> Slot {
        Slot {
            name,
            number,
            parts: Mutex::default(),
            is_complete: Flag::default(),
            is_decided: Flag::default(),
            has_begun: Flag::default(),
        }
    }

    /// What a site has of it.
    pub fn part(&self, side: Side) -> Option<Arc<Part>> {
        self.parts.lock()[side as usize].clone()
    }

    /// All that there is of it.
    pub fn parts(&self) -> Vec<Arc<Part>> {
        self.parts.lock().iter().flatten().cloned().collect()
    }

    pub fn set_part(&self, side: Side, part: Option<Arc<Part>>) {
        self.parts.lock()[side as usize] = part;
    }

    /// Whether this is what a site has of it now.
    pub fn is_current(&self, part: &Arc<Part>) -> bool {
        self.part(part.side).is_some_and(|now| Arc::ptr_eq(&now, part))
    }
}
