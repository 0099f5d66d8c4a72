//! Everything that a model is built from besides its shape.

use crate::{
    config::{Config, Dtype, RecomputeConfig},
    process_groups::ProcessGroups,
};
use moe::experts::{Fp8Weights, GemmPrecision};
use parallel::{Accelerator, context::ContextKind};

/// Device, process groups and numeric choices of a [`Model`](crate::Model).
pub struct BuildContext<'a> {
    /// Tokens of a sequence, over all context-parallel ranks.
    pub sequence_length: usize,
    /// Arithmetic of the model.
    pub dtype: Dtype,
    /// Arithmetic of the routed experts' GEMMs.
    pub expert_gemm: GemmPrecision,
    /// Seed of the initial values.
    pub seed: u64,
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
    /// Reads the context of a training run from its configuration.
    pub fn from_config(
        config: &Config,
        device: &'a dyn Accelerator,
        groups: &'a ProcessGroups,
    ) -> BuildContext<'a> {
        let expert_gemm = if config.train.fp8_experts {
            GemmPrecision::Fp8(Fp8Weights::default())
        } else {
            GemmPrecision::Model
        };
        BuildContext {
            sequence_length: config.data.sequence_length,
            dtype: config.train.dtype,
            expert_gemm,
            seed: config.run.seed,
            device,
            groups,
            context_attention: config.parallel.context_attention,
            recompute: config.parallel.recompute.clone(),
            offload: config.optimizer.offload && !device.computes_on_host(),
        }
    }

    /// Returns the context of one rank that saves all activations, with seed 0.
    pub fn single_rank(
        sequence_length: usize,
        dtype: Dtype,
        device: &'a dyn Accelerator,
        groups: &'a ProcessGroups,
    ) -> BuildContext<'a> {
        BuildContext {
            sequence_length,
            dtype,
            expert_gemm: GemmPrecision::Model,
            seed: 0,
            device,
            groups,
            context_attention: ContextKind::Ring,
            recompute: RecomputeConfig::default(),
            offload: false,
        }
    }
}
