//! A connection in transmission and the thread that drives it. Must not know the protocol, nor what an export is made of.
//!
//! The thread runs short requests itself, without handing them to others: that saves two wake-ups each, which is more than
//! all the rest. The price would be that a write that hangs in the disk holds up the reads behind it. Therefore the state is
//! not the thread's: while it runs such a request it holds on to nothing, and [`super::watch`] gives the connection to
//! another thread when that takes long. The first thread then hands in its result and ends.
//!
//! Before it sleeps, a thread whose client asks one thing after the other looks for the next request for a moment, as
//! QEMU's event loops do (`poll-max-ns`): waking up takes longer than serving a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Export;
use super::server::Counted;
use super::socket::{DetachedSocket, ReadNow, Socket, Twin};
use super::transmission::{Transmission, Turn};
use super::watch::Watch;

/// How long a client has to take notice of the end of its connection.
const LINGER: Duration = Duration::from_secs(1);

/// The longest time for which the next request is looked for before the thread sleeps: about what two wake-ups of a virtual
/// CPU take, the client's and this thread's.
const SPIN_MAX: Duration = Duration::from_micros(100);

/// How often a thread goes to sleep at once, at the most, after it looked in vain.
const REST_MAX: u32 = 256;

/// A shorter search than this is not worth beginning.
const SPIN_MIN: Duration = Duration::from_micros(8);

/// How long requests are run elsewhere after one hung in the disk; twice as long each time that it soon does so again.
const CAREFUL: Duration = Duration::from_millis(200);

/// The longest such time.
const CAREFUL_MAX: Duration = Duration::from_secs(30);

/// See the module.
pub(super) struct Connection {
    state: Mutex<State>,
    export: Arc<dyn Export>,
    watch: Arc<Watch>,
    /// Since when the driving thread has been running a request, in the watch's time; 0: it does not.
    busy_since: AtomicU64,
    /// No more requests are taken: because of a shutdown, or because the export was withdrawn.
    ended: CancellationToken,
    /// Ends who waits for the withdrawal, with the connection.
    _ended: DropGuard,
    is_withdrawn: AtomicBool,
    _counted: Counted,
}

struct State {
    transmission: Transmission,
    /// Which thread drives it: the first is 0, each rescue adds one.
    driver: u64,
    /// Wakes that thread's task.
    waker: Option<Waker>,
    /// Its socket.
    twin: Option<Twin>,
    caution: Caution,
}

impl State {
    fn wake_driver(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// How a driver's work ended.
enum Ended {
    /// All is answered and the client gone.
    Done,
    /// Another thread drives the connection.
    Relieved,
}

impl Connection {
    /// A connection that has been negotiated. `ended` is its own, to be cancelled when no more requests are to be taken.
    pub(super) fn new(
        transmission: Transmission,
        watch: Arc<Watch>,
        counted: Counted,
        ended: CancellationToken,
    ) -> Arc<Connection> {
        let export = Arc::clone(transmission.export());
        let connection = Arc::new(Connection {
            state: Mutex::new(State { transmission, driver: 0, waker: None, twin: None, caution: Caution::default() }),
            export,
            watch,
            busy_since: AtomicU64::new(0),
            _ended: ended.clone().drop_guard(),
            ended,
            is_withdrawn: AtomicBool::new(false),
            _counted: counted,
        });
        connection.watch.add(&connection);
        connection
    }

    /// What is served was withdrawn: the client is hung up on. Takes nothing from the path of requests: whoever serves waits for the end of
    /// the connection anyway, and one that hangs in the disk is relieved by another who does.
    pub(super) fn withdraw(&self) {
        self.is_withdrawn.store(true, Ordering::Release);
        self.ended.cancel();
    }

    /// Serves as the thread of this number until the client or a shutdown ends it, then answers what is in flight and closes. If
    /// the export was withdrawn, hangs up at once and only sees to the end of what changes it.
    pub(super) async fn serve(self: Arc<Self>, driver: u64, mut socket: Socket) {
        let mut spins = Spins::default();
        {
            let mut state = self.state.lock();
            state.twin = socket.twin();
            // Whoever cannot be relieved must not hang.
            if state.twin.is_none() {
                state.transmission.set_may_run_here(false);
            }
            state.transmission.set_may_pipe(socket.takes_pipes());
            if driver == 0 {
                state.transmission.log_begin();
            }
        }
        let ended = tokio::select! {
            biased;
            ended = std::future::poll_fn(|cx| self.poll(driver, &mut socket, &mut spins, cx)) => Some(ended),
            () = self.ended.cancelled() => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                if self.is_withdrawn.load(Ordering::Acquire) {
                    socket.hang_up();
                    self.state.lock().transmission.withdraw();
                } else {
                    self.state.lock().transmission.shut_down();
                }
                std::future::poll_fn(|cx| self.poll(driver, &mut socket, &mut spins, cx)).await
            }
        };
        if matches!(ended, Ended::Relieved) {
            return;
        }
        let close = self.state.lock().transmission.log_end();
        if close {
            socket.close(LINGER).await;
        }
    }

    fn poll(&self, driver: u64, socket: &mut Socket, spins: &mut Spins, cx: &mut Context<'_>) -> Poll<Ended> {
        spins.request.woken();
        spins.payload.woken();
        let mut state = self.state.lock();
        loop {
            if state.driver != driver {
                return Poll::Ready(Ended::Relieved);
            }
            if state.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                state.waker = Some(cx.waker().clone());
            }
            if !state.transmission.has_jobs_out() && state.caution.is_over() {
                state.transmission.set_may_run_here(true);
            }
            match state.transmission.poll(socket, cx) {
                Turn::Done => return Poll::Ready(Ended::Done),
                Turn::Wait { is_idle } => {
                    let has_come = if is_idle {
                        let (input, max_bytes) = state.transmission.input_buffer();
                        spins.request.look(|| socket.read_now(input, max_bytes))
                    } else if let Some((pipe, missing)) = state.transmission.pipe_input() {
                        // The client is most likely putting it into the socket now.
                        spins.payload.look(|| socket.read_into_now(pipe, missing))
                    } else {
                        false
                    };
                    if has_come {
                        continue;
                    }
                    return Poll::Pending;
                }
                Turn::Run(mut job) => {
                    drop(state);
                    self.busy_since.store(self.watch.now(), Ordering::SeqCst);
                    self.watch.wake();
                    let result = job.run(&*self.export);
                    self.busy_since.store(0, Ordering::SeqCst);
                    state = self.state.lock();
                    state.transmission.job_done(job, result);
                    if state.driver != driver {
                        state.wake_driver();
                    }
                }
            }
        }
    }

    /// Since when the driving thread has been running a request, in the watch's time; 0: it does not.
    pub(super) fn busy_since(&self) -> u64 {
        self.busy_since.load(Ordering::SeqCst)
    }

    /// Gives the connection to a new thread, which `start` begins with the number and the socket it is given, if its thread
    /// still runs the request that it began at `busy_since`.
    pub(super) fn relieve(
        &self,
        busy_since: u64,
        start: impl FnOnce(u64, DetachedSocket) -> std::io::Result<()>,
    ) -> std::io::Result<bool> {
        // The thread takes this lock before it goes on: as long as it is held here, it stays where it is.
        let mut state = self.state.lock();
        let Some(twin) = state.twin.filter(|_| self.busy_since() == busy_since) else { return Ok(false) };
        // SAFETY: the socket belongs to the thread that stays where it is.
        let twin = unsafe { twin.open() }?;
        start(state.driver + 1, twin)?;
        state.driver += 1;
        state.waker = None;
        // Its thread may close it from now on.
        state.twin = None;
        state.transmission.set_may_run_here(false);
        state.caution.begin(Instant::now());
        // Nobody runs a request now as far as the watch is concerned.
        self.busy_since.store(0, Ordering::SeqCst);
        Ok(true)
    }
}

/// When requests may be run on the connection's thread again.
#[derive(Default)]
struct Caution {
    until: Option<Instant>,
    last: Option<(Instant, Duration)>,
}

impl Caution {
    fn begin(&mut self, now: Instant) {
        let duration = match self.last {
            Some((end, last)) if now < end + 4 * last => (2 * last).min(CAREFUL_MAX),
            _ => CAREFUL,
        };
        self.until = Some(now + duration);
        self.last = Some((now + duration, duration));
    }

    /// True once, when it ends.
    fn is_over(&mut self) -> bool {
        match self.until {
            Some(until) if Instant::now() >= until => {
                self.until = None;
                true
            }
            _ => false,
        }
    }
}

/// What a thread looks for before it sleeps.
#[derive(Default)]
struct Spins {
    request: Spin,
    /// The rest of a long payload.
    payload: Spin,
}

/// How long to look for the client's next bytes before the thread sleeps.
#[derive(Default)]
struct Spin {
    window: Duration,
    idle_since: Option<Instant>,
    /// How often the thread still goes to sleep at once, and how often it did the last time.
    rests: u32,
    last_rests: u32,
}

impl Spin {
    /// The thread is up again: learns how long the client took.
    fn woken(&mut self) {
        let Some(since) = self.idle_since.take() else { return };
        if self.rests > 0 {
            self.rests -= 1;
            return;
        }
        if self.window.is_zero() && since.elapsed() < SPIN_MAX {
            self.window = SPIN_MAX;
        }
    }

    /// Looks for input; whether there was some.
    fn look(&mut self, mut read: impl FnMut() -> ReadNow) -> bool {
        let begun = Instant::now();
        if !self.window.is_zero() {
            loop {
                match read() {
                    ReadNow::Some => {
                        self.window = (2 * self.window).min(SPIN_MAX);
                        self.last_rests = 0;
                        return true;
                    }
                    ReadNow::None => {}
                    // The reactor will tell.
                    ReadNow::Ended => break,
                }
                if begun.elapsed() >= self.window {
                    self.window /= 2;
                    if self.window < SPIN_MIN {
                        // Looking is not worth its CPU time with this client, for longer each time.
                        self.window = Duration::ZERO;
                        self.last_rests = (2 * self.last_rests).clamp(8, REST_MAX);
                        self.rests = self.last_rests;
                    }
                    break;
                }
                // The client may want this very CPU.
                std::thread::yield_now();
            }
        }
        self.idle_since = Some(begun);
        false
    }
}
