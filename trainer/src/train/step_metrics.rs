//! Metrics of a step from the figures that the ranks have summed.

use super::{
    Trainer,
    metrics::{SnapshotMetrics, StepMetrics, percentiles},
    step_figures::{MoeLayerFigures, RankFigures, StepFigures},
    step_sums::PassTime,
};
use parallel::pipeline::PassKind;
use std::collections::BTreeMap;

/// Results of a step that are no sums over ranks.
#[derive(Clone, Copy)]
pub(super) struct StepSummary {
    pub(super) counted_tokens: u64,
    pub(super) lr: f64,
    pub(super) grad_norm: f64,
    /// Tokens of the step.
    pub(super) tokens: u64,
    pub(super) seconds: f64,
    pub(super) moved_experts: Option<u64>,
    /// True if a snapshot was due.
    pub(super) has_snapshot: bool,
}

impl Trainer {
    pub(super) fn step_metrics(&self, figures: &StepFigures, summary: StepSummary) -> StepMetrics {
        let StepSummary {
            counted_tokens,
            lr,
            grad_norm,
            tokens,
            seconds,
            moved_experts,
            has_snapshot,
        } = summary;
        let layers = &figures.moe_layers;
        let ranks = &figures.ranks;
        let expert_imbalance: Vec<f64> = layers
            .iter()
            .map(|layer| imbalance(layer.tokens_per_expert.iter().copied()))
            .collect();
        let rank_imbalance: Vec<f64> = layers
            .iter()
            .map(|layer| self.rank_imbalance(&layer.tokens_per_rank))
            .collect();
        let snapshot = if has_snapshot {
            self.snapshot_metrics()
        } else {
            None
        };
        StepMetrics {
            step: self.step,
            loss: figures.cross_entropy,
            counted_tokens,
            load_balance_loss: figures.load_balance,
            z_loss: figures.z,
            lr,
            grad_norm,
            tokens: self.tokens,
            tokens_per_s: tokens as f64 / seconds,
            step_ms: seconds * 1e3,
            expert_imbalance_percentiles: percentiles(&expert_imbalance),
            rank_imbalance_percentiles: percentiles(&rank_imbalance),
            expert_imbalance,
            rank_imbalance,
            tokens_per_rank: by_layer(layers, |layer| whole(&layer.tokens_per_rank)),
            lent_tokens: by_layer(layers, |layer| layer.transfers.lent_tokens as u64),
            lent_bytes: by_layer(layers, |layer| layer.transfers.lent_bytes as u64),
            internode_bytes: by_layer(layers, |layer| layer.transfers.internode_bytes as u64),
            plan_ms: by_layer(layers, |layer| {
                layer.transfers.plan_seconds * 1e3 / self.stage_ranks() as f64
            }),
            moved_experts,
            snapshot,
            tokens_per_expert: by_layer(layers, |layer| whole(&layer.tokens_per_expert)),
            rank_peak_memory: ranks.iter().map(|rank| rank.peak_memory as u64).collect(),
            rank_peak_resident: ranks.iter().map(|rank| rank.peak_resident as u64).collect(),
            rank_wait_ratio: ranks.iter().map(|rank| rank.wait_ratio).collect(),
            rank_pass_ms: self.pass_ms_by_rank(ranks),
        }
    }

    fn snapshot_metrics(&self) -> Option<SnapshotMetrics> {
        let snapshots = self.snapshots.as_ref()?;
        Some(SnapshotMetrics {
            stall_ms: snapshots.cost.stall * 1e3,
            copy_ms: snapshots.cost.copy * 1e3,
            bytes: snapshots.cost.bytes,
            skipped: snapshots.skipped,
        })
    }

    /// Returns the number of ranks that work on a layer.
    fn stage_ranks(&self) -> usize {
        self.world.size() / self.mesh.shape().pipeline
    }

    /// Returns the maximum over the mean of the tokens that a layer's ranks computed. Ranks of
    /// other stages have none.
    fn rank_imbalance(&self, tokens_per_rank: &[f64]) -> f64 {
        let stage = |rank: usize| self.mesh.coordinates_of(rank).pipeline;
        let busy_rank = tokens_per_rank.iter().position(|&tokens| tokens > 0.0);
        let busy_stage = busy_rank.map_or(0, stage);
        let ranks = tokens_per_rank.iter().enumerate();
        let in_stage = ranks.filter(|&(rank, _)| stage(rank) == busy_stage);
        imbalance(in_stage.map(|(_, &tokens)| tokens))
    }

    /// Returns each rank's pass times; empty without a pipeline.
    fn pass_ms_by_rank(&self, ranks: &[RankFigures]) -> Vec<BTreeMap<String, f64>> {
        let in_pipeline = ranks.iter().filter(|rank| !rank.passes.is_empty());
        in_pipeline.map(|rank| self.pass_ms(&rank.passes)).collect()
    }

    /// Returns the mean milliseconds of each pass that ran, by its name.
    fn pass_ms(&self, passes: &[PassTime]) -> BTreeMap<String, f64> {
        let chunks = self.plans[0].plan.schedule.order.chunks;
        let mut by_name = BTreeMap::new();
        for (index, pass) in passes.iter().enumerate() {
            if pass.count > 0.0 {
                let (_, kind) = PassKind::NAMES[index / chunks];
                let name = match index % chunks {
                    0 => kind.to_string(),
                    chunk => format!("{kind}.{chunk}"),
                };
                by_name.insert(name, pass.seconds / pass.count * 1e3);
            }
        }
        by_name
    }
}

fn by_layer<T>(layers: &[MoeLayerFigures], figure: impl Fn(&MoeLayerFigures) -> T) -> Vec<T> {
    layers.iter().map(figure).collect()
}

fn whole(counts: &[f64]) -> Vec<u64> {
    counts.iter().map(|&count| count as u64).collect()
}

/// Returns the maximum over the mean, or 1 if all loads are zero.
fn imbalance(loads: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = loads.clone().count().max(1) as f64;
    let mean = loads.clone().sum::<f64>() / count;
    if mean == 0.0 {
        1.0
    } else {
        loads.fold(0.0, f64::max) / mean
    }
}
