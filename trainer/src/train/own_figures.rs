//! This rank's figures of a step.

use super::{
    Trainer,
    metrics::{
        rank_figures::RankFigures,
        step_figures::{FigureSizes, StepFigures},
        summed_figures::OwnFigures,
    },
    snapshots::Snapshots,
    step_sums::StepSums,
};
use crate::Error;

/// Losses of a step on this rank.
pub(super) struct StepLosses {
    pub(super) cross_entropy: f64,
    pub(super) load_balance: f64,
    pub(super) z: f64,
}

/// Facts of a rank that all ranks count.
pub(super) struct StepFlags {
    /// True if the rank was told to stop.
    pub(super) stop: bool,
    /// True if a snapshot is due and the rank has no slot for it.
    pub(super) lacks_slot: bool,
}

impl Trainer {
    /// Returns this rank's figures of the step.
    pub(super) fn own_figures(
        &self,
        sums: &StepSums,
        losses: StepLosses,
        flags: StepFlags,
    ) -> Result<OwnFigures, Error> {
        let sizes = FigureSizes {
            moe_layers: sums.moe_layers.len(),
            experts: sums.num_experts(),
        };
        let durability = &self.durability;
        let snapshots = durability.snapshots.as_ref();
        let mut step = StepFigures::zeros(sizes);
        step.cross_entropy = losses.cross_entropy;
        step.load_balance = losses.load_balance;
        step.z = losses.z;
        step.stopping_ranks = f64::from(u8::from(flags.stop));
        step.checkpoint_ranks = f64::from(u8::from(durability.requests.is_asked));
        step.ranks_without_slot = f64::from(u8::from(flags.lacks_slot));
        step.snapshot_seconds = snapshots.map_or(0.0, Snapshots::cost_seconds);
        step.last_step_seconds = durability.last_step_seconds;
        for (figures, sums) in step.moe_layers.iter_mut().zip(&sums.moe_layers) {
            figures
                .tokens_per_expert
                .clone_from(&sums.tokens_per_expert);
            figures.transfers = sums.transfers;
        }
        Ok(OwnFigures {
            sizes,
            step,
            rank: self.rank_figures(sums)?,
            largest_logits: sums.largest_logits.clone(),
            lists_ranks: self.is_logged(self.step() + 1),
        })
    }

    /// Returns the figures that this rank has for itself.
    fn rank_figures(&self, sums: &StepSums) -> Result<RankFigures, Error> {
        let mut tokens = vec![None; sums.moe_layers.len()];
        for (moe_layer, _, _) in self.model.local_moe_layers() {
            tokens[moe_layer] = Some(sums.moe_layers[moe_layer].computed_tokens);
        }
        // Without a pipeline, the step's metrics contain no times of passes.
        let has_pipeline = self.rank.mesh.shape().pipeline > 1;
        Ok(RankFigures {
            tokens,
            peak_memory: self.rank.device.memory()?.peak as f64,
            peak_resident: parallel::peak_resident()? as f64,
            wait_ratio: sums.wait_ratio,
            passes: if has_pipeline {
                sums.passes.clone()
            } else {
                Vec::new()
            },
        })
    }
}
