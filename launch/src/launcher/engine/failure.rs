//! A failure as the launcher reports it and decides by it.

use super::{
    policy::Cause,
    problem::Problem,
    ranks::{FailedRank, first_cause},
    tracker::Tracker,
};
use crate::protocol::{FailureKind, log_path};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use trainer::config::RestartConfig;

#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) cause: Cause,
    message: String,
    /// Log of the rank that failed.
    log: Option<PathBuf>,
}

impl Failure {
    pub(crate) fn transient(message: impl Into<String>) -> Failure {
        Failure {
            cause: Cause::Transient,
            message: message.into(),
            log: None,
        }
    }

    /// Returns the failure that came first among those of several ranks.
    pub(crate) fn of_ranks(failed: &[FailedRank], dir: &Path) -> Failure {
        let Some(first) = first_cause(failed) else {
            return Failure::transient("a rank exited without reporting an error");
        };
        let report = first.report.as_ref();
        let kind = report.filter(|_| first.signal().is_none());
        let cause = match kind.map(|report| &report.kind) {
            Some(&FailureKind::Diverged { step }) => Cause::Diverged { step },
            Some(FailureKind::Restore) => Cause::Restore,
            Some(FailureKind::Own { steps: 0 }) => Cause::Permanent,
            Some(FailureKind::Own { .. }) => Cause::Own,
            _ => Cause::Transient,
        };
        Failure {
            cause,
            message: format!("rank {} failed: {}", first.rank, first.reason()),
            log: Some(log_path(dir, first.rank)),
        }
    }

    /// Returns a failure if a rank sends no heartbeat, or no rank makes progress.
    pub(crate) fn of_hang(
        tracker: &Tracker,
        now: Duration,
        config: &RestartConfig,
    ) -> Option<Failure> {
        let timeout = Duration::from_secs_f64(config.heartbeat_timeout_s);
        if let Some(rank) = tracker.hung_rank(now, timeout) {
            let seconds = timeout.as_secs_f64();
            return Some(Failure::transient(format!(
                "rank {rank} failed: no heartbeat for {seconds:.1} s"
            )));
        }
        let pause = tracker.stalled_for(now, config.step_timeout_s)?;
        let seconds = pause.as_secs_f64();
        let step = tracker.step;
        Some(Failure::transient(format!(
            "the run hangs: no rank made progress for {seconds:.0} s after step {step}"
        )))
    }

    /// Returns one line for the terminal.
    pub(crate) fn brief(&self) -> &str {
        self.message.lines().next().unwrap_or_default()
    }

    pub(crate) fn into_problem(self) -> Problem {
        let problem = Problem::new(self.message);
        match self.log {
            Some(log) => problem.hint(format!("see {}", log.display())),
            None => problem,
        }
    }
}
