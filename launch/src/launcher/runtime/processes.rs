//! The rank processes of this machine: start, assignment, supervision, end.

use super::{rank_child::RankChild, rank_source::RankSource};
use crate::{
    cli::TrainArgs,
    launcher::engine::ranks::FailedRank,
    protocol::{Assignment, FailureReport, RankInput, failure_path},
    run_file,
};
use anyhow::{Context, anyhow};
use checkpoint::secure::Secret;
use nix::sys::signal::Signal;
use std::{
    collections::VecDeque,
    ffi::OsString,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The time within which the disk must return the reports of ranks that failed together. The caller
/// sends heartbeats, so it cannot wait for each of them.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Most bytes of a rank's report that are read.
const MAX_REPORT_BYTES: u64 = 16 << 20;
/// Most characters of a rank's message that the launcher gets.
const MAX_MESSAGE_CHARS: usize = 64 << 10;
/// The time in which killed processes must end when the launcher does.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest time for which starting processes are waited for at a time.
const START_WAIT: Duration = Duration::from_millis(50);

/// Rank processes and standbys. Dropping this kills them all.
pub(super) struct RankProcesses {
    source: RankSource,
    dir: PathBuf,
    /// Most ranks at a time, and most standby processes.
    limit: usize,
    /// Processes that the source has not returned yet, in the order in which it will.
    starting: VecDeque<Starting>,
    children: Vec<RankProcess>,
    standby: Vec<RankChild>,
    /// Killed processes that have not ended yet.
    dying: Vec<RankChild>,
}

/// The use of a process that is being started.
enum Starting {
    Rank(AssignedRank),
    Standby,
    /// Nothing: the launcher has changed its mind, and kills the process when it comes.
    Unwanted,
}

struct AssignedRank {
    rank: usize,
    /// The line with its assignment.
    line: String,
}

struct RankProcess {
    rank: usize,
    child: RankChild,
    /// The report that it left, once it has ended.
    report: Option<Option<FailureReport>>,
}

/// A rank that could not be started, or the first of several.
pub(super) struct FailedStart {
    pub(super) rank: usize,
    pub(super) error: anyhow::Error,
}

/// Returns the arguments of a rank's process.
pub(super) fn rank_arguments(args: &TrainArgs) -> Vec<OsString> {
    let mut arguments = vec!["train".into(), args.config.config.clone().into()];
    for change in &args.config.set {
        arguments.extend(["--set".into(), change.into()]);
    }
    for key in &args.accept_changes {
        arguments.extend(["--accept-changes".into(), key.into()]);
    }
    arguments
}

impl RankProcesses {
    /// Starts at most `limit` ranks, whatever a launcher orders.
    pub(super) fn new(source: RankSource, dir: &Path, limit: usize) -> RankProcesses {
        RankProcesses {
            source,
            dir: dir.to_path_buf(),
            limit,
            starting: VecDeque::new(),
            children: Vec::new(),
            standby: Vec::new(),
            dying: Vec::new(),
        }
    }

    /// Starts the ranks, in standby processes as far as there are any. The others start in
    /// [`RankProcesses::advance`].
    ///
    /// # Errors
    /// If they are more than this machine's, or a standby process has just exited.
    pub(super) fn start(
        &mut self,
        assignments: Vec<Assignment>,
        secret: &Secret,
    ) -> Result<(), FailedStart> {
        let Some(first) = assignments.first() else {
            return Ok(());
        };
        let limit = self.limit;
        let ordered = self.live() + assignments.len();
        if ordered > limit {
            let error =
                anyhow!("the launcher ordered {ordered} ranks, and this machine has {limit}");
            let rank = first.rank;
            return Err(FailedStart { rank, error });
        }
        for assignment in assignments {
            let rank = assignment.rank;
            let secret = secret.clone();
            let input = RankInput { assignment, secret };
            let line = serde_json::to_string(&input).expect("plain data");
            let assigned = AssignedRank { rank, line };
            match self.take_standby() {
                Some(child) => self.assign(child, &assigned)?,
                None => self.starting.push_back(Starting::Rank(assigned)),
            }
        }
        Ok(())
    }

    /// True if ranks or standby processes have been ordered that have not come yet.
    pub(super) fn are_starting(&self) -> bool {
        !self.starting.is_empty()
    }

    /// Puts processes to use that have been started, and starts more.
    ///
    /// # Errors
    /// If a rank cannot be started, or exits at once.
    pub(super) fn advance(&mut self) -> Result<(), FailedStart> {
        self.drop_unordered();
        let deadline = Instant::now() + START_WAIT;
        while !self.starting.is_empty() && Instant::now() < deadline {
            let next = self.source.next(self.starting.len(), deadline);
            let Some(child) = next.transpose() else {
                break;
            };
            match (child, self.starting.pop_front()) {
                (Ok(child), Some(Starting::Rank(assigned))) => self.assign(child, &assigned)?,
                (Ok(child), Some(Starting::Standby)) => self.standby.push(child),
                (Ok(child), Some(Starting::Unwanted) | None) => self.end(vec![child]),
                (Err(error), Some(Starting::Rank(AssignedRank { rank, .. }))) => {
                    return Err(FailedStart { rank, error });
                }
                (Err(error), _) => {
                    // Best effort: without them a restart is slower.
                    eprintln!("warning: no standby process: {error:#}");
                    self.starting
                        .retain(|starting| matches!(starting, Starting::Rank(_)));
                }
            }
        }
        Ok(())
    }

    fn assign(&mut self, mut child: RankChild, assigned: &AssignedRank) -> Result<(), FailedStart> {
        let AssignedRank { rank, line } = assigned;
        let rank = *rank;
        let sent = child.assign(line);
        self.children.push(RankProcess {
            rank,
            child,
            report: None,
        });
        let sent = sent.with_context(|| format!("rank {rank} exited before it got its assignment"));
        sent.map_err(|error| FailedStart { rank, error })
    }

    /// Returns a standby process that is still alive.
    fn take_standby(&mut self) -> Option<RankChild> {
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
        let is_standby = |starting: &&Starting| matches!(starting, Starting::Standby);
        let starting = self.starting.iter().filter(is_standby).count();
        let missing = count
            .min(self.limit)
            .saturating_sub(self.standby.len() + starting);
        self.starting
            .extend(std::iter::repeat_with(|| Starting::Standby).take(missing));
    }

    /// Number of processes that run or start, killed ones included until they have ended.
    pub(super) fn running(&mut self) -> usize {
        self.dying.retain_mut(|child| !has_ended(child));
        let dying = self.dying.iter();
        let dying = dying.filter(|child| !has_only_blocked_threads(child.id()));
        dying.count() + self.live()
    }

    /// Number of ranks that run or start.
    fn live(&mut self) -> usize {
        let is_rank = |starting: &&Starting| matches!(starting, Starting::Rank(_));
        self.starting.iter().filter(is_rank).count() + self.live_children()
    }

    fn live_children(&mut self) -> usize {
        let children = self.children.iter_mut();
        let live = children.filter_map(|process| (!has_ended(&mut process.child)).then_some(()));
        live.count()
    }

    pub(super) fn num_failed(&mut self) -> usize {
        let statuses = self.children.iter_mut();
        let statuses = statuses.filter_map(|process| process.child.try_wait().ok()?);
        statuses.filter(|status| !status.success()).count()
    }

    /// Returns the ranks that have failed, with the reports that they left. Reads each of these
    /// once.
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
            child.signal(signal);
        }
    }

    /// Kills every rank, but no standby process.
    pub(super) fn kill(&mut self) {
        let children = self.children.drain(..);
        let children: Vec<RankChild> = children.map(|process| process.child).collect();
        self.end(children);
        for starting in &mut self.starting {
            if matches!(starting, Starting::Rank(_)) {
                *starting = Starting::Unwanted;
            }
        }
        self.drop_unordered();
    }

    /// Also kills the standby processes.
    pub(super) fn kill_all(&mut self) {
        for starting in &mut self.starting {
            *starting = Starting::Unwanted;
        }
        self.kill();
        let standby = std::mem::take(&mut self.standby);
        self.end(standby);
    }

    /// Forgets unwanted processes that the source was not asked for yet.
    fn drop_unordered(&mut self) {
        let mut ordered = self.source.ordered();
        self.starting.retain(|starting| {
            let is_ordered = ordered > 0;
            ordered = ordered.saturating_sub(1);
            is_ordered || !matches!(starting, Starting::Unwanted)
        });
    }

    fn end(&mut self, children: Vec<RankChild>) {
        for child in children {
            child.signal(Signal::SIGKILL);
            // Waiting could take for ever: the kernel may block the process.
            self.dying.push(child);
        }
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        self.kill_all();
        let began = Instant::now();
        while self.running() + self.starting.len() > 0 && began.elapsed() < END_TIMEOUT {
            // Nothing is wanted, so nothing can be missing.
            let _ = self.advance();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// True if a process was waited for. One that cannot be waited for counts as running until it can.
fn has_ended(child: &mut RankChild) -> bool {
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
    let mut report: FailureReport = serde_json::from_slice(&text).ok()?;
    if let Some((end, _)) = report.message.char_indices().nth(MAX_MESSAGE_CHARS) {
        report.message.truncate(end);
        report.message += " ... (the rank's log has the rest)";
    }
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
        let source = RankSource::without_server(rank_arguments(&args));
        let mut none = RankProcesses::new(source, folder.path(), 0);
        none.stand_by(1_000_000_000);
        assert!(none.standby.is_empty() && none.starting.is_empty());
        let assignment = serde_json::json!({
            "rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1,
            "store": "127.0.0.1:1", "address": null, "generation": 0, "keeper": null,
            "skipped_batches": {}, "config": "",
        });
        let assignment = serde_json::from_value(assignment).unwrap();
        let secret = Secret::random().unwrap();
        let failed = none.start(vec![assignment], &secret).err().unwrap();
        let expected = "the launcher ordered 1 ranks, and this machine has 0";
        assert_eq!(failed.error.to_string(), expected);
        assert!(none.children.is_empty() && none.starting.is_empty());
    }
}
