//! Messages between the launcher and its ranks: assignments, failure reports and file names.

use checkpoint::keeper::SnapshotId;
use parallel::{RankEnv, Secret, StoreAccess};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};
use trainer::KeeperAccess;

/// The line on a rank's standard input that tells it which rank it is.
///
/// A process that waits for this line has already loaded everything, so a restart need not.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RankInput {
    pub(crate) assignment: Assignment,
    /// The run's secret, which each machine has: it is not sent to other machines.
    pub(crate) secret: Secret,
}

/// The launcher's part of a [`RankInput`]. It contains no secret.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Assignment {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// Number among the ranks of the same machine.
    pub(crate) local_rank: usize,
    pub(crate) local_world_size: usize,
    /// Address of the store that the launcher serves.
    pub(crate) store: SocketAddr,
    /// Address at which other machines reach the rank; None in a run on one machine.
    pub(crate) address: Option<IpAddr>,
    /// Counts from 1 in a run with keepers; 0 without.
    pub(crate) generation: u64,
    pub(crate) keeper: Option<AssignedKeeper>,
    /// Number of batches to skip before each step.
    pub(crate) skipped_batches: BTreeMap<u64, u64>,
    /// The configuration that the run was started with, as JSON. An edited file has no effect.
    pub(crate) config: String,
}

/// The keeper of a rank's node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct AssignedKeeper {
    /// Name of its socket.
    pub(crate) socket: String,
    /// Bytes of a chunk.
    pub(crate) chunk: usize,
    /// Snapshot to restore and its number of ranks.
    pub(crate) restore: Option<(SnapshotId, usize)>,
}

/// Returns the secret of the ranks' store, which ranks compute from the run's secret.
pub(crate) fn store_secret(secret: &Secret) -> Secret {
    secret.derive("store")
}

impl RankInput {
    pub(crate) fn env(&self) -> RankEnv {
        let assignment = &self.assignment;
        let store = StoreAccess {
            address: assignment.store,
            secret: store_secret(&self.secret),
        };
        RankEnv {
            local_rank: assignment.local_rank,
            local_world_size: assignment.local_world_size,
            address: assignment.address.map(|address| address.to_string()),
            attempt: assignment.generation as usize,
            ..RankEnv::single_node(assignment.rank, assignment.world_size, store)
        }
    }

    /// Returns what the rank's trainer needs to connect to the keeper of its node.
    pub(crate) fn keeper_access(&self) -> Option<KeeperAccess> {
        let keeper = self.assignment.keeper.clone()?;
        Some(KeeperAccess {
            socket: keeper.socket,
            secret: self.secret.clone(),
            generation: self.assignment.generation,
            chunk: keeper.chunk,
            restore: keeper.restore,
        })
    }
}

impl Assignment {
    /// True if the rank resumes from a snapshot, after a failure.
    pub(crate) fn is_restart(&self) -> bool {
        let keeper = self.keeper.as_ref();
        keeper.is_some_and(|keeper| keeper.restore.is_some())
    }
}

/// The file that a failing rank leaves for the launcher.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FailureReport {
    /// Process id of the rank: another one may have left the file.
    pub(crate) pid: u32,
    /// Nanoseconds since the epoch: the launcher shows the first failure.
    pub(crate) at: u64,
    pub(crate) message: String,
    pub(crate) kind: FailureKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FailureKind {
    /// A peer exited or did not answer.
    Peer,
    /// The loss of this step was not finite.
    Diverged { step: u64 },
    /// The rank could not read the snapshot to resume from.
    Restore,
    /// The rank itself failed, after this many steps of its generation.
    Own { steps: u64 },
}

pub(crate) fn log_path(run: &Path, rank: usize) -> PathBuf {
    run.join("logs").join(format!("rank-{rank}.log"))
}

/// Returns the path of the rank's flight recorder dump.
pub(crate) fn flight_path(run: &Path, rank: usize) -> PathBuf {
    run.join("logs").join(format!("rank-{rank}.flight.json"))
}

/// Returns the path of the rank's [`FailureReport`].
pub(crate) fn failure_path(run: &Path, rank: usize) -> PathBuf {
    run.join("logs").join(format!("rank-{rank}.failure"))
}
