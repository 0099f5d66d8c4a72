//! How long a keeper lives: until a request, a signal without a launcher, or an hour alone.

use super::state::State;
use crate::keeper::report::Event;
use std::time::{Duration, Instant};

/// Interval at which launchers receive the state of the ranks.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);
/// The time that a keeper stays after a signal, without a launcher or a running request. A
/// scheduler sends the signal to all processes at once, and the last checkpoint comes from here.
const SIGNAL_GRACE: Duration = Duration::from_secs(20);
/// The signal by which a scheduler requests a checkpoint: the run continues.
const SIGUSR1: i32 = 10;

/// The reason why a keeper exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// A peer with the secret requested it.
    Requested,
    /// No launcher came for too long.
    Orphaned,
    /// This signal arrived, and there is no launcher.
    Signalled(i32),
}

/// The decision at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// The keeper lives on, and has to decide again at this time.
    Until(Instant),
    Ends(End),
}

/// What the end of a keeper depends on.
#[derive(Debug)]
pub(crate) struct Lifetime {
    orphan_timeout: Duration,
    next_heartbeat: Instant,
    /// The last time at which a launcher was connected, or a request was running.
    last_client: Instant,
    /// The first signal that asks for the end, and its time.
    stop_signal: Option<i32>,
    signalled_at: Instant,
    running_jobs: usize,
    is_stopping: bool,
}

impl Lifetime {
    pub(crate) fn new(orphan_timeout: Duration, now: Instant) -> Lifetime {
        Lifetime {
            orphan_timeout,
            next_heartbeat: now + HEARTBEAT_INTERVAL,
            last_client: now,
            stop_signal: None,
            signalled_at: now,
            running_jobs: 0,
            is_stopping: false,
        }
    }

    pub(super) fn stop_signal(&self) -> Option<i32> {
        self.stop_signal
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping
    }
}

impl State {
    /// Ends the keeper.
    pub(super) fn stop(&mut self) {
        self.lifetime.is_stopping = true;
        self.wake();
    }

    /// Records that a job begins, during which the keeper does not count as alone.
    pub(super) fn begin_job(&mut self) {
        self.lifetime.running_jobs += 1;
    }

    /// Records that a job ended.
    pub(crate) fn finish_job(&mut self, now: Instant) {
        self.lifetime.running_jobs = self.lifetime.running_jobs.saturating_sub(1);
        self.lifetime.last_client = now;
    }

    /// Records a signal to this process and reports it to the launchers.
    pub(crate) fn signal(&mut self, signal: i32, now: Instant) {
        if signal != SIGUSR1 && self.lifetime.stop_signal.is_none() {
            self.lifetime.stop_signal = Some(signal);
            self.lifetime.signalled_at = now;
        }
        self.send(Event::StopRequested { signal });
        self.wake();
    }

    /// Returns the events that a launcher missed because it connected late.
    pub(crate) fn missed_events(&self) -> Vec<Event> {
        let signal = self.lifetime.stop_signal;
        signal
            .map(|signal| Event::StopRequested { signal })
            .into_iter()
            .collect()
    }

    /// Decides at time `now` whether the keeper ends, and sends a heartbeat if one is due.
    /// `launchers` is the number of connected launchers.
    pub(crate) fn tick(&mut self, launchers: usize, now: Instant) -> Life {
        if self.lifetime.is_stopping {
            return Life::Ends(End::Requested);
        }
        if now >= self.lifetime.next_heartbeat {
            self.lifetime.next_heartbeat = now + HEARTBEAT_INTERVAL;
            let ranks = self.ranks.statuses(now);
            self.send(Event::Heartbeat { ranks });
        }
        let lifetime = &mut self.lifetime;
        if launchers > 0 || lifetime.running_jobs > 0 {
            lifetime.last_client = now;
        }
        let alone = now.saturating_duration_since(lifetime.last_client);
        if let Some(signal) = lifetime.stop_signal {
            let since = now.saturating_duration_since(lifetime.signalled_at);
            if alone.min(since) >= SIGNAL_GRACE {
                return Life::Ends(End::Signalled(signal));
            }
        }
        if alone > lifetime.orphan_timeout {
            return Life::Ends(End::Orphaned);
        }
        Life::Until(lifetime.next_heartbeat)
    }
}
