//! The rank processes of the current generation, as machines report them.

use crate::{protocol::FailureReport, signals::STOPS};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, os::unix::process::ExitStatusExt, process::ExitStatus};

/// Most failures in a machine's report.
const MAX_FAILURES: usize = 16;

/// A rank that exited with an error or was killed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FailedRank {
    pub(crate) rank: usize,
    /// Raw status of `waitpid`.
    pub(crate) status: i32,
    pub(crate) report: Option<FailureReport>,
    /// The reason why its whole machine is lost, if it is.
    pub(crate) lost: Option<String>,
}

impl FailedRank {
    /// Returns the signal that killed the rank.
    pub(crate) fn signal(&self) -> Option<i32> {
        ExitStatus::from_raw(self.status).signal()
    }

    /// Returns the signal that asked the rank to end, if that is why it did: it exited with 128 +
    /// the signal, or was killed before it could handle the signal.
    pub(crate) fn stop_signal(&self) -> Option<i32> {
        if self.report.is_some() || self.lost.is_some() {
            return None;
        }
        let status = ExitStatus::from_raw(self.status);
        let code = status.code().map(|code| code - 128);
        let signal = code.or(status.signal())?;
        let mut signals = STOPS.iter();
        signals.any(|&stop| stop as i32 == signal).then_some(signal)
    }

    /// Orders failures by what they tell of the cause. Ranks that were asked to end tell nothing,
    /// and the peers of a killed rank only that it is gone.
    fn precedence(&self) -> (bool, bool, u64) {
        let at = self.report.as_ref().map_or(u64::MAX, |report| report.at);
        let is_killed = self.signal().is_some() && self.report.is_none();
        let is_cause = is_killed || self.lost.is_some();
        (self.stop_signal().is_some(), !is_cause, at)
    }

    pub(crate) fn reason(&self) -> String {
        match (&self.lost, &self.report) {
            (Some(reason), _) => reason.clone(),
            (None, Some(report)) if self.signal().is_none() => report.message.clone(),
            _ => describe_exit(ExitStatus::from_raw(self.status)),
        }
    }
}

fn describe_exit(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(number), _) => {
            let name = match Signal::try_from(number) {
                Ok(signal) => signal.to_string(),
                Err(_) => format!("signal {number}"),
            };
            let note = if number == Signal::SIGKILL as i32 {
                " (by a user, or out of memory)"
            } else {
                ""
            };
            format!("killed by {name}{note}")
        }
        (None, Some(code)) => format!("exited with status {code}"),
        (None, None) => format!("ended with {status}"),
    }
}

/// Returns the failure that came first.
///
/// A killed rank comes before all others: it reports nothing, and its peers only report that it is
/// gone.
pub(crate) fn first_cause(failed: &[FailedRank]) -> Option<&FailedRank> {
    let killed = failed
        .iter()
        .find(|failed| failed.signal().is_some() && failed.report.is_none());
    let reported = failed.iter().filter(|failed| failed.report.is_some());
    let earliest = || reported.min_by_key(|failed| failed.report.as_ref().map(|report| report.at));
    killed.or_else(earliest).or(failed.first())
}

/// State of a machine's ranks since the command with this number.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RankReport {
    pub(crate) number: u64,
    pub(crate) running: usize,
    /// The ranks that failed first.
    pub(crate) failed: Vec<FailedRank>,
    /// Number of ranks that failed after these.
    pub(crate) more_failed: usize,
}

impl RankReport {
    /// Returns a report of bounded size: hundreds of ranks fail together when one does.
    pub(crate) fn new(number: u64, running: usize, mut failed: Vec<FailedRank>) -> RankReport {
        failed.sort_by_key(FailedRank::precedence);
        let more_failed = failed.len().saturating_sub(MAX_FAILURES);
        failed.truncate(MAX_FAILURES);
        RankReport {
            number,
            running,
            failed,
            more_failed,
        }
    }
}

/// A machine's share of the ranks.
#[derive(Debug, Default)]
struct Share {
    assigned: Vec<usize>,
    /// None until the machine has reported since the last command.
    report: Option<RankReport>,
    lost: Option<String>,
}

/// The ranks of the current generation.
#[derive(Debug, Default)]
pub(crate) struct Ranks {
    /// Number of the last command about ranks.
    number: u64,
    machines: BTreeMap<usize, Share>,
}

impl Ranks {
    /// Records that these ranks are started on each machine. Returns the command's number.
    pub(crate) fn start(&mut self, assigned: BTreeMap<usize, Vec<usize>>) -> u64 {
        self.number += 1;
        let share = |assigned| Share {
            assigned,
            ..Share::default()
        };
        let machines = assigned.into_iter();
        self.machines = machines
            .map(|(machine, assigned)| (machine, share(assigned)))
            .collect();
        self.number
    }

    /// Records that all ranks of these machines are killed. Returns the command's number.
    pub(crate) fn kill(&mut self, machines: impl Iterator<Item = usize>) -> u64 {
        self.start(machines.map(|machine| (machine, Vec::new())).collect())
    }

    pub(crate) fn on_report(&mut self, machine: usize, report: RankReport) {
        if report.number != self.number {
            return;
        }
        if let Some(share) = self.machines.get_mut(&machine) {
            share.report = Some(report);
        }
    }

    pub(crate) fn on_machine_lost(&mut self, machine: usize, reason: &str) {
        if let Some(share) = self.machines.get_mut(&machine) {
            share.lost = Some(reason.to_string());
        }
    }

    /// Number of ranks that run, or are about to.
    pub(crate) fn running(&self) -> usize {
        let running = |share: &Share| match (&share.lost, &share.report) {
            (Some(_), _) => 0,
            (None, Some(report)) => report.running,
            (None, None) => share.assigned.len(),
        };
        self.machines.values().map(running).sum()
    }

    pub(crate) fn failed(&self) -> Vec<FailedRank> {
        let mut failed = Vec::new();
        for share in self.machines.values() {
            match (&share.lost, &share.report, share.assigned.first()) {
                (Some(reason), _, Some(&rank)) => failed.push(FailedRank {
                    rank,
                    status: Signal::SIGKILL as i32,
                    report: None,
                    lost: Some(reason.clone()),
                }),
                (None, Some(report), _) => failed.extend(report.failed.iter().cloned()),
                _ => {}
            }
        }
        failed
    }

    /// Number of failed ranks besides those of [`Ranks::failed`].
    pub(crate) fn more_failed(&self) -> usize {
        let shares = self.machines.values();
        let reports = shares.filter_map(|share| share.report.as_ref());
        reports.map(|report| report.more_failed).sum()
    }

    /// Machines that have not confirmed the last command, or still have ranks.
    pub(crate) fn busy_machines(&self) -> Vec<usize> {
        let is_busy = |share: &Share| {
            let report = share.report.as_ref();
            share.lost.is_none() && report.is_none_or(|report| report.running > 0)
        };
        let machines = self.machines.iter();
        let busy = machines.filter(|(_, share)| is_busy(share));
        busy.map(|(&machine, _)| machine).collect()
    }

    pub(crate) fn assigned_count(&self, machine: usize) -> usize {
        let share = self.machines.get(&machine);
        share.map_or(0, |share| share.assigned.len())
    }

    /// Machines of this generation that are not lost.
    pub(crate) fn machines(&self) -> Vec<usize> {
        let machines = self.machines.iter();
        let present = machines.filter(|(_, share)| share.lost.is_none());
        present.map(|(&machine, _)| machine).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::FailureKind;

    fn exited(rank: usize, at: u64) -> FailedRank {
        FailedRank {
            rank,
            status: 1 << 8,
            report: Some(FailureReport {
                pid: 1,
                at,
                message: "a peer is gone".into(),
                kind: FailureKind::Peer,
            }),
            lost: None,
        }
    }

    #[test]
    fn a_report_has_the_cause_and_counts_what_it_leaves_out() {
        let killed = FailedRank {
            rank: 200,
            status: Signal::SIGKILL as i32,
            report: None,
            lost: None,
        };
        let stopped = |rank| FailedRank {
            rank,
            status: (128 + Signal::SIGTERM as i32) << 8,
            report: None,
            lost: None,
        };
        let mut failed: Vec<FailedRank> = (0..100).map(stopped).collect();
        failed.extend((100..200).map(|rank| exited(rank, 1000 - rank as u64)));
        let first = RankReport::new(1, 0, failed.clone());
        assert_eq!((first.failed.len(), first.more_failed), (16, 184));
        let cause = |report: &RankReport| first_cause(&report.failed).unwrap().rank;
        assert_eq!(cause(&first), 199, "the earliest report");
        failed.push(killed);
        let report = RankReport::new(1, 0, failed);
        assert_eq!((report.failed.len(), report.more_failed), (16, 185));
        assert_eq!(cause(&report), 200);
        let few = RankReport::new(1, 0, vec![exited(3, 1)]);
        assert_eq!((few.failed.len(), few.more_failed), (1, 0));
    }
}
