//! Initial values, weight decay and learning-rate factors of parameters, by their role.

use crate::config::ModelConfig;

/// Distribution of a parameter's initial values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    Ones,
}

/// Initialization and optimization of one parameter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ParameterOptions {
    pub(crate) init: Init,
    /// True if weight decay applies.
    pub(crate) decay: bool,
    /// Factor on the learning rate.
    pub(crate) lr_scale: f64,
}

/// The options of each role that a parameter has in the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RoleOptions {
    /// Embedding and output layer.
    pub(crate) vocabulary: ParameterOptions,
    pub(crate) matrix: ParameterOptions,
    /// Matrices that write to the residual stream.
    pub(crate) residual: ParameterOptions,
    pub(crate) norm: ParameterOptions,
}

impl RoleOptions {
    pub(crate) fn new(config: &ModelConfig) -> RoleOptions {
        let width = config.mup.as_ref().map_or(1.0, |mup| mup.width);
        let normal = |std: f64, lr_scale: f64| ParameterOptions {
            init: Init::Normal(std),
            decay: true,
            lr_scale,
        };
        let matrix_std = config.init_std / width.sqrt();
        // Smaller by the depth of the residual stream (GPT-2; also Granite's code).
        let residual_std = matrix_std / (2.0 * config.layers as f64).sqrt();
        RoleOptions {
            vocabulary: normal(config.init_std, 1.0),
            matrix: normal(matrix_std, 1.0 / width),
            residual: normal(residual_std, 1.0 / width),
            norm: ParameterOptions {
                init: Init::Ones,
                decay: false,
                lr_scale: 1.0,
            },
        }
    }
}
