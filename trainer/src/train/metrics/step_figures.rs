//! Figures of one step that all ranks sum.

use crate::train::step_sums::Transfers;

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
            self.stopping_ranks,
            self.checkpoint_ranks,
            self.ranks_without_slot,
            self.snapshot_seconds,
            self.last_step_seconds,
        ];
        for layer in &self.moe_layers {
            let Transfers {
                lent_tokens,
                lent_bytes,
                internode_bytes,
                plan_seconds,
            } = layer.transfers;
            packed.extend([lent_tokens, lent_bytes, internode_bytes, plan_seconds]);
            packed.extend(&layer.tokens_per_expert);
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
        StepFigures {
            cross_entropy: next(),
            load_balance: next(),
            z: next(),
            stopping_ranks: next(),
            checkpoint_ranks: next(),
            ranks_without_slot: next(),
            snapshot_seconds: next(),
            last_step_seconds: next(),
            moe_layers: (0..sizes.moe_layers)
                .map(|_| MoeLayerFigures {
                    transfers: Transfers {
                        lent_tokens: next(),
                        lent_bytes: next(),
                        internode_bytes: next(),
                        plan_seconds: next(),
                    },
                    tokens_per_expert: (0..sizes.experts).map(|_| next()).collect(),
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_figures_are_read_in_their_order() {
        let sizes = FigureSizes {
            moe_layers: 2,
            experts: 3,
        };
        let packed: Vec<f64> = (0..8 + 2 * 7).map(f64::from).collect();
        let figures = StepFigures::unpack(sizes, packed.iter().copied());
        assert_eq!(figures.pack(), packed);
        assert_eq!(figures.cross_entropy, 0.0);
        assert_eq!(figures.stopping_ranks, 3.0);
        assert_eq!(figures.ranks_without_slot, 5.0);
        assert_eq!(figures.last_step_seconds, 7.0);
        assert_eq!(figures.moe_layers[1].transfers.internode_bytes, 17.0);
        assert_eq!(figures.moe_layers[1].tokens_per_expert, [19.0, 20.0, 21.0]);
    }

    #[test]
    fn sizes_may_be_zero() {
        let sizes = FigureSizes {
            moe_layers: 0,
            experts: 0,
        };
        assert_eq!(StepFigures::zeros(sizes).pack(), [0.0; 8]);
    }
}
