//! All figures of a step, summed over the ranks in collectives whose size is bounded.

use super::{
    distribution::{Distribution, distributions, extremes, histogram_numbers, histograms},
    rank_figures::{ByFigure, RankFigureSizes, RankFigures, RankTable},
    step_figures::{FigureSizes, StepFigures},
};
use parallel::{
    CommError, Communicator,
    agreement::{max_over_ranks, sum_over_ranks},
};
use std::sync::Arc;

/// Ranks up to which a step's record lists each rank. With more, it has distributions.
pub(crate) const MAX_LISTED_RANKS: usize = 64;

/// Figures of a step, over all ranks.
pub(crate) struct SummedFigures {
    pub(crate) step: StepFigures,
    pub(crate) ranks: RankReport,
}

/// Figures that each rank has for itself.
#[derive(Debug, PartialEq)]
pub(crate) enum RankReport {
    Listed(RankTable),
    Distributed {
        figures: Box<ByFigure<Option<Distribution>>>,
        /// Figures of all ranks, in steps that list them too.
        lists: Option<RankTable>,
    },
}

/// This rank's figures of a step.
pub(crate) struct OwnFigures {
    pub(crate) sizes: FigureSizes,
    pub(crate) rank_sizes: RankFigureSizes,
    pub(crate) step: StepFigures,
    pub(crate) rank: RankFigures,
    /// True on all ranks if the step lists all ranks, however many there are.
    pub(crate) lists_ranks: bool,
}

impl OwnFigures {
    /// Sums the figures of all ranks of `world`.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a collective fails.
    pub(crate) fn sum(self, world: &Arc<dyn Communicator>) -> Result<SummedFigures, CommError> {
        if self.rank_sizes.ranks <= MAX_LISTED_RANKS {
            self.sum_listed(world)
        } else {
            self.sum_distributed(world)
        }
    }

    fn sum_listed(self, world: &Arc<dyn Communicator>) -> Result<SummedFigures, CommError> {
        let mut packed = self.step.pack();
        packed.extend(RankTable::of_rank(self.rank_sizes, world.rank(), self.rank).pack());
        let mut summed = sum_over_ranks(world, &packed)?.into_iter();
        Ok(SummedFigures {
            step: StepFigures::unpack(self.sizes, summed.by_ref()),
            ranks: RankReport::Listed(RankTable::unpack(self.rank_sizes, summed)),
        })
    }

    fn sum_distributed(self, world: &Arc<dyn Communicator>) -> Result<SummedFigures, CommError> {
        let whole = self.rank.whole();
        let extremes = max_over_ranks(world, &extremes(world.rank(), &whole))?;
        let summed = sum_over_ranks(world, &self.distributed(&whole, &extremes))?;
        let lists = self.lists_ranks.then(|| {
            let own = RankTable::of_rank(self.rank_sizes, world.rank(), self.rank);
            let summed = sum_over_ranks(world, &own.pack())?;
            Ok::<_, CommError>(RankTable::unpack(self.rank_sizes, summed))
        });
        let figures = read_distributions(self.rank_sizes, &extremes, &summed);
        Ok(SummedFigures {
            step: StepFigures::unpack(self.sizes, summed),
            ranks: RankReport::Distributed {
                figures: Box::new(figures),
                lists: lists.transpose()?,
            },
        })
    }

    /// Returns the numbers to sum if ranks are not listed, given the maximum of all [`extremes`].
    fn distributed(&self, whole: &[Option<u64>], extremes: &[i64]) -> Vec<f64> {
        let mut packed = self.step.pack();
        packed.extend(histograms(whole, extremes));
        packed
    }
}

/// Reads the distributions from the end of the summed numbers.
fn read_distributions(
    sizes: RankFigureSizes,
    extremes: &[i64],
    summed: &[f64],
) -> ByFigure<Option<Distribution>> {
    let of_step = summed.len() - histogram_numbers(sizes.figures());
    ByFigure::new(sizes, distributions(extremes, &summed[of_step..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::step_sums::PassTime;

    /// Figures of one of `ranks` simulated ranks of a model with 3 MoE layers of 8 experts. The
    /// first half of the ranks has the first two layers.
    fn own(rank: usize, ranks: usize) -> OwnFigures {
        let sizes = FigureSizes {
            moe_layers: 3,
            experts: 8,
        };
        let rank_sizes = RankFigureSizes {
            moe_layers: 3,
            ranks,
            passes: 2,
        };
        let is_first = rank < ranks / 2;
        let tokens = |layer: usize| {
            let has_layer = is_first == (layer < 2);
            has_layer.then_some((rank * 7 % 100) as f64)
        };
        let mut step = StepFigures::zeros(sizes);
        step.cross_entropy = 0.5;
        OwnFigures {
            sizes,
            rank_sizes,
            step,
            rank: RankFigures {
                tokens: (0..3).map(tokens).collect(),
                peak_memory: 70e9 + rank as f64,
                peak_resident: 3e9,
                wait_ratio: Some(0.125),
                passes: vec![
                    PassTime {
                        seconds: 0.25,
                        count: 2.0,
                    },
                    PassTime::default(),
                ],
            },
            lists_ranks: false,
        }
    }

    struct Simulated {
        /// Bytes that each rank gives to the collectives of a step.
        bytes: usize,
        step: StepFigures,
        figures: ByFigure<Option<Distribution>>,
    }

    /// Computes on `ranks` ranks what [`OwnFigures::sum_distributed`] does.
    fn simulate(ranks: usize) -> Simulated {
        let all: Vec<OwnFigures> = (0..ranks).map(|rank| own(rank, ranks)).collect();
        let wholes: Vec<Vec<Option<u64>>> = all.iter().map(|own| own.rank.whole()).collect();
        let mut most = extremes(0, &wholes[0]);
        for (rank, whole) in wholes.iter().enumerate() {
            for (most, own) in most.iter_mut().zip(extremes(rank, whole)) {
                *most = own.max(*most);
            }
        }
        let mut sum = vec![0.0; all[0].distributed(&wholes[0], &most).len()];
        for (own, whole) in all.iter().zip(&wholes) {
            for (sum, own) in sum.iter_mut().zip(own.distributed(whole, &most)) {
                *sum += own;
            }
        }
        let sizes = all[0].rank_sizes;
        Simulated {
            bytes: size_of_val(&most[..]) + size_of_val(&sum[..]),
            figures: read_distributions(sizes, &most, &sum),
            step: StepFigures::unpack(all[0].sizes, sum),
        }
    }

    #[test]
    fn the_bytes_of_a_step_do_not_depend_on_the_ranks() {
        let few = simulate(MAX_LISTED_RANKS + 1);
        let many = simulate(4096);
        assert_eq!(few.bytes, many.bytes);
        assert_eq!(many.step.cross_entropy, 2048.0);
        let figures = many.figures;
        let memory = figures.peak_memory.unwrap();
        assert_eq!((memory.count, memory.largest_rank), (4096, 4095));
        assert_eq!(memory.largest, 70_000_004_095);
        assert!((memory.median - 70_000_002_048.0).abs() <= 64.0);
        let [Some(first), Some(_), Some(last)] = figures.tokens[..] else {
            panic!("each layer has a distribution");
        };
        assert_eq!((first.count, last.count), (2048, 2048));
        // 7 x 57 = 399.
        assert_eq!((first.largest, first.largest_rank), (99, 57));
        assert_eq!(last.largest_rank, 2057);
        assert_eq!(figures.wait_ratio.unwrap().in_units(1e9).median, 0.125);
        assert_eq!(figures.passes[0].unwrap().in_units(1e6).largest, 125.0);
        assert_eq!(figures.passes[1], None);
    }

    #[test]
    fn a_list_of_ranks_grows_with_them() {
        let listed = |ranks: usize| {
            let OwnFigures {
                rank_sizes, rank, ..
            } = own(0, ranks);
            RankTable::of_rank(rank_sizes, 0, rank).pack().len()
        };
        assert_eq!(listed(64), 64 * (3 + 3 + 2 * 2));
        assert_eq!(listed(65), 65 * (3 + 3 + 2 * 2));
    }
}
