//! What can be restored from what is left: a pure function of what the keepers that can be reached have.

use super::{Inventory, PartInfo, Snapshot, SnapshotId, Topology};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// A snapshot that every rank's part is there of, or can be made again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which, and what its parts are.
    pub snapshot: Snapshot,
    /// The keeper, by number in the list of inventories, that has each rank's part; None where it is to be rebuilt.
    pub holders: Vec<Option<usize>>,
    /// The keeper that has what each node of that generation had.
    pub seats: Vec<Option<usize>>,
}

impl Candidate {
    /// The nodes whose parts are to be rebuilt.
    pub fn lost(&self) -> Vec<usize> {
        let lost = (0..self.holders.len()).filter(|&rank| self.holders[rank].is_none());
        let nodes: BTreeSet<usize> = lost
            .filter_map(|rank| self.snapshot.topology.node_of(rank))
            .collect();
        nodes.into_iter().collect()
    }

    /// The keepers of the positions in `rank`'s group.
    pub fn sources(&self, rank: usize, addresses: &[SocketAddr]) -> Vec<Option<SocketAddr>> {
        let topology = &self.snapshot.topology;
        let Some(seat) = topology.code_position(rank) else {
            return Vec::new();
        };
        topology.groups[seat.group]
            .iter()
            .map(|&node| self.seats[node].map(|keeper| addresses[keeper]))
            .collect()
    }
}

/// What a keeper is asked to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebuild {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Whose part.
    pub rank: usize,
    /// Only these chunks of the part that the keeper has; None: all of it.
    pub chunks: Option<Vec<u64>>,
    /// The keepers of the positions of its group.
    pub sources: Vec<Option<SocketAddr>>,
}

/// All snapshots that can be restored from these keepers, the newest first.
pub fn candidates(inventories: &[Inventory]) -> Vec<Candidate> {
    let mut complete: BTreeMap<SnapshotId, Snapshot> = BTreeMap::new();
    let mut topologies: BTreeMap<u64, &Topology> = BTreeMap::new();
    let mut parts: BTreeMap<SnapshotId, BTreeMap<usize, PartInfo>> = BTreeMap::new();
    for inventory in inventories {
        complete.extend(
            inventory
                .complete
                .iter()
                .map(|snapshot| (snapshot.id, snapshot.clone())),
        );
        topologies.extend(
            inventory
                .memberships
                .iter()
                .map(|(topology, _)| (topology.generation, topology)),
        );
        for (id, part) in &inventory.parts {
            parts
                .entry(*id)
                .or_default()
                .insert(part.rank, part.clone());
        }
    }
    // Complete on every rank, though nobody lived to say so.
    for (id, parts) in parts {
        if let Some(&topology) = topologies.get(&id.generation)
            && parts.keys().copied().eq(0..topology.ranks())
        {
            let parts = parts.into_values().collect();
            complete.entry(id).or_insert_with(|| Snapshot {
                id,
                topology: topology.clone(),
                parts,
            });
        }
    }
    complete
        .into_values()
        .rev()
        .filter_map(|snapshot| candidate(snapshot, inventories))
        .collect()
}

fn candidate(snapshot: Snapshot, inventories: &[Inventory]) -> Option<Candidate> {
    let id = snapshot.id;
    let topology = &snapshot.topology;
    let holds = |inventory: &Inventory, rank: usize| {
        inventory
            .parts
            .iter()
            .any(|(other, part)| *other == id && part.rank == rank)
    };
    let holder = |rank: usize| {
        inventories
            .iter()
            .position(|inventory| holds(inventory, rank))
    };
    let holders: Vec<Option<usize>> = (0..topology.ranks()).map(holder).collect();
    let sits = |inventory: &Inventory, node: usize| {
        inventory
            .memberships
            .iter()
            .any(|(other, seat)| other.generation == id.generation && *seat == node)
            && topology.nodes[node]
                .ranks
                .iter()
                .all(|&rank| holds(inventory, rank))
    };
    let seats: Vec<Option<usize>> = (0..topology.nodes.len())
        .map(|node| {
            inventories
                .iter()
                .position(|inventory| sits(inventory, node))
        })
        .collect();
    let whole = holders.iter().all(Option::is_some);
    // Parity is only relied on where the keeper says that it is all there.
    let usable =
        |node: usize| seats[node].is_some_and(|keeper| inventories[keeper].protected.contains(&id));
    let recoverable = |group: &Vec<usize>| {
        let lost = group.iter().filter(|&&node| !usable(node)).count();
        lost <= topology.redundancy.survives()
    };
    let needed = topology.groups.iter().filter(|group| {
        let ranks = |&node: &usize| {
            topology.nodes[node]
                .ranks
                .iter()
                .any(|&rank| holders[rank].is_none())
        };
        group.iter().any(ranks)
    });
    let possible = whole || needed.into_iter().all(recoverable);
    possible.then_some(Candidate {
        snapshot,
        holders,
        seats,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Node;
    use crate::stripes::{Redundancy, redundancy_groups};
    use proptest::prelude::*;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn topology(nodes: usize, per_node: usize, redundancy: Redundancy) -> Topology {
        let node = |node: usize| Node {
            address: address(node as u16),
            ranks: (node * per_node..(node + 1) * per_node).collect(),
        };
        let groups = redundancy_groups(&vec![0; nodes], redundancy).unwrap();
        Topology {
            generation: 3,
            nodes: (0..nodes).map(node).collect(),
            redundancy,
            groups,
            chunk: 8,
        }
    }

    fn part(rank: usize) -> PartInfo {
        PartInfo {
            rank,
            bytes: 20,
            crcs: vec![1, 2, 3],
        }
    }

    fn inventories(topology: &Topology, steps: &[u64], committed: bool) -> Vec<Inventory> {
        let ids: Vec<SnapshotId> = steps
            .iter()
            .map(|&step| SnapshotId {
                generation: 3,
                step,
            })
            .collect();
        let parts: Vec<PartInfo> = (0..topology.ranks()).map(part).collect();
        let snapshot = |&id: &SnapshotId| Snapshot {
            id,
            topology: topology.clone(),
            parts: parts.clone(),
        };
        (0..topology.nodes.len())
            .map(|node| Inventory {
                memberships: vec![(topology.clone(), node)],
                parts: ids
                    .iter()
                    .flat_map(|&id| {
                        topology.nodes[node]
                            .ranks
                            .iter()
                            .map(move |&r| (id, part(r)))
                    })
                    .collect(),
                protected: ids.clone(),
                complete: if committed {
                    ids.iter().map(snapshot).collect()
                } else {
                    Vec::new()
                },
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn a_snapshot_is_there_exactly_while_no_group_has_lost_too_many(
            nodes in 2usize..14, per_node in 1usize..3, data in 1usize..6, parity in 1usize..3,
            gone in prop::collection::btree_set(0usize..14, 0..6),
        ) {
            prop_assume!(nodes > parity);
            let topology = topology(nodes, per_node, Redundancy::Parity { data, parity });
            let all = inventories(&topology, &[7, 9], true);
            let left: Vec<Inventory> =
                all.into_iter().enumerate().filter(|(node, _)| !gone.contains(node)).map(|(_, i)| i).collect();
            let survives = topology.groups.iter().all(|g| g.iter().filter(|node| gone.contains(node)).count() <= parity);
            let found = candidates(&left);
            if left.is_empty() {
                prop_assert!(found.is_empty());
            } else {
                prop_assert_eq!(found.len(), if survives { 2 } else { 0 });
            }
            if let Some(first) = found.first() {
                prop_assert_eq!(first.snapshot.id.step, 9);
                let expected: Vec<usize> = gone.iter().copied().filter(|&node| node < nodes).collect();
                prop_assert_eq!(first.lost(), expected);
            }
        }
    }

    #[test]
    fn a_whole_snapshot_needs_nobody_to_have_said_so() {
        let topology = topology(2, 2, Redundancy::None);
        let mut all = inventories(&topology, &[5], false);
        assert_eq!(candidates(&all)[0].snapshot.id.step, 5);
        all[1].parts.pop();
        assert!(candidates(&all).is_empty());
    }
}
