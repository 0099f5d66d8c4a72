//! The blend of sources: a binary tree that deals samples to sources in exact proportion.
//!
//! A node with weight W and a left child of weight L sends its sample number m to the left if the
//! rounded share `floor(m * L / W + 1/2)` grows with it. The number of earlier samples of a source
//! follows on the way down, so a draw needs no state.
//!
//! Rounding adds at most 1/2 at each node, of which a source gets the fraction w/C, where w is its
//! weight and C that of the node's child above the source. The count of a source therefore differs
//! from its exact share by at most `(1 + sum of w/C over its ancestors below the root) / 2`.
//!
//! Each node divides its sources by the rule of Graham (1969): in descending order of weight, each
//! goes to the lighter side. The heavier side, without its lightest source, then weighs no more
//! than the other one. So a node weighs at least twice as much as its heavier child, less the
//! lightest source below it. Relative to w, the ancestors of a source therefore weigh more than 1,
//! 2, 4, 8 and so on from below, or at least 2, 3, 5, 9 and so on if the source itself is the
//! lightest. The sum stays below 2 and the difference below 3/2 of a sample, for any number of
//! sources and any weights. The depth is at most about 64, because weights are integers.

/// Sum to which weights are scaled, so that they become integers.
const TOTAL: f64 = (1u64 << 62) as f64;

#[derive(Debug, Clone)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    root: Child,
    weights: Vec<u64>,
}

#[derive(Debug, Clone, Copy)]
enum Child {
    Source(usize),
    Node(usize),
}

#[derive(Debug, Clone, Copy)]
struct Node {
    /// Share of the left child, in units of 2^-64.
    left_share: u64,
    left: Child,
    right: Child,
}

impl Node {
    /// Returns how many of the first `samples` samples go to the left.
    fn left_count(&self, samples: u64) -> u64 {
        ((u128::from(samples) * u128::from(self.left_share) + (1 << 63)) >> 64) as u64
    }
}

impl Tree {
    /// Returns the blend of sources in proportion to integers, whose sum is below 2^63.
    pub(super) fn of_integers(weights: Vec<u64>) -> Tree {
        let mut sources: Vec<usize> = (0..weights.len()).collect();
        sources.sort_by_key(|&source| (std::cmp::Reverse(weights[source]), source));
        let mut tree = Tree {
            nodes: Vec::new(),
            root: Child::Source(0),
            weights,
        };
        tree.root = tree.divide(&sources);
        tree
    }

    /// Returns the blend of sources with these weights, which are positive and finite. The
    /// smallest share is 2^-62.
    pub(super) fn of_weights(weights: &[f64]) -> Tree {
        // Division first: the sum of large weights may be infinite.
        let largest = weights.iter().copied().fold(0.0, f64::max);
        let total: f64 = weights.iter().map(|weight| weight / largest).sum();
        let integer = |weight: &f64| ((weight / largest / total * TOTAL) as u64).max(1);
        Tree::of_integers(weights.iter().map(integer).collect())
    }

    /// Adds the nodes above `sources`, which are in descending order of weight.
    fn divide(&mut self, sources: &[usize]) -> Child {
        if let [source] = *sources {
            return Child::Source(source);
        }
        let mut left = Side::default();
        let mut right = Side::default();
        for &source in sources {
            let side = if left.weight <= right.weight {
                &mut left
            } else {
                &mut right
            };
            side.weight += self.weights[source];
            side.sources.push(source);
        }
        let whole = u128::from(left.weight) + u128::from(right.weight);
        let left_share = ((u128::from(left.weight) << 64) / whole) as u64;
        let left = self.divide(&left.sources);
        let right = self.divide(&right.sources);
        self.nodes.push(Node {
            left_share,
            left,
            right,
        });
        Child::Node(self.nodes.len() - 1)
    }

    /// Returns the source of sample `number`, and how many earlier samples the source had.
    pub(super) fn draw(&self, number: u64) -> SourceDraw {
        let mut child = self.root;
        let mut earlier = number;
        loop {
            match child {
                Child::Source(source) => return SourceDraw { source, earlier },
                Child::Node(index) => {
                    let node = &self.nodes[index];
                    let left = node.left_count(earlier);
                    child = if node.left_count(earlier + 1) > left {
                        earlier = left;
                        node.left
                    } else {
                        earlier -= left;
                        node.right
                    };
                }
            }
        }
    }

    /// Returns how many of the first `samples` samples each source has.
    pub(super) fn counts(&self, samples: u64) -> Vec<u64> {
        let mut counts = vec![0; self.weights.len()];
        let mut open = vec![(self.root, samples)];
        while let Some((child, samples)) = open.pop() {
            match child {
                Child::Source(source) => counts[source] = samples,
                Child::Node(index) => {
                    let node = &self.nodes[index];
                    let left = node.left_count(samples);
                    open.push((node.left, left));
                    open.push((node.right, samples - left));
                }
            }
        }
        counts
    }

    /// Returns each source's share of the samples.
    pub(super) fn shares(&self) -> Vec<f64> {
        let total: f64 = self.weights.iter().map(|&weight| weight as f64).sum();
        let share = |&weight: &u64| weight as f64 / total;
        self.weights.iter().map(share).collect()
    }
}

/// One half of a division.
#[derive(Default)]
struct Side {
    weight: u64,
    sources: Vec<usize>,
}

/// A sample of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SourceDraw {
    pub(super) source: usize,
    /// Number of earlier samples of the source.
    pub(super) earlier: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Tree {
        fn weight(&self, child: Child) -> f64 {
            match child {
                Child::Source(source) => self.weights[source] as f64,
                Child::Node(index) => {
                    let node = &self.nodes[index];
                    self.weight(node.left) + self.weight(node.right)
                }
            }
        }

        /// Returns the largest difference between a count and an exact share, by the weights.
        fn largest_error(&self) -> f64 {
            // Of each open child: the sum of 1/C over its ancestors below the root.
            let mut open = vec![(self.root, 0.0, 0usize)];
            let mut largest = 0.0f64;
            while let Some((child, above, depth)) = open.pop() {
                assert!(depth <= 70, "depth {depth}");
                match child {
                    Child::Source(_) if depth == 0 => {}
                    Child::Source(source) => {
                        let error = (1.0 + self.weights[source] as f64 * above) / 2.0;
                        largest = largest.max(error);
                    }
                    Child::Node(index) => {
                        let own = match depth {
                            0 => 0.0,
                            _ => 1.0 / self.weight(child),
                        };
                        let node = &self.nodes[index];
                        open.push((node.left, above + own, depth + 1));
                        open.push((node.right, above + own, depth + 1));
                    }
                }
            }
            largest
        }

        /// Checks counts after `samples` samples against the exact shares.
        fn check_counts(&self, samples: u64, bound: f64) {
            let counts = self.counts(samples);
            assert_eq!(counts.iter().sum::<u64>(), samples);
            let total: u128 = self.weights.iter().map(|&weight| u128::from(weight)).sum();
            for (&count, &weight) in counts.iter().zip(&self.weights) {
                // The difference in units of 1/total, without rounding.
                let exact = u128::from(samples) * u128::from(weight);
                let apart = (u128::from(count) * total).abs_diff(exact);
                let error = apart as f64 / total as f64;
                let rounded = (exact + total / 2) / total;
                assert!(
                    u128::from(count).abs_diff(rounded) <= 1,
                    "{count}, {rounded}"
                );
                assert!(
                    error <= bound + 1e-6,
                    "{count} of {samples}: {error} > {bound}"
                );
            }
        }
    }

    /// Weights of all kinds, at most `sources` of them.
    fn weights(sources: usize) -> impl Strategy<Value = Vec<f64>> {
        let random = proptest::collection::vec(1e-6f64..1.0, 1..sources);
        let magnitudes = proptest::collection::vec(-6.0f64..0.0, 1..sources);
        let magnitudes =
            magnitudes.prop_map(|exponents| exponents.into_iter().map(|x| 10f64.powf(x)).collect());
        let equal = (1..sources).prop_map(|count| vec![1.0; count]);
        let geometric = (1..sources, 0.05f64..0.999)
            .prop_map(|(count, ratio)| (0..count).map(|i| ratio.powi(i as i32)).collect());
        // A few sizes, many times: where equal halves need luck.
        let few = proptest::collection::vec(0usize..4, 1..sources);
        let few = few.prop_map(|kinds| {
            let sizes = [1.0, 0.5 + 1e-9, 1.0 / 3.0, 1e-6];
            kinds.into_iter().map(|kind| sizes[kind]).collect()
        });
        let fibonacci = (2..80usize).prop_map(|count| {
            let mut list = vec![1e-9, 1.0, 1.0];
            for i in 3..count {
                list.push(list[i - 1] + list[i - 2]);
            }
            list
        });
        prop_oneof![random, magnitudes, equal, geometric, few, fibonacci]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn counts_are_exact_to_one_sample(
            weights in weights(40),
            lengths in proptest::collection::vec(0u64..1 << 40, 8),
        ) {
            let tree = Tree::of_weights(&weights);
            let bound = tree.largest_error();
            prop_assert!(bound < 1.5, "{bound}");
            for samples in (0..64).chain(lengths) {
                tree.check_counts(samples, bound);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn the_bound_holds_for_thousands_of_sources(
            weights in weights(4096),
            samples in 0u64..1 << 40,
        ) {
            let tree = Tree::of_weights(&weights);
            let bound = tree.largest_error();
            prop_assert!(bound < 1.5, "{bound}");
            tree.check_counts(samples, bound);
        }

        #[test]
        fn draws_agree_with_counts(weights in weights(30), start in 0u64..1 << 40) {
            let tree = Tree::of_weights(&weights);
            let mut counts = tree.counts(start);
            for number in start..start + 300 {
                let drawn = tree.draw(number);
                prop_assert_eq!(drawn.earlier, counts[drawn.source]);
                counts[drawn.source] += 1;
                prop_assert_eq!(&tree.counts(number + 1), &counts);
            }
        }
    }

    #[test]
    fn extreme_weights_are_divided() {
        for weights in [
            vec![f64::MIN_POSITIVE, f64::MAX],
            vec![f64::MAX; 3],
            vec![1e-300; 3],
            vec![1e12, 1e-6, 1e-6],
        ] {
            let tree = Tree::of_weights(&weights);
            assert!(tree.largest_error() < 1.5);
            tree.check_counts(1_000_003, 1.5);
        }
        let equal = Tree::of_weights(&[1e-300; 3]);
        assert_eq!(equal.counts(300), [100; 3]);
    }

    #[test]
    fn a_small_share_is_exact() {
        let tree = Tree::of_weights(&[0.99964, 0.00036]);
        assert_eq!(tree.counts(16384), [16378, 6]);
        let tree = Tree::of_weights(&[1.0, 1e-6]);
        assert_eq!(tree.counts(100_000_000)[1], 100);
    }
}
