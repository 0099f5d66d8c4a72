//! The layout of parts in chunks, and of the chunks of a group in stripes. Pure arithmetic.

use crate::stripes::StripeLayout;

/// Returns the length of chunk number `chunk` of a part of `bytes` bytes, 0 behind its end.
pub(super) fn chunk_len(bytes: u64, chunk_bytes: usize, chunk: u64) -> usize {
    let start = chunk.saturating_mul(chunk_bytes as u64);
    bytes.saturating_sub(start).min(chunk_bytes as u64) as usize
}

/// Returns the number of chunks of a part of `bytes` bytes.
pub(super) fn num_chunks(bytes: u64, chunk_bytes: usize) -> u64 {
    bytes.div_ceil(chunk_bytes as u64)
}

/// The parts of the ranks of a group with one local number, which are coded together.
#[derive(Debug, Clone)]
pub(super) struct GroupLayout {
    pub(super) stripes: StripeLayout,
    pub(super) chunk_bytes: usize,
    /// The length of the part at each position, 0 for a node without such a rank.
    pub(super) part_bytes: Vec<u64>,
}

/// A chunk of a stripe's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DataChunk {
    pub(super) position: usize,
    pub(super) chunk: u64,
    /// The length of the chunk, 0 if the part ends before it.
    pub(super) len: usize,
}

/// A stripe, and the one of its parities that a node has to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OwnParity {
    pub(super) stripe: u64,
    pub(super) index: usize,
}

impl GroupLayout {
    pub(super) fn chunk_len(&self, position: usize, chunk: u64) -> usize {
        chunk_len(self.part_bytes[position], self.chunk_bytes, chunk)
    }

    /// Returns the data chunks of a stripe, in the order of the code.
    pub(super) fn data_chunks(&self, stripe: u64) -> Vec<DataChunk> {
        let mut chunks = Vec::with_capacity(self.stripes.data());
        for position in self.stripes.data_positions(stripe) {
            let chunk = self
                .stripes
                .chunk_at(position, stripe)
                .expect("a data position has a chunk");
            chunks.push(DataChunk {
                position,
                chunk,
                len: self.chunk_len(position, chunk),
            });
        }
        chunks
    }

    /// Returns the length of a stripe's parities, which is that of its longest chunk.
    pub(super) fn stripe_len(&self, stripe: u64) -> usize {
        self.data_chunks(stripe)
            .iter()
            .map(|chunk| chunk.len)
            .max()
            .unwrap_or(0)
    }

    /// Returns the stripes of which one of the first `num_parities` parities is at `position`.
    pub(super) fn parities_at(&self, position: usize, num_parities: usize) -> Vec<OwnParity> {
        let longest = self.part_bytes.iter().max().copied().unwrap_or(0);
        let num_chunks = num_chunks(longest, self.chunk_bytes);
        let mut own = Vec::new();
        for stripe in 0..self.stripes.count(num_chunks) {
            for index in 0..num_parities {
                if self.stripes.parity_position(stripe, index) == position {
                    own.push(OwnParity { stripe, index });
                }
            }
        }
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> GroupLayout {
        GroupLayout {
            stripes: StripeLayout {
                nodes: 3,
                parity: 1,
                rotation: 0,
            },
            chunk_bytes: 10,
            part_bytes: vec![25, 10, 0],
        }
    }

    #[test]
    fn the_last_chunk_is_shorter_and_later_ones_are_empty() {
        let expected = [10, 10, 5, 0];
        for (chunk, len) in expected.into_iter().enumerate() {
            assert_eq!(chunk_len(25, 10, chunk as u64), len);
        }
    }

    #[test]
    fn a_stripe_is_as_long_as_its_longest_chunk() {
        let layout = layout();
        // Positions 1 and 2 have data in stripe 0, positions 2 and 0 in stripe 1.
        let chunk = |position, chunk, len| DataChunk {
            position,
            chunk,
            len,
        };
        assert_eq!(layout.data_chunks(0), [chunk(1, 0, 10), chunk(2, 0, 0)]);
        assert_eq!(layout.data_chunks(4), [chunk(2, 3, 0), chunk(0, 2, 5)]);
        assert_eq!(layout.stripe_len(0), 10);
        assert_eq!(layout.stripe_len(4), 5);
    }

    #[test]
    fn every_stripe_is_encoded_at_one_position() {
        let layout = layout();
        // Three chunks take two rounds of three stripes.
        for position in 0..3 {
            let stripes: Vec<u64> = layout
                .parities_at(position, 1)
                .iter()
                .map(|own| own.stripe)
                .collect();
            let first = position as u64;
            assert_eq!(stripes, [first, first + 3]);
        }
    }
}
