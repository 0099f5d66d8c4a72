//! The order of samples: a pure function from a sample's number to a window of a source.
//!
//! The position in the data is therefore a number, and the order is the same in every layout. A
//! [`tree`] gives each source its share of any number of samples: the count differs by less than
//! 3/2 from the exact share, and so by at most one from the exact share rounded to a whole number.
//! Within a source, the windows have a new order in each epoch: a [`permutation`] that is computed
//! on demand, so that an epoch has every window once. Neither memory nor time depends on the step
//! or the size of the data; a draw takes time in proportion to the depth of the tree.

mod blocks;
mod permutation;
mod tree;

use blocks::Blocks;
use permutation::window_of_draw;
use serde::{Deserialize, Serialize};
use tree::{SourceDraw, Tree};

/// The version of the order, which a run keeps when it resumes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum OrderVersion {
    /// Blocks of 4096 samples, across the ends of epochs.
    Blocks,
    /// Whole epochs and exact shares.
    #[default]
    Exact,
}

impl From<OrderVersion> for u32 {
    fn from(version: OrderVersion) -> u32 {
        match version {
            OrderVersion::Blocks => 1,
            OrderVersion::Exact => 2,
        }
    }
}

impl TryFrom<u32> for OrderVersion {
    type Error = String;

    fn try_from(number: u32) -> Result<OrderVersion, String> {
        match number {
            1 => Ok(OrderVersion::Blocks),
            2 => Ok(OrderVersion::Exact),
            _ => Err(format!(
                "version {number} of the order of samples is not known; this moerun knows 1 and 2"
            )),
        }
    }
}

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
    blend: Blend,
    seed: u64,
}

#[derive(Debug, Clone)]
enum Blend {
    Blocks(Blocks),
    Exact(Tree),
}

impl Sampler {
    /// Returns an order for sources of this many windows each. Sources are drawn in proportion to
    /// `weights`, or without them to their windows; in the first version of the order, equally.
    ///
    /// # Errors
    /// If there is no source, a source has no window, a weight is not a positive number, or a
    /// weight is too small for the first version of the order.
    pub fn new(
        windows: &[u64],
        weights: Option<&[f64]>,
        seed: u64,
        version: OrderVersion,
    ) -> Result<Sampler, String> {
        if windows.is_empty() || windows.contains(&0) {
            return Err("every source needs a window to draw".into());
        }
        if windows.iter().map(|&count| u128::from(count)).sum::<u128>() >= 1 << 63 {
            return Err("the sources have too many windows to count".into());
        }
        if let Some(weights) = weights
            && let Some(weight) = weights.iter().find(|w| !(w.is_finite() && **w > 0.0))
        {
            return Err(format!("the weight {weight} is not a positive number"));
        }
        let blend = match version {
            OrderVersion::Blocks => {
                let equal = vec![1.0; windows.len()];
                Blend::Blocks(Blocks::new(weights.unwrap_or(&equal))?)
            }
            OrderVersion::Exact => Blend::Exact(match weights {
                Some(weights) => Tree::of_weights(weights),
                None => Tree::of_integers(windows.to_vec()),
            }),
        };
        Ok(Sampler {
            windows: windows.to_vec(),
            blend,
            seed,
        })
    }

    /// Returns the window that is sample `number`.
    pub fn draw(&self, number: u64) -> Draw {
        match &self.blend {
            Blend::Blocks(blocks) => blocks.draw(number, &self.windows, self.seed),
            Blend::Exact(tree) => {
                let SourceDraw { source, earlier } = tree.draw(number);
                let windows = self.windows[source];
                Draw {
                    source,
                    window: window_of_draw(earlier, windows, source, self.seed),
                }
            }
        }
    }

    /// Returns how many of the first `samples` samples each source has.
    pub fn counts(&self, samples: u64) -> Vec<u64> {
        match &self.blend {
            Blend::Blocks(blocks) => blocks.counts(samples, self.seed),
            Blend::Exact(tree) => tree.counts(samples),
        }
    }

    /// Returns each source's share of the samples, between 0 and 1.
    pub fn shares(&self) -> Vec<f64> {
        match &self.blend {
            Blend::Blocks(blocks) => blocks.shares(),
            Blend::Exact(tree) => tree.shares(),
        }
    }

    /// Returns how often the first `samples` samples go through the windows of each source.
    pub fn epochs(&self, samples: u64) -> Vec<f64> {
        let counts = self.counts(samples).into_iter().zip(&self.windows);
        counts
            .map(|(count, &windows)| count as f64 / windows as f64)
            .collect()
    }

    /// Returns the number of windows of each source.
    pub fn windows(&self) -> &[u64] {
        &self.windows
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn sampler(windows: &[u64], weights: Option<&[f64]>, seed: u64) -> Sampler {
        Sampler::new(windows, weights, seed, OrderVersion::Exact).unwrap()
    }

    /// Checks that each epoch of each source has all its windows once.
    fn check_epochs(sampler: &Sampler, samples: u64) {
        let windows = sampler.windows();
        let mut seen: Vec<Vec<u64>> = windows.iter().map(|&n| vec![0; n as usize]).collect();
        let mut counts = vec![0u64; windows.len()];
        for number in 0..samples {
            let Draw { source, window } = sampler.draw(number);
            let epoch = counts[source] / windows[source];
            let times = &mut seen[source][window as usize];
            assert_eq!(*times, epoch, "window {window} of source {source}");
            *times += 1;
            counts[source] += 1;
        }
        assert_eq!(counts, sampler.counts(samples));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn an_epoch_has_every_window_once(windows in 1u64..3000, seed in any::<u64>()) {
            check_epochs(&sampler(&[windows], None, seed), windows * 3 + 1);
        }

        #[test]
        fn every_source_has_whole_epochs(
            sources in proptest::collection::vec((1u64..400, 1e-6f64..1.0), 1..20),
            seed in any::<u64>(),
            has_weights in any::<bool>(),
        ) {
            let windows: Vec<u64> = sources.iter().map(|source| source.0).collect();
            let weights: Vec<f64> = sources.iter().map(|source| source.1).collect();
            let sampler = sampler(&windows, has_weights.then_some(&weights[..]), seed);
            check_epochs(&sampler, 4000);
        }

        /// Without weights, an epoch of the whole has about one of each source.
        #[test]
        fn sources_are_drawn_in_proportion_to_their_windows(
            windows in proptest::collection::vec(1u64..1_000_000, 1..50),
        ) {
            let sampler = sampler(&windows, None, 1);
            let counts = sampler.counts(sampler.num_windows());
            for (count, windows) in counts.iter().zip(&windows) {
                prop_assert!(count.abs_diff(*windows) <= 1);
            }
        }

        #[test]
        fn the_first_version_draws_every_window_as_often(
            windows in 2u64..2000,
            seed in any::<u64>(),
        ) {
            let sampler = Sampler::new(&[windows], None, seed, OrderVersion::Blocks).unwrap();
            let samples = 8192u64.div_ceil(windows) * windows;
            let samples = samples.div_ceil(4096) * 4096;
            let mut count = HashMap::new();
            for number in 0..samples {
                *count.entry(sampler.draw(number).window).or_insert(0u64) += 1;
            }
            let expected = samples / windows..=samples.div_ceil(windows);
            for window in 0..windows {
                let drawn = count.get(&window).copied().unwrap_or(0);
                prop_assert!(expected.contains(&drawn), "window {window}: {drawn} times");
            }
        }
    }

    #[test]
    fn epochs_are_whole_for_small_and_large_sources() {
        for windows in (1..130).chain([1000, 4095, 4096, 4097, 5000, 12193, 1_000_000]) {
            check_epochs(&sampler(&[windows], None, 1), windows);
        }
        check_epochs(
            &sampler(&[300_000, 7, 1], Some(&[1.0, 1e-3, 1e-6]), 5),
            700_000,
        );
    }

    #[test]
    fn windows_in_file_order() {
        let sampler = sampler(&[2, 3], None, 0);
        let windows: Vec<_> = (0..6)
            .map(|number| sampler.nth_window(number))
            .map(|draw| (draw.source, draw.window))
            .collect();
        assert_eq!(windows, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 0)]);
    }

    #[test]
    fn seeds_and_epochs_have_different_orders() {
        let order = |seed, first: u64| {
            let sampler = sampler(&[1 << 20], None, seed);
            let draws = (first..first + 64).map(|number| sampler.draw(number).window);
            draws.collect::<Vec<_>>()
        };
        assert_ne!(order(1, 0), order(2, 0));
        assert_ne!(order(1, 0), order(1, 1 << 20));
        assert!(!order(1, 0).is_sorted());
    }

    #[test]
    fn wrong_sources_are_refused() {
        let new = |windows: &[u64], weights: Option<&[f64]>| {
            Sampler::new(windows, weights, 0, OrderVersion::Exact).err()
        };
        assert!(new(&[], None).is_some() && new(&[3, 0], None).is_some());
        assert!(new(&[u64::MAX, 9], None).is_some());
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(new(&[3, 3], Some(&[1.0, weight])).is_some(), "{weight}");
        }
    }

    #[test]
    fn versions_have_numbers() {
        for (version, number) in [(OrderVersion::Blocks, "1"), (OrderVersion::Exact, "2")] {
            assert_eq!(serde_json::to_string(&version).unwrap(), number);
            let parsed: OrderVersion = serde_json::from_str(number).unwrap();
            assert_eq!(parsed, version);
        }
        let unknown = serde_json::from_str::<OrderVersion>("3").unwrap_err();
        assert!(unknown.to_string().contains("version 3"), "{unknown}");
    }
}
