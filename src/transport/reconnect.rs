//! Keeps a link to a peer: dials, waits for its death, dials again with a growing pause. [`Backoff`] decides, without a
//! clock or randomness of its own; [`keep_connected`] drives it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use ring::rand::SecureRandom;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::endpoint::{Endpoint, PeerTarget};
use super::link::{LinkError, NewLink};

/// The longest pause after the first failure; it doubles with every further one ...
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// ... up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A link that lasted so long was good: the pauses start anew.
const GOOD_AFTER: Duration = Duration::from_secs(10);

/// How long to pause before the next attempt. Full jitter: every pause is drawn from 0 to its bound, so that many peers of a
/// site that restarts do not come back at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// An attempt failed. `jitter` is a random number from 0 to 1; returns the pause.
    pub fn failed(&mut self, jitter: f64) -> Duration {
        let bound = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        bound.mul_f64(jitter.clamp(0.0, 1.0))
    }

    /// A link died after `lasted`: a failed attempt, unless it was good. Returns the pause.
    pub fn died(&mut self, lasted: Duration, jitter: f64) -> Duration {
        if lasted >= GOOD_AFTER {
            self.failures = 0;
        }
        self.failed(jitter)
    }
}

/// Ends the dialling when dropped. The links that were handed over live on.
#[derive(Debug)]
pub struct KeepConnected {
    task: JoinHandle<()>,
    last_error: Arc<Mutex<Option<LinkError>>>,
}

impl KeepConnected {
    /// Why there is no link at the moment; `None` while there is one, or before the first attempt failed.
    pub fn last_error(&self) -> Option<LinkError> {
        self.last_error.lock().clone()
    }
}

impl Drop for KeepConnected {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Keeps a link to `target` as long as the returned handle and receiver live. Every new link comes through the receiver;
/// the next is dialled when it has died. Who has enough of a link ends it with [`Link::close`](super::Link::close).
pub fn keep_connected(endpoint: Endpoint, target: PeerTarget) -> (mpsc::Receiver<NewLink>, KeepConnected) {
    let (hand_over, links) = mpsc::channel(1);
    let last_error = Arc::new(Mutex::new(None));
    let task = tokio::spawn(dial_for_ever(endpoint, target, hand_over, last_error.clone()));
    (links, KeepConnected { task, last_error })
}

async fn dial_for_ever(
    endpoint: Endpoint,
    target: PeerTarget,
    hand_over: mpsc::Sender<NewLink>,
    last_error: Arc<Mutex<Option<LinkError>>>,
) {
    let mut backoff = Backoff::default();
    loop {
        let pause = match endpoint.connect(&target).await {
            Ok(new) => {
                tracing::info!("connected to {} at {}", target.name, target.address);
                *last_error.lock() = None;
                let since = Instant::now();
                let link = new.link.clone();
                if hand_over.send(new).await.is_err() {
                    link.close("nobody waits for it");
                    return;
                }
                let error = link.closed().await;
                tracing::warn!("lost the connection to {}: {error}", target.name);
                *last_error.lock() = Some(error);
                backoff.died(since.elapsed(), jitter())
            }
            Err(error) => {
                // Once per change, not once per attempt.
                let mut last = last_error.lock();
                if last.as_ref() != Some(&error) {
                    tracing::warn!("no connection to {} yet, trying on: {error}", target.name);
                    *last = Some(error);
                }
                backoff.failed(jitter())
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = hand_over.closed() => return,
        }
    }
}

fn jitter() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness the pause is the longest: late, not wrong.
    match ring::rand::SystemRandom::new().fill(&mut bytes) {
        Ok(()) => f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX),
        Err(_) => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_five_seconds() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..9).map(|_| backoff.failed(1.0).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(backoff.failed(0.0), Duration::ZERO);
        assert_eq!(backoff.failed(0.5).as_millis(), 2500);
        assert_eq!(backoff.failed(7.0).as_millis(), 5000, "jitter is bounded");
        backoff.failures = u32::MAX;
        assert_eq!(backoff.failed(1.0).as_millis(), 5000);
    }

    #[test]
    fn only_a_good_connection_resets_them() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.failed(1.0);
        }
        assert_eq!(backoff.died(Duration::from_secs(9), 1.0).as_millis(), 3200);
        assert_eq!(backoff.died(Duration::from_secs(10), 1.0).as_millis(), 100);
        assert_eq!(backoff.failed(1.0).as_millis(), 200);
    }
}
