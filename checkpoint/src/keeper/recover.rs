//! The decision what can be restored: a pure function of what the reachable keepers hold.

use super::report::Inventory;
use super::snapshot::{PartInfo, Snapshot, SnapshotId};
use super::topology::Topology;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// A snapshot of which every part is there, or can be rebuilt.
///
/// Keepers are numbered as in the list of inventories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub snapshot: Snapshot,
    /// The keeper that has each rank's part; none if the part has to be rebuilt.
    pub holders: Vec<Option<usize>>,
    /// The keeper that has what each node had when the snapshot was made.
    pub keeper_of_node: Vec<Option<usize>>,
}

impl Candidate {
    /// Returns the nodes whose parts have to be rebuilt.
    pub fn lost_nodes(&self) -> Vec<usize> {
        let mut nodes = BTreeSet::new();
        for (rank, holder) in self.holders.iter().enumerate() {
            if holder.is_none() {
                nodes.extend(self.snapshot.topology.node_of(rank));
            }
        }
        nodes.into_iter().collect()
    }

    /// Returns the keepers of the positions in `rank`'s group.
    pub fn sources(&self, rank: usize, addresses: &[SocketAddr]) -> Vec<Option<SocketAddr>> {
        let topology = &self.snapshot.topology;
        let Some(code_position) = topology.code_position(rank) else {
            return Vec::new();
        };
        let nodes = topology.groups[code_position.group].iter();
        let source = |&node: &usize| self.keeper_of_node[node].map(|keeper| addresses[keeper]);
        nodes.map(source).collect()
    }
}

/// A request to rebuild a part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebuild {
    pub snapshot: Snapshot,
    /// The rank whose part is rebuilt.
    pub rank: usize,
    /// The damaged chunks of a part that the keeper has; none to rebuild the whole part.
    pub chunks: Option<Vec<u64>>,
    /// The keepers of the positions of the rank's group.
    pub sources: Vec<Option<SocketAddr>>,
}

/// Returns all snapshots that can be restored from these keepers, newest first.
pub fn candidates(inventories: &[Inventory]) -> Vec<Candidate> {
    let snapshots = complete_snapshots(inventories);
    let newest_first = snapshots.into_values().rev();
    newest_first
        .filter_map(|snapshot| candidate(snapshot, inventories))
        .collect()
}

/// Returns the snapshots that were declared complete, and those of which every part is there,
/// though the launcher ended before it could declare so.
fn complete_snapshots(inventories: &[Inventory]) -> BTreeMap<SnapshotId, Snapshot> {
    let mut complete: BTreeMap<SnapshotId, Snapshot> = BTreeMap::new();
    let mut topologies: BTreeMap<u64, &Topology> = BTreeMap::new();
    let mut parts: BTreeMap<SnapshotId, BTreeMap<usize, PartInfo>> = BTreeMap::new();
    for inventory in inventories {
        for snapshot in &inventory.complete {
            complete.insert(snapshot.id, snapshot.clone());
        }
        for (topology, _) in &inventory.memberships {
            topologies.insert(topology.generation, topology);
        }
        for (id, part) in &inventory.parts {
            let parts = parts.entry(*id).or_default();
            parts.insert(part.rank, part.clone());
        }
    }
    for (id, parts) in parts {
        let Some(&topology) = topologies.get(&id.generation) else {
            continue;
        };
        if parts.keys().copied().eq(0..topology.ranks()) {
            complete.entry(id).or_insert_with(|| Snapshot {
                id,
                topology: topology.clone(),
                parts: parts.into_values().collect(),
            });
        }
    }
    complete
}

/// Finds the keepers that have the parts of a snapshot, if enough of it is left.
fn candidate(snapshot: Snapshot, inventories: &[Inventory]) -> Option<Candidate> {
    let id = snapshot.id;
    let topology = &snapshot.topology;
    let has_part = |inventory: &Inventory, rank: usize| {
        let mut parts = inventory.parts.iter();
        parts.any(|(other, part)| *other == id && part.rank == rank)
    };
    let holder = |rank: usize| {
        let mut keepers = inventories.iter();
        keepers.position(|inventory| has_part(inventory, rank))
    };
    let holders: Vec<Option<usize>> = (0..topology.ranks()).map(holder).collect();
    let was_node = |inventory: &Inventory, node: usize| {
        let mut memberships = inventory.memberships.iter();
        memberships.any(|(other, own)| other.generation == id.generation && *own == node)
    };
    let is_intact = |inventory: &Inventory, node: usize| {
        let mut ranks = topology.nodes[node].ranks.iter();
        was_node(inventory, node) && ranks.all(|&rank| has_part(inventory, rank))
    };
    let keeper = |node: usize| {
        let mut keepers = inventories.iter();
        keepers.position(|inventory| is_intact(inventory, node))
    };
    let keeper_of_node: Vec<Option<usize>> = (0..topology.nodes.len()).map(keeper).collect();
    // The parity of a node counts only if its keeper reports that all of it is there.
    let is_usable = |node: usize| {
        let is_protected = |keeper: usize| inventories[keeper].protected.contains(&id);
        keeper_of_node[node].is_some_and(is_protected)
    };
    let is_recoverable = |group: &Vec<usize>| {
        let lost = group.iter().filter(|&&node| !is_usable(node)).count();
        lost <= topology.redundancy.max_losses()
    };
    let lacks_part = |node: &usize| {
        let mut ranks = topology.nodes[*node].ranks.iter();
        ranks.any(|&rank| holders[rank].is_none())
    };
    let mut incomplete = topology
        .groups
        .iter()
        .filter(|group| group.iter().any(lacks_part));
    let is_possible = incomplete.all(is_recoverable);
    is_possible.then_some(Candidate {
        snapshot,
        holders,
        keeper_of_node,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Node;
    use crate::stripes::{Redundancy, redundancy_groups};
    use proptest::prelude::*;

    fn topology(nodes: usize, per_node: usize, redundancy: Redundancy) -> Topology {
        let node = |node: usize| Node {
            address: SocketAddr::from(([127, 0, 0, 1], node as u16)),
            ranks: (node * per_node..(node + 1) * per_node).collect(),
        };
        Topology {
            generation: 3,
            nodes: (0..nodes).map(node).collect(),
            redundancy,
            groups: redundancy_groups(&vec![0; nodes], redundancy).unwrap(),
            chunk_bytes: 8,
        }
    }

    fn id(step: u64) -> SnapshotId {
        SnapshotId {
            generation: 3,
            step,
        }
    }

    fn part(rank: usize) -> PartInfo {
        PartInfo {
            rank,
            bytes: 20,
            crcs: vec![1, 2, 3],
        }
    }

    fn snapshot(topology: &Topology, step: u64) -> Snapshot {
        Snapshot {
            id: id(step),
            topology: topology.clone(),
            parts: (0..topology.ranks()).map(part).collect(),
        }
    }

    /// Returns what each keeper has after snapshots of these steps, which were not committed.
    fn inventories(topology: &Topology, steps: &[u64]) -> Vec<Inventory> {
        let mut inventories = Vec::new();
        for (node, Node { ranks, .. }) in topology.nodes.iter().enumerate() {
            let mut parts = Vec::new();
            for &step in steps {
                parts.extend(ranks.iter().map(|&rank| (id(step), part(rank))));
            }
            inventories.push(Inventory {
                memberships: vec![(topology.clone(), node)],
                parts,
                protected: steps.iter().map(|&step| id(step)).collect(),
                complete: Vec::new(),
            });
        }
        inventories
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn a_snapshot_is_there_exactly_while_no_group_has_lost_too_many(
            nodes in 2usize..14,
            per_node in 1usize..3,
            data in 1usize..6,
            parity in 1usize..3,
            gone in prop::collection::btree_set(0usize..14, 0..6),
        ) {
            prop_assume!(nodes > parity);
            let topology = topology(nodes, per_node, Redundancy::Parity { data, parity });
            let mut left = Vec::new();
            for (node, mut inventory) in inventories(&topology, &[7, 9]).into_iter().enumerate() {
                inventory.complete = vec![snapshot(&topology, 7), snapshot(&topology, 9)];
                if !gone.contains(&node) {
                    left.push(inventory);
                }
            }
            let losses = |group: &Vec<usize>| {
                group.iter().filter(|node| gone.contains(node)).count()
            };
            let survives = topology.groups.iter().all(|group| losses(group) <= parity);
            let expected = if survives && !left.is_empty() { 2 } else { 0 };
            let found = candidates(&left);
            prop_assert_eq!(found.len(), expected);
            if let Some(first) = found.first() {
                prop_assert_eq!(first.snapshot.id.step, 9);
                let lost: Vec<usize> = gone.into_iter().filter(|&node| node < nodes).collect();
                prop_assert_eq!(first.lost_nodes(), lost);
            }
        }
    }

    #[test]
    fn a_snapshot_with_all_parts_needs_no_commit() {
        let topology = topology(2, 2, Redundancy::None);
        let mut all = inventories(&topology, &[5]);
        assert_eq!(candidates(&all)[0].snapshot, snapshot(&topology, 5));
        all[1].parts.pop();
        assert!(candidates(&all).is_empty());
    }
}
