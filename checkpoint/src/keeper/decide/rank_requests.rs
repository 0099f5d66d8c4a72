//! Decisions about the requests of ranks, which number their own slots from 0.

use super::{
    rank_table::RankSession,
    slots::Part,
    state::{Effect, State},
};
use crate::{
    keeper::{
        layout::num_chunks,
        protocol::{RankReply, RankRequest},
        report::Event,
        snapshot::SnapshotId,
    },
    secure::Error,
};
use std::time::Instant;

/// The decision about a rank's request.
#[derive(Debug)]
pub(crate) enum RankDecision {
    /// The request has no reply.
    Silent,
    Reply(RankReply),
    Job(RankJob),
}

/// Work outside the state.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RankJob {
    /// Give the rank its slots, of which `missing` must be allocated.
    Allocate { bytes: u64, missing: usize },
    /// Return the header of a part of the snapshot to restore.
    Header { rank: usize },
    /// Open such a part.
    Open { rank: usize },
}

/// Filled bytes of a slot.
struct FillReport {
    rank: usize,
    number: usize,
    filled_to: u64,
    crcs: Vec<u32>,
}

impl State {
    /// Records a connection of a rank, and drops what its earlier session left half-written.
    pub(crate) fn connect_rank(&mut self, session: RankSession, now: Instant) {
        if self.ranks.connect(session, now) {
            self.drop_unfinished(session.rank);
        }
    }

    /// Removes a connection of a rank, and drops what it left half-written.
    pub(crate) fn disconnect_rank(&mut self, session: RankSession) {
        if self.ranks.disconnect(session) {
            self.drop_unfinished(session.rank);
        }
    }

    /// Drops what a rank has not finished and will not. Those snapshots cannot be complete any
    /// more: the launcher abandons them, so that no keeper waits for the parts.
    fn drop_unfinished(&mut self, rank: usize) {
        for id in self.slots.drop_unfinished(rank) {
            let reason = format!("rank {rank} left its part unfinished");
            self.send(Event::Unprotected { id, reason });
        }
        self.free_memory();
        self.wake();
    }

    /// Decides about a request of a rank. Those of an earlier session come too late to change
    /// anything: its numbers of slots may mean others now.
    ///
    /// # Errors
    /// If it is not possible.
    pub(crate) fn decide_for_rank(
        &mut self,
        session: RankSession,
        request: RankRequest,
        now: Instant,
    ) -> Result<RankDecision, Error> {
        let rank = session.rank;
        if self.ranks.is_outdated(session) {
            if request.has_reply() {
                return Err(Error::Protocol("the rank has connected again".into()));
            }
            return Ok(RankDecision::Silent);
        }
        self.ranks.record_message(rank, now);
        match request {
            RankRequest::Hello { .. } => Err(Error::Protocol("a second hello".into())),
            RankRequest::Allocate { bytes, slots } => {
                let missing = self.keep_fitting_slots(rank, bytes, slots)?;
                Ok(RankDecision::Job(RankJob::Allocate { bytes, missing }))
            }
            RankRequest::Reserve { id, bytes, durable } => {
                let slot = self.reserve(rank, id, bytes, durable);
                Ok(RankDecision::Reply(RankReply::Slot(slot)))
            }
            RankRequest::Release { slot } => {
                self.release(rank, slot);
                Ok(RankDecision::Silent)
            }
            RankRequest::Filled {
                slot,
                filled_to,
                crcs,
            } => {
                let id = self.fill(FillReport {
                    rank,
                    number: slot,
                    filled_to,
                    crcs,
                })?;
                self.begin_encoding(id);
                Ok(RankDecision::Silent)
            }
            RankRequest::Heartbeat { step, progress } => {
                self.ranks.record_progress(rank, step, progress);
                Ok(RankDecision::Silent)
            }
            RankRequest::IsComplete { id } => {
                let slot = self.slots.find(id, rank);
                let part = slot.and_then(|slot| self.slots.part(slot));
                let is_complete = part.is_some_and(Part::is_complete);
                Ok(RankDecision::Reply(RankReply::Complete(is_complete)))
            }
            RankRequest::Header { rank } => {
                self.header_requests += 1;
                Ok(RankDecision::Job(RankJob::Header { rank }))
            }
            RankRequest::Open { rank } => Ok(RankDecision::Job(RankJob::Open { rank })),
        }
    }

    /// Takes a free slot for a part of `rank`, or counts the snapshot as skipped.
    fn reserve(&mut self, rank: usize, id: SnapshotId, bytes: u64, durable: bool) -> Option<usize> {
        let fits = self
            .slots
            .of_rank(rank)
            .all(|slot| self.len_of(slot) >= bytes);
        let reserved = if fits {
            self.slots.reserve(rank, id, bytes, durable)
        } else {
            None
        };
        self.skipped += u64::from(reserved.is_none());
        let reserved = reserved?;
        self.slots.of_rank(rank).position(|slot| slot == reserved)
    }

    /// Empties a slot of a rank, if there is such a slot and no complete part in it.
    fn release(&mut self, rank: usize, number: usize) {
        let slot = self.slots.of_rank(rank).nth(number);
        let Some(slot) = slot else {
            return;
        };
        let part = self.slots.part(slot);
        if part.is_none_or(|part| !self.complete.contains_key(&part.id)) {
            self.slots.release(slot);
            self.add_effect(Effect::Wake);
        }
    }

    /// Records filled bytes of a slot, reports a complete part, and returns its snapshot.
    fn fill(&mut self, report: FillReport) -> Result<SnapshotId, Error> {
        let FillReport {
            rank,
            number,
            filled_to,
            crcs,
        } = report;
        let Some(slot) = self.slots.of_rank(rank).nth(number) else {
            let reason = format!("there is no slot {number}");
            return Err(Error::Protocol(reason));
        };
        self.check_checksums(slot, filled_to, &crcs)?;
        let part = self
            .slots
            .fill(slot, filled_to, &crcs)
            .map_err(Error::Protocol)?;
        let id = part.id;
        let complete = part.info.map(|info| Event::Complete {
            id,
            part: info,
            durable: part.durable,
        });
        if let Some(event) = complete {
            self.send(event);
        }
        self.add_effect(Effect::Wake);
        Ok(id)
    }

    /// Checks that there are no more checksums than filled chunks, and one for each in the end.
    fn check_checksums(&self, slot: usize, filled_to: u64, crcs: &[u32]) -> Result<(), Error> {
        let Some(part) = self.slots.part(slot) else {
            return Ok(());
        };
        let have = (part.checksums.as_slice().len() + crcs.len()) as u64;
        // A new keeper may not know the generation yet; then the bound is a coarse one.
        let chunk_bytes = self.chunk_bytes(part.id).ok();
        let chunks = num_chunks(filled_to, chunk_bytes.unwrap_or(1));
        let is_right = if chunk_bytes.is_some() && filled_to == part.bytes {
            have == chunks
        } else {
            have <= chunks
        };
        if is_right {
            return Ok(());
        }
        let reason = format!("{have} checksums for {chunks} chunks");
        Err(Error::Protocol(reason))
    }
}
