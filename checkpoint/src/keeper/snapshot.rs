//! Snapshots and their parts, without the bytes.

use super::{digest::ChecksumDigest, shared::Shared, topology::Topology};
use serde::{Deserialize, Serialize};

/// The name of a snapshot. Names are ordered by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId {
    /// The attempt of the run. A step that is repeated after a restart gives another snapshot.
    pub generation: u64,
    /// Optimizer steps that were done.
    pub step: u64,
}

/// A rank's part of a snapshot, as messages describe it: about 30 bytes, whatever its length.
///
/// The checksums of its chunks stay with the keepers that have the part or protect it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartInfo {
    /// The rank that made the part.
    pub rank: usize,
    pub bytes: u64,
    /// Stands for the checksums of all chunks.
    pub digest: ChecksumDigest,
}

/// A complete snapshot: everything that is known of it besides bytes and checksums. Its clones
/// share one value.
pub type Snapshot = Shared<SnapshotContents>;

/// The contents of a [`Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotContents {
    pub id: SnapshotId,
    /// The topology in which the snapshot was made.
    pub topology: Shared<Topology>,
    /// The parts by rank.
    pub parts: Vec<PartInfo>,
}
