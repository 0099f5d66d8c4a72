//! The routed experts of an MoE layer: their configuration, parameters, cost and conflicts.

use super::RoutedRows;
use crate::{
    model::{
        activations::{Activations, BlockShape},
        bias::bias_spec,
        feed_forward::{self, Networks, SwigluSpecs},
        spec::{Dim, ParamSpec, Split, SplitDim, Stack},
        weights::WeightBuilder,
    },
    problems::{Problems, Quantity},
};
use kernels::{ClampedGlu, Glu};
use moe::experts::{GluBiases, GluNetworks};
use parallel::MeshShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Widths of fp8 matrices are multiples of this.
const FP8_WIDTH: usize = 16;

/// Activation of an expert's gate and up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExpertActivation {
    /// `silu(gate) * up` (GLU Variants, arXiv 2002.05202).
    #[default]
    Swiglu,
    /// `(up + 1) * gate * sigmoid(alpha * gate)` (gpt-oss, arXiv 2508.10925). The gate is at most
    /// `limit`, and up is between `-limit` and `limit`.
    ClampedGlu(ClampedGluConfig),
}

/// Constants of the clamped GLU. The defaults are those of gpt-oss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClampedGluConfig {
    /// Factor on the gate inside the sigmoid.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub alpha: f64,
    /// Largest gate, and largest magnitude of up.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub limit: f64,
}

impl Default for ClampedGluConfig {
    fn default() -> ClampedGluConfig {
        ClampedGluConfig {
            alpha: 1.702,
            limit: 7.0,
        }
    }
}

impl ExpertActivation {
    /// Returns the activation as kernels compute it.
    pub(super) fn glu(self) -> Glu {
        match self {
            ExpertActivation::Swiglu => Glu::Swiglu,
            ExpertActivation::ClampedGlu(ClampedGluConfig { alpha, limit }) => {
                Glu::Clamped(ClampedGlu {
                    alpha: alpha as f32,
                    limit: limit as f32,
                })
            }
        }
    }
}

/// The routed experts of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoutedExperts {
    pub(super) hidden: usize,
    pub(super) count: usize,
    /// Inner width of an expert.
    pub(super) ffn: usize,
    pub(super) activation: ExpertActivation,
    /// True if the matrices have biases.
    pub(super) biased: bool,
}

/// Descriptions of the parameters of the routed experts.
pub(super) struct ExpertSpecs {
    networks: SwigluSpecs,
    /// Biases of gate-up `[2F]` and of down `[D]`.
    biases: Option<[ParamSpec; 2]>,
}

impl RoutedExperts {
    /// Describes the parameters in the block with this global name.
    pub(super) fn specs(&self, block: &str) -> ExpertSpecs {
        let hidden = Dim::hidden(self.hidden);
        let ffn = Dim::new("model.moe.ffn", self.ffn as u64);
        let count = self.count as u64;
        let bias = |part, dim: Dim, units, fused| {
            let split = SplitDim {
                dim: 0,
                units,
                fused,
            };
            ParamSpec {
                stack: Stack::Experts(count),
                ..bias_spec(block, part, dim, Split::ExpertTensor(split))
            }
        };
        let rows = Dim::derived(ffn.size.saturating_mul(2));
        ExpertSpecs {
            networks: SwigluSpecs::new(block, hidden, ffn, Networks::Experts(count)),
            biases: self.biased.then(|| {
                [
                    bias("gate_up_bias", rows, ffn.size, 2),
                    // Ranks that split an expert add up its result: each adds a part of the bias.
                    bias("down_bias", hidden, hidden.size, 1),
                ]
            }),
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
        if self.biased {
            problems.divides(
                Quantity::new("model.hidden", self.hidden),
                Quantity::new("parallel.expert_tensor", mesh.expert_tensor),
                "with model.moe.expert_bias each rank must add an equal slice of the bias",
            );
        }
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

impl RoutedExperts {
    /// Builds a rank's part of the experts in the block with this global name.
    pub(super) fn build(&self, builder: &mut WeightBuilder, block: &str) -> GluNetworks {
        let ExpertSpecs { networks, biases } = self.specs(block);
        let networks = networks.build(builder);
        let slice = builder.position.expert_tensor;
        let first_column = (self.hidden / slice.ranks * slice.rank) as i64;
        let biases = biases.map(|[gate_up, down]| GluBiases {
            gate_up: builder.add(&gate_up),
            down: builder.add(&down),
            first_column,
        });
        GluNetworks {
            biases,
            activation: self.activation.glu(),
            ..networks
        }
    }
}

impl ExpertSpecs {
    /// Returns the descriptions in the order of use.
    pub(super) fn into_list(self) -> Vec<ParamSpec> {
        let mut list = self.networks.into_list();
        list.extend(self.biases.into_iter().flatten());
        list
    }
}
