//! Floating-point operations of a block, as blocks describe them.

use super::spec::ParamSpec;
use std::ops::{Add, AddAssign};

/// FLOPs of one token in a forward pass. A product and its addition are two.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Flops {
    /// GEMMs with weights. Backward does them twice more: for inputs and for weights.
    pub(crate) weights: f64,
    /// Products of activations with each other. Backward does them twice more, both for inputs.
    pub(crate) activations: f64,
}

impl Flops {
    /// Returns the FLOPs of GEMMs with this many weights.
    pub(crate) fn of_weights(weights: u128) -> Flops {
        Flops {
            weights: 2.0 * weights as f64,
            activations: 0.0,
        }
    }

    /// Returns the FLOPs of GEMMs with all of `specs`.
    pub(crate) fn of_specs(specs: &[ParamSpec]) -> Flops {
        let matrices = specs.iter().filter(|spec| spec.is_matrix());
        Flops::of_weights(matrices.map(ParamSpec::elements).sum())
    }

    /// Returns the FLOPs of a forward pass.
    pub(crate) fn forward(self) -> f64 {
        self.weights + self.activations
    }

    /// Returns the FLOPs of the gradients of inputs.
    pub(crate) fn backward_input(self) -> f64 {
        self.weights + 2.0 * self.activations
    }

    /// Returns the FLOPs of the gradients of weights.
    pub(crate) fn backward_weight(self) -> f64 {
        self.weights
    }

    /// Returns the FLOPs of a step, forward and backward without recomputation.
    pub(crate) fn step(self) -> f64 {
        self.forward() + self.backward_input() + self.backward_weight()
    }
}

impl Add for Flops {
    type Output = Flops;

    fn add(self, other: Flops) -> Flops {
        Flops {
            weights: self.weights + other.weights,
            activations: self.activations + other.activations,
        }
    }
}

impl AddAssign for Flops {
    fn add_assign(&mut self, other: Flops) {
        *self = *self + other;
    }
}
