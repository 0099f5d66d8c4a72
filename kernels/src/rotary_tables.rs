//! The tables by which tokens rotate.

use tch::Tensor;

/// The tables by which tokens rotate.
#[derive(Clone, Copy)]
pub(crate) struct RotaryTables<'a> {
    /// `[rows, n / 2]`.
    pub(crate) cos: &'a Tensor,
    /// `[rows, n / 2]`.
    pub(crate) sin: &'a Tensor,
    /// The row of each token `[batch, sequence]` int64, contiguous and on the device of the tables.
    /// `None` if sequences take the first rows in order.
    pub(crate) positions: Option<&'a Tensor>,
}
