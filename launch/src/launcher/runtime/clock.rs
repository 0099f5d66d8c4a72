//! The engine's time, which stands still while this process does.

use std::time::{Duration, Instant};

/// A longer time between two looks means that the process was suspended. What others said
/// meanwhile is not read yet, so they would seem silent.
const LONGEST_LOOK: Duration = Duration::from_secs(1);

pub(super) struct Clock {
    now: Duration,
    looked: Instant,
}

impl Clock {
    pub(super) fn start() -> Clock {
        Clock {
            now: Duration::ZERO,
            looked: Instant::now(),
        }
    }

    /// Returns the time since the start, without that in which the process was suspended.
    pub(super) fn now(&mut self) -> Duration {
        self.at(Instant::now())
    }

    fn at(&mut self, instant: Instant) -> Duration {
        let passed = instant.saturating_duration_since(self.looked);
        self.looked = instant;
        self.now += passed.min(LONGEST_LOOK);
        self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspension_does_not_count() {
        let mut clock = Clock::start();
        let start = clock.looked;
        let at = |clock: &mut Clock, millis| clock.at(start + Duration::from_millis(millis));
        assert_eq!(at(&mut clock, 500), Duration::from_millis(500));
        assert_eq!(at(&mut clock, 60_500), Duration::from_millis(1_500));
        assert_eq!(at(&mut clock, 60_700), Duration::from_millis(1_700));
    }
}
