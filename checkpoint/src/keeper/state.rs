//! The state of a keeper: a value with a method for each change. It knows no sockets, threads or
//! clocks, so every transition can be tested alone.

use super::error::Error;
use super::parity_store::{ParityChunk, ParityStore, StripeId};
use super::rank_table::RankTable;
use super::report::{Event, Inventory, Status};
use super::slots::Slots;
use super::snapshot::{PartInfo, Snapshot, SnapshotId};
use super::topology::Topology;
use crate::memory::Region;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// Number of complete snapshots that are remembered, which two or three slots can hold.
const MAX_COMPLETE_SNAPSHOTS: usize = 3;
/// Number of them that keep their parity: the older may be needed until the newer is used.
const MAX_PROTECTED_SNAPSHOTS: usize = 2;

/// A topology and the keeper's node in it.
#[derive(Debug, Clone)]
pub(super) struct Membership {
    pub(super) topology: Topology,
    pub(super) node: usize,
}

/// The snapshot that ranks restore.
#[derive(Debug, Clone)]
pub(super) struct RestoreTarget {
    pub(super) snapshot: Snapshot,
    /// The keeper that has each rank's part.
    pub(super) holders: Vec<SocketAddr>,
}

/// The memory that a keeper has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UsedMemory {
    pub(super) slots: u64,
    pub(super) parity: u64,
}

#[derive(Default)]
pub(super) struct KeeperState {
    /// The keeper's memberships by generation.
    memberships: BTreeMap<u64, Membership>,
    pub(super) slots: Slots,
    /// The memory of each slot.
    regions: Vec<Option<Arc<Region>>>,
    pub(super) parity: ParityStore,
    /// Snapshots of which this keeper has all the parity that belongs to it.
    protected: BTreeSet<SnapshotId>,
    /// Snapshots that were complete on every rank.
    complete: BTreeMap<SnapshotId, Snapshot>,
    restoring: Option<RestoreTarget>,
    pub(super) ranks: RankTable,
    subscribers: Vec<Sender<Event>>,
    /// The newest snapshot that was abandoned.
    abandoned: Option<SnapshotId>,
    /// Snapshots whose parity is being made, or was.
    encoding: BTreeSet<SnapshotId>,
    /// The snapshot that is being written to disk.
    pinned: Option<SnapshotId>,
    /// The number of times that a rank found no free slot.
    skipped: u64,
    coding_time: Duration,
    is_stopping: bool,
}

/// Requests of the launcher.
impl KeeperState {
    /// Begins a generation, in which this keeper is node `node`.
    pub(super) fn set_up(&mut self, topology: Topology, node: usize) {
        // Ranks on other nodes no longer write here. What they wrote can only be read.
        let is_here = |rank| topology.node_of(rank) == Some(node);
        self.slots.retain_writers(is_here);
        self.free_regions();
        let generation = topology.generation;
        self.memberships.retain(|&older, _| older < generation);
        self.insert_membership(topology, node);
        // Complete snapshots carry their own topologies; those of the others are not needed.
        let needed: BTreeSet<u64> = self
            .complete
            .keys()
            .map(|id| id.generation)
            .chain([generation])
            .collect();
        self.memberships
            .retain(|generation, _| needed.contains(generation));
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
        self.free_regions();
        let kept: BTreeSet<SnapshotId> = self
            .complete
            .keys()
            .rev()
            .take(MAX_PROTECTED_SNAPSHOTS)
            .copied()
            .collect();
        self.retain_parity(|other| kept.contains(&other) || other > id);
    }

    /// Records that a snapshot will never be complete.
    pub(super) fn abandon(&mut self, id: SnapshotId) {
        self.slots.abandon(id);
        self.abandoned = self.abandoned.max(Some(id));
        self.retain_parity(|other| other != id);
    }

    /// Selects the snapshot that ranks restore, and forgets newer ones. Older complete ones stay
    /// and are next, should this one turn out to be useless.
    pub(super) fn select_restore(&mut self, snapshot: Option<Snapshot>, holders: Vec<SocketAddr>) {
        self.unpin();
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
        self.free_regions();
        self.restoring = snapshot.map(|snapshot| {
            self.complete.insert(snapshot.id, snapshot.clone());
            RestoreTarget { snapshot, holders }
        });
    }

    /// Keeps the parts of a snapshot until [`KeeperState::unpin`]; one snapshot at a time.
    pub(super) fn pin(&mut self, id: SnapshotId) {
        self.unpin();
        self.slots.pin_snapshot(id);
        self.pinned = Some(id);
    }

    pub(super) fn unpin(&mut self) {
        if let Some(id) = self.pinned.take() {
            self.slots.unpin_snapshot(id);
        }
    }

    pub(super) fn stop(&mut self) {
        self.is_stopping = true;
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    pub(super) fn inventory(&self) -> Inventory {
        let mut memberships = Vec::new();
        for membership in self.memberships.values() {
            let topology = membership.topology.clone();
            memberships.push((topology, membership.node));
        }
        let mut parts = Vec::new();
        for part in self.slots.parts() {
            if part.is_complete() {
                parts.push((part.id, part.info.clone()));
            }
        }
        Inventory {
            memberships,
            parts,
            protected: self.protected.iter().copied().collect(),
            complete: self.complete.values().cloned().collect(),
        }
    }

    pub(super) fn status(&self, pid: i32, now: Instant) -> Status {
        let used = self.used_memory();
        let filling = self
            .slots
            .parts()
            .filter(|part| !part.is_complete())
            .map(|part| part.id)
            .collect();
        Status {
            pid,
            ranks: self.ranks.statuses(now),
            slot_bytes: used.slots,
            parity_bytes: used.parity,
            inventory: self.inventory(),
            filling,
            skipped: self.skipped,
            coding_ms: self.coding_time.as_millis() as u64,
        }
    }
}

/// Events for the launcher.
impl KeeperState {
    pub(super) fn subscribe(&mut self, subscriber: Sender<Event>) {
        self.subscribers.push(subscriber);
    }

    pub(super) fn has_subscribers(&self) -> bool {
        !self.subscribers.is_empty()
    }

    /// Sends an event to all subscribers, and forgets those that are gone.
    pub(super) fn broadcast(&mut self, event: &Event) {
        self.subscribers
            .retain(|subscriber| subscriber.send(event.clone()).is_ok());
    }
}

/// Requests of ranks, which number their own slots from 0.
impl KeeperState {
    /// Takes a free slot for a part of `rank`, or counts the snapshot as skipped.
    pub(super) fn reserve(
        &mut self,
        rank: usize,
        id: SnapshotId,
        bytes: u64,
        durable: bool,
    ) -> Option<usize> {
        let number = self.try_reserve(rank, id, bytes, durable);
        self.skipped += u64::from(number.is_none());
        number
    }

    fn try_reserve(
        &mut self,
        rank: usize,
        id: SnapshotId,
        bytes: u64,
        durable: bool,
    ) -> Option<usize> {
        let fits = self
            .slots
            .of_rank(rank)
            .all(|slot| self.region_len(slot) >= bytes);
        if !fits {
            return None;
        }
        let reserved = self.slots.reserve(rank, id, bytes, durable)?;
        self.slots.of_rank(rank).position(|slot| slot == reserved)
    }

    /// Empties a slot of a rank, if there is such a slot.
    pub(super) fn release(&mut self, rank: usize, number: usize) {
        let slot = self.slots.of_rank(rank).nth(number);
        if let Some(slot) = slot {
            self.slots.release(slot);
        }
    }

    /// Records filled bytes of a slot, broadcasts that a part is complete, and returns the
    /// snapshot that the slot holds.
    ///
    /// # Errors
    /// If the rank has no such slot, or the number of bytes is not possible.
    pub(super) fn fill(
        &mut self,
        rank: usize,
        number: usize,
        filled_to: u64,
        crcs: &[u32],
    ) -> Result<SnapshotId, Error> {
        let Some(slot) = self.slots.of_rank(rank).nth(number) else {
            let reason = format!("there is no slot {number}");
            return Err(Error::Protocol(reason));
        };
        let part = self
            .slots
            .fill(slot, filled_to, crcs)
            .map_err(Error::Protocol)?;
        let id = part.id;
        if part.is_complete() {
            let event = Event::Complete {
                id,
                part: part.info.clone(),
                durable: part.durable,
            };
            self.broadcast(&event);
        }
        Ok(id)
    }

    /// Removes a connection of a rank, and drops what it left half-written.
    pub(super) fn disconnect_rank(&mut self, rank: usize, pid: i32) {
        if self.ranks.disconnect(rank, pid) {
            self.slots.drop_unfinished(rank);
        }
    }

    /// Keeps at most `count` slots of a rank that fit parts of `bytes` bytes, takes the others
    /// from it, and returns how many are missing.
    pub(super) fn keep_fitting_slots(&mut self, rank: usize, bytes: u64, count: usize) -> usize {
        let most = bytes.saturating_add(bytes / 4 + (1 << 20));
        let mut kept = 0;
        let own: Vec<usize> = self.slots.of_rank(rank).collect();
        for slot in own {
            let len = self.region_len(slot);
            if len >= bytes && len <= most && kept < count {
                kept += 1;
            } else {
                self.slots.remove_writer(slot);
            }
        }
        self.free_regions();
        count - kept
    }

    /// Adds slots with new memory to those of a rank.
    pub(super) fn add_slots(&mut self, rank: usize, regions: Vec<Arc<Region>>) {
        for region in regions {
            let slot = self.slots.add(Some(rank));
            self.regions.resize(slot + 1, None);
            self.regions[slot] = Some(region);
        }
    }

    /// Returns the memory of a rank's slots, in order.
    pub(super) fn regions_of_rank(&self, rank: usize) -> Vec<Arc<Region>> {
        self.slots
            .of_rank(rank)
            .map(|slot| self.region(slot))
            .collect()
    }
}

/// Parts and their memory.
impl KeeperState {
    /// True if a snapshot that is not here may still arrive.
    pub(super) fn may_arrive(&self, id: SnapshotId) -> bool {
        let current = self.memberships.keys().next_back().copied();
        let is_current = current.is_none_or(|current| id.generation >= current);
        is_current && self.abandoned < Some(id)
    }

    /// Returns the memory of a rank's part, whether complete or not.
    pub(super) fn find_region(&self, id: SnapshotId, rank: usize) -> Option<Arc<Region>> {
        let slot = self.slots.find(id, rank)?;
        self.regions[slot].clone()
    }

    /// Returns the memory of a slot that is known to have some.
    pub(super) fn region(&self, slot: usize) -> Arc<Region> {
        self.regions[slot]
            .clone()
            .expect("a slot in use has memory")
    }

    /// Stores a part whose bytes are all known to be right, in memory of its own.
    pub(super) fn insert_part(&mut self, id: SnapshotId, info: PartInfo, region: Arc<Region>) {
        let vacant = self.regions.iter().position(Option::is_none);
        let slot = vacant.unwrap_or_else(|| self.slots.add(None));
        if slot == self.regions.len() {
            self.regions.push(None);
        }
        self.slots.insert(slot, id, info);
        self.regions[slot] = Some(region);
    }

    /// Replaces the checksums of a part, here and in the complete snapshot.
    pub(super) fn replace_checksums(&mut self, id: SnapshotId, rank: usize, crcs: Vec<u32>) {
        if let Some(slot) = self.slots.find(id, rank)
            && let Some(part) = self.slots.part_mut(slot)
        {
            part.info.crcs = crcs.clone();
        }
        if let Some(snapshot) = self.complete.get_mut(&id) {
            snapshot.parts[rank].crcs = crcs;
        }
    }

    pub(super) fn used_memory(&self) -> UsedMemory {
        let slots = self
            .regions
            .iter()
            .flatten()
            .map(|region| region.len() as u64)
            .sum();
        UsedMemory {
            slots,
            parity: self.parity.bytes(),
        }
    }

    /// Returns the size of a slot, 0 if its memory was freed.
    fn region_len(&self, slot: usize) -> u64 {
        self.regions[slot]
            .as_ref()
            .map_or(0, |region| region.len() as u64)
    }

    /// Frees memory that holds no part and that no rank writes.
    fn free_regions(&mut self) {
        for (is_used, region) in self.slots.are_used().zip(&mut self.regions) {
            if !is_used {
                *region = None;
            }
        }
    }
}

/// Topologies, restoring and parity.
impl KeeperState {
    pub(super) fn membership(&self, generation: u64) -> Option<&Membership> {
        self.memberships.get(&generation)
    }

    pub(super) fn insert_membership(&mut self, topology: Topology, node: usize) {
        let membership = Membership { topology, node };
        self.memberships
            .insert(membership.topology.generation, membership);
    }

    /// Returns the size of a snapshot's chunks.
    ///
    /// # Errors
    /// If the topology of the snapshot is not known.
    pub(super) fn chunk_bytes(&self, id: SnapshotId) -> Result<usize, Error> {
        let generation = id.generation;
        if let Some(snapshot) = self.complete.get(&id) {
            return Ok(snapshot.topology.chunk_bytes);
        }
        if let Some(membership) = self.membership(generation) {
            return Ok(membership.topology.chunk_bytes);
        }
        let reason = format!("generation {generation} is not known here");
        Err(Error::Refused(reason))
    }

    pub(super) fn restore_target(&self) -> Option<&RestoreTarget> {
        self.restoring.as_ref()
    }

    /// Stores the parity of a stripe for another keeper, which encoded it.
    ///
    /// # Errors
    /// If the snapshot was abandoned.
    pub(super) fn put_parity(
        &mut self,
        id: SnapshotId,
        stripe: StripeId,
        bytes: Vec<u8>,
    ) -> Result<(), Error> {
        if !self.may_arrive(id) && !self.complete.contains_key(&id) {
            let reason = format!("the snapshot of step {} was abandoned", id.step);
            return Err(Error::Refused(reason));
        }
        self.parity.insert(id, stripe, ParityChunk::new(bytes));
        Ok(())
    }

    /// Returns the parity of a stripe.
    ///
    /// # Errors
    /// If there is no such parity, or it is damaged.
    pub(super) fn intact_parity(&self, id: SnapshotId, stripe: StripeId) -> Result<&[u8], Error> {
        let problem = match self.parity.get(id, stripe) {
            Some(chunk) if chunk.is_intact() => return Ok(chunk.bytes()),
            Some(_) => "damaged",
            None => "not here",
        };
        Err(Error::Refused(format!(
            "the parity of stripe {} (local rank {}) of step {} is {problem}",
            stripe.stripe, stripe.local, id.step
        )))
    }

    /// Returns true if nothing has begun to encode this snapshot yet, and records that it begins.
    pub(super) fn begin_encoding(&mut self, id: SnapshotId) -> bool {
        self.encoding.insert(id)
    }

    pub(super) fn mark_protected(&mut self, id: SnapshotId) {
        self.protected.insert(id);
    }

    pub(super) fn add_coding_time(&mut self, time: Duration) {
        self.coding_time += time;
    }

    fn retain_parity(&mut self, keep: impl Fn(SnapshotId) -> bool) {
        self.parity.retain(&keep);
        self.protected.retain(|&id| keep(id));
        self.encoding.retain(|&id| keep(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Node;
    use crate::stripes::Redundancy;
    use std::sync::mpsc::channel;

    /// Two nodes with one rank each, which hold copies of each other's parts.
    fn topology(generation: u64) -> Topology {
        let node = |rank: usize| Node {
            address: SocketAddr::from(([127, 0, 0, 1], rank as u16)),
            ranks: vec![rank],
        };
        Topology {
            generation,
            nodes: vec![node(0), node(1)],
            redundancy: Redundancy::Copies(1),
            groups: vec![vec![0, 1]],
            chunk_bytes: 8,
        }
    }

    fn id(generation: u64, step: u64) -> SnapshotId {
        SnapshotId { generation, step }
    }

    fn snapshot(id: SnapshotId) -> Snapshot {
        let part = |rank: usize| PartInfo {
            rank,
            bytes: 8,
            crcs: vec![rank as u32],
        };
        Snapshot {
            id,
            topology: topology(id.generation),
            parts: vec![part(0), part(1)],
        }
    }

    const STRIPE: StripeId = StripeId {
        local: 0,
        stripe: 0,
    };

    fn region() -> Arc<Region> {
        Arc::new(Region::create("test", 8).unwrap())
    }

    /// Returns the state of node 0 in generation 1, whose rank has three slots.
    fn state() -> KeeperState {
        let mut state = KeeperState::default();
        state.set_up(topology(1), 0);
        state.add_slots(0, vec![region(), region(), region()]);
        state
    }

    /// Takes and commits a snapshot, with parity from the other node.
    fn take(state: &mut KeeperState, id: SnapshotId) {
        let slot = state.reserve(0, id, 8, false).unwrap();
        assert_eq!(state.fill(0, slot, 8, &[0]).unwrap(), id);
        assert!(state.begin_encoding(id) && !state.begin_encoding(id));
        state.put_parity(id, STRIPE, vec![1; 8]).unwrap();
        state.commit(snapshot(id));
    }

    fn complete_steps(state: &KeeperState) -> Vec<u64> {
        state
            .inventory()
            .complete
            .iter()
            .map(|snapshot| snapshot.id.step)
            .collect()
    }

    fn steps_with_parity(state: &KeeperState, steps: std::ops::Range<u64>) -> Vec<u64> {
        steps
            .filter(|&step| state.parity.get(id(1, step), STRIPE).is_some())
            .collect()
    }

    #[test]
    fn the_newest_snapshots_and_their_parity_are_kept() {
        let mut state = state();
        for step in 1..6 {
            take(&mut state, id(1, step));
        }
        assert_eq!(complete_steps(&state), [3, 4, 5]);
        assert_eq!(steps_with_parity(&state, 1..6), [4, 5]);
        assert_eq!(state.used_memory().parity, 16);
        assert_eq!(state.used_memory().slots, 24);
    }

    #[test]
    fn a_completed_part_is_broadcast() {
        let mut state = state();
        let (sender, events) = channel();
        state.subscribe(sender);
        let slot = state.reserve(0, id(1, 1), 8, true).unwrap();
        state.fill(0, slot, 4, &[]).unwrap();
        assert!(events.try_recv().is_err());
        state.fill(0, slot, 8, &[7]).unwrap();
        let expected = Event::Complete {
            id: id(1, 1),
            part: PartInfo {
                rank: 0,
                bytes: 8,
                crcs: vec![7],
            },
            durable: true,
        };
        assert_eq!(events.try_recv(), Ok(expected));
        drop(events);
        state.broadcast(&Event::Protected { id: id(1, 1) });
        assert!(!state.has_subscribers());
    }

    #[test]
    fn parts_too_large_for_the_slots_are_skipped() {
        let mut state = state();
        assert_eq!(state.reserve(0, id(1, 1), 9, false), None);
        assert_eq!(state.status(1, Instant::now()).skipped, 1);
        assert_eq!(state.reserve(0, id(1, 1), 8, false), Some(0));
    }

    #[test]
    fn an_abandoned_snapshot_arrives_no_more() {
        let mut state = state();
        assert!(state.may_arrive(id(1, 1)));
        state.reserve(0, id(1, 1), 8, false).unwrap();
        state.put_parity(id(1, 1), STRIPE, vec![1; 8]).unwrap();
        state.abandon(id(1, 1));
        assert!(!state.may_arrive(id(1, 1)) && state.may_arrive(id(1, 2)));
        assert!(state.find_region(id(1, 1), 0).is_none());
        let error = state.put_parity(id(1, 1), STRIPE, vec![1; 8]).unwrap_err();
        assert_eq!(error.to_string(), "the snapshot of step 1 was abandoned");
        assert!(state.intact_parity(id(1, 1), STRIPE).is_err());
    }

    #[test]
    fn a_new_generation_takes_slots_from_ranks_that_left() {
        let mut state = state();
        take(&mut state, id(1, 1));
        let mut moved = topology(2);
        moved.nodes[0].ranks = vec![1];
        moved.nodes[1].ranks = vec![0];
        state.set_up(moved, 0);
        // The part is still read, and the empty slots are freed.
        assert_eq!(state.reserve(0, id(2, 2), 8, false), None);
        assert!(state.find_region(id(1, 1), 0).is_some());
        assert_eq!(state.used_memory().slots, 8);
        assert!(!state.may_arrive(id(1, 2)));
        // Generation 1 is needed for its complete snapshot.
        let generations: Vec<u64> = state.memberships.keys().copied().collect();
        assert_eq!(generations, [1, 2]);
        assert_eq!(state.chunk_bytes(id(1, 1)).unwrap(), 8);
        assert!(state.chunk_bytes(id(7, 1)).is_err());
    }

    #[test]
    fn restoring_forgets_newer_snapshots_until_one_is_committed() {
        let mut state = state();
        for step in 1..4 {
            take(&mut state, id(1, step));
        }
        state.pin(id(1, 3));
        let holders = vec![SocketAddr::from(([127, 0, 0, 1], 0)); 2];
        state.select_restore(Some(snapshot(id(1, 2))), holders.clone());
        assert_eq!(complete_steps(&state), [1, 2]);
        assert_eq!(state.slots.newest(), Some(id(1, 2)));
        assert_eq!(state.restore_target().unwrap().holders, holders);
        // The part of another rank is fetched, and dropped with the next snapshot.
        let fetched = snapshot(id(1, 2)).parts[1].clone();
        state.insert_part(id(1, 2), fetched, region());
        assert!(state.find_region(id(1, 2), 1).is_some());
        take(&mut state, id(1, 4));
        assert!(state.restore_target().is_none());
        assert!(state.find_region(id(1, 2), 1).is_none());
        assert_eq!(state.used_memory().slots, 24);
        state.select_restore(None, Vec::new());
        assert!(complete_steps(&state).is_empty());
    }

    #[test]
    fn slots_of_the_right_size_are_used_again() {
        let mut state = state();
        assert_eq!(state.keep_fitting_slots(0, 8, 2), 0);
        assert_eq!(state.regions_of_rank(0).len(), 2);
        assert_eq!(state.keep_fitting_slots(0, 9, 2), 2);
        assert!(state.regions_of_rank(0).is_empty());
        assert_eq!(state.used_memory().slots, 0);
    }
}
