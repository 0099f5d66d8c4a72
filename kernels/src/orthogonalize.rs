//! Approximate orthogonalization of a matrix by Newton-Schulz iterations.

use crate::{
    matmul::add_product,
    profile::{Cost, span},
    squares::squares_of,
    tensors::{empty_f32, sizes},
};
use tch::{Kind, Tensor};

/// Iterations, as in the reference implementation.
const ITERATIONS: usize = 5;
/// Coefficients of `a X + b (X X^T) X + c (X X^T)^2 X`, which maximize the slope at zero
/// (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks").
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// Smallest norm by which a matrix is divided.
const EPS: f64 = 1e-7;

/// Replaces the singular values of `matrix` `[M, N]` by values near 1: about 0.7 to 1.2, except for
/// those that are tiny next to the largest. Computes in the matrix's dtype, fp32 or bf16.
///
/// Neither the number of threads nor the strides of the matrix change a bit of the result.
pub fn orthogonalize(matrix: &Tensor) -> Tensor {
    let [rows, columns] = sizes(matrix);
    let cost = || {
        let flops = orthogonalization_flops(rows as i64, columns as i64);
        Cost { flops, bytes: 0.0 }.plus(Cost::passes(2.0, matrix))
    };
    span("optimizer", "orthogonalize", cost, || {
        tch::no_grad(|| {
            if rows > columns {
                iterate(&matrix.tr().contiguous()).tr().contiguous()
            } else {
                iterate(&matrix.contiguous())
            }
        })
    })
}

/// Returns the floating-point operations of [`orthogonalize`].
pub fn orthogonalization_flops(rows: i64, columns: i64) -> f64 {
    let shorter = rows.min(columns) as f64;
    let longer = rows.max(columns) as f64;
    let products = 2.0 * shorter * shorter * longer + shorter * shorter * shorter;
    ITERATIONS as f64 * 2.0 * products
}

/// Iterates on a contiguous matrix that is at least as wide as high.
fn iterate(matrix: &Tensor) -> Tensor {
    let [a, b, c] = COEFFICIENTS;
    let kind = matrix.kind();
    let wide = matrix.to_kind(Kind::Float);
    let norm = squares_of(&wide).sqrt().clamp_min(EPS);
    let mut x = (wide / norm.to_kind(Kind::Float)).to_kind(kind);
    for _ in 0..ITERATIONS {
        let gram = product(&x, &x.tr()).to_kind(kind);
        let square = product(&gram, &gram);
        let polynomial = (gram.to_kind(Kind::Float) * b + square * c).to_kind(kind);
        let change = product(&polynomial, &x);
        x = (x.to_kind(Kind::Float) * a + change).to_kind(kind);
    }
    x
}

/// Returns a matrix product in fp32.
fn product(left: &Tensor, right: &Tensor) -> Tensor {
    let [rows, _] = sizes(left);
    let [_, columns] = sizes(right);
    let out = empty_f32(left, [rows, columns]);
    add_product(&out, left, right, false);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::randn;
    use proptest::prelude::*;
    use tch::kind::FLOAT_CPU;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn singular_values_come_near_one(
            rows in 1i64..60,
            columns in 1i64..60,
            bf16: bool,
            size in prop::sample::select(vec![1e-4, 1.0, 1e4]),
        ) {
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let rank = rows.min(columns);
            // Singular vectors of a random matrix, with values from 0.2 to 1.
            let (u, _, v) = randn(&[rows, columns], Kind::Float).svd(true, true);
            let values = Tensor::linspace(0.2, 1.0, rank, FLOAT_CPU) * size;
            let matrix = (&u * values)
                .matmul(&v.tr())
                .to_kind(kind);
            let result = orthogonalize(&matrix);
            prop_assert_eq!(result.kind(), kind);
            prop_assert_eq!(result.size(), vec![rows, columns]);
            let (_, found, _) = result
                .to_kind(Kind::Float)
                .svd(true, true);
            let smallest = found.min().double_value(&[]);
            let largest = found.max().double_value(&[]);
            prop_assert!(smallest > 0.6 && largest < 1.3, "{smallest} to {largest}");
        }

        #[test]
        fn threads_and_strides_change_no_bit(
            rows in 1i64..80,
            columns in 1i64..80,
            threads in 2i32..4,
        ) {
            let matrix = randn(&[rows, columns], Kind::Float);
            tch::set_num_threads(1);
            let plain = orthogonalize(&matrix);
            tch::set_num_threads(threads);
            prop_assert!(orthogonalize(&matrix).equal(&plain));
            let strided = matrix.tr().contiguous().tr();
            prop_assert!(orthogonalize(&strided).equal(&plain));
        }
    }

    #[test]
    fn a_matrix_of_zeros_stays_zero() {
        let zeros = Tensor::zeros([3, 5], FLOAT_CPU);
        assert!(orthogonalize(&zeros).equal(&zeros));
    }
}
