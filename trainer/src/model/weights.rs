//! Construction of a rank's weights from the descriptions of parameters.

use super::{
    build_context::BuildContext,
    norm::Norm,
    parameters::{Parameters, Unit},
    position::ShardPosition,
    rules::ParameterRules,
    spec::{ParamSpec, Split},
    window_masks::WindowMasks,
};
use parallel::Weight;
use std::sync::Arc;

/// The parameters so far, and what the next ones are built from.
pub(crate) struct WeightBuilder<'a> {
    pub(crate) parameters: Parameters,
    pub(crate) ctx: &'a BuildContext<'a>,
    pub(crate) position: ShardPosition,
    /// Shared by the layers.
    pub(crate) window_masks: WindowMasks,
    rules: ParameterRules,
}

impl<'a> WeightBuilder<'a> {
    /// Returns a builder without parameters for the rank at `position`.
    pub(crate) fn new(
        rules: ParameterRules,
        position: ShardPosition,
        ctx: &'a BuildContext<'a>,
    ) -> WeightBuilder<'a> {
        WeightBuilder {
            parameters: Parameters::new(ctx),
            ctx,
            position,
            window_masks: WindowMasks::default(),
            rules,
        }
    }

    /// Adds this rank's part of a parameter and returns its weight.
    pub(crate) fn add(&mut self, spec: &ParamSpec) -> Weight {
        let options = self.rules.options(spec);
        let device = self.ctx.device;
        let weight = self.parameters.add(device, spec, &self.position, options);
        weight.scale_uses(self.uses(spec))
    }

    /// Adds this rank's part of a norm that adds `eps` to the mean square.
    pub(crate) fn add_norm(&mut self, spec: &ParamSpec, eps: f64) -> Norm {
        Norm {
            weight: self.add(spec),
            offset: if self.rules.zero_centered_norms {
                1.0
            } else {
                0.0
            },
            eps,
        }
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
