//! The messages of a keeper. Bincode encodes a variant by its position, so order is protocol.

use super::{
    fault::Fault,
    recover::Rebuild,
    report::{Damage, Inventory, Status},
    snapshot::{Snapshot, SnapshotId},
    topology::Topology,
};
use crate::Shard;
use serde::{Deserialize, Serialize};
use std::{net::SocketAddr, path::PathBuf};

/// A request of the launcher, another keeper or a tool. Each has one [`Reply`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Request {
    /// Begins a generation, in which the keeper is node `node`.
    Setup {
        topology: Topology,
        node: usize,
    },
    /// Turns the connection into a stream of events for the launcher with this number. The
    /// launcher lives as long as its stream.
    Subscribe {
        launcher: u64,
    },
    Inventory,
    Status,
    /// Declares a snapshot complete on every rank.
    Commit(Snapshot),
    /// Declares that a snapshot will never be complete.
    Abandon(SnapshotId),
    /// Selects the snapshot that ranks restore and forgets newer ones. `holders` have the parts,
    /// by rank.
    SelectRestore {
        snapshot: Option<Snapshot>,
        holders: Vec<SocketAddr>,
    },
    /// Compares the parts and the parity of a snapshot with their checksums.
    Verify(SnapshotId),
    /// Returns the length of a rank's part, as soon as it is known.
    Length {
        id: SnapshotId,
        rank: usize,
    },
    /// Returns a chunk, as soon as it is filled.
    Chunk {
        id: SnapshotId,
        rank: usize,
        chunk: u64,
    },
    /// Returns the checksums of a complete part that is here or protected here.
    Checksums {
        id: SnapshotId,
        rank: usize,
        /// True for a part that is still being filled, which the reply then waits for.
        waits: bool,
    },
    /// Returns the first bytes of a part, up to the first tensor.
    Header {
        id: SnapshotId,
        rank: usize,
    },
    /// Returns the parity of a stripe.
    Parity {
        id: SnapshotId,
        local: usize,
        stripe: u64,
    },
    /// Stores the parity of a stripe.
    PutParity {
        id: SnapshotId,
        local: usize,
        stripe: u64,
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Rebuilds a part, or damaged chunks of it, from the other positions of the group.
    Rebuild(Box<Rebuild>),
    /// Encodes again what this node should have of a snapshot.
    Protect {
        snapshot: Snapshot,
        node: usize,
        sources: Vec<Option<SocketAddr>>,
    },
    /// Keeps the parts of a complete snapshot until they are written to disk, or unpinned.
    Pin(SnapshotId),
    Unpin,
    /// Writes the parts of these ranks to files in a folder.
    Persist {
        id: SnapshotId,
        ranks: Vec<usize>,
        folder: PathBuf,
    },
    Inject(Fault),
    Stop,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    Refused(String),
    Inventory(Box<Inventory>),
    Status(Box<Status>),
    Damage(Damage),
    Length(u64),
    Checksums(Vec<u32>),
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    Shards(Vec<Shard>),
}

/// A message of a rank to the keeper of its node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum RankRequest {
    /// Names the rank and its session; the first message of a connection.
    Hello { rank: usize, session: u64 },
    /// Allocates slots of this size: [`RankReply::Slots`], then a file for each.
    Allocate { bytes: u64, slots: usize },
    /// Reserves a slot for a snapshot: [`RankReply::Slot`].
    Reserve {
        id: SnapshotId,
        bytes: u64,
        durable: bool,
    },
    /// Returns a reserved slot that is not needed. No reply.
    Release { slot: usize },
    /// Reports filled bytes and the checksums of the chunks completed since. No reply.
    Filled {
        slot: usize,
        filled_to: u64,
        crcs: Vec<u32>,
    },
    /// Reports the steps done and a counter of progress. No reply.
    Heartbeat { step: u64, progress: u64 },
    /// Asks whether the rank's part of a snapshot is complete, after the earlier messages of this
    /// connection: [`RankReply::Complete`].
    IsComplete { id: SnapshotId },
    /// Returns the first bytes of a part of the snapshot to restore: [`RankReply::Bytes`].
    Header { rank: usize },
    /// Opens such a part: [`RankReply::Part`], then a file.
    Open { rank: usize },
}

impl RankRequest {
    /// True if the sender waits for a reply. A refusal of another request would be taken for the
    /// reply to a later one.
    pub(super) fn has_reply(&self) -> bool {
        match self {
            RankRequest::Release { .. }
            | RankRequest::Filled { .. }
            | RankRequest::Heartbeat { .. } => false,
            RankRequest::Hello { .. }
            | RankRequest::Allocate { .. }
            | RankRequest::Reserve { .. }
            | RankRequest::IsComplete { .. }
            | RankRequest::Header { .. }
            | RankRequest::Open { .. } => true,
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum RankReply {
    Ack,
    Slots(usize),
    Slot(Option<usize>),
    Complete(bool),
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    Part,
    Refused(String),
}
