//! Metrics of a step from the figures that the ranks have summed.

use super::{
    Trainer,
    distribution::Distribution,
    metrics::{RankDistributions, RankLists, SnapshotMetrics, StepMetrics, percentiles},
    rank_figures::{ByFigure, PER_UNIT, RankTable},
    step_figures::MoeLayerFigures,
    step_sums::PassTime,
    summed_figures::{RankReport, SummedFigures},
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
    pub(super) fn step_metrics(&self, summed: SummedFigures, summary: StepSummary) -> StepMetrics {
        let StepSummary {
            counted_tokens,
            lr,
            grad_norm,
            tokens,
            seconds,
            moved_experts,
            has_snapshot,
        } = summary;
        let figures = &summed.step;
        let layers = &figures.moe_layers;
        let expert_imbalance: Vec<f64> = layers
            .iter()
            .map(|layer| imbalance(layer.tokens_per_expert.iter().copied()))
            .collect();
        let rank_imbalance = self.rank_imbalances(&summed.ranks);
        let mut rank_lists = None;
        let mut rank_distributions = None;
        let mut logged_ranks = None;
        match summed.ranks {
            RankReport::Listed(table) => rank_lists = Some(self.rank_lists(&table)),
            RankReport::Distributed { figures, lists } => {
                rank_distributions = Some(self.rank_distributions(&figures));
                logged_ranks = lists.map(|table| self.rank_lists(&table));
            }
        }
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
            lent_tokens: by_layer(layers, |layer| layer.transfers.lent_tokens as u64),
            lent_bytes: by_layer(layers, |layer| layer.transfers.lent_bytes as u64),
            internode_bytes: by_layer(layers, |layer| layer.transfers.internode_bytes as u64),
            plan_ms: by_layer(layers, |layer| {
                layer.transfers.plan_seconds * 1e3 / self.stage_ranks() as f64
            }),
            moved_experts,
            snapshot,
            tokens_per_expert: by_layer(layers, |layer| whole(&layer.tokens_per_expert)),
            rank_lists,
            rank_distributions,
            logged_ranks,
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

    /// Returns the maximum over the mean of the tokens that the ranks of each MoE layer computed.
    fn rank_imbalances(&self, ranks: &RankReport) -> Vec<f64> {
        match ranks {
            RankReport::Listed(table) => {
                let layers = tokens_by_layer(table).into_iter();
                layers.map(|layer| self.rank_imbalance(&layer)).collect()
            }
            RankReport::Distributed { figures, .. } => {
                let layers = figures.tokens.iter();
                let imbalance = |tokens: &Distribution| tokens.largest as f64 / tokens.mean;
                let of_layer = |tokens: &Option<Distribution>| {
                    let busy = tokens.as_ref().filter(|tokens| tokens.largest > 0);
                    busy.map_or(1.0, imbalance)
                };
                layers.map(of_layer).collect()
            }
        }
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

    fn rank_lists(&self, table: &RankTable) -> RankLists {
        let ranks = &table.ranks;
        let measured = ranks.iter().filter(|_| self.device.computes_on_host());
        let in_pipeline = measured.clone().filter(|rank| !rank.passes.is_empty());
        let layers = tokens_by_layer(table).into_iter();
        RankLists {
            tokens_per_rank: layers.map(|layer| whole(&layer)).collect(),
            rank_peak_memory: ranks.iter().map(|rank| rank.peak_memory as u64).collect(),
            rank_peak_resident: ranks.iter().map(|rank| rank.peak_resident as u64).collect(),
            rank_wait_ratio: measured.filter_map(|rank| rank.wait_ratio).collect(),
            rank_pass_ms: in_pipeline.map(|rank| self.pass_ms(&rank.passes)).collect(),
        }
    }

    fn rank_distributions(&self, figures: &ByFigure<Option<Distribution>>) -> RankDistributions {
        let record = |figure: &Option<Distribution>, per_unit: f64| {
            let figure = figure.as_ref().map(|figure| figure.in_units(per_unit));
            figure.unwrap_or_default()
        };
        let layers = figures.tokens.iter();
        let passes = figures.passes.iter().enumerate();
        let passes = passes.filter_map(|(index, figure)| {
            let times = figure.as_ref()?.in_units(PER_UNIT / 1e3);
            Some((self.pass_name(index), times))
        });
        RankDistributions {
            tokens: layers.map(|figure| record(figure, 1.0)).collect(),
            peak_memory: record(&figures.peak_memory, 1.0),
            peak_resident: record(&figures.peak_resident, 1.0),
            wait_ratio: record(&figures.wait_ratio, PER_UNIT),
            pass_ms: passes.collect(),
        }
    }

    /// Returns the mean milliseconds of each pass that ran, by its name.
    fn pass_ms(&self, passes: &[PassTime]) -> BTreeMap<String, f64> {
        let times = passes.iter().enumerate();
        let ran = times.filter(|(_, pass)| pass.count > 0.0);
        let named = ran.map(|(index, pass)| {
            let milliseconds = pass.seconds / pass.count * 1e3;
            (self.pass_name(index), milliseconds)
        });
        named.collect()
    }

    /// Returns the name of the pass at `index` of `[kinds * chunks]`.
    fn pass_name(&self, index: usize) -> String {
        let chunks = self.plans[0].plan.schedule.order.chunks;
        let (_, kind) = PassKind::NAMES[index / chunks];
        match index % chunks {
            0 => kind.to_string(),
            chunk => format!("{kind}.{chunk}"),
        }
    }
}

/// Returns the tokens that each rank computed, `[MoE layers][ranks]`.
fn tokens_by_layer(table: &RankTable) -> Vec<Vec<f64>> {
    let layers = table.ranks.first().map_or(0, |rank| rank.tokens.len());
    let of_layer = |layer: usize| {
        let tokens = table.ranks.iter().map(|rank| rank.tokens[layer]);
        tokens.map(Option::unwrap_or_default).collect()
    };
    (0..layers).map(of_layer).collect()
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
