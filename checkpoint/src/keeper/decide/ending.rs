//! Signals, heartbeats and the end.

use super::{lifetime::Life, state::State};
use crate::keeper::report::Event;
use std::time::Instant;

impl State {
    pub(super) fn stop(&mut self) {
        self.lifetime.stop();
        self.wake();
    }

    /// Records that a job begins, during which the keeper does not count as alone.
    pub(super) fn begin_job(&mut self) {
        self.lifetime.begin_job();
    }

    /// Records that a job ended.
    pub(crate) fn finish_job(&mut self, now: Instant) {
        self.lifetime.finish_job(now);
    }

    /// Records a signal to this process and reports it to the launchers.
    pub(crate) fn signal(&mut self, signal: i32, now: Instant) {
        self.lifetime.signal(signal, now);
        self.send(Event::StopRequested { signal });
        self.wake();
    }

    /// Returns the events that a launcher missed because it connected late, or again.
    pub(crate) fn missed_events(&self) -> Vec<Event> {
        let signal = self.lifetime.stop_signal();
        signal
            .map(|signal| Event::StopRequested { signal })
            .into_iter()
            .collect()
    }

    /// Decides at time `now` whether the keeper ends, and sends a heartbeat if one is due.
    /// `launchers` is the number of connected launchers.
    pub(crate) fn tick(&mut self, launchers: usize, now: Instant) -> Life {
        if self.lifetime.beats(now) {
            let ranks = self.ranks.statuses(now);
            self.send(Event::Heartbeat { ranks });
        }
        self.lifetime.decide(launchers, now)
    }
}
