//! All figures of a step, exchanged in two collectives whose size does not depend on the ranks.
//!
//! Each rank has one figure per MoE layer, three more, and in a pipeline one per kind of pass. Of a
//! figure a step exchanges 16 bytes in a maximum and 264 in a sum. The sum also has 32 bytes per
//! MoE layer, and 8 per expert of it, which balancing biases and expert placement need on all
//! ranks. With 58 layers of 256 experts in a pipeline that is 1.1 kB and 139 kB. With
//! `optimizer.qk_clip` the maximum also has 8 bytes per attention head of each layer.

use super::{
    distribution::{Distribution, distributions, extremes, histogram_numbers, histograms},
    rank_figures::{ByFigure, RankFigures},
    step_figures::{FigureSizes, StepFigures},
};
use crate::train::handed_on::to_rank_0;
use parallel::{
    CommError, Communicator,
    agreement::{max_over_ranks, sum_over_ranks},
};
use std::sync::Arc;

/// Figures of a step, over all ranks.
#[derive(Debug, PartialEq)]
pub(crate) struct SummedFigures {
    pub(crate) step: StepFigures,
    /// `None` for figures that no rank has.
    pub(crate) ranks: ByFigure<Option<Distribution>>,
    /// Figures of each rank, on rank 0 in steps that list them.
    pub(crate) listed: Option<Vec<RankFigures>>,
    /// The largest attention logit by layer and query head; empty if they are not measured.
    pub(crate) largest_logits: Vec<f32>,
}

/// This rank's figures of a step.
pub(crate) struct OwnFigures {
    pub(crate) sizes: FigureSizes,
    pub(crate) step: StepFigures,
    pub(crate) rank: RankFigures,
    /// The largest attention logits that this rank has seen, by layer and query head. Equally many
    /// on all ranks.
    pub(crate) largest_logits: Vec<f32>,
    /// True on all ranks if rank 0 lists the figures of each rank.
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
        let whole = self.rank.whole();
        let mut maxima = extremes(world.rank(), &whole);
        let num_extremes = maxima.len();
        maxima.extend(self.largest_logits.iter().map(|&logit| ordered(logit)));
        let mut extremes = max_over_ranks(world, &maxima)?;
        let logits = extremes.split_off(num_extremes);
        let summed = sum_over_ranks(world, &self.addends(&whole, &extremes))?;
        let listed = if self.lists_ranks {
            self.gather(world)?
        } else {
            None
        };
        Ok(SummedFigures {
            largest_logits: logits.into_iter().map(from_ordered).collect(),
            ..SummedFigures::read(self.sizes, &extremes, summed, listed)
        })
    }

    /// Returns the numbers to sum, given the maximum of all [`extremes`].
    fn addends(&self, whole: &[Option<u64>], extremes: &[i64]) -> Vec<f64> {
        let mut packed = self.step.pack();
        packed.extend(histograms(whole, extremes));
        packed
    }

    /// Returns the figures of each rank on rank 0. Each other rank sends its own there.
    fn gather(&self, world: &Arc<dyn Communicator>) -> Result<Option<Vec<RankFigures>>, CommError> {
        let packed = self.rank.pack().into_iter();
        let own: Vec<u8> = packed.flat_map(f64::to_le_bytes).collect();
        let messages = to_rank_0(world, &own)?;
        let read = |message: Vec<u8>| {
            let (numbers, _) = message.as_chunks();
            let numbers: Vec<f64> = numbers.iter().map(|&n| f64::from_le_bytes(n)).collect();
            RankFigures::unpack(self.sizes.moe_layers, &numbers)
        };
        let is_rank_0 = world.rank() == 0;
        Ok(is_rank_0.then(|| messages.into_iter().map(read).collect()))
    }
}

impl SummedFigures {
    /// Reads the maximum of all [`extremes`], and the sum of all [`OwnFigures::addends`].
    fn read(
        sizes: FigureSizes,
        extremes: &[i64],
        mut summed: Vec<f64>,
        listed: Option<Vec<RankFigures>>,
    ) -> SummedFigures {
        let histograms = summed.split_off(summed.len() - histogram_numbers(extremes));
        let figures = distributions(extremes, &histograms);
        SummedFigures {
            step: StepFigures::unpack(sizes, summed),
            ranks: ByFigure::new(sizes.moe_layers, figures),
            listed,
            largest_logits: Vec::new(),
        }
    }
}

/// Maps numbers to integers of the same order.
fn ordered(number: f32) -> i64 {
    i64::from(flip_if_negative(number.to_bits() as i32))
}

/// Returns the number that [`ordered`] maps to an integer.
fn from_ordered(integer: i64) -> f32 {
    f32::from_bits(flip_if_negative(integer as i32) as u32)
}

/// Reverses the order of the magnitudes of negative numbers.
fn flip_if_negative(bits: i32) -> i32 {
    if bits < 0 { bits ^ i32::MAX } else { bits }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::train::step_sums::{PassTime, Transfers};
    use parallel::{pipeline::PassKind, run_on_threads};
    use std::time::Duration;

    /// Layers, experts and ranks of a simulated run with two pipeline stages.
    #[derive(Clone, Copy)]
    pub(crate) struct Run {
        pub(crate) moe_layers: usize,
        pub(crate) experts: usize,
        pub(crate) ranks: usize,
    }

    impl Run {
        fn sizes(self) -> FigureSizes {
            FigureSizes {
                moe_layers: self.moe_layers,
                experts: self.experts,
            }
        }

        /// Returns the figures of a rank. Each half of the ranks has half the layers.
        fn own(self, rank: usize) -> OwnFigures {
            let is_first = rank < self.ranks / 2;
            let has_layer = |layer: usize| is_first == (layer < self.moe_layers.div_ceil(2));
            let tokens = |layer| has_layer(layer).then_some((rank * 7 % 100) as f64);
            let mut step = StepFigures::zeros(self.sizes());
            step.cross_entropy = 0.5;
            for (number, layer) in step.moe_layers.iter_mut().enumerate() {
                layer.tokens_per_expert.fill(1e6 + (rank * number) as f64);
                layer.transfers = Transfers {
                    lent_tokens: 1e4,
                    lent_bytes: 1e9 + number as f64,
                    internode_bytes: 1e8,
                    plan_seconds: 1e-3 / 3.0,
                };
            }
            let mut passes = vec![PassTime::default(); PassKind::NAMES.len()];
            passes[0] = PassTime {
                seconds: 0.25,
                count: 2.0,
            };
            OwnFigures {
                sizes: self.sizes(),
                step,
                rank: RankFigures {
                    tokens: (0..self.moe_layers).map(tokens).collect(),
                    peak_memory: 70e9 + rank as f64,
                    peak_resident: 3e9,
                    wait_ratio: Some(0.125),
                    passes,
                },
                largest_logits: Vec::new(),
                lists_ranks: false,
            }
        }

        /// Computes what [`OwnFigures::sum`] does on all ranks, and the bytes that each of them
        /// gives to the collectives.
        pub(crate) fn simulate(self) -> (SummedFigures, usize) {
            let all = (0..self.ranks).map(|rank| self.own(rank));
            let mut most = extremes(0, &self.own(0).rank.whole());
            for (rank, own) in all.clone().enumerate() {
                for (most, own) in most.iter_mut().zip(extremes(rank, &own.rank.whole())) {
                    *most = own.max(*most);
                }
            }
            let mut sum = Vec::new();
            for own in all {
                let addends = own.addends(&own.rank.whole(), &most);
                sum.resize(addends.len(), 0.0);
                for (sum, own) in sum.iter_mut().zip(addends) {
                    *sum += own;
                }
            }
            let bytes = size_of_val(&most[..]) + size_of_val(&sum[..]);
            (SummedFigures::read(self.sizes(), &most, sum, None), bytes)
        }
    }

    #[test]
    fn the_bytes_of_a_step_do_not_depend_on_the_ranks() {
        let run = |ranks| Run {
            moe_layers: 58,
            experts: 16,
            ranks,
        };
        for ranks in [4, 16, 128, 4096] {
            let (_, bytes) = run(ranks).simulate();
            let of_experts = 58 * 16 * 8;
            // 8 figures of the step, 4 of each layer, and 70 distributions.
            assert_eq!(bytes, of_experts + 8 * (8 + 58 * 4) + 70 * (16 + 264));
        }
    }

    #[test]
    fn many_ranks_have_distributions() {
        let run = Run {
            moe_layers: 3,
            experts: 8,
            ranks: 4096,
        };
        let (summed, _) = run.simulate();
        assert_eq!(summed.step.cross_entropy, 2048.0);
        let figures = summed.ranks;
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
    fn logits_are_maxima_over_ranks() {
        let run = Run {
            moe_layers: 1,
            experts: 3,
            ranks: 3,
        };
        let none = f32::NEG_INFINITY;
        let of_ranks = [
            [none, -2.5, 1e-30, none],
            [none, -0.5, 1e-20, -0.0],
            [-1e30, -1.5, none, none],
        ];
        let sums = run_on_threads(run.ranks, Duration::from_secs(20), move |world| {
            let group = world.all("figures").unwrap();
            let mut own = run.own(group.rank());
            own.largest_logits = of_ranks[group.rank()].to_vec();
            own.sum(&group).unwrap()
        });
        let (mut expected, _) = run.simulate();
        expected.largest_logits = vec![-1e30, -0.5, 1e-20, -0.0];
        assert!(sums.iter().all(|sum| *sum == expected));
    }

    #[test]
    fn rank_0_lists_all_ranks_if_asked() {
        let run = Run {
            moe_layers: 2,
            experts: 3,
            ranks: 4,
        };
        let sums = run_on_threads(run.ranks, Duration::from_secs(20), move |world| {
            let group = world.all("figures").unwrap();
            let sum = |lists_ranks| {
                let mut own = run.own(group.rank());
                own.lists_ranks = lists_ranks;
                own.sum(&group).unwrap()
            };
            (sum(false), sum(true))
        });
        let (simulated, _) = run.simulate();
        for (rank, (plain, mut listing)) in sums.into_iter().enumerate() {
            let listed = listing.listed.take();
            assert_eq!(plain, simulated);
            assert_eq!(listing, simulated);
            assert_eq!(listed.is_some(), rank == 0);
            for (rank, figures) in listed.into_iter().flatten().enumerate() {
                let own = run.own(rank).rank;
                assert_eq!(figures.pack(), own.pack());
            }
        }
    }
}
