//! Reading parts: what a thread that wants one has to wait for.

use super::state::{Effect, State};
use crate::{
    keeper::{
        checksums::Checksums,
        snapshot::{PartInfo, SnapshotId},
    },
    secure::Error,
};
use std::{net::SocketAddr, time::Instant};

/// A wait for a rank's part, up to some byte or to its end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PartRead {
    pub(crate) id: SnapshotId,
    pub(crate) rank: usize,
    pub(crate) filled_to: u64,
    pub(crate) deadline: Instant,
}

/// The next step of such a wait.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReadStep {
    /// The slot is pinned, so that no rank overwrites it until [`State::end_read`].
    Ready { slot: usize, part: ReadablePart },
    /// The state has to change first.
    Wait,
}

/// A part, of which a reader needs all or some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReadablePart {
    pub(crate) bytes: u64,
    /// The checksums of the chunks that are filled.
    pub(crate) checksums: Checksums,
}

/// The location of a rank's part of the snapshot to restore.
#[derive(Debug)]
pub(crate) struct RestoreSource {
    pub(crate) id: SnapshotId,
    pub(crate) part: PartInfo,
    pub(crate) chunk_bytes: usize,
    pub(crate) holder: SocketAddr,
    /// True if the part is in this keeper's memory.
    pub(crate) is_here: bool,
}

impl State {
    /// Decides whether a part can be read now.
    ///
    /// # Errors
    /// If the part is not here and cannot arrive any more, or is not filled in time.
    pub(crate) fn poll_read(&mut self, read: &PartRead, now: Instant) -> Result<ReadStep, Error> {
        let PartRead { id, rank, .. } = *read;
        let refused = |problem: &str| {
            let reason = format!("rank {rank}'s part of step {} {problem}", id.step);
            Err(Error::Refused(reason))
        };
        if let Some(slot) = self.slots.find(id, rank) {
            let part = self.slots.part(slot).expect("found by its part");
            if part.filled >= read.filled_to.min(part.bytes) {
                let part = ReadablePart {
                    bytes: part.bytes,
                    checksums: part.checksums.clone(),
                };
                self.slots.pin(slot);
                return Ok(ReadStep::Ready { slot, part });
            }
        } else if !self.may_arrive(id) {
            return refused("is not here");
        }
        if now >= read.deadline || self.lifetime.is_stopping() {
            return refused("was not filled in time");
        }
        Ok(ReadStep::Wait)
    }

    /// Ends the reading of a slot.
    pub(crate) fn end_read(&mut self, slot: usize) {
        self.slots.unpin(slot);
        self.free_memory();
    }

    /// True if a snapshot that is not here may still arrive.
    pub(super) fn may_arrive(&self, id: SnapshotId) -> bool {
        let current = self.memberships.keys().next_back().copied();
        let is_current = current.is_none_or(|current| id.generation >= current);
        is_current && self.abandoned < Some(id)
    }

    /// Returns the slot of a rank's part, whether complete or not.
    pub(crate) fn find_part(&self, id: SnapshotId, rank: usize) -> Option<usize> {
        self.slots.find(id, rank)
    }

    /// Returns the slot of a rank's part of the newest complete snapshot, and its length.
    pub(crate) fn newest_part(&self, rank: usize) -> Option<(usize, u64)> {
        let slot = self.slots.find(self.slots.newest()?, rank)?;
        Some((slot, self.slots.part(slot)?.bytes))
    }

    /// Returns the newest snapshot that is complete on every rank.
    pub(crate) fn newest(&self) -> Option<SnapshotId> {
        self.slots.newest()
    }

    /// Returns the ranks whose complete parts of a snapshot are here.
    pub(crate) fn complete_ranks(&self, id: SnapshotId) -> Vec<usize> {
        self.slots
            .parts()
            .filter(|part| part.id == id && part.is_complete())
            .map(|part| part.rank)
            .collect()
    }

    /// Returns where a rank's part of the snapshot to restore is.
    ///
    /// # Errors
    /// If there is nothing to restore, or no such rank.
    pub(crate) fn restore_source(&self, rank: usize) -> Result<RestoreSource, Error> {
        let Some(target) = &self.restoring else {
            return Err(Error::Refused("there is nothing to restore".into()));
        };
        let id = target.snapshot.id;
        let part = target.snapshot.parts.get(rank);
        let Some((&part, &holder)) = part.zip(target.holders.get(rank)) else {
            let reason = format!("the snapshot of step {} has no rank {rank}", id.step);
            return Err(Error::Refused(reason));
        };
        Ok(RestoreSource {
            id,
            part,
            chunk_bytes: target.snapshot.topology.chunk_bytes,
            holder,
            is_here: self.slots.find(id, rank).is_some(),
        })
    }

    /// Wakes the threads that wait, so that they see a new deadline or the end.
    pub(super) fn wake(&mut self) {
        self.add_effect(Effect::Wake);
    }
}
