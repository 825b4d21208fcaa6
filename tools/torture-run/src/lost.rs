//! A site is lost for good, the other one reclaims, and the lost one comes back all the same.
//! Must not know other verbs.

use anyhow::{Context, Result, bail};
use blockferry_lab::nbd::NbdClient;
use blockferry_lab::site::parse;
use serde::Deserialize;

use crate::operator::Outcome;
use crate::relocation::Place;
use crate::run::Torture;
use crate::sites::{NAME, TwoOwners};

/// What is read of `blockferry reclaim --json`.
#[derive(Deserialize)]
struct Reclaimed {
    epoch: u64,
    lost: Vec<String>,
    lost_bytes: Option<u64>,
}

impl Torture<'_> {
    /// Says `reclaim`, first with an epoch that nobody saw.
    fn reclaim(&mut self, place: usize) -> Result<Reclaimed> {
        let seen = self.sites.volume(place)?.epoch;
        let wrong = (seen + 1 + self.random.below(9)).to_string();
        self.sites.refused(place, &["reclaim", NAME, "--epoch", &wrong])?;
        let said = self.sites.done(place, &["reclaim", NAME, "--epoch", &seen.to_string(), "--json"])?;
        let said = said.trim();
        let first: Reclaimed = parse(said)?;
        if first.lost.is_empty() {
            bail!("`reclaim` does not say what is lost: {said}");
        }
        let now = self.sites.volume(place)?;
        if now.epoch != first.epoch || now.owner != self.sites.name(place) {
            bail!("reclaimed, and not the owner\n{}", self.sites.describe());
        }
        self.sites.refused(place, &["reclaim", NAME, "--epoch", &first.epoch.to_string()])?;
        if self.random.below(3) == 0 {
            self.sites.kill(place)?;
            self.sites.sites[place].start()?;
        }
        Ok(first)
    }

    /// The site that was given up for lost comes back: it is fenced as soon as it hears, and lets go when it is told.
    fn come_back(&mut self, lost: usize) -> Result<()> {
        let owner = self.relocation.place.owner();
        let is_cut = self.random.below(2) == 0;
        if is_cut {
            self.sites.set_cut(true)?;
        }
        self.sites.sites[lost].start()?;
        if is_cut {
            // It knows nothing yet. Its guests may write for as long as that is so: nobody sees these bytes again.
            if let Ok(mut nbd) = NbdClient::open(&self.sites.sites[lost].nbd_socket(), NAME) {
                let sequence = self.relocation.disk.next_sequence();
                let mut sector = [0; 512];
                crate::record::fill(sequence, 1024, &mut sector);
                let _ = nbd.write(1024, &sector, true);
            }
            self.pause(100);
            self.sites.set_cut(false)?;
        }
        let why = self.sites.eventually("the site that was lost is fenced", |sites| {
            let volume = sites.volume(lost)?;
            Ok((volume.phase == "fenced").then_some(volume.phase_reason))
        })?;
        if why.trim().is_empty() {
            bail!("a site is fenced and does not say why");
        }
        if NbdClient::open(&self.sites.sites[lost].nbd_socket(), NAME).is_ok() {
            bail!(TwoOwners(format!("a fenced site serves the volume\n{}", self.sites.describe())));
        }
        self.sites.probe(&[owner])?;
        self.relocation.check_guest()?;
        if self.random.below(2) == 0 {
            self.sites.kill(lost)?;
            self.sites.sites[lost].start()?;
            self.sites.probe(&[owner])?;
        }
        self.relocation.let_go(&mut self.sites, lost)?;
        self.sites
            .eventually("nothing is owed any more", |sites| Ok(sites.volume(owner)?.owed.is_empty().then_some(())))?;
        self.relocation.stop_guest()?;
        self.check_home()
    }

    /// The destination is gone for good.
    pub(crate) fn reclaim_at_source(&mut self, from: usize, to: usize) -> Result<Outcome> {
        self.kill_destination()?;
        self.reclaim(from)?;
        self.relocation.roll_back(from);
        self.check_home()?;
        self.start_guest();
        self.pause(200);
        self.come_back(to)?;
        Ok("reclaimed, the other one fenced and removed")
    }

    /// The source is gone for good.
    pub(crate) fn reclaim_at_destination(&mut self, from: usize, to: usize) -> Result<Outcome> {
        self.relocation.stop_guest()?;
        if !self.relocation.is_certain() {
            self.check(true)?;
        }
        self.sites.kill(from)?;
        let before = self.sites.volume(to)?;
        if matches!(before.phase.as_str(), "released_from_source" | "complete") {
            self.sites.refused(to, &["reclaim", NAME, "--epoch", &before.epoch.to_string()])?;
            self.start_source()?;
            self.start_guest();
            return Ok("nothing to reclaim: all of it is there");
        }
        let said = self.reclaim(to)?;
        let gone = self.relocation.check_given_up(&self.sites)?;
        let allowed = said.lost_bytes.context("`reclaim` does not say how much is lost")?;
        if gone > allowed {
            bail!("{gone} bytes became zeros, and `reclaim` said {allowed}");
        }
        self.relocation.place = Place::Home(to);
        self.relocation.disk.model().hand_over();
        self.start_guest();
        self.pause(200);
        self.come_back(from)?;
        Ok("reclaimed, the other one fenced and removed")
    }
}
