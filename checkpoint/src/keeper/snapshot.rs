//! Snapshots and their parts, without the bytes.

use super::topology::Topology;
use serde::{Deserialize, Serialize};

/// The name of a snapshot. Names are ordered by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId {
    /// The attempt of the run. A step that is repeated after a restart gives another snapshot.
    pub generation: u64,
    /// Optimizer steps that were done.
    pub step: u64,
}

/// The length and the checksums of a rank's part of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartInfo {
    /// The rank that made the part.
    pub rank: usize,
    pub bytes: u64,
    /// The CRC-32C of each chunk.
    pub crcs: Vec<u32>,
}

/// A complete snapshot: everything that is known of it besides its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    /// The topology in which the snapshot was made.
    pub topology: Topology,
    /// The parts by rank.
    pub parts: Vec<PartInfo>,
}
