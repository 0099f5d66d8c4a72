//! Short forms of frequent tensor operations.

use std::ops::Range;
use tch::{Kind, Tensor};

/// The first dimension, as an argument of reductions.
pub(crate) const FIRST_DIM: &[i64] = &[0];
/// The last dimension, as an argument of reductions.
pub(crate) const LAST_DIM: &[i64] = &[-1];

/// Returns the first N sizes of a tensor.
pub(crate) fn sizes<const N: usize>(x: &Tensor) -> [usize; N] {
    let sizes = x.size();
    std::array::from_fn(|dim| sizes[dim] as usize)
}

/// Returns an uninitialized tensor with the dtype and device of `like`.
pub(crate) fn empty_as<const N: usize>(like: &Tensor, sizes: [usize; N]) -> Tensor {
    let shape = sizes.map(|size| size as i64);
    Tensor::empty(shape, (like.kind(), like.device()))
}

/// Returns an uninitialized fp32 tensor on the device of `like`.
pub(crate) fn empty_f32<const N: usize>(like: &Tensor, sizes: [usize; N]) -> Tensor {
    let shape = sizes.map(|size| size as i64);
    Tensor::empty(shape, (Kind::Float, like.device()))
}

/// Returns a range of rows of a tensor.
pub(crate) fn slice_rows(x: &Tensor, rows: &Range<usize>) -> Tensor {
    x.narrow(0, rows.start as i64, rows.len() as i64)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tch::kind::FLOAT_CPU;

    /// Short forms for tests.
    pub(crate) trait TestTensor {
        fn to_f64(&self) -> Tensor;
    }

    impl TestTensor for Tensor {
        fn to_f64(&self) -> Tensor {
            self.to_kind(Kind::Double)
        }
    }

    /// The floating-point dtypes of kernels, each with its tolerance.
    pub(crate) fn tolerances(fp32: f64, bf16: f64) -> [(Kind, f64); 2] {
        [(Kind::Float, fp32), (Kind::BFloat16, bf16)]
    }

    /// Returns normally distributed elements on the host.
    pub(crate) fn randn(shape: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(shape, FLOAT_CPU).to_kind(kind)
    }
}
