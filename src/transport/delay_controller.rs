//! Fits [`DelayControl`] to quinn: turns instants into times since the connection's start. Decides nothing.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

use super::delay_control::DelayControl;

/// Makes a controller for every path of every connection.
#[derive(Debug, Default)]
pub(super) struct DelayControlFactory;

impl ControllerFactory for DelayControlFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(QuinnController {
            origin: now,
            mtu: current_mtu,
            control: DelayControl::new(Duration::ZERO, u64::from(current_mtu)),
        })
    }
}

#[derive(Debug, Clone)]
struct QuinnController {
    origin: Instant,
    mtu: u16,
    control: DelayControl,
}

impl QuinnController {
    fn since_start(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.origin)
    }
}

impl Controller for QuinnController {
    // The estimator's minimum is a lifetime minimum and is updated only after this call: the packet's own times it is.
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, _rtt: &RttEstimator) {
        self.control.on_ack(self.since_start(now), self.since_start(sent), bytes, app_limited);
    }

    fn on_end_acks(&mut self, now: Instant, _in_flight: u64, _app_limited: bool, _largest: Option<u64>) {
        self.control.on_acks_end(self.since_start(now));
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        self.control.on_loss(self.since_start(now), self.since_start(sent), lost_bytes, is_persistent_congestion);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        self.control.on_mtu(u64::from(new_mtu));
    }

    fn window(&self) -> u64 {
        self.control.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        DelayControl::initial_window(u64::from(self.mtu))
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
