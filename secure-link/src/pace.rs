//! The pace at which connections that achieve nothing are accepted. Pure.
//!
//! Without it a flood of connections would take a core. A waiting client loses little: the backlog
//! of the listener is short.

use std::time::{Duration, Instant};

/// Connections per second that may fail.
const RATE: f64 = 5000.0;
/// Connections that may fail at once.
const BURST: f64 = 500.0;
/// The share of a connection that is closed before anything is sent.
pub(super) const CHEAP: f64 = 0.25;

#[derive(Debug)]
pub(super) struct Pace {
    credit: f64,
    updated: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Pace {
        Pace {
            credit: BURST,
            updated: now,
        }
    }

    /// Returns how long to wait before the next connection is accepted.
    pub(super) fn pause(&mut self, now: Instant) -> Option<Duration> {
        let elapsed = now.saturating_duration_since(self.updated);
        self.updated = now;
        self.credit = (self.credit + elapsed.as_secs_f64() * RATE).min(BURST);
        // A few at once, so that pauses are rare.
        (self.credit < 1.0).then(|| Duration::from_secs_f64(BURST / 20.0 / RATE))
    }

    /// Records a connection, which costs a share of one.
    pub(super) fn spend(&mut self, share: f64) {
        self.credit -= share;
    }

    /// Records that a connection was authenticated and costs nothing.
    pub(super) fn refund(&mut self) {
        self.credit += 1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_slowed_down_to_the_rate() {
        let start = Instant::now();
        let mut now = start;
        let mut pace = Pace::new(now);
        let mut accepted = 0.0;
        while now - start < Duration::from_secs(2) {
            match pace.pause(now) {
                Some(pause) => now += pause,
                None => {
                    pace.spend(1.0);
                    accepted += 1.0;
                    now += Duration::from_micros(10);
                }
            }
        }
        assert!((accepted - BURST - 2.0 * RATE).abs() < 100.0, "{accepted}");
    }
}
