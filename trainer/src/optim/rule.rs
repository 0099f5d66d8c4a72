//! The interface of an optimizer: named state per parameter, and an update.

use crate::Error;
use std::ops::Range;
use tch::Tensor;

/// A part of a parameter that one update changes. All tensors have the same number of elements.
pub(crate) struct RowUpdate {
    /// fp32 weights, which the update changes.
    pub(crate) master: Tensor,
    /// fp32 gradient of the weights.
    pub(crate) gradient: Tensor,
    /// State that the update changes, in the order of [`Rule::state`].
    pub(crate) state: Vec<Tensor>,
    /// The weights in the model's dtype, unless they are `master` itself. The update sets them.
    pub(crate) stored: Option<Tensor>,
}

impl RowUpdate {
    /// Returns the elements `range` of all tensors, which are seen as one row.
    pub(crate) fn elements(&self, range: &Range<i64>) -> RowUpdate {
        RowUpdate {
            master: flat_slice(&self.master, range),
            gradient: flat_slice(&self.gradient, range),
            state: self.state.iter().map(|x| flat_slice(x, range)).collect(),
            stored: self.stored.as_ref().map(|x| flat_slice(x, range)),
        }
    }
}

/// Returns the elements `range` of a tensor, seen as one row.
pub(crate) fn flat_slice(tensor: &Tensor, range: &Range<i64>) -> Tensor {
    let row = tensor.view([-1]);
    row.narrow(0, range.start, range.end - range.start)
}

/// Numbers of one step that all elements of an update share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepScalars {
    /// Number of the step; the first is 1.
    pub(crate) step: u64,
    /// Learning rate of the parameters.
    pub(crate) lr: f64,
    /// True if weight decay applies.
    pub(crate) decays: bool,
    /// Divisor of the gradients, if clipping makes them smaller.
    pub(crate) scale: Option<f64>,
}

/// An optimizer with its constants.
pub(crate) trait Rule: Send + Sync {
    /// Returns the names of the tensors that the optimizer keeps for each parameter, in the shape
    /// of its master. They begin as zeros, and are the kinds of tensors in a checkpoint.
    fn state(&self) -> &'static [&'static str];

    /// Updates elements, whatever part of their matrices they are.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    fn update(&self, updates: &[RowUpdate], scalars: StepScalars) -> Result<(), Error>;
}
