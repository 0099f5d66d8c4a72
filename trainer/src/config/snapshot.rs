//! The sections `snapshot` and `restart`.

use super::limits::{MAX_GROUP, MAX_RANKS, MAX_SECONDS};
use super::words::Auto;
use checkpoint::Redundancy;
use config_derive::ResumeKeys;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Nodes of data per parity node that `redundancy: auto` uses at most.
const AUTO_DATA_NODES: usize = 7;

/// Snapshots in the memory of keepers, which outlive the ranks.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotConfig {
    /// Steps between snapshots. `auto` takes them as often as costs less than 2 % of the time. 0
    /// takes none; ranks then stop training while they write a checkpoint.
    #[on_resume(free)]
    pub every: SnapshotEvery,
    /// Protection against the loss of nodes: `auto`, `none`, `{copies: N}`, or
    /// `{parity: {data: N, parity: M}}`.
    #[on_resume(free)]
    pub redundancy: RedundancyConfig,
    /// Largest memory of a node's keeper, in GiB. By default half of the node's free memory.
    #[on_resume(free)]
    #[schemars(range(max = 1e9), extend("exclusiveMinimum" = 0))]
    pub memory_gib: Option<f64>,
    /// Consecutive nodes in one failure domain, such as a rack. They do not protect each other.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_RANKS))]
    pub nodes_per_domain: usize,
}

impl Default for SnapshotConfig {
    fn default() -> SnapshotConfig {
        SnapshotConfig {
            every: SnapshotEvery::Auto(Auto::Auto),
            redundancy: RedundancyConfig::Auto,
            memory_gib: None,
            nodes_per_domain: 1,
        }
    }
}

/// Steps between snapshots, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a number of steps, or auto")]
pub enum SnapshotEvery {
    /// A fixed number of steps.
    Steps(u64),
    /// Chosen by the measured cost of a snapshot.
    Auto(Auto),
}

/// Protection of snapshots against the loss of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedundancyConfig {
    /// One parity node for up to seven data nodes. None on a single node.
    Auto,
    /// No protection.
    None,
    /// Full copies on this number of other nodes.
    Copies(#[schemars(range(min = 1, max = MAX_GROUP))] usize),
    /// Erasure coding (XOR for one parity node, Reed-Solomon for more).
    Parity(ParityConfig),
}

impl RedundancyConfig {
    /// Returns the redundancy of a run on `nodes` nodes.
    pub fn for_nodes(self, nodes: usize) -> Redundancy {
        match self {
            RedundancyConfig::Auto if nodes > 1 => Redundancy::Parity {
                data: AUTO_DATA_NODES.min(nodes - 1),
                parity: 1,
            },
            RedundancyConfig::Auto | RedundancyConfig::None => Redundancy::None,
            RedundancyConfig::Copies(copies) => Redundancy::Copies(copies),
            RedundancyConfig::Parity(ParityConfig { data, parity }) => {
                Redundancy::Parity { data, parity }
            }
        }
    }
}

/// Erasure coding over groups of at most `data + parity` nodes, of which any `parity` may be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ParityConfig {
    /// Largest number of nodes' data in a group.
    #[schemars(range(min = 1, max = MAX_GROUP))]
    pub data: usize,
    /// Number of nodes of a group that may be lost.
    #[schemars(range(min = 1, max = MAX_GROUP))]
    pub parity: usize,
}

/// Detection of failures, and restarts.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct RestartConfig {
    /// Largest number of restarts within `window_s`. 0 ends the run at the first failure.
    #[on_resume(free)]
    pub max_restarts: usize,
    /// Seconds over which restarts are counted.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_SECONDS))]
    pub window_s: u64,
    /// Seconds without a sign of life until a rank counts as hung, and a machine or a keeper as
    /// lost.
    #[on_resume(free)]
    #[schemars(range(max = 1e9), extend("exclusiveMinimum" = 0))]
    pub heartbeat_timeout_s: f64,
    /// Seconds without progress of any rank until the run counts as hung. By default ten times the
    /// longest step so far, at least 60.
    #[on_resume(free)]
    #[schemars(range(max = 1e9), extend("exclusiveMinimum" = 0))]
    pub step_timeout_s: Option<f64>,
    /// Reaction to a loss that is not finite.
    #[on_resume(free)]
    pub on_divergence: OnDivergence,
    /// Reaction to a lost node if there is no spare node.
    #[on_resume(free)]
    pub without_spare: WithoutSpare,
    /// Keeps standby processes that take over at once. Each holds about 60 MiB.
    #[on_resume(free)]
    pub standby: bool,
}

impl Default for RestartConfig {
    fn default() -> RestartConfig {
        RestartConfig {
            max_restarts: 20,
            window_s: 3600,
            heartbeat_timeout_s: 10.0,
            step_timeout_s: None,
            on_divergence: OnDivergence::SkipBatch,
            without_spare: WithoutSpare::Replace,
            standby: true,
        }
    }
}

/// Reaction to a loss that is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDivergence {
    /// Restart from the last snapshot and skip the batch.
    SkipBatch,
    /// End the run.
    Stop,
}

/// Reaction to a lost node if there is no spare node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WithoutSpare {
    /// Restart the node's ranks in the same place.
    Replace,
    /// Continue with fewer data-parallel replicas and the same global batch: each replica
    /// accumulates more microbatches.
    Shrink,
}
