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

use crate::guest::{Disk, Done, Guest};
use crate::model::{Change, Originals};
use crate::record;
use crate::sites::{NAME, PATIENCE, SITES, Sites, Stuck};

const BLOCK_BYTES: u64 = 64 << 10;
/// Read at a time when everything is compared.
const PIECE_BYTES: u64 = 1 << 20;
/// Pieces that are read at a time when everything is checked.
const PIECES_AT_A_TIME: usize = 32;
/// Blocks that nobody wrote, read after each restart.
const SAMPLED_BLOCKS: u64 = 12;
/// How long a hand-over may take before it is withdrawn.
const HAND_OVER_WITHIN: &str = "20s";

/// What goes wrong during a hand-over.
pub type Mishap<'a> = dyn FnMut(&mut Sites) -> Result<()> + 'a;

/// Where the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// All of it is at this site, which owns it.
    Home(usize),
    /// It is arriving.
    Moving {
        /// From here.
        from: usize,
        /// To here, the owner.
        to: usize,
    },
}

impl Place {
    /// Which site owns the disk.
    pub fn owner(self) -> usize {
        match self {
            Place::Home(at) => at,
            Place::Moving { to, .. } => to,
        }
    }
}

/// See the module.
pub struct Relocation {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Where it is.
    pub place: Place,
    /// The volume's file at each site that knows the volume.
    pub images: [Option<PathBuf>; SITES],
    /// Sites that have let go of the name to another site: they want to be told `--again`.
    pub has_left: [bool; SITES],
    /// What the clients of earlier disks did.
    done_before: Done,
    /// What the first disk held.
    originals: Option<Originals>,
    folder: PathBuf,
    files: u64,
    guest: Option<Guest>,
    /// Changes that were under way when their clients lost the server, and have not been looked for yet.
    open: Vec<Change>,
}

impl Relocation {
    /// A disk at site a, whose file this becomes.
    pub fn new(sites: &mut Sites, image: &Path) -> Result<Relocation> {
        let bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
        sites.done(0, &["volume", "add", NAME, "--image", &image.to_string_lossy()])?;
        let mut images = [const { None }; SITES];
        images[0] = Some(image.to_owned());
        Ok(Relocation {
            disk: Disk::new(1, bytes, None),
            place: Place::Home(0),
            images,
            has_left: [false; SITES],
            done_before: Done::default(),
            originals: None,
            folder: image.parent().unwrap_or(Path::new(".")).to_owned(),
            files: 0,
            guest: None,
            open: Vec::new(),
        })
    }

    /// What all clients did so far.
    pub fn done(&self) -> Done {
        self.done_before + self.disk.done()
    }

    /// Another disk takes the name from here on; its file.
    pub fn replace_disk(&mut self, random: &mut Random) -> Result<PathBuf> {
        let size_bytes = self.disk.model().size_bytes();
        if self.originals.is_none() {
            self.originals = Some(self.disk.model().originals());
        }
        self.done_before = self.done();
        let number = self.disk.number() + 1;
        let bytes = made_up(number, size_bytes, random);
        let path = self.folder.join(format!("another-{number}.raw"));
        fs::write(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))?;
        self.disk = Disk::new(number, bytes, self.originals.clone());
        self.open.clear();
        Ok(path)
    }

    /// A file of another disk, as large as the volume's at `place` and of the same time, is put at its path; the right one
    /// is kept aside.
    pub fn swap_image(&self, place: usize, random: &mut Random) -> Result<()> {
        let path = self.image(place)?;
        let meta = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
        fs::rename(path, path.with_extension("aside")).context("cannot put the image aside")?;
        // Disk 0 is nobody's.
        let bytes = made_up(0, meta.len(), random);
        fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        let file = File::options().write(true).open(path).context("the image that was just made")?;
        file.set_modified(meta.modified().context("no time of change")?).context("cannot set the time of change")
    }

    /// Undoes it.
    pub fn put_image_back(&self, place: usize) -> Result<()> {
        let path = self.image(place)?;
        fs::rename(path.with_extension("aside"), path).context("cannot put the image back")
    }

    /// The volume's file at a site.
    pub fn image(&self, place: usize) -> Result<&PathBuf> {
        self.images[place].as_ref().with_context(|| format!("the torture knows no image at site {place}"))
    }

    /// The volume is not at this site any more.
    pub fn forget_image(&mut self, place: usize) -> Result<()> {
        if let Some(path) = self.images[place].take()
            && path.exists()
        {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Lets clients work at the owner from now on.
    pub fn start_guest(&mut self, sites: &Sites, random: &mut Random) {
        let socket = sites.sites[self.place.owner()].nbd_socket();
        self.guest = Some(Guest::start(&self.disk, socket, NAME, random.number()));
    }

    /// Whether clients are at work.
    pub fn has_guest(&self) -> bool {
        self.guest.is_some()
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

    /// Whether every change was answered, or looked for since.
    pub fn is_certain(&self) -> bool {
        self.open.is_empty()
    }

    /// What was written since the hand-over is thrown away; the disk is at its source again.
    pub fn roll_back(&mut self, home: usize) {
        self.open.clear();
        self.disk.model().roll_back();
        self.place = Place::Home(home);
    }

    /// A path for the volume at a site that no attempt before has used.
    pub fn next_image(&mut self, sites: &Sites, place: usize) -> PathBuf {
        self.files += 1;
        self.folder.join(format!("{NAME}-{}-at-{}.raw", self.files, sites.name(place)))
    }

    /// Says `relocate` at the destination; `meanwhile` goes wrong while it is done. With clients at the source, it is taken
    /// from them. Returns when the destination owns the volume and serves it.
    pub fn hand_over(&mut self, sites: &mut Sites, to: usize, meanwhile: Option<&mut Mishap<'_>>) -> Result<()> {
        let Place::Home(from) = self.place else { bail!("the disk is on its way already") };
        self.expect_the_end();
        self.disk.model().hand_over();
        let remote = format!("{}/{NAME}", sites.name(from));
        let mut image = self.next_image(sites, to);
        let mut asked = None;
        if let Some(go_wrong) = meanwhile {
            let text = image.to_string_lossy().into_owned();
            let verb = ["relocate", &remote, "--image", &text, "--take", "--timeout", HAND_OVER_WITHIN];
            asked = Some(sites.sites[to].ask_later(&verb)?);
            go_wrong(sites)?;
        }
        let begun = Instant::now();
        let name = sites.name(to);
        loop {
            check_interrupt()?;
            let found = sites.known(to)?;
            match &found {
                Some(volume) if volume.phase == "failed" => bail!("the hand-over failed: {}", volume.phase_reason),
                Some(volume) if volume.owner == name && volume.phase != "connecting" => {
                    image = volume.image.clone();
                    break;
                }
                _ if begun.elapsed() > PATIENCE => {
                    bail!(Stuck(format!("the hand-over came to no end\n{}", sites.describe())))
                }
                Some(_) => thread::sleep(Duration::from_millis(50)),
                None => {
                    // What an attempt that was killed left behind is in nobody's way.
                    image = self.next_image(sites, to);
                    let text = image.to_string_lossy().into_owned();
                    let verb = ["relocate", &remote, "--image", &text, "--take", "--timeout", HAND_OVER_WITHIN];
                    let said = sites.say(to, &verb)?;
                    if !said.is_done {
                        if begun.elapsed() > PATIENCE {
                            bail!(Stuck(format!("the hand-over: {}\n{}", said.err.trim(), sites.describe())));
                        }
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        }
        // It ends by itself, or is ended: the volume is there.
        drop(asked);
        self.images[to] = Some(image);
        self.place = Place::Moving { from, to };
        self.stop_guest()?;
        self.check_one_owner(sites)?;
        if !self.open.is_empty() {
            // What was under way at the source when it let go is the source's: old or new, and part of what was handed over.
            let mut nbd = self.connect(sites)?;
            self.settle(&mut nbd)?;
        }
        // So is what was acknowledged there until it let go.
        self.disk.model().hand_over();
        Ok(())
    }

    fn check_one_owner(&self, sites: &mut Sites) -> Result<()> {
        let Place::Moving { from, to } = self.place else { return Ok(()) };
        let known = sites.volume(from)?;
        if known.owner != sites.name(to) {
            bail!("two owners: the source says {}, the destination {}", known.owner, sites.name(to));
        }
        sites.probe(&[to])
    }

    fn connect(&self, sites: &Sites) -> Result<NbdClient> {
        let socket = sites.sites[self.place.owner()].nbd_socket();
        NbdClient::open(&socket, NAME).context("the volume is not served where it should be")
    }

    fn settle(&mut self, nbd: &mut NbdClient) -> Result<()> {
        for change in std::mem::take(&mut self.open) {
            let start = change.range.start / 512 * 512;
            let end = change.range.end.next_multiple_of(512).min(nbd.size_bytes());
            let mut bytes = vec![0; (end - start) as usize];
            nbd.read(start, &mut bytes).with_context(|| format!("reading what write {} left", change.sequence))?;
            let settled = self.disk.model().settle(&change, start, &bytes);
            self.disk.note(settled);
        }
        Ok(())
    }

    /// After a restart of the owner: everything acknowledged is there, whatever was under way is old or new, and
    /// blocks that nobody wrote are the image's. Without the source only the first can be told. Returns how many sectors
    /// and how many untouched blocks were compared.
    pub fn check(&mut self, sites: &Sites, is_source_there: bool, random: &mut Random) -> Result<(u64, u64)> {
        let mut nbd = self.connect(sites)?;
        if is_source_there {
            self.settle(&mut nbd)?;
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

    /// Reads all of the disk at its owner, where no client is at work, and compares; how many sectors.
    pub fn check_whole(&mut self, sites: &Sites) -> Result<u64> {
        let mut nbd = self.connect(sites)?;
        self.settle(&mut nbd)?;
        self.read_whole(&mut nbd, |disk, offset, bytes| disk.note(disk.model().check(offset, bytes)))
    }

    /// The same when the source was given up: what nobody wrote may have become zeros; how many bytes did.
    pub fn check_given_up(&mut self, sites: &Sites) -> Result<u64> {
        let mut nbd = self.connect(sites)?;
        let mut gone = 0;
        self.read_whole(&mut nbd, |disk, offset, bytes| {
            let (more, checked) = disk.model().give_up_absent(offset, bytes);
            gone += more;
            disk.note(checked);
        })?;
        Ok(gone)
    }

    fn read_whole(&self, nbd: &mut NbdClient, mut compare: impl FnMut(&Disk, u64, &[u8])) -> Result<u64> {
        let size_bytes = self.disk.model().size_bytes();
        if nbd.size_bytes() != size_bytes {
            bail!("the volume has {} bytes instead of {size_bytes}", nbd.size_bytes());
        }
        for offset in (0..size_bytes).step_by(PIECE_BYTES as usize) {
            let mut bytes = vec![0; (size_bytes - offset).min(PIECE_BYTES) as usize];
            nbd.read(offset, &mut bytes).with_context(|| format!("reading all of the volume, at {offset}"))?;
            compare(&self.disk, offset, &bytes);
        }
        Ok(size_bytes.div_ceil(512))
    }

    /// How far it is; whether nothing is missing and the source knows.
    pub fn progress(&self, sites: &mut Sites) -> Result<(u64, bool)> {
        let volume = sites.volume(self.place.owner())?;
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
                bail!(Stuck(format!(
                    "nothing has arrived for {} s: {here} % is here\n{}",
                    PATIENCE.as_secs(),
                    sites.describe()
                )));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// It has arrived: the raw file has to be the model, byte by byte, whether its daemon is killed or stopped. The
    /// destination is the next source; the site that it came from may keep what it had for a while.
    pub fn finish(&mut self, sites: &mut Sites, is_killed: bool, is_kept: bool) -> Result<()> {
        let Place::Moving { from, to } = self.place else { bail!("nothing is under way") };
        self.stop_guest()?;
        if is_killed {
            sites.sites[to].kill()?;
        } else {
            sites.sites[to].stop()?;
        }
        self.compare_file(to)?;
        sites.sites[to].start()?;
        self.place = Place::Home(to);
        if !is_kept {
            self.let_go(sites, from)?;
        }
        Ok(())
    }

    /// Removes what a site still has of a disk that is somebody else's.
    pub fn let_go(&mut self, sites: &mut Sites, place: usize) -> Result<()> {
        sites.done(place, &["volume", "remove", NAME])?;
        if sites.known(place)?.is_some() {
            bail!("`volume remove` was done, and the volume is still there\n{}", sites.describe());
        }
        self.has_left[place] = true;
        self.forget_image(place)
    }

    fn compare_file(&self, place: usize) -> Result<()> {
        let path = self.image(place)?;
        let context = || format!("cannot read {}", path.display());
        let mut file = File::open(path).with_context(context)?;
        let size_bytes = file.metadata().with_context(context)?.len();
        let model = self.disk.model();
        if size_bytes != model.size_bytes() {
            bail!("{} has {size_bytes} bytes instead of {}", path.display(), model.size_bytes());
        }
        let mut bytes = vec![0; PIECE_BYTES as usize];
        for offset in (0..size_bytes).step_by(PIECE_BYTES as usize) {
            let count = (size_bytes - offset).min(PIECE_BYTES) as usize;
            file.read_exact(&mut bytes[..count]).with_context(context)?;
            self.disk.note(model.check(offset, &bytes[..count]));
        }
        Ok(())
    }
}

/// The bytes of a disk that nobody made: records in a third of its blocks, zeros elsewhere.
fn made_up(number: u64, size_bytes: u64, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; size_bytes as usize];
    for (at, block) in bytes.chunks_mut(BLOCK_BYTES as usize).enumerate() {
        if random.below(3) == 0 {
            record::fill(record::sequence(number, 0), at as u64 * BLOCK_BYTES, block);
        }
    }
    bytes
}
