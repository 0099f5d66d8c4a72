//! Everything that a model is built from besides its shape.

use crate::{
    config::{documents::DocumentRules, dtype::Dtype, layout::RecomputeConfig},
    process_groups::ProcessGroups,
};
use moe::experts::GemmPrecision;
use parallel::{Accelerator, context::ContextKind};

/// Device, process groups and numeric choices of a [`Model`](crate::Model).
pub struct BuildContext<'a> {
    /// Tokens of a sequence, over all context-parallel ranks.
    pub sequence_length: usize,
    /// Treatment of documents that share a sequence; `None` if sequences are one text each.
    pub documents: Option<DocumentRules>,
    /// Arithmetic of the model.
    pub dtype: Dtype,
    /// Arithmetic of the routed experts' GEMMs.
    pub expert_gemm: GemmPrecision,
    /// Seed of the initial values.
    pub seed: u64,
    /// True if initial values are drawn; else they are not a number until they are loaded.
    pub draws_values: bool,
    /// Device of the weights.
    pub device: &'a dyn Accelerator,
    /// Process groups of this rank.
    pub groups: &'a ProcessGroups,
    /// Attention of ranks that split sequences.
    pub context_attention: ContextKind,
    /// Activations that backward recomputes.
    pub recompute: RecomputeConfig,
    /// True if optimizer state and master weights are in host memory and the model is on a device.
    pub offload: bool,
}

impl<'a> BuildContext<'a> {
    /// Returns the context of one rank that saves all activations, with seed 0 and without
    /// documents.
    pub fn single_rank(
        sequence_length: usize,
        dtype: Dtype,
        device: &'a dyn Accelerator,
        groups: &'a ProcessGroups,
    ) -> BuildContext<'a> {
        BuildContext {
            sequence_length,
            documents: None,
            dtype,
            expert_gemm: GemmPrecision::Model,
            seed: 0,
            draws_values: true,
            device,
            groups,
            context_attention: ContextKind::Ring,
            recompute: RecomputeConfig::default(),
            offload: false,
        }
    }
}
