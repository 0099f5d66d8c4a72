//! Memory: how much a keeper may take, and whose it is.

use super::state::{Effect, State};
use crate::{
    keeper::{
        checksums::Checksums,
        memory_size::format_mib,
        snapshot::{PartInfo, SnapshotId},
    },
    secure::Error,
};

/// Most slots that a rank may have. It needs three.
const MAX_SLOTS: usize = 16;

/// Permission to allocate some regions, until [`State::return_grant`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) bytes: u64,
    pub(crate) count: usize,
    /// The number of regions that were allocated.
    allocated: usize,
}

impl State {
    /// Permits the allocation of `count` regions of `bytes` bytes. `available` is the free memory
    /// of the machine, if it is known.
    ///
    /// # Errors
    /// If they exceed the memory limit, or half of the machine's free memory.
    pub(crate) fn grant(
        &mut self,
        bytes: u64,
        count: usize,
        available: Option<u64>,
    ) -> Result<Grant, Error> {
        let bytes = bytes.max(1);
        let wanted = bytes.saturating_mul(count as u64);
        let left = match self.budget.limit {
            Some(_) => self.memory_left(wanted),
            // The other half is for what the ranks will need.
            None => available.map_or(u64::MAX - 1, |available| {
                (available / 2).saturating_sub(self.budget.outstanding)
            }),
        };
        if wanted > left {
            let slot = format_mib(bytes);
            let left = format_mib(left);
            let limit = if self.budget.limit.is_some() {
                format!("snapshot.memory_gib leaves {left}")
            } else {
                format!("half of the machine's free memory is {left}")
            };
            let reason = format!("no memory for {count} slots of {slot}: {limit}");
            return Err(Error::Refused(reason));
        }
        self.budget.granted += wanted;
        self.budget.outstanding += wanted;
        Ok(Grant {
            bytes,
            count,
            allocated: 0,
        })
    }

    /// Records that one region of a grant was allocated: the machine's free memory shows it now.
    pub(crate) fn record_allocation(&mut self, grant: &mut Grant) {
        grant.allocated += 1;
        self.budget.outstanding -= grant.bytes;
    }

    /// Ends a grant, whose regions are in slots now or were freed.
    pub(crate) fn return_grant(&mut self, grant: &Grant) {
        let missing = grant.count - grant.allocated;
        self.budget.granted -= grant.bytes * grant.count as u64;
        self.budget.outstanding -= grant.bytes * missing as u64;
    }

    /// Returns how much memory the limit leaves, after freeing buffers if that is less than wanted.
    pub(super) fn memory_left(&mut self, wanted: u64) -> u64 {
        let Some(limit) = self.budget.limit else {
            return u64::MAX;
        };
        let used = self.slot_bytes() + self.parity.bytes() + self.budget.granted;
        let left = limit.saturating_sub(used);
        if left.saturating_sub(self.parity.spare_bytes()) < wanted {
            self.parity.drop_spares();
        }
        left
    }

    /// Returns the memory of all slots.
    pub(super) fn slot_bytes(&self) -> u64 {
        self.memory.iter().flatten().sum()
    }

    /// Returns the memory of a slot, 0 if it was freed.
    pub(super) fn len_of(&self, slot: usize) -> u64 {
        self.memory[slot].unwrap_or(0)
    }

    /// Frees memory that holds no part and that no rank writes.
    pub(super) fn free_memory(&mut self) {
        let mut freed = Vec::new();
        for (slot, is_used) in self.slots.are_used().enumerate() {
            if !is_used && self.memory[slot].take().is_some() {
                freed.push(slot);
            }
        }
        for slot in freed {
            self.add_effect(Effect::Free(slot));
        }
    }

    /// Keeps at most `count` slots of a rank that fit parts of `bytes` bytes, takes the others
    /// from it, and returns how many are missing.
    ///
    /// # Errors
    /// If there would be too many.
    pub(crate) fn keep_fitting_slots(
        &mut self,
        rank: usize,
        bytes: u64,
        count: usize,
    ) -> Result<usize, Error> {
        if count > MAX_SLOTS {
            let reason = format!("{count} slots are more than {MAX_SLOTS}");
            return Err(Error::Refused(reason));
        }
        let most = bytes.saturating_add(bytes / 4).saturating_add(1 << 20);
        let mut kept = 0;
        let own: Vec<usize> = self.slots.of_rank(rank).collect();
        for slot in own {
            let len = self.len_of(slot);
            if len >= bytes && len <= most && kept < count {
                kept += 1;
            } else {
                self.slots.remove_writer(slot);
            }
        }
        self.free_memory();
        Ok(count - kept)
    }

    /// Adds slots with new memory of these lengths to those of a rank, and returns their numbers.
    pub(crate) fn add_slots(&mut self, rank: usize, lens: &[u64]) -> Vec<usize> {
        let mut added = Vec::with_capacity(lens.len());
        for &len in lens {
            let slot = self.slots.add(Some(rank));
            self.memory.resize(slot + 1, None);
            self.memory[slot] = Some(len);
            added.push(slot);
        }
        added
    }

    /// Returns a rank's slots, in order.
    pub(crate) fn slots_of(&self, rank: usize) -> Vec<usize> {
        self.slots.of_rank(rank).collect()
    }

    /// Gives a slot to a part whose bytes are all known to be right, in memory of its own of `len`
    /// bytes. A damaged part that it replaces is dropped.
    pub(crate) fn insert_part(
        &mut self,
        id: SnapshotId,
        info: PartInfo,
        checksums: Checksums,
        len: u64,
    ) -> usize {
        if let Some(damaged) = self.slots.find(id, info.rank) {
            self.slots.release(damaged);
            self.free_memory();
        }
        let vacant = self.memory.iter().position(Option::is_none);
        let slot = vacant.unwrap_or_else(|| self.slots.add(None));
        if slot == self.memory.len() {
            self.memory.push(None);
        }
        self.slots.insert(slot, id, info, checksums);
        self.memory[slot] = Some(len);
        self.add_effect(Effect::Wake);
        slot
    }
}
