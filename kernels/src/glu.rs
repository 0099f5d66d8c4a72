//! Activations of gated networks, from rows of a gate followed by up.

use crate::{
    clamped_glu::ClampedGlu,
    swiglu::{swiglu, swiglu_backward},
};
use tch::Tensor;

/// An activation of gated networks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Glu {
    /// `silu(gate) * up` (GLU Variants, arXiv 2002.05202).
    Swiglu,
    Clamped(ClampedGlu),
}

impl Glu {
    /// Returns the activation `[R, F]` of `hidden` `[R, 2F]`, whose rows are the gate followed by
    /// up.
    pub fn forward(self, hidden: &Tensor) -> Tensor {
        match self {
            Glu::Swiglu => swiglu(hidden),
            Glu::Clamped(glu) => glu.forward(hidden),
        }
    }

    /// Returns the gradient of `hidden` `[R, 2F]`, given that of the result `[R, F]`, and the
    /// result.
    ///
    /// The gradient of the next weight needs the result, so that it need not be saved.
    pub fn backward(self, grad: &Tensor, hidden: &Tensor) -> (Tensor, Tensor) {
        match self {
            Glu::Swiglu => swiglu_backward(grad, hidden),
            Glu::Clamped(glu) => glu.backward(grad, hidden),
        }
    }
}
