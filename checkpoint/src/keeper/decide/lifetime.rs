//! The life of a keeper: until a request, a signal without a launcher, or an hour alone.

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

/// The facts that the end of a keeper depends on.
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
    /// Number of the last launcher.
    launcher: Option<u64>,
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
            launcher: None,
        }
    }

    /// Records that a launcher connects. A signal under an earlier launcher asked for the end of
    /// that launcher's run.
    pub(super) fn connect(&mut self, launcher: u64) {
        let previous = self.launcher.replace(launcher);
        if previous.is_some_and(|previous| previous != launcher) {
            self.stop_signal = None;
        }
    }

    pub(super) fn stop_signal(&self) -> Option<i32> {
        self.stop_signal
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    pub(super) fn stop(&mut self) {
        self.is_stopping = true;
    }

    pub(super) fn begin_job(&mut self) {
        self.running_jobs += 1;
    }

    pub(super) fn finish_job(&mut self, now: Instant) {
        self.running_jobs = self.running_jobs.saturating_sub(1);
        self.last_client = now;
    }

    /// Records a signal, of which the first that asks for the end counts.
    pub(super) fn signal(&mut self, signal: i32, now: Instant) {
        if signal != SIGUSR1 && self.stop_signal.is_none() {
            self.stop_signal = Some(signal);
            self.signalled_at = now;
        }
    }

    /// True if a heartbeat is due, which is sent then.
    pub(super) fn beats(&mut self, now: Instant) -> bool {
        let is_due = now >= self.next_heartbeat;
        if is_due {
            self.next_heartbeat = now + HEARTBEAT_INTERVAL;
        }
        is_due
    }

    /// Decides whether the keeper ends, while `launchers` launchers are connected.
    pub(super) fn decide(&mut self, launchers: usize, now: Instant) -> Life {
        if self.is_stopping {
            return Life::Ends(End::Requested);
        }
        if launchers > 0 || self.running_jobs > 0 {
            self.last_client = now;
        }
        let alone = now.saturating_duration_since(self.last_client);
        if let Some(signal) = self.stop_signal {
            let since = now.saturating_duration_since(self.signalled_at);
            if alone.min(since) >= SIGNAL_GRACE {
                return Life::Ends(End::Signalled(signal));
            }
        }
        if alone > self.orphan_timeout {
            return Life::Ends(End::Orphaned);
        }
        Life::Until(self.next_heartbeat)
    }
}
