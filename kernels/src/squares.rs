//! The sum of squares of a tensor, for the gradient norm.

use crate::{
    profile::{Cost, span},
    rows::{HostData, for_rows, host_kind},
};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Elements of a piece, which is summed in fp32 lanes; sums of pieces are fp64.
const WIDTH: usize = 1024;
const LANES: usize = 64;

/// Returns the sum of squares of `x`, `[]` fp64.
///
/// Neither the number of threads nor the alignment of memory changes a bit of it.
pub fn sum_of_squares(x: &Tensor) -> Tensor {
    let cost = || Cost::passes(1.0, x);
    span("norm", "of gradients", cost, || squares_of(x))
}

/// Does what [`sum_of_squares`] does, as part of another span.
pub(crate) fn squares_of(x: &Tensor) -> Tensor {
    match host_kind(&[x]) {
        Some(Kind::Float) => Tensor::from(on_threads(x)),
        _ => x.norm().to_kind(Kind::Double).square(),
    }
}

fn on_threads(x: &Tensor) -> f64 {
    let count = x.numel();
    let pieces = count.div_ceil(WIDTH);
    let sums = Tensor::empty([pieces as i64], (Kind::Double, x.device()));
    // SAFETY: `host_kind` has checked `x`.
    let x = unsafe { HostData::<f32>::of(x) };
    // SAFETY: the tensor is created here.
    let sums = unsafe { HostData::<f64>::of(&sums) };
    for_rows(pieces, WIDTH, |_, rows| {
        for piece in rows {
            let elements = piece * WIDTH..((piece + 1) * WIDTH).min(count);
            // SAFETY: each piece belongs to one thread.
            let sum = unsafe { sums.rows_mut(&(piece..piece + 1), 1) };
            sum[0] = squares(x.rows(&elements, 1));
        }
    });
    sums.rows(&(0..pieces), 1).iter().sum()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn squares(x: &[f32]) -> f64 {
    let mut lanes = [0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for (sum, x) in lanes.iter_mut().zip(x) {
            *sum += x * x;
        }
    }
    for (sum, x) in lanes.iter_mut().zip(rest) {
        *sum += x * x;
    }
    lanes.iter().map(|&sum| f64::from(sum)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::{TestTensor, randn};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn it_matches_libtorch(
            count in 0i64..100_000,
            threads in 1i32..4,
            wide: bool,
        ) {
            tch::set_num_threads(threads);
            let kind = if wide { Kind::Float } else { Kind::BFloat16 };
            let x = randn(&[count], kind);
            let plain = x
                .to_f64()
                .square()
                .sum(Kind::Double);
            let plain = plain.double_value(&[]);
            let ours = sum_of_squares(&x).double_value(&[]);
            let tolerance = if wide { 1e-6 } else { 1e-2 };
            prop_assert!((ours - plain).abs() <= tolerance * plain, "{ours} {plain}");
            tch::set_num_threads(1);
            prop_assert!(!wide || sum_of_squares(&x).double_value(&[]) == ours);
        }
    }

    #[test]
    fn nan_and_infinity_stay() {
        let x = Tensor::from_slice(&[1f32, f32::NAN, 2.0]);
        assert!(sum_of_squares(&x).double_value(&[]).is_nan());
        let x = Tensor::from_slice(&[1f32, f32::INFINITY]);
        assert_eq!(sum_of_squares(&x).double_value(&[]), f64::INFINITY);
    }
}
