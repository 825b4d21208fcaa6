//! A disk of chance: it keeps what was synced; of the rest a power loss keeps some sectors and others not, whatever the order they were
//! written in. Must not know what lies in its files.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use blockferry::image::{Backend, Image, Stamp};
use parking_lot::Mutex;

use crate::process::Process;
use crate::random::Random;
use crate::world::Side;

const SECTOR: usize = 512;
/// The grain of holes.
const PAGE: usize = 4096;
/// Versions of one sector that a power loss chooses from, at most.
const VERSIONS: usize = 6;

type Sector = [u8; SECTOR];

/// A file, which outlives the processes that open it.
#[derive(Debug)]
pub struct DiskFile {
    pub inode: u64,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// What readers see: the kernel's cache over the platter.
    cached: Vec<u8>,
    is_data: Vec<bool>,
    /// Of each sector that was written since the last sync: what it held before each write, the platter's content first.
    unsynced: BTreeMap<usize, Vec<(u64, Box<Sector>)>>,
    /// The platter's content of sectors that a failed sync gave up: they are clean, and not what the platter has.
    given_up: BTreeMap<usize, Box<Sector>>,
    writes: u64,
    has_failed_sync: bool,
}

impl DiskFile {
    /// All hole.
    pub fn new(size_bytes: usize, inode: u64) -> Arc<DiskFile> {
        DiskFile::with_content(vec![0; size_bytes], inode)
    }

    /// Durable, with holes where a page is zero.
    pub fn with_content(content: Vec<u8>, inode: u64) -> Arc<DiskFile> {
        let is_data = content.chunks(PAGE).map(|page| *page != [0; PAGE][..page.len()]).collect();
        let inner = Inner {
            cached: content,
            is_data,
            unsynced: BTreeMap::new(),
            given_up: BTreeMap::new(),
            writes: 0,
            has_failed_sync: false,
        };
        Arc::new(DiskFile { inode, inner: Mutex::new(inner) })
    }

    /// Opens it for a process.
    pub fn open(self: &Arc<Self>, process: &Arc<Process>, name: &str) -> Image {
        let size_bytes = self.inner.lock().cached.len() as u64;
        let handle = Handle { file: Arc::clone(self), process: Arc::clone(process) };
        Image::over(Box::new(handle), Path::new(name), size_bytes, true)
    }

    /// What a reader would see.
    pub fn content(&self) -> Vec<u8> {
        self.inner.lock().cached.clone()
    }

    /// The machine loses power.
    pub fn lose_power(&self, random: &mut Random) {
        let mut inner = self.inner.lock();
        let Inner { cached, is_data, unsynced, given_up, writes, .. } = &mut *inner;
        let manner = random.below(5);
        let first_lost = random.below(*writes + 2);
        for (sector, versions) in std::mem::take(unsynced) {
            // Which of the versions the platter has: as many as there are, and the last one.
            let last = versions.len();
            let chosen = match manner {
                0 => 0,
                1 => last,
                2 => versions.iter().take_while(|(write, _)| *write < first_lost).count(),
                3 => versions
                    .iter()
                    .take_while(|(write, _)| !crate::random::mix(*write ^ first_lost).is_multiple_of(3))
                    .count(),
                _ => random.below(last as u64 + 1) as usize,
            };
            if let Some((_, content)) = versions.get(chosen) {
                put_back(cached, is_data, sector, content);
            }
        }
        for (sector, content) in std::mem::take(given_up) {
            put_back(cached, is_data, sector, &content);
        }
        inner.has_failed_sync = false;
    }

    /// Whether the disk has given bytes up since the daemon was started.
    pub fn has_failed_sync(&self) -> bool {
        self.inner.lock().has_failed_sync
    }

    /// The daemon ends, the kernel goes on. Returns whether bytes were lost: a failed sync had given them up, and the cache has
    /// dropped them since.
    pub fn forget_given_up(&self) -> bool {
        let mut inner = self.inner.lock();
        let Inner { cached, is_data, given_up, .. } = &mut *inner;
        for (sector, content) in std::mem::take(given_up) {
            put_back(cached, is_data, sector, &content);
        }
        std::mem::take(&mut inner.has_failed_sync)
    }
}

fn bytes_of(sector: usize, size_bytes: usize) -> Range<usize> {
    sector * SECTOR..((sector + 1) * SECTOR).min(size_bytes)
}

fn put_back(cached: &mut [u8], is_data: &mut [bool], sector: usize, content: &Sector) {
    let bytes = bytes_of(sector, cached.len());
    let len = bytes.len();
    is_data[bytes.start / PAGE] |= *content != [0; SECTOR];
    cached[bytes].copy_from_slice(&content[..len]);
}

impl Inner {
    /// Keeps what these bytes held, before they change.
    fn about_to_write(&mut self, bytes: Range<usize>) {
        self.writes += 1;
        for sector in bytes.start / SECTOR..bytes.end.div_ceil(SECTOR) {
            let mut before = Box::new([0; SECTOR]);
            let of = bytes_of(sector, self.cached.len());
            before[..of.len()].copy_from_slice(&self.cached[of]);
            let versions = self.unsynced.entry(sector).or_default();
            // What the platter has, if the cache has pretended something else since.
            if let Some(platter) = self.given_up.remove(&sector) {
                versions.insert(0, (0, platter));
            }
            if versions.len() >= VERSIONS {
                versions.remove(1);
            }
            versions.push((self.writes, before));
        }
    }

    /// Whether the platter has any of a page's data.
    fn is_written_back(&self, page: usize) -> bool {
        (page * PAGE / SECTOR..((page + 1) * PAGE).min(self.cached.len()).div_ceil(SECTOR)).any(|sector| {
            match self.unsynced.get(&sector).and_then(|versions| versions.first()) {
                Some((_, platter)) => **platter != [0; SECTOR],
                None => self.cached[bytes_of(sector, self.cached.len())].iter().any(|byte| *byte != 0),
            }
        })
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let range = offset..offset + bytes.len();
        self.about_to_write(range.clone());
        self.is_data[offset / PAGE..range.end.div_ceil(PAGE)].fill(true);
        self.cached[range].copy_from_slice(bytes);
    }

    fn zero(&mut self, range: Range<usize>, may_punch: bool) {
        self.about_to_write(range.clone());
        let is_last = range.end == self.cached.len();
        for page in range.start / PAGE..range.end.div_ceil(PAGE) {
            let is_whole = page * PAGE >= range.start && ((page + 1) * PAGE <= range.end || is_last);
            if is_whole {
                self.is_data[page] = !may_punch;
            }
        }
        self.cached[range].fill(0);
    }
}

/// An open file of one process.
#[derive(Debug)]
struct Handle {
    file: Arc<DiskFile>,
    process: Arc<Process>,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "life {} of the {:?}", self.life, self.side)
    }
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl Handle {
    fn check(&self, is_effect: bool) -> io::Result<()> {
        let may = if is_effect { self.process.may_act() } else { self.process.is_alive() };
        if !may {
            return Err(error(EIO));
        }
        let is_faulty = self.process.side == Side::Destination && !self.process.is_starting();
        let percent = self.process.world.weather.lock().disk_errors_percent;
        if is_faulty && self.process.world.percent(percent) {
            self.process.world.note("disk error", [self.file.inode, 0, 0]);
            return Err(error(EIO));
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.process.side == Side::Destination && self.process.world.weather.lock().is_disk_full
    }

    fn note(&self, what: &'static str, offset: u64, len_bytes: u64) {
        self.process.world.note(what, [self.file.inode, offset, len_bytes]);
    }
}

impl Backend for Handle {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.check(false)?;
        let inner = self.file.inner.lock();
        let offset = (offset as usize).min(inner.cached.len());
        let len = buf.len().min(inner.cached.len() - offset);
        buf[..len].copy_from_slice(&inner.cached[offset..offset + len]);
        Ok(len)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Option<io::Result<()>> {
        if self.process.world.percent(30) {
            return None;
        }
        self.read_at(buf, offset).ok().filter(|count| *count == buf.len()).map(|_| Ok(()))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // Before: whoever looks now must not be told that the bytes are there.
        self.process.let_others_run();
        self.check(true)?;
        self.note("disk write", offset, bytes.len() as u64);
        let mut inner = self.file.inner.lock();
        let pages = offset as usize / PAGE..(offset as usize + bytes.len()).div_ceil(PAGE);
        let hole = pages.clone().find(|page| !inner.is_data[*page]);
        if let Some(hole) = hole.filter(|_| self.is_full()) {
            // What fits is written.
            let fits = (hole * PAGE).saturating_sub(offset as usize).min(bytes.len());
            if fits > 0 {
                inner.write(offset as usize, &bytes[..fits]);
            }
            return Err(error(ENOSPC));
        }
        inner.write(offset as usize, bytes);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, may_punch: bool) -> io::Result<()> {
        self.process.let_others_run();
        self.check(true)?;
        self.note("disk zeroes", offset, len_bytes);
        let range = offset as usize..(offset + len_bytes) as usize;
        let mut inner = self.file.inner.lock();
        let pages = range.start / PAGE..range.end.div_ceil(PAGE);
        if self.is_full() && !may_punch && pages.clone().any(|page| !inner.is_data[page]) {
            return Err(error(ENOSPC));
        }
        inner.zero(range, may_punch);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        if !self.process.may_act() {
            return Err(error(EIO));
        }
        self.note("disk sync", 0, 0);
        let world = &self.process.world;
        let percent = {
            let weather = world.weather.lock();
            weather.sync_errors_percent.max(weather.disk_errors_percent)
        };
        let mut inner = self.file.inner.lock();
        let unsynced = std::mem::take(&mut inner.unsynced);
        if self.process.side == Side::Destination && !self.process.is_starting() && world.percent(percent) {
            world.note("disk sync failed", [self.file.inode, 0, 0]);
            inner.has_failed_sync = true;
            for (sector, mut versions) in unsynced {
                if world.percent(60) {
                    let (_, platter) = versions.swap_remove(0);
                    inner.given_up.entry(sector).or_insert(platter);
                }
            }
            return Err(error(EIO));
        }
        Ok(())
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        self.check(false)?;
        let inner = self.file.inner.lock();
        let size_bytes = inner.cached.len() as u64;
        let first = from as usize / PAGE;
        // Some file systems tell of data once it is written back.
        let is_late = self.file.inode.is_multiple_of(3);
        let is_told = |page: &usize| inner.is_data[*page] && (!is_late || inner.is_written_back(*page));
        let start = (first..inner.is_data.len()).find(is_told);
        let Some(start) = start.filter(|_| from < size_bytes) else { return Ok(None) };
        let end = (start..inner.is_data.len()).find(|page| !is_told(page)).unwrap_or(inner.is_data.len());
        Ok(Some(((start * PAGE) as u64).max(from)..((end * PAGE) as u64).min(size_bytes)))
    }

    fn stamp(&self) -> io::Result<Stamp> {
        self.check(false)?;
        let inner = self.file.inner.lock();
        let mtime_ns = 1_000_000_000 + i128::from(inner.writes);
        let size_bytes = inner.cached.len() as u64;
        Ok(Stamp { device: 1, inode: self.file.inode, size_bytes, mtime_ns, ctime_ns: mtime_ns })
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        let inner = self.file.inner.lock();
        Ok(inner.is_data.iter().filter(|is_data| **is_data).count() as u64 * PAGE as u64)
    }
}
