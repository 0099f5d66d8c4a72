//! The rank processes of this machine: start, assignment, supervision, end.

use crate::{
    cli::TrainArgs,
    environment,
    launcher::engine::ranks::FailedRank,
    protocol::{Assignment, FailureReport, RankInput, failure_path},
    run_file, signals,
};
use anyhow::{Context, Result, bail};
use checkpoint::secure::Secret;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    ffi::OsString,
    io::Write,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// This program, even if its file was replaced since it started.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";
/// The time within which the disk must return the reports of ranks that failed together. The caller
/// sends heartbeats, so it cannot wait for each of them.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Most bytes of a rank's report that are read.
const MAX_REPORT_BYTES: u64 = 16 << 20;
/// The time in which killed processes must end when the launcher does.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Rank processes and standbys. Dropping this kills them all.
pub(super) struct RankProcesses {
    /// Arguments of a rank's process.
    arguments: Vec<OsString>,
    dir: PathBuf,
    /// Most ranks at a time, and most standby processes.
    limit: usize,
    children: Vec<RankProcess>,
    standby: Vec<Child>,
    /// Killed processes that have not ended yet.
    dying: Vec<Child>,
}

struct RankProcess {
    rank: usize,
    child: Child,
    /// The report that it left, once it has ended.
    report: Option<Option<FailureReport>>,
}

impl RankProcesses {
    /// Starts at most `limit` ranks, whatever a launcher orders.
    pub(super) fn new(args: &TrainArgs, dir: &Path, limit: usize) -> RankProcesses {
        let mut arguments = vec!["train".into(), args.config.config.clone().into()];
        for change in &args.config.set {
            arguments.extend(["--set".into(), change.into()]);
        }
        for key in &args.accept_changes {
            arguments.extend(["--accept-changes".into(), key.into()]);
        }
        RankProcesses {
            arguments,
            dir: dir.to_path_buf(),
            limit,
            children: Vec::new(),
            standby: Vec::new(),
            dying: Vec::new(),
        }
    }

    fn spawn(&self) -> Result<Child> {
        let mut command = Command::new(OWN_PROGRAM);
        command
            .arg0("moerun")
            .args(&self.arguments)
            .env(environment::LAUNCHER_PID, std::process::id().to_string())
            .stdin(Stdio::piped())
            // Outside the terminal's process group: Ctrl-C reaches only the launcher, which stops
            // the ranks in order.
            .process_group(0);
        signals::while_held(|| command.spawn()).context("cannot start a rank")
    }

    /// Starts the ranks, in standby processes as far as there are any.
    ///
    /// # Errors
    /// If they are more than this machine's, or cannot be started.
    pub(super) fn start(&mut self, assignments: Vec<Assignment>, secret: &Secret) -> Result<()> {
        let limit = self.limit;
        let ordered = self.live_children() + assignments.len();
        if ordered > limit {
            bail!("the launcher ordered {ordered} ranks, and this machine has {limit}");
        }
        for assignment in assignments {
            let rank = assignment.rank;
            let mut child = match self.take_standby() {
                Some(child) => child,
                None => self.spawn()?,
            };
            let secret = secret.clone();
            let input = RankInput { assignment, secret };
            let line = serde_json::to_string(&input).expect("plain data");
            let stdin = child.stdin.take();
            let sent = stdin.map(|mut stdin| writeln!(stdin, "{line}"));
            self.children.push(RankProcess {
                rank,
                child,
                report: None,
            });
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

    /// Keeps `count` standby processes, but no more than this machine has ranks. Best effort:
    /// without them a restart is slower.
    pub(super) fn stand_by(&mut self, count: usize) {
        let count = count.min(self.limit);
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

    /// Number of processes that run, killed ones included until they have ended.
    pub(super) fn running(&mut self) -> usize {
        self.dying.retain_mut(|child| !has_ended(child));
        let dying = self.dying.iter();
        let dying = dying.filter(|child| !has_only_blocked_threads(child.id()));
        dying.count() + self.live_children()
    }

    fn live_children(&mut self) -> usize {
        let children = self.children.iter_mut();
        let live = children.filter_map(|process| (!has_ended(&mut process.child)).then_some(()));
        live.count()
    }

    pub(super) fn failed(&mut self) -> Vec<FailedRank> {
        let mut failed = Vec::new();
        let deadline = Instant::now() + REPORT_TIMEOUT;
        for RankProcess {
            rank,
            child,
            report,
        } in &mut self.children
        {
            let Ok(Some(status)) = child.try_wait() else {
                continue;
            };
            if status.success() {
                continue;
            }
            failed.push(FailedRank {
                rank: *rank,
                status: status.into_raw(),
                report: report
                    .get_or_insert_with(|| read_report(&self.dir, *rank, child.id(), deadline))
                    .clone(),
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

    /// Kills every rank, but no standby process.
    pub(super) fn kill(&mut self) {
        let children = self.children.drain(..);
        let children: Vec<Child> = children.map(|process| process.child).collect();
        self.end(children);
    }

    /// Also kills the standby processes.
    pub(super) fn kill_all(&mut self) {
        self.kill();
        let standby = std::mem::take(&mut self.standby);
        self.end(standby);
    }

    fn end(&mut self, children: Vec<Child>) {
        for mut child in children {
            let _ = child.kill();
            // Waiting could take for ever: the kernel may block the process.
            self.dying.push(child);
        }
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        self.kill_all();
        let began = Instant::now();
        while self.running() > 0 && began.elapsed() < END_TIMEOUT {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// True if a process was waited for. One that cannot be waited for counts as running until it can.
fn has_ended(child: &mut Child) -> bool {
    matches!(child.try_wait(), Ok(Some(_)))
}

/// True if a killed process cannot be waited for only because the kernel blocks one of its threads,
/// as one that writes to a disk that hangs. All others are gone, so nothing trains any more.
fn has_only_blocked_threads(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.trim_start().starts_with('Z')
}

/// Returns the report of the process `pid`, if it left one and the disk answers until `deadline`.
fn read_report(dir: &Path, rank: usize, pid: u32, deadline: Instant) -> Option<FailureReport> {
    let path = failure_path(dir, rank);
    // A disk that hangs gets no more threads to block.
    let left = deadline.checked_duration_since(Instant::now())?;
    let text = parallel::within(left, move || run_file::read(&path, MAX_REPORT_BYTES)).ok()?;
    let report: FailureReport = serde_json::from_slice(&text).ok()?;
    (report.pid == pid).then_some(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    #[test]
    fn a_machine_starts_no_more_processes_than_it_has_ranks() {
        let cli = Cli::parse_from(["moerun", "train", "config.yaml"]);
        let Command::Train(args) = cli.command else {
            panic!("not train");
        };
        let folder = tempfile::tempdir().unwrap();
        let mut none = RankProcesses::new(&args, folder.path(), 0);
        none.stand_by(1_000_000_000);
        assert!(none.standby.is_empty());
        let assignment = serde_json::json!({
            "rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1,
            "store": "127.0.0.1:1", "address": null, "generation": 0, "keeper": null,
            "skipped_batches": {}, "config": "",
        });
        let assignment = serde_json::from_value(assignment).unwrap();
        let secret = Secret::random().unwrap();
        let error = none.start(vec![assignment], &secret).unwrap_err();
        let expected = "the launcher ordered 1 ranks, and this machine has 0";
        assert_eq!(error.to_string(), expected);
        assert!(none.children.is_empty());
    }
}
