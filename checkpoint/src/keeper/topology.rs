//! The topology of a generation: which ranks are on which node, and which nodes protect each other.

use crate::stripes::{Redundancy, StripeLayout};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A node of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The address of the node's keeper.
    pub address: SocketAddr,
    /// The ranks on the node, in the order of their local numbers.
    pub ranks: Vec<usize>,
}

/// The nodes of one generation and their redundancy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    pub generation: u64,
    /// The nodes with ranks.
    pub nodes: Vec<Node>,
    pub redundancy: Redundancy,
    /// Groups of nodes that protect each other ([`redundancy_groups`](crate::redundancy_groups)).
    pub groups: Vec<Vec<usize>>,
    /// The size of a chunk, which is the unit of checksums and of coding.
    pub chunk_bytes: usize,
}

/// The place of a node in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GroupPosition {
    pub(super) group: usize,
    pub(super) position: usize,
}

/// The place of a rank's part in the erasure code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CodePosition {
    pub(super) group: usize,
    pub(super) position: usize,
    /// The rank's number on its node. Ranks with equal numbers are coded together.
    pub(super) local: usize,
}

impl Topology {
    /// Returns the number of ranks of the run.
    pub fn ranks(&self) -> usize {
        self.nodes.iter().map(|node| node.ranks.len()).sum()
    }

    /// Returns the node of a rank.
    pub fn node_of(&self, rank: usize) -> Option<usize> {
        self.nodes
            .iter()
            .position(|node| node.ranks.contains(&rank))
    }

    pub(super) fn group_position(&self, node: usize) -> Option<GroupPosition> {
        for (group, nodes) in self.groups.iter().enumerate() {
            if let Some(position) = nodes.iter().position(|&other| other == node) {
                return Some(GroupPosition { group, position });
            }
        }
        None
    }

    pub(super) fn code_position(&self, rank: usize) -> Option<CodePosition> {
        let node = self.node_of(rank)?;
        let GroupPosition { group, position } = self.group_position(node)?;
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

    /// Returns the rank with a local number on the node at a position of a group.
    pub(super) fn rank_at(&self, code_position: CodePosition) -> Option<usize> {
        let CodePosition {
            group,
            position,
            local,
        } = code_position;
        let node = self.groups[group][position];
        self.nodes[node].ranks.get(local).copied()
    }

    /// Returns the stripes of the ranks of a group with one local number, if there is redundancy.
    pub(super) fn stripes(&self, group: usize, local: usize) -> Option<StripeLayout> {
        let nodes = self.groups[group].len();
        let parity = self.redundancy.max_losses();
        (parity > 0).then(|| StripeLayout {
            nodes,
            parity,
            rotation: local % nodes,
        })
    }
}
