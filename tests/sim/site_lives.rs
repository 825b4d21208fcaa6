//! The lives of the sites' processes, one after the other. Must not know why they end.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::process::Process;
use crate::site::Site;
use crate::world::{SIDES, Shared, Side};

/// See the module.
pub struct Lives {
    world: Shared,
    now: [Mutex<Option<Arc<Process>>>; SIDES],
    /// Whether the next death is a power loss; the end of the process alone otherwise.
    loses_power: [Mutex<bool>; SIDES],
    pub deaths: Mutex<u64>,
}

impl Lives {
    pub fn new(world: &Shared) -> Arc<Lives> {
        Arc::new(Lives {
            world: world.clone(),
            now: Default::default(),
            loses_power: Default::default(),
            deaths: Mutex::default(),
        })
    }

    /// Ends the present life of a site: now, or after so many more effects on its disk and database.
    pub fn crash(&self, side: Side, has_lost_power: bool, after: Option<u64>) {
        let Some(process) = self.now[side as usize].lock().clone() else { return };
        self.world.note("crash", [side as u64, u64::from(has_lost_power), after.unwrap_or(999)]);
        *self.loses_power[side as usize].lock() = has_lost_power;
        match after {
            None => process.die(),
            Some(effects) => process.die_after(effects),
        }
    }

    /// Nobody dies any more, but for those who are dead already.
    pub fn live_on(&self) {
        self.now.iter().filter_map(|now| now.lock().clone()).for_each(|process| process.live_on());
    }

    fn begin(&self, side: Side, life: u64) -> Arc<Process> {
        let process = Process::new(&self.world, side, life);
        *self.now[side as usize].lock() = Some(Arc::clone(&process));
        process
    }

    async fn end(&self, process: &Process) -> bool {
        process.death.wait().await;
        self.world.trouble();
        *self.now[process.side as usize].lock() = None;
        *self.deaths.lock() += 1;
        std::mem::take(&mut *self.loses_power[process.side as usize].lock())
    }

    /// Runs a site for ever.
    pub async fn run(self: Arc<Self>, site: Arc<Site>) {
        for number in 0.. {
            let process = self.begin(site.side, number);
            let life = site.start(&process).await;
            process.has_started();
            let has_lost_power = self.end(&process).await || site.must_not_be_killed();
            site.bury(&life, has_lost_power);
            drop(life);
            self.world.rest(10, 800).await;
            self.world.trouble();
        }
    }
}
