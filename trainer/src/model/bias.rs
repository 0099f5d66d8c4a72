//! Descriptions of biases: vectors that are added to the outputs of matrices.

use super::spec::{Dim, ParamSpec, Role, Split, Stack};

/// Returns the description of a bias over `dim`, of which `split` gives the division.
pub(crate) fn bias_spec(block: &str, part: &'static str, dim: Dim, split: Split) -> ParamSpec {
    ParamSpec {
        block: block.to_string(),
        part,
        dims: vec![dim],
        stack: Stack::Single,
        split,
        role: Role::Bias,
        writes_residual: false,
    }
}
