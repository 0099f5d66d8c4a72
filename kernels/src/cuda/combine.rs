//! Launches of the combine kernels in `source/combine.cu`.

use super::launch::{BlockShape, Gpu, KernelLaunch, THREADS, Variant, arguments};
use crate::tensors::{empty_as, empty_f32, sizes};
use tch::Tensor;

struct Sizes {
    count: usize,
    tokens: usize,
    top_k: usize,
    width: usize,
}

impl Sizes {
    fn of(rows: &Tensor, row_ids: &Tensor) -> Sizes {
        let [count, width] = sizes(rows);
        let [tokens, top_k] = sizes(row_ids);
        Sizes {
            count,
            tokens,
            top_k,
            width,
        }
    }
}

/// Runs [`crate::combine`] with contiguous fp32 weights.
///
/// A row id out of range traps on the GPU, as libtorch's index checks do.
pub(crate) fn combine(
    gpu: &dyn Gpu,
    rows: &Tensor,
    row_ids: &Tensor,
    weights: Option<&Tensor>,
) -> Tensor {
    let Sizes {
        count,
        tokens,
        top_k,
        width,
    } = Sizes::of(rows, row_ids);
    let out = empty_as(rows, [tokens, width]);
    let variant = Variant::of(&[rows, &out], width);
    let arguments = arguments![rows, row_ids, weights, &out, count, tokens, top_k, width];
    let launch = KernelLaunch::over_rows("combine", gpu, variant, tokens, width, &arguments);
    gpu.run(&launch, rows);
    out
}

/// Runs [`crate::combine_backward`] with contiguous fp32 weights.
pub(crate) fn combine_backward(
    gpu: &dyn Gpu,
    grad: &Tensor,
    rows: &Tensor,
    row_ids: &Tensor,
    weights: &Tensor,
) -> (Tensor, Tensor) {
    let Sizes {
        count,
        tokens,
        top_k,
        width,
    } = Sizes::of(rows, row_ids);
    let grad_rows = rows.empty_like();
    let grad_weights = empty_f32(rows, [tokens, top_k]);
    let variant = Variant::of(&[grad, rows, &grad_rows], width);
    let block = BlockShape {
        threads_per_row: 32,
        rows: THREADS / 32,
    };
    let blocks = (tokens * top_k).div_ceil(block.rows);
    let arguments = arguments![
        grad,
        rows,
        row_ids,
        weights,
        &grad_rows,
        &grad_weights,
        count,
        tokens,
        top_k,
        width
    ];
    let launch = KernelLaunch {
        name: "combine_backward",
        variant,
        blocks,
        block,
        shared: 0,
        arguments: &arguments,
    };
    gpu.run(&launch, rows);
    (grad_rows, grad_weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        combine::{backward_by_libtorch, combine_by_libtorch},
        cuda::tests::{TestInput, close, test_gpu, with_cases},
    };
    use proptest::prelude::*;
    use tch::{Kind, kind::FLOAT_CPU};

    proptest! {
        #![proptest_config(with_cases(60))]
        #[test]
        fn it_matches_libtorch(
            tokens in 0i64..40,
            top_k in 1i64..11,
            width in prop_oneof![1i64..50, (1i64..40).prop_map(|n| n * 8)],
            missing: bool,
            weighted: bool,
            input: TestInput,
        ) {
            let (gpu, device) = test_gpu();
            // A permutation in which some routed tokens may have no row.
            let routed = tokens * top_k;
            let row_ids = Tensor::randperm(routed, (Kind::Int64, device)).view([tokens, top_k]);
            let count = if missing { routed * 2 / 3 } else { routed };
            let row_ids = row_ids
                .masked_fill(&row_ids.ge(count), -1)
                .to_kind(Kind::Int);
            let rows = input.random(&[count, width]);
            let grad = input.random(&[tokens, width]);
            let weights = Tensor::randn([tokens, top_k], (Kind::Float, device));
            let some = weighted.then_some(&weights);
            let wide = |x: &Tensor| x.to_kind(Kind::Float);
            let tolerance = if input.bf16 { 3e-2 } else { 1e-5 };
            let ours = combine(gpu, &rows, &row_ids, some);
            let plain = combine_by_libtorch(&wide(&rows), &row_ids, some);
            close(&ours, &plain, tolerance)?;
            let (grad_rows, grad_weights) = combine_backward(gpu, &grad, &rows, &row_ids, &weights);
            let (plain_rows, plain_weights) =
                backward_by_libtorch(&wide(&grad), &wide(&rows), &row_ids, &weights);
            close(&grad_rows, &plain_rows, tolerance)?;
            close(&grad_weights, &plain_weights, 1e-3)?;
        }
    }

    #[test]
    #[should_panic(expected = "trapped")]
    fn a_row_id_out_of_range_traps() {
        // Always on the emulator: on a GPU the trap would end the context of every test.
        let gpu = crate::cuda::emulator::Host;
        let rows = Tensor::zeros([2, 4], FLOAT_CPU);
        let row_ids = Tensor::from_slice(&[2i32]).view([1, 1]);
        let _ = combine(&gpu, &rows, &row_ids, None);
    }
}
