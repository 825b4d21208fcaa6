//! Delay variation that does not reorder: a random line that wanders slowly, as queues of other people's routers do.
//! Pure. Must not know: packets.
//!
//! Drawing each packet's jitter alone and then forbidding overtaking would push every packet behind the unluckiest
//! before it, so that at high rates the delay is always the longest one and never varies. A line of bounded slope
//! keeps the mean, and the spacing of packets within a factor of two.

use std::time::Duration;

use crate::rng::Rng;

/// The shortest time between two corners of the line.
const LEG_MIN: Duration = Duration::from_millis(10);

/// The line's current leg; heights are shares of the jitter, from -1 to 1.
#[derive(Debug, Default)]
pub(super) struct Jitter {
    start: Duration,
    from: f64,
    to: f64,
}

impl Jitter {
    /// The line's height at time `t`, for a jitter of this size. Times must not run backwards by more than a leg.
    pub(super) fn at(&mut self, t: Duration, jitter: Duration, rng: &mut Rng) -> f64 {
        if jitter.is_zero() {
            return 0.0;
        }
        // The height changes by at most 2 x jitter in a leg: a slope of at most one half.
        let leg = LEG_MIN.max(jitter * 4);
        let since = t.saturating_sub(self.start);
        if since >= leg {
            if since < leg * 2 {
                self.from = self.to;
                self.start += leg;
            } else {
                self.from = rng.signed_unit();
                self.start = t;
            }
            self.to = rng.signed_unit();
        }
        let share = t.saturating_sub(self.start).as_secs_f64() / leg.as_secs_f64();
        self.from + (self.to - self.from) * share.min(1.0)
    }
}
