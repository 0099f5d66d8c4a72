//! The nodes of a run, and the groups in which they protect each other's snapshots.

use super::{
    Config,
    snapshot::{RedundancyConfig, SnapshotEvery},
};
use checkpoint::{Redundancy, redundancy_groups};

impl Config {
    /// Returns true if the run takes snapshots, and therefore has keepers.
    pub fn takes_snapshots(&self) -> bool {
        self.snapshot.every != SnapshotEvery::Steps(0)
    }

    /// Returns the ranks of each node of a run of `ranks` ranks.
    pub fn nodes(&self, ranks: usize) -> Vec<Vec<usize>> {
        let per_node = self.parallel.ranks_per_node.unwrap_or(ranks).max(1);
        (0..ranks)
            .collect::<Vec<_>>()
            .chunks(per_node)
            .map(<[usize]>::to_vec)
            .collect()
    }

    /// Returns how `nodes` nodes protect each other, and the groups in which they do.
    ///
    /// # Errors
    /// If there are too few nodes, or too many nodes of a group are in one failure domain.
    pub fn protection(&self, nodes: usize) -> Result<(Redundancy, Vec<Vec<usize>>), String> {
        let redundancy = self.snapshot.redundancy.for_nodes(nodes);
        let per_domain = self.snapshot.nodes_per_domain.max(1);
        let domains: Vec<usize> = (0..nodes).map(|node| node / per_domain).collect();
        match redundancy_groups(&domains, redundancy) {
            Ok(groups) => Ok((redundancy, groups)),
            // `auto` is a default, which must not keep a run from starting.
            Err(_) if self.snapshot.redundancy == RedundancyConfig::Auto => {
                let single_nodes = (0..nodes).map(|node| vec![node]).collect();
                Ok((Redundancy::None, single_nodes))
            }
            Err(reason) => Err(reason),
        }
    }
}
