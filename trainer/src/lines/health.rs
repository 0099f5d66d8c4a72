//! The state of a file's disk: what fails, since when, and what to report once per outage.

use super::backlog::MissingLines;
use std::time::{Duration, Instant};

/// Time of one write after which the disk counts as hanging.
const HANG_TIME: Duration = Duration::from_secs(2);

/// Time of one write after which other threads do not wait for it.
const SLOW_WRITE: Duration = Duration::from_millis(100);

/// A change of a file's state that users should know of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The file takes no lines, for this cause. They wait in memory.
    Outage(String),
    /// The file takes lines again.
    Recovered {
        /// Duration of the outage.
        outage: Duration,
        /// Lines that did not fit into memory.
        dropped: MissingLines,
    },
    /// The file lacks lines that an interrupted run did not write.
    Interrupted(MissingLines),
}

/// Outcomes of the writes to one file.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// Start of the write that is in progress.
    busy_since: Option<Instant>,
    /// First failure since the last successful write, and its cause.
    failing: Option<(Instant, String)>,
    /// Start of an outage that was reported.
    reported: Option<Instant>,
    dropped: MissingLines,
}

impl Health {
    pub(super) fn started(&mut self, now: Instant) {
        self.busy_since = Some(now);
    }

    pub(super) fn failed(&mut self, now: Instant, cause: String) {
        self.busy_since = None;
        let (since, _) = self.failing.take().unwrap_or((now, String::new()));
        self.failing = Some((since, cause));
    }

    pub(super) fn succeeded(&mut self) {
        self.busy_since = None;
        self.failing = None;
    }

    pub(super) fn dropped(&mut self, missing: MissingLines) {
        self.dropped = self.dropped.and(missing);
    }

    /// True if nothing should wait for the file: its last write failed, or the current one takes
    /// long.
    pub(super) fn is_out(&self, now: Instant) -> bool {
        let is_slow = |since| now.saturating_duration_since(since) >= SLOW_WRITE;
        self.failing.is_some() || self.busy_since.is_some_and(is_slow)
    }

    /// Returns the cause of an outage that lasts.
    pub(super) fn cause(&self, now: Instant) -> Option<String> {
        if let Some((_, cause)) = &self.failing {
            return Some(cause.clone());
        }
        let since = self.busy_since?;
        let waited = now.saturating_duration_since(since);
        (waited >= HANG_TIME).then(|| format!("no answer for {} s", waited.as_secs()))
    }

    /// Returns the next notice, each once per outage. `all_accepted` is true if no lines are being
    /// dropped: a recovery counts from then on.
    pub(super) fn notice(&mut self, now: Instant, all_accepted: bool) -> Option<Notice> {
        let cause = self.cause(now);
        match (self.reported, cause) {
            (None, Some(cause)) => {
                let since = self.failing.as_ref().map(|(since, _)| *since);
                self.reported = since.or(self.busy_since);
                Some(Notice::Outage(cause))
            }
            (Some(since), None) if all_accepted && self.busy_since.is_none() => {
                self.reported = None;
                Some(Notice::Recovered {
                    outage: now.saturating_duration_since(since),
                    dropped: std::mem::take(&mut self.dropped),
                })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_reported_once() {
        let start = Instant::now();
        let after = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut health = Health::default();
        assert_eq!(health.notice(start, true), None);
        for second in 0..5 {
            let now = after(f64::from(second));
            health.started(now);
            health.failed(now, "no space".into());
            let notice = health.notice(now, true);
            let expected = (second == 0).then(|| Notice::Outage("no space".into()));
            assert_eq!(notice, expected);
            assert!(health.is_out(now));
        }
        health.started(after(6.0));
        health.succeeded();
        let dropped = MissingLines {
            lines: 3,
            steps: 3,
            span: Some((4, 6)),
        };
        health.dropped(dropped);
        assert_eq!(health.notice(after(6.0), false), None);
        let recovered = Notice::Recovered {
            outage: Duration::from_secs(6),
            dropped,
        };
        assert_eq!(health.notice(after(6.0), true), Some(recovered));
        assert_eq!(health.notice(after(6.0), true), None);
    }

    #[test]
    fn a_write_that_does_not_return_is_an_outage() {
        let start = Instant::now();
        let mut health = Health::default();
        health.started(start);
        let soon = start + Duration::from_millis(150);
        assert!(health.is_out(soon) && health.notice(soon, true).is_none());
        let later = start + Duration::from_secs(3);
        let hung = Notice::Outage("no answer for 3 s".into());
        assert_eq!(health.notice(later, true), Some(hung));
        health.succeeded();
        assert!(matches!(
            health.notice(later, true),
            Some(Notice::Recovered { .. })
        ));
    }
}
