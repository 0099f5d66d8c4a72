//! SwiGLU feed-forward network (arXiv 2002.05202): a dense layer's, and a model of an expert's.
// Shapes: T tokens (of a microbatch, on this rank), D hidden, F ffn.

use super::{
    activations::{Activations, BlockShape},
    spec::{Dim, ParamSpec, Role, Split, SplitDim, Stack},
    weights::WeightBuilder,
};
use crate::{
    config::layout::RecomputedPart,
    problems::{Problems, Quantity},
};
use moe::experts::{GluNetworks, grouped_glu};
use parallel::{Activation, MeshShape, tensor::TensorParallel};
use tch::Tensor;
use torch_ext::Error;

/// Descriptions of the parameters of a SwiGLU network.
#[derive(Debug, Clone)]
pub(crate) struct SwigluSpecs {
    /// `[2F, D]`: the rows of gate, then those of up.
    pub(crate) gate_up: ParamSpec,
    /// `[D, F]`.
    pub(crate) down: ParamSpec,
}

/// Which axis divides the networks of a block, and how many there are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Networks {
    /// One network, which tensor-parallel ranks divide.
    Dense,
    /// This many experts, each of which expert-tensor-parallel ranks divide.
    Experts(u64),
}

impl SwigluSpecs {
    /// Describes the networks of inner width `ffn` in the block with this global name.
    pub(crate) fn new(block: &str, hidden: Dim, ffn: Dim, networks: Networks) -> SwigluSpecs {
        let spec = |part, dims: [Dim; 2], dim, fused, writes_residual| {
            let split = SplitDim {
                dim,
                units: ffn.size,
                fused,
            };
            let (stack, split, role) = match networks {
                Networks::Dense => (Stack::GroupOfOne, Split::Tensor(split), Role::Matrix),
                Networks::Experts(count) => (
                    Stack::Experts(count),
                    Split::ExpertTensor(split),
                    Role::Expert,
                ),
            };
            ParamSpec {
                block: block.to_string(),
                part,
                dims: dims.to_vec(),
                stack,
                split,
                role,
                writes_residual,
            }
        };
        SwigluSpecs {
            gate_up: spec(
                "gate_up",
                [Dim::derived(ffn.size.saturating_mul(2)), hidden],
                0,
                2,
                false,
            ),
            down: spec("down", [hidden, ffn], 1, 1, true),
        }
    }

    /// Builds a rank's part of the networks.
    pub(crate) fn build(&self, builder: &mut WeightBuilder) -> GluNetworks {
        let gate_up_proj = builder.add(&self.gate_up);
        let down_proj = builder.add(&self.down);
        GluNetworks::swiglu(gate_up_proj, down_proj)
    }

    /// Returns the descriptions in the order of use.
    pub(crate) fn into_list(self) -> Vec<ParamSpec> {
        vec![self.gate_up, self.down]
    }
}

/// The plan of a dense network.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DensePlan {
    /// Width of the residual stream.
    pub(crate) hidden: usize,
    pub(crate) ffn: Dim,
}

impl DensePlan {
    /// Describes the parameters of the block with this global name.
    pub(crate) fn specs(&self, block: &str) -> SwigluSpecs {
        SwigluSpecs::new(block, Dim::hidden(self.hidden), self.ffn, Networks::Dense)
    }

    /// Returns the bytes of activations on a rank.
    pub(crate) fn activations(&self, at: &BlockShape) -> Activations {
        let columns = self.ffn.size / at.mesh.tensor as u64;
        activations(at.tokens, self.hidden as u64, columns, at)
    }

    /// Adds the reasons why ranks of this mesh cannot divide the network.
    pub(crate) fn layout_problems(&self, mesh: &MeshShape, problems: &mut Problems) {
        let Dim { size, key } = self.ffn;
        problems.divides(
            Quantity::new(key.unwrap_or_default(), size as usize),
            Quantity::new("parallel.tensor", mesh.tensor),
            "each rank must hold an equal slice of a layer",
        );
    }

    /// Builds a rank's part of the block with this global name.
    pub(crate) fn build(&self, builder: &mut WeightBuilder, block: &str) -> DenseFeedForward {
        DenseFeedForward {
            network: self.specs(block).build(builder),
            tensor: builder.ctx.groups.tensor.clone(),
            save_gate_up: builder.ctx.recompute.keeps(RecomputedPart::Experts),
        }
    }
}

/// Returns the bytes of activations of networks of inner width `ffn` that compute `rows` rows of
/// width `hidden`, on a rank.
pub(crate) fn activations(rows: u64, hidden: u64, ffn: u64, at: &BlockShape) -> Activations {
    let gate_up = rows * 2 * ffn * at.element;
    let half = rows * ffn * at.element;
    // Gradients of the gate-up output and of the activation, the activation itself, and the
    // gradients of output and input rows.
    let transient = gate_up + 2 * half + 2 * rows * hidden * at.element;
    if at.recompute.keeps(RecomputedPart::Experts) {
        Activations {
            saved: gate_up,
            transient,
        }
    } else {
        Activations {
            saved: 0,
            transient: transient + gate_up,
        }
    }
}

/// A rank's part of a dense feed-forward network.
pub(crate) struct DenseFeedForward {
    /// One network; of F this rank's part.
    network: GluNetworks,
    tensor: TensorParallel,
    /// True if the gate-up output is saved for backward.
    save_gate_up: bool,
}

impl DenseFeedForward {
    /// Maps this rank's rows `[T / ranks, D]` to the same shape.
    ///
    /// # Collective
    /// All ranks of the tensor group.
    pub(crate) fn forward(&self, x: &Activation) -> Result<Tensor, Error> {
        self.tensor.column_row_parallel(x, |x| {
            let tokens = x.value.size()[0];
            grouped_glu(x, &self.network, &[tokens], self.save_gate_up)
        })
    }
}
