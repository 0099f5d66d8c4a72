//! The decision what can be restored: a pure function of what the reachable keepers hold.

use super::{
    report::Inventory,
    shared::Shared,
    snapshot::{PartInfo, Snapshot, SnapshotContents, SnapshotId},
    topology::Topology,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

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
        topology.groups[code_position.group]
            .iter()
            .map(|&node| self.keeper_of_node[node])
            .map(|keeper| keeper.map(|keeper| addresses[keeper]))
            .collect()
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
    complete_snapshots(inventories)
        .into_values()
        .rev()
        .filter_map(|snapshot| candidate(snapshot, inventories))
        .collect()
}

/// Returns the snapshots that were declared complete, and those of which every part is there,
/// though the launcher ended before it could declare so.
fn complete_snapshots(inventories: &[Inventory]) -> BTreeMap<SnapshotId, Snapshot> {
    let mut complete: BTreeMap<SnapshotId, Snapshot> = BTreeMap::new();
    let mut topologies: BTreeMap<u64, &Shared<Topology>> = BTreeMap::new();
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
            parts.insert(part.rank, *part);
        }
    }
    for (id, parts) in parts {
        let Some(&topology) = topologies.get(&id.generation) else {
            continue;
        };
        if parts.keys().copied().eq(0..topology.ranks()) {
            complete.entry(id).or_insert_with(|| {
                Snapshot::from(SnapshotContents {
                    id,
                    topology: topology.clone(),
                    parts: parts.into_values().collect(),
                })
            });
        }
    }
    complete
}

/// Finds the keepers that have the parts of a snapshot, if enough of it is left.
fn candidate(snapshot: Snapshot, inventories: &[Inventory]) -> Option<Candidate> {
    let id = snapshot.id;
    let topology = &snapshot.topology;
    let mut holders = Vec::new();
    for rank in 0..topology.ranks() {
        let holder = inventories
            .iter()
            .position(|inventory| has_part(inventory, id, rank));
        holders.push(holder);
    }
    let mut keeper_of_node = Vec::new();
    for node in 0..topology.nodes.len() {
        let keeper = inventories
            .iter()
            .position(|inventory| has_node(inventory, &snapshot, node));
        keeper_of_node.push(keeper);
    }
    let candidate = Candidate {
        snapshot,
        holders,
        keeper_of_node,
    };
    candidate.is_possible(inventories).then_some(candidate)
}

/// True if a keeper has a rank's complete part of a snapshot.
fn has_part(inventory: &Inventory, id: SnapshotId, rank: usize) -> bool {
    inventory
        .parts
        .iter()
        .any(|(other, part)| *other == id && part.rank == rank)
}

/// True if a keeper was this node when the snapshot was made, and has all parts of its ranks.
fn has_node(inventory: &Inventory, snapshot: &Snapshot, node: usize) -> bool {
    let generation = snapshot.id.generation;
    let was_node = inventory
        .memberships
        .iter()
        .any(|(topology, own)| topology.generation == generation && *own == node);
    was_node
        && snapshot.topology.nodes[node]
            .ranks
            .iter()
            .all(|&rank| has_part(inventory, snapshot.id, rank))
}

impl Candidate {
    /// True if every part is there, or its group has lost no more nodes than it may lose.
    fn is_possible(&self, inventories: &[Inventory]) -> bool {
        let topology = &self.snapshot.topology;
        let max_losses = topology.redundancy.max_losses();
        for group in &topology.groups {
            let is_complete = group
                .iter()
                .flat_map(|&node| &topology.nodes[node].ranks)
                .all(|&rank| self.holders[rank].is_some());
            let losses = group
                .iter()
                .filter(|&&node| !self.is_usable(node, inventories))
                .count();
            if !is_complete && losses > max_losses {
                return false;
            }
        }
        true
    }

    /// True if a node's parts are there, and its keeper reports that all its parity is.
    fn is_usable(&self, node: usize, inventories: &[Inventory]) -> bool {
        match self.keeper_of_node[node] {
            None => false,
            Some(keeper) => inventories[keeper].protected.contains(&self.snapshot.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        keeper::{ChecksumDigest, Identity, Node},
        stripes::{Redundancy, redundancy_groups},
    };
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
            digest: ChecksumDigest::of(&[1, 2, 3]),
        }
    }

    fn snapshot(topology: &Topology, step: u64) -> Snapshot {
        Snapshot::from(SnapshotContents {
            id: id(step),
            topology: topology.clone().into(),
            parts: (0..topology.ranks()).map(part).collect(),
        })
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
                identity: Identity::default(),
                memberships: vec![(topology.clone().into(), node)],
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
            let survives = topology.groups.iter().all(|group| {
                let lost = group.iter().filter(|node| gone.contains(node));
                lost.count() <= parity
            });
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
