//! Metrics of a step, and the records of the files that they are written to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, iter::Sum};

/// Metrics of one step, over all ranks. A line has less than 4 KB, whatever the numbers of ranks
/// and layers are.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct StepMetrics {
    /// Number of completed steps, including this one.
    pub step: u64,
    /// Cross-entropy per counted token, in nats; 0 if no token counts.
    pub loss: f64,
    /// Tokens of the step whose loss counts: all but those that `data.eod_mask_loss` and the masks
    /// of `data.train` leave out.
    pub counted_tokens: u64,
    /// Load-balancing loss without its weight. At perfect balance it is 1 per layer.
    pub load_balance_loss: f64,
    /// Router z-loss without its weight.
    pub z_loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Epochs so far of the source of training data that has most.
    pub epochs: f64,
    /// Tokens per second of the step.
    pub tokens_per_s: f64,
    /// Duration of the step in milliseconds.
    pub step_ms: f64,
    /// Figures of the MoE layers, if the model has any.
    #[serde(flatten)]
    pub moe: Option<MoeMetrics>,
    /// Experts that moved to another rank after this step, with `model.moe.placement`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moved_experts: Option<u64>,
    /// Attention logits of the step, with `optimizer.qk_clip`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qk_clip: Option<QkClipMetrics>,
    /// Cost of the last snapshot, in steps after which one was taken or skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotMetrics>,
    /// Distributions of figures over the ranks.
    pub rank_distributions: RankDistributions,
    /// Line of `routing.jsonl`, on rank 0 in the steps that have one.
    #[serde(skip)]
    pub routing: Option<RoutingLine>,
    /// Line of `ranks.jsonl`, on rank 0 in the steps that have one.
    #[serde(skip)]
    pub ranks: Option<RankLine>,
}

/// Attention logits of a step, over all layers and heads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, JsonSchema)]
pub struct QkClipMetrics {
    /// Largest attention logit, after scaling, before the update.
    pub largest_logit: f64,
    /// Query heads whose largest logit exceeded the threshold.
    pub clipped_heads: u64,
}

/// Figures over the MoE layers of a model.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct MoeMetrics {
    /// Tokens of a layer's most loaded expert over the mean.
    pub expert_imbalance: LayerDistribution,
    /// Tokens of a layer's most loaded rank over the mean of its ranks.
    pub rank_imbalance: LayerDistribution,
    /// Lowest of the most loaded ranks of the first layer that has the largest `rank_imbalance`.
    pub most_loaded_rank: usize,
    /// Routed tokens of all layers: the sum of `tokens_per_expert`.
    pub routed_tokens: u64,
    /// Routed tokens that a helper computed for an expert's home.
    pub lent_tokens: LayerTotal<u64>,
    /// Bytes of expert weights lent in forward. Their gradients return in fp32.
    pub lent_bytes: LayerTotal<u64>,
    /// Bytes of tokens that crossed nodes during dispatch. Combine sends as many back, and backward
    /// twice as many.
    pub internode_bytes: LayerTotal<u64>,
    /// Milliseconds that a rank spent on planning, on average.
    pub plan_ms: LayerTotal<f64>,
}

/// Distribution of a figure over MoE layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LayerDistribution {
    /// Mean over the layers.
    pub mean: f64,
    /// Median over the layers.
    pub median: f64,
    /// 90th percentile over the layers.
    pub p90: f64,
    /// Maximum over the layers.
    pub largest: f64,
    /// First layer that has the maximum, counted among the MoE layers from 0.
    pub largest_layer: usize,
}

/// Sum of a figure over MoE layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LayerTotal<T> {
    /// Sum over the layers.
    pub total: T,
    /// Maximum over the layers.
    pub largest: T,
    /// First layer that has the maximum, counted among the MoE layers from 0.
    pub largest_layer: usize,
}

/// Figures of each rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RankLists {
    /// For each MoE layer, the routed tokens that each rank computed. All ranks that hold slices of
    /// an expert (`parallel.expert_tensor`) compute its tokens.
    pub tokens_per_rank: Vec<Vec<u64>>,
    /// Peak bytes of tensors on each rank's device so far.
    pub rank_peak_memory: Vec<u64>,
    /// Peak resident host memory of each rank's process so far, in bytes.
    pub rank_peak_resident: Vec<u64>,
    /// Fraction of the step's pass time in which each rank waited for others; on processors only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rank_wait_ratio: Vec<f64>,
    /// Mean milliseconds of each rank's passes in a pipeline, by kind and `.chunk` after the first;
    /// on processors only. `run.trace_step` times passes on devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rank_pass_ms: Vec<BTreeMap<String, f64>>,
}

/// Distributions of figures over the ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RankDistributions {
    /// Peak bytes of tensors on a rank's device so far.
    pub peak_memory: RankDistribution,
    /// Peak resident host memory of a rank's process so far, in bytes.
    pub peak_resident: RankDistribution,
    /// Fraction of the step's pass time in which a rank waited for others; on processors only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ratio: Option<RankDistribution>,
    /// Mean milliseconds of a rank's passes in a pipeline, by kind; on processors only.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pass_ms: BTreeMap<String, RankDistribution>,
}

/// Distribution of a figure over the ranks that have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RankDistribution {
    /// Number of these ranks.
    pub count: u64,
    /// Mean over these ranks.
    pub mean: f64,
    /// Median, off by a 64th of the range of values at most.
    pub median: f64,
    /// 90th percentile, off by a 64th of the range of values at most.
    pub p90: f64,
    /// Maximum over these ranks.
    pub largest: f64,
    /// Lowest rank that has the maximum.
    pub largest_rank: usize,
}

/// Figures of each rank in the first, the last and every `run.log_every`-th step.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RankLine {
    /// Number of completed steps, including this one.
    pub step: u64,
    /// The figures.
    #[serde(flatten)]
    pub lists: RankLists,
}

/// Cost of snapshots on rank 0.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotMetrics {
    /// Milliseconds that the last complete copy stopped training.
    pub stall_ms: f64,
    /// Milliseconds of the last complete copy, which overlaps training.
    pub copy_ms: f64,
    /// Bytes that this rank saves.
    pub bytes: u64,
    /// Snapshots skipped so far because a rank had no free slot.
    pub skipped: u64,
}

impl StepMetrics {
    /// True if the step was computed by one rank.
    pub fn has_single_rank(&self) -> bool {
        self.rank_distributions.peak_memory.count == 1
    }
}

impl MoeMetrics {
    /// Returns the fraction of routed tokens that a helper computed.
    pub fn lent_fraction(&self) -> f64 {
        self.lent_tokens.total as f64 / (self.routed_tokens as f64).max(1.0)
    }
}

impl LayerDistribution {
    /// Returns the distribution of `layers`; `None` if there are none.
    pub(crate) fn of(layers: &[f64]) -> Option<LayerDistribution> {
        let mut sorted = layers.to_vec();
        sorted.sort_by(f64::total_cmp);
        let largest = *sorted.last()?;
        let at = |fraction: f64| sorted[((sorted.len() - 1) as f64 * fraction).round() as usize];
        Some(LayerDistribution {
            mean: layers.iter().sum::<f64>() / layers.len() as f64,
            median: at(0.5),
            p90: at(0.9),
            largest,
            largest_layer: layers.iter().position(|&layer| layer == largest)?,
        })
    }
}

impl<T: Copy + PartialOrd + Sum> LayerTotal<T> {
    /// Returns the sum of `layers`; `None` if there are none.
    pub(crate) fn of(layers: &[T]) -> Option<LayerTotal<T>> {
        let mut largest = *layers.first()?;
        let mut largest_layer = 0;
        for (layer, &figure) in layers.iter().enumerate() {
            if figure > largest {
                largest = figure;
                largest_layer = layer;
            }
        }
        Some(LayerTotal {
            total: layers.iter().copied().sum(),
            largest,
            largest_layer,
        })
    }
}

/// Validation loss after a step.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct ValidationMetrics {
    /// Number of completed steps.
    pub step: u64,
    /// Mean cross-entropy over the counted tokens of the validation sequences, in nats per token.
    pub validation_loss: f64,
    /// Tokens of the validation sequences whose loss counts.
    pub counted_tokens: u64,
    /// Mean cross-entropy of each source, by its name, in nats per token.
    pub validation: BTreeMap<String, f64>,
    /// Estimated cross-entropy per byte of text in bits, for sources whose `dataset.json` records
    /// bytes: from the mean bytes per token of the whole file. There is none with
    /// `data.eod_mask_loss` or a mask.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub bits_per_byte: BTreeMap<String, f64>,
}

/// Figures of each MoE layer and expert in the first, the last and every `run.log_every`-th step.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RoutingLine {
    /// Number of completed steps, including this one.
    pub step: u64,
    /// Routed tokens of each expert in this step, `[MoE layers][E]`.
    #[serde(alias = "choices")]
    pub tokens_per_expert: Vec<Vec<u64>>,
    /// The other figures of each MoE layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerMetrics>,
}

/// Figures of one MoE layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LayerMetrics {
    /// Tokens of the most loaded expert over the mean.
    pub expert_imbalance: f64,
    /// Tokens of the most loaded rank over the mean of the layer's ranks.
    pub rank_imbalance: f64,
    /// Routed tokens that a rank of the layer's stage computed. All ranks that hold slices of an
    /// expert compute its tokens.
    pub rank_tokens: RankDistribution,
    /// Routed tokens that a helper computed for an expert's home.
    pub lent_tokens: u64,
    /// Bytes of expert weights lent in forward.
    pub lent_bytes: u64,
    /// Bytes of tokens that crossed nodes during dispatch.
    pub internode_bytes: u64,
    /// Milliseconds that a rank spent on planning, on average.
    pub plan_ms: f64,
}

/// Stands for lines that are missing: the disk took none for so long that memory for them ran out,
/// or the run was interrupted before it took them.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DroppedLines {
    /// Last step of the missing lines.
    pub step: u64,
    /// First step of the missing lines.
    pub first_step: u64,
    /// Number of steps without their line.
    pub dropped_steps: u64,
    /// Number of missing lines, including those of validation.
    pub dropped_lines: u64,
}

/// Receiver of a run's progress, on rank 0.
pub trait Progress {
    /// Reports a completed step of `steps`.
    fn step(&mut self, metrics: &StepMetrics, steps: u64);
    /// Reports the losses of a validation.
    fn validation(&mut self, metrics: &ValidationMetrics);
    /// Reports an event for information.
    fn note(&mut self, message: &str);
    /// Reports a problem that does not end the run.
    fn warn(&mut self, message: &str);
}
