//! The slots of a node's ranks and what they hold: a state machine without memory.
//!
//! A rank has two slots, or three if a durable write may read one. The newest complete snapshot is
//! not overwritten before a newer one is complete *on every rank*, which the launcher declares
//! ([`Slots::commit`]). A rank that finds no free slot skips its snapshot and never waits.

use crate::keeper::{
    checksums::Checksums,
    snapshot::{PartInfo, SnapshotId},
};

/// A rank's part of a snapshot in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) id: SnapshotId,
    /// The rank that made the part.
    pub(crate) rank: usize,
    /// The length of the part once it is complete.
    pub(crate) bytes: u64,
    /// The checksums of the chunks that are filled.
    pub(crate) checksums: Checksums,
    /// Set once the part is complete.
    pub(crate) info: Option<PartInfo>,
    /// The number of filled bytes.
    pub(crate) filled: u64,
    /// True if the part shall be written to disk.
    pub(crate) durable: bool,
}

impl Part {
    pub(crate) fn is_complete(&self) -> bool {
        self.info.is_some()
    }

    /// Replaces the checksums of a complete part.
    pub(crate) fn set_checksums(&mut self, checksums: Checksums) {
        self.checksums = checksums;
        self.complete();
    }

    fn complete(&mut self) {
        self.info = Some(PartInfo {
            rank: self.rank,
            bytes: self.bytes,
            digest: self.checksums.digest(),
        });
    }
}

#[derive(Debug, Clone)]
struct Slot {
    /// The rank that may write the slot; none for a part that was brought here to be read.
    writer: Option<usize>,
    part: Option<Part>,
    /// The number of readers that need the part.
    pins: usize,
    /// True if one of them is the snapshot that [`Slots::pin_snapshot`] keeps.
    is_kept: bool,
}

impl Slot {
    fn holds(&self, id: SnapshotId) -> bool {
        self.part.as_ref().is_some_and(|part| part.id == id)
    }

    fn is_used(&self) -> bool {
        self.writer.is_some() || self.part.is_some() || self.pins > 0
    }
}

/// All slots of a node.
#[derive(Debug, Clone, Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// The newest snapshot that is complete on every rank.
    newest: Option<SnapshotId>,
}

impl Slots {
    /// Returns the newest snapshot that is complete on every rank.
    pub(crate) fn newest(&self) -> Option<SnapshotId> {
        self.newest
    }

    pub(crate) fn set_newest(&mut self, id: Option<SnapshotId>) {
        self.newest = id;
    }

    /// Returns the slots of `rank`, in order.
    pub(crate) fn of_rank(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter(move |(_, slot)| slot.writer == Some(rank))
            .map(|(number, _)| number)
    }

    /// Adds an empty slot and returns its number.
    pub(crate) fn add(&mut self, writer: Option<usize>) -> usize {
        self.slots.push(Slot {
            writer,
            part: None,
            pins: 0,
            is_kept: false,
        });
        self.slots.len() - 1
    }

    /// Takes a free slot for a part of `rank`: an empty one, else the oldest that a newer complete
    /// snapshot has superseded.
    pub(crate) fn reserve(
        &mut self,
        rank: usize,
        id: SnapshotId,
        bytes: u64,
        durable: bool,
    ) -> Option<usize> {
        let is_free = |slot: &Slot| match &slot.part {
            _ if slot.pins > 0 => false,
            None => true,
            Some(part) => self.newest.is_some_and(|newest| part.id < newest),
        };
        let slot = self
            .of_rank(rank)
            .filter(|&slot| is_free(&self.slots[slot]))
            .min_by_key(|&slot| self.part(slot).map(|part| part.id))?;
        self.slots[slot].part = Some(Part {
            id,
            rank,
            bytes,
            checksums: Checksums::default(),
            info: None,
            filled: 0,
            durable,
        });
        Some(slot)
    }

    /// Records that `slot` holds its part up to byte `filled`, and the checksums of the chunks
    /// that were completed since.
    ///
    /// # Errors
    /// If the slot is not reserved, or the number of bytes is not possible.
    pub(crate) fn fill(&mut self, slot: usize, filled: u64, crcs: &[u32]) -> Result<&Part, String> {
        let part = self
            .slots
            .get_mut(slot)
            .and_then(|slot| slot.part.as_mut())
            .ok_or("a slot was filled that is not reserved")?;
        if filled < part.filled || filled > part.bytes {
            return Err(format!(
                "{filled} bytes were filled after {} of {}",
                part.filled, part.bytes
            ));
        }
        part.filled = filled;
        part.checksums.extend(crcs);
        if filled == part.bytes {
            part.complete();
        }
        Ok(part)
    }

    /// Puts a complete part into a slot, which no rank may write then.
    pub(crate) fn insert(
        &mut self,
        slot: usize,
        id: SnapshotId,
        info: PartInfo,
        checksums: Checksums,
    ) {
        self.slots[slot].part = Some(Part {
            id,
            rank: info.rank,
            bytes: info.bytes,
            checksums,
            info: Some(info),
            filled: info.bytes,
            durable: false,
        });
    }

    /// Drops the part in a slot.
    pub(crate) fn release(&mut self, slot: usize) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.part = None;
        }
    }

    /// Takes the right to write a slot from its rank. A part in it can still be read.
    pub(crate) fn remove_writer(&mut self, slot: usize) {
        self.slots[slot].writer = None;
    }

    /// Takes the right to write from all ranks that are not on this node any more.
    pub(crate) fn retain_writers(&mut self, is_here: impl Fn(usize) -> bool) {
        for slot in &mut self.slots {
            slot.writer = slot.writer.filter(|&rank| is_here(rank));
        }
    }

    /// Records that snapshot `id` is complete on every rank.
    pub(crate) fn commit(&mut self, id: SnapshotId) {
        self.newest = self.newest.max(Some(id));
    }

    /// Drops parts older than `id` in slots that no rank writes: they were brought here to be read,
    /// or their rank has other slots now. Parts with readers stay, until a later call.
    pub(crate) fn drop_fetched_before(&mut self, id: SnapshotId) {
        for slot in &mut self.slots {
            let is_unneeded = slot.writer.is_none() && slot.pins == 0;
            slot.part.take_if(|part| is_unneeded && part.id < id);
        }
    }

    /// Drops what a rank that has died left half-written. Returns its snapshots.
    pub(crate) fn drop_unfinished(&mut self, rank: usize) -> Vec<SnapshotId> {
        let own = self.slots.iter_mut();
        let own = own.filter(|slot| slot.writer == Some(rank));
        let dropped = own.filter_map(|slot| slot.part.take_if(|part| !part.is_complete()));
        dropped.map(|part| part.id).collect()
    }

    /// Drops snapshot `id`, which will never be complete.
    pub(crate) fn abandon(&mut self, id: SnapshotId) {
        self.retain(|part| part.id != id);
    }

    /// Drops all parts for which `keep` returns false.
    pub(crate) fn retain(&mut self, keep: impl Fn(&Part) -> bool) {
        for slot in &mut self.slots {
            slot.part.take_if(|part| !keep(part));
        }
    }

    /// Returns the slot that holds `rank`'s part of `id`, whether complete or not.
    pub(crate) fn find(&self, id: SnapshotId, rank: usize) -> Option<usize> {
        self.slots.iter().position(|slot| {
            slot.part
                .as_ref()
                .is_some_and(|part| part.id == id && part.rank == rank)
        })
    }

    pub(crate) fn part(&self, slot: usize) -> Option<&Part> {
        self.slots[slot].part.as_ref()
    }

    pub(crate) fn part_mut(&mut self, slot: usize) -> Option<&mut Part> {
        self.slots[slot].part.as_mut()
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = &Part> {
        self.slots.iter().filter_map(|slot| slot.part.as_ref())
    }

    /// Returns for each slot whether its memory is needed: by a writer, a part or a reader.
    pub(crate) fn are_used(&self) -> impl Iterator<Item = bool> + '_ {
        self.slots.iter().map(Slot::is_used)
    }

    pub(crate) fn pin(&mut self, slot: usize) {
        self.slots[slot].pins += 1;
    }

    pub(crate) fn unpin(&mut self, slot: usize) {
        let pins = &mut self.slots[slot].pins;
        *pins = pins.saturating_sub(1);
    }

    /// Keeps the parts of a snapshot from being overwritten.
    pub(crate) fn pin_snapshot(&mut self, id: SnapshotId) {
        for slot in &mut self.slots {
            if slot.holds(id) && !slot.is_kept {
                slot.pins += 1;
                slot.is_kept = true;
            }
        }
    }

    /// Undoes [`Slots::pin_snapshot`], also for parts that were dropped since.
    pub(crate) fn unpin_snapshot(&mut self) {
        for slot in &mut self.slots {
            if std::mem::take(&mut slot.is_kept) {
                slot.pins = slot.pins.saturating_sub(1);
            }
        }
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

    fn snapshot(step: u64) -> SnapshotId {
        SnapshotId {
            generation: 0,
            step,
        }
    }

    /// A node with two ranks, and a launcher that takes one snapshot after the other.
    struct Node {
        slots: Slots,
        step: u64,
        /// The snapshot that is being filled.
        open: Option<SnapshotId>,
        pinned: Option<SnapshotId>,
    }

    impl Node {
        fn new(slots_per_rank: usize) -> Node {
            let mut slots = Slots::default();
            for rank in [0, 1] {
                for _ in 0..slots_per_rank {
                    slots.add(Some(rank));
                }
            }
            Node {
                slots,
                step: 0,
                open: None,
                pinned: None,
            }
        }

        fn is_complete(&self, id: SnapshotId) -> bool {
            let complete = self
                .slots
                .parts()
                .filter(|part| part.id == id)
                .filter(|part| part.is_complete());
            complete.count() == 2
        }

        fn take(&mut self) {
            if self.open.is_some() {
                return;
            }
            self.step += 1;
            let id = snapshot(self.step);
            let mut taken = Vec::new();
            for rank in [0, 1] {
                let slot = self.slots.reserve(rank, id, 10, false);
                taken.extend(slot);
            }
            // All ranks take a snapshot, or none does.
            if taken.len() == 2 {
                self.open = Some(id);
                return;
            }
            for slot in taken {
                self.slots.release(slot);
            }
        }

        fn fill(&mut self, rank: usize) {
            let Some(id) = self.open else {
                return;
            };
            if let Some(slot) = self.slots.find(id, rank) {
                let part = self.slots.part(slot).unwrap();
                let filled = (part.filled + 5).min(10);
                self.slots.fill(slot, filled, &[]).unwrap();
            }
        }

        fn apply(&mut self, action: Action) {
            match action {
                Action::Take => self.take(),
                Action::Fill(rank) => self.fill(rank),
                Action::Commit => {
                    if let Some(id) = self.open.filter(|&id| self.is_complete(id)) {
                        self.slots.commit(id);
                        self.open = None;
                    }
                }
                Action::Die(rank) => drop(self.slots.drop_unfinished(rank)),
                Action::Pin => {
                    if let (Some(newest), None) = (self.slots.newest(), self.pinned) {
                        self.slots.pin_snapshot(newest);
                        self.pinned = Some(newest);
                    }
                }
                Action::Unpin => {
                    if self.pinned.take().is_some() {
                        self.slots.unpin_snapshot();
                    }
                }
                Action::Abandon => {
                    if let Some(id) = self.open.take() {
                        self.slots.abandon(id);
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn what_was_committed_stays_until_something_newer_is(
            slots_per_rank in 2usize..4,
            actions in prop::collection::vec(action(), 1..80),
        ) {
            let mut node = Node::new(slots_per_rank);
            for action in actions {
                node.apply(action);
                let newest = node.slots.newest();
                for id in [newest, node.pinned].into_iter().flatten() {
                    prop_assert!(node.is_complete(id), "{:?} is gone", id);
                }
                let is_written = newest.is_some() && node.pinned == newest;
                if slots_per_rank == 3 && node.open.is_none() && is_written {
                    // A durable write of the newest does not prevent the next.
                    let next = snapshot(node.step + 1);
                    let mut slots = node.slots.clone();
                    prop_assert!(slots.reserve(0, next, 10, false).is_some());
                }
            }
        }
    }

    #[test]
    fn a_slot_whose_pinned_part_was_dropped_is_free_after_the_pin() {
        let mut slots = Slots::default();
        slots.add(Some(0));
        slots.reserve(0, snapshot(1), 10, false).unwrap();
        slots.pin_snapshot(snapshot(1));
        slots.abandon(snapshot(1));
        assert_eq!(slots.reserve(0, snapshot(2), 10, false), None);
        slots.unpin_snapshot();
        assert_eq!(slots.reserve(0, snapshot(2), 10, false), Some(0));
        // A pin of the next snapshot does not undo that of a reader.
        slots.pin(0);
        slots.pin_snapshot(snapshot(2));
        slots.unpin_snapshot();
        slots.release(0);
        assert_eq!(slots.reserve(0, snapshot(3), 10, false), None);
    }

    #[test]
    fn a_part_that_is_written_to_disk_stays_although_its_rank_has_other_slots() {
        let mut slots = Slots::default();
        slots.add(Some(0));
        slots.reserve(0, snapshot(1), 10, false).unwrap();
        slots.pin_snapshot(snapshot(1));
        slots.remove_writer(0);
        slots.drop_fetched_before(snapshot(2));
        assert_eq!(slots.find(snapshot(1), 0), Some(0));
        slots.unpin_snapshot();
        slots.drop_fetched_before(snapshot(3));
        assert_eq!(slots.find(snapshot(1), 0), None);
    }

    #[test]
    fn impossible_reports_are_refused() {
        let mut slots = Slots::default();
        let slot = slots.add(Some(0));
        assert!(slots.fill(slot, 5, &[]).is_err());
        slots.reserve(0, snapshot(1), 10, false).unwrap();
        slots.fill(slot, 5, &[1]).unwrap();
        let error = slots.fill(slot, 4, &[]).unwrap_err();
        assert_eq!(error, "4 bytes were filled after 5 of 10");
        assert!(slots.fill(slot, 11, &[]).is_err());
    }
}
