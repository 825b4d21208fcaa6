//! The relay as a library: start it, ask it, drop it. Must not know: the control protocol, the command line.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::WanError;
use crate::link::{LinkChange, LinkOptions};
use crate::relay::{Envelope, Relay, Request};
use crate::sockets;
use crate::stats::WanStats;

/// Which way: up is from the clients to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the clients to the target.
    Up,
    /// From the target to the clients.
    Down,
    /// Both ways.
    Both,
}

impl Direction {
    pub(crate) fn includes_up(self) -> bool {
        self != Direction::Down
    }
    pub(crate) fn includes_down(self) -> bool {
        self != Direction::Up
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct WanOptions {
    /// Where clients send to; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Where their datagrams go.
    pub to: SocketAddr,
    /// The direction from the clients to the target.
    pub up: LinkOptions,
    /// The direction back.
    pub down: LinkOptions,
    /// Fixes the losses and the jitter for a given sequence of datagrams and times.
    pub seed: u64,
    /// Most clients at a time; datagrams of further ones are dropped.
    pub max_clients: usize,
    /// A client that was silent both ways for so long is forgotten.
    pub idle: Duration,
}

impl WanOptions {
    /// A relay on a free port of 127.0.0.1 whose two directions are alike.
    pub fn new(to: SocketAddr, link: LinkOptions) -> WanOptions {
        WanOptions {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            to,
            up: link,
            down: link,
            seed: 1,
            max_clients: 256,
            idle: Duration::from_secs(300),
        }
    }
}

/// A running relay. Dropping it stops its thread and closes its sockets.
#[derive(Debug)]
pub struct Wan {
    handle: WanHandle,
    local: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

/// Asks a running relay; may be cloned and sent to other threads. It does not keep the relay alive.
#[derive(Clone, Debug)]
pub struct WanHandle {
    requests: mpsc::Sender<Envelope>,
    wake: Arc<EventFd>,
}

impl Wan {
    /// Binds the address and starts the relay's thread.
    ///
    /// # Errors
    /// [`WanError::Listen`] when the address cannot be bound, [`WanError::System`] when the system refuses a
    /// descriptor or a thread.
    pub fn start(options: WanOptions) -> Result<Wan, WanError> {
        let listener = sockets::listening(options.listen)
            .map_err(|source| WanError::Listen { address: options.listen, source })?;
        let local = listener.local_addr().map_err(WanError::system("ask for the relay's own address"))?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| WanError::System { action: "make an eventfd", source: errno.into() })?;
        let wake = Arc::new(wake);
        let (requests, inbox) = mpsc::channel();
        let relay = Relay::new(&options, listener, wake.clone(), inbox)?;
        let thread = std::thread::Builder::new()
            .name("wan-relay".into())
            .spawn(move || relay.run())
            .map_err(WanError::system("start the relay's thread"))?;
        Ok(Wan { handle: WanHandle { requests, wake }, local, thread: Some(thread) })
    }

    /// Where clients send to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// For other threads.
    pub fn handle(&self) -> WanHandle {
        self.handle.clone()
    }

    /// The counters.
    ///
    /// # Errors
    /// [`WanError::Stopped`], as for all that follow, when the relay's thread has ended.
    pub fn stats(&self) -> Result<WanStats, WanError> {
        self.handle.ask(Request::Stats)
    }

    /// Sets the counters to zero.
    ///
    /// # Errors
    /// [`WanError::Stopped`].
    pub fn reset(&self) -> Result<(), WanError> {
        self.handle.ask(Request::Reset).map(drop)
    }

    /// Cuts the link both ways: what is offered or due until [`Wan::mend`] is lost.
    ///
    /// # Errors
    /// [`WanError::Stopped`].
    pub fn cut(&self) -> Result<(), WanError> {
        self.handle.ask(Request::Cut(Direction::Both)).map(drop)
    }

    /// Cuts one direction.
    ///
    /// # Errors
    /// [`WanError::Stopped`].
    pub fn cut_direction(&self, direction: Direction) -> Result<(), WanError> {
        self.handle.ask(Request::Cut(direction)).map(drop)
    }

    /// Mends the link both ways.
    ///
    /// # Errors
    /// [`WanError::Stopped`].
    pub fn mend(&self) -> Result<(), WanError> {
        self.handle.ask(Request::Mend(Direction::Both)).map(drop)
    }

    /// Changes rate, delay and the like both ways.
    ///
    /// # Errors
    /// [`WanError::Stopped`].
    pub fn set(&self, change: LinkChange) -> Result<(), WanError> {
        self.handle.ask(Request::Change(Direction::Both, change)).map(drop)
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        // An error says that the thread has ended already, which is what is wanted.
        let _ = self.handle.ask(Request::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl WanHandle {
    /// Asks and waits for the counters after it.
    ///
    /// # Errors
    /// [`WanError::Stopped`] when the relay's thread has ended.
    pub fn ask(&self, request: Request) -> Result<WanStats, WanError> {
        let (reply, answer) = mpsc::channel();
        self.requests.send((request, reply)).map_err(|_| WanError::Stopped)?;
        self.wake.write(1).map_err(|_| WanError::Stopped)?;
        answer.recv().map_err(|_| WanError::Stopped)
    }
}
