//! A running keeper: its state and its memory behind a lock. It carries out what the state decides.

use super::{
    checksums::Checksums,
    connection::{PEER_TIMEOUT, PeerPool},
    decide::{Effect, End, Grant, Life, PartRead, ReadStep, ReadablePart, State},
    memory_limit::available_bytes,
    report::{Event, KeeperRefusals},
    snapshot::{PartInfo, SnapshotId},
};
use crate::{
    memory::Region,
    secure::{Error, Refusals},
};
use parking_lot::{Condvar, Mutex};
use std::{
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, Sender, SyncSender, sync_channel},
    },
    time::Instant,
};

/// Events that may wait for a launcher. One that reads none is dropped: it connects again.
const MAX_WAITING_EVENTS: usize = 4096;

/// The contents of the keeper's lock.
struct Inner {
    state: State,
    /// The memory of each slot.
    regions: Vec<Option<Arc<Region>>>,
    launchers: Vec<SyncSender<Event>>,
}

/// The counts of refusals at both ports.
pub(super) struct PortRefusals {
    pub(super) peers: Arc<Refusals>,
    pub(super) ranks: Arc<Refusals>,
}

/// The keeper, which all its threads share.
pub(super) struct Keeper {
    inner: Mutex<Inner>,
    /// Notified at each [`Effect::Wake`].
    changed: Condvar,
    /// Wakes the thread that encodes.
    to_encode: Sender<SnapshotId>,
    pub(super) peers: PeerPool,
    /// Set once both ports are open.
    refusals: OnceLock<PortRefusals>,
}

impl Keeper {
    pub(super) fn new(state: State, peers: PeerPool, to_encode: Sender<SnapshotId>) -> Keeper {
        let inner = Inner {
            state,
            regions: Vec::new(),
            launchers: Vec::new(),
        };
        Keeper {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            to_encode,
            peers,
            refusals: OnceLock::new(),
        }
    }

    /// Calls `decide` with the state and carries out the effects.
    pub(super) fn apply<T>(&self, decide: impl FnOnce(&mut State) -> T) -> T {
        self.apply_to(&mut self.inner.lock(), decide)
    }

    fn apply_to<T>(&self, inner: &mut Inner, decide: impl FnOnce(&mut State) -> T) -> T {
        let result = decide(&mut inner.state);
        for effect in inner.state.take_effects() {
            match effect {
                Effect::Free(slot) => inner.regions[slot] = None,
                Effect::Send(event) => inner
                    .launchers
                    .retain(|launcher| launcher.try_send(event.clone()).is_ok()),
                // The thread that encodes lives as long as the process.
                Effect::Encode(id) => drop(self.to_encode.send(id)),
                Effect::Wake => {
                    self.changed.notify_all();
                }
            }
        }
        result
    }

    /// Adds a launcher, which receives all events from now on and the ones that it missed.
    pub(super) fn subscribe(&self) -> Receiver<Event> {
        let (sender, events) = sync_channel(MAX_WAITING_EVENTS);
        let mut inner = self.inner.lock();
        for event in inner.state.missed_events() {
            // The channel is empty.
            let _ = sender.try_send(event);
        }
        inner.launchers.push(sender);
        events
    }

    /// Waits until the state decides that the keeper ends.
    pub(super) fn wait_for_end(&self) -> End {
        let mut inner = self.inner.lock();
        loop {
            let launchers = inner.launchers.len();
            let now = Instant::now();
            match self.apply_to(&mut inner, |state| state.tick(launchers, now)) {
                Life::Ends(end) => return end,
                Life::Until(time) => {
                    self.changed.wait_until(&mut inner, time);
                }
            }
        }
    }

    pub(super) fn set_refusals(&self, refusals: PortRefusals) {
        // There is one call.
        let _ = self.refusals.set(refusals);
    }

    pub(super) fn refusals(&self) -> KeeperRefusals {
        let refusals = self.refusals.get();
        refusals.map_or_else(KeeperRefusals::default, |refusals| KeeperRefusals {
            peers: refusals.peers.counts(),
            ranks: refusals.ranks.counts(),
        })
    }

    /// Allocates `count` regions of `bytes` bytes.
    ///
    /// # Errors
    /// If they exceed the memory limit, or the machine's memory.
    pub(super) fn allocate(&self, bytes: u64, count: usize) -> Result<Allocation<'_>, Error> {
        let available = available_bytes();
        let grant = self.apply(|state| state.grant(bytes, count, available))?;
        let mut allocation = Allocation {
            keeper: self,
            grant,
            regions: Vec::new(),
        };
        for _ in 0..count {
            let region = Region::create("moerun snapshot", allocation.grant.bytes as usize)?;
            allocation.regions.push(Arc::new(region));
            self.apply(|state| state.record_allocation(&mut allocation.grant));
        }
        Ok(allocation)
    }

    /// Returns the memory of a slot, if it has some.
    pub(super) fn region(&self, slot: usize) -> Option<Arc<Region>> {
        self.inner.lock().regions.get(slot).cloned().flatten()
    }

    /// Returns the memory of a rank's part, whether complete or not.
    pub(super) fn region_of_part(&self, id: SnapshotId, rank: usize) -> Option<Arc<Region>> {
        let inner = self.inner.lock();
        let slot = inner.state.find_part(id, rank)?;
        inner.regions[slot].clone()
    }

    /// Returns the memory of a rank's slots, in order.
    pub(super) fn regions_of_rank(&self, rank: usize) -> Vec<Arc<Region>> {
        let inner = self.inner.lock();
        let slots = inner.state.slots_of(rank);
        slots
            .into_iter()
            .filter_map(|slot| inner.regions[slot].clone())
            .collect()
    }

    /// Waits until `rank`'s part of `id` is filled up to `filled_to`, or to its end, and reads it.
    /// The slot is pinned meanwhile, so that no rank overwrites it.
    ///
    /// # Errors
    /// If the part is not here and cannot arrive any more, or is not filled in time.
    pub(super) fn read_part<T>(
        &self,
        id: SnapshotId,
        rank: usize,
        filled_to: u64,
        read: impl FnOnce(&Region, &ReadablePart) -> T,
    ) -> Result<T, Error> {
        let wait = PartRead {
            id,
            rank,
            filled_to,
            deadline: Instant::now() + PEER_TIMEOUT,
        };
        let mut inner = self.inner.lock();
        loop {
            let now = Instant::now();
            match self.apply_to(&mut inner, |state| state.poll_read(&wait, now))? {
                ReadStep::Wait => {
                    self.changed.wait_until(&mut inner, wait.deadline);
                }
                ReadStep::Ready { slot, part } => {
                    let region = inner.regions[slot].clone();
                    drop(inner);
                    let result = region.map(|region| read(&region, &part));
                    self.apply(|state| state.end_read(slot));
                    let freed = || Error::Refused(format!("the memory of slot {slot} was freed"));
                    return result.ok_or_else(freed);
                }
            }
        }
    }
}

/// Memory that is not in a slot yet. If it is dropped, it is free again.
pub(super) struct Allocation<'a> {
    keeper: &'a Keeper,
    grant: Grant,
    regions: Vec<Arc<Region>>,
}

impl Allocation<'_> {
    /// Returns the first region.
    pub(super) fn first(&self) -> &Arc<Region> {
        &self.regions[0]
    }

    /// Makes the regions slots of a rank.
    pub(super) fn add_to_rank(mut self, rank: usize) {
        let regions = std::mem::take(&mut self.regions);
        let lens: Vec<u64> = regions.iter().map(|region| region.len() as u64).collect();
        let mut inner = self.keeper.inner.lock();
        let decide = |state: &mut State| state.add_slots(rank, &lens);
        let slots = self.keeper.apply_to(&mut inner, decide);
        for (slot, region) in slots.into_iter().zip(regions) {
            inner.place(slot, region);
        }
    }

    /// Makes the first region the memory of a part whose bytes are all known to be right.
    pub(super) fn insert_part(mut self, id: SnapshotId, info: PartInfo, checksums: Checksums) {
        let region = self.regions.remove(0);
        let len = region.len() as u64;
        let mut inner = self.keeper.inner.lock();
        let decide = |state: &mut State| state.insert_part(id, info, checksums, len);
        let slot = self.keeper.apply_to(&mut inner, decide);
        inner.place(slot, region);
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        // The memory is free before its permission is.
        self.regions.clear();
        self.keeper.apply(|state| state.return_grant(&self.grant));
    }
}

impl Inner {
    fn place(&mut self, slot: usize, region: Arc<Region>) {
        if slot >= self.regions.len() {
            self.regions.resize(slot + 1, None);
        }
        self.regions[slot] = Some(region);
    }
}
