//! The ranks' processes: started, fed with their assignments, watched, ended.

use super::assignment::Assignment;
use crate::cli::TrainArgs;
use crate::environment;
use crate::rank::{FailureReport, failure_path, log_path};
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

/// This very program, even when its file has been replaced since it started.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";

/// Processes of ranks, and those that wait to be one.
pub(super) struct RankProcesses<'a> {
    args: &'a TrainArgs,
    dir: &'a Path,
    /// With their numbers.
    children: Vec<(usize, Child)>,
    standby: Vec<Child>,
}

/// A rank that has ended without success.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FailedRank {
    pub(super) rank: usize,
    /// As waitpid gives it.
    pub(super) status: i32,
    pub(super) report: Option<FailureReport>,
    /// Why all ranks of its machine are gone, where they are.
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
        let command = command
            .env(environment::LAUNCHER_PID, std::process::id().to_string())
            .stdin(Stdio::piped())
            // Out of the terminal's group: Ctrl-C reaches the launcher, which stops the ranks in good order.
            .process_group(0);
        command.spawn().context("cannot start a rank")
    }

    /// Starts the ranks, from processes that stand by as far as there are any.
    pub(super) fn start(&mut self, assignments: &[Assignment]) -> Result<()> {
        for assignment in assignments {
            // What an earlier attempt left is not this one's.
            let _ = std::fs::remove_file(failure_path(self.dir, assignment.rank));
            let mut child = match self.ready() {
                Some(child) => child,
                None => self.spawn()?,
            };
            let line = serde_json::to_string(assignment).expect("plain data");
            let told = child
                .stdin
                .take()
                .map(|mut stdin| writeln!(stdin, "{line}"));
            self.children.push((assignment.rank, child));
            told.transpose()
                .with_context(|| format!("rank {} ended before it began", assignment.rank))?;
        }
        Ok(())
    }

    /// A process that stands by and still lives.
    fn ready(&mut self) -> Option<Child> {
        loop {
            let mut child = self.standby.pop()?;
            if matches!(child.try_wait(), Ok(None)) {
                return Some(child);
            }
        }
    }

    /// Makes `count` processes stand by. They are a comfort: where they cannot be had, ranks start later.
    pub(super) fn stand_by(&mut self, count: usize) {
        while self.standby.len() < count {
            match self.spawn() {
                Ok(child) => self.standby.push(child),
                Err(error) => {
                    tracing::warn!("{error:#}");
                    return;
                }
            }
        }
    }

    pub(super) fn running(&mut self) -> usize {
        // A child that cannot be waited for counts as running until it can.
        self.children
            .iter_mut()
            .map(|(_, child)| child.try_wait())
            .filter(|status| !matches!(status, Ok(Some(_))))
            .count()
    }

    pub(super) fn failed(&mut self) -> Vec<FailedRank> {
        let dir = self.dir;
        let ended = self
            .children
            .iter_mut()
            .map(|(rank, child)| (*rank, child.try_wait().ok().flatten()));
        let failed = ended
            .filter_map(|(rank, status)| Some((rank, status?)))
            .filter(|(_, status)| !status.success());
        let report = |rank: usize| {
            serde_json::from_slice(&std::fs::read(failure_path(dir, rank)).ok()?).ok()
        };
        let failed = failed.map(|(rank, status)| (rank, status.into_raw()));
        failed
            .map(|(rank, status)| FailedRank {
                rank,
                status,
                report: report(rank),
                lost: None,
            })
            .collect()
    }

    pub(super) fn signal(&self, signal: Signal) {
        for (_, child) in &self.children {
            // A rank that has just ended needs no signal.
            let _ = kill(Pid::from_raw(child.id() as i32), signal);
        }
    }

    /// Ends and reaps every rank that still runs.
    pub(super) fn kill(&mut self) {
        end(self.children.drain(..).map(|(_, child)| child).collect());
    }

    /// Those too that stand by.
    pub(super) fn kill_all(&mut self) {
        self.kill();
        end(std::mem::take(&mut self.standby));
    }
}

/// Whatever the reason for leaving, no rank is left behind.
impl Drop for RankProcesses<'_> {
    fn drop(&mut self) {
        self.kill_all();
    }
}

fn end(mut children: Vec<Child>) {
    for child in &mut children {
        let _ = child.kill();
    }
    for mut child in children {
        let _ = child.wait();
    }
}

/// The failure that came first: a rank that was killed says nothing itself, and the others only that it is gone.
pub(super) fn first_cause(failed: &[FailedRank]) -> Option<&FailedRank> {
    let killed = failed
        .iter()
        .find(|failed| failed.signal().is_some() && failed.report.is_none());
    let reported = failed.iter().filter(|failed| failed.report.is_some());
    killed
        .or_else(|| reported.min_by_key(|failed| failed.report.as_ref().map(|report| report.at)))
        .or(failed.first())
}

impl FailedRank {
    /// The signal that ended it.
    pub(super) fn signal(&self) -> Option<i32> {
        ExitStatus::from_raw(self.status).signal()
    }

    /// Why, in words.
    pub(super) fn reason(&self) -> String {
        match (&self.lost, &self.report) {
            (Some(reason), _) => reason.clone(),
            (None, Some(report)) if self.signal().is_none() => report.message.clone(),
            _ => ended(ExitStatus::from_raw(self.status)),
        }
    }

    pub(super) fn explain(&self, dir: &Path) -> String {
        format!(
            "rank {} failed: {}\n  its log: {}",
            self.rank,
            self.reason(),
            log_path(dir, self.rank).display()
        )
    }
}

/// How a process ended, in words.
fn ended(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(number), _) => {
            let name = Signal::try_from(number)
                .map_or_else(|_| format!("signal {number}"), |signal| signal.to_string());
            let hint = if number == Signal::SIGKILL as i32 {
                " (by hand, or because memory ran out)"
            } else {
                ""
            };
            format!("it was ended by {name}{hint}")
        }
        (None, Some(code)) => format!("it ended with status {code}"),
        (None, None) => format!("it ended with {status}"),
    }
}
