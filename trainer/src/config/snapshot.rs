//! What is kept in memory, and what happens after a failure.

use super::{Auto, Config};
use checkpoint::{Redundancy, redundancy_groups};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Snapshots in the memory of keepers, processes beside the ranks that outlive them.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotConfig {
    /// Steps between snapshots; `auto`: as often as costs less than 2% of the time. 0: none, and checkpoints are written by
    /// the ranks, which stop for it.
    pub every: SnapshotEvery,
    /// How they survive the loss of nodes.
    pub redundancy: RedundancyConfig,
    /// The most memory that a node's keeper takes, in GiB; by default half of what the node has left.
    pub memory_gib: Option<f64>,
    /// Nodes that fail together, such as those of a rack: so many in a row. They do not protect one another.
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
    /// So many.
    Steps(u64),
    /// By their cost.
    Auto(Auto),
}

/// How snapshots survive the loss of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RedundancyConfig {
    /// One parity for up to seven nodes of data where there are several nodes, nothing where there is one.
    Auto,
    /// Not at all.
    None,
    /// Whole copies on so many other nodes.
    Copies(usize),
    /// Erasure coding.
    Parity(ParityConfig),
}

/// Groups of at most `data + parity` nodes, of which any `parity` may be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ParityConfig {
    /// Nodes' worth of data, at most.
    pub data: usize,
    /// Nodes that may be lost.
    pub parity: usize,
}

impl RedundancyConfig {
    /// For a run on `nodes` nodes.
    pub fn for_nodes(self, nodes: usize) -> Redundancy {
        match self {
            RedundancyConfig::Auto if nodes > 1 => Redundancy::Parity {
                data: 7.min(nodes - 1),
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

/// What happens after a failure.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RestartConfig {
    /// Restarts within `window_s`, at most; 0: the run ends with the first failure.
    pub max_restarts: usize,
    /// Seconds over which restarts are counted.
    pub window_s: u64,
    /// Seconds of silence after which a rank is taken for hung.
    pub heartbeat_timeout_s: f64,
    /// Seconds without progress on any rank after which the run is taken for hung; by default ten times the longest step so
    /// far, and a minute at least.
    pub step_timeout_s: Option<f64>,
    /// What to do about a loss that is not finite.
    pub on_divergence: OnDivergence,
    /// What to do about a lost node when there is no spare one.
    pub without_spare: WithoutSpare,
    /// Whether processes are kept ready that take over at once.
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

/// What to do about a loss that is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDivergence {
    /// Go back to the last snapshot and leave the batch out.
    SkipBatch,
    /// End the run.
    Stop,
}

/// What to do about a lost node when there is no spare one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WithoutSpare {
    /// Start its ranks in its place.
    Replace,
    /// Go on with fewer data-parallel replicas, which accumulate more: the same global batch.
    Shrink,
}

impl Config {
    /// Whether there are keepers.
    pub fn takes_snapshots(&self) -> bool {
        self.snapshot.every != SnapshotEvery::Steps(0)
    }

    /// The ranks of each node of a run of `ranks` ranks.
    pub fn nodes(&self, ranks: usize) -> Vec<Vec<usize>> {
        let per_node = self.parallel.ranks_per_node.unwrap_or(ranks).max(1);
        (0..ranks)
            .collect::<Vec<_>>()
            .chunks(per_node)
            .map(<[usize]>::to_vec)
            .collect()
    }

    /// How `nodes` nodes protect one another, and the groups in which they do.
    ///
    /// # Errors
    /// When there are too few, or too many of a group fail together.
    pub fn protection(&self, nodes: usize) -> Result<(Redundancy, Vec<Vec<usize>>), String> {
        let redundancy = self.snapshot.redundancy.for_nodes(nodes);
        let domains: Vec<usize> = (0..nodes)
            .map(|node| node / self.snapshot.nodes_per_domain.max(1))
            .collect();
        match self.snapshot.redundancy {
            // What nobody asked for is left out where it cannot be.
            RedundancyConfig::Auto => Ok(redundancy_groups(&domains, redundancy).map_or_else(
                |_| {
                    (
                        Redundancy::None,
                        (0..nodes).map(|node| vec![node]).collect(),
                    )
                },
                |groups| (redundancy, groups),
            )),
            _ => Ok((redundancy, redundancy_groups(&domains, redundancy)?)),
        }
    }
}
