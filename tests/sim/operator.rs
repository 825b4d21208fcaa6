//! People: they add volumes, relocate them, and change their minds. Must not know how sites carry that out.

use std::sync::Arc;
use std::time::Duration;

use blockferry::core::manifest::Geometry;
use blockferry::handover::{Epoch, No, State, Verb};
use blockferry::node::Outside;
use blockferry::node::record::Pace;

use crate::BLOCK;
use crate::disk::DiskFile;
use crate::site::{Life, Site};
use crate::slot::Slot;
use crate::world::Shared;

/// How long a verb waits for a peer.
const PEER_TIMEOUT: Duration = Duration::from_secs(12);

/// See the module.
pub struct Operator {
    pub world: Shared,
    pub slot: Arc<Slot>,
}

impl Operator {
    fn life(site: &Site) -> Result<Arc<Life>, String> {
        site.life().filter(|life| !life.process.is_starting()).ok_or_else(|| "the site is down".to_owned())
    }

    /// Waits for something, unless the site dies first.
    async fn at<T>(life: &Life, work: impl Future<Output = T>) -> Result<T, String> {
        tokio::select! {
            biased;
            () = life.process.death.wait() => Err("the site died".into()),
            done = work => Ok(done),
        }
    }

    /// Serves an image under the volume's name.
    pub async fn add(&self, site: &Site, path: &str) -> Result<(), String> {
        let (life, name) = (Operator::life(site)?, &self.slot.name);
        let _reserved = life.inventory.reserve(name).map_err(|error| error.to_string())?;
        let file = site.file(path).ok_or("there is no such file")?;
        let image = file.open(&life.process, path);
        let geometry = Geometry::new(image.size_bytes(), BLOCK).map_err(|error| error.to_string())?;
        let left = life.inventory.records().left(name).map_err(|error| error.to_string())?;
        let owning = life.inventory.own(name, image, geometry, left.as_ref());
        Operator::at(&life, owning).await?.map(drop)
    }

    /// Asks another site for it.
    pub async fn relocate(&self, from: &Site, to: &Site, timeout: Duration) -> Result<Epoch, String> {
        let (life, name) = (Operator::life(to)?, &self.slot.name);
        let reserved = life.inventory.reserve(name).map_err(|error| error.to_string())?;
        let key = life.dial(&from.name).ok_or("there is no such peer")?;
        let opening = tokio::time::timeout(PEER_TIMEOUT, life.fetch.open(key, name.clone()));
        let remote = Operator::at(&life, opening).await?.map_err(|_| "the peer does not answer")?;
        let remote = remote.map_err(|error| error.to_string())?;
        let path = format!("{name} from {}", from.name);
        let number = self.world.random(|random| random.next());
        // What an attempt left that never got as far as a record is overwritten.
        let file = DiskFile::new(remote.geometry.size_bytes as usize, number | 1 << 63);
        site_file(to, &self.slot, &path, &file).inspect_err(|_| life.fetch.close(remote.key))?;
        let begun = life.inventory.begin(name, &from.name, file.open(&life.process, &path), &remote, Pace::default());
        let entry = begun.inspect_err(|_| life.fetch.close(remote.key))?;
        drop(reserved);
        Operator::at(&life, entry.custody().begin(true, timeout)).await?.map_err(|no| no.to_string())
    }

    /// Says something of the volume at a site.
    pub async fn tell(&self, site: &Site, verb: Verb) -> Result<Result<Epoch, No>, String> {
        let life = Operator::life(site)?;
        let entry = life.inventory.entry(&self.slot.name).ok_or("there is no such volume")?;
        Operator::at(&life, entry.custody().tell(verb)).await
    }

    /// Relocates it, again and again, until the other site owns it.
    pub async fn move_over(self, from: Arc<Site>, to: Arc<Site>) {
        self.world.rest(1, 1500).await;
        loop {
            let part = self.slot.part(to.side);
            match part.as_ref().map(|part| part.held.lock().state.clone()) {
                Some(State::Owned | State::Arriving { .. }) => return,
                Some(_) => {}
                None => {
                    let timeout = Duration::from_millis(self.world.random(|random| random.between(3_000, 60_000)));
                    match self.relocate(&from, &to, timeout).await {
                        Ok(epoch) => self.world.note("taken", [self.slot.number, epoch.0, 0]),
                        Err(why) => self.world.say(|| format!("{}: not relocated: {why}", self.slot.name)),
                    }
                }
            }
            self.world.rest(100, 1000).await;
        }
    }
}

fn site_file(site: &Site, slot: &Slot, path: &str, file: &Arc<DiskFile>) -> Result<(), String> {
    if slot.part(site.side).is_some_and(|part| part.image == path) {
        return Err("the file is in use".into());
    }
    site.files.lock().insert(path.to_owned(), Arc::clone(file));
    Ok(())
}
