//! The rank processes of this machine: start, assignment, supervision, end.

use crate::{
    cli::TrainArgs,
    environment,
    protocol::{Assignment, FailureReport, failure_path},
    signals,
};
use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use std::{
    io::Write,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

/// This program, even if its file was replaced since it started.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";

/// Rank processes and standbys. Dropping this kills them all.
pub(super) struct RankProcesses<'a> {
    args: &'a TrainArgs,
    dir: &'a Path,
    children: Vec<RankProcess>,
    standby: Vec<Child>,
}

struct RankProcess {
    rank: usize,
    child: Child,
}

/// A rank that exited with an error or was killed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FailedRank {
    pub(super) rank: usize,
    /// Raw status of `waitpid`.
    pub(super) status: i32,
    pub(super) report: Option<FailureReport>,
    /// The reason why its whole machine is lost, if it is.
    pub(super) lost: Option<String>,
}

impl<'a> RankProcesses<'a> {
    pub(super) fn new(args: &'a TrainArgs, dir: &'a Path) -> RankProcesses<'a> {
        RankProcesses {
            args,
            dir,
            children: Vec::new(),
            standby: Vec::new(),
        }
    }

    fn spawn(&self) -> Result<Child> {
        let mut command = Command::new(OWN_PROGRAM);
        command
            .arg0("moerun")
            .arg("train")
            .arg(&self.args.config.config);
        for change in &self.args.config.set {
            command.arg("--set").arg(change);
        }
        for key in &self.args.accept_changes {
            command.arg("--accept-changes").arg(key);
        }
        command
            .env(environment::LAUNCHER_PID, std::process::id().to_string())
            .stdin(Stdio::piped())
            // Outside the terminal's process group: Ctrl-C reaches only the launcher, which stops
            // the ranks in order.
            .process_group(0);
        signals::while_held(|| command.spawn()).context("cannot start a rank")
    }

    /// Starts the ranks, in standby processes as far as there are any.
    pub(super) fn start(&mut self, assignments: &[Assignment]) -> Result<()> {
        for assignment in assignments {
            let rank = assignment.rank;
            // An earlier generation may have left a report.
            let _ = std::fs::remove_file(failure_path(self.dir, rank));
            let mut child = match self.take_standby() {
                Some(child) => child,
                None => self.spawn()?,
            };
            let line = serde_json::to_string(assignment).expect("plain data");
            let stdin = child.stdin.take();
            let sent = stdin.map(|mut stdin| writeln!(stdin, "{line}"));
            self.children.push(RankProcess { rank, child });
            sent.transpose()
                .with_context(|| format!("rank {rank} exited before it got its assignment"))?;
        }
        Ok(())
    }

    /// Returns a standby process that is still alive.
    fn take_standby(&mut self) -> Option<Child> {
        loop {
            let mut child = self.standby.pop()?;
            if matches!(child.try_wait(), Ok(None)) {
                return Some(child);
            }
        }
    }

    /// Keeps `count` standby processes. Best effort: without them a restart is slower.
    pub(super) fn stand_by(&mut self, count: usize) {
        while self.standby.len() < count {
            match self.spawn() {
                Ok(child) => self.standby.push(child),
                Err(error) => {
                    tracing::warn!("no standby process: {error:#}");
                    return;
                }
            }
        }
    }

    pub(super) fn running(&mut self) -> usize {
        // A child that cannot be waited for counts as running until it can.
        self.children
            .iter_mut()
            .map(|process| process.child.try_wait())
            .filter(|status| !matches!(status, Ok(Some(_))))
            .count()
    }

    pub(super) fn failed(&mut self) -> Vec<FailedRank> {
        let mut failed = Vec::new();
        for RankProcess { rank, child } in &mut self.children {
            let Ok(Some(status)) = child.try_wait() else {
                continue;
            };
            // A rank that stopped in order is done, too.
            let stopped = status.code().and_then(signals::stop_of_status);
            if status.success() || stopped.is_some() {
                continue;
            }
            failed.push(FailedRank {
                rank: *rank,
                status: status.into_raw(),
                report: read_report(self.dir, *rank),
                lost: None,
            });
        }
        failed
    }

    pub(super) fn signal(&self, signal: Signal) {
        for RankProcess { child, .. } in &self.children {
            // Fails for a rank that has just exited.
            let _ = kill(Pid::from_raw(child.id() as i32), signal);
        }
    }

    /// Kills and reaps every rank that still runs.
    pub(super) fn kill(&mut self) {
        let children = self.children.drain(..);
        kill_and_reap(children.map(|process| process.child).collect());
    }

    /// Also kills the standby processes.
    pub(super) fn kill_all(&mut self) {
        self.kill();
        kill_and_reap(std::mem::take(&mut self.standby));
    }
}

impl Drop for RankProcesses<'_> {
    fn drop(&mut self) {
        self.kill_all();
    }
}

fn kill_and_reap(mut children: Vec<Child>) {
    for child in &mut children {
        let _ = child.kill();
    }
    for mut child in children {
        let _ = child.wait();
    }
}

fn read_report(dir: &Path, rank: usize) -> Option<FailureReport> {
    let text = std::fs::read(failure_path(dir, rank)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Returns the failure that came first.
///
/// A killed rank comes before all others: it reports nothing, and its peers only report that it is
/// gone.
pub(super) fn first_cause(failed: &[FailedRank]) -> Option<&FailedRank> {
    let killed = failed
        .iter()
        .find(|failed| failed.signal().is_some() && failed.report.is_none());
    let reported = failed.iter().filter(|failed| failed.report.is_some());
    let earliest = || reported.min_by_key(|failed| failed.report.as_ref().map(|report| report.at));
    killed.or_else(earliest).or(failed.first())
}

impl FailedRank {
    /// Returns the signal that killed the rank.
    pub(super) fn signal(&self) -> Option<i32> {
        ExitStatus::from_raw(self.status).signal()
    }

    pub(super) fn reason(&self) -> String {
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
