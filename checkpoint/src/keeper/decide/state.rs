//! The state of a keeper, and reports about it.

use super::{
    budget::Budget, lifetime::Lifetime, parity_store::ParityStore, rank_table::RankTable,
    slots::Slots,
};
use crate::keeper::{
    checksums::Checksums,
    identity::Identity,
    report::{Event, Inventory, KeeperRefusals, Status},
    shared::Shared,
    snapshot::{Snapshot, SnapshotId},
    topology::Topology,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// A topology and the keeper's node in it.
#[derive(Debug, Clone)]
pub(crate) struct Membership {
    pub(crate) topology: Shared<Topology>,
    pub(crate) node: usize,
}

/// The snapshot that ranks restore.
#[derive(Debug, Clone)]
pub(super) struct RestoreTarget {
    pub(super) snapshot: Snapshot,
    /// The keeper that has each rank's part.
    pub(super) holders: Vec<SocketAddr>,
}

/// A consequence of a decision, which the daemon carries out at once and in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Frees the memory of a slot.
    Free(usize),
    /// Sends an event to all launchers.
    Send(Event),
    /// Begins to make the parity of a snapshot.
    Encode(SnapshotId),
    /// Wakes the threads that wait for a change.
    Wake,
}

/// Everything that a keeper decides by.
#[derive(Debug)]
pub(crate) struct State {
    pub(super) identity: Identity,
    /// The keeper's memberships by generation.
    pub(super) memberships: BTreeMap<u64, Membership>,
    pub(super) slots: Slots,
    /// The bytes of each slot's memory; none if it was freed.
    pub(super) memory: Vec<Option<u64>>,
    pub(super) budget: Budget,
    pub(super) parity: ParityStore,
    /// The checksums of the other nodes' parts that the parity here protects, by rank.
    pub(super) protected_checksums: BTreeMap<(SnapshotId, usize), Checksums>,
    /// Snapshots of which this keeper has all the parity that belongs to it.
    pub(super) protected: BTreeSet<SnapshotId>,
    /// Snapshots that were complete on every rank.
    pub(super) complete: BTreeMap<SnapshotId, Snapshot>,
    pub(super) restoring: Option<RestoreTarget>,
    pub(super) ranks: RankTable,
    /// The newest snapshot that was abandoned.
    pub(super) abandoned: Option<SnapshotId>,
    /// Snapshots whose parity is being made, or was.
    pub(super) encoding: BTreeSet<SnapshotId>,
    /// The number of times that a rank found no free slot.
    pub(super) skipped: u64,
    /// The number of headers that ranks asked for.
    pub(super) header_requests: u64,
    pub(super) coding_time: Duration,
    pub(super) lifetime: Lifetime,
    effects: Vec<Effect>,
}

impl State {
    pub(crate) fn new(identity: Identity, limit: Option<u64>, lifetime: Lifetime) -> State {
        State {
            identity,
            memberships: BTreeMap::new(),
            slots: Slots::default(),
            memory: Vec::new(),
            budget: Budget::new(limit),
            parity: ParityStore::default(),
            protected_checksums: BTreeMap::new(),
            protected: BTreeSet::new(),
            complete: BTreeMap::new(),
            restoring: None,
            ranks: RankTable::default(),
            abandoned: None,
            encoding: BTreeSet::new(),
            skipped: 0,
            header_requests: 0,
            coding_time: Duration::ZERO,
            lifetime,
            effects: Vec::new(),
        }
    }

    /// Returns the effects of the decisions since the last call.
    pub(crate) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    pub(super) fn add_effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    pub(super) fn send(&mut self, event: Event) {
        self.add_effect(Effect::Send(event));
    }

    pub(super) fn inventory(&self) -> Inventory {
        let mut memberships = Vec::new();
        for membership in self.memberships.values() {
            let topology = membership.topology.clone();
            memberships.push((topology, membership.node));
        }
        let mut parts = Vec::new();
        for part in self.slots.parts() {
            parts.extend(part.info.map(|info| (part.id, info)));
        }
        Inventory {
            identity: self.identity.clone(),
            memberships,
            parts,
            protected: self.protected.iter().copied().collect(),
            complete: self.complete.values().cloned().collect(),
        }
    }

    /// Returns the status without what only the daemon knows: the counts of refusals.
    pub(super) fn status(&self, now: Instant) -> Status {
        let filling = self
            .slots
            .parts()
            .filter(|part| !part.is_complete())
            .map(|part| part.id)
            .collect();
        Status {
            pid: self.identity.pid,
            ranks: self.ranks.statuses(now),
            slot_bytes: self.slot_bytes(),
            parity_bytes: self.parity.bytes(),
            inventory: self.inventory(),
            filling,
            skipped: self.skipped,
            header_requests: self.header_requests,
            coding_ms: self.coding_time.as_millis() as u64,
            refusals: KeeperRefusals::default(),
            stop_signal: self.lifetime.stop_signal(),
        }
    }

    pub(crate) fn membership(&self, generation: u64) -> Option<&Membership> {
        self.memberships.get(&generation)
    }

    pub(crate) fn insert_membership(&mut self, topology: Shared<Topology>, node: usize) {
        let membership = Membership { topology, node };
        self.memberships
            .insert(membership.topology.generation, membership);
    }

    /// Returns the process of a rank.
    pub(crate) fn pid(&self, rank: usize) -> Option<i32> {
        self.ranks.pid(rank)
    }

    pub(crate) fn pids(&self) -> Vec<i32> {
        self.ranks.pids().collect()
    }
}
