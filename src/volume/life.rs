//! Whether a volume still lives at this site, and what is under way that must end before its file is somebody else's.
//! Must not know files or rows.
//!
//! A volume that was given up is still held: by clients, by a flush, by the background copy, by blocks on their way into the file.
//! Its name, its file's path, or its device may belong to another volume a moment later. So nobody is relied on to let go: each thing
//! that changes file or rows asks here first, and is counted until it has ended.
//!
//! - Guests' writes are admitted by the [`WriteGate`] of the volume, which [`super::Volume::close`] seals. They count there until their bytes,
//!   their residency and their notes are written, wherever that happens; their client may be gone long before.
//! - Everything else (a landing, a checkpoint, a row) does [`Life::enter`], and keeps the pass until it has ended. That is the same
//!   counter, a second one.
//!
//! The race that this decides: a landing asks, and the volume is closed before it has written. Asking adds to the counter and looks whether it
//! is closed in *one* atomic step, and so does closing. Either the landing comes first: then [`super::Volume::closed`], which looks at the
//! counter after closing, sees it and waits. Or closing comes first: then the landing is refused. There is no third order. `enter` never waits, so it
//! may be called with or without any lock (stripes, residency, the journal's turn) held; `closed` holds none while it waits.
//!
//! The two are closed one after the other, and waited for one after the other. A write that was admitted before may thus find its
//! row refused: it is answered with an error. What has a pass may not wait for something that needs another, or for the WAN:
//! a write that waits for a block of the peer is admitted, not entered, and is woken by [`Life::ended`] with an error.
//!
//! Reads change nothing and are not counted; they look at [`Life::check`] *after* they have read. Bytes that were read once the file was
//! somebody else's were read after the closing, and the look sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::VolumeError;
use super::gate::{Admitted, WriteGate};
use crate::core::ids::Name;

/// See the module.
#[derive(Debug)]
pub(super) struct Life {
    volume: Name,
    /// Next to nothing to look at: reads do.
    is_closed: AtomicBool,
    gate: Arc<WriteGate>,
    ended: CancellationToken,
}

/// The right to change file or rows. The volume's end waits for it.
#[derive(Debug)]
pub(super) struct Pass {
    _admitted: Admitted,
}

impl Life {
    pub(super) fn new(volume: Name) -> Arc<Life> {
        Arc::new(Life {
            volume,
            is_closed: AtomicBool::new(false),
            gate: Arc::new(WriteGate::new(true)),
            ended: CancellationToken::new(),
        })
    }

    /// Begins something that changes file or rows.
    pub(super) fn enter(&self) -> Result<Pass, VolumeError> {
        let admitted = self.gate.admit().ok_or_else(|| self.is_over())?;
        Ok(Pass { _admitted: admitted })
    }

    /// An error if it is over.
    #[inline]
    pub(super) fn check(&self) -> Result<(), VolumeError> {
        if self.is_closed() { Err(self.is_over()) } else { Ok(()) }
    }

    #[inline]
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// What whoever comes too late is told.
    pub(super) fn is_over(&self) -> VolumeError {
        VolumeError::Closed { volume: self.volume.clone() }
    }

    /// The name, for messages.
    pub(super) fn volume(&self) -> &Name {
        &self.volume
    }

    /// Lets nothing more begin, guests' writes included, and wakes who waits for what will not come.
    pub(super) fn close(&self, writes: &WriteGate) {
        self.is_closed.store(true, Ordering::Release);
        writes.seal();
        self.gate.seal();
        // Last: who is woken by it finds both shut.
        self.ended.cancel();
    }

    /// Returns when it is over: at once if it is.
    pub(super) fn ended(&self) -> WaitForCancellationFutureOwned {
        self.ended.clone().cancelled_owned()
    }

    /// Returns when everything has ended that had begun.
    pub(super) async fn drained(&self) {
        self.gate.drained().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_has_begun_is_waited_for_and_nothing_begins_afterwards() {
        let life = Life::new("vm".parse().expect("a name"));
        let pass = life.enter().expect("alive");
        let ended = life.ended();
        tokio::pin!(ended);
        assert!(futures::poll!(ended.as_mut()).is_pending());
        life.close(&WriteGate::new(true));
        ended.await;
        let error = life.enter().expect_err("over");
        assert_eq!(error.to_string(), "volume vm was given up here");
        assert!(life.check().is_err());
        let drained = life.drained();
        tokio::pin!(drained);
        assert!(futures::poll!(drained.as_mut()).is_pending());
        drop(pass);
        drained.await;
        life.close(&WriteGate::new(true));
        life.ended().await;
    }
}
