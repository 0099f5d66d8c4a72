//! The routed experts of an MoE layer: their parameters, their cost and their conflicts.

use super::RoutedRows;
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

/// Widths of fp8 matrices are multiples of this.
const FP8_WIDTH: usize = 16;

/// The routed experts of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoutedExperts {
    pub(super) hidden: usize,
    pub(super) count: usize,
    /// Inner width of an expert.
    pub(super) ffn: usize,
}

/// Descriptions of the parameters of the routed experts.
pub(super) struct ExpertSpecs {
    networks: SwigluSpecs,
}

impl RoutedExperts {
    /// Describes the parameters in the block with this global name.
    pub(super) fn specs(&self, block: &str) -> ExpertSpecs {
        let hidden = Dim::hidden(self.hidden);
        let ffn = Dim::new("model.moe.ffn", self.ffn as u64);
        ExpertSpecs {
            networks: SwigluSpecs::new(block, hidden, ffn, Networks::Experts(self.count as u64)),
        }
    }

    /// Returns the inner width of the part of an expert that each of `slices` ranks holds.
    pub(super) fn ffn_per_slice(&self, slices: usize) -> usize {
        self.ffn / slices.max(1)
    }

    /// Returns the bytes of activations of these rows on a rank.
    pub(super) fn activations(&self, rows: RoutedRows, at: &BlockShape) -> Activations {
        let columns = self.ffn_per_slice(at.mesh.expert_tensor) as u64;
        feed_forward::activations(rows.0, self.hidden as u64, columns, at)
    }

    /// Adds the reasons why ranks of this mesh cannot divide the experts.
    pub(super) fn layout_problems(&self, mesh: &MeshShape, problems: &mut Problems) {
        problems.divides(
            Quantity::new("model.moe.ffn", self.ffn),
            Quantity::new("parallel.expert_tensor", mesh.expert_tensor),
            "each rank must hold an equal slice of every expert",
        );
        problems.divides(
            Quantity::new("model.moe.experts", self.count),
            Quantity::new("parallel.expert", mesh.expert),
            "each rank must hold the same number of experts",
        );
    }

    /// Adds the reasons why `slices` ranks that split each expert cannot compute it in fp8.
    pub(super) fn fp8_problems(&self, slices: usize, problems: &mut Problems) {
        let widths = [self.hidden, self.ffn_per_slice(slices)];
        if widths.iter().any(|width| !width.is_multiple_of(FP8_WIDTH)) {
            problems.add(format!(
                "train.fp8_experts multiplies matrices whose widths are multiples of \
                 {FP8_WIDTH}; model.hidden and each rank's part of model.moe.ffn are {widths:?}"
            ));
        }
    }
}

impl ExpertSpecs {
    /// Builds a rank's part of the experts.
    pub(super) fn build(&self, builder: &mut WeightBuilder) -> GluNetworks {
        self.networks.build(builder)
    }

    /// Returns the descriptions in the order of use.
    pub(super) fn into_list(self) -> Vec<ParamSpec> {
        self.networks.into_list()
    }
}
