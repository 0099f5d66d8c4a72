//! The parity that a keeper holds, by snapshot and stripe.

use crate::{checksum::crc32c, keeper::snapshot::SnapshotId};
use std::collections::BTreeMap;

/// A stripe of the ranks with one local number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StripeId {
    pub(crate) local: usize,
    pub(crate) stripe: u64,
}

/// A parity and its checksum.
#[derive(Debug, Clone)]
pub(crate) struct ParityChunk {
    bytes: Vec<u8>,
    crc: u32,
}

impl ParityChunk {
    pub(crate) fn new(bytes: Vec<u8>) -> ParityChunk {
        let crc = crc32c(&bytes);
        ParityChunk { bytes, crc }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn is_intact(&self) -> bool {
        crc32c(&self.bytes) == self.crc
    }
}

/// The parity in memory, and buffers of old parity for reuse.
#[derive(Debug, Default)]
pub(crate) struct ParityStore {
    snapshots: BTreeMap<SnapshotId, BTreeMap<StripeId, ParityChunk>>,
    /// The number of bytes of all parity.
    bytes: u64,
    spare_buffers: Vec<Vec<u8>>,
    spare_bytes: u64,
}

impl ParityStore {
    pub(crate) fn insert(&mut self, id: SnapshotId, stripe: StripeId, chunk: ParityChunk) {
        self.bytes += chunk.bytes.len() as u64;
        let stripes = self.snapshots.entry(id).or_default();
        if let Some(replaced) = stripes.insert(stripe, chunk) {
            self.bytes -= replaced.bytes.len() as u64;
        }
    }

    pub(crate) fn get(&self, id: SnapshotId, stripe: StripeId) -> Option<&ParityChunk> {
        self.snapshots.get(&id)?.get(&stripe)
    }

    /// Returns the number of bytes of all parity.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the number of bytes that wait to be used again.
    pub(crate) fn spare_bytes(&self) -> u64 {
        self.spare_bytes
    }

    /// Frees the buffers that wait to be used again.
    pub(crate) fn drop_spares(&mut self) {
        self.spare_buffers.clear();
        self.spare_bytes = 0;
    }

    /// Returns how many parities of a snapshot do not match their checksums.
    pub(crate) fn num_damaged(&self, id: SnapshotId) -> u64 {
        let Some(stripes) = self.snapshots.get(&id) else {
            return 0;
        };
        stripes.values().filter(|chunk| !chunk.is_intact()).count() as u64
    }

    /// Keeps only the parity of some snapshots, and the buffers of the others for reuse.
    pub(crate) fn retain(&mut self, keep: impl Fn(SnapshotId) -> bool) {
        let mut dropped = Vec::new();
        self.snapshots.retain(|&id, stripes| {
            let is_kept = keep(id);
            if !is_kept {
                dropped.extend(std::mem::take(stripes).into_values());
            }
            is_kept
        });
        for chunk in dropped {
            self.bytes -= chunk.bytes.len() as u64;
            self.return_buffer(chunk.bytes);
        }
    }

    /// Returns a buffer with any contents.
    pub(crate) fn take_buffer(&mut self) -> Vec<u8> {
        let buffer = self.spare_buffers.pop().unwrap_or_default();
        self.spare_bytes -= buffer.capacity() as u64;
        buffer
    }

    pub(crate) fn return_buffer(&mut self, buffer: Vec<u8>) {
        self.spare_bytes += buffer.capacity() as u64;
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
        assert_eq!(store.spare_bytes(), 10);
        assert!(store.get(id(1), stripe).is_none());
        assert_eq!(store.take_buffer(), [1; 10]);
        assert!(store.take_buffer().is_empty());
        store.return_buffer(vec![3; 30]);
        store.drop_spares();
        assert!(store.take_buffer().is_empty() && store.spare_bytes() == 0);
        // A replaced parity counts once.
        store.insert(id(2), stripe, ParityChunk::new(vec![2; 25]));
        assert_eq!(store.bytes(), 25);
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
