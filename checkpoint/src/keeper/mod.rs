//! The keeper: a process beside the ranks of a node that owns the memory in which their snapshots are.
//!
//! REFT's snapshot management process (arXiv 2310.12670): ranks copy their state into its memory, two or three slots
//! each, and go on; keepers of different nodes keep parity of one another's slots ([`crate::stripes`]). It outlives
//! the ranks and the launcher. A part of a snapshot is a safetensors image, so a snapshot is a checkpoint in memory, read
//! by the same code as one on disk, and written there by the keeper as it is.
//!
//! - [`serve`](serve::run): the process. [`KeeperClient`]: how a rank reaches it. [`Peer`]: how the launcher and other keepers do.
//! - [`recover`]: what can be restored from what is left, a pure function.
//!
//! Invariants:
//! - A rank never waits for a keeper: what is not there at once is skipped and counted.
//! - A snapshot is used only if every rank's part is there with its checksums, or can be rebuilt.
//! - Nobody is listened to who does not know the run's secret.

mod client;
mod connection;
mod memory_limit;
mod persist;
mod protect;
pub mod recover;
mod restore;
pub mod serve;
mod slots;
mod wire;

pub use client::{FillReporter, KeeperClient, SlotMemory};
pub use connection::{EventStream, Peer};
pub use memory_limit::format_mib;
pub use slots::PartInfo;
pub use wire::Secret;

use crate::Shard;
use crate::stripes::{Redundancy, Stripes};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Bytes of a chunk of a snapshot, where nobody asks for others: it stays in the cache while it is copied, checked and coded.
pub const DEFAULT_CHUNK_BYTES: usize = 256 << 10;

/// Which snapshot: the attempt that made it, and the steps done. Ordered by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId {
    /// Attempt of the run: a step that is done again after a restart is another snapshot.
    pub generation: u64,
    /// Optimizer steps done.
    pub step: u64,
}

/// A node of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Where its keeper listens.
    pub address: SocketAddr,
    /// The ranks on it, in the order of their local numbers.
    pub ranks: Vec<usize>,
}

/// Who is where, and who protects whom, during one generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// The attempt it belongs to.
    pub generation: u64,
    /// The nodes with ranks.
    pub nodes: Vec<Node>,
    /// How they protect one another.
    pub redundancy: Redundancy,
    /// Groups of nodes ([`crate::redundancy_groups`]).
    pub groups: Vec<Vec<usize>>,
    /// Bytes of a chunk, the unit of checksums and of coding.
    pub chunk: usize,
}

/// Where a rank's part is in the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CodePosition {
    pub(crate) group: usize,
    pub(crate) position: usize,
    /// The rank's number on its node: ranks of one number are coded with one another.
    pub(crate) local: usize,
}

impl Topology {
    /// Ranks of the run.
    pub fn ranks(&self) -> usize {
        self.nodes.iter().map(|node| node.ranks.len()).sum()
    }

    /// The node of a rank.
    pub fn node_of(&self, rank: usize) -> Option<usize> {
        self.nodes
            .iter()
            .position(|node| node.ranks.contains(&rank))
    }

    /// Group and position in it of a node.
    pub(crate) fn position(&self, node: usize) -> Option<(usize, usize)> {
        let found = self.groups.iter().enumerate();
        found
            .filter_map(|(group, nodes)| {
                Some((group, nodes.iter().position(|&other| other == node)?))
            })
            .next()
    }

    pub(crate) fn code_position(&self, rank: usize) -> Option<CodePosition> {
        let node = self.node_of(rank)?;
        let (group, position) = self.position(node)?;
        let local = self.nodes[node]
            .ranks
            .iter()
            .position(|&other| other == rank)?;
        Some(CodePosition {
            group,
            position,
            local,
        })
    }

    /// The rank at a position of a group, with this local number.
    pub(crate) fn rank_at(&self, group: usize, position: usize, local: usize) -> Option<usize> {
        self.nodes[self.groups[group][position]]
            .ranks
            .get(local)
            .copied()
    }

    /// The stripes of a group's ranks with one local number; None where nothing is protected.
    pub(crate) fn stripes(&self, group: usize, local: usize) -> Option<Stripes> {
        let nodes = self.groups[group].len();
        let parity = self.redundancy.survives();
        (parity > 0).then(|| Stripes {
            nodes,
            parity,
            rotation: local % nodes,
        })
    }
}

/// All that is known of a complete snapshot besides its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Which.
    pub id: SnapshotId,
    /// Who was where when it was made.
    pub topology: Topology,
    /// The parts, by rank.
    pub parts: Vec<PartInfo>,
}

/// What a keeper has, for the one who decides what to restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Which node it was in which generation.
    pub memberships: Vec<(Topology, usize)>,
    /// Complete parts in its memory.
    pub parts: Vec<(SnapshotId, PartInfo)>,
    /// Snapshots of which it has all the parity that it should.
    pub protected: Vec<SnapshotId>,
    /// Snapshots that were complete on every rank.
    pub complete: Vec<Snapshot>,
}

/// A rank as its keeper sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankStatus {
    /// Which.
    pub rank: usize,
    /// Its process.
    pub pid: i32,
    /// Steps done, as it last said.
    pub step: u64,
    /// How often it said that it gets on, within a step too.
    pub progress: u64,
    /// Milliseconds since it was last heard of.
    pub silent_ms: u64,
}

/// What a keeper tells the launcher of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A rank's part is complete.
    Complete {
        /// Of which snapshot.
        id: SnapshotId,
        /// The part.
        part: PartInfo,
        /// Whether the snapshot is to be written to disk.
        durable: bool,
    },
    /// All parity that this keeper encodes for a snapshot is in its place.
    Protected {
        /// Of which snapshot.
        id: SnapshotId,
    },
    /// It could not be made.
    Unprotected {
        /// Of which snapshot.
        id: SnapshotId,
        /// Why not.
        reason: String,
    },
    /// A sign of life, with what is known of the ranks.
    Heartbeat {
        /// The ranks.
        ranks: Vec<RankStatus>,
    },
}

/// What is not what it was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// Rank and number of each chunk of a part.
    pub chunks: Vec<(usize, u64)>,
    /// Parities.
    pub parities: u64,
}

/// What people want to know of a keeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its process.
    pub pid: i32,
    /// Its ranks.
    pub ranks: Vec<RankStatus>,
    /// Bytes of its slots.
    pub slot_bytes: u64,
    /// Bytes of parity.
    pub parity_bytes: u64,
    /// What it has.
    pub inventory: Inventory,
    /// Parts that are being filled.
    pub filling: Vec<SnapshotId>,
    /// Snapshots that a rank here could not take for want of a free slot.
    pub skipped: u64,
    /// CPU time that coding took, in milliseconds.
    pub coding_ms: u64,
}

/// A fault to be made on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// A signal for a rank's process: `SIGKILL`, `SIGSTOP`, `SIGABRT`, by number.
    Signal {
        /// The rank.
        rank: usize,
        /// The signal.
        signal: i32,
    },
    /// Stops a rank and lets it go on later.
    Delay {
        /// The rank.
        rank: usize,
        /// For how long.
        ms: u64,
    },
    /// Changes one bit of a rank's newest complete part.
    Corrupt {
        /// The rank.
        rank: usize,
        /// Which byte, modulo its length.
        at: u64,
    },
    /// Makes the first values of a rank's newest complete part be not a number, with checksums that fit: whole, and of no use.
    Poison {
        /// The rank.
        rank: usize,
    },
    /// All ranks of the node and the keeper itself, at once.
    KillNode,
}

/// What is asked of a keeper, each with one [`Reply`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Request {
    /// A new generation, in which the keeper is `node`.
    Setup {
        topology: Topology,
        node: usize,
    },
    /// Events from here on; the launcher lives as long as this connection.
    Subscribe,
    Inventory,
    Status,
    /// A snapshot is complete on every rank.
    Commit(Snapshot),
    /// It never will be.
    Abandon(SnapshotId),
    /// Only this one is wanted any more; `holders` have its parts, by rank.
    Keep {
        snapshot: Option<Snapshot>,
        holders: Vec<SocketAddr>,
    },
    /// Which chunks of the parts here are not what they were.
    Verify(SnapshotId),
    /// Length of a rank's part, as soon as it is known.
    Length {
        id: SnapshotId,
        rank: usize,
    },
    /// A chunk, as soon as it is there.
    Chunk {
        id: SnapshotId,
        rank: usize,
        chunk: u64,
    },
    /// The first bytes of a part.
    Header {
        id: SnapshotId,
        rank: usize,
    },
    /// Parity of a stripe.
    Parity {
        id: SnapshotId,
        local: usize,
        stripe: u64,
    },
    /// The same, to be kept.
    PutParity {
        id: SnapshotId,
        local: usize,
        stripe: u64,
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// Make a part, or bad chunks of one, out of what the group's other positions have.
    Rebuild(Box<recover::Rebuild>),
    /// Encode again what this node should have of a snapshot.
    Protect {
        snapshot: Snapshot,
        node: usize,
        sources: Vec<Option<SocketAddr>>,
    },
    /// Keep the parts of a complete snapshot until they are written to disk, or released.
    Pin(SnapshotId),
    Unpin,
    /// Write these ranks' parts to files in this folder.
    Persist {
        id: SnapshotId,
        ranks: Vec<usize>,
        folder: PathBuf,
    },
    Inject(Fault),
    /// The run is over.
    Stop,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    Refused(String),
    Inventory(Inventory),
    Status(Status),
    Damage(Damage),
    Length(u64),
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    Shards(Vec<Shard>),
}

/// What a rank says to its keeper.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum RankRequest {
    /// Who it is.
    Hello { rank: usize },
    /// Slots of this many bytes: [`RankReply::Slots`], then as many files.
    Allocate { bytes: u64, slots: usize },
    /// A slot for a snapshot: [`RankReply::Slot`].
    Reserve {
        id: SnapshotId,
        bytes: u64,
        durable: bool,
    },
    /// It is not needed. No reply.
    Release { slot: usize },
    /// Bytes are there. No reply.
    Filled {
        slot: usize,
        filled_to: u64,
        crcs: Vec<u32>,
    },
    /// It lives, has done so many steps, and got on so often. No reply.
    Heartbeat { step: u64, progress: u64 },
    /// Has all been heard? [`RankReply::Ack`].
    Sync,
    /// The first bytes of a part of the snapshot to restore: [`RankReply::Bytes`].
    Header { rank: usize },
    /// The whole part: [`RankReply::Part`], then a file.
    Open { rank: usize },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum RankReply {
    Ack,
    Slots(usize),
    Slot(Option<usize>),
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    Part,
    Refused(String),
}

/// What went wrong with a keeper.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection failed.
    #[error("{}", describe(.0))]
    Connection(#[from] std::io::Error),
    /// The peer said something that makes no sense.
    #[error("{0}")]
    Protocol(String),
    /// The peer does not know the run's secret.
    #[error("it is not of this run")]
    Unauthenticated,
    /// The keeper cannot do what was asked.
    #[error("{0}")]
    Refused(String),
}

fn describe(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => "no answer in time".into(),
        std::io::ErrorKind::UnexpectedEof => "the connection was closed".into(),
        _ => error.to_string(),
    }
}

impl From<nix::Error> for Error {
    fn from(error: nix::Error) -> Error {
        Error::Connection(error.into())
    }
}
