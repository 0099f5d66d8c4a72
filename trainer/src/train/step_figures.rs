//! Figures of one step that all ranks sum.

use super::step_sums::Transfers;

/// Factor by which the sum carries a second number of ranks in the same figure: another figure
/// would change the order in which collectives sum the others, and so their last bits.
const SECOND_COUNT: f64 = (1_u32 << 20) as f64;

/// Losses, counts and times of one step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StepFigures {
    pub(crate) cross_entropy: f64,
    pub(crate) load_balance: f64,
    pub(crate) z: f64,
    /// Number of ranks that were told to stop.
    pub(crate) stopping_ranks: f64,
    /// Number of ranks that were asked for a checkpoint.
    pub(crate) checkpoint_ranks: f64,
    /// Number of ranks without a slot for the snapshot of this step.
    pub(crate) ranks_without_slot: f64,
    /// Seconds that the last snapshot cost.
    pub(crate) snapshot_seconds: f64,
    /// Seconds of the previous step.
    pub(crate) last_step_seconds: f64,
    pub(crate) moe_layers: Vec<MoeLayerFigures>,
}

/// Figures of one MoE layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct MoeLayerFigures {
    /// Routed tokens by expert.
    pub(crate) tokens_per_expert: Vec<f64>,
    pub(crate) transfers: Transfers,
}

/// Lengths of the lists in [`StepFigures`], the same on all ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FigureSizes {
    pub(crate) moe_layers: usize,
    pub(crate) experts: usize,
}

impl StepFigures {
    pub(crate) fn zeros(sizes: FigureSizes) -> StepFigures {
        StepFigures::unpack(sizes, std::iter::repeat(0.0))
    }

    /// Lists the figures in the order that [`StepFigures::unpack`] reads.
    pub(crate) fn pack(&self) -> Vec<f64> {
        let mut packed = vec![
            self.cross_entropy,
            self.load_balance,
            self.z,
            self.stopping_ranks + self.checkpoint_ranks * SECOND_COUNT,
            self.ranks_without_slot,
            self.snapshot_seconds,
            self.last_step_seconds,
        ];
        for layer in &self.moe_layers {
            packed.extend(&layer.tokens_per_expert);
        }
        for layer in &self.moe_layers {
            let Transfers {
                lent_tokens,
                lent_bytes,
                internode_bytes,
                plan_seconds,
            } = layer.transfers;
            packed.extend([lent_tokens, lent_bytes, internode_bytes, plan_seconds]);
        }
        packed
    }

    /// Reads figures in the order of [`StepFigures::pack`].
    ///
    /// # Panics
    /// If there are fewer figures than `sizes` requires.
    pub(crate) fn unpack(sizes: FigureSizes, packed: impl IntoIterator<Item = f64>) -> StepFigures {
        let mut packed = packed.into_iter();
        let mut next = || packed.next().expect("all ranks sum equally many figures");
        let losses = [next(), next(), next()];
        let counts = next();
        let mut figures = StepFigures {
            cross_entropy: losses[0],
            load_balance: losses[1],
            z: losses[2],
            stopping_ranks: counts % SECOND_COUNT,
            checkpoint_ranks: (counts / SECOND_COUNT).floor(),
            ranks_without_slot: next(),
            snapshot_seconds: next(),
            last_step_seconds: next(),
            moe_layers: vec![MoeLayerFigures::default(); sizes.moe_layers],
        };
        for layer in &mut figures.moe_layers {
            layer.tokens_per_expert = (0..sizes.experts).map(|_| next()).collect();
        }
        for layer in &mut figures.moe_layers {
            layer.transfers = Transfers {
                lent_tokens: next(),
                lent_bytes: next(),
                internode_bytes: next(),
                plan_seconds: next(),
            };
        }
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(sizes: FigureSizes, len: usize) -> (Vec<f64>, StepFigures) {
        let packed: Vec<f64> = (0..len).map(|number| number as f64).collect();
        let figures = StepFigures::unpack(sizes, packed.iter().copied());
        (packed, figures)
    }

    #[test]
    fn the_order_of_the_sum_is_fixed() {
        let sizes = FigureSizes {
            moe_layers: 2,
            experts: 3,
        };
        let (packed, figures) = counting(sizes, 7 + 6 + 8);
        assert_eq!(figures.pack(), packed);
        assert_eq!(figures.cross_entropy, 0.0);
        assert_eq!(figures.stopping_ranks, 3.0);
        assert_eq!(figures.ranks_without_slot, 4.0);
        assert_eq!(figures.last_step_seconds, 6.0);
        assert_eq!(figures.moe_layers[1].tokens_per_expert, [10.0, 11.0, 12.0]);
        assert_eq!(figures.moe_layers[1].transfers.lent_tokens, 17.0);
        assert_eq!(figures.moe_layers[1].transfers.internode_bytes, 19.0);
    }

    #[test]
    fn one_figure_carries_both_counts_of_requests() {
        let sizes = FigureSizes {
            moe_layers: 0,
            experts: 0,
        };
        let mut sum = vec![0.0; StepFigures::zeros(sizes).pack().len()];
        for rank in 0..65_536 {
            let mut own = StepFigures::zeros(sizes);
            own.stopping_ranks = f64::from(u8::from(rank % 2 == 0));
            own.checkpoint_ranks = 1.0;
            for (total, figure) in sum.iter_mut().zip(own.pack()) {
                *total += figure;
            }
        }
        let figures = StepFigures::unpack(sizes, sum);
        assert_eq!(figures.stopping_ranks, 32_768.0);
        assert_eq!(figures.checkpoint_ranks, 65_536.0);
    }

    #[test]
    fn sizes_may_be_zero() {
        let sizes = FigureSizes {
            moe_layers: 0,
            experts: 0,
        };
        assert_eq!(StepFigures::zeros(sizes).pack(), [0.0; 7]);
    }
}
