//! A token's rows, weighted and added up, `source/rows.cu`.

use super::{Gpu, KernelLaunch, THREADS, Variant, arguments};
use tch::{Kind, Tensor};

/// As [`crate::combine`], with weights in fp32 and without gaps; a row that is not there stops the GPU, as libtorch's indices do.
pub(crate) fn combine(
    gpu: &dyn Gpu,
    rows: &Tensor,
    row_ids: &Tensor,
    weights: Option<&Tensor>,
) -> Tensor {
    let tokens = row_ids.size()[0];
    let width = rows.size()[1];
    let out = Tensor::empty([tokens, width], (rows.kind(), rows.device()));
    let [count, tokens, top_k, width] =
        [rows.size()[0], tokens, row_ids.size()[1], width].map(|size| size as usize);
    let variant = Variant::of(&[rows, &out], width);
    let arguments = arguments![rows, row_ids, weights, &out, count, tokens, top_k, width];
    gpu.run(
        &KernelLaunch::over_rows("combine", gpu, variant, (tokens, width), &arguments),
        rows,
    );
    out
}

/// As [`crate::combine_backward`], likewise.
pub(crate) fn combine_backward(
    gpu: &dyn Gpu,
    grad: &Tensor,
    rows: &Tensor,
    row_ids: &Tensor,
    weights: &Tensor,
) -> (Tensor, Tensor) {
    let grad_rows = rows.empty_like();
    let grad_weights = Tensor::empty(row_ids.size(), (Kind::Float, rows.device()));
    let [count, tokens, top_k, width] = [
        rows.size()[0],
        row_ids.size()[0],
        row_ids.size()[1],
        rows.size()[1],
    ]
    .map(|size| size as usize);
    let variant = Variant::of(&[grad, rows, &grad_rows], width);
    let block = (32, THREADS / 32);
    let blocks = (tokens * top_k).div_ceil(block.1);
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
    gpu.run(
        &KernelLaunch {
            name: "combine_backward",
            variant,
            blocks,
            block,
            shared: 0,
            arguments: &arguments,
        },
        rows,
    );
    (grad_rows, grad_weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::combine::{backward_by_libtorch, combine_by_libtorch};
    use crate::cuda::tests::{Numbers, close, test_gpu};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn it_is_libtorchs_sum_with_its_gradients(
            (tokens, top_k) in (0i64..40, 1i64..5), width in prop_oneof![1i64..50, (1i64..40).prop_map(|n| n * 8)],
            missing: bool, weighted: bool, numbers: Numbers,
        ) {
            let (gpu, device) = test_gpu();
            // A permutation, of which some top_k have none.
            let row_ids = Tensor::randperm(tokens * top_k, (Kind::Int64, device)).view([tokens, top_k]);
            let count = if missing { tokens * top_k * 2 / 3 } else { tokens * top_k };
            let row_ids = row_ids.masked_fill(&row_ids.ge(count), -1);
            let (rows, grad) = (numbers.random(&[count, width]), numbers.random(&[tokens, width]));
            let weights = Tensor::randn([tokens, top_k], (Kind::Float, device));
            let some = weighted.then_some(&weights);
            let wide = |x: &Tensor| x.to_kind(Kind::Float);
            let tolerance = if numbers.bf16 { 3e-2 } else { 1e-5 };
            close(&combine(gpu, &rows, &row_ids, some), &combine_by_libtorch(&wide(&rows), &row_ids, some), tolerance)?;
            let (grad_rows, grad_weights) = combine_backward(gpu, &grad, &rows, &row_ids, &weights);
            let (plain_rows, plain_weights) = backward_by_libtorch(&wide(&grad), &wide(&rows), &row_ids, &weights);
            close(&grad_rows, &plain_rows, tolerance)?;
            close(&grad_weights, &plain_weights, 1e-3)?;
        }
    }

    #[test]
    #[should_panic(expected = "trapped")]
    fn a_row_that_is_not_there_is_not_read() {
        // On a GPU it would end every test's context.
        let rows = Tensor::zeros([2, 4], (Kind::Float, tch::Device::Cpu));
        let _ = combine(
            &super::super::emulator::Host,
            &rows,
            &Tensor::from_slice(&[2i64]).view([1, 1]),
            None,
        );
    }
}
