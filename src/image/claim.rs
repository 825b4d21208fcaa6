//! What this process holds for writing, whatever path or device node leads there. Must not know other processes: they are kept away by
//! locks and O_EXCL.

use std::collections::HashSet;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::LazyLock;

use parking_lot::Mutex;

/// A device by its number, a file by its device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Thing {
    Device(u64),
    File(u64, u64),
}

static HELD: LazyLock<Mutex<HashSet<Thing>>> = LazyLock::new(Mutex::default);

/// Holds a thing until it is dropped.
#[derive(Debug)]
pub(super) struct Claim(Thing);

impl Claim {
    /// None if it is held already.
    pub(super) fn take(meta: &Metadata) -> Option<Claim> {
        let thing = match meta.file_type().is_block_device() {
            true => Thing::Device(meta.rdev()),
            false => Thing::File(meta.dev(), meta.ino()),
        };
        // A claim is made only where it holds: dropping another would take it from its holder.
        if HELD.lock().insert(thing) { Some(Claim(thing)) } else { None }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        HELD.lock().remove(&self.0);
    }
}
