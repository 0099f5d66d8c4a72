//! Attention: its kinds as plans and as layers.

pub(crate) mod grouped;
pub(crate) mod latent;
mod saved;

use super::{
    activations::{Activations, BlockShape},
    batch::BatchContext,
    core_plan::CorePlan,
    largest_scores::LargestScores,
    rope::Rope,
    rotary_part::RotaryPart,
    score_rows::BlockScoreRows,
    spec::ParamSpec,
    weights::WeightBuilder,
    work::Flops,
};
use crate::problems::{Problems, Quantity};
use grouped::{GroupedAttention, GroupedConfig, QkNorm};
use latent::{LatentAttention, LatentConfig};
use parallel::{Activation, MeshShape, context::ContextKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tch::Tensor;
use torch_ext::Error;

/// The kind of attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttentionConfig {
    /// Grouped-query attention (arXiv 2305.13245) with `model.heads`, `kv_heads`, `head_dim` and
    /// `qk_norm`.
    Grouped(GroupedConfig),
    /// Multi-head latent attention (arXiv 2405.04434) with `model.heads`.
    Latent(LatentConfig),
}

impl Default for AttentionConfig {
    fn default() -> AttentionConfig {
        AttentionConfig::Grouped(GroupedConfig::default())
    }
}

impl AttentionConfig {
    /// Returns the plan of the attention of one layer.
    pub(crate) fn plan(&self, model: AttentionKeys) -> Box<dyn AttentionPlan> {
        match self.clone() {
            AttentionConfig::Grouped(config) => Box::new(GroupedAttention { model, config }),
            AttentionConfig::Latent(config) => Box::new(LatentAttention { model, config }),
        }
    }
}

/// Keys outside `model.attention` that the attention of a layer depends on.
#[derive(Debug, Clone)]
pub(crate) struct AttentionKeys {
    /// Width of the residual stream.
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: Option<usize>,
    pub(crate) head_dim: Option<usize>,
    pub(crate) qk_norm: QkNorm,
    pub(crate) norm_eps: f64,
    pub(crate) score_scale: ScoreScale,
    /// Factor on the scale of latent attention, from the scaling of rotary embedding.
    pub(crate) latent_scale_factor: f64,
    /// Index of the layer.
    pub(crate) layer: usize,
    /// Number of layers of the model.
    pub(crate) layers: usize,
}

/// The keys `kv_heads` and `head_dim` of a model, if its attention has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadKeys {
    pub(crate) kv_heads: Option<usize>,
    pub(crate) head_dim: Option<usize>,
}

/// Heads in the rows of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeadRows {
    pub(crate) heads: u64,
    /// Rows of a head.
    pub(crate) width: u64,
    /// Rows of a head that rotary position embedding turns, the first half with the second half.
    pub(crate) rotary: Range<u64>,
}

/// Factor on the products of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum ScoreScale {
    /// One over the root of a key's width.
    InverseRoot,
    /// One over the width of a key, as maximal update parametrization has it.
    Inverse,
    /// Given by the configuration.
    Given(f64),
}

impl ScoreScale {
    /// Returns the factor for keys of this width.
    pub(crate) fn of_width(self, width: usize) -> f64 {
        let width = width as f64;
        match self {
            ScoreScale::InverseRoot => 1.0 / width.sqrt(),
            ScoreScale::Inverse => 1.0 / width,
            ScoreScale::Given(scale) => scale,
        }
    }
}

/// The plan of one attention block. It alone knows the block's sizes.
pub(crate) trait AttentionPlan {
    /// Describes the parameters of the block with this global name, in the order of use.
    fn specs(&self, block: &str) -> Vec<ParamSpec>;

    /// Returns the rows that make queries and keys.
    fn score_rows(&self) -> BlockScoreRows;

    /// Returns the configuration's keys of heads with the values that unset ones stand for.
    fn head_keys(&self) -> HeadKeys;

    /// Returns the part of queries and keys of which rotary position embedding rotates all or some
    /// elements.
    fn rotary_part(&self) -> RotaryPart;

    /// Returns the heads in the rows of a tensor, by its name in the block, if rotary position
    /// embedding turns `rotary` elements of a head. `None` if it turns none of the tensor's rows.
    fn head_rows(&self, part: &str, rotary: u64) -> Option<HeadRows>;

    /// Returns the sizes of attention between queries, keys and values.
    fn core_plan(&self) -> CorePlan;

    /// Returns the most elements that a token has in one of the block's tensors, over all ranks.
    fn widest(&self) -> usize;

    /// Returns the FLOPs of a token in the forward pass over sequences of `length` tokens.
    fn flops(&self, length: usize) -> Flops;

    /// Returns the bytes of activations on a rank.
    fn activations(&self, at: &BlockShape) -> Activations;

    /// Adds the reasons why the block cannot exist.
    fn problems(&self, problems: &mut Problems);

    /// Returns the number of query heads, which ranks divide.
    fn heads(&self) -> usize;

    /// Adds the reasons why the ranks of `mesh` cannot divide the block.
    fn layout_problems(&self, mesh: &MeshShape, context: ContextKind, problems: &mut Problems) {
        let heads = self.heads();
        problems.divides(
            Quantity::new("model.heads", heads),
            Quantity::new("parallel.tensor", mesh.tensor),
            "each rank must have the same number of heads",
        );
        if context == ContextKind::Ulysses && mesh.tensor > 0 {
            problems.divides(
                Quantity::new("model.heads / parallel.tensor", heads / mesh.tensor),
                Quantity::new("parallel.context", mesh.context),
                "ulysses splits the heads; ring does not",
            );
        }
    }

    /// Builds this rank's part of the block with this global name.
    fn build(&self, builder: &mut WeightBuilder, name: &str) -> Box<dyn Attention>;
}

/// This rank's part of an attention block.
pub(crate) trait Attention: Send + Sync {
    /// Maps this rank's rows `[T / ranks, D]` of a microbatch to the same shape. Without `rope`,
    /// queries and keys do not rotate.
    ///
    /// # Collective
    /// All ranks of the tensor group and of the context group.
    fn forward(
        &self,
        x: &Activation,
        batch: &BatchContext,
        rope: Option<&Rope>,
    ) -> Result<Tensor, Error>;

    /// Returns the largest scores of this rank's heads.
    fn largest_scores(&self) -> &LargestScores;
}
