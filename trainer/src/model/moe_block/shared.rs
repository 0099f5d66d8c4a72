//! The shared experts of an MoE layer, which process every token, as one network.

use super::ExpertActivation;
use crate::{
    model::{
        activations::{Activations, BlockShape, FP32_BYTES},
        feed_forward::{self, Networks, SwigluSpecs},
        spec::{Dim, ParamSpec, Role, Split, Stack},
        weights::WeightBuilder,
    },
    problems::{Problems, Quantity},
};
use moe::{SharedExperts, experts::GluNetworks};
use parallel::MeshShape;

/// The plan of all shared experts of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct SharedPlan {
    pub(super) hidden: usize,
    /// Inner width of all of them together.
    pub(super) width: Dim,
    pub(super) activation: ExpertActivation,
    /// True if a gate scales their result.
    pub(super) gated: bool,
}

impl SharedPlan {
    fn network_specs(&self, block: &str) -> SwigluSpecs {
        let hidden = Dim::hidden(self.hidden);
        let block = format!("{block}.shared");
        SwigluSpecs::new(&block, hidden, self.width, Networks::Dense)
    }

    /// Returns the descriptions of the parameters in the block with this global name.
    pub(super) fn specs(&self, block: &str) -> Vec<ParamSpec> {
        let mut specs = self.network_specs(block).into_list();
        specs.extend(self.gate_spec(block));
        specs
    }

    fn gate_spec(&self, block: &str) -> Option<ParamSpec> {
        self.gated.then(|| ParamSpec {
            block: block.to_string(),
            part: "shared_gate",
            dims: vec![Dim::derived(1), Dim::hidden(self.hidden)],
            stack: Stack::Single,
            split: Split::Whole,
            role: Role::Router,
            writes_residual: false,
        })
    }

    /// Returns the bytes of activations on a rank.
    pub(super) fn activations(&self, at: &BlockShape) -> Activations {
        let columns = self.width.size / at.mesh.tensor as u64;
        let hidden = self.hidden as u64;
        let mut activations = feed_forward::activations(at.tokens, hidden, columns, at);
        if self.gated {
            // The result before the gate, and the gate in fp32 and in the model's dtype.
            let row = (hidden + 1) * at.element + FP32_BYTES;
            activations.saved += at.own_tokens * row;
        }
        activations
    }

    /// Adds the reasons why ranks of this mesh cannot divide the network.
    pub(super) fn layout_problems(&self, mesh: &MeshShape, problems: &mut Problems) {
        let Dim { size, key } = self.width;
        problems.divides(
            Quantity::new(key.unwrap_or_default(), size as usize),
            Quantity::new("parallel.tensor", mesh.tensor),
            "each rank must hold an equal slice of a layer",
        );
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
