//! The first version of the order, which runs that began with it keep.
//!
//! Sources are mixed in blocks of a fixed number of samples. Each source has its exact share of
//! every block, rounded to whole samples, in shuffled order. Blocks do not end where epochs do, so
//! the samples of one epoch mix with those of the next.

use super::{
    Draw,
    permutation::{mix, permute, window_of_draw},
};

/// Samples per block, in which the shares of all sources are exact.
const BLOCK: u64 = 1 << 12;

#[derive(Debug, Clone)]
pub(super) struct Blocks {
    /// Samples of each source per block. Their sum is [`BLOCK`].
    shares: Vec<u64>,
}

impl Blocks {
    /// Returns the blend of sources with these weights.
    ///
    /// # Errors
    /// If a weight is so small that its source has no sample in a block.
    pub(super) fn new(weights: &[f64]) -> Result<Blocks, String> {
        let total: f64 = weights.iter().sum();
        let exact: Vec<f64> = weights
            .iter()
            .map(|weight| weight / total * BLOCK as f64)
            .collect();
        let mut shares: Vec<u64> = exact.iter().map(|share| share.floor() as u64).collect();
        // The largest remainders get the samples that rounding left.
        let mut order: Vec<usize> = (0..shares.len()).collect();
        order.sort_by(|&a, &b| {
            exact[b]
                .fract()
                .total_cmp(&exact[a].fract())
                .then(a.cmp(&b))
        });
        let missing = BLOCK - shares.iter().sum::<u64>();
        for &source in order.iter().cycle().take(missing as usize) {
            shares[source] += 1;
        }
        if let Some(source) = shares.iter().position(|&share| share == 0) {
            return Err(format!(
                "the weight {} of source {source} is less than 1/{BLOCK} of the sum {total}, which \
                 version 1 of the order of samples cannot mix, and the run began with that \
                 version: raise the weight, leave the source out, or start a new run",
                weights[source]
            ));
        }
        Ok(Blocks { shares })
    }

    pub(super) fn draw(&self, number: u64, windows: &[u64], seed: u64) -> Draw {
        let block = number / BLOCK;
        let (source, position) = self.source(number, seed);
        let draws_of_source = block * self.shares[source] + position;
        Draw {
            source,
            window: window_of_draw(draws_of_source, windows[source], source, seed),
        }
    }

    /// Returns the source of a sample, and its position among those of the source in its block.
    fn source(&self, number: u64, seed: u64) -> (usize, u64) {
        let block_key = mix(seed ^ mix(number / BLOCK));
        let mut position = permute(number % BLOCK, BLOCK, block_key);
        let mut source = 0;
        while position >= self.shares[source] {
            position -= self.shares[source];
            source += 1;
        }
        (source, position)
    }

    /// Returns how many of the first `samples` samples each source has.
    pub(super) fn counts(&self, samples: u64, seed: u64) -> Vec<u64> {
        let blocks = samples / BLOCK;
        let mut counts: Vec<u64> = self.shares.iter().map(|share| share * blocks).collect();
        for number in blocks * BLOCK..samples {
            counts[self.source(number, seed).0] += 1;
        }
        counts
    }

    /// Returns each source's share of the samples.
    pub(super) fn shares(&self) -> Vec<f64> {
        let share = |&share: &u64| share as f64 / BLOCK as f64;
        self.shares.iter().map(share).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_exact_in_each_block() {
        let blocks = Blocks::new(&[3.0, 1.0]).unwrap();
        for block in 0..3 {
            let second = (block * BLOCK..(block + 1) * BLOCK)
                .filter(|&number| blocks.draw(number, &[1000, 50], 7).source == 1)
                .count();
            assert_eq!(second as u64, BLOCK / 4);
        }
        assert_eq!(blocks.counts(2 * BLOCK, 7), [BLOCK / 2 * 3, BLOCK / 2]);
        assert_eq!(blocks.counts(5001, 7).iter().sum::<u64>(), 5001);
        assert_eq!(blocks.shares(), [0.75, 0.25]);
        let refused = Blocks::new(&[1.0, 1e-9]).unwrap_err();
        assert!(
            refused.contains("weight") && refused.contains("version 1 of the order"),
            "{refused}"
        );
    }

    /// Runs of earlier versions continue in exactly this order.
    #[test]
    fn the_order_stays_as_it_is() {
        let blocks = Blocks::new(&[2.0, 1.0]).unwrap();
        let draws = [0, 1, 2, 4095, 4096, 1_000_000]
            .map(|number| blocks.draw(number, &[1000, 77], 3))
            .map(|draw| (draw.source, draw.window));
        assert_eq!(
            draws,
            [(0, 870), (0, 298), (1, 73), (0, 463), (1, 12), (1, 62)]
        );
    }
}
