//! Generations, and which snapshots are kept.

use super::state::{Effect, RestoreTarget, State};
use crate::keeper::{
    snapshot::{Snapshot, SnapshotId},
    topology::Topology,
};
use std::{collections::BTreeSet, net::SocketAddr};

/// Number of complete snapshots that are remembered, which two or three slots can hold.
const MAX_COMPLETE_SNAPSHOTS: usize = 3;
/// Number of them that keep their parity: the older may be needed until the newer is used.
const MAX_PROTECTED_SNAPSHOTS: usize = 2;

impl State {
    /// Begins a generation, in which this keeper is node `node`.
    pub(super) fn set_up(&mut self, topology: Topology, node: usize) {
        // Ranks on other nodes no longer write here. What they wrote can only be read.
        let is_here = |rank| topology.node_of(rank) == Some(node);
        self.slots.retain_writers(is_here);
        self.free_memory();
        let generation = topology.generation;
        self.memberships.retain(|&older, _| older < generation);
        self.insert_membership(topology.into(), node);
        // Complete snapshots carry their own topologies; those of the others are not needed.
        let needed: BTreeSet<u64> = self
            .complete
            .keys()
            .map(|id| id.generation)
            .chain([generation])
            .collect();
        self.memberships
            .retain(|generation, _| needed.contains(generation));
        self.add_effect(Effect::Wake);
    }

    /// Records that a snapshot is complete on every rank, and frees what it supersedes.
    pub(super) fn commit(&mut self, snapshot: Snapshot) {
        let id = snapshot.id;
        self.slots.commit(id);
        self.complete.insert(id, snapshot);
        while self.complete.len() > MAX_COMPLETE_SNAPSHOTS {
            self.complete.pop_first();
        }
        // Parts that were brought here to be restored are not needed any more.
        self.restoring.take_if(|target| target.snapshot.id < id);
        self.slots.drop_fetched_before(id);
        self.free_memory();
        let kept: BTreeSet<SnapshotId> = self
            .complete
            .keys()
            .rev()
            .take(MAX_PROTECTED_SNAPSHOTS)
            .copied()
            .collect();
        self.retain_parity(|other| kept.contains(&other) || other > id);
    }

    /// Records that a snapshot will never be complete. One that was committed stays.
    pub(super) fn abandon(&mut self, id: SnapshotId) {
        if self.complete.contains_key(&id) {
            return;
        }
        self.slots.abandon(id);
        self.abandoned = self.abandoned.max(Some(id));
        self.retain_parity(|other| other != id);
        self.free_memory();
        self.add_effect(Effect::Wake);
    }

    /// Selects the snapshot that ranks restore, and forgets newer ones. Older complete ones stay
    /// and are next, should this one turn out to be useless.
    pub(super) fn select_restore(&mut self, snapshot: Option<Snapshot>, holders: Vec<SocketAddr>) {
        self.slots.unpin_snapshot();
        let id = snapshot.as_ref().map(|snapshot| snapshot.id);
        let older: BTreeSet<SnapshotId> = self
            .complete
            .keys()
            .copied()
            .filter(|&other| Some(other) <= id)
            .collect();
        let is_kept = |other: SnapshotId| older.contains(&other) || Some(other) == id;
        self.slots.retain(|part| is_kept(part.id));
        self.retain_parity(is_kept);
        self.complete.retain(|other, _| older.contains(other));
        self.slots.set_newest(id);
        self.free_memory();
        self.restoring = snapshot.map(|snapshot| {
            self.complete.insert(snapshot.id, snapshot.clone());
            RestoreTarget { snapshot, holders }
        });
        self.add_effect(Effect::Wake);
    }

    /// Keeps the parts of a snapshot until it is unpinned; one snapshot at a time.
    pub(super) fn pin(&mut self, id: SnapshotId) {
        self.unpin();
        self.slots.pin_snapshot(id);
    }

    pub(super) fn unpin(&mut self) {
        self.slots.unpin_snapshot();
        self.free_memory();
    }
}
