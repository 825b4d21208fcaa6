//! What an operator does between the kills: give up, remove, add again, swap. Each verb says what came of it, and leaves a
//! disk that is at one site. Must not know lost sites.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use blockferry_lab::nbd::NbdClient;

use crate::relocation::Place;
use crate::run::Torture;
use crate::sites::{NAME, PATIENCE, SITES};
use crate::verb::Verb;

/// What came of a verb, in words.
pub type Outcome = &'static str;

impl Torture<'_> {
    /// Does what an operator does.
    pub fn operate(&mut self, verb: Verb) -> Result<Outcome> {
        match (verb, self.relocation.place) {
            (Verb::CancelUnwritten, Place::Home(at)) => self.cancel_before_a_write(at, false),
            (Verb::CancelComplete, Place::Home(at)) => self.cancel_before_a_write(at, true),
            (Verb::CancelHandOver, Place::Home(at)) => self.cancel_hand_over(at),
            (Verb::RemoveReAdd, Place::Home(at)) => self.remove_and_add(at),
            (Verb::RemoveOther, Place::Home(at)) => self.remove_and_add_another(at),
            (Verb::AddElsewhere, Place::Home(at)) => self.add_elsewhere(at),
            (Verb::SwapAtHome, Place::Home(at)) => self.swap_at_home(at),
            (Verb::CancelDiscard, Place::Moving { from, to }) => self.cancel_and_discard(from, to),
            (Verb::CancelCut, Place::Moving { from, to }) => self.cancel_while_cut(from, to),
            (Verb::SwapAtSource, Place::Moving { from, .. }) => self.swap_at_source(from),
            (Verb::SwapAtDestination, Place::Moving { to, .. }) => self.swap_at_destination(to),
            (Verb::Hop, Place::Moving { from, to }) => self.hop(from, to),
            (Verb::Refused, Place::Moving { from, to }) => self.refused_verbs(from, to),
            (Verb::ReclaimAtSource, Place::Moving { from, to }) => self.reclaim_at_source(from, to),
            (Verb::ReclaimAtDestination, Place::Moving { from, to }) => self.reclaim_at_destination(from, to),
            (verb, place) => bail!("{verb:?} does not go with {place:?}"),
        }
    }

    /// Some site other than this, with the name free there.
    pub fn free_site(&mut self, at: usize) -> Result<usize> {
        let to = (at + 1 + self.random.below(2) as usize) % SITES;
        if self.relocation.images[to].is_some() {
            self.relocation.let_go(&mut self.sites, to)?;
        }
        Ok(to)
    }

    /// Kills a site and starts it again.
    fn restart(&mut self, place: usize) -> Result<()> {
        self.sites.kill(place)?;
        self.sites.sites[place].start().map(drop)
    }

    /// One time in `of`, one of these sites is killed and started again.
    fn perhaps_restart(&mut self, of: u64, places: &[usize]) -> Result<()> {
        if self.random.below(of) == 0 {
            let place = places[self.random.below(places.len() as u64) as usize];
            self.restart(place)?;
        }
        Ok(())
    }

    /// Nothing of the volume is at a site that it was given back from.
    fn check_given_back(&mut self, from: usize, to: usize) -> Result<()> {
        let owner = self.sites.settled_owner(&[from])?;
        let name = self.sites.name(to);
        self.sites.eventually("the volume is gone where it was given up", |sites| {
            Ok(sites.known(to)?.is_none().then_some(()))
        })?;
        self.relocation.roll_back(owner);
        if let Some(left) = self.relocation.images[to].as_ref().filter(|path| path.exists()) {
            bail!("{} is left over at site {name}, which made it and gave it up", left.display());
        }
        self.relocation.images[to] = None;
        self.relocation.has_left[to] = true;
        self.check_home()
    }

    fn cancel_before_a_write(&mut self, from: usize, is_complete: bool) -> Result<Outcome> {
        let to = self.free_site(from)?;
        if is_complete {
            self.sites.set_rate(self.fast())?;
        }
        self.relocation.hand_over(&mut self.sites, to, None)?;
        if is_complete {
            self.relocation.wait_complete(&mut self.sites)?;
            self.sites.set_rate(Some(self.rate))?;
        }
        self.perhaps_restart(3, &[from, to])?;
        self.sites.done(to, &["cancel", NAME])?;
        self.perhaps_restart(3, &[from, to])?;
        self.check_given_back(from, to)?;
        Ok("given back")
    }

    fn cancel_hand_over(&mut self, from: usize) -> Result<Outcome> {
        let to = self.free_site(from)?;
        self.relocation.disk.model().hand_over();
        let image = self.relocation.next_image(&self.sites, to);
        let (remote, text) = (format!("{}/{NAME}", self.sites.name(from)), image.to_string_lossy().into_owned());
        let asked = self.sites.sites[to].ask_later(&["relocate", &remote, "--image", &text, "--timeout", "15s"])?;
        thread::sleep(Duration::from_millis(self.random.below(300)));
        let said = self.sites.say(to, &["cancel", NAME])?;
        let is_restarted = self.random.below(3) == 0;
        if is_restarted {
            let place = if self.random.below(2) == 0 { from } else { to };
            self.restart(place)?;
        }
        // Whatever came of it: it came to an end.
        asked.finish(PATIENCE)?;
        match self.sites.settled_owner(&[from, to])? {
            owner if owner == to => {
                if said.is_done {
                    bail!("a relocation that was given up came about\n{}", self.sites.describe());
                }
                self.relocation.images[to] = Some(image);
                self.relocation.place = Place::Moving { from, to };
                self.check(true)?;
                self.start_guest();
                Ok("too early or too late: the relocation came about")
            }
            _ => {
                self.relocation.images[to] = None;
                self.check_home()?;
                Ok(if said.is_done { "given back" } else { "came to nothing" })
            }
        }
    }

    fn cancel_and_discard(&mut self, from: usize, to: usize) -> Result<Outcome> {
        if !self.relocation.has_guest() {
            self.start_guest();
        }
        self.pause(100);
        let is_written = self.relocation.disk.model().is_written();
        if is_written {
            let why = self.sites.refused(to, &["cancel", NAME])?;
            if !why.contains("--discard-writes") {
                bail!("`cancel` would lose writes, and is refused without saying what to do: {}", why.trim());
            }
            self.relocation.check_guest()?;
        }
        // Clients lose the volume, at a moment that nobody tells them.
        self.relocation.expect_the_end();
        let mut outcome = "given back";
        if self.random.below(2) == 0 {
            let asked = self.sites.sites[to].ask_later(&["cancel", NAME, "--discard-writes"])?;
            thread::sleep(Duration::from_millis(self.random.below(150)));
            let place = if self.random.below(2) == 0 { from } else { to };
            self.restart(place)?;
            asked.finish(PATIENCE)?;
            if self.sites.settled_owner(&[from, to])? == to {
                self.sites.done(to, &["cancel", NAME, "--discard-writes"])?;
                outcome = "killed before it began, then given back";
            }
        } else {
            self.sites.done(to, &["cancel", NAME, "--discard-writes"])?;
        }
        self.relocation.stop_guest()?;
        self.check_given_back(from, to)?;
        Ok(outcome)
    }

    fn cancel_while_cut(&mut self, from: usize, to: usize) -> Result<Outcome> {
        self.relocation.stop_guest()?;
        self.sites.set_cut(true)?;
        let asked = self.sites.sites[to].ask_later(&["cancel", NAME, "--discard-writes"])?;
        self.sites.eventually("it is being given back", |sites| {
            let known = sites.known(to)?;
            Ok(known.is_none_or(|volume| volume.phase == "giving_back").then_some(()))
        })?;
        self.perhaps_restart(3, &[from, to])?;
        // Nobody has heard of it: nobody may write.
        self.sites.probe(&[])?;
        self.sites.set_cut(false)?;
        drop(asked);
        self.check_given_back(from, to)?;
        Ok("given back when the link was mended")
    }

    fn add(&mut self, at: usize, image: &Path, is_again: bool) -> Result<()> {
        let text = image.to_string_lossy().into_owned();
        let mut verb = vec!["volume", "add", NAME, "--image", &text];
        if is_again {
            let why = self.sites.refused(at, &verb)?;
            if !why.contains("--again") {
                bail!("a name that left is refused without saying what to do: {}", why.trim());
            }
            verb.push("--again");
        }
        let said = self.sites.say(at, &verb)?;
        if !said.is_done && said.err.contains("--again") {
            // An attempt to relocate to here came to nothing before.
            verb.push("--again");
            self.sites.done(at, &verb)?;
        } else if !said.is_done {
            bail!("`volume add` was refused: {}", said.err.trim());
        }
        self.relocation.has_left[at] = false;
        self.relocation.images[at] = Some(image.to_owned());
        self.relocation.place = Place::Home(at);
        let owner = self.sites.settled_owner(&[at])?;
        self.perhaps_restart(3, &[owner])?;
        self.check_home()
    }

    /// A client is in the way of a removal; without it, the name is free.
    fn remove(&mut self, at: usize) -> Result<()> {
        let client =
            NbdClient::open(&self.sites.sites[at].nbd_socket(), NAME).context("the owner does not serve it")?;
        self.sites.refused(at, &["volume", "remove", NAME])?;
        // That the server is gone by now would show in what follows.
        let _ = client.disconnect();
        self.sites.eventually("a volume without clients can be removed", |sites| {
            let said = sites.say(at, &["volume", "remove", NAME])?;
            Ok(said.is_done.then_some(()))
        })?;
        self.perhaps_restart(3, &[at])?;
        if self.sites.known(at)?.is_some() {
            bail!("a volume that was removed is still there\n{}", self.sites.describe());
        }
        self.sites.probe(&[])
    }

    fn remove_and_add(&mut self, at: usize) -> Result<Outcome> {
        let image = self.relocation.image(at)?.clone();
        self.remove(at)?;
        self.add(at, &image, false)?;
        Ok("added again")
    }

    fn remove_and_add_another(&mut self, at: usize) -> Result<Outcome> {
        self.remove(at)?;
        self.relocation.forget_image(at)?;
        let image = self.relocation.replace_disk(&mut self.random)?;
        self.add(at, &image, false)?;
        Ok("another disk under the name")
    }

    fn add_elsewhere(&mut self, at: usize) -> Result<Outcome> {
        let to = self.free_site(at)?;
        self.remove(at)?;
        let image = self.relocation.images[at].take().context("no image where the disk is")?;
        let is_again = self.relocation.has_left[to];
        self.add(to, &image, is_again)?;
        Ok(if is_again { "refused, then added --again" } else { "added where it never was" })
    }

    /// The site starts with a file of another disk at the image's path: the volume is not served, and the status says why.
    fn start_swapped(&mut self, place: usize) -> Result<()> {
        self.relocation.swap_image(place, &mut self.random)?;
        self.sites.sites[place].start()?;
        let known = self.sites.volume(place)?;
        if known.phase_reason.trim().is_empty() {
            bail!("the image was swapped, and the status says nothing of it\n{}", self.sites.describe());
        }
        if NbdClient::open(&self.sites.sites[place].nbd_socket(), NAME).is_ok() {
            bail!("site {} serves a file that is not the volume's\n{}", self.sites.name(place), self.sites.describe());
        }
        self.sites.probe(&[self.relocation.place.owner()])?;
        self.pause(200);
        if self.random.below(2) == 0 {
            self.sites.kill(place)?;
        } else {
            self.sites.sites[place].stop()?;
        }
        self.relocation.put_image_back(place)
    }

    fn swap_at_home(&mut self, at: usize) -> Result<Outcome> {
        if self.random.below(2) == 0 {
            self.sites.kill(at)?;
        } else {
            self.sites.sites[at].stop()?;
        }
        self.start_swapped(at)?;
        self.sites.sites[at].start()?;
        self.check_home()?;
        Ok("noticed, and put back")
    }

    fn swap_at_source(&mut self, from: usize) -> Result<Outcome> {
        self.sites.kill(from)?;
        self.start_swapped(from)?;
        self.relocation.check_guest()?;
        self.start_source()?;
        Ok("noticed, and put back")
    }

    fn swap_at_destination(&mut self, to: usize) -> Result<Outcome> {
        self.kill_destination()?;
        self.start_swapped(to)?;
        self.start_destination(true)?;
        self.start_guest();
        Ok("noticed, and put back")
    }

    fn hop(&mut self, from: usize, to: usize) -> Result<Outcome> {
        self.sites.set_rate(self.fast())?;
        self.relocation.wait_complete(&mut self.sites)?;
        self.sites.set_rate(Some(self.rate))?;
        self.finish(true)?;
        let third = SITES - from - to;
        if self.relocation.images[third].is_some() {
            self.relocation.let_go(&mut self.sites, third)?;
        }
        let is_down = self.random.below(2) == 0;
        if is_down {
            self.sites.kill(from)?;
        }
        self.report.hops += 1;
        self.relocation.hand_over(&mut self.sites, third, None)?;
        if is_down {
            self.sites.sites[from].start()?;
        }
        self.sites.probe(&[third])?;
        self.check(true)?;
        self.start_guest();
        Ok(if is_down { "on its way, the first site down" } else { "on its way" })
    }

    fn refused_verbs(&mut self, from: usize, to: usize) -> Result<Outcome> {
        let other = SITES - from - to;
        self.sites.done(to, &["pause", NAME])?;
        let blocks = self.sites.volume(to)?.blocks;
        // Guests' reads bring more while it is paused: it must not be complete before the last verb.
        if blocks.absent < blocks.total / 4 {
            self.sites.say(to, &["resume", NAME])?;
            return Ok("nothing to refuse: most of it is there");
        }
        // Not at the destination: what is on its way when it is paused still lands, and then it may be handed on.
        let at_source = format!("{}/{NAME}", self.sites.name(from));
        let image = self.relocation.image(to)?.to_string_lossy().into_owned();
        self.sites.refused(to, &["relocate", &at_source])?;
        if self.relocation.images[other].is_none() {
            self.sites.refused(other, &["relocate", &at_source, "--take"])?;
        }
        for place in [from, to] {
            self.sites.refused(place, &["volume", "remove", NAME])?;
            self.sites.refused(place, &["volume", "add", NAME, "--image", &image])?;
            self.sites.refused(place, &["reclaim", NAME, "--epoch", "77777"])?;
        }
        self.sites.refused(from, &["cancel", NAME])?;
        let resumed = self.sites.say(to, &["resume", NAME])?;
        if !resumed.is_done && self.sites.volume(to)?.blocks.absent > 0 {
            bail!("a copy that was paused could not be resumed: {}", resumed.err.trim());
        }
        self.relocation.check_guest()?;
        Ok("all refused, with reasons")
    }
}
