//! Parity: what is stored, and which snapshots have it.

use super::{
    parity_store::{ParityChunk, StripeId},
    state::{Effect, State},
};
use crate::{
    keeper::{checksums::Checksums, memory_size::format_mib, report::Event, snapshot::SnapshotId},
    secure::Error,
};
use std::time::Duration;

/// Most snapshots whose encoding is remembered. Each one that is neither committed nor abandoned
/// takes a slot, so there are few.
const MAX_ENCODING: usize = 64;

impl State {
    /// Returns the size of a snapshot's chunks.
    ///
    /// # Errors
    /// If the topology of the snapshot is not known.
    pub(crate) fn chunk_bytes(&self, id: SnapshotId) -> Result<usize, Error> {
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

    /// Stores the parity of a stripe.
    ///
    /// # Errors
    /// If the snapshot was abandoned, or the memory limit leaves too little.
    pub(crate) fn put_parity(
        &mut self,
        id: SnapshotId,
        stripe: StripeId,
        bytes: Vec<u8>,
    ) -> Result<(), Error> {
        if !self.may_arrive(id) && !self.complete.contains_key(&id) {
            let reason = format!("the snapshot of step {} was abandoned", id.step);
            return Err(Error::Refused(reason));
        }
        let wanted = bytes.len() as u64;
        let left = self.memory_left(wanted);
        if wanted > left {
            let wanted = format_mib(wanted);
            let left = format_mib(left);
            let reason = format!("no memory for {wanted} of parity: the limit leaves {left}");
            return Err(Error::Refused(reason));
        }
        self.parity.insert(id, stripe, ParityChunk::new(bytes));
        Ok(())
    }

    /// Returns the parity of a stripe.
    ///
    /// # Errors
    /// If there is no such parity, or it is damaged.
    pub(crate) fn intact_parity(&self, id: SnapshotId, stripe: StripeId) -> Result<&[u8], Error> {
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

    pub(crate) fn num_damaged_parities(&self, id: SnapshotId) -> u64 {
        self.parity.num_damaged(id)
    }

    /// Returns a buffer with any contents.
    pub(crate) fn take_buffer(&mut self) -> Vec<u8> {
        self.parity.take_buffer()
    }

    pub(crate) fn return_buffer(&mut self, buffer: Vec<u8>) {
        self.parity.return_buffer(buffer);
    }

    /// Lets a snapshot be encoded, unless something has begun that already.
    pub(super) fn begin_encoding(&mut self, id: SnapshotId) {
        if self.encoding.insert(id) {
            self.add_effect(Effect::Encode(id));
        }
        while self.encoding.len() > MAX_ENCODING {
            self.encoding.pop_first();
        }
    }

    /// Records that this keeper's encoding of a snapshot ended.
    pub(crate) fn end_encoding(&mut self, id: SnapshotId, result: Result<(), Error>) {
        let event = match result {
            Ok(()) => {
                self.mark_protected(id);
                Event::Protected { id }
            }
            Err(error) => Event::Unprotected {
                id,
                reason: error.to_string(),
            },
        };
        self.send(event);
    }

    pub(crate) fn mark_protected(&mut self, id: SnapshotId) {
        if self.may_arrive(id) || self.complete.contains_key(&id) {
            self.protected.insert(id);
        }
    }

    pub(crate) fn add_coding_time(&mut self, time: Duration) {
        self.coding_time += time;
    }

    pub(super) fn retain_parity(&mut self, keep: impl Fn(SnapshotId) -> bool) {
        self.parity.retain(&keep);
        self.protected_checksums.retain(|&(id, _), _| keep(id));
        self.protected.retain(|&id| keep(id));
        self.encoding.retain(|&id| keep(id));
    }

    /// Stores the checksums of a part that this keeper's parity protects.
    pub(crate) fn put_checksums(&mut self, id: SnapshotId, rank: usize, checksums: Checksums) {
        if self.may_arrive(id) || self.complete.contains_key(&id) {
            self.protected_checksums.insert((id, rank), checksums);
        }
    }

    /// Returns the checksums of a complete part that is here or protected here.
    pub(crate) fn checksums(&self, id: SnapshotId, rank: usize) -> Option<Checksums> {
        let own = self.slots.find(id, rank);
        let own = own.and_then(|slot| self.slots.part(slot));
        let own = own.filter(|part| part.is_complete());
        let own = own.map(|part| &part.checksums);
        own.or(self.protected_checksums.get(&(id, rank))).cloned()
    }

    /// Replaces the checksums of a complete part here.
    pub(crate) fn set_checksums(&mut self, id: SnapshotId, rank: usize, checksums: Checksums) {
        if let Some(slot) = self.slots.find(id, rank)
            && let Some(part) = self.slots.part_mut(slot)
        {
            part.set_checksums(checksums);
        }
    }

    /// Replaces the checksums of a part, here and in the complete snapshot.
    pub(crate) fn replace_checksums(&mut self, id: SnapshotId, rank: usize, checksums: Checksums) {
        let digest = checksums.digest();
        self.set_checksums(id, rank, checksums);
        if let Some(snapshot) = self.complete.get_mut(&id)
            && let Some(part) = snapshot.make_mut().parts.get_mut(rank)
        {
            part.digest = digest;
        }
    }
}
