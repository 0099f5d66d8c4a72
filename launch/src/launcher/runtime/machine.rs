//! Carries out the launcher's commands on one machine: starts and ends its ranks and keepers.

use super::{
    machine_protocol::{MachineCommand, MachineReport, StartedKeeper},
    processes::{FailedStart, RankProcesses, rank_arguments},
    queue::Queue,
    rank_source::RankSource,
    spawn::{kill_earlier_keeper, real_logs, spawn_keeper},
};
use crate::{
    cli::TrainArgs,
    hint,
    keeper::KeeperSettings,
    launcher::engine::ranks::{FailedRank, RankReport},
    protocol::Assignment,
    registry::KeeperEntry,
};
use checkpoint::secure::Secret;
use nix::sys::signal::Signal;
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

/// The time after which a keeper or an agent without a launcher exits.
pub(super) const ORPHAN_TIMEOUT: Duration = Duration::from_secs(3600);

/// The time between two looks at ranks and keepers.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The time between two looks while ranks start, for which a run waits.
const STARTING_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// A keeper that this process has started.
struct OwnKeeper {
    child: Child,
    entry: KeeperEntry,
}

/// The result of starting a keeper, from the thread that waited for it.
struct KeeperResult {
    request: u64,
    started: Result<OwnKeeper, String>,
}

pub(super) struct Machine {
    dir: PathBuf,
    /// See [`real_logs`]; found at the start, because the disk may hang later.
    logs: Option<PathBuf>,
    secret: Secret,
    /// Address for other machines; None in a run on one machine.
    address: Option<IpAddr>,
    ranks: RankProcesses,
    keepers: Vec<OwnKeeper>,
    started: Queue<KeeperResult>,
    /// Number of the last command about ranks.
    number: u64,
    /// The reason why ranks could not be started.
    start_error: Option<FailedRank>,
    reported: Option<RankCounts>,
}

/// The part of a [`RankReport`] that a new report is sent for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct RankCounts {
    number: u64,
    running: usize,
    failed: usize,
}

impl Machine {
    /// Starts at most `rank_limit` ranks at a time.
    pub(super) fn new(
        args: &TrainArgs,
        dir: &Path,
        secret: Secret,
        address: Option<IpAddr>,
        rank_limit: usize,
    ) -> Machine {
        let source = RankSource::start(rank_arguments(args));
        Machine {
            dir: dir.to_path_buf(),
            logs: real_logs(dir),
            secret,
            address,
            ranks: RankProcesses::new(source, dir, rank_limit),
            keepers: Vec::new(),
            started: Queue::new(),
            number: 0,
            start_error: None,
            reported: None,
        }
    }

    pub(super) fn handle(&mut self, command: MachineCommand) {
        match command {
            MachineCommand::StartRanks {
                number,
                assignments,
            } => {
                self.number = number;
                self.start_error = None;
                self.start_ranks(assignments);
            }
            MachineCommand::StandBy { count } => self.ranks.stand_by(count),
            MachineCommand::SignalRanks { signal } => {
                if let Ok(signal) = Signal::try_from(signal) {
                    self.ranks.signal(signal);
                }
            }
            MachineCommand::KillRanks { number, standby } => {
                self.number = number;
                self.start_error = None;
                if standby {
                    self.ranks.kill_all();
                } else {
                    self.ranks.kill();
                }
            }
            MachineCommand::StartKeeper {
                request,
                node,
                socket,
                memory,
            } => {
                let settings = self.keeper_settings(socket, memory);
                self.start_keeper(request, node, settings);
            }
            MachineCommand::KillKeeper { pid } => self.kill_keeper(pid),
            MachineCommand::Heartbeat | MachineCommand::End { .. } => {}
        }
    }

    fn start_ranks(&mut self, assignments: Vec<Assignment>) {
        let ordered = self.ranks.start(assignments, &self.secret);
        let started = ordered.and_then(|()| self.ranks.advance());
        self.note_start(started);
    }

    fn note_start(&mut self, started: Result<(), FailedStart>) {
        if let Err(FailedStart { rank, error }) = started {
            // The launcher sees a failed rank, and restarts it or gives up.
            eprintln!("error: {}", hint::message(&error));
            self.ranks.kill();
            self.start_error = Some(FailedRank {
                rank,
                status: 1 << 8,
                report: None,
                lost: Some(format!("{error:#}")),
            });
        }
    }

    fn keeper_settings(&self, socket: String, memory: Option<u64>) -> KeeperSettings {
        let address = self.address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        KeeperSettings {
            socket,
            secret: self.secret.clone(),
            listen: SocketAddr::new(address, 0),
            memory,
            orphan_timeout_s: ORPHAN_TIMEOUT.as_secs(),
        }
    }

    /// Waits for a keeper's answer in a thread of its own.
    fn start_keeper(&mut self, request: u64, node: usize, settings: KeeperSettings) {
        let dir = self.dir.clone();
        let started = self.started.clone();
        let start = move || {
            let keeper = spawn_keeper(&dir, node, &settings).map(|(child, ready)| OwnKeeper {
                entry: KeeperEntry {
                    pid: child.id() as i32,
                    machine: 0,
                    address: ready.address,
                    socket: settings.socket.clone(),
                    identity: String::new(),
                },
                child,
            });
            let keeper = keeper.map_err(|error| format!("{error:#}"));
            started.push(KeeperResult {
                request,
                started: keeper,
            });
        };
        if let Err(error) = std::thread::Builder::new().spawn(start) {
            let reason = format!("cannot start a thread: {error}");
            self.started.push(KeeperResult {
                request,
                started: Err(reason),
            });
        }
    }

    fn kill_keeper(&mut self, pid: i32) {
        let mut keepers = self.keepers.iter_mut();
        match keepers.find(|keeper| keeper.child.id() as i32 == pid) {
            Some(OwnKeeper { child, .. }) => {
                let _ = child.kill();
                let _ = child.try_wait();
            }
            // Another process started it, which was killed.
            None => {
                if let Some(logs) = &self.logs {
                    kill_earlier_keeper(logs, pid);
                }
            }
        }
    }

    /// Returns the longest time to wait for a command before the next [`Machine::reports`].
    pub(super) fn poll_interval(&self) -> Duration {
        if self.ranks.are_starting() {
            STARTING_POLL_INTERVAL
        } else {
            POLL_INTERVAL
        }
    }

    /// Returns what has changed since the last call.
    pub(super) fn reports(&mut self) -> Vec<MachineReport> {
        let mut reports = Vec::new();
        let started = self.ranks.advance();
        self.note_start(started);
        while let Some(KeeperResult { request, started }) = self.started.pop_now() {
            let started = started.map(|keeper| {
                let started = StartedKeeper {
                    pid: keeper.entry.pid,
                    ready: crate::keeper::Ready {
                        address: keeper.entry.address,
                    },
                };
                self.keepers.push(keeper);
                started
            });
            reports.push(MachineReport::Keeper { request, started });
        }
        self.keepers
            .retain_mut(|keeper| !matches!(keeper.child.try_wait(), Ok(Some(_))));
        reports.extend(self.rank_report().map(MachineReport::Ranks));
        reports
    }

    fn rank_report(&mut self) -> Option<RankReport> {
        let running = self.ranks.running();
        let counts = RankCounts {
            number: self.number,
            running,
            failed: self.ranks.num_failed() + usize::from(self.start_error.is_some()),
        };
        if self.reported == Some(counts) {
            return None;
        }
        self.reported = Some(counts);
        let mut failed = self.ranks.failed();
        failed.extend(self.start_error.clone());
        Some(RankReport::new(self.number, running, failed))
    }

    /// Serves a new launcher: the next report contains everything again.
    pub(super) fn serve_another(&mut self, secret: Secret) {
        self.secret = secret;
        self.reported = None;
    }

    pub(super) fn kill_ranks(&mut self) {
        self.ranks.kill_all();
    }

    /// Keepers on this machine that still run.
    pub(super) fn keepers(&self) -> Vec<KeeperEntry> {
        let keepers = self.keepers.iter();
        keepers.map(|keeper| keeper.entry.clone()).collect()
    }
}
