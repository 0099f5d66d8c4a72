//! Reports of a keeper about itself and its ranks.

use super::{
    identity::Identity,
    shared::Shared,
    snapshot::{PartInfo, Snapshot, SnapshotId},
    topology::Topology,
};
use crate::secure::RefusalCounts;
use serde::{Deserialize, Serialize};

/// The contents of a keeper, by which the launcher decides which snapshot to restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    pub identity: Identity,
    /// Topologies of the run, each with the number of the keeper's node in it.
    pub memberships: Vec<(Shared<Topology>, usize)>,
    /// The complete parts in the keeper's memory.
    pub parts: Vec<(SnapshotId, PartInfo)>,
    /// Snapshots of which the keeper has all the parity that belongs to it.
    pub protected: Vec<SnapshotId>,
    /// Snapshots that were complete on every rank.
    pub complete: Vec<Snapshot>,
}

/// A rank as its keeper sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankStatus {
    pub rank: usize,
    pub pid: i32,
    /// The last step that the rank reported as done.
    pub step: u64,
    /// The number of reports of progress, which a rank also makes within a step.
    pub progress: u64,
    /// Milliseconds since the rank's last message.
    pub silent_ms: u64,
}

/// Something that a keeper reports to the launcher without being asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A rank's part is complete.
    Complete {
        id: SnapshotId,
        part: PartInfo,
        /// True if the snapshot shall be written to disk.
        durable: bool,
    },
    /// All parity that this keeper encodes for a snapshot is where it belongs.
    Protected { id: SnapshotId },
    /// The parity of a snapshot could not be made.
    Unprotected { id: SnapshotId, reason: String },
    /// The keeper is alive and sees these ranks.
    Heartbeat { ranks: Vec<RankStatus> },
    /// The keeper received a signal. `SIGTERM`, `SIGUSR2` and `SIGXCPU` ask for the end of the run,
    /// `SIGUSR1` for a checkpoint. The keeper stays while a launcher is connected.
    StopRequested { signal: i32 },
}

/// Bytes that do not match their checksums.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The rank and the number of each damaged chunk.
    pub chunks: Vec<(usize, u64)>,
    /// The number of damaged parities.
    pub parities: u64,
}

/// The connections that a keeper refused since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperRefusals {
    /// Connections at the TCP port.
    pub peers: RefusalCounts,
    /// Connections at the Unix socket for ranks.
    pub ranks: RefusalCounts,
}

/// The state of a keeper, as `moerun snapshot status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The process of the keeper.
    pub pid: i32,
    pub ranks: Vec<RankStatus>,
    /// The memory of all slots.
    pub slot_bytes: u64,
    /// The memory of all parity.
    pub parity_bytes: u64,
    pub inventory: Inventory,
    /// The snapshots of parts that are being filled.
    pub filling: Vec<SnapshotId>,
    /// The number of times that a rank here found no free slot.
    pub skipped: u64,
    /// The number of headers that ranks here asked for, to restore a snapshot.
    pub header_requests: u64,
    /// The CPU time of coding, in milliseconds.
    pub coding_ms: u64,
    pub refusals: KeeperRefusals,
    /// The signal that asked the keeper to end.
    pub stop_signal: Option<i32>,
}
