//! Everything that the engine learns, besides the time.

use super::{keepers::KeeperId, ranks::RankReport, requests::RequestId};
use crate::registry::KeeperEntry;
use checkpoint::keeper::{self, Inventory};
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// A process received a signal that asks for the run's end; `count` such signals so far.
    Stop {
        source: Source,
        signal: i32,
        count: usize,
    },
    /// A process received SIGUSR1: a checkpoint is wanted, and training continues.
    CheckpointWanted,
    MachineJoined {
        machine: usize,
        host: Host,
        /// Keepers that the agent kept alive while it had no launcher.
        keepers: Vec<KeeperEntry>,
    },
    /// The connection to an agent ended, for this reason.
    MachineLost { machine: usize, reason: String },
    /// State of a machine's ranks. Also a sign of life.
    Ranks { machine: usize, report: RankReport },
    /// A sign of life.
    Heartbeat { machine: usize },
    Keeper {
        keeper: KeeperId,
        event: keeper::Event,
    },
    /// The connection to a keeper ended.
    KeeperGone { keeper: KeeperId, failed: Failed },
    Reply {
        id: RequestId,
        reply: Result<Answer, Failed>,
    },
}

/// The process that received a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    Launcher,
    Agent(usize),
    Keeper(KeeperId),
    Rank(usize),
}

/// A machine, by more than its number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Host {
    /// Address for the other machines; None in a run on one machine.
    pub(crate) address: Option<IpAddr>,
    /// Distinguishes machines whose addresses change.
    pub(crate) identity: String,
}

#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Done,
    KeeperStarted {
        pid: i32,
        address: SocketAddr,
    },
    Inventory(Inventory),
    /// Rank and number of each damaged chunk.
    Damaged(Vec<(usize, u64)>),
    Written(SavedCheckpoint),
    /// The newest checkpoint that can be read, if there is one.
    Surveyed(Option<SavedCheckpoint>),
}

/// A checkpoint on disk that can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SavedCheckpoint {
    pub(crate) step: u64,
    pub(crate) path: PathBuf,
}

/// A request without an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The recipient is well, but cannot do this.
    Refused(String),
    /// The recipient is gone.
    Lost(String),
    /// The recipient did not answer in time, and may be out of reach.
    Silent(String),
}

impl Failed {
    pub(crate) fn reason(&self) -> &str {
        match self {
            Failed::Refused(reason) | Failed::Lost(reason) | Failed::Silent(reason) => reason,
        }
    }
}
