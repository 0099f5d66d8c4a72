//! The parity that a keeper holds, by snapshot and stripe.

use super::snapshot::SnapshotId;
use crate::checksum::crc32c;
use std::collections::BTreeMap;

/// A stripe of the ranks with one local number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StripeId {
    pub(super) local: usize,
    pub(super) stripe: u64,
}

/// A parity and its checksum.
#[derive(Debug, Clone)]
pub(super) struct ParityChunk {
    bytes: Vec<u8>,
    crc: u32,
}

impl ParityChunk {
    pub(super) fn new(bytes: Vec<u8>) -> ParityChunk {
        let crc = crc32c(&bytes);
        ParityChunk { bytes, crc }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn is_intact(&self) -> bool {
        crc32c(&self.bytes) == self.crc
    }
}

/// The parity in memory, and buffers of old parity for reuse.
#[derive(Debug, Default)]
pub(super) struct ParityStore {
    snapshots: BTreeMap<SnapshotId, BTreeMap<StripeId, ParityChunk>>,
    spare_buffers: Vec<Vec<u8>>,
}

impl ParityStore {
    pub(super) fn insert(&mut self, id: SnapshotId, stripe: StripeId, chunk: ParityChunk) {
        self.snapshots.entry(id).or_default().insert(stripe, chunk);
    }

    pub(super) fn get(&self, id: SnapshotId, stripe: StripeId) -> Option<&ParityChunk> {
        self.snapshots.get(&id)?.get(&stripe)
    }

    /// Returns the number of bytes of all parity.
    pub(super) fn bytes(&self) -> u64 {
        self.snapshots
            .values()
            .flat_map(BTreeMap::values)
            .map(|chunk| chunk.bytes.len() as u64)
            .sum()
    }

    /// Returns how many parities of a snapshot do not match their checksums.
    pub(super) fn num_damaged(&self, id: SnapshotId) -> u64 {
        let Some(stripes) = self.snapshots.get(&id) else {
            return 0;
        };
        stripes.values().filter(|chunk| !chunk.is_intact()).count() as u64
    }

    /// Keeps only the parity of some snapshots, and the buffers of the others for reuse.
    pub(super) fn retain(&mut self, keep: impl Fn(SnapshotId) -> bool) {
        let spare_buffers = &mut self.spare_buffers;
        self.snapshots.retain(|&id, stripes| {
            let is_kept = keep(id);
            if !is_kept {
                for chunk in stripes.values_mut() {
                    spare_buffers.push(std::mem::take(&mut chunk.bytes));
                }
            }
            is_kept
        });
    }

    /// Returns a buffer with any contents.
    pub(super) fn take_buffer(&mut self) -> Vec<u8> {
        self.spare_buffers.pop().unwrap_or_default()
    }

    pub(super) fn return_buffer(&mut self, buffer: Vec<u8>) {
        self.spare_buffers.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_dropped_parity_are_used_again() {
        let mut store = ParityStore::default();
        let id = |step| SnapshotId {
            generation: 1,
            step,
        };
        let stripe = StripeId {
            local: 0,
            stripe: 5,
        };
        store.insert(id(1), stripe, ParityChunk::new(vec![1; 10]));
        store.insert(id(2), stripe, ParityChunk::new(vec![2; 20]));
        assert_eq!(store.bytes(), 30);
        store.retain(|other| other == id(2));
        assert_eq!(store.bytes(), 20);
        assert!(store.get(id(1), stripe).is_none());
        assert_eq!(store.take_buffer(), [1; 10]);
        assert!(store.take_buffer().is_empty());
    }

    #[test]
    fn a_changed_byte_is_damage() {
        let mut store = ParityStore::default();
        let id = SnapshotId {
            generation: 1,
            step: 1,
        };
        let stripe = StripeId {
            local: 0,
            stripe: 0,
        };
        let mut chunk = ParityChunk::new(vec![1, 2, 3]);
        chunk.bytes[1] ^= 4;
        store.insert(id, stripe, chunk);
        assert_eq!(store.num_damaged(id), 1);
        store.insert(id, stripe, ParityChunk::new(vec![1, 2, 3]));
        assert_eq!(store.num_damaged(id), 0);
    }
}
