//! The order of samples: a pure function from a sample's number to a window of a source.
//!
//! The position in the data is therefore a number. Sources are mixed in blocks of a fixed number of
//! samples. Each source has its exact share of every block, in shuffled order. Within a source,
//! the windows have a new order in each epoch. Both orders are permutations that are computed on
//! demand: a Feistel network over the smallest power of four that holds the range, repeated until
//! the result is in the range.

/// Samples per block, in which the shares of all sources are exact.
const BLOCK: u64 = 1 << 12;

/// One window of one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Draw {
    /// Index of the source.
    pub source: usize,
    /// Index of the window in the source.
    pub window: u64,
}

/// The order of the samples of several sources.
#[derive(Debug, Clone)]
pub struct Sampler {
    windows: Vec<u64>,
    /// Samples of each source per block. Their sum is [`BLOCK`].
    shares: Vec<u64>,
    seed: u64,
}

impl Sampler {
    /// Returns an order for sources of this many windows each, drawn in proportion to `weights`.
    ///
    /// # Errors
    /// If a weight is so small that its source has no sample in a block.
    pub fn new(windows: &[u64], weights: &[f64], seed: u64) -> Result<Sampler, String> {
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
                "the weight {} of source {source} is less than 1/{BLOCK} of the sum {total}; \
                 raise it or leave the source out",
                weights[source]
            ));
        }
        Ok(Sampler {
            windows: windows.to_vec(),
            shares,
            seed,
        })
    }

    /// Returns the window that is sample `number`.
    pub fn draw(&self, number: u64) -> Draw {
        let block = number / BLOCK;
        let block_key = mix(self.seed ^ mix(block));
        let mut position = permute(number % BLOCK, BLOCK, block_key);
        let mut source = 0;
        while position >= self.shares[source] {
            position -= self.shares[source];
            source += 1;
        }
        let draws_of_source = block * self.shares[source] + position;
        let epoch = draws_of_source / self.windows[source];
        let index = draws_of_source % self.windows[source];
        let key = mix(self.seed ^ mix(mix(source as u64 + 1) ^ epoch));
        Draw {
            source,
            window: permute(index, self.windows[source], key),
        }
    }

    /// Returns window `number` in file order. After the last window the first one follows.
    pub fn nth_window(&self, number: u64) -> Draw {
        let mut window = number % self.num_windows();
        let mut source = 0;
        while window >= self.windows[source] {
            window -= self.windows[source];
            source += 1;
        }
        Draw { source, window }
    }

    /// Returns the number of windows in all sources.
    pub fn num_windows(&self) -> u64 {
        self.windows.iter().sum()
    }
}

/// Returns the image of `index` under the permutation of `0..len` that `key` selects.
fn permute(index: u64, len: u64, key: u64) -> u64 {
    let half_bits = (64 - (len.max(2) - 1).leading_zeros()).div_ceil(2);
    let mask = (1u64 << half_bits) - 1;
    let mut value = index;
    loop {
        let mut left = value >> half_bits;
        let mut right = value & mask;
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(key ^ mix(right ^ (round << 56))) & mask));
        }
        value = left << half_bits | right;
        if value < len {
            return value;
        }
    }
}

/// The finalizer of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn a_permutation_has_every_position_once(len in 1u64..600, key in any::<u64>()) {
            let mut images: Vec<_> = (0..len).map(|index| permute(index, len, key)).collect();
            images.sort_unstable();
            prop_assert_eq!(images, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn an_epoch_has_every_window_once(windows in 2u64..2000, seed in any::<u64>()) {
            let sampler = Sampler::new(&[windows], &[1.0], seed).unwrap();
            // The only source has all samples of each block.
            let epochs = 8192u64.div_ceil(windows).max(1);
            let blocks = (epochs * windows).div_ceil(BLOCK);
            let mut count = HashMap::new();
            for number in 0..blocks * BLOCK {
                *count.entry(sampler.draw(number).window).or_insert(0u64) += 1;
            }
            let samples = blocks * BLOCK;
            let expected = samples / windows..=samples.div_ceil(windows);
            for window in 0..windows {
                let drawn = count.get(&window).copied().unwrap_or(0);
                prop_assert!(expected.contains(&drawn), "window {window}: {drawn} times");
            }
        }
    }

    #[test]
    fn shares_are_exact_in_each_block() {
        let sampler = Sampler::new(&[1000, 50], &[3.0, 1.0], 7).unwrap();
        for block in 0..3 {
            let second = (block * BLOCK..(block + 1) * BLOCK)
                .filter(|&n| sampler.draw(n).source == 1)
                .count();
            assert_eq!(second as u64, BLOCK / 4);
        }
        assert!(
            Sampler::new(&[10, 10], &[1.0, 1e-9], 0)
                .unwrap_err()
                .contains("weight")
        );
    }

    #[test]
    fn windows_in_file_order() {
        let sampler = Sampler::new(&[2, 3], &[1.0, 1.0], 0).unwrap();
        let windows: Vec<_> = (0..6)
            .map(|number| sampler.nth_window(number))
            .map(|draw| (draw.source, draw.window))
            .collect();
        assert_eq!(windows, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 0)]);
    }

    #[test]
    fn seeds_give_different_orders() {
        let order = |seed| {
            let sampler = Sampler::new(&[1 << 20], &[1.0], seed).unwrap();
            (0..64).map(|n| sampler.draw(n).window).collect::<Vec<_>>()
        };
        assert_ne!(order(1), order(2));
        assert!(!order(1).is_sorted());
    }
}
