//! Decides how a run continues after the loss of nodes.

use trainer::config::{Config, RedundancyConfig, WithoutSpare};

/// A run's nodes at the time of a loss.
pub(crate) struct Nodes<'a> {
    pub(crate) world_size: usize,
    /// Number of nodes with ranks, lost ones included.
    pub(crate) count: usize,
    pub(crate) spares: usize,
    pub(crate) lost: &'a [usize],
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Continuation {
    /// Put spares or new keepers in place of the lost ones.
    Replace,
    /// Continue on fewer nodes; `has_idle` if that leaves some unused.
    Shrink {
        world_size: usize,
        nodes: usize,
        has_idle: bool,
    },
}

pub(crate) fn plan_continuation(config: &Config, nodes: &Nodes) -> Continuation {
    let may_shrink = config.restart.without_spare == WithoutSpare::Shrink;
    if nodes.spares >= nodes.lost.len() || !may_shrink {
        return Continuation::Replace;
    }
    let ranks_of_nodes = config.nodes(nodes.world_size);
    let lost_ranks = nodes.lost.iter().map(|&node| ranks_of_nodes[node].len());
    let left = nodes.world_size - lost_ranks.sum::<usize>();
    match largest_layout(config, left) {
        None => Continuation::Replace,
        Some(world_size) => {
            let used = config.nodes(world_size).len();
            Continuation::Shrink {
                world_size,
                nodes: used,
                has_idle: nodes.count - nodes.lost.len() > used,
            }
        }
    }
}

/// Returns the most ranks, at most `left`, that the configuration can run on.
pub(crate) fn largest_layout(config: &Config, left: usize) -> Option<usize> {
    let mut config = config.clone();
    // The redundancy is planned anew for the nodes that are left.
    config.snapshot.redundancy = RedundancyConfig::None;
    let is_possible = |ranks: &usize| config.problems(*ranks).is_empty();
    (1..=left).rev().find(is_possible)
}
