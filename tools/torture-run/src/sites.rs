//! Three sites, a relay to each, and what an operator may expect of them: an answer within its time, a reason for every
//! refusal, one site that admits writes. Must not know what the disk holds.

use std::fmt::Write;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use blockferry_lab::nbd::{NbdClient, NbdError};
use blockferry_lab::process::{Said, check_interrupt};
use blockferry_lab::site::{Relay, Site, SiteStatus, VolumeStatus, parse};
use blockferry_wan::units::Rate;

/// The volume's name.
pub const NAME: &str = "disk";
/// How many sites.
pub const SITES: usize = 3;
/// Nothing takes longer while all sites are up and linked.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// No answer takes longer, whatever is broken.
const ANSWER_WITHIN: Duration = Duration::from_secs(45);
/// NBD's EPERM.
const PERM: u32 = 1;

/// Nothing moved although everything was up, or a verb was not answered.
#[derive(Debug, thiserror::Error)]
#[error("stuck: {0}")]
pub struct Stuck(pub String);

/// Two sites admit writes of one volume.
#[derive(Debug, thiserror::Error)]
#[error("two owners: {0}")]
pub struct TwoOwners(pub String);

/// See the module.
pub struct Sites {
    /// Sites a, b and c.
    pub sites: [Site; SITES],
    /// The way to each.
    pub relays: [Relay; SITES],
    /// Writes that were tried where they must be refused.
    pub probes: u64,
    /// Verbs that were refused as they had to be.
    pub refusals: u64,
    /// Sites killed.
    pub kills: u64,
    /// When somebody last asked a site for a volume that it does not serve: it takes that for a guest on its way.
    knocked: [Option<Instant>; SITES],
}

/// Who owns the volume, as one site says it.
type Standpoint = Option<(String, u64)>;

impl Sites {
    /// Takes them over as they run.
    pub fn new(sites: [Site; SITES], relays: [Relay; SITES]) -> Sites {
        Sites { sites, relays, probes: 0, refusals: 0, kills: 0, knocked: [None; SITES] }
    }

    /// SIGKILL.
    pub fn kill(&mut self, place: usize) -> Result<()> {
        self.kills += 1;
        self.sites[place].kill()
    }

    /// Whether a site may take it that a guest waits there for the volume.
    pub fn is_asked_for(&self, place: usize) -> bool {
        self.knocked[place].is_some_and(|at| at.elapsed() < Duration::from_secs(15))
    }

    /// Cuts or mends the WAN.
    pub fn set_cut(&mut self, is_cut: bool) -> Result<()> {
        self.relays.iter_mut().try_for_each(|relay| if is_cut { relay.cut() } else { relay.mend() })
    }

    /// Changes the WAN's bottleneck.
    pub fn set_rate(&mut self, rate: Option<Rate>) -> Result<()> {
        self.relays.iter_mut().try_for_each(|relay| relay.set_rate(rate))
    }

    /// Deletes the store of a site that does not run.
    pub fn lose_store(&mut self, place: usize) -> Result<()> {
        let store = self.sites[place].dir().join("store");
        fs::remove_dir_all(&store).with_context(|| format!("cannot remove {}", store.display()))
    }

    /// What crossed the WAN.
    pub fn wan_bytes(&mut self) -> Result<u64> {
        let mut bytes = 0;
        for relay in &mut self.relays {
            let stats = relay.stats()?;
            bytes += stats.up.wire_bytes + stats.down.wire_bytes;
        }
        Ok(bytes)
    }

    /// How a site is called.
    pub fn name(&self, place: usize) -> &'static str {
        self.sites[place].name()
    }

    /// What a command comes to; a command without an answer is a failure.
    pub fn say(&mut self, place: usize, arguments: &[&str]) -> Result<Said> {
        let said = self.sites[place].say(arguments, ANSWER_WITHIN)?;
        let at = self.name(place);
        said.ok_or_else(|| {
            let what = format!("no answer to `{}` at {at} within {} s", arguments.join(" "), ANSWER_WITHIN.as_secs());
            anyhow!(Stuck(format!("{what}\n{}", self.describe())))
        })
    }

    /// A command that has to succeed; what it said.
    pub fn done(&mut self, place: usize, arguments: &[&str]) -> Result<String> {
        let said = self.say(place, arguments)?;
        if !said.is_done {
            let (at, what) = (self.name(place), arguments.join(" "));
            bail!("`{what}` at {at} was refused: {}\n{}", said.err.trim(), self.describe());
        }
        Ok(said.out)
    }

    /// A command that has to be refused, with a reason, and without an effect on who owns the volume; the reason.
    pub fn refused(&mut self, place: usize, arguments: &[&str]) -> Result<String> {
        let before = self.standpoints()?;
        let said = self.say(place, arguments)?;
        let (at, what) = (self.name(place), arguments.join(" "));
        if said.is_done {
            bail!("`{what}` at {at} was done and should have been refused\n{}", self.describe());
        }
        if said.err.trim().len() < 12 {
            bail!("`{what}` at {at} was refused without a reason: `{}`", said.err.trim());
        }
        self.refusals += 1;
        let after = self.standpoints()?;
        // A hand-over that was refused is withdrawn, which counts as a change of ownership, back to where it was.
        let is_as_before = before.iter().zip(&after).all(|stands| match stands {
            (Some((owner, epoch)), Some((same, now))) => owner == same && epoch <= now,
            (before, after) => before == after,
        });
        if !is_as_before {
            bail!("`{what}` at {at} was refused ({}), and changed {before:?} to {after:?}", said.err.trim());
        }
        Ok(said.err)
    }

    /// What one site says of the volume.
    pub fn known(&mut self, place: usize) -> Result<Option<VolumeStatus>> {
        let said = self.say(place, &["status", "--json"])?;
        if !said.is_done {
            bail!("site {} has no status: {}", self.name(place), said.err.trim());
        }
        let status: SiteStatus = parse(&said.out)?;
        Ok(status.volumes.into_iter().find(|volume| volume.name == NAME))
    }

    /// What one site says of the volume, which it has to know.
    pub fn volume(&mut self, place: usize) -> Result<VolumeStatus> {
        let known = self.known(place)?;
        known.with_context(|| format!("site {} has forgotten the volume\n{}", self.name(place), self.describe()))
    }

    fn standpoints(&mut self) -> Result<[Standpoint; SITES]> {
        let mut all = [const { None }; SITES];
        for (place, stands) in all.iter_mut().enumerate() {
            if self.sites[place].is_running() {
                *stands = self.known(place)?.map(|volume| (volume.owner, volume.epoch));
            }
        }
        Ok(all)
    }

    /// All statuses, for people.
    pub fn describe(&mut self) -> String {
        let mut text = String::new();
        for place in 0..SITES {
            let name = self.name(place);
            let said = match self.sites[place].is_running() {
                true => self.sites[place].say(&["status", NAME], Duration::from_secs(10)),
                false => {
                    let _ = writeln!(text, "  site {name} is down");
                    continue;
                }
            };
            let said = match said {
                Ok(Some(said)) => format!("{}{}", said.out, said.err),
                Ok(None) => "no answer".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            let _ = writeln!(text, "  site {name}:");
            for line in said.lines() {
                let _ = writeln!(text, "    {line}");
            }
        }
        text
    }

    /// Looks until something is so. Everything that is needed for it is up and linked: it has to come about.
    pub fn eventually<T>(&mut self, what: &str, mut look: impl FnMut(&mut Sites) -> Result<Option<T>>) -> Result<T> {
        let begun = Instant::now();
        loop {
            check_interrupt()?;
            if let Some(found) = look(self)? {
                return Ok(found);
            }
            if begun.elapsed() > PATIENCE {
                bail!(Stuck(format!("{what}: not so after {} s\n{}", PATIENCE.as_secs(), self.describe())));
            }
            thread::sleep(Duration::from_millis(40));
        }
    }

    /// The one site that says that it owns the volume, once nothing is being handed over or given back. Only `candidates`
    /// may be it.
    pub fn settled_owner(&mut self, candidates: &[usize]) -> Result<usize> {
        let mut last = None;
        let owner = self.eventually("one site owns the volume", |sites| {
            let mut owners = Vec::new();
            let mut is_moving = false;
            for place in 0..SITES {
                if !sites.sites[place].is_running() {
                    continue;
                }
                if let Some(volume) = sites.known(place)? {
                    is_moving |= matches!(volume.phase.as_str(), "connecting" | "giving_back");
                    if volume.owner == sites.name(place) {
                        owners.push(place);
                    }
                }
            }
            // Sites are asked one after the other: only what is seen twice is so.
            let is_stable = last.as_ref() == Some(&owners);
            last = Some(owners.clone());
            match (is_stable, owners.as_slice()) {
                (true, [_, _, ..]) => {
                    bail!(TwoOwners(format!("{owners:?} say that they own it\n{}", sites.describe())))
                }
                (true, [owner]) if !is_moving => Ok(Some(*owner)),
                _ => Ok(None),
            }
        })?;
        if !candidates.contains(&owner) {
            bail!("site {} owns the volume, which cannot be\n{}", self.name(owner), self.describe());
        }
        self.probe(&[owner])?;
        Ok(owner)
    }

    /// Tries to write, what was just read, at every site that runs and is none of `owners`.
    pub fn probe(&mut self, owners: &[usize]) -> Result<()> {
        for place in (0..SITES).filter(|place| !owners.contains(place)) {
            // A client that asks for a volume that is not there counts as a guest that is on its way.
            if !self.sites[place].is_running() || self.known(place)?.is_none() {
                continue;
            }
            self.probes += 1;
            let Ok(mut nbd) = NbdClient::open(&self.sites[place].nbd_socket(), NAME) else {
                self.knocked[place] = Some(Instant::now());
                continue;
            };
            let mut sector = [0; 512];
            if nbd.read(0, &mut sector).is_err() {
                continue;
            }
            match nbd.write(0, &sector, false) {
                Ok(()) => bail!(TwoOwners(format!("site {} took a write\n{}", self.name(place), self.describe()))),
                Err(error) => {
                    let errno = error.get_ref().and_then(|inner| inner.downcast_ref::<NbdError>());
                    if errno.is_some_and(|errno| errno.0 != PERM) {
                        bail!("site {} refused a write that is not its own with {error}, not EPERM", self.name(place));
                    }
                }
            }
        }
        Ok(())
    }
}
