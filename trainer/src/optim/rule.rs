//! The interface of an optimizer: named state per parameter, and an update of rows or of whole
//! matrices.

use super::rounding::Rounding;
use crate::{Error, model::role::Role};
use std::ops::Range;
use tch::{Kind, Tensor};

/// An optimizer with its constants.
pub(crate) trait Rule: Send + Sync {
    /// Returns the names of the tensors that the optimizer keeps for each parameter, in the shape
    /// of its master. They begin as zeros, and are the kinds of tensors in a checkpoint.
    fn state(&self) -> &'static [&'static str];

    /// Returns the roles of the parameters that the optimizer updates by default; `None` for all
    /// that no other group names.
    fn default_roles(&self) -> Option<&'static [Role]> {
        None
    }

    /// Returns why the optimizer cannot update parameters with this role.
    fn problem_with(&self, _role: Role) -> Option<&'static str> {
        None
    }

    /// Returns what is wrong with the constants, beginning with their key.
    fn problem(&self) -> Option<&'static str> {
        None
    }

    /// Returns the update, by the kind of its parts.
    fn update(&self) -> Update<'_>;
}

/// The update of an optimizer, by the parts of a parameter that it needs together.
pub(crate) enum Update<'a> {
    /// Any elements. Each rank updates its own.
    Rows(&'a dyn RowRule),
    /// Whole matrices. One rank of those that hold parts of a matrix transforms it.
    Matrices(&'a dyn MatrixRule),
}

/// An update of elements, whatever part of their matrices they are.
pub(crate) trait RowRule {
    /// Updates the elements of each of `updates`.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    fn update_rows(&self, updates: &[RowUpdate], scalars: StepScalars) -> Result<(), Error>;
}

/// An update of elements by a transformation of the matrix that they belong to.
pub(crate) trait MatrixRule {
    /// Returns the dtype in which matrices are transformed and exchanged.
    fn kind(&self) -> Kind;

    /// Returns the cost of a transformation, by which ranks share them evenly.
    fn flops(&self, rows: i64, columns: i64) -> f64;

    /// Updates the state, and replaces the gradient by what is transformed.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    fn prepare(&self, update: &RowUpdate, scalars: StepScalars) -> Result<(), Error>;

    /// Transforms a whole matrix of this dtype.
    fn transform(&self, matrix: &Tensor) -> Tensor;

    /// Applies the transformed elements, which replace the gradient, to the weights. `shape` is the
    /// shape of the matrix.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    fn apply(&self, update: &RowUpdate, shape: [i64; 2], scalars: StepScalars)
    -> Result<(), Error>;
}

/// A part of a parameter that one update changes. All tensors have the same number of elements.
pub(crate) struct RowUpdate {
    /// fp32 weights, which the update changes.
    pub(crate) master: Tensor,
    /// fp32 gradient of the weights.
    pub(crate) gradient: Tensor,
    /// State that the update changes, in the order of [`Rule::state`]. Rules see it in fp32.
    pub(crate) state: Vec<Tensor>,
    /// The weights in the model's dtype, unless they are `master` itself. The update sets them.
    pub(crate) stored: Option<Tensor>,
    /// Positions of the elements, if the state is in bf16.
    pub(crate) rounding: Option<Rounding>,
}

impl RowUpdate {
    /// Returns the elements `range` of all tensors, which are seen as one row.
    pub(crate) fn elements(&self, range: &Range<i64>) -> RowUpdate {
        RowUpdate {
            master: flat_slice(&self.master, range),
            gradient: flat_slice(&self.gradient, range),
            state: self.state.iter().map(|x| flat_slice(x, range)).collect(),
            stored: self.stored.as_ref().map(|x| flat_slice(x, range)),
            rounding: self
                .rounding
                .as_ref()
                .map(|rounding| rounding.elements(range)),
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
    /// Number of updates that the state has seen, including this one.
    pub(crate) step: u64,
    /// Learning rate of the parameters.
    pub(crate) lr: f64,
    /// True if weight decay applies.
    pub(crate) decays: bool,
    /// Divisor of the gradients, if clipping makes them smaller.
    pub(crate) scale: Option<f64>,
}

impl StepScalars {
    /// Returns the factor of the gradients.
    pub(crate) fn gradient_factor(&self) -> f64 {
        1.0 / self.scale.unwrap_or(1.0)
    }
}
