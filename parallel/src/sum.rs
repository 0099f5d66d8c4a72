//! Running sum of the contributions to a weight's gradient.
//!
//! The memory is not cleared: the first contribution overwrites it.

use kernels::{
    RowGroups, gemm_accumulate, gemm_overwrite, grouped_gemm_accumulate, grouped_gemm_overwrite,
};
use std::cell::Cell;
use tch::Tensor;

/// A weight's gradient so far, in fp32 and the weight's shape.
pub struct GradientSum {
    sum: Tensor,
    /// True until the first contribution: the memory is uninitialized.
    unwritten: Cell<bool>,
}

impl GradientSum {
    pub(crate) fn new(sum: Tensor, unwritten: bool) -> GradientSum {
        let unwritten = Cell::new(unwritten);
        GradientSum { sum, unwritten }
    }

    /// Returns the same sum in another shape.
    pub(crate) fn view(self, shape: &[i64]) -> GradientSum {
        GradientSum {
            sum: self.sum.view(shape),
            unwritten: self.unwritten,
        }
    }

    /// Adds the matrix product of `left` and `right`.
    pub fn gemm_accumulate(&self, left: &Tensor, right: &Tensor) {
        if self.unwritten.take() {
            gemm_overwrite(&self.sum, left, right)
        } else {
            gemm_accumulate(&self.sum, left, right)
        }
    }

    /// Adds each group's matrix product, see [`kernels::grouped_gemm_accumulate`].
    pub fn grouped_gemm_accumulate(&self, left: &Tensor, right: &Tensor, groups: &RowGroups) {
        if self.unwritten.take() {
            grouped_gemm_overwrite(&self.sum, left, right, groups);
        } else {
            grouped_gemm_accumulate(&self.sum, left, right, groups);
        }
    }

    /// Returns the sum for in-place additions, cleared if nothing has been added yet.
    pub fn tensor(&self) -> &Tensor {
        if self.unwritten.take() {
            let _ = tch::no_grad(|| self.sum.shallow_clone().zero_());
        }
        &self.sum
    }

    /// Returns the shape of the gradient.
    pub fn size(&self) -> Vec<i64> {
        self.sum.size()
    }
}
