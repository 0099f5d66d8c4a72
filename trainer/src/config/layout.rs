//! The section `parallel`: how ranks divide the work.

use super::layer_set::LayerSet;
use super::limits::{MAX_CHUNKS, MAX_LAYERS, MAX_RANKS};
use super::words::{Auto, AxisSize};
use config_derive::ResumeKeys;
use parallel::{
    context::ContextKind,
    pipeline::{Vocabulary, schedules::ScheduleKind},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The parallel layout: how ranks divide the work.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Data parallelism: replicas of the dense layers. `auto` uses all ranks that the other axes
    /// leave.
    #[on_resume(free)]
    pub data: AxisSize,
    /// Tensor parallelism: ranks that split every matrix, and between blocks the tokens (sequence
    /// parallelism, arXiv 2205.05198).
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_RANKS))]
    pub tensor: usize,
    /// Context parallelism: ranks that split every sequence.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_RANKS))]
    pub context: usize,
    /// Attention over a split sequence.
    #[on_resume(free)]
    pub context_attention: ContextKind,
    /// Expert parallelism: ranks that hold different experts of a layer. These ranks are data,
    /// context and tensor ranks too, so `expert * expert_tensor` divides `data * context * tensor`.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_RANKS))]
    pub expert: usize,
    /// Expert tensor parallelism: ranks that split the matrices of every expert.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_RANKS))]
    pub expert_tensor: usize,
    /// Chunks of a microbatch that are dispatched one after another. The transfer of one chunk
    /// overlaps with the experts' work on another.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_CHUNKS))]
    pub expert_chunks: usize,
    /// Ranks per node, for hierarchical dispatch and for snapshots, which need one keeper per node.
    /// By default the launcher's number.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_RANKS))]
    pub ranks_per_node: Option<usize>,
    /// Pipeline parallelism: ranks that hold different layers, in stages.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_RANKS))]
    pub pipeline: usize,
    /// Pipeline schedule: `gpipe`, `1f1b`, `interleaved`, `zb-h1`, `zb-v`, `v-half`, `v-min`,
    /// `dualpipe-v`, or `{file: PATH}`.
    #[on_resume(free)]
    pub schedule: ScheduleChoice,
    /// Model chunks (stages) per rank, for `interleaved`. Other schedules have a fixed number.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_CHUNKS))]
    pub chunks: Option<usize>,
    /// Number of layers of each stage. By default an even split, which `vocabulary: redis` corrects
    /// for the output layer.
    #[on_resume(free)]
    #[schemars(inner(range(max = MAX_LAYERS)))]
    pub stage_layers: Option<Vec<usize>>,
    /// Place of the embedding and the output layer in a pipeline.
    #[on_resume(free)]
    pub vocabulary: VocabularyLayout,
    /// ZeRO level (arXiv 1910.02054), what replicas shard: 0 nothing, 1 the optimizer state, 2 also
    /// the gradients, 3 also the weights.
    #[on_resume(free)]
    #[schemars(range(min = 0, max = 3))]
    pub zero: u8,
    /// Hybrid sharding: ranks of a group that shards by ZeRO. Groups replicate each other. By
    /// default one group of all `data * context` replicas.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_RANKS))]
    pub zero_group_size: Option<usize>,
    /// Activation recomputation.
    #[on_resume(section)]
    pub recompute: RecomputeConfig,
    /// Chunks of the tokens that `tensor` ranks exchange one after another. The transfer of one
    /// chunk overlaps with the GEMM of another.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_CHUNKS))]
    pub tensor_chunks: usize,
    /// Size of a gradient bucket in MiB: gradients in one bucket share a reduction.
    #[on_resume(free)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub bucket_mib: f64,
}

impl Default for ParallelConfig {
    fn default() -> ParallelConfig {
        ParallelConfig {
            data: AxisSize::Auto(Auto::Auto),
            tensor: 1,
            context: 1,
            context_attention: ContextKind::Ring,
            expert: 1,
            expert_tensor: 1,
            expert_chunks: 1,
            ranks_per_node: None,
            pipeline: 1,
            schedule: ScheduleChoice::Known(ScheduleKind::OneFOneB),
            chunks: None,
            stage_layers: None,
            vocabulary: VocabularyLayout::Baseline,
            zero: 0,
            zero_group_size: None,
            recompute: RecomputeConfig::default(),
            tensor_chunks: 1,
            bucket_mib: 25.0,
        }
    }
}

/// Activation recomputation: what backward computes again instead of keeping it in memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct RecomputeConfig {
    /// Layers of which only the input is kept: `none`, `all`, a list of layer numbers, or a period
    /// such as `{every: 2, from: 1}`.
    #[on_resume(free)]
    pub layers: LayerSet,
    /// Parts that the other layers recompute. The activation function is always recomputed.
    #[on_resume(free)]
    pub parts: Vec<RecomputedPart>,
}

impl Default for RecomputeConfig {
    fn default() -> RecomputeConfig {
        RecomputeConfig {
            layers: LayerSet::NONE,
            parts: Vec::new(),
        }
    }
}

impl RecomputeConfig {
    /// Returns true if only the input of this layer is kept.
    pub fn recomputes_layer(&self, layer: usize) -> bool {
        self.layers.contains(layer)
    }

    /// Returns true if the output of this part is kept for backward.
    pub fn keeps(&self, part: RecomputedPart) -> bool {
        !self.parts.contains(&part)
    }
}

/// A part of a layer that backward can recompute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RecomputedPart {
    /// Outputs of the norms before attention and feed-forward.
    Norm,
    /// Attention over keys and values, without the projections.
    Attention,
    /// Inputs of the experts. Backward repeats the all-to-all.
    Dispatch,
    /// Gate-up GEMMs of experts and dense feed-forward layers.
    Experts,
}

/// A known pipeline schedule, or a file with one.
///
/// Known schedules that split backward or use vocabulary parallelism are refined with the costs of
/// their passes. A schedule from a file runs as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half, v-min, dualpipe-v, or {file: PATH}"
)]
pub enum ScheduleChoice {
    /// The name of a known schedule.
    Known(ScheduleKind),
    /// Your own schedule. `moerun plan schedule --yaml` prints an example.
    File {
        /// YAML file with `placement`, `chunks`, and one line of passes per rank.
        #[schemars(extend("format" = "path"))]
        file: PathBuf,
    },
}

/// Place of the embedding and the output layer in a pipeline. The names are those of arXiv
/// 2411.05288.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VocabularyLayout {
    /// On the first and the last stage, with an even split of the layers.
    #[default]
    Baseline,
    /// On the first and the last stage, which get fewer layers in return.
    Redis,
    /// Split over all stages, with three barriers per microbatch.
    Naive,
    /// Split over all stages, which all stop for it at the same time.
    Interlaced,
    /// Split over all stages, with two barriers per microbatch.
    #[serde(rename = "vocab-1")]
    Vocab1,
    /// Split over all stages, with one barrier per microbatch.
    #[serde(rename = "vocab-2")]
    Vocab2,
}

impl VocabularyLayout {
    /// Returns the algorithm of vocabulary parallelism, or None if the first and the last stage
    /// hold the vocabulary.
    pub fn algorithm(self) -> Option<Vocabulary> {
        match self {
            VocabularyLayout::Baseline | VocabularyLayout::Redis => None,
            VocabularyLayout::Naive => Some(Vocabulary::Naive),
            VocabularyLayout::Interlaced => Some(Vocabulary::Interlaced),
            VocabularyLayout::Vocab1 => Some(Vocabulary::Vocab1),
            VocabularyLayout::Vocab2 => Some(Vocabulary::Vocab2),
        }
    }
}
