//! RMSNorm, `source/norm.cu`.

use super::{Gpu, KernelLaunch, THREADS, Variant, arguments};
use tch::{Kind, Tensor};

/// Rows of so many packs of numbers are a warp's; longer ones are a block's.
const MAX_PACKS_PER_WARP: usize = 128;
/// A block's sums of its rows' columns have to fit into what every GPU gives a block: 48 KB.
pub(crate) const MAX_NORM_WIDTH: usize = 12288;

/// Threads of a row, and rows of a block.
fn block(variant: Variant, width: usize) -> (usize, usize) {
    if width / variant.vector() <= MAX_PACKS_PER_WARP {
        (32, THREADS / 32)
    } else {
        (THREADS, 1)
    }
}

/// As [`crate::rms_norm`].
pub(crate) fn rms_norm(gpu: &dyn Gpu, x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let width = weight.numel();
    let rows = x.numel().checked_div(width).unwrap_or(0);
    let mut shape = x.size();
    shape.pop();
    shape.push(1);
    let out = x.empty_like();
    let scale = Tensor::empty(shape.as_slice(), (Kind::Float, x.device()));
    let variant = Variant::of(&[x, weight, &out], width);
    let block = block(variant, width);
    let arguments = arguments![x, weight, &out, &scale, rows, width, eps as f32];
    let blocks = rows.div_ceil(block.1);
    gpu.run(
        &KernelLaunch {
            name: "rms_norm",
            variant,
            blocks,
            block,
            shared: 0,
            arguments: &arguments,
        },
        x,
    );
    (out, scale)
}

/// As [`crate::rms_norm_backward`]; of rows of at most [`MAX_NORM_WIDTH`] numbers.
pub(crate) fn rms_norm_backward(
    gpu: &dyn Gpu,
    grad: &Tensor,
    x: &Tensor,
    scale: &Tensor,
    weight: &Tensor,
) -> (Tensor, Tensor) {
    let rows = scale.numel();
    let width = weight.numel();
    let out = x.empty_like();
    let variant = Variant::of(&[grad, x, weight, &out], width);
    let block = block(variant, width);
    // Each block adds up for itself, and their sums are added in order.
    let blocks = rows.div_ceil(block.1).min(2 * gpu.multiprocessors());
    let partial = Tensor::empty([blocks as i64, width as i64], (Kind::Float, x.device()));
    let arguments = arguments![grad, x, scale, weight, &out, &partial, rows, width];
    let shared = block.1 * width * size_of::<f32>();
    gpu.run(
        &KernelLaunch {
            name: "rms_norm_backward",
            variant,
            blocks,
            block,
            shared,
            arguments: &arguments,
        },
        x,
    );
    (
        out,
        partial.sum_dim_intlist([0i64].as_slice(), false, Kind::Float),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::{Numbers, close, test_gpu};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn it_is_the_norm_with_its_gradients(
            rows in 0i64..50, width in prop_oneof![1i64..100, (1i64..40).prop_map(|n| n * 8), Just(2048), Just(1500)], numbers: Numbers,
        ) {
            let (gpu, _) = test_gpu();
            let [x, grad] = [(); 2].map(|()| numbers.random(&[rows, width]));
            let weight = numbers.random(&[width]);
            let wide = |x: &Tensor| x.to_kind(Kind::Double).set_requires_grad(true);
            let (wide_x, wide_weight) = (wide(&x), wide(&weight));
            let factor = (wide_x.square().mean_dim([-1i64].as_slice(), true, Kind::Double) + 1e-5).rsqrt();
            let plain = &wide_x * factor * &wide_weight;
            (&plain * grad.to_kind(Kind::Double)).sum(Kind::Double).backward();
            let (out, scale) = rms_norm(gpu, &x, &weight, 1e-5);
            let (of_x, of_weight) = rms_norm_backward(gpu, &grad, &x, &scale, &weight);
            let tolerance = if numbers.bf16 { 2e-2 } else { 2e-5 };
            close(&out, &plain, tolerance)?;
            close(&of_x, &wide_x.grad(), 4.0 * tolerance)?;
            close(&of_weight, &wide_weight.grad(), 4.0 * tolerance)?;
            prop_assert_eq!(of_weight.kind(), Kind::Float);
        }
    }
}
