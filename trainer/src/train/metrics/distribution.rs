//! Distributions of figures over ranks, in messages whose size does not depend on the number of
//! ranks.
//!
//! Ranks first take the maximum of [`extremes`], and then sum [`histograms`] that divide the range
//! between them. A figure is a whole number, or none on a rank to which it does not apply.

use super::records::RankDistribution;

/// Bits of a key for the rank: as many as the largest run has.
const RANK_BITS: u32 = 20;

/// The largest value of a figure; larger ones count as this one.
pub(crate) const MAX_VALUE: u64 = (1 << (63 - RANK_BITS)) - 1;

/// Bins of a histogram. A quantile is off by half a bin at most.
const BINS: usize = 32;

/// Numbers of [`extremes`] per figure.
const EXTREMES: usize = 2;

/// Numbers of [`histograms`] per figure: the sum of the values, and the bins.
const NUMBERS: usize = 1 + BINS;

/// The distribution of one figure over the ranks that have it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Distribution {
    pub(crate) count: u64,
    pub(crate) mean: f64,
    /// Off by a 64th of the range of values at most, like `p90`.
    pub(crate) median: f64,
    pub(crate) p90: f64,
    pub(crate) largest: u64,
    /// Lowest rank with the largest value.
    pub(crate) largest_rank: usize,
}

/// Smallest and largest value of a figure.
#[derive(Clone, Copy)]
struct Range {
    smallest: u64,
    largest: u64,
    largest_rank: usize,
}

impl Range {
    /// Reads two numbers of [`extremes`]. `None` if no rank has the figure.
    fn decode(extremes: &[i64]) -> Option<Range> {
        let key = u64::try_from(extremes[0]).ok()?;
        let rank_mask = (1 << RANK_BITS) - 1;
        Some(Range {
            smallest: extremes[1].unsigned_abs(),
            largest: key >> RANK_BITS,
            largest_rank: (rank_mask - (key & rank_mask)) as usize,
        })
    }

    /// Number of possible values.
    fn values(self) -> u128 {
        u128::from(self.largest - self.smallest) + 1
    }

    fn bin(self, value: u64) -> usize {
        (u128::from(value - self.smallest) * BINS as u128 / self.values()) as usize
    }

    /// Returns the smallest value in a bin or, if it has none, in a later one.
    fn first_of(self, bin: usize) -> u64 {
        let offset = (bin as u128 * self.values()).div_ceil(BINS as u128);
        self.smallest + offset as u64
    }

    /// Returns the middle of the bin that holds the value at `fraction` of the sorted values.
    fn quantile(self, bins: &[f64], fraction: f64) -> f64 {
        let count: f64 = bins.iter().sum();
        let place = ((count - 1.0) * fraction).round();
        let mut before = 0.0;
        let holds = |&in_bin: &f64| {
            before += in_bin;
            before > place
        };
        let bin = bins.iter().position(holds).unwrap_or(BINS - 1);
        let last = self.first_of(bin + 1) - 1;
        (self.first_of(bin) as f64 + last as f64) / 2.0
    }
}

/// Returns the numbers of which all ranks take the maximum, two per figure.
///
/// # Panics
/// If `rank` is not below 2^20.
pub(crate) fn extremes(rank: usize, own: &[Option<u64>]) -> Vec<i64> {
    let reversed_rank = (1 << RANK_BITS) - 1 - rank as i64;
    assert!(reversed_rank >= 0, "rank {rank} is above the largest");
    let of_figure = |value: &Option<u64>| match value {
        Some(value) => {
            let value = (*value).min(MAX_VALUE) as i64;
            [value << RANK_BITS | reversed_rank, -value]
        }
        None => [-1, i64::MIN],
    };
    own.iter().flat_map(of_figure).collect()
}

/// Returns the numbers that all ranks sum, 33 per figure, from this rank's figures and the maximum
/// of all ranks' [`extremes`].
pub(crate) fn histograms(own: &[Option<u64>], extremes: &[i64]) -> Vec<f64> {
    let mut numbers = vec![0.0; own.len() * NUMBERS];
    let figures = numbers.chunks_mut(NUMBERS).zip(extremes.chunks(EXTREMES));
    for ((numbers, extremes), value) in figures.zip(own) {
        if let Some((value, range)) = value.zip(Range::decode(extremes)) {
            let value = value.min(MAX_VALUE);
            numbers[0] = value as f64;
            numbers[1 + range.bin(value)] = 1.0;
        }
    }
    numbers
}

/// Returns the distribution of each figure, `None` for those that no rank has.
pub(crate) fn distributions(extremes: &[i64], histograms: &[f64]) -> Vec<Option<Distribution>> {
    let figures = extremes.chunks(EXTREMES).zip(histograms.chunks(NUMBERS));
    let distribution = |(extremes, numbers): (&[i64], &[f64])| {
        let range = Range::decode(extremes)?;
        let (sum, bins) = numbers.split_first()?;
        let count: f64 = bins.iter().sum();
        Some(Distribution {
            count: count as u64,
            mean: sum / count,
            median: range.quantile(bins, 0.5),
            p90: range.quantile(bins, 0.9),
            largest: range.largest,
            largest_rank: range.largest_rank,
        })
    };
    figures.map(distribution).collect()
}

/// Returns how many numbers of [`histograms`] belong to these [`extremes`].
pub(crate) fn histogram_numbers(extremes: &[i64]) -> usize {
    extremes.len() / EXTREMES * NUMBERS
}

impl Distribution {
    /// Returns the record, in a unit of which a value has `per_unit`.
    pub(crate) fn in_units(&self, per_unit: f64) -> RankDistribution {
        RankDistribution {
            count: self.count,
            mean: self.mean / per_unit,
            median: self.median / per_unit,
            p90: self.p90 / per_unit,
            largest: self.largest as f64 / per_unit,
            largest_rank: self.largest_rank,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Merges the messages of ranks `0..all.len()` as the collectives do.
    fn merged(all: &[Vec<Option<u64>>]) -> Vec<Option<Distribution>> {
        let messages = all.iter().enumerate();
        let messages = messages.map(|(rank, own)| extremes(rank, own));
        let most = messages.reduce(|a, b| a.into_iter().zip(b).map(|(a, b)| a.max(b)).collect());
        let most = most.unwrap();
        let sums = all.iter().map(|own| histograms(own, &most));
        let sums = sums.reduce(|a, b| a.into_iter().zip(b).map(|(a, b)| a + b).collect());
        distributions(&most, &sums.unwrap())
    }

    /// Computes the distribution from all values, `[ranks]`.
    fn direct(values: &[Option<u64>]) -> Option<Distribution> {
        let mut sorted: Vec<u64> = values.iter().flatten().copied().collect();
        sorted.sort_unstable();
        let largest = *sorted.last()?;
        let last = (sorted.len() - 1) as f64;
        let at = |fraction: f64| sorted[(last * fraction).round() as usize] as f64;
        Some(Distribution {
            count: sorted.len() as u64,
            mean: sorted.iter().map(|&value| value as f64).sum::<f64>() / sorted.len() as f64,
            median: at(0.5),
            p90: at(0.9),
            largest,
            largest_rank: values.iter().position(|&value| value == Some(largest))?,
        })
    }

    fn assert_close(found: Option<Distribution>, values: &[Option<u64>]) {
        let expected = direct(values);
        assert_eq!(found.is_some(), expected.is_some());
        let Some((found, expected)) = found.zip(expected) else {
            return;
        };
        let smallest = values.iter().flatten().min().unwrap();
        let off = (expected.largest - smallest) as f64 / 64.0;
        assert_eq!(found.count, expected.count);
        assert_eq!(found.largest, expected.largest);
        assert_eq!(found.largest_rank, expected.largest_rank);
        assert!((found.mean / expected.mean.max(1e-9) - 1.0).abs() < 1e-9 || expected.mean == 0.0);
        assert!(
            (found.median - expected.median).abs() <= off,
            "{found:?} {expected:?}"
        );
        assert!(
            (found.p90 - expected.p90).abs() <= off,
            "{found:?} {expected:?}"
        );
    }

    fn value() -> impl Strategy<Value = Option<u64>> {
        prop_oneof![
            1 => Just(None),
            3 => (0u64..20).prop_map(Some),
            3 => (0u64..=MAX_VALUE).prop_map(Some),
            2 => (70_000_000_000u64..72_000_000_000).prop_map(Some),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn the_merged_distribution_is_the_direct_one(
            values in prop::collection::vec([value(), value()], 1..200),
        ) {
            let all: Vec<Vec<Option<u64>>> = values.iter().map(|own| own.to_vec()).collect();
            for (figure, found) in merged(&all).into_iter().enumerate() {
                let values: Vec<Option<u64>> = values.iter().map(|own| own[figure]).collect();
                assert_close(found, &values);
            }
        }
    }

    #[test]
    fn values_above_the_limit_count_as_the_limit() {
        let [found] = merged(&[vec![Some(u64::MAX)], vec![Some(MAX_VALUE)]])[..] else {
            panic!("one figure");
        };
        let found = found.unwrap();
        assert_eq!((found.largest, found.largest_rank), (MAX_VALUE, 0));
        assert_eq!(found.median, MAX_VALUE as f64);
    }

    #[test]
    fn a_figure_that_no_rank_has_has_no_distribution() {
        assert_eq!(merged(&[vec![None], vec![None]]), [None]);
        assert_eq!(merged(&[vec![], vec![]]), []);
    }
}
