//! The server: listeners, the bounds on connections, shutdown. Must not know the protocol.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::budget::Budget;
use super::connection::Connection;
use super::handshake::{Shaken, shake_hands};
use super::listen::{ListenError, Listener, NbdAddr, NbdListen, NbdListener};
use super::socket::{DetachedSocket, Socket};
use super::transmission::Transmission;
use super::watch::{OnWatch, Watch};
use super::{Exports, NbdTls};

/// What clients may make a server hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdLimits {
    /// Connections in transmission; more are closed when they come.
    pub max_connections: usize,
    /// Connections in the handshake; when there are more, the oldest is closed, so that clients that never finish
    /// theirs keep out nobody.
    pub max_handshakes: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// Requests in flight on one connection; more stay in the socket.
    pub max_requests: usize,
    /// The most payload of requests in flight that one connection may hold, in bytes.
    pub connection_bytes: u64,
    /// The same for all connections together, in bytes; at least 64 MiB, so that the largest request fits beside
    /// others.
    pub total_bytes: u64,
    /// How long requests in flight may take at shutdown.
    pub shutdown_grace: Duration,
}

impl Default for NbdLimits {
    fn default() -> NbdLimits {
        NbdLimits {
            max_connections: 256,
            max_handshakes: 128,
            handshake_timeout: Duration::from_secs(20),
            max_requests: 256,
            connection_bytes: 64 << 20,
            total_bytes: 128 << 20,
            shutdown_grace: Duration::from_secs(20),
        }
    }
}

/// A running NBD server. Dropping it closes all connections at once; [`NbdServer::shutdown`] is the orderly end.
pub struct NbdServer {
    shared: Arc<Shared>,
    addrs: Vec<NbdAddr>,
    uris: Vec<String>,
}

struct Shared {
    exports: Arc<dyn Exports>,
    limits: NbdLimits,
    budget: Arc<Budget>,
    watch: OnWatch,
    /// Accept loops, handshakes and transmissions.
    tasks: TaskTracker,
    /// No new connections and requests.
    stop: CancellationToken,
    /// No waiting for requests in flight either.
    abort: CancellationToken,
    /// Handshakes under way, the oldest first.
    handshakes: Mutex<VecDeque<(u64, CancellationToken)>>,
    next_handshake: AtomicU64,
    connections: AtomicUsize,
}

impl NbdServer {
    /// As [`NbdServer::listen_with`], without TLS.
    pub async fn listen(
        listeners: &[NbdListen],
        exports: Arc<dyn Exports>,
        limits: NbdLimits,
    ) -> Result<NbdServer, ListenError> {
        let plain = |at: &NbdListen| NbdListener { at: at.clone(), tls: NbdTls::Off };
        let listeners: Vec<NbdListener> = listeners.iter().map(plain).collect();
        NbdServer::listen_with(&listeners, exports, limits).await
    }

    /// Listens on all of `listeners` or on none, and serves `exports` from then on, on the runtime that this is called
    /// in (handshakes) and on a thread for each client in transmission.
    pub async fn listen_with(
        listeners: &[NbdListener],
        exports: Arc<dyn Exports>,
        limits: NbdLimits,
    ) -> Result<NbdServer, ListenError> {
        if listeners.is_empty() {
            return Err(ListenError::NoAddress);
        }
        let mut open = Vec::with_capacity(listeners.len());
        for NbdListener { at, tls } in listeners {
            open.push((Listener::open(at).await?, tls.clone()));
        }
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        let relieve = {
            let abort = abort.clone();
            move |connection, driver, socket| drive(connection, driver, socket, abort.clone())
        };
        let shared = Arc::new(Shared {
            exports,
            watch: Watch::start(Box::new(relieve)).map_err(ListenError::NoThread)?,
            budget: Budget::new(limits.total_bytes.max(64 << 20), limits.connection_bytes),
            limits,
            tasks: TaskTracker::new(),
            stop,
            abort,
            handshakes: Mutex::new(VecDeque::new()),
            next_handshake: AtomicU64::new(0),
            connections: AtomicUsize::new(0),
        });
        let addrs: Vec<NbdAddr> = open.iter().map(|(listener, _)| listener.addr()).collect();
        let uris = addrs.iter().zip(listeners).map(|(addr, listener)| addr.uri(&listener.tls)).collect();
        for (listener, tls) in open {
            if let (NbdAddr::Tcp(addr), NbdTls::Off) = (listener.addr(), &tls)
                && !addr.ip().is_loopback()
            {
                tracing::warn!(
                    %addr,
                    "nbd is served without tls: whoever reaches this address can read and write every volume, and \
                     whoever is on the way can listen; set [nbd] tls = \"required\", or keep to the loopback"
                );
            }
            shared.tasks.spawn(accept(Arc::clone(&shared), listener, tls));
        }
        Ok(NbdServer { shared, addrs, uris })
    }

    /// Where it listens, in the order in which the listeners were given.
    pub fn local_addrs(&self) -> &[NbdAddr] {
        &self.addrs
    }

    /// The same as NBD URIs, up to the export's name; `nbds` where nothing is served without TLS.
    pub fn uris(&self) -> &[String] {
        &self.uris
    }

    /// How many clients are in transmission.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Stops accepting, answers what is in flight, closes all connections, removes the files of Unix sockets. Requests
    /// that take longer than [`NbdLimits::shutdown_grace`] are dropped; returns whether there were none.
    pub async fn shutdown(self) -> bool {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        let orderly = tokio::time::timeout(self.shared.limits.shutdown_grace, self.shared.tasks.wait()).await.is_ok();
        if !orderly {
            tracing::warn!("requests of nbd clients took longer than the time for a shutdown; they are dropped");
            self.shared.abort.cancel();
            self.shared.tasks.wait().await;
        }
        orderly
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.abort.cancel();
    }
}

async fn accept(shared: Arc<Shared>, listener: Listener, tls: NbdTls) {
    let mut is_out = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = shared.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(socket) => {
                if std::mem::take(&mut is_out) {
                    tracing::info!(address = %listener.addr(), "nbd clients are accepted again");
                }
                shared.admit(socket, tls.clone());
            }
            // The client was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                // Out of file descriptors or memory: the backlog keeps the clients, and others may leave meanwhile.
                // Said once: it may last for hours.
                if !std::mem::replace(&mut is_out, true) {
                    tracing::warn!(address = %listener.addr(), %error, "cannot accept an nbd client; trying again");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

impl Shared {
    /// Begins the handshake of a new connection.
    fn admit(self: &Arc<Self>, socket: Socket, tls: NbdTls) {
        if self.connections.load(Ordering::Relaxed) >= self.limits.max_connections {
            tracing::warn!(
                peer = %socket.peer(), limit = self.limits.max_connections,
                "an nbd client was turned away: as many are connected as the limit allows"
            );
            return;
        }
        let number = self.next_handshake.fetch_add(1, Ordering::Relaxed);
        let evicted = CancellationToken::new();
        {
            let mut handshakes = self.handshakes.lock();
            handshakes.push_back((number, evicted.clone()));
            if handshakes.len() > self.limits.max_handshakes
                && let Some((_, oldest)) = handshakes.pop_front()
            {
                oldest.cancel();
            }
        }
        let shared = Arc::clone(self);
        self.tasks.spawn(async move { shared.handshake(socket, tls, number, evicted).await });
    }

    async fn handshake(self: Arc<Self>, socket: Socket, tls: NbdTls, number: u64, evicted: CancellationToken) {
        let peer = socket.peer();
        socket.tune();
        let shaken = tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            () = evicted.cancelled() => {
                tracing::warn!(%peer, "an nbd client in its handshake was dropped for newer ones");
                None
            }
            shaken = tokio::time::timeout(
                self.limits.handshake_timeout, shake_hands(socket, &*self.exports, &tls)
            ) => Some(shaken),
        };
        self.handshakes.lock().retain(|(other, _)| *other != number);
        match shaken {
            None => {}
            Some(Err(_)) => tracing::debug!(%peer, "an nbd client took too long for its handshake"),
            Some(Ok(Err(error))) => tracing::debug!(%peer, %error, "an nbd client left in its handshake"),
            Some(Ok(Ok((socket, Shaken::Close(reason))))) => {
                tracing::debug!(%peer, "an nbd handshake ended: {reason}");
                socket.close(Duration::from_secs(1)).await;
            }
            Some(Ok(Ok((socket, Shaken::Enter { session, name, export, input })))) => {
                let socket = match socket.detach() {
                    Ok(detached) => detached,
                    Err(error) => return tracing::debug!(%peer, %error, "an nbd client left after its handshake"),
                };
                let withdrawn = export.withdrawn();
                let share = self.budget.share();
                let max_requests = self.limits.max_requests.max(1);
                let transmission = Transmission::new(peer, session, name, export, input, share, max_requests);
                let counted = Counted::new(&self);
                let ended = self.stop.child_token();
                let connection = Connection::new(transmission, Arc::clone(&self.watch.watch), counted, ended.clone());
                if let Some(withdrawn) = withdrawn {
                    let connection = Arc::downgrade(&connection);
                    self.tasks.spawn(async move {
                        tokio::select! {
                            () = withdrawn => {}
                            () = ended.cancelled() => return,
                        }
                        if let Some(connection) = connection.upgrade() {
                            connection.withdraw();
                        }
                    });
                }
                if let Err(error) = drive(connection, 0, socket, self.abort.clone()) {
                    tracing::error!(%error, "cannot serve an nbd client");
                }
            }
        }
    }
}

/// Drives a connection on a thread of its own, as its driver of this number. The thread has its own runtime, too: a wake-up
/// does not go through the threads of others.
fn drive(connection: Arc<Connection>, driver: u64, socket: DetachedSocket, abort: CancellationToken) -> io::Result<()> {
    // All that can fail comes first.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let socket = {
        let _entered = runtime.enter();
        socket.attach()?
    };
    let transmit = move || {
        crate::workers::run_soon();
        runtime.block_on(async {
            tokio::select! {
                biased;
                () = abort.cancelled() => {}
                () = connection.serve(driver, socket) => {}
            }
        });
    };
    std::thread::Builder::new().name("nbd-client".to_owned()).spawn(transmit).map(drop)
}

/// One connection in transmission, for as long as it lives.
pub(super) struct Counted {
    shared: Arc<Shared>,
    _task: tokio_util::task::task_tracker::TaskTrackerToken,
}

impl Counted {
    fn new(shared: &Arc<Shared>) -> Counted {
        shared.connections.fetch_add(1, Ordering::Relaxed);
        Counted { shared: Arc::clone(shared), _task: shared.tasks.token() }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.shared.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
