//! The sum of contributions to a weight's gradient. It is not cleared before the first one comes: that one is written there.

use kernels::{add_grouped_product, add_product, set_grouped_product, set_product};
use std::cell::Cell;
use tch::Tensor;

/// A weight's gradient so far, fp32 and of the weight's shape.
pub struct GradientSum {
    sum: Tensor,
    /// Whether nothing has been added, so that the memory holds whatever it held.
    fresh: Cell<bool>,
}

impl GradientSum {
    pub(crate) fn new(sum: Tensor, fresh: bool) -> GradientSum {
        GradientSum {
            sum,
            fresh: Cell::new(fresh),
        }
    }

    /// Adds `left right`, of matrices.
    pub fn add_product(&self, left: &Tensor, right: &Tensor) {
        if self.fresh.take() {
            set_product(&self.sum, left, right)
        } else {
            add_product(&self.sum, left, right)
        }
    }

    /// Adds the product of each group's rows, see [`kernels::add_grouped_product`].
    pub fn add_grouped_product(&self, left: &Tensor, right: &Tensor, counts: &[i64]) {
        if self.fresh.take() {
            set_grouped_product(&self.sum, left, right, counts);
        } else {
            add_grouped_product(&self.sum, left, right, counts);
        }
    }

    /// The sum, to be added to by other means.
    pub fn tensor(&self) -> &Tensor {
        if self.fresh.take() {
            let _ = tch::no_grad(|| self.sum.shallow_clone().zero_());
        }
        &self.sum
    }

    /// Its shape.
    pub fn size(&self) -> Vec<i64> {
        self.sum.size()
    }
}
