//! The shared experts of an MoE layer, which process every token, as one network.

use super::ExpertActivation;
use crate::{
    model::{
        activations::{Activations, BlockShape},
        feed_forward::{self, Networks, SwigluSpecs},
        spec::{Dim, ParamSpec},
        weights::WeightBuilder,
    },
    problems::{Problems, Quantity},
};
use moe::experts::GluNetworks;
use parallel::MeshShape;

/// All shared experts of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct SharedExperts {
    pub(super) hidden: usize,
    /// Inner width of all of them together.
    pub(super) width: Dim,
    pub(super) activation: ExpertActivation,
}

impl SharedExperts {
    fn network_specs(&self, block: &str) -> SwigluSpecs {
        let hidden = Dim::hidden(self.hidden);
        let block = format!("{block}.shared");
        SwigluSpecs::new(&block, hidden, self.width, Networks::Dense)
    }

    /// Returns the descriptions of the parameters in the block with this global name.
    pub(super) fn specs(&self, block: &str) -> Vec<ParamSpec> {
        self.network_specs(block).into_list()
    }

    /// Returns the bytes of activations on a rank.
    pub(super) fn activations(&self, at: &BlockShape) -> Activations {
        let columns = self.width.size / at.mesh.tensor as u64;
        feed_forward::activations(at.tokens, self.hidden as u64, columns, at)
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
    pub(super) fn build(&self, builder: &mut WeightBuilder, block: &str) -> GluNetworks {
        GluNetworks {
            activation: self.activation.glu(),
            ..self.network_specs(block).build(builder)
        }
    }
}
