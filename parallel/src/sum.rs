//! The sum of contributions to a weight's gradient. It is not cleared before the first one comes: that one is written there.

use kernels::{gemm_accumulate, gemm_overwrite, grouped_gemm_accumulate, grouped_gemm_overwrite};
use std::cell::Cell;
use tch::Tensor;

/// A weight's gradient so far, fp32 and of the weight's shape.
pub struct GradientSum {
    sum: Tensor,
    /// Whether nothing has been added, so that the memory holds whatever it held.
    unwritten: Cell<bool>,
}

impl GradientSum {
    pub(crate) fn new(sum: Tensor, unwritten: bool) -> GradientSum {
        GradientSum {
            sum,
            unwritten: Cell::new(unwritten),
        }
    }

    /// Adds `left right`, of matrices.
    pub fn gemm_accumulate(&self, left: &Tensor, right: &Tensor) {
        if self.unwritten.take() {
            gemm_overwrite(&self.sum, left, right)
        } else {
            gemm_accumulate(&self.sum, left, right)
        }
    }

    /// Adds the product of each group's rows, see [`kernels::grouped_gemm_accumulate`].
    pub fn grouped_gemm_accumulate(&self, left: &Tensor, right: &Tensor, counts: &[i64]) {
        if self.unwritten.take() {
            grouped_gemm_overwrite(&self.sum, left, right, counts);
        } else {
            grouped_gemm_accumulate(&self.sum, left, right, counts);
        }
    }

    /// The sum, to be added to by other means.
    pub fn tensor(&self) -> &Tensor {
        if self.unwritten.take() {
            let _ = tch::no_grad(|| self.sum.shallow_clone().zero_());
        }
        &self.sum
    }

    /// Its shape.
    pub fn size(&self) -> Vec<i64> {
        self.sum.size()
    }
}
