//! People who change their minds: they relocate, cancel, remove, add again, reclaim, and swap images, at any moment and two at once; and
//! who tidy up in the end. Must not know how sites carry that out.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use blockferry::handover::{Epoch, No, State, Verb};
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use crate::disk::DiskFile;
use crate::operator::Operator;
use crate::run::content;
use crate::site::Site;
use crate::site_lives::Lives;
use crate::slot::{Part, Slot};
use crate::world::Shared;

/// In which every verb must have been answered once all is well, and everything have come to rest.
const REST: Duration = Duration::from_secs(300);
/// After which a person takes care of what nobody else can.
const PATIENCE_MS: u64 = 60_000;

/// An image that lies under another's path: at which site, of which name, and the one that belongs there.
type Swapped = (Arc<Part>, Arc<DiskFile>);

/// See the module.
#[derive(Clone)]
pub struct People {
    pub world: Shared,
    pub slot: Arc<Slot>,
    pub sites: Vec<Arc<Site>>,
    pub lives: Arc<Lives>,
    /// Images that lie elsewhere for a while: where they belong, and what they are.
    pub swapped: Arc<Mutex<Vec<Swapped>>>,
}

impl People {
    fn operator(&self) -> Operator {
        Operator { world: Arc::clone(&self.world), slot: Arc::clone(&self.slot) }
    }

    fn any_site(&self) -> Arc<Site> {
        Arc::clone(&self.sites[self.world.below(self.sites.len() as u64) as usize])
    }

    /// Says this and that, and waits for every answer.
    pub async fn act(self) {
        let verbs = self.world.random(|random| random.between(2, 8));
        let mut under_way: Vec<JoinHandle<()>> = Vec::new();
        self.world.rest(1, 400).await;
        for nth in 0..verbs {
            let this = self.clone();
            under_way.push(tokio::spawn(async move { this.one(nth == 0).await }));
            // Now and then the next one comes while this one is under way.
            let most_ms = if self.world.percent(40) { 60 } else { 4000 };
            self.world.rest(1, most_ms).await;
        }
        for verb in under_way {
            if tokio::time::timeout(REST, verb).await.is_err() {
                self.world.fail("verbs", format!("{}: what an operator said is never answered", self.slot.name));
            }
        }
    }

    async fn one(&self, is_first: bool) {
        let kind = if is_first { 0 } else { self.world.below(100) };
        self.world.note("verb", [self.slot.number, kind, 0]);
        let said = match kind {
            0..38 => self.relocate().await,
            38..62 => self.cancel().await,
            62..70 => self.remove().await,
            70..80 => self.reclaim().await,
            80..90 => self.add().await,
            _ => self.swap().await,
        };
        self.world.say(|| format!("{}: verb {kind}: {said:?}", self.slot.name));
    }

    async fn relocate(&self) -> Result<(), String> {
        let owner = self.slot.parts().into_iter().find(|part| part.is_owner());
        let from = match owner {
            Some(part) if self.world.percent(90) => Arc::clone(&self.sites[part.side as usize]),
            _ => self.any_site(),
        };
        let others: Vec<_> = self.sites.iter().filter(|site| site.side != from.side).collect();
        let to = others[self.world.below(others.len() as u64) as usize];
        let timeout = Duration::from_millis(self.world.random(|random| random.between(20, 20_000)));
        self.operator().relocate(&from, to, timeout).await.map(drop)
    }

    async fn cancel(&self) -> Result<(), String> {
        let site = self.any_site();
        let part = self.slot.part(site.side).ok_or("nothing is there")?;
        let discard = self.world.percent(50);
        let verb = Verb::Cancel { discard };
        let told = match discard {
            true => self.tell(&site, &part.may_discard, verb).await?,
            false => self.operator().tell(&site, verb).await?,
        };
        if let Err(No::Written(_)) = told
            && !part.was_written.load(Ordering::Relaxed)
            && part.may_be_written.load(Ordering::Relaxed) == 0
            && self.slot.is_current(&part)
        {
            self.world.fail("verbs", format!("{}: it counts as written, and no guest wrote", self.slot.name));
        }
        told.map(drop).map_err(|no| no.to_string())
    }

    async fn remove(&self) -> Result<(), String> {
        let site = self.any_site();
        let part = self.slot.part(site.side).ok_or("nothing is there")?;
        self.tell(&site, &part.may_go, Verb::Remove).await?.map(drop).map_err(|no| no.to_string())
    }

    /// Says something that permits what is forbidden otherwise. Who is refused has permitted nothing; if the site dies over it, nobody knows.
    async fn tell(&self, site: &Site, permits: &AtomicU32, verb: Verb) -> Result<Result<Epoch, No>, String> {
        permits.fetch_add(1, Ordering::Relaxed);
        let told = self.operator().tell(site, verb).await;
        if let Ok(Err(_)) = told {
            permits.fetch_sub(1, Ordering::Relaxed);
        }
        told
    }

    async fn reclaim(&self) -> Result<(), String> {
        let site = self.any_site();
        let part = self.slot.part(site.side).ok_or("nothing is there")?;
        let epoch = part.held.lock().epoch;
        let verb = Verb::Reclaim { epoch, salt: self.world.below(1 << 16) as u16 };
        self.tell(&site, &part.may_reclaim, verb).await?.map(drop).map_err(|no| no.to_string())
    }

    /// An image under the name: one that lies there, or another one.
    async fn add(&self) -> Result<(), String> {
        let site = self.any_site();
        if self.slot.part(site.side).is_some() {
            return Err("the name is taken".into());
        }
        let path = format!("{}.raw", self.slot.name);
        let in_use = self.swapped.lock().iter().any(|(part, _)| part.side == site.side && part.image == path);
        if in_use {
            return Err("its image is elsewhere".into());
        }
        if site.file(&path).is_none() || self.world.percent(60) {
            site.files.lock().insert(path.clone(), self.another_image(None));
        }
        self.operator().add(&site, &path).await
    }

    fn another_image(&self, like: Option<&DiskFile>) -> Arc<DiskFile> {
        let size_bytes = like.map(|file| file.content().len());
        self.world.random(|random| {
            let (number, blocks, tail) = (random.next() >> 40, random.between(3, 14), random.below(20));
            let mut content = content(random, number, blocks, tail);
            if let Some(size_bytes) = size_bytes {
                let of = content.clone();
                content = of.iter().copied().cycle().take(size_bytes).collect();
            }
            DiskFile::with_content(content, random.next() | 1 << 62)
        })
    }

    /// Another image lies where one was, while the site is down.
    async fn swap(&self) -> Result<(), String> {
        let site = self.any_site();
        let part = self.slot.part(site.side).ok_or("nothing is there")?;
        let file = site.file(&part.image).ok_or("there is no file")?;
        let mut swapped = self.swapped.lock();
        if swapped.iter().any(|(of, _)| of.side == site.side && of.image == part.image) {
            return Err("it is elsewhere already".into());
        }
        let other = self.another_image(Some(&file));
        swapped.push((Arc::clone(&part), file));
        site.swap_at_restart(&part.image, other);
        drop(swapped);
        self.world.trouble();
        self.lives.crash(site.side, false, None);
        Ok(())
    }

    /// Puts back what was swapped, and restarts whoever is concerned.
    pub async fn put_back(&self) {
        let swapped = std::mem::take(&mut *self.swapped.lock());
        let mut sides = BTreeSet::new();
        // What was given up meanwhile needs its image no more, and another volume's may lie there.
        for (part, file) in swapped.into_iter().filter(|(part, _)| self.slot.is_current(part)) {
            self.sites[part.side as usize].swap_at_restart(&part.image, file);
            sides.insert(part.side as usize);
        }
        for side in sides {
            let site = &self.sites[side];
            // It may just be down: then it is asked again.
            while site.has_swaps() {
                self.lives.crash(site.side, false, None);
                self.world.rest(100, 200).await;
            }
            while site.life().is_none_or(|life| life.process.is_starting()) {
                self.world.rest(10, 50).await;
            }
        }
    }

    /// Waits until everything has come to rest: one owner, or none because somebody said so.
    pub async fn settle(&self) {
        let began_ms = self.world.now_ms();
        while !self.is_at_rest() {
            let waited_ms = self.world.now_ms() - began_ms;
            if waited_ms > REST.as_millis() as u64 {
                let parts: Vec<_> =
                    self.slot.parts().iter().map(|part| (part.side, part.held.lock().clone())).collect();
                return self.world.fail("rest", format!("{} comes to no rest: {parts:?}", self.slot.name));
            }
            if waited_ms > PATIENCE_MS && self.slot.is_decided.is_set() {
                self.take_care().await;
            }
            self.world.rest(100, 1000).await;
        }
    }

    fn is_at_rest(&self) -> bool {
        let parts = self.slot.parts();
        let is_resting = |part: &Arc<Part>| {
            matches!(part.held.lock().state, State::Owned | State::Released { .. } | State::Fenced { .. })
        };
        let owners = parts.iter().filter(|part| part.is_owner()).count();
        let is_served =
            |part: &Arc<Part>| !part.is_owner() || self.sites[part.side as usize].serves(&self.slot).is_some();
        parts.iter().all(is_resting)
            && parts.iter().all(is_served)
            && (owners > 0 || parts.is_empty() || self.slot.is_decided.is_set())
    }

    /// Somebody decided before; now what is left over of that is decided, too.
    async fn take_care(&self) {
        for part in self.slot.parts() {
            let (state, epoch) = {
                let held = part.held.lock();
                (held.state.clone(), held.epoch)
            };
            if matches!(state, State::Asking { .. } | State::Arriving { .. } | State::GivingBack { .. }) {
                let verb = Verb::Reclaim { epoch, salt: self.world.below(1 << 16) as u16 };
                let told = self.tell(&self.sites[part.side as usize], &part.may_reclaim, verb);
                let told = tokio::time::timeout(Duration::from_secs(20), told).await;
                self.world.say(|| format!("{}: reclaimed at the {:?}: {told:?}", self.slot.name, part.side));
            }
        }
    }
}
