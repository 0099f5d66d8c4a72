//! Which memory holds what: the slots of a node's ranks, as a state machine without memory.
//!
//! A rank has two slots, or three where one may be read by a durable write: the newest complete snapshot is never
//! written over before a newer one is complete *on every rank*, which the launcher says ([`Slots::commit`]). A rank that
//! finds no free slot skips its snapshot; it never waits.

use super::SnapshotId;
use serde::{Deserialize, Serialize};

/// A rank's part of a snapshot, with which it can be checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartInfo {
    /// Whose it is.
    pub rank: usize,
    /// Its length.
    pub bytes: u64,
    /// CRC-32C of each of its chunks.
    pub crcs: Vec<u32>,
}

/// What a slot holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) id: SnapshotId,
    /// Length and checksums, as far as it is filled.
    pub(crate) info: PartInfo,
    /// Bytes that are there.
    pub(crate) filled: u64,
    /// Whether it is to be written to disk.
    pub(crate) durable: bool,
}

impl Part {
    pub(crate) fn is_complete(&self) -> bool {
        self.filled == self.info.bytes
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Slot {
    /// The rank that may write it; None for what was brought here to be read.
    pub(crate) writer: Option<usize>,
    pub(crate) part: Option<Part>,
    /// Readers for whom it must stay.
    pub(crate) pins: usize,
}

/// All slots of a node.
#[derive(Debug, Clone, Default)]
pub(crate) struct Slots {
    pub(crate) slots: Vec<Slot>,
    /// The newest snapshot that is complete on every rank.
    pub(crate) newest: Option<SnapshotId>,
}

impl Slots {
    /// Slots of `rank`, in order.
    pub(crate) fn of(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.slots.len()).filter(move |&slot| self.slots[slot].writer == Some(rank))
    }

    pub(crate) fn add(&mut self, writer: Option<usize>) -> usize {
        self.slots.push(Slot {
            writer,
            part: None,
            pins: 0,
        });
        self.slots.len() - 1
    }

    /// Takes a free slot for `rank`'s part of `id`: an empty one, else the oldest that a newer complete snapshot has
    /// superseded. None where there is none.
    pub(crate) fn reserve(
        &mut self,
        rank: usize,
        id: SnapshotId,
        bytes: u64,
        durable: bool,
    ) -> Option<usize> {
        let free = |slot: &Slot| match &slot.part {
            _ if slot.pins > 0 => false,
            None => true,
            Some(part) => self.newest.is_some_and(|newest| part.id < newest),
        };
        let candidates = self.of(rank).filter(|&slot| free(&self.slots[slot]));
        let slot =
            candidates.min_by_key(|&slot| self.slots[slot].part.as_ref().map(|part| part.id))?;
        let info = PartInfo {
            rank,
            bytes,
            crcs: Vec::new(),
        };
        self.slots[slot].part = Some(Part {
            id,
            info,
            filled: 0,
            durable,
        });
        Some(slot)
    }

    /// Says that `slot` holds its part up to byte `filled`, with the checksums of the chunks that were completed.
    pub(crate) fn fill(&mut self, slot: usize, filled: u64, crcs: &[u32]) -> Result<&Part, String> {
        let part = self.slots.get_mut(slot).and_then(|slot| slot.part.as_mut());
        let part = part.ok_or("a slot that is not reserved was filled")?;
        if filled < part.filled || filled > part.info.bytes {
            return Err(format!(
                "{filled} bytes filled after {} of {}",
                part.filled, part.info.bytes
            ));
        }
        part.filled = filled;
        part.info.crcs.extend(crcs);
        Ok(part)
    }

    /// Gives a reserved slot back.
    pub(crate) fn release(&mut self, slot: usize) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.part = None;
        }
    }

    /// Snapshot `id` is complete on every rank.
    pub(crate) fn commit(&mut self, id: SnapshotId) {
        self.newest = self.newest.max(Some(id));
    }

    /// Forgets what a rank that has died left half-written.
    pub(crate) fn drop_unfinished(&mut self, rank: usize) {
        for slot in self
            .slots
            .iter_mut()
            .filter(|slot| slot.writer == Some(rank))
        {
            if slot.part.as_ref().is_some_and(|part| !part.is_complete()) {
                slot.part = None;
            }
        }
    }

    /// Forgets snapshot `id`: it will never be complete.
    pub(crate) fn abandon(&mut self, id: SnapshotId) {
        self.retain(|part| part.id != id);
    }

    /// Forgets all that `keep` does not want.
    pub(crate) fn retain(&mut self, keep: impl Fn(&Part) -> bool) {
        for slot in &mut self.slots {
            if slot.part.as_ref().is_some_and(|part| !keep(part)) {
                slot.part = None;
            }
        }
    }

    /// The slot that holds `rank`'s part of `id`, whole or not.
    pub(crate) fn find(&self, id: SnapshotId, rank: usize) -> Option<usize> {
        self.slots.iter().position(|slot| {
            slot.part
                .as_ref()
                .is_some_and(|part| part.id == id && part.info.rank == rank)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Action {
        Take,
        Fill(usize),
        Commit,
        Die(usize),
        Pin,
        Unpin,
        Abandon,
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            4 => Just(Action::Take),
            6 => (0usize..2).prop_map(Action::Fill),
            3 => Just(Action::Commit),
            1 => (0usize..2).prop_map(Action::Die),
            1 => Just(Action::Pin),
            1 => Just(Action::Unpin),
            1 => Just(Action::Abandon),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn what_was_committed_stays_until_something_newer_is(
            per_rank in 2usize..4, actions in prop::collection::vec(action(), 1..80),
        ) {
            let mut slots = Slots::default();
            for rank in [0, 1] {
                (0..per_rank).for_each(|_| { slots.add(Some(rank)); });
            }
            let (mut step, mut open, mut pinned) = (0, None::<SnapshotId>, None::<SnapshotId>);
            let complete = |slots: &Slots, id| (0..2).all(|rank| slots.find(id, rank).is_some_and(|slot| {
                slots.slots[slot].part.as_ref().unwrap().is_complete()
            }));
            for action in actions {
                match action {
                    Action::Take if open.is_none() => {
                        step += 1;
                        let id = SnapshotId { generation: 0, step };
                        let taken: Vec<_> = (0..2).map(|rank| slots.reserve(rank, id, 10, false)).collect();
                        // All ranks or none.
                        if taken.iter().all(Option::is_some) {
                            open = Some(id);
                        } else {
                            taken.into_iter().flatten().for_each(|slot| slots.release(slot));
                        }
                    }
                    Action::Fill(rank) => if let Some(slot) = open.and_then(|id| slots.find(id, rank)) {
                        let filled = slots.slots[slot].part.as_ref().unwrap().filled;
                        slots.fill(slot, (filled + 5).min(10), &[]).unwrap();
                    },
                    Action::Commit => if let Some(id) = open.filter(|&id| complete(&slots, id)) {
                        slots.commit(id);
                        open = None;
                    },
                    Action::Die(rank) => slots.drop_unfinished(rank),
                    Action::Pin => if let (Some(newest), None) = (slots.newest, pinned) {
                        (0..2).for_each(|rank| { let slot = slots.find(newest, rank).unwrap(); slots.slots[slot].pins += 1; });
                        pinned = Some(newest);
                    },
                    Action::Unpin => if let Some(id) = pinned.take() {
                        (0..2).for_each(|rank| { let slot = slots.find(id, rank).unwrap(); slots.slots[slot].pins -= 1; });
                    },
                    Action::Abandon => if let Some(id) = open.take() { slots.abandon(id) },
                    Action::Take => {}
                }
                for id in [slots.newest, pinned].into_iter().flatten() {
                    prop_assert!(complete(&slots, id), "{:?} is gone", id);
                }
                if let (Some(id), 3) = (slots.newest, per_rank) && open.is_none() && pinned == Some(id) {
                    // A durable write of the newest does not keep the next from being taken.
                    let next = SnapshotId { generation: 0, step: step + 1 };
                    let taken = slots.clone().reserve(0, next, 10, false);
                    prop_assert!(taken.is_some());
                }
            }
        }
    }
}
