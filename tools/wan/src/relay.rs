//! The driver: one thread that moves datagrams between sockets at the times that the two [`Link`]s say. It decides
//! nothing about them. Must not know: the control protocol, the command line.
//!
//! One loop owns everything; requests come through a channel and an eventfd. It sleeps in `ppoll` (nanoseconds) on an
//! epoll set, so that the number of clients costs nothing.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use crate::batch::{self, BATCH, Outgoing, Receiver};
use crate::clients::{ClientId, Clients, Lookup};
use crate::error::WanError;
use crate::held::{Datagram, Held};
use crate::link::{Decision, Link, LinkChange};
use crate::precision::make_this_thread_punctual;
use crate::rng::Rng;
use crate::sockets;
use crate::stats::{DirectionStats, WanStats};
use crate::wan::{Direction, WanOptions};

/// Most bytes on their way in one direction: 2 s at 1 Gbit/s.
const HELD_MAX_BYTES: usize = 256 << 20;

/// How often idle clients are looked for.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);

/// How long to wait after a full send buffer.
const RETRY_INTERVAL: Duration = Duration::from_micros(200);

/// Most batches that leave in one turn of the loop, so that receiving gets its turn.
const SENDS_PER_TURN: usize = 4;

/// Epoll's names for the two descriptors that are no client's; client ids start at 1 and never come near the other.
const LISTENER: u64 = 0;
const WAKE: u64 = u64::MAX;

/// What the owner of the relay may ask; each is answered with the counters after it.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// Nothing but the counters.
    Stats,
    /// Sets the counters to zero.
    Reset,
    /// Cuts a direction.
    Cut(Direction),
    /// Mends a direction.
    Mend(Direction),
    /// Changes a direction.
    Change(Direction, LinkChange),
    /// Ends the loop.
    Stop,
}

/// A request and where its answer goes.
pub type Envelope = (Request, mpsc::Sender<WanStats>);

/// One direction: the model, what is on its way, and what is due but did not fit into the send buffer yet.
struct Lane {
    link: Link,
    held: Held,
    due: VecDeque<Datagram>,
    retry_at: Option<Duration>,
}

/// The loop's state.
pub struct Relay {
    epoll: Epoll,
    wake: Arc<EventFd>,
    requests: mpsc::Receiver<Envelope>,
    listener: UdpSocket,
    target: SocketAddr,
    clients: Clients,
    sockets: HashMap<ClientId, UdpSocket>,
    up: Lane,
    down: Lane,
    receiver: Receiver,
    epoch: Instant,
    next_expiry: Duration,
    /// Drops of client sockets that are closed.
    drops_of_gone: u64,
    counted: Counted,
}

/// Counters of the relay itself, since the last reset.
#[derive(Default)]
struct Counted {
    since: Duration,
    refused_packets: u64,
    max_late: Duration,
    /// Kernel drops, up and down, that had happened before.
    drops_before: (u64, u64),
}

impl Relay {
    /// Makes the loop's descriptors around a bound listener.
    ///
    /// # Errors
    /// [`WanError::System`] when the system refuses a descriptor.
    pub fn new(
        options: &WanOptions,
        listener: UdpSocket,
        wake: Arc<EventFd>,
        requests: mpsc::Receiver<Envelope>,
    ) -> Result<Relay, WanError> {
        let failed = |errno: Errno| WanError::System { action: "watch the sockets (epoll)", source: errno.into() };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).map_err(failed)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE)).map_err(failed)?;
        let mut seeds = Rng::seeded(options.seed);
        let mut lane = |link| Lane {
            link: Link::new(link, Rng::seeded(seeds.next_u64())),
            held: Held::new(HELD_MAX_BYTES),
            due: VecDeque::new(),
            retry_at: None,
        };
        let (up, down) = (lane(options.up), lane(options.down));
        Ok(Relay {
            epoll,
            wake,
            requests,
            listener,
            target: options.to,
            clients: Clients::new(options.max_clients, options.idle),
            sockets: HashMap::new(),
            up,
            down,
            receiver: Receiver::default(),
            epoch: Instant::now(),
            next_expiry: EXPIRY_INTERVAL,
            drops_of_gone: 0,
            counted: Counted::default(),
        })
    }

    /// Runs until [`Request::Stop`] or until nobody can ask any more.
    pub fn run(mut self) {
        make_this_thread_punctual();
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            self.send_due();
            if self.now() >= self.next_expiry {
                self.expire();
            }
            self.sleep();
            // A failure here (EINTR at most) is a turn without events.
            let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.receive_from_clients(),
                    WAKE => {
                        if !self.serve_requests() {
                            return;
                        }
                    }
                    id => self.receive_from_target(ClientId(id)),
                }
            }
        }
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Until a socket is readable or something is due.
    fn sleep(&self) {
        let deadline = [self.up.wakes_at(), self.down.wakes_at(), Some(self.next_expiry)].into_iter().flatten().min();
        let timeout = deadline.unwrap_or(self.next_expiry).saturating_sub(self.now());
        let mut fds = [PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN)];
        // EINTR wakes the loop early, which harms nothing.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(timeout)), None);
    }

    /// Serves all requests that wait; false after the last one ever.
    fn serve_requests(&mut self) -> bool {
        // Reading resets the eventfd; that it was not set is no error.
        let _ = self.wake.read();
        loop {
            match self.requests.try_recv() {
                Ok((request, reply)) => {
                    self.apply(request);
                    // Who asked may have gone.
                    let _ = reply.send(self.stats());
                    if matches!(request, Request::Stop) {
                        return false;
                    }
                }
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn apply(&mut self, request: Request) {
        let now = self.now();
        let mut each = |direction: Direction, change: &dyn Fn(&mut Link)| {
            if direction.includes_up() {
                change(&mut self.up.link);
            }
            if direction.includes_down() {
                change(&mut self.down.link);
            }
        };
        match request {
            Request::Stats | Request::Stop => {}
            Request::Cut(direction) => each(direction, &Link::cut),
            Request::Mend(direction) => each(direction, &Link::mend),
            Request::Change(direction, change) => each(direction, &|link| link.change(now, change)),
            Request::Reset => {
                each(Direction::Both, &Link::reset_stats);
                self.counted = Counted { since: now, drops_before: self.kernel_drops(), ..Counted::default() };
            }
        }
    }

    fn stats(&self) -> WanStats {
        let now = self.now();
        let (up_drops, down_drops) = self.kernel_drops();
        let direction = |lane: &Lane, drops: u64| {
            let stats = lane.link.stats(now);
            DirectionStats { dropped_relay: stats.dropped_relay + drops, ..stats }
        };
        WanStats {
            elapsed_s: (now - self.counted.since).as_secs_f64(),
            clients: self.clients.len(),
            refused_packets: self.counted.refused_packets,
            cpu_s: clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
                .map_or(0.0, |time| Duration::from(time).as_secs_f64()),
            max_late_ms: self.counted.max_late.as_secs_f64() * 1e3,
            up: direction(&self.up, up_drops - self.counted.drops_before.0),
            down: direction(&self.down, down_drops - self.counted.drops_before.1),
        }
    }

    fn kernel_drops(&self) -> (u64, u64) {
        let of_clients = self.sockets.values().map(sockets::kernel_drops).sum::<u64>();
        (sockets::kernel_drops(&self.listener), self.drops_of_gone + of_clients)
    }

    fn receive_from_clients(&mut self) {
        // An error (ECONNREFUSED after an ICMP message, say) is about an earlier datagram: nothing to do.
        if self.receiver.receive(self.listener.as_fd()).is_err() {
            return;
        }
        let now = self.epoch.elapsed();
        for (from, payload) in self.receiver.datagrams() {
            let Some(from) = from else { continue };
            let id = match self.clients.find(from, now) {
                Lookup::Known(id) => id,
                Lookup::Full => {
                    self.counted.refused_packets += 1;
                    continue;
                }
                Lookup::New(id) => match open_client(&self.epoll, self.target, id) {
                    Some(socket) => {
                        self.sockets.insert(id, socket);
                        id
                    }
                    None => {
                        self.clients.remove(id);
                        self.counted.refused_packets += 1;
                        continue;
                    }
                },
            };
            self.up.accept(now, id, payload);
        }
    }

    fn receive_from_target(&mut self, id: ClientId) {
        let Some(socket) = self.sockets.get(&id) else { return };
        if self.receiver.receive(socket.as_fd()).is_err() {
            return;
        }
        let now = self.epoch.elapsed();
        self.clients.touch(id, now);
        for (_, payload) in self.receiver.datagrams() {
            self.down.accept(now, id, payload);
        }
    }

    fn send_due(&mut self) {
        let sockets = &self.sockets;
        for _ in 0..SENDS_PER_TURN {
            let now = self.epoch.elapsed();
            let Some(client) = self.up.fill_due(now, &mut self.counted.max_late) else { break };
            let Some(socket) = sockets.get(&client) else {
                self.up.give_up_first();
                continue;
            };
            let run = self.up.due.iter().take_while(|datagram| datagram.client == client);
            let batch: Vec<Outgoing> = run.map(|datagram| (None, &*datagram.payload)).collect();
            let outcome = send_or_retry(socket, &batch);
            self.up.settle(now, outcome);
        }
        for _ in 0..SENDS_PER_TURN {
            let now = self.epoch.elapsed();
            let Some(client) = self.down.fill_due(now, &mut self.counted.max_late) else { break };
            if self.clients.address(client).is_none() {
                self.down.give_up_first();
                continue;
            }
            let run = self.down.due.iter().map_while(|d| Some((self.clients.address(d.client)?, d)));
            let batch: Vec<Outgoing> = run.map(|(address, d)| (Some(address), &*d.payload)).collect();
            let outcome = send_or_retry(&self.listener, &batch);
            self.down.settle(now, outcome);
        }
    }

    fn expire(&mut self) {
        let now = self.now();
        for id in self.clients.expire(now) {
            // Closing the socket takes it out of the epoll set.
            if let Some(socket) = self.sockets.remove(&id) {
                self.drops_of_gone += sockets::kernel_drops(&socket);
            }
        }
        self.next_expiry = now + EXPIRY_INTERVAL;
    }
}

impl Lane {
    fn accept(&mut self, now: Duration, client: ClientId, payload: &[u8]) {
        if let Decision::Deliver { at } = self.link.offer(now, payload.len())
            && !self.held.push(at, client, payload)
        {
            self.link.lost_by_relay();
        }
    }

    /// When this direction wants to be looked at next.
    fn wakes_at(&self) -> Option<Duration> {
        match self.retry_at {
            Some(at) => Some(at),
            None if !self.due.is_empty() => Some(Duration::ZERO),
            None => self.held.next_at(),
        }
    }

    /// Moves what is due into `due` as far as a batch goes; says whose the first is, or `None` when nothing can be
    /// sent now.
    fn fill_due(&mut self, now: Duration, max_late: &mut Duration) -> Option<ClientId> {
        if self.retry_at.is_some_and(|at| at > now) {
            return None;
        }
        self.retry_at = None;
        while self.due.len() < BATCH
            && let Some(datagram) = self.held.pop_due(now)
        {
            *max_late = (*max_late).max(now.saturating_sub(datagram.at));
            if self.link.depart() {
                self.due.push_back(datagram);
            }
        }
        self.due.front().map(|datagram| datagram.client)
    }

    fn settle(&mut self, now: Duration, outcome: Outcome) {
        match outcome {
            Outcome::Sent(count) => {
                self.link.delivered(count);
                self.due.drain(..count);
            }
            Outcome::Later => self.retry_at = Some(now + RETRY_INTERVAL),
            Outcome::Failed => self.give_up_first(),
        }
    }

    fn give_up_first(&mut self) {
        self.link.lost_by_relay();
        self.due.pop_front();
    }
}

enum Outcome {
    Sent(usize),
    /// The send buffer is full.
    Later,
    /// The first datagram cannot be sent, now or later.
    Failed,
}

fn send_or_retry(socket: &UdpSocket, batch: &[Outgoing<'_>]) -> Outcome {
    // A connected socket reports the ICMP "port unreachable" of an *earlier* datagram once: then the next try counts.
    let result = batch::send(socket.as_fd(), batch).or_else(|_| batch::send(socket.as_fd(), batch));
    match result {
        Ok(count) => Outcome::Sent(count),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Outcome::Later,
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => Outcome::Later,
        Err(_) => Outcome::Failed,
    }
}

/// A socket towards the target for a new client; `None` when the system has none left to give.
fn open_client(epoll: &Epoll, target: SocketAddr, id: ClientId) -> Option<UdpSocket> {
    let socket = sockets::connected(target).ok()?;
    epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, id.0)).ok()?;
    Some(socket)
}
