//! The volumes of a site and all that is kept about them: what the daemon and the simulation both run. Must not know configuration,
//! connections or the control API: [`Outside`] is the seam.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedReceiver;

use super::debts::Debts;
use super::entry::{Entry, answer_of};
use super::instances::{Instances, OwnInstance};
use super::record::{RecordError, Records, VolumeRecord};
use crate::core::ids::{Incarnation, Name};
use crate::fetch::{Fetch, Greeting, Heard, PeerKey};
use crate::handover::{Answer, Epoch, Question};
use crate::image::{Image, ImageError};
use crate::source::Hasher;
use crate::store::State;
use crate::volume::Volume;
use crate::workers::Workers;

/// What a site has around its volumes.
pub trait Outside: Send + Sync + 'static {
    /// The peer, to be asked things; None if it has no address. It is dialled from now on.
    fn dial(&self, peer: &Name) -> Option<PeerKey>;
    /// The name of a peer that was dialled.
    fn peer_name(&self, peer: PeerKey) -> Option<Name>;
    /// Whether the configuration lets a peer have a volume.
    fn is_granted(&self, peer: &Name, volume: &Name) -> bool;
    /// Opens what a record names. Whether it is the image that it was is looked at by the caller.
    fn open_image(&self, record: &VolumeRecord) -> Result<Image, ImageError>;
    /// Deletes the file that was made for a volume, and no other that has its name by now.
    fn delete_image(&self, record: &VolumeRecord, volume: Option<&Volume>);
    /// How long a guest's read waits for a peer; None: for ever.
    fn demand_timeout(&self) -> Option<Duration>;
    /// Bytes of chance.
    fn draw(&self) -> [u8; 16];
}

/// See the module.
pub struct Inventory {
    pub(super) site: Name,
    pub(super) fetch: Fetch,
    pub(super) state: Arc<dyn State>,
    pub(super) records: Records,
    /// Guests' file I/O, and the landing of fetched blocks.
    pub(super) disk_workers: Workers,
    pub(super) hasher: Hasher,
    pub(super) volumes: Mutex<BTreeMap<Name, Arc<Entry>>>,
    /// Names for which a relocation or an addition is under way.
    pub(super) reserved: Mutex<BTreeSet<Name>>,
    pub(super) debts: Debts,
    pub(super) instances: Instances,
    outside: Weak<dyn Outside>,
}

/// What an inventory is made of.
pub struct InventoryParts {
    /// The site's name.
    pub site: Name,
    /// Where blocks of peers come from.
    pub fetch: Fetch,
    /// Where everything is journalled.
    pub state: Arc<dyn State>,
    /// Threads for file I/O.
    pub disk_workers: Workers,
    /// Hashes what is offered to peers.
    pub hasher: Hasher,
}

impl Inventory {
    /// No volumes yet: [`Inventory::start`] brings those that are journalled.
    pub fn new(parts: InventoryParts, outside: Weak<dyn Outside>) -> Arc<Inventory> {
        let InventoryParts { site, fetch, state, disk_workers, hasher } = parts;
        Arc::new(Inventory {
            site,
            fetch,
            records: Records::new(Arc::clone(&state)),
            state,
            disk_workers,
            hasher,
            volumes: Mutex::default(),
            reserved: Mutex::default(),
            debts: Debts::default(),
            instances: Instances::default(),
            outside,
        })
    }

    /// Brings back what is journalled, and sees to what is owed for as long as the runtime lives.
    pub async fn start(self: &Arc<Self>) -> Result<(), RecordError> {
        let heard = self.fetch.listen();
        let records = self.records.load(&|| Incarnation(self.draw()))?;
        self.forget_strangers(&records)?;
        self.read_debts()?;
        // One volume whose disk is missing must not keep the others from being served; what is journalled of it stays.
        for record in records {
            self.restore(record).await;
        }
        tokio::spawn(Arc::clone(self).pay_debts());
        tokio::spawn(Arc::clone(self).hear(heard));
        Ok(())
    }

    /// The volume of a name.
    pub fn entry(&self, name: &Name) -> Option<Arc<Entry>> {
        self.volumes.lock().get(name).cloned()
    }

    /// All volumes.
    pub fn entries(&self) -> Vec<Arc<Entry>> {
        self.volumes.lock().values().cloned().collect()
    }

    /// What is journalled.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Which instance of this site a peer is told that it talks to.
    pub fn greeting(self: &Arc<Self>, peer: &Name) -> Arc<dyn Greeting> {
        OwnInstance::new(self, peer)
    }

    pub(super) fn outside(&self) -> Option<Arc<dyn Outside>> {
        self.outside.upgrade()
    }

    pub(super) fn draw(&self) -> [u8; 16] {
        self.outside().map_or_else(super::random, |outside| outside.draw())
    }

    /// Runs what waits for the disk. An error if it came to no end.
    pub(super) async fn run_apart<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        let done = self.disk_workers.run_after_writes(&tokio::runtime::Handle::current(), work).await;
        done.map_err(|unfinished| match unfinished.has_panicked {
            true => "a fault inside ended the work".into(),
            false => "the site is shutting down".into(),
        })
    }

    /// Asks a peer about a volume, once; None where there was no answer.
    pub(super) async fn ask_peer(&self, peer: &Name, volume: &Name, question: &Question) -> Option<Answer> {
        let Some(key) = self.outside().and_then(|outside| outside.dial(peer)) else {
            // No address: nothing is asked until the configuration has one.
            return std::future::pending().await;
        };
        answer_of(self.fetch.ask(key, volume.clone(), question.clone()).await)
    }

    /// What peers say of volumes without having been asked.
    async fn hear(self: Arc<Self>, mut said: UnboundedReceiver<Heard>) {
        while let Some(Heard { peer, volume, epoch }) = said.recv().await {
            let peer = self.outside().and_then(|outside| outside.peer_name(peer));
            if let (Some(peer), Some(entry)) = (peer, self.entry(&volume)) {
                entry.custody().heard(peer, Epoch(epoch));
            }
        }
    }
}
