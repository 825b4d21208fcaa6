//! Whether a guest has written to a volume since its relocation began: what forbids to give it back unasked. Must not know the
//! file.
//!
//! Said is what was *acknowledged*. A write that failed (no room, refused, the volume fenced meanwhile) is no write. Therefore the note is made when
//! a write has succeeded and before anybody is told so:
//!
//! - Acknowledged means noted, durably: after a crash nobody takes the volume for unwritten. A write that is in the file and not
//!   noted was never acknowledged, and may be lost like any such.
//! - A failed write has noted nothing, so there is nothing to take back, whatever others do at the same time.
//! - The write counts as admitted until it is noted: who fences the volume and looks then sees all there is to see.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::seeded_bugs::{Bug, is_planted};

/// See the module.
#[derive(Debug)]
pub(super) struct GuestNote {
    /// A write was acknowledged, in this life of the process or an earlier one.
    has_written: AtomicBool,
    /// The journal says so, or need not.
    is_noted: AtomicBool,
    /// One writes the note; the others wait for it: their writes may not be acknowledged earlier.
    turn: Mutex<()>,
    written_bytes: AtomicU64,
}

impl GuestNote {
    /// As a volume is found: `has_written` says the journal; `written_bytes` is what is known of how much. `is_needed` is false where
    /// nobody will ask.
    pub(super) fn new(has_written: bool, written_bytes: u64, is_needed: bool) -> GuestNote {
        GuestNote {
            has_written: AtomicBool::new(has_written),
            is_noted: AtomicBool::new(has_written || !is_needed),
            turn: Mutex::new(()),
            written_bytes: AtomicU64::new(if has_written { written_bytes } else { 0 }),
        }
    }

    /// Whether a guest's write was acknowledged.
    pub(super) fn has_written(&self) -> bool {
        self.has_written.load(Ordering::Acquire)
    }

    /// How much was acknowledged.
    pub(super) fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }

    /// Whether the next [`GuestNote::acknowledge`] takes no time.
    #[inline]
    pub(super) fn is_noted(&self) -> bool {
        self.is_noted.load(Ordering::Acquire)
    }

    /// A write is admitted: nothing is said of it yet.
    pub(super) fn admitted(&self) {
        if is_planted(Bug::RefusedWriteCounts) {
            self.has_written.store(true, Ordering::Release);
        }
    }

    /// A write of so many bytes has succeeded and will be acknowledged if this succeeds; `note` makes it durable that there was one.
    #[inline]
    pub(super) fn acknowledge<E>(&self, len_bytes: u64, note: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        if !self.is_noted() {
            let _turn = self.turn.lock();
            if !self.is_noted() {
                note()?;
                self.is_noted.store(true, Ordering::Release);
            }
        }
        // Most writes are not the first: a look is cheaper than a store that others' caches hear of.
        if !self.has_written.load(Ordering::Relaxed) {
            self.has_written.store(true, Ordering::Release);
        }
        self.written_bytes.fetch_add(len_bytes, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_write_that_failed_leaves_nothing() {
        let note = GuestNote::new(false, 0, true);
        note.admitted();
        assert!(!note.has_written() && !note.is_noted());
        // It was written and could not be noted: it is not acknowledged, and so it does not count.
        note.acknowledge(512, || Err("no room")).expect_err("not noted");
        assert!(!note.has_written() && !note.is_noted());
        assert_eq!(note.written_bytes(), 0);
        note.acknowledge(512, || Ok::<(), &str>(())).expect("noted");
        note.acknowledge(4096, || Err("asked again")).expect("is noted already");
        assert!(note.has_written() && note.is_noted());
        assert_eq!(note.written_bytes(), 4608);
    }

    #[test]
    fn nobody_is_acknowledged_before_the_note_is_durable() {
        for failures in [0, 1, 3, 8] {
            let note = GuestNote::new(false, 0, true);
            let (asked, is_durable) = (AtomicUsize::new(0), AtomicBool::new(false));
            let acknowledged = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        let done = note.acknowledge(1, || {
                            if asked.fetch_add(1, Ordering::SeqCst) < failures {
                                return Err(());
                            }
                            std::thread::yield_now();
                            is_durable.store(true, Ordering::SeqCst);
                            Ok(())
                        });
                        if done.is_ok() {
                            assert!(is_durable.load(Ordering::SeqCst), "acknowledged and not noted");
                            acknowledged.fetch_add(1, Ordering::SeqCst);
                        }
                    });
                }
            });
            let acknowledged = acknowledged.into_inner();
            assert_eq!(acknowledged, 8 - failures);
            assert_eq!(note.has_written(), acknowledged > 0);
            assert_eq!(note.written_bytes(), acknowledged as u64);
            assert!(asked.into_inner() <= failures + 1, "noted once");
        }
    }

    #[test]
    fn what_was_noted_earlier_is_remembered() {
        let note = GuestNote::new(true, 65536, true);
        assert!(note.has_written() && note.is_noted());
        assert_eq!(note.written_bytes(), 65536);
        // A volume of which nobody will ask notes nothing.
        let source = GuestNote::new(false, 0, false);
        assert!(!source.has_written() && source.is_noted());
    }
}
