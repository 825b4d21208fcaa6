//! A volume's residency on disk: rows in the state database. Must not know the file.
//!
//! Keys: `res/<incarnation>/c/<chunk, big-endian u64>` (a durable row of [`Residency`]), `res/<incarnation>/guest` (there once a guest's
//! write was acknowledged), and `res/<incarnation>/live/<boot id>/<chunk>`: rows that were written, but not synced, before a guest's write was
//! acknowledged. If the daemon is killed, the kernel still has these rows and the bytes that they speak of; after a power loss it has
//! neither for certain, so they are believed only under the boot that wrote them.
//!
//! The incarnation is drawn anew for each relocation. A name comes again, and who still holds a volume that is gone (a client's flush, a
//! checkpoint that takes long) would write rows under it that the next one believes. Versions before that had `res/<name>/...`:
//! [`adopt_named`] takes those over, [`forget_strangers`] drops whatever belongs to nobody.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

use super::VolumeError;
use super::disk::Disk;
use super::life::Life;
use crate::core::ids::{Incarnation, Name};
use crate::core::residency::Residency;
use crate::seeded_bugs::{Bug, is_planted};
use crate::store::{State, StateBatch, StateError};

#[derive(Clone)]
pub(super) struct Journal {
    state: Arc<dyn State>,
    /// `res/<incarnation>/`.
    prefix: Arc<str>,
    life: Arc<Life>,
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
    pub(super) fn new(state: Arc<dyn State>, incarnation: Incarnation, life: Arc<Life>) -> Journal {
        let boot = state.boot().filter(|_| !is_planted(Bug::UnsyncedRowsBelievedAfterPowerLoss));
        let boot = boot.or_else(|| is_planted(Bug::UnsyncedRowsBelievedAfterPowerLoss).then(|| "any".into()));
        let prefix = if is_planted(Bug::RowsByName) { named(life.volume()) } else { of(incarnation) };
        Journal { boot, state, prefix: prefix.into(), life, live_turn: Arc::default() }
    }

    pub(super) fn life(&self) -> &Arc<Life> {
        &self.life
    }

    /// A guest's write to these blocks is in the file: notes it where it changed their residency, or fell on residency that is not
    /// noted yet. Called before the write is acknowledged.
    pub(super) fn note_live(&self, disk: &Disk, blocks: std::ops::Range<u64>) -> Result<(), VolumeError> {
        let _pass = self.life.enter()?;
        let Some(boot) = self.boot.as_ref().filter(|_| !is_planted(Bug::UnsyncedRowsSkipped)) else { return Ok(()) };
        // One at a time: who finds nothing to note relies on the row of another being written, not on its way.
        let mut live = self.live_turn.lock();
        if *live != Live::Noted {
            return Ok(self.stop(&mut live)?);
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
        Ok(written?)
    }

    /// Makes rows durable. The caller has synced the data that they speak of.
    pub(super) fn write(&self, rows: &[(u64, Vec<u8>)]) -> Result<(), VolumeError> {
        let _pass = self.life.enter()?;
        if rows.is_empty() {
            return Ok(());
        }
        let mut batch = StateBatch::default();
        for (chunk, row) in rows {
            batch.put([self.key("c/"), chunk.to_be_bytes().to_vec()].concat(), row.clone());
        }
        Ok(self.state.write_batch(batch, true)?)
    }

    /// Makes durable that a guest wrote here, before its write is acknowledged (see [`super::guest_note`]). Residency alone does not tell: a write to a
    /// block that was fetched leaves no row behind.
    pub(super) fn note_guest(&self) -> Result<(), VolumeError> {
        let _pass = self.life.enter()?;
        let mut batch = StateBatch::default();
        batch.put(self.key("guest"), b"1".to_vec());
        Ok(self.state.write_batch(batch, true)?)
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
        self.is_guest_noted()
    }

    /// Whether a guest's write was ever acknowledged.
    pub(super) fn is_guest_noted(&self) -> Result<bool, VolumeError> {
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
                volume: self.life.volume().clone(),
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

    /// Of residency nothing is known any more, durably. That a guest wrote here stays noted.
    pub(super) fn forget_residency(&self) -> Result<(), StateError> {
        let mut batch = StateBatch::default();
        batch.delete_prefix(self.key("c/"));
        batch.delete_prefix(self.key("live/"));
        self.state.write_batch(batch, true)
    }

    fn key(&self, what: &str) -> Vec<u8> {
        format!("{}{what}", self.prefix).into_bytes()
    }
}

const ROWS: &str = "res/";

fn of(incarnation: Incarnation) -> String {
    format!("{ROWS}{incarnation}/")
}

/// As versions before incarnations had it.
fn named(volume: &Name) -> String {
    format!("{ROWS}{volume}/")
}

/// Deletes what is kept of volumes that none of `known` is: of some that are gone, and by names, as earlier versions did. To be called at
/// a start, when all records have been read and rows by name that are still of use have been adopted ([`adopt_named`]). Returns
/// how many volumes that were.
pub fn forget_strangers(state: &dyn State, known: &[Incarnation]) -> Result<usize, StateError> {
    let known: BTreeSet<Vec<u8>> = known.iter().map(|incarnation| of(*incarnation).into_bytes()).collect();
    let mut strangers: BTreeSet<Vec<u8>> = BTreeSet::new();
    state.scan(ROWS.as_bytes(), &mut |key, _| {
        // To the second slash. A key without one is nobody's.
        let end =
            key.iter().skip(ROWS.len()).position(|byte| *byte == b'/').map_or(key.len(), |at| ROWS.len() + at + 1);
        if !known.contains(&key[..end]) {
            strangers.insert(key[..end].to_vec());
        }
        true
    })?;
    if strangers.is_empty() {
        return Ok(0);
    }
    let count = strangers.len();
    let mut batch = StateBatch::default();
    for stranger in strangers {
        if stranger.ends_with(b"/") { batch.delete_prefix(stranger) } else { batch.delete(stranger) }
    }
    state.write_batch(batch, true)?;
    Ok(count)
}

/// Whether a guest's write was ever acknowledged, of a volume whose image cannot be opened.
pub fn was_written(state: &dyn State, incarnation: Incarnation) -> Result<bool, StateError> {
    Ok(state.get(format!("{}guest", of(incarnation)).as_bytes())?.is_some())
}

/// Takes over the rows that an earlier version kept under the volume's name, durably; how many there were. Together with the record that
/// gets its incarnation: before that is written, and again if it comes to nothing.
pub fn adopt_named(state: &dyn State, volume: &Name, incarnation: Incarnation) -> Result<usize, StateError> {
    let (from, to) = (named(volume), of(incarnation));
    let rows = state.scan_prefix(from.as_bytes())?;
    if rows.is_empty() {
        return Ok(0);
    }
    let count = rows.len();
    let mut batch = StateBatch::default();
    for (key, row) in rows {
        batch.put([to.as_bytes(), key.get(from.len()..).unwrap_or_default()].concat(), row);
    }
    batch.delete_prefix(from.into_bytes());
    state.write_batch(batch, true)?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::BlockIndex;
    use crate::core::manifest::Geometry;
    use crate::image::Image;
    use crate::store::MemoryState;

    const INCARNATION: Incarnation = Incarnation([7; 16]);

    fn life() -> Arc<Life> {
        Life::new("vm".parse().expect("a name"))
    }

    #[test]
    fn what_was_not_synced_is_believed_under_the_same_boot_only() {
        let dir = tempfile::tempdir().expect("a folder");
        let geometry = Geometry::new(4 << 16, 1 << 16).expect("a geometry");
        let image = Arc::new(
            Image::create(&dir.path().join("d"), 4 << 16, crate::image::Overwrite::OnlyBlank).expect("creates"),
        );
        let life = life();
        let disk = Disk::new(image, Residency::new(geometry), geometry, Arc::clone(&life), false);
        let state: Arc<dyn State> = Arc::new(MemoryState::new());
        let mut journal = Journal::new(Arc::clone(&state), INCARNATION, life);
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
        let life = life();
        let disk = Disk::new(image, Residency::new(geometry), geometry, Arc::clone(&life), false);
        let state = Arc::new(MemoryState::new());
        let journal = Journal::new(Arc::clone(&state) as Arc<dyn State>, INCARNATION, life);
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

    #[test]
    fn rows_of_nobody_go_and_all_others_stay() {
        let state = MemoryState::new();
        let (known, gone) = (Incarnation([1; 16]), Incarnation([0x10; 16]));
        let keys = |state: &MemoryState| -> Vec<Vec<u8>> {
            state.scan_prefix(b"").expect("scans").into_iter().map(|(key, _)| key).collect()
        };
        let mine = [
            format!("res/{known}/c/12345678"),
            format!("res/{known}/guest"),
            format!("res/{known}/live/boot/12345678"),
        ];
        let theirs = [
            format!("res/{gone}/c/12345678"),
            format!("res/{gone}/guest"),
            "res/vm/c/12345678".to_owned(),
            "res/vm/guest".to_owned(),
            format!("res/{known}x/guest"),
            format!("res/{known}"),
        ];
        for key in mine.iter().chain(&theirs).map(String::as_str).chain(["vol/vm", "resx"]) {
            state.put(key.as_bytes(), b"row").expect("writes");
        }
        assert_eq!(forget_strangers(&state, &[known]).expect("forgets"), 4);
        let mut expected: Vec<Vec<u8>> = mine.iter().map(|key| key.clone().into_bytes()).collect();
        expected.extend([b"resx".to_vec(), b"vol/vm".to_vec()]);
        assert_eq!(keys(&state), expected);
        assert_eq!(forget_strangers(&state, &[known]).expect("forgets"), 0);
        assert_eq!(forget_strangers(&state, &[]).expect("forgets"), 1);
        assert_eq!(keys(&state).len(), 2);
    }

    #[test]
    fn rows_by_name_are_taken_over() {
        let dir = tempfile::tempdir().expect("a folder");
        let geometry = Geometry::new(4 << 16, 1 << 16).expect("a geometry");
        let image = Arc::new(
            Image::create(&dir.path().join("d"), 4 << 16, crate::image::Overwrite::OnlyBlank).expect("creates"),
        );
        let disk = Disk::new(image, Residency::new(geometry), geometry, life(), false);
        disk.write(BlockIndex(1), 0, &[7; 1 << 16]).expect("writes");
        let state: Arc<dyn State> = Arc::new(MemoryState::new());
        let row = disk.residency().chunk_row(0);
        state.put(&[b"res/vm/c/".as_slice(), &0u64.to_be_bytes()].concat(), &row).expect("writes");
        state.put(b"res/vm/guest", b"1").expect("writes");
        state.put(b"res/vm2/guest", b"1").expect("writes");
        assert_eq!(adopt_named(&*state, &"vm".parse().expect("a name"), INCARNATION).expect("takes over"), 2);
        assert_eq!(adopt_named(&*state, &"vm".parse().expect("a name"), INCARNATION).expect("again"), 0);
        let journal = Journal::new(Arc::clone(&state), INCARNATION, life());
        let mut residency = Residency::new(geometry);
        assert!(journal.restore(&mut residency, true).expect("restores"));
        assert!(residency.bits().is_resident(BlockIndex(1)));
        assert!(state.get(b"res/vm2/guest").expect("reads").is_some());
    }

    /// Rows as `docs/formats.md` shows them: their keys and values, byte for byte.
    #[test]
    fn rows_are_what_the_document_says() {
        let dir = tempfile::tempdir().expect("a folder");
        let geometry = Geometry::new(4 << 16, 1 << 16).expect("a geometry");
        let image = Arc::new(
            Image::create(&dir.path().join("d"), 4 << 16, crate::image::Overwrite::OnlyBlank).expect("creates"),
        );
        let life = life();
        let disk = Disk::new(image, Residency::new(geometry), geometry, Arc::clone(&life), false);
        disk.write(BlockIndex(1), 0, &[7; 1 << 16]).expect("writes");
        let state: Arc<dyn State> = Arc::new(MemoryState::new());
        let mut journal = Journal::new(Arc::clone(&state), INCARNATION, life);
        journal.boot = Some("6b2a4b2e-1f0d-4c8e-9a53-0d5f8a3c7e11".into());
        let check = |name: &str| {
            let (key, value) = state.scan_prefix(b"").expect("scans").pop().expect("one row");
            let line = format!("\n| {name} | `{}` | `{}` |\n", key.escape_ascii(), hex::encode(value));
            assert!(include_str!("../../docs/formats.md").contains(&line), "docs/formats.md has no row {line}");
            let mut batch = StateBatch::default();
            batch.delete(key);
            state.write_batch(batch, true).expect("deletes");
        };
        journal.note_live(&disk, 1..2).expect("notes");
        check("chunk, not synced");
        journal.write(&disk.residency().take_dirty()).expect("writes");
        check("chunk");
        journal.note_guest().expect("notes");
        check("a guest wrote");
    }

    #[test]
    fn a_volume_that_is_over_writes_no_rows() {
        let dir = tempfile::tempdir().expect("a folder");
        let geometry = Geometry::new(4 << 16, 1 << 16).expect("a geometry");
        let image = Arc::new(
            Image::create(&dir.path().join("d"), 4 << 16, crate::image::Overwrite::OnlyBlank).expect("creates"),
        );
        let life = life();
        let disk = Disk::new(image, Residency::new(geometry), geometry, Arc::clone(&life), false);
        disk.write(BlockIndex(1), 0, &[7; 1 << 16]).expect("writes");
        let state: Arc<dyn State> = Arc::new(MemoryState::new());
        let journal = Journal::new(Arc::clone(&state), INCARNATION, Arc::clone(&life));
        let rows = disk.residency().take_dirty();
        life.close(&crate::volume::gate::WriteGate::new(true));
        journal.note_live(&disk, 1..2).expect_err("over");
        journal.note_guest().expect_err("over");
        journal.write(&rows).expect_err("over");
        assert!(state.scan_prefix(b"").expect("scans").is_empty());
    }
}
