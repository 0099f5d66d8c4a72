//! The sum of a tensor's squares, for the norm of gradients.

use crate::profile::{Cost, part};
use crate::rows::{Numbers, for_rows, host_kind};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Numbers that are added up in fp32, in as many lanes; the rest in fp64.
const WIDTH: usize = 1024;
const LANES: usize = 64;

/// The sum of squares of `x`, fp64 `[]`. Neither threads nor where memory lies change a bit of it.
pub fn sum_of_squares(x: &Tensor) -> Tensor {
    part(
        "norm",
        "of gradients",
        || Cost::passes(1.0, x),
        || match host_kind(&[x]) {
            Some(Kind::Float) => Tensor::from(on_threads(x)),
            _ => x.norm().to_kind(Kind::Double).square(),
        },
    )
}

fn on_threads(x: &Tensor) -> f64 {
    let count = x.numel();
    let pieces = count.div_ceil(WIDTH);
    let sums = Tensor::empty([pieces as i64], (Kind::Double, x.device()));
    // SAFETY: in host memory without gaps, as was asked or made.
    let (x, to) = unsafe { (Numbers::<f32>::of(x), Numbers::<f64>::of(&sums)) };
    for_rows(pieces, WIDTH, |_, rows| {
        for piece in rows {
            let place = piece * WIDTH..((piece + 1) * WIDTH).min(count);
            // SAFETY: each piece is one part's.
            unsafe { to.part_mut(&(piece..piece + 1), 1)[0] = squares(x.part(&place, 1)) };
        }
    });
    to.part(&(0..pieces), 1).iter().sum()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn squares(x: &[f32]) -> f64 {
    let mut lanes = [0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        lanes.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
    }
    lanes
        .iter_mut()
        .zip(rest)
        .for_each(|(sum, x)| *sum += x * x);
    lanes.iter().map(|&sum| f64::from(sum)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn it_is_the_norms_square(count in 0i64..100_000, threads in 1i32..4, wide: bool) {
            tch::set_num_threads(threads);
            let kind = if wide { Kind::Float } else { Kind::BFloat16 };
            let x = Tensor::randn([count], (Kind::Float, Device::Cpu)).to_kind(kind);
            let plain = x.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
            let ours = sum_of_squares(&x).double_value(&[]);
            let tolerance = if wide { 1e-6 } else { 1e-2 };
            prop_assert!((ours - plain).abs() <= tolerance * plain, "{ours} {plain}");
            tch::set_num_threads(1);
            prop_assert!(!wide || sum_of_squares(&x).double_value(&[]) == ours);
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        let x = Tensor::from_slice(&[1f32, f32::NAN, 2.0]);
        assert!(sum_of_squares(&x).double_value(&[]).is_nan());
        let x = Tensor::from_slice(&[1f32, f32::INFINITY]);
        assert_eq!(sum_of_squares(&x).double_value(&[]), f64::INFINITY);
    }
}
