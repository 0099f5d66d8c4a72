//! A running keeper: its state behind a lock, and what handlers need besides.

use super::{
    connection::PeerPool,
    error::Error,
    memory_limit::{available_bytes, format_mib},
    snapshot::{PartInfo, SnapshotId},
    state::KeeperState,
    wire::PEER_TIMEOUT,
};
use crate::memory::Region;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::{
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant},
};

/// The keeper, which all its threads share.
pub(super) struct Keeper {
    state: Mutex<KeeperState>,
    /// Notified when something was filled, abandoned, released or stopped.
    changed: Condvar,
    /// Wakes the thread that encodes.
    to_encode: Sender<SnapshotId>,
    pub(super) peers: PeerPool,
    /// The most memory for slots and parity, in bytes.
    memory_limit: Option<u64>,
}

impl Keeper {
    pub(super) fn new(
        peers: PeerPool,
        memory_limit: Option<u64>,
        to_encode: Sender<SnapshotId>,
    ) -> Keeper {
        Keeper {
            state: Mutex::default(),
            changed: Condvar::new(),
            to_encode,
            peers,
            memory_limit,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, KeeperState> {
        self.state.lock()
    }

    /// Changes the state and wakes the threads that wait for a change.
    pub(super) fn update<T>(&self, change: impl FnOnce(&mut KeeperState) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        self.changed.notify_all();
        result
    }

    /// Waits for a change of the state, but no longer than `timeout`.
    pub(super) fn wait(&self, state: &mut MutexGuard<'_, KeeperState>, timeout: Duration) {
        self.changed.wait_for(state, timeout);
    }

    /// Lets the encoding thread make the parity of a snapshot.
    pub(super) fn encode_later(&self, id: SnapshotId) {
        // The thread lives as long as the process.
        let _ = self.to_encode.send(id);
    }

    /// Allocates `count` regions of `bytes` bytes.
    ///
    /// # Errors
    /// If they exceed the memory limit, or the machine's memory.
    pub(super) fn allocate(&self, bytes: u64, count: usize) -> Result<Vec<Arc<Region>>, Error> {
        let wanted = bytes.saturating_mul(count as u64);
        let used = self.lock().used_memory();
        let left = match self.memory_limit {
            Some(limit) => limit.saturating_sub(used.slots + used.parity),
            // The other half is for what the ranks will need.
            None => available_bytes().map_or(u64::MAX, |bytes| bytes / 2),
        };
        if wanted > left {
            let slot = format_mib(bytes);
            let left = format_mib(left);
            let limit = if self.memory_limit.is_some() {
                format!("snapshot.memory_gib leaves {left}")
            } else {
                format!("half of the machine's free memory is {left}")
            };
            let reason = format!("no memory for {count} slots of {slot}: {limit}");
            return Err(Error::Refused(reason));
        }
        let mut regions = Vec::with_capacity(count);
        for _ in 0..count {
            let region = Region::create("moerun snapshot", bytes as usize)?;
            regions.push(Arc::new(region));
        }
        Ok(regions)
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
        read: impl FnOnce(&Region, &PartInfo) -> T,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + PEER_TIMEOUT;
        let refused = |problem: &str| {
            let reason = format!("rank {rank}'s part of step {} {problem}", id.step);
            Err(Error::Refused(reason))
        };
        let mut state = self.lock();
        loop {
            if let Some(slot) = state.slots.find(id, rank) {
                let part = state.slots.part(slot).expect("found by its part");
                if part.filled >= filled_to.min(part.info.bytes) {
                    let info = part.info.clone();
                    let region = state.region(slot);
                    state.slots.pin(slot);
                    drop(state);
                    let result = read(&region, &info);
                    self.lock().slots.unpin(slot);
                    return Ok(result);
                }
            } else if !state.may_arrive(id) {
                return refused("is not here");
            }
            let left = deadline.checked_duration_since(Instant::now());
            let Some(left) = left.filter(|_| !state.is_stopping()) else {
                return refused("was not filled in time");
            };
            self.wait(&mut state, left);
        }
    }
}
