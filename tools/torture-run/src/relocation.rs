//! One disk that moves from site to site, and its clients: the hand-over, what is checked after a restart, and the end.
//! Must not know what goes wrong when.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blockferry_lab::nbd::NbdClient;
use blockferry_lab::process::check_interrupt;
use blockferry_lab::random::Random;
use blockferry_lab::site::{Relay, Site, VolumeStatus};
use blockferry_wan::units::Rate;

use crate::guest::{Disk, Guest};
use crate::model::Change;

/// The volume's name.
pub const NAME: &str = "disk";
const BLOCK_BYTES: u64 = 64 << 10;
/// Nothing that is waited for takes longer while nothing is broken.
const PATIENCE: Duration = Duration::from_secs(90);
/// Pieces that are read at a time when everything is checked.
const PIECES_AT_A_TIME: usize = 32;
/// Blocks that nobody wrote, read after each restart.
const SAMPLED_BLOCKS: u64 = 12;

/// What goes wrong during a hand-over.
pub type Mishap<'a> = dyn FnMut(&mut Sites) -> Result<()> + 'a;

/// Two sites, and a relay to each.
pub struct Sites {
    /// Site a and site b.
    pub sites: [Site; 2],
    /// The way to site a, and to site b.
    pub relays: [Relay; 2],
}

impl Sites {
    /// Cuts or mends the WAN.
    pub fn set_cut(&mut self, is_cut: bool) -> Result<()> {
        self.relays.iter_mut().try_for_each(|relay| if is_cut { relay.cut() } else { relay.mend() })
    }

    /// Changes the WAN's bottleneck.
    pub fn set_rate(&mut self, rate: Option<Rate>) -> Result<()> {
        self.relays.iter_mut().try_for_each(|relay| relay.set_rate(rate))
    }

    /// Kills a site, deletes its store, starts it again.
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
}

/// See the module.
pub struct Relocation {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Where it was.
    pub source: usize,
    /// Its file at the source, and at the destination.
    images: [PathBuf; 2],
    folder: PathBuf,
    files: u64,
    guest: Option<Guest>,
    /// Changes that were under way when their clients lost the server, and have not been looked for yet.
    open: Vec<Change>,
}

impl Relocation {
    /// A disk at site a, whose file this becomes.
    pub fn new(sites: &mut Sites, image: &Path) -> Result<Relocation> {
        let mut bytes = Vec::new();
        let mut file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
        file.read_to_end(&mut bytes).with_context(|| format!("cannot read {}", image.display()))?;
        sites.sites[0].ask(&["volume", "add", NAME, "--image", &image.to_string_lossy()])?;
        Ok(Relocation {
            disk: Disk::new(bytes),
            source: 0,
            images: [image.to_owned(), PathBuf::new()],
            folder: image.parent().unwrap_or(Path::new(".")).to_owned(),
            files: 0,
            guest: None,
            open: Vec::new(),
        })
    }

    /// Where it is going.
    pub fn destination(&self) -> usize {
        1 - self.source
    }

    /// Lets clients work at a site from now on.
    pub fn start_guest(&mut self, sites: &Sites, place: usize, random: &mut Random) {
        self.guest = Some(Guest::start(&self.disk, sites.sites[place].nbd_socket(), NAME, random.number()));
    }

    /// Tells the clients that their server is going to be killed.
    pub fn expect_the_end(&self) {
        if let Some(guest) = &self.guest {
            guest.expect_the_end();
        }
    }

    /// The clients' server is dead: what they were about to change is looked for later.
    pub fn bury_guest(&mut self) -> Result<()> {
        if let Some(guest) = self.guest.take() {
            self.open.extend(guest.end()?);
        }
        Ok(())
    }

    /// Lets the clients end what they are at.
    pub fn stop_guest(&mut self) -> Result<()> {
        if let Some(guest) = &self.guest {
            guest.ask_to_stop();
        }
        self.bury_guest()
    }

    /// Fails when a client has ended although its server lives.
    pub fn check_guest(&mut self) -> Result<()> {
        if self.guest.as_ref().is_some_and(Guest::has_ended) {
            self.bury_guest()?;
            bail!("a client has ended too early");
        }
        Ok(())
    }

    /// Says `relocate` at the destination; `meanwhile` goes wrong while it is done. Returns when the destination owns the
    /// volume and serves it.
    pub fn hand_over(&mut self, sites: &mut Sites, meanwhile: Option<&mut Mishap<'_>>) -> Result<()> {
        let destination = self.destination();
        self.disk.model().hand_over();
        let remote = format!("{}/{NAME}", sites.sites[self.source].name());
        let mut image = self.next_image(sites, destination);
        if let Some(go_wrong) = meanwhile {
            let text = image.to_string_lossy().into_owned();
            let asked = sites.sites[destination].ask_later(&["relocate", &remote, "--image", &text])?;
            go_wrong(sites)?;
            asked.finish(PATIENCE)?;
        }
        let begun = Instant::now();
        loop {
            check_interrupt()?;
            let found = status(&mut sites.sites[destination])?;
            let name = sites.sites[destination].name();
            match &found {
                Some(volume) if volume.phase == "failed" => bail!("the hand-over failed: {}", volume.phase_reason),
                Some(volume) if volume.owner == name && volume.phase != "connecting" => {
                    image = volume.image.clone();
                    break;
                }
                _ if begun.elapsed() > PATIENCE => bail!("the hand-over came to no end: {found:?}"),
                Some(_) => thread::sleep(Duration::from_millis(50)),
                None => {
                    // What an attempt that was killed left behind is in nobody's way.
                    image = self.next_image(sites, destination);
                    let text = image.to_string_lossy().into_owned();
                    if let Err(error) = sites.sites[destination].ask(&["relocate", &remote, "--image", &text]) {
                        if begun.elapsed() > PATIENCE {
                            return Err(error);
                        }
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        }
        self.images[1] = image;
        self.check_one_owner(sites)
    }

    fn next_image(&mut self, sites: &Sites, destination: usize) -> PathBuf {
        self.files += 1;
        self.folder.join(format!("{NAME}-{}-at-{}.raw", self.files, sites.sites[destination].name()))
    }

    /// The site that let go must not be written any more, whoever asks.
    fn check_one_owner(&self, sites: &mut Sites) -> Result<()> {
        let destination = sites.sites[self.destination()].name();
        let source = &mut sites.sites[self.source];
        let known = status(source)?.context("the source has forgotten the volume")?;
        if known.owner != destination {
            bail!("two owners: the source says {}, the destination {destination}", known.owner);
        }
        if let Ok(mut nbd) = NbdClient::open(&source.nbd_socket(), NAME)
            && nbd.write(0, &[0; 512], false).is_ok()
        {
            bail!("two owners: the source took a write after the hand-over");
        }
        Ok(())
    }

    /// After a restart of the destination: everything acknowledged is there, whatever was under way is old or new, and
    /// blocks that nobody wrote are the image's. Without the source only the first can be told. Returns how many sectors
    /// and how many untouched blocks were compared.
    pub fn check(&mut self, sites: &Sites, is_source_there: bool, random: &mut Random) -> Result<(u64, u64)> {
        let socket = sites.sites[self.destination()].nbd_socket();
        let mut nbd = NbdClient::open(&socket, NAME).context("the volume is not served after the restart")?;
        if is_source_there {
            for change in std::mem::take(&mut self.open) {
                let start = change.range.start / 512 * 512;
                let end = change.range.end.next_multiple_of(512).min(nbd.size_bytes());
                let mut bytes = vec![0; (end - start) as usize];
                nbd.read(start, &mut bytes).with_context(|| format!("reading what write {} left", change.sequence))?;
                let settled = self.disk.model().settle(&change, start, &bytes);
                self.disk.note(settled);
            }
        }
        let mut written = self.disk.model().written();
        // Whether these are old or new cannot be told yet.
        let is_open = |(offset, length): &(u64, u32)| {
            let end = offset + u64::from(*length);
            self.open.iter().any(|change| change.range.start < end && *offset < change.range.end.next_multiple_of(512))
        };
        written.retain(|piece| !is_open(piece));
        let mut sectors = 0;
        for pieces in written.chunks(PIECES_AT_A_TIME) {
            let found = nbd.read_all(pieces).context("reading what was acknowledged")?;
            let model = self.disk.model();
            for ((offset, length), bytes) in pieces.iter().zip(found) {
                self.disk.note(model.check(*offset, &bytes));
                sectors += u64::from(*length).div_ceil(512);
            }
        }
        let blocks = if is_source_there { self.check_untouched(&mut nbd, random)? } else { 0 };
        Ok((sectors, blocks))
    }

    fn check_untouched(&self, nbd: &mut NbdClient, random: &mut Random) -> Result<u64> {
        let mut blocks = 0;
        let size_bytes = nbd.size_bytes();
        for _ in 0..SAMPLED_BLOCKS {
            let start = random.below(size_bytes.div_ceil(BLOCK_BYTES)) * BLOCK_BYTES;
            let range = start..(start + BLOCK_BYTES).min(size_bytes);
            if !self.disk.model().is_untouched(&range) {
                continue;
            }
            let mut bytes = vec![0; (range.end - range.start) as usize];
            nbd.read(start, &mut bytes).context("reading a block that nobody wrote")?;
            self.disk.note(self.disk.model().check(start, &bytes));
            blocks += 1;
        }
        Ok(blocks)
    }

    /// How far it is; whether nothing is missing and the source knows.
    pub fn progress(&self, sites: &mut Sites) -> Result<(u64, bool)> {
        let volume =
            status(&mut sites.sites[self.destination()])?.context("the destination has forgotten the volume")?;
        if volume.phase == "failed" {
            bail!("the relocation has failed: {}", volume.phase_reason);
        }
        let here = (volume.blocks.total - volume.blocks.absent) * 100 / volume.blocks.total.max(1);
        Ok((here, volume.phase == "released_from_source"))
    }

    /// Waits until nothing is missing.
    pub fn wait_complete(&mut self, sites: &mut Sites) -> Result<()> {
        let (mut best, mut since) = (0, Instant::now());
        loop {
            check_interrupt()?;
            self.check_guest()?;
            let (here, is_complete) = self.progress(sites)?;
            if is_complete {
                return Ok(());
            }
            if here > best {
                (best, since) = (here, Instant::now());
            } else if since.elapsed() > PATIENCE {
                bail!("nothing has arrived for {} s: {here} % is here", PATIENCE.as_secs());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// It has arrived: the raw file has to be the model, byte by byte, whether its daemon is killed or stopped. The
    /// destination is the next source.
    pub fn finish(&mut self, sites: &mut Sites, is_killed: bool) -> Result<()> {
        let destination = self.destination();
        self.stop_guest()?;
        if is_killed {
            sites.sites[destination].kill()?;
        } else {
            sites.sites[destination].stop()?;
        }
        self.compare_file()?;
        sites.sites[destination].start()?;
        sites.sites[self.source].ask(&["volume", "remove", NAME])?;
        let old = std::mem::take(&mut self.images[0]);
        fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        self.images.swap(0, 1);
        self.source = destination;
        Ok(())
    }

    fn compare_file(&self) -> Result<()> {
        let path = &self.images[1];
        let context = || format!("cannot read {}", path.display());
        let mut file = File::open(path).with_context(context)?;
        let size_bytes = file.metadata().with_context(context)?.len();
        let model = self.disk.model();
        if size_bytes != model.size_bytes() {
            bail!("{} has {size_bytes} bytes instead of {}", path.display(), model.size_bytes());
        }
        let mut bytes = vec![0; 1 << 20];
        for offset in (0..size_bytes).step_by(1 << 20) {
            let count = (size_bytes - offset).min(1 << 20) as usize;
            file.read_exact(&mut bytes[..count]).with_context(context)?;
            self.disk.note(model.check(offset, &bytes[..count]));
        }
        Ok(())
    }
}

fn status(site: &mut Site) -> Result<Option<VolumeStatus>> {
    Ok(site.status()?.volumes.into_iter().find(|volume| volume.name == NAME))
}
