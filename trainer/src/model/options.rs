//! Initial values, weight decay and learning-rate factor of a parameter.

/// Distribution of a parameter's initial values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    Ones,
    Zeros,
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
