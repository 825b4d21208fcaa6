//! The site's two databases, held longer than by anybody who uses them. RocksDB has to be closed before the process
//! begins to end: a thread that still closes or uses it then meets statics that are destroyed already, and aborts.
//! Must not know what is in them.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::store::{State, Store};

/// How long threads may take to end what they are at. Only a prewarm, or a page that is being hashed, takes longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module. Empty until the databases are opened.
#[derive(Default)]
pub(super) struct Databases(OnceLock<Held>);

struct Held {
    store: Arc<dyn Store>,
    state: Arc<dyn State>,
}

impl Databases {
    /// Holds them from now on.
    pub(super) fn hold(&self, store: &Arc<dyn Store>, state: &Arc<dyn State>) {
        let _ = self.0.set(Held { store: Arc::clone(store), state: Arc::clone(state) });
    }

    /// Waits until nobody else has them, and closes them on this thread. The runtime is gone by now, so nobody takes them
    /// anew. Returns whether that was so.
    pub(super) fn close(self) -> bool {
        let Some(Held { store, state }) = self.0.into_inner() else { return true };
        let begun = Instant::now();
        while Arc::strong_count(&store) > 1 || Arc::strong_count(&state) > 1 {
            if begun.elapsed() > PATIENCE {
                std::mem::forget((store, state));
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}
