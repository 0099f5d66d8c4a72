//! Attention: its kinds as plans and as layers.

pub(crate) mod grouped;

use super::{
    activations::{Activations, BlockShape},
    batch::BatchContext,
    rope::Rope,
    spec::ParamSpec,
    weights::WeightBuilder,
    work::Flops,
};
use crate::problems::Problems;
use parallel::{Activation, MeshShape, context::ContextKind};
use tch::Tensor;
use torch_ext::Error;

/// The keys `kv_heads` and `head_dim` of a model, if its attention has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadKeys {
    pub(crate) kv_heads: Option<usize>,
    pub(crate) head_dim: Option<usize>,
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

    /// Returns the configuration's keys of heads with the values that unset ones stand for.
    fn head_keys(&self) -> HeadKeys;

    /// Returns the elements of a head of which rotary position embedding turns all or a part.
    fn rotary_width(&self) -> usize;

    /// Returns the most elements that a token has in one of the block's tensors, over all ranks.
    fn widest(&self) -> usize;

    /// Returns the FLOPs of a token in the forward pass over sequences of `length` tokens.
    fn flops(&self, length: usize) -> Flops;

    /// Returns the bytes of activations on a rank.
    fn activations(&self, at: &BlockShape) -> Activations;

    /// Adds the reasons why the block cannot exist.
    fn problems(&self, problems: &mut Problems);

    /// Adds the reasons why the ranks of `mesh` cannot divide the block.
    fn layout_problems(&self, mesh: &MeshShape, context: ContextKind, problems: &mut Problems);

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
}
