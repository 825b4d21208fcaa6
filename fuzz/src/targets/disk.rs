//! A disk in memory that is as awkward as an export may be: it answers at once or late, fails where it was told to, and
//! says odd things of its extents. Must not know clients.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;

use crate::core::nbd::{ContextIndex, Extent, NbdErrno, ZeroFlags};
use crate::nbd::{BoxFuture, Export, Exports, OpenError, ReadData};

/// Bytes of every disk.
pub(super) const DISK_BYTES: usize = 64 << 10;

/// Requests that touch this sector fail, where the disk's temper says so.
pub(super) const BAD_SECTOR: std::ops::Range<usize> = 28 << 10..(28 << 10) + 512;

/// How a disk behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Temper {
    /// Takes the fast path for these: bits by the sector number modulo 8.
    pub(super) at_once: u8,
    /// How often a request comes back before it is done, at most.
    pub(super) delays: u8,
    /// What [`BAD_SECTOR`] fails with.
    pub(super) bad: Option<NbdErrno>,
    /// FAST_ZERO is refused.
    pub(super) no_fast_zero: bool,
    /// Extents are nonsense.
    pub(super) odd_extents: bool,
    /// A read of one sector returns one byte too many.
    pub(super) long_reads: bool,
    pub(super) read_only: bool,
}

/// See the module.
pub(super) struct Disk {
    pub(super) temper: Temper,
    content: Mutex<Content>,
    pub(super) flushes: AtomicUsize,
}

struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
}

impl Disk {
    pub(super) fn new(temper: Temper) -> Arc<Disk> {
        let blocks = (0..DISK_BYTES).map(|at| if at >> 12 & 1 == 0 { 0 } else { (at >> 9) as u8 | 1 });
        let now: Vec<u8> = blocks.collect();
        let content = Mutex::new(Content { durable: now.clone(), now });
        Arc::new(Disk { temper, content, flushes: AtomicUsize::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.lock().now.clone()
    }

    pub(super) fn durable(&self) -> Vec<u8> {
        self.lock().durable.clone()
    }

    fn is_at_once(&self, offset: u64) -> bool {
        self.temper.at_once >> (offset / 512 % 8) & 1 == 1
    }

    fn fails(&self, offset: u64, len_bytes: u64) -> Result<(), NbdErrno> {
        let touches = (offset as usize) < BAD_SECTOR.end && (offset + len_bytes) as usize > BAD_SECTOR.start;
        self.temper.bad.filter(|_| touches).map_or(Ok(()), Err)
    }

    /// Comes back a number of times that depends on the offset, so that what is under way overtakes each other.
    async fn dawdle(&self, offset: u64) {
        let turns = (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) * u64::from(self.temper.delays) / 256;
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
    }

    fn change(&self, offset: u64, fua: bool, len: usize, fill: impl FnOnce(&mut [u8])) {
        let mut content = self.lock();
        let range = offset as usize..offset as usize + len;
        fill(&mut content.now[range.clone()]);
        if fua {
            let Content { now, durable } = &mut *content;
            durable[range.clone()].copy_from_slice(&now[range]);
        }
    }
}

impl Export for Disk {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES as u64
    }

    fn is_read_only(&self) -> bool {
        self.temper.read_only
    }

    fn description(&self) -> String {
        "memory".to_owned()
    }

    fn preferred_block_bytes(&self) -> u32 {
        4096
    }

    fn contexts(&self) -> Vec<String> {
        vec!["base:allocation".to_owned(), "blockferry:residency".to_owned()]
    }

    fn read(&self, offset: u64, len_bytes: u32) -> BoxFuture<'_, Result<ReadData, NbdErrno>> {
        Box::pin(async move {
            self.dawdle(offset).await;
            self.fails(offset, u64::from(len_bytes))?;
            let mut data = self.lock().now[offset as usize..offset as usize + len_bytes as usize].to_vec();
            if self.temper.long_reads && len_bytes == 512 {
                data.push(0);
            }
            let tail = Bytes::from(data.split_off(data.len() / 3));
            Ok(vec![Bytes::from(data), tail].into())
        })
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move {
            self.dawdle(offset).await;
            self.fails(offset, data.len() as u64)?;
            self.change(offset, fua, data.len(), |bytes| bytes.copy_from_slice(&data));
            Ok(())
        })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move {
            self.flushes.fetch_add(1, Ordering::SeqCst);
            let mut content = self.lock();
            content.durable = content.now.clone();
            Ok(())
        })
    }

    fn trim(&self, offset: u64, len_bytes: u64, fua: bool) -> BoxFuture<'_, Result<(), NbdErrno>> {
        self.write_zeroes(offset, len_bytes, ZeroFlags { may_punch: true, fast: false }, fua)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len_bytes: u64,
        flags: ZeroFlags,
        fua: bool,
    ) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move {
            self.dawdle(offset).await;
            if flags.fast && self.temper.no_fast_zero {
                return Err(NbdErrno::NotSup);
            }
            self.fails(offset, len_bytes)?;
            self.change(offset, fua, len_bytes as usize, |bytes| bytes.fill(0));
            Ok(())
        })
    }

    fn cache(&self, offset: u64, len_bytes: u64) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move { self.fails(offset, len_bytes) })
    }

    fn extents(
        &self,
        context: ContextIndex,
        offset: u64,
        len_bytes: u64,
        max_extents: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdErrno>> {
        Box::pin(async move {
            self.dawdle(offset).await;
            self.fails(offset, len_bytes)?;
            if self.temper.odd_extents {
                let odd = |turn: u64| Extent::new([0, 1, u64::MAX, 700][turn as usize % 4], (turn * offset) as u32);
                return Ok((0..len_bytes % 7).map(odd).collect());
            }
            let content = self.lock();
            let range = &content.now[offset as usize..(offset + len_bytes) as usize];
            let sectors = range.chunks(512).map(|sector| {
                let is_zero = sector.iter().all(|byte| *byte == 0);
                Extent::new(sector.len() as u64, if is_zero && context.0 == 0 { 3 } else { 0 })
            });
            Ok(sectors.take(max_extents).collect())
        })
    }

    fn try_read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), NbdErrno>> {
        self.is_at_once(offset).then(|| {
            self.fails(offset, buf.len() as u64)?;
            buf.copy_from_slice(&self.lock().now[offset as usize..offset as usize + buf.len()]);
            Ok(())
        })
    }

    fn write_here(&self, offset: u64, data: &[u8], fua: bool) -> Option<Result<(), NbdErrno>> {
        self.is_at_once(offset).then(|| {
            self.fails(offset, data.len() as u64)?;
            self.change(offset, fua, data.len(), |bytes| bytes.copy_from_slice(data));
            Ok(())
        })
    }
}

/// Disks by name, each for one run.
#[derive(Default)]
pub(super) struct Disks {
    disks: Mutex<HashMap<String, Arc<Disk>>>,
}

impl Disks {
    pub(super) fn insert(&self, name: &str, disk: &Arc<Disk>) {
        self.lock().insert(name.to_owned(), Arc::clone(disk));
    }

    pub(super) fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Disk>>> {
        self.disks.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Exports for Disks {
    fn names(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>, OpenError> {
        match self.lock().get(name) {
            Some(disk) => Ok(Arc::clone(disk) as Arc<dyn Export>),
            None => Err(OpenError::Unknown),
        }
    }

    fn default_export(&self) -> Option<String> {
        None
    }
}
