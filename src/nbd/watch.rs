//! Relieves connections whose thread hangs in a request (see [`super::connection`]). Must not know what hangs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::connection::Connection;
use super::socket::DetachedSocket;

/// A request that takes longer than this has its connection go on on another thread. Longer than what a busy machine makes a
/// thread wait for its turn now and then, shorter than what a guest notices.
const HANGS_AFTER: Duration = Duration::from_millis(15);

/// How often the watch looks while there is something to see.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// After so many looks at nothing the watch sleeps until it is woken.
const LOOKS_BEFORE_SLEEP: u32 = 20;

/// Starts a thread that drives a connection, given its number and its socket.
pub(super) type Relieve = dyn Fn(Arc<Connection>, u64, DetachedSocket) -> std::io::Result<()> + Send;

/// The watch over all connections of a server.
pub(super) struct Watch {
    begun: Instant,
    connections: Mutex<Vec<Weak<Connection>>>,
    is_asleep: AtomicBool,
    is_over: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

/// Ends the watch when it is dropped.
pub(super) struct OnWatch {
    pub(super) watch: Arc<Watch>,
    _thread: JoinHandle<()>,
}

impl Watch {
    /// Begins to watch; `relieve` is called for connections that hang.
    pub(super) fn start(relieve: Box<Relieve>) -> std::io::Result<OnWatch> {
        let watch = Arc::new(Watch {
            begun: Instant::now(),
            connections: Mutex::default(),
            is_asleep: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            thread: Mutex::new(None),
        });
        let watching = Arc::clone(&watch);
        let thread = std::thread::Builder::new().name("nbd-watch".to_owned()).spawn(move || {
            crate::workers::run_soon();
            watching.run(&*relieve);
        })?;
        *watch.thread.lock() = Some(thread.thread().clone());
        Ok(OnWatch { watch, _thread: thread })
    }

    pub(super) fn add(&self, connection: &Arc<Connection>) {
        self.connections.lock().push(Arc::downgrade(connection));
    }

    /// The time, never 0. When a request has been noted to begin at it, [`Watch::wake`] is due.
    pub(super) fn now(&self) -> u64 {
        (self.begun.elapsed().as_nanos() as u64).max(1)
    }

    /// There is something to watch. Costs next to nothing while the watch is awake.
    pub(super) fn wake(&self) {
        // Pairs with `sleep`: whoever comes second of the two sees what the other has stored.
        if self.is_asleep.load(Ordering::SeqCst)
            && let Some(thread) = &*self.thread.lock()
        {
            thread.unpark();
        }
    }

    fn run(&self, relieve: &Relieve) {
        let mut idle_looks = 0;
        while !self.is_over.load(Ordering::SeqCst) {
            if self.look(relieve) {
                idle_looks = 0;
            } else {
                idle_looks += 1;
            }
            if idle_looks < LOOKS_BEFORE_SLEEP {
                std::thread::park_timeout(LOOK_EVERY);
            } else {
                self.sleep();
            }
        }
    }

    fn sleep(&self) {
        self.is_asleep.store(true, Ordering::SeqCst);
        let is_busy = self.connections.lock().iter().any(|known| known.upgrade().is_some_and(|c| c.busy_since() != 0));
        if !is_busy && !self.is_over.load(Ordering::SeqCst) {
            std::thread::park();
        }
        self.is_asleep.store(false, Ordering::SeqCst);
    }

    /// Relieves what hangs; whether any request was being run.
    fn look(&self, relieve: &Relieve) -> bool {
        let mut known = Vec::new();
        self.connections.lock().retain(|connection| {
            let connection = connection.upgrade();
            known.extend(connection.clone());
            connection.is_some()
        });
        let now = self.now();
        let mut is_busy = false;
        for connection in known {
            let since = connection.busy_since();
            is_busy |= since != 0;
            if since == 0 || now.saturating_sub(since) < HANGS_AFTER.as_nanos() as u64 {
                continue;
            }
            let start = |driver, twin| relieve(Arc::clone(&connection), driver, twin);
            match connection.relieve(since, start) {
                Ok(true) => tracing::debug!("a request hangs in the disk: its nbd client goes on on another thread"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "a request hangs in the disk, and with it its nbd client: no other thread");
                }
            }
        }
        is_busy
    }
}

impl Drop for OnWatch {
    fn drop(&mut self) {
        self.watch.is_over.store(true, Ordering::SeqCst);
        if let Some(thread) = &*self.watch.thread.lock() {
            thread.unpark();
        }
    }
}
