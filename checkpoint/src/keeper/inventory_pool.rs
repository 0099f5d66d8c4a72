//! One copy of what many inventories have in common.

use super::{
    report::Inventory,
    shared::Shared,
    snapshot::{Snapshot, SnapshotId},
    topology::Topology,
};
use std::collections::BTreeMap;

/// The snapshots and topologies of a run's inventories. All keepers name the same ones, which
/// grow with the number of ranks: without a pool their memory would grow with its square.
#[derive(Debug, Default)]
pub struct InventoryPool {
    snapshots: BTreeMap<SnapshotId, Snapshot>,
    topologies: BTreeMap<u64, Shared<Topology>>,
}

impl InventoryPool {
    /// Replaces what `inventory` has in common with earlier ones by their values.
    pub fn share(&mut self, inventory: &mut Inventory) {
        for snapshot in &mut inventory.complete {
            let known = self.snapshots.entry(snapshot.id);
            let known = known.or_insert_with(|| snapshot.clone());
            if known == snapshot {
                *snapshot = known.clone();
            }
        }
        for (topology, _) in &mut inventory.memberships {
            let known = self.topologies.entry(topology.generation);
            let known = known.or_insert_with(|| topology.clone());
            if known == topology {
                *topology = known.clone();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::message_bytes::SimulatedRun;

    #[test]
    fn equal_values_are_held_once_and_others_stay_as_they_are() {
        let run = SimulatedRun {
            ranks: 16,
            ranks_per_node: 4,
            state_bytes: 1 << 30,
        };
        let mut pool = InventoryPool::default();
        let mut first = run.inventory(0);
        let mut second = run.inventory(1);
        let mut poisoned = run.inventory(2);
        poisoned.complete[0].make_mut().parts[0].bytes += 1;
        let expected = poisoned.clone();
        for inventory in [&mut first, &mut second, &mut poisoned] {
            pool.share(inventory);
        }
        for (one, other) in first.complete.iter().zip(&second.complete) {
            assert!(one.is_same(other));
        }
        assert!(first.memberships[0].0.is_same(&second.memberships[0].0));
        assert_eq!(second, run.inventory(1));
        assert_eq!(poisoned, expected);
        assert!(!first.complete[0].is_same(&poisoned.complete[0]));
    }
}
