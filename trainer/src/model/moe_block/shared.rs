//! The shared experts of an MoE layer, which process every token, as one network.

use super::ExpertActivation;
use crate::model::{
    activations::{Activations, BlockShape, FP32_BYTES},
    feed_forward::{DensePlan, SwigluSpecs},
    spec::{Dim, ParamSpec, Role, Split},
    weights::WeightBuilder,
};
use moe::{SharedExperts, experts::GluNetworks};

/// The plan of all shared experts of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct SharedPlan {
    /// All of them together, but for their activation.
    pub(super) network: DensePlan,
    pub(super) activation: ExpertActivation,
    /// True if a gate scales their result.
    pub(super) gated: bool,
}

impl SharedPlan {
    fn network_specs(&self, block: &str) -> SwigluSpecs {
        self.network.specs(&format!("{block}.shared"))
    }

    /// Returns the descriptions of the parameters in the block with this global name.
    pub(super) fn specs(&self, block: &str) -> Vec<ParamSpec> {
        let mut specs = self.network_specs(block).into_list();
        specs.extend(self.gate_spec(block));
        specs
    }

    fn gate_spec(&self, block: &str) -> Option<ParamSpec> {
        self.gated.then(|| {
            let dims = [Dim::derived(1), Dim::hidden(self.network.hidden)];
            ParamSpec::single(block, "shared_gate", &dims, Split::Whole, Role::Router)
        })
    }

    /// Returns the bytes of activations on a rank.
    pub(super) fn activations(&self, at: &BlockShape) -> Activations {
        let mut activations = self.network.activations(at);
        if self.gated {
            // The result before the gate, and the gate in fp32 and in the model's dtype.
            let row = (self.network.hidden as u64 + 1) * at.element + FP32_BYTES;
            activations.saved += at.own_tokens * row;
        }
        activations
    }

    /// Builds a rank's part in the block with this global name.
    pub(super) fn build(&self, builder: &mut WeightBuilder, block: &str) -> SharedExperts {
        let network = GluNetworks {
            activation: self.activation.glu(),
            ..self.network_specs(block).build(builder)
        };
        let gate = self.gate_spec(block).map(|spec| builder.add(&spec));
        SharedExperts { network, gate }
    }
}
