//! What goes wrong in a world, and when. Must not know what follows from it.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::site::Site;
use crate::site_lives::Lives;
use crate::world::{Side, Weather, World};

/// Everything that can be made to fail.
#[derive(Clone)]
pub struct Faults {
    pub world: Arc<World>,
    pub lives: Arc<Lives>,
    pub sites: Vec<Arc<Site>>,
}

impl Faults {
    /// Lets a number of things go wrong, one after the other or at the same time; returns when all is well again.
    pub async fn happen(&self) {
        let world = &self.world;
        let events = world.random(|random| random.between(1, 9));
        let mut under_way: Vec<JoinHandle<()>> = Vec::new();
        for _ in 0..events {
            world.rest(1, 900).await;
            let this = self.clone();
            under_way.push(tokio::spawn(async move { this.one().await }));
        }
        for event in under_way {
            let _ = event.await;
        }
        world.change_weather(|weather| *weather = Weather::default());
        self.lives.live_on();
        self.look_after_disks().await;
        world.trouble();
    }

    /// What an operator does when all is well again: a volume whose disk failed to sync is well again only after a restart.
    async fn look_after_disks(&self) {
        let destination = self.destination();
        for slot in &destination.slots {
            let Some(served) = destination.serves(slot) else { continue };
            if served.volume.flush().await.is_err() {
                served.process.needs_operator.set();
                served.process.death.wait().await;
            }
        }
    }

    /// In a quiet world: bulk gets nothing for a while, and nobody else may notice.
    pub async fn starve_bulk(&self) {
        let world = &self.world;
        world.rest(1, 2000).await;
        world.note("bulk starves", [0; 3]);
        world.change_weather(|weather| weather.is_bulk_starved = true);
        world.rest(9_000, 30_000).await;
        world.change_weather(|weather| weather.is_bulk_starved = false);
    }

    fn destination(&self) -> Arc<Site> {
        Arc::clone(&self.sites[Side::Destination as usize])
    }

    async fn one(&self) {
        let world = &self.world;
        let kind = world.below(18);
        world.note("fault", [kind, 0, 0]);
        world.trouble();
        match kind {
            0..3 => self.crash(Side::Destination),
            3 => self.crash(Side::Source),
            4 => {
                self.crash(Side::Destination);
                self.crash(Side::Source);
            }
            5 | 6 => self.cut(),
            7 => {
                world.change_weather(|weather| weather.is_link_down = true);
                self.cut();
                world.rest(100, 8000).await;
                world.change_weather(|weather| weather.is_link_down = false);
            }
            8 => {
                world.change_weather(|weather| weather.is_link_stalled = true);
                world.rest(50, 5000).await;
                if world.percent(50) {
                    self.cut();
                }
                world.change_weather(|weather| weather.is_link_stalled = false);
            }
            9 => {
                self.spell(200, 6000, |weather| weather.is_disk_full = true, |weather| weather.is_disk_full = false)
                    .await
            }
            10 => {
                let percent = world.random(|random| random.between(5, 50));
                let begin = |weather: &mut Weather| weather.disk_errors_percent = percent;
                self.spell(100, 2000, begin, |weather| weather.disk_errors_percent = 0).await;
            }
            11 => {
                let begin = |weather: &mut Weather| weather.sync_errors_percent = 60;
                self.spell(200, 2500, begin, |weather| weather.sync_errors_percent = 0).await;
            }
            12 => {
                let destination = self.destination();
                let store = &destination.store;
                if world.percent(50) {
                    world.random(|random| store.rot(random));
                } else {
                    world.random(|random| store.lose_some(random));
                }
            }
            13 => {
                let percent = world.random(|random| random.between(10, 70));
                self.spell(300, 4000, |weather| weather.lies_percent = percent, |weather| weather.lies_percent = 0)
                    .await;
            }
            14 => {
                self.spell(100, 3000, |weather| weather.disk_delay_ms = 150, |weather| weather.disk_delay_ms = 0).await
            }
            15 => {
                let begin = |weather: &mut Weather| weather.network_delay_ms = 400;
                self.spell(100, 4000, begin, |weather| weather.network_delay_ms = 0).await;
            }
            16 => {
                let begin = |weather: &mut Weather| weather.is_state_failing = true;
                self.spell(50, 2500, begin, |weather| weather.is_state_failing = false).await;
            }
            _ => self.pause().await,
        }
        world.trouble();
    }

    async fn spell(
        &self,
        least_ms: u64,
        most_ms: u64,
        begin: impl FnOnce(&mut Weather),
        end: impl FnOnce(&mut Weather),
    ) {
        self.world.change_weather(begin);
        self.world.rest(least_ms, most_ms).await;
        self.world.change_weather(end);
    }

    fn cut(&self) {
        self.sites.iter().flat_map(|site| site.wires()).for_each(|wire| wire.cut());
    }

    /// At once, or in the middle of what it does next.
    fn crash(&self, side: Side) {
        let world = &self.world;
        let has_lost_power = world.percent(60);
        let after = if world.percent(30) { None } else { Some(world.below(40)) };
        self.lives.crash(side, has_lost_power, after);
    }

    async fn pause(&self) {
        let destination = self.destination();
        for slot in &destination.slots {
            let relocation = destination.serves(slot).and_then(|served| served.volume.relocation());
            if let Some(relocation) = relocation {
                relocation.bulk().set_paused(true);
                relocation.apply_pace();
                self.world.rest(10, 1500).await;
                relocation.bulk().set_paused(false);
                relocation.bulk().set_limit(self.world.percent(30).then_some(20_000));
                relocation.apply_pace();
                tokio::time::sleep(Duration::from_millis(500)).await;
                relocation.bulk().set_limit(None);
                relocation.apply_pace();
            }
        }
    }
}
