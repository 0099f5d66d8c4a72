//! Construction of a rank's weights from the descriptions of parameters.

use super::{
    build_context::BuildContext,
    parameters::{Parameters, Unit},
    part::ModelPart,
    position::ShardPosition,
    rules::ParameterRules,
    spec::{ParamSpec, Split},
    window_masks::WindowMasks,
};
use crate::config::ModelConfig;
use parallel::Weight;
use std::sync::Arc;

/// The parameters so far, and what the next ones are built from.
pub(crate) struct WeightBuilder<'a> {
    pub(crate) parameters: Parameters,
    pub(crate) ctx: &'a BuildContext<'a>,
    pub(crate) config: &'a ModelConfig,
    pub(crate) position: ShardPosition,
    /// Shared by the layers.
    pub(crate) window_masks: WindowMasks,
    rules: ParameterRules,
}

impl<'a> WeightBuilder<'a> {
    /// Returns a builder without parameters for a rank that holds `part` of the model.
    pub(crate) fn new(
        config: &'a ModelConfig,
        part: &ModelPart,
        ctx: &'a BuildContext<'a>,
    ) -> WeightBuilder<'a> {
        WeightBuilder {
            parameters: Parameters::new(
                ctx.dtype.kind(),
                ctx.seed,
                ctx.groups.zero,
                ctx.groups.replications.clone(),
                ctx.offload,
            ),
            ctx,
            config,
            position: ShardPosition::in_groups(ctx.groups).with_part(config, part),
            window_masks: WindowMasks::default(),
            rules: ParameterRules::new(config),
        }
    }

    /// Adds this rank's part of a parameter and returns its weight.
    pub(crate) fn add(&mut self, spec: &ParamSpec) -> Weight {
        let experts: Vec<usize> = spec.own_experts(&self.position).collect();
        let weight = self.parameters.add(
            self.ctx.device,
            &spec.local_shape(&self.position),
            spec.slices(&self.position, &experts),
            spec.replicas(&self.position),
            self.rules.options(spec),
        );
        weight.scale_uses(self.uses(spec))
    }

    /// Returns how often a forward pass uses a matrix: once for each chunk of tokens.
    fn uses(&self, spec: &ParamSpec) -> usize {
        let is_matrix = spec.dims.len() > 1;
        match spec.split {
            Split::Tensor(_) if is_matrix => self.ctx.groups.tensor.uses_per_forward(),
            Split::ExpertTensor(_) => self.ctx.groups.expert_chunks,
            _ => 1,
        }
    }

    /// Returns the parameters from index `first` on as a unit that is gathered together.
    pub(crate) fn unit_from(&self, first: usize) -> Arc<Unit> {
        Arc::new(self.parameters.unit(first))
    }
}
