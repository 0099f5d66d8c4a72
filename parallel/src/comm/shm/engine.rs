//! The operations of a group that are in progress on this rank.

use super::{
    buffer::Completion,
    collective::{Collective, Rings},
    messages::Messages,
    segment::Segment,
};
use std::{collections::VecDeque, sync::atomic::Ordering};

/// The operations in progress. Collectives run one after the other, and messages overlap with them.
pub(super) struct Engine {
    pub(super) rings: Rings,
    pub(super) collectives: VecDeque<(Collective, Completion)>,
    pub(super) messages: Messages,
    /// The reason why the group was aborted.
    pub(super) abort_reason: Option<String>,
}

impl Engine {
    pub(super) fn new(rings: Rings, messages: Messages) -> Engine {
        Engine {
            rings,
            collectives: VecDeque::new(),
            messages,
            abort_reason: None,
        }
    }

    /// Advances every operation by one piece and rings the ranks that this concerns; true if any
    /// moved.
    pub(super) fn make_progress(&mut self, segment: &Segment, others_wait: bool) -> bool {
        let before = self.in_flight();
        let mut moved = false;
        if let Some((collective, completion)) = self.collectives.front_mut() {
            moved |= collective.make_progress(&mut self.rings);
            if collective.is_done() {
                completion.set(Ok(()));
                self.collectives.pop_front();
                moved = true;
            }
        }
        moved |= self.messages.make_progress(&mut self.rings.touched);
        for (rank, touched) in self.rings.touched.iter_mut().enumerate() {
            if std::mem::take(touched) {
                segment.ring_doorbell(rank);
            }
        }
        let completed = before - self.in_flight();
        if completed > 0 {
            let own = self.rings.rank;
            let pending = segment.pending(own);
            pending.fetch_sub(completed as u32, Ordering::SeqCst);
            if others_wait {
                segment.ring_doorbell(own);
            }
        }
        moved
    }

    pub(super) fn in_flight(&self) -> usize {
        self.collectives.len() + self.messages.in_flight()
    }

    /// True if an operation in progress waits for `rank`.
    pub(super) fn depends_on(&self, rank: usize) -> bool {
        let collective = self.collectives.front();
        collective.is_some_and(|(collective, _)| collective.depends_on(rank))
            || self.messages.depends_on(rank)
    }

    /// Drops all operations and refuses further ones.
    pub(super) fn abort(&mut self, reason: &str) {
        self.abort_reason.get_or_insert_with(|| reason.to_string());
        self.collectives.clear();
        self.messages.clear();
    }
}
