//! Everything that the engine has done for it.

use super::{
    keepers::KeeperId, problem::Problem, requests::RequestId, restart_record::RestartRecord,
};
use crate::{protocol::Assignment, registry::KeeperRegistry};
use checkpoint::keeper::{Snapshot, SnapshotId, Topology, recover::Rebuild};
use std::net::SocketAddr;

#[derive(Debug, Clone)]
pub(crate) enum Command {
    /// Start the process of a keeper, under a name for its ranks.
    StartKeeper {
        id: RequestId,
        machine: usize,
        node: usize,
        socket: String,
        memory: Option<u64>,
    },
    KillKeeper {
        machine: usize,
        pid: i32,
    },
    ConnectKeeper {
        id: RequestId,
        keeper: KeeperId,
        address: SocketAddr,
    },
    DisconnectKeeper {
        keeper: KeeperId,
    },
    AskKeeper {
        id: RequestId,
        keeper: KeeperId,
        request: KeeperRequest,
    },
    /// Start ranks. Reports with a smaller number concern earlier ones.
    StartRanks {
        machine: usize,
        number: u64,
        assignments: Vec<Assignment>,
    },
    StandBy {
        machine: usize,
        count: usize,
    },
    SignalRanks {
        machine: usize,
        signal: i32,
    },
    KillRanks {
        machine: usize,
        number: u64,
        standby: bool,
    },
    /// End the connection to a machine that is silent.
    DropMachine {
        machine: usize,
    },
    WriteCheckpoint {
        id: RequestId,
        snapshot: SnapshotId,
        shares: Vec<KeeperShare>,
    },
    Survey {
        id: RequestId,
    },
    /// Write the registry, or remove it.
    SaveRegistry {
        id: RequestId,
        registry: Option<KeeperRegistry>,
    },
    RecordRestart(RestartRecord),
    Print(String),
    /// Only to the log.
    Log(String),
    Exit {
        status: u8,
        problem: Option<Problem>,
    },
}

/// The ranks whose parts of a checkpoint one keeper writes.
#[derive(Debug, Clone)]
pub(crate) struct KeeperShare {
    pub(crate) keeper: KeeperId,
    pub(crate) ranks: Vec<usize>,
}

#[derive(Debug, Clone)]
pub(crate) enum KeeperRequest {
    Inventory,
    SetUp {
        topology: Topology,
        node: usize,
    },
    Commit(Snapshot),
    Abandon(SnapshotId),
    Pin(SnapshotId),
    Unpin,
    SelectRestore {
        snapshot: Option<Snapshot>,
        holders: Vec<SocketAddr>,
    },
    Stop,
    /// Long requests have a connection of their own.
    Verify(SnapshotId),
    Rebuild(Vec<Rebuild>),
    Protect {
        snapshot: Snapshot,
        node: usize,
        sources: Vec<Option<SocketAddr>>,
    },
}
