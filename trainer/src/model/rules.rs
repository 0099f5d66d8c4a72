//! Initial values, weight decay and learning-rate factors, by the role of a parameter.

use super::{
    options::{Init, ParameterOptions},
    spec::{ParamSpec, Role},
};

/// Derives the options of parameters from their descriptions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ParameterRules {
    pub(crate) init_std: f64,
    /// Width ratio of maximal update parametrization; 1 without it.
    pub(crate) width: f64,
    /// Layers of the whole model.
    pub(crate) layers: usize,
    /// True if norms multiply by one plus their weight.
    pub(crate) zero_centered_norms: bool,
}

impl ParameterRules {
    pub(crate) fn options(&self, spec: &ParamSpec) -> ParameterOptions {
        let normal = |std: f64, lr_scale: f64| ParameterOptions {
            init: Init::Normal(std),
            decay: true,
            lr_scale,
        };
        let matrix_std = self.init_std / self.width.sqrt();
        // Smaller by the depth of the residual stream (GPT-2; also Granite's code).
        let residual_std = matrix_std / (2.0 * self.layers as f64).sqrt();
        let vector = |init| ParameterOptions {
            init,
            decay: false,
            lr_scale: 1.0,
        };
        match spec.role {
            Role::Norm if self.zero_centered_norms => vector(Init::Zeros),
            Role::Norm => vector(Init::Ones),
            Role::Bias => vector(Init::Zeros),
            Role::Vocabulary => normal(self.init_std, 1.0),
            _ if spec.writes_residual => normal(residual_std, 1.0 / self.width),
            Role::Router | Role::Matrix | Role::Expert => normal(matrix_std, 1.0 / self.width),
        }
    }
}
