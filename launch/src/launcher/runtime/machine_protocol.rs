//! Messages between the launcher and the machines of a run, its own included.

use crate::{
    keeper::Ready, launcher::engine::ranks::RankReport, protocol::Assignment, registry::KeeperEntry,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Interval of the signs of life in both directions.
pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// The first message of an agent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) machine: usize,
    /// Ranks that the agent's command line asks for.
    pub(super) ranks: usize,
    /// Must be the launcher's own: the protocol has no versions.
    pub(super) version: String,
    /// Distinguishes machines whose addresses change.
    pub(super) identity: String,
    /// Keepers that the agent kept alive while it had no launcher.
    pub(super) keepers: Vec<KeeperEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum HelloReply {
    Accepted {
        /// The time without a sign of life after which the other side is lost.
        timeout_s: f64,
    },
    /// Another agent with this number is connected. If it is gone, the launcher notices that after
    /// this time.
    Taken { timeout_s: f64 },
    /// The reason of the refusal.
    Refused(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum MachineCommand {
    /// Start these ranks. Reports with a smaller number concern earlier ones.
    StartRanks {
        number: u64,
        assignments: Vec<Assignment>,
    },
    /// Keep `count` standby processes.
    StandBy {
        count: usize,
    },
    /// Send the ranks a signal.
    SignalRanks {
        signal: i32,
    },
    /// Kill the ranks, and with `standby` also the standby processes.
    KillRanks {
        number: u64,
        standby: bool,
    },
    /// Start the keeper of `node`. The machine knows the run's secret, which is not sent.
    StartKeeper {
        request: u64,
        node: usize,
        socket: String,
        /// Bytes that the keeper may use.
        memory: Option<u64>,
    },
    KillKeeper {
        pid: i32,
    },
    /// A sign of life.
    Heartbeat,
    /// The run is over: exit with the launcher's status.
    End {
        status: u8,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum MachineReport {
    Ranks(RankReport),
    /// Reply to [`MachineCommand::StartKeeper`] with this number.
    Keeper {
        request: u64,
        started: Result<StartedKeeper, String>,
    },
    /// The agent received a signal to stop; `count` so far.
    Stop {
        signal: i32,
        count: usize,
    },
    /// The agent received SIGUSR1.
    CheckpointWanted,
    /// A sign of life.
    Heartbeat,
}

/// A keeper's process and its answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StartedKeeper {
    pub(super) pid: i32,
    pub(super) ready: Ready,
}
