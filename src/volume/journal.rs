//! A volume's residency on disk: rows in the state database. Must not know the file.
//!
//! Keys: `res/<volume>/c/<chunk, big-endian u64>` (a durable row of [`Residency`]), `res/<volume>/guest` (there once a guest has
//! written), and `res/<volume>/live/<boot id>/<chunk>`: rows that were written, but not synced, before a guest's write was
//! acknowledged. If the daemon is killed, the kernel still has these rows and the bytes that they speak of; after a power loss it has
//! neither for certain, so they are believed only under the boot that wrote them.

use std::sync::Arc;

use parking_lot::Mutex;

use super::VolumeError;
use super::disk::Disk;
use crate::core::ids::Name;
use crate::core::residency::Residency;
use crate::seeded_bugs::{Bug, is_planted};
use crate::store::{State, StateBatch, StateError};

#[derive(Clone)]
pub(super) struct Journal {
    state: Arc<dyn State>,
    volume: Name,
    /// Which boot of the machine this is, where the kernel tells.
    boot: Option<Arc<str>>,
    /// Held while a row is noted.
    live_turn: Arc<Mutex<Live>>,
}

/// Whether rows that are not synced may be believed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Live {
    #[default]
    Noted,
    /// No more, but what is there could not be dropped yet.
    Stopping,
    /// Nothing is noted any more, and nothing is there.
    Stopped,
}

impl Journal {
    pub(super) fn new(state: Arc<dyn State>, volume: Name) -> Journal {
        let boot = state.boot().filter(|_| !is_planted(Bug::UnsyncedRowsBelievedAfterPowerLoss));
        let boot = boot.or_else(|| is_planted(Bug::UnsyncedRowsBelievedAfterPowerLoss).then(|| "any".into()));
        Journal { boot, state, volume, live_turn: Arc::default() }
    }

    /// A guest's write to these blocks is in the file: notes it where it changed their residency, or fell on residency that is not
    /// noted yet. Called before the write is acknowledged.
    pub(super) fn note_live(&self, disk: &Disk, blocks: std::ops::Range<u64>) -> Result<(), StateError> {
        let Some(boot) = self.boot.as_ref().filter(|_| !is_planted(Bug::UnsyncedRowsSkipped)) else { return Ok(()) };
        // One at a time: who finds nothing to note relies on the row of another being written, not on its way.
        let mut live = self.live_turn.lock();
        if *live != Live::Noted {
            return self.stop(&mut live);
        }
        let chunks = disk.residency().take_unnoted(blocks);
        if chunks.is_empty() {
            return Ok(());
        }
        let mut batch = StateBatch::default();
        for chunk in &chunks {
            let row = disk.residency().chunk_row(*chunk);
            batch.put([self.key(&format!("live/{boot}/")), chunk.to_be_bytes().to_vec()].concat(), row);
        }
        let written = self.state.write_batch(batch, false);
        if written.is_err() {
            disk.residency().mark_unnoted(chunks);
        }
        written
    }

    /// Makes rows durable. The caller has synced the data that they speak of.
    pub(super) fn write(&self, rows: &[(u64, Vec<u8>)]) -> Result<(), StateError> {
        if rows.is_empty() {
            return Ok(());
        }
        let mut batch = StateBatch::default();
        for (chunk, row) in rows {
            batch.put([self.key("c/"), chunk.to_be_bytes().to_vec()].concat(), row.clone());
        }
        self.state.write_batch(batch, true)
    }

    /// Makes durable that a guest writes here, before it does. Residency alone does not tell: a write to a block that was
    /// fetched leaves no row behind.
    pub(super) fn note_guest(&self) -> Result<(), StateError> {
        let mut batch = StateBatch::default();
        batch.put(self.key("guest"), b"1".to_vec());
        self.state.write_batch(batch, true)
    }

    /// Reads everything back; whether a guest had written. A row that makes no sense is an error: the volume is not served
    /// by guessing.
    ///
    /// `is_file_synced`: the file was synced just now, without an error. If it was not, what the unsynced rows speak of may be gone.
    pub(super) fn restore(&self, residency: &mut Residency, is_file_synced: bool) -> Result<bool, VolumeError> {
        self.restore_rows(&self.key("c/"), residency)?;
        if !is_file_synced {
            self.forget_live()?;
        } else if let Some(boot) = &self.boot {
            let live = self.restore_rows(&self.key(&format!("live/{boot}/")), residency)?;
            // The bytes are in the page cache, perhaps nowhere else: the next checkpoint makes both durable.
            residency.mark_dirty(live);
        }
        Ok(self.state.get(&self.key("guest"))?.is_some())
    }

    fn restore_rows(&self, prefix: &[u8], residency: &mut Residency) -> Result<Vec<u64>, VolumeError> {
        let mut chunks = Vec::new();
        let mut damage = None;
        self.state.scan(prefix, &mut |key, row| {
            let chunk = key.get(prefix.len()..).and_then(|chunk| chunk.try_into().ok()).map(u64::from_be_bytes);
            let restored = match chunk {
                Some(chunk) => residency.restore_chunk(chunk, row).map_err(|error| error.to_string()),
                None => Err("a key of the wrong length".into()),
            };
            chunks.extend(chunk);
            damage = restored.err();
            damage.is_none()
        })?;
        match damage {
            None => Ok(chunks),
            Some(why) => Err(VolumeError::Observer {
                volume: self.volume.clone(),
                why: format!("its residency in the state database is damaged: {why}; restore the state database"),
            }),
        }
    }

    /// As [`Journal::forget_live`], and nothing more is noted until a restart. If it fails it is to be asked for again, as the same
    /// trouble may have befallen file and database: a restart must not find the rows.
    pub(super) fn stop_live(&self) -> Result<(), StateError> {
        self.stop(&mut self.live_turn.lock())
    }

    /// Whether [`Journal::stop_live`] was asked for and has not succeeded yet. Waits for nobody: whoever has the turn sees to it.
    pub(super) fn is_stopping(&self) -> bool {
        self.live_turn.try_lock().is_some_and(|live| *live == Live::Stopping)
    }

    fn stop(&self, live: &mut Live) -> Result<(), StateError> {
        if *live != Live::Stopped {
            *live = Live::Stopping;
            self.forget_live()?;
            *live = Live::Stopped;
        }
        Ok(())
    }

    /// The disk failed to sync: the kernel may have dropped bytes that unsynced rows speak of, under this very boot.
    pub(super) fn forget_live(&self) -> Result<(), StateError> {
        let mut batch = StateBatch::default();
        batch.delete_prefix(self.key("live/"));
        // Not synced: under another boot they are not believed anyway, and a database that cannot sync may still write.
        self.state.write_batch(batch, false)
    }

    /// Nothing is known of this volume any more, durably.
    pub(super) fn forget(&self) -> Result<(), StateError> {
        let mut batch = StateBatch::default();
        batch.delete_prefix(self.key(""));
        self.state.write_batch(batch, true)
    }

    fn key(&self, what: &str) -> Vec<u8> {
        format!("res/{}/{what}", self.volume).into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::BlockIndex;
    use crate::core::manifest::Geometry;
    use crate::image::Image;
    use crate::store::MemoryState;

    #[test]
    fn what_was_not_synced_is_believed_under_the_same_boot_only() {
        let dir = tempfile::tempdir().expect("a folder");
        let geometry = Geometry::new(4 << 16, 1 << 16).expect("a geometry");
        let image = Arc::new(
            Image::create(&dir.path().join("d"), 4 << 16, crate::image::Overwrite::OnlyBlank).expect("creates"),
        );
        let disk = Disk::new(image, Residency::new(geometry), geometry, false);
        let state: Arc<dyn State> = Arc::new(MemoryState::new());
        let mut journal = Journal::new(Arc::clone(&state), "vm".parse().expect("a name"));
        journal.boot = Some("first".into());
        disk.write(BlockIndex(1), 512, &[7; 512]).expect("writes");
        disk.write(BlockIndex(2), 0, &[7; 1 << 16]).expect("writes");
        journal.note_live(&disk, 1..3).expect("notes");
        disk.write(BlockIndex(1), 1024, &[7; 512]).expect("writes");
        journal.note_live(&disk, 1..2).expect("notes");
        let restored = |journal: &Journal| {
            let mut residency = Residency::new(geometry);
            journal.restore(&mut residency, true).expect("restores");
            let valid = residency.mask(BlockIndex(1)).map(|mask| format!("{:?}", mask.valid(1 << 16)));
            (valid, residency.bits().is_resident(BlockIndex(2)), residency.is_dirty())
        };
        assert_eq!(restored(&journal), (Some("[512..1536]".to_owned()), true, true));
        journal.boot = Some("second".into());
        assert_eq!(restored(&journal), (None, false, false));
        journal.boot = Some("first".into());
        let mut residency = Residency::new(geometry);
        journal.restore(&mut residency, false).expect("restores");
        assert!(!residency.bits().is_resident(BlockIndex(2)), "a file that could not be synced");
        assert_eq!(restored(&journal), (None, false, false), "nor later");
    }

    #[test]
    fn rows_that_could_not_be_dropped_are_dropped_with_the_next_write() {
        let dir = tempfile::tempdir().expect("a folder");
        let geometry = Geometry::new(4 << 16, 1 << 16).expect("a geometry");
        let image = Arc::new(
            Image::create(&dir.path().join("d"), 4 << 16, crate::image::Overwrite::OnlyBlank).expect("creates"),
        );
        let disk = Disk::new(image, Residency::new(geometry), geometry, false);
        let state = Arc::new(MemoryState::new());
        let journal = Journal::new(Arc::clone(&state) as Arc<dyn State>, "vm".parse().expect("a name"));
        disk.write(BlockIndex(1), 0, &[7; 1 << 16]).expect("writes");
        journal.note_live(&disk, 1..2).expect("notes");
        state.fail_with(Some("no room"));
        journal.stop_live().expect_err("the database fails as the file does");
        assert!(journal.is_stopping());
        journal.note_live(&disk, 1..2).expect_err("nothing is acknowledged that a restart would forget in part");
        state.fail_with(None);
        journal.note_live(&disk, 1..2).expect("drops");
        assert!(!journal.is_stopping());
        let mut residency = Residency::new(geometry);
        journal.restore(&mut residency, true).expect("restores");
        assert!(!residency.bits().is_resident(BlockIndex(1)));
    }
}
