//! Reads every site's journal as it is written: who owns what, whether that may be, and where content goes with it.
//! Must not know how a site decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockferry::core::ids::Name;
use blockferry::handover::{Held, State};
use blockferry::node::record::VolumeRecord;
use parking_lot::Mutex;

use crate::model::Model;
use crate::slot::{Part, Slot};
use crate::world::{Flag, Shared, Side};

/// See the module.
pub struct Referee {
    world: Shared,
    slots: BTreeMap<Name, Arc<Slot>>,
    /// Which name each site has.
    sites: BTreeMap<Name, Side>,
    next_lineage: AtomicU64,
    /// Lineages of which a person decided whose they are; that a person took away.
    reclaimed: Mutex<BTreeSet<u64>>,
}

/// A site's image by its path.
pub type ContentOf<'a> = &'a dyn Fn(&str) -> Option<Vec<u8>>;

impl Referee {
    pub fn new(world: &Shared, slots: &[Arc<Slot>], sites: BTreeMap<Name, Side>) -> Referee {
        Referee {
            world: Arc::clone(world),
            slots: slots.iter().map(|slot| (slot.name.clone(), Arc::clone(slot))).collect(),
            sites,
            next_lineage: AtomicU64::new(1),
            reclaimed: Mutex::default(),
        }
    }

    pub fn was_reclaimed(&self, lineage: u64) -> bool {
        self.reclaimed.lock().contains(&lineage)
    }

    fn fail(&self, side: Side, slot: &Slot, what: String) {
        self.world.fail("ownership", format!("{} at the {side:?}: {what}", slot.name));
    }

    /// A site has journalled a record, durably.
    pub fn journalled(&self, side: Side, record: &VolumeRecord, content_of: ContentOf) {
        let Some(slot) = self.slots.get(&record.name) else { return };
        let state = format!("{:?}", record.held.state);
        self.world.say(|| format!("{} at the {side:?}: {:?} {state}", slot.name, record.held.epoch));
        let number = state.bytes().take(2).fold(0, |hash, byte| hash << 8 | u64::from(byte));
        self.world.note("journal", [(side as u64) << 8 | slot.number, record.held.epoch.0, number]);
        match slot.part(side).filter(|part| part.incarnation == record.incarnation) {
            Some(part) => {
                let before = std::mem::replace(&mut *part.held.lock(), record.held.clone());
                if before != record.held {
                    self.changed(slot, &part, &before, &record.held);
                }
            }
            None => self.began(slot, side, record, content_of),
        }
        self.look_for_two_owners(slot);
    }

    fn began(&self, slot: &Slot, side: Side, record: &VolumeRecord, content_of: ContentOf) {
        if slot.part(side).is_some() {
            self.fail(side, slot, "a second volume of the name began before the first one ended".into());
        }
        let image = record.image.display().to_string();
        let (lineage, content) = match &record.held.state {
            State::Owned => (self.next_lineage.fetch_add(1, Ordering::Relaxed), content_of(&image)),
            State::Asking { .. } => (0, Some(Vec::new())),
            state => return self.fail(side, slot, format!("it began as {state:?}")),
        };
        let Some(content) = content else { return self.fail(side, slot, "it began without an image".into()) };
        let part = Part {
            side,
            incarnation: record.incarnation,
            image,
            lineage: AtomicU64::new(lineage),
            held: Mutex::new(record.held.clone()),
            model: Mutex::new(Model::new(content)),
            released: Mutex::new(None),
            was_written: Default::default(),
            may_be_written: Default::default(),
            may_discard: Default::default(),
            may_go: Default::default(),
            may_reclaim: Default::default(),
            is_over: Flag::default(),
        };
        if lineage != 0 && !slot.has_begun.set() {
            slot.is_decided.set();
        }
        if lineage != 0 {
            // A person said so although others may have it.
            let others = slot.parts().into_iter().map(|part| part.lineage.load(Ordering::Relaxed));
            self.reclaimed.lock().extend(others);
        }
        slot.set_part(side, Some(Arc::new(part)));
    }

    fn changed(&self, slot: &Slot, part: &Arc<Part>, before: &Held, now: &Held) {
        let lineage = part.lineage.load(Ordering::Relaxed);
        let is_decided = now.epoch.term() > before.epoch.term();
        if is_decided && now.state.is_owner() {
            self.reclaimed.lock().insert(lineage);
            slot.is_decided.set();
            if part.may_reclaim.load(Ordering::Relaxed) == 0 {
                self.fail(part.side, slot, "it was reclaimed, and nobody said so".into());
            }
        }
        if now.epoch < before.epoch {
            self.fail(part.side, slot, format!("epoch {:?} follows {:?}", now.epoch, before.epoch));
        }
        match (&before.state, &now.state) {
            (State::Asking { from }, State::Arriving { .. }) => self.take_over(slot, part, from, now),
            (_, State::Released { is_completed: false, .. }) => {
                let mut model = part.model.lock();
                // The fence has synced.
                let began = model.now();
                model.flushed(began);
                *part.released.lock() = Some(model.clone());
            }
            (State::Owned | State::Arriving { .. }, State::GivingBack { .. })
                if part.was_written.load(Ordering::Relaxed) && part.may_discard.load(Ordering::Relaxed) == 0 =>
            {
                self.fail(part.side, slot, "guests wrote, and it is given back though nobody said so".into());
            }
            (State::Released { .. }, State::Owned) => {
                part.was_written.store(false, Ordering::Relaxed);
                part.may_be_written.store(0, Ordering::Relaxed);
            }
            (State::Arriving { .. }, State::Owned) if is_decided => part.model.lock().forget_absent(),
            (State::GivingBack { is_complete: false, .. } | State::Fenced { is_complete: false, .. }, State::Owned) => {
                part.model.lock().forget_absent()
            }
            (_, State::Fenced { .. }) if !self.was_reclaimed(lineage) && lineage != 0 && !slot.is_decided.is_set() => {
                self.fail(part.side, slot, "it is fenced, and nobody reclaimed it".into());
            }
            _ => {}
        }
        if now.state == State::Owned && part.side != Side::Source {
            slot.is_complete.set();
        }
    }

    /// Content moves with the ownership.
    fn take_over(&self, slot: &Slot, part: &Arc<Part>, from: &Name, now: &Held) {
        let source = self.sites.get(from).and_then(|side| slot.part(*side));
        let Some(source) = source else { return self.fail(part.side, slot, format!("{from} has nothing of it")) };
        let released = source.released.lock().clone();
        let lineage = source.lineage.load(Ordering::Relaxed);
        let is_mine = match &*source.held.lock() {
            Held { state: State::Released { to, .. }, epoch, .. } => {
                *epoch == now.epoch && self.sites.get(to) == Some(&part.side)
            }
            held => held.epoch.term() > now.epoch.term(),
        };
        match released.filter(|_| is_mine || self.was_reclaimed(lineage)) {
            Some(mut model) => {
                model.moved();
                *part.model.lock() = model;
                part.lineage.store(lineage, Ordering::Relaxed);
            }
            None => self.fail(part.side, slot, format!("it was taken over, and {from} did not let go")),
        }
    }

    /// A site has dropped a record, durably.
    pub fn dropped(&self, side: Side, name: &Name) {
        let Some((slot, part)) = self.slots.get(name).and_then(|slot| Some((slot, slot.part(side)?))) else { return };
        self.world.say(|| format!("{} at the {side:?}: gone", slot.name));
        self.world.note("gone", [(side as u64) << 8 | slot.number, 0, 0]);
        if part.is_owner() {
            if part.may_go.load(Ordering::Relaxed) == 0 {
                self.fail(side, slot, "its owner dropped it, and nobody said so".into());
            }
            slot.is_decided.set();
        }
        if part.may_reclaim.load(Ordering::Relaxed) > 0 {
            // Who is asked for it may let go of it yet: for nobody.
            slot.is_decided.set();
        }
        let epoch = part.held.lock().epoch;
        let has_let_go = |other: &Arc<Part>| match &*other.held.lock() {
            Held { state: State::Released { to, is_completed: false }, epoch: at, .. } => {
                *at == epoch && self.sites.get(to) == Some(&side)
            }
            _ => false,
        };
        let is_decided = part.may_reclaim.load(Ordering::Relaxed) > 0;
        if !part.is_owner() && !is_decided && slot.parts().iter().any(has_let_go) {
            self.fail(side, slot, "it was let go of for this site, which dropped it, and nobody said so".into());
        }
        slot.set_part(side, None);
        part.is_over.set();
    }

    fn look_for_two_owners(&self, slot: &Slot) {
        let owners: Vec<_> = slot.parts().into_iter().filter(|part| part.is_owner()).collect();
        for (nth, part) in owners.iter().enumerate() {
            let lineage = part.lineage.load(Ordering::Relaxed);
            let other = owners[..nth].iter().find(|other| other.lineage.load(Ordering::Relaxed) == lineage);
            if let Some(other) = other.filter(|_| !self.was_reclaimed(lineage)) {
                self.fail(part.side, slot, format!("it has two owners: the {:?}, too", other.side));
            }
        }
    }
}
