//! A token's rows, weighted and added up, `source/rows.cu`.

use super::{Call, Gpu, THREADS, Variant, arguments};
use tch::{Kind, Tensor};

/// As [`crate::combine`], with weights in fp32 and without gaps; a row that is not there stops the GPU, as libtorch's indices do.
pub(crate) fn combine(
    gpu: &dyn Gpu,
    rows: &Tensor,
    slots: &Tensor,
    weights: Option<&Tensor>,
) -> Tensor {
    let tokens = slots.size()[0];
    let width = rows.size()[1];
    let out = Tensor::empty([tokens, width], (rows.kind(), rows.device()));
    let [count, tokens, choices, width] =
        [rows.size()[0], tokens, slots.size()[1], width].map(|size| size as usize);
    let variant = Variant::of(&[rows, &out], width);
    let arguments = arguments![rows, slots, weights, &out, count, tokens, choices, width];
    gpu.run(
        &Call::by_rows("combine", gpu, variant, (tokens, width), &arguments),
        rows,
    );
    out
}

/// As [`crate::combine_backward`], likewise.
pub(crate) fn combine_backward(
    gpu: &dyn Gpu,
    grad: &Tensor,
    rows: &Tensor,
    slots: &Tensor,
    weights: &Tensor,
) -> (Tensor, Tensor) {
    let of_rows = rows.empty_like();
    let of_weights = Tensor::empty(slots.size(), (Kind::Float, rows.device()));
    let [count, tokens, choices, width] = [
        rows.size()[0],
        slots.size()[0],
        slots.size()[1],
        rows.size()[1],
    ]
    .map(|size| size as usize);
    let variant = Variant::of(&[grad, rows, &of_rows], width);
    let block = (32, THREADS / 32);
    let blocks = (tokens * choices).div_ceil(block.1);
    let arguments = arguments![
        grad,
        rows,
        slots,
        weights,
        &of_rows,
        &of_weights,
        count,
        tokens,
        choices,
        width
    ];
    gpu.run(
        &Call {
            name: "combine_backward",
            variant,
            blocks,
            block,
            shared: 0,
            arguments: &arguments,
        },
        rows,
    );
    (of_rows, of_weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::combine::{backward_by_libtorch, combine_by_libtorch};
    use crate::cuda::tests::{Numbers, close, gpu_of_tests};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn it_is_libtorchs_sum_with_its_gradients(
            (tokens, choices) in (0i64..40, 1i64..5), width in prop_oneof![1i64..50, (1i64..40).prop_map(|n| n * 8)],
            missing: bool, weighted: bool, numbers: Numbers,
        ) {
            let (gpu, device) = gpu_of_tests();
            // A permutation, of which some choices have none.
            let slots = Tensor::randperm(tokens * choices, (Kind::Int64, device)).view([tokens, choices]);
            let count = if missing { tokens * choices * 2 / 3 } else { tokens * choices };
            let slots = slots.masked_fill(&slots.ge(count), -1);
            let (rows, grad) = (numbers.random(&[count, width]), numbers.random(&[tokens, width]));
            let weights = Tensor::randn([tokens, choices], (Kind::Float, device));
            let some = weighted.then_some(&weights);
            let wide = |x: &Tensor| x.to_kind(Kind::Float);
            let tolerance = if numbers.bf16 { 3e-2 } else { 1e-5 };
            close(&combine(gpu, &rows, &slots, some), &combine_by_libtorch(&wide(&rows), &slots, some), tolerance)?;
            let (of_rows, of_weights) = combine_backward(gpu, &grad, &rows, &slots, &weights);
            let (plain_rows, plain_weights) = backward_by_libtorch(&wide(&grad), &wide(&rows), &slots, &weights);
            close(&of_rows, &plain_rows, tolerance)?;
            close(&of_weights, &plain_weights, 1e-3)?;
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
