//! Volumes as NBD exports: the one place where a volume's errors become NBD's. Must not know relocation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use tokio::sync::watch;

use crate::core::nbd::wire::BASE_ALLOCATION;
use crate::core::residency::Presence;
use crate::nbd::{BoxFuture, ContextIndex, Export, Exports, Extent, NbdErrno, OpenError, ReadData, ZeroFlags};
use crate::pipe::Pipe;
use crate::volume::{Volume, VolumeError};

/// A volume that is served now.
pub struct Found {
    /// The volume.
    pub volume: Arc<Volume>,
    /// Counts its clients.
    pub clients: Arc<AtomicU32>,
    /// Changes when it is not to be served any more to whoever uses it now.
    pub withdrawals: watch::Receiver<u64>,
}

/// Finds volumes by the name that a client asks for.
pub trait Served: Send + Sync + 'static {
    /// Names of all volumes that can be served.
    fn names(&self) -> Vec<String>;
    /// The volume of that name, if there is one; or why it cannot be served now.
    fn find(&self, name: &str) -> Option<Result<Found, String>>;
}

/// A site's volumes, as the NBD server sees them.
pub struct VolumeExports(pub Arc<dyn Served>);

impl Exports for VolumeExports {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Export>, OpenError> {
        match self.0.find(name) {
            None => Err(OpenError::Unknown),
            Some(Err(why)) => Err(OpenError::NotNow(why)),
            Some(Ok(found)) => {
                found.clients.fetch_add(1, Ordering::Relaxed);
                Ok(Arc::new(VolumeExport(found)))
            }
        }
    }

    fn default_export(&self) -> Option<String> {
        let mut names = self.0.names();
        if names.len() == 1 { names.pop() } else { None }
    }
}

/// The metadata context that tells what of a volume has arrived.
pub const RESIDENCY: &str = "blockferry:residency";

/// In [`RESIDENCY`]: bytes of these blocks are still at the source. A read of them has to fetch.
pub const RESIDENCY_ABSENT: u32 = 1;

/// In [`RESIDENCY`]: a guest wrote to these blocks before they had arrived.
pub const RESIDENCY_WRITTEN: u32 = 2;

fn flags_of(presence: Presence) -> u32 {
    match presence {
        Presence::Present => 0,
        Presence::Absent => RESIDENCY_ABSENT,
        Presence::Written => RESIDENCY_WRITTEN,
        Presence::PartlyWritten => RESIDENCY_ABSENT | RESIDENCY_WRITTEN,
    }
}

struct VolumeExport(Found);

impl Drop for VolumeExport {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Export for VolumeExport {
    fn size_bytes(&self) -> u64 {
        self.0.volume.geometry().size_bytes
    }

    fn is_read_only(&self) -> bool {
        self.0.volume.is_read_only()
    }

    fn withdrawn(&self) -> Option<BoxFuture<'static, ()>> {
        let (closing, mut withdrawals) = (self.0.volume.closing(), self.0.withdrawals.clone());
        Some(Box::pin(async move {
            tokio::select! {
                () = closing => {}
                // An error: nobody is left who could withdraw it but by closing it.
                Ok(()) = withdrawals.changed() => {}
            }
        }))
    }

    fn description(&self) -> String {
        format!("blockferry volume {}", self.0.volume.name())
    }

    fn preferred_block_bytes(&self) -> u32 {
        4096
    }

    fn read(&self, offset: u64, len_bytes: u32) -> BoxFuture<'_, Result<ReadData, NbdErrno>> {
        Box::pin(async move {
            let bytes =
                self.0.volume.read(offset, len_bytes).await.map_err(|error| self.errno("READ", offset, &error))?;
            Ok(ReadData::One(bytes))
        })
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move {
            self.0.volume.write(offset, data, fua).await.map_err(|error| self.errno("WRITE", offset, &error))
        })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move { self.0.volume.flush().await.map_err(|error| self.errno("FLUSH", 0, &error)) })
    }

    fn trim(&self, offset: u64, len_bytes: u64, fua: bool) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move {
            self.0.volume.trim(offset, len_bytes, fua).await.map_err(|error| self.errno("TRIM", offset, &error))
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len_bytes: u64,
        flags: ZeroFlags,
        fua: bool,
    ) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move {
            if flags.fast {
                let done = self.0.volume.write_zeroes_fast(offset, len_bytes, flags.may_punch, fua).await;
                let is_done = done.map_err(|error| self.errno("WRITE_ZEROES", offset, &error))?;
                return if is_done { Ok(()) } else { Err(NbdErrno::NotSup) };
            }
            let done = self.0.volume.write_zeroes(offset, len_bytes, flags.may_punch, fua).await;
            done.map_err(|error| self.errno("WRITE_ZEROES", offset, &error))
        })
    }

    fn cache(&self, offset: u64, len_bytes: u64) -> BoxFuture<'_, Result<(), NbdErrno>> {
        Box::pin(async move {
            self.0.volume.prefetch(offset, len_bytes);
            Ok(())
        })
    }

    fn contexts(&self) -> Vec<String> {
        vec![BASE_ALLOCATION.to_owned(), RESIDENCY.to_owned()]
    }

    fn extents(
        &self,
        context: ContextIndex,
        offset: u64,
        len_bytes: u64,
        max_extents: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdErrno>> {
        Box::pin(async move {
            if context.0 == 1 {
                let found = self.0.volume.presence(offset, len_bytes, max_extents).await;
                let found = found.map_err(|error| self.errno("BLOCK_STATUS", offset, &error))?;
                return Ok(found.into_iter().map(|(len, presence)| Extent::new(len, flags_of(presence))).collect());
            }
            let found = self.0.volume.allocation(offset, len_bytes, max_extents).await;
            let found = found.map_err(|error| self.errno("BLOCK_STATUS", offset, &error))?;
            // "NBD_STATE_HOLE, bit 0 [...] NBD_STATE_ZERO, bit 1"
            Ok(found.into_iter().map(|(len, is_hole)| Extent::new(len, if is_hole { 3 } else { 0 })).collect())
        })
    }

    fn try_read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), NbdErrno>> {
        let done = self.0.volume.try_read_now(offset, buf)?;
        Some(done.map_err(|error| self.errno("READ", offset, &error)))
    }

    fn write_here(&self, offset: u64, data: &[u8], fua: bool) -> Option<Result<(), NbdErrno>> {
        let done = self.0.volume.write_here(offset, data, fua)?;
        Some(done.map_err(|error| self.errno("WRITE", offset, &error)))
    }

    fn read_here(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), NbdErrno>> {
        let done = self.0.volume.read_here(offset, buf)?;
        Some(done.map_err(|error| self.errno("READ", offset, &error)))
    }

    fn read_into(&self, offset: u64, len_bytes: u32, pipe: &mut Pipe) -> Option<()> {
        self.0.volume.read_into(offset, len_bytes, pipe)
    }

    fn takes_pipes(&self) -> bool {
        self.0.volume.takes_pipes()
    }

    fn write_from(&self, offset: u64, pipe: &mut Pipe, len_bytes: usize) -> Option<Result<(), NbdErrno>> {
        let done = self.0.volume.write_from(offset, pipe, len_bytes)?;
        Some(done.map_err(|error| self.errno("WRITE", offset, &error)))
    }

    fn flush_here(&self) -> Option<Result<(), NbdErrno>> {
        Some(self.0.volume.flush_here()?.map_err(|error| self.errno("FLUSH", 0, &error)))
    }
}

impl VolumeExport {
    fn errno(&self, command: &str, offset: u64, error: &VolumeError) -> NbdErrno {
        let errno = match error {
            VolumeError::NotOwner { .. } | VolumeError::ReadOnly { .. } => NbdErrno::Perm,
            error if error.is_no_space() => NbdErrno::NoSpc,
            VolumeError::ShuttingDown => NbdErrno::Shutdown,
            _ => NbdErrno::Io,
        };
        tracing::warn!(volume = %self.0.volume.name(), command, offset, %error, ?errno, "a client's request failed");
        errno
    }
}
