//! Descriptions of biases: vectors that are added to the outputs of matrices.

use super::spec::{Dim, ParamSpec, Role, Split};

/// Returns the description of a bias over `dim`, of which `split` gives the division.
pub(crate) fn bias_spec(block: &str, part: &'static str, dim: Dim, split: Split) -> ParamSpec {
    ParamSpec::single(block, part, &[dim], split, Role::Bias)
}
