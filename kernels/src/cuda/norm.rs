//! Launches of the RMSNorm kernels in `source/norm.cu`.

use super::launch::{
    BLOCKS_PER_MULTIPROCESSOR, BlockShape, Gpu, KernelLaunch, MAX_SHARED, THREADS, Variant,
    arguments,
};
use crate::{
    gain::{Gain, rounds_before},
    tensors::{FIRST_DIM, empty_f32},
};
use tch::{Kind, Tensor};

/// A warp processes rows of up to this many packs; a block processes longer rows.
const MAX_PACKS_PER_WARP: usize = 128;
/// Warps of a block that the backward kernel sums over at most.
const MAX_WARPS: usize = 16;
const _: () = assert!(THREADS <= 32 * MAX_WARPS);
/// Bytes of shared memory that the backward kernel declares itself, for the sums of the warps over
/// two rows.
const STATIC_SHARED: usize = 2 * MAX_WARPS * size_of::<f32>();
/// Limit of the backward kernel: the column sums of a block must fit the shared memory that every
/// GPU provides, next to what the kernel declares itself.
pub(crate) const MAX_NORM_WIDTH: usize = (MAX_SHARED - STATIC_SHARED) / size_of::<f32>();

fn block(variant: Variant, width: usize) -> BlockShape {
    let packs = width / variant.vector();
    let threads_per_row = if packs <= MAX_PACKS_PER_WARP {
        32
    } else {
        THREADS
    };
    BlockShape {
        threads_per_row,
        rows: THREADS / threads_per_row,
    }
}

pub(crate) fn rms_norm(gpu: &dyn Gpu, input: &Tensor, gain: Gain, eps: f64) -> (Tensor, Tensor) {
    let Gain { weight, offset } = gain;
    let width = weight.numel();
    let rows = input.numel().checked_div(width).unwrap_or(0);
    let mut shape = input.size();
    shape.pop();
    shape.push(1);
    let out = input.empty_like();
    let scale = Tensor::empty(shape.as_slice(), (Kind::Float, input.device()));
    let variant = Variant::of(&[input, weight, &out], width);
    let block = block(variant, width);
    let rounds_before = usize::from(rounds_before(offset));
    let eps = eps as f32;
    let arguments = arguments![
        input,
        weight,
        offset,
        rounds_before,
        &out,
        &scale,
        rows,
        width,
        eps
    ];
    let launch = KernelLaunch {
        name: "rms_norm",
        variant,
        blocks: rows.div_ceil(block.rows),
        block,
        shared: 0,
        arguments: &arguments,
    };
    gpu.run(&launch, input);
    (out, scale)
}

/// Runs [`crate::rms_norm_backward`] on rows of at most [`MAX_NORM_WIDTH`] elements.
pub(crate) fn rms_norm_backward(
    gpu: &dyn Gpu,
    grad: &Tensor,
    x: &Tensor,
    scale: &Tensor,
    gain: Gain,
) -> (Tensor, Tensor) {
    let Gain { weight, offset } = gain;
    let rows = scale.numel();
    let width = weight.numel();
    let out = x.empty_like();
    let variant = Variant::of(&[grad, x, weight, &out], width);
    let block = block(variant, width);
    // Each block has its own sums, which are added in order.
    let blocks = rows
        .div_ceil(block.rows)
        .min(BLOCKS_PER_MULTIPROCESSOR * gpu.multiprocessors());
    let partial = empty_f32(x, [blocks, width]);
    let arguments = arguments![grad, x, scale, weight, offset, &out, &partial, rows, width];
    let launch = KernelLaunch {
        name: "rms_norm_backward",
        variant,
        blocks,
        block,
        shared: block.rows * width * size_of::<f32>(),
        arguments: &arguments,
    };
    gpu.run(&launch, x);
    let grad_weight = partial.sum_dim_intlist(FIRST_DIM, false, Kind::Float);
    (out, grad_weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::tests::{TestInput, close, test_gpu, with_cases},
        tensors::{LAST_DIM, tests::TestTensor},
    };
    use proptest::prelude::*;

    /// Widths of every block shape, and the largest ones.
    fn widths() -> impl Strategy<Value = i64> {
        let limit = MAX_NORM_WIDTH as i64;
        prop_oneof![
            4 => 1i64..100,
            4 => (1i64..40).prop_map(|n| n * 8),
            1 => Just(2048),
            1 => Just(1500),
            1 => limit - 9..=limit,
        ]
    }

    #[test]
    #[should_panic(expected = "48 KB")]
    fn columns_beyond_the_limit_do_not_fit_shared_memory() {
        // On the emulator: a GPU refuses the launch with a message of its own.
        let gpu = crate::cuda::emulator::Host;
        let width = MAX_NORM_WIDTH as i64 + 4;
        let x = Tensor::ones([1, width], tch::kind::FLOAT_CPU);
        let scale = Tensor::ones([1, 1], tch::kind::FLOAT_CPU);
        let _ = rms_norm_backward(&gpu, &x, &x, &scale, Gain::from(&x.get(0)));
    }

    proptest! {
        #![proptest_config(with_cases(40))]
        #[test]
        fn it_matches_the_formula(
            rows in 0i64..50,
            width in widths(),
            offset in prop_oneof![Just(0.0f32), Just(1.0)],
            input: TestInput,
        ) {
            let (gpu, _) = test_gpu();
            let rows = if width > 4000 { rows.min(3) } else { rows };
            let [x, grad] = [(); 2].map(|()| input.random(&[rows, width]));
            let weight = input.random(&[width]);
            let wide = |x: &Tensor| x.to_f64().set_requires_grad(true);
            let wide_x = wide(&x);
            let wide_weight = wide(&weight);
            let mean = wide_x
                .square()
                .mean_dim(LAST_DIM, true, Kind::Double);
            let factor = (mean + 1e-5).rsqrt();
            let plain = &wide_x * factor * (&wide_weight + f64::from(offset));
            (&plain * grad.to_f64())
                .sum(Kind::Double)
                .backward();
            let gain = Gain {
                weight: &weight,
                offset,
            };
            let (out, scale) = rms_norm(gpu, &x, gain, 1e-5);
            let (grad_x, grad_weight) = rms_norm_backward(gpu, &grad, &x, &scale, gain);
            let tolerance = if input.bf16 { 2e-2 } else { 2e-5 };
            close(&out, &plain, tolerance)?;
            if offset != 0.0 {
                let once = x.to_kind(Kind::Float) * &scale * gain.wide();
                prop_assert_eq!(&out, &once.to_kind(x.kind()));
            }
            close(&grad_x, &wide_x.grad(), 4.0 * tolerance)?;
            close(&grad_weight, &wide_weight.grad(), 4.0 * tolerance)?;
            prop_assert_eq!(grad_weight.kind(), Kind::Float);
        }
    }
}
