//! Launches of the kernels of the clamped GLU in `source/clamped_glu.cu`.

use super::launch::{Gpu, KernelLaunch, Variant, arguments};
use crate::tensors::{empty_as, sizes};
use tch::Tensor;

pub(crate) fn clamped_glu(gpu: &dyn Gpu, hidden: &Tensor, alpha: f32, limit: f32) -> Tensor {
    let [rows, width] = sizes(hidden);
    let ffn = width / 2;
    let out = empty_as(hidden, [rows, ffn]);
    let variant = Variant::of(&[hidden, &out], ffn);
    let arguments = arguments![hidden, &out, rows, ffn, alpha, limit];
    let launch = KernelLaunch::over_rows("clamped_glu", gpu, variant, rows, ffn, &arguments);
    gpu.run(&launch, hidden);
    out
}

pub(crate) fn clamped_glu_backward(
    gpu: &dyn Gpu,
    grad_out: &Tensor,
    hidden: &Tensor,
    alpha: f32,
    limit: f32,
) -> (Tensor, Tensor) {
    let [rows, ffn] = sizes(grad_out);
    let grad_hidden = hidden.empty_like();
    let result = grad_out.empty_like();
    let variant = Variant::of(&[grad_out, hidden, &grad_hidden, &result], ffn);
    let arguments = arguments![
        grad_out,
        hidden,
        &grad_hidden,
        &result,
        rows,
        ffn,
        alpha,
        limit
    ];
    let name = "clamped_glu_backward";
    let launch = KernelLaunch::over_rows(name, gpu, variant, rows, ffn, &arguments);
    gpu.run(&launch, hidden);
    (grad_hidden, result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clamped_glu::ClampedGlu,
        cuda::tests::{TestInput, close, test_gpu, with_cases},
    };
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(with_cases(40))]
        #[test]
        fn it_matches_libtorch(
            rows in 0i64..70,
            ffn in prop_oneof![1i64..50, (1i64..20).prop_map(|n| n * 8), Just(2200)],
            input: TestInput,
        ) {
            let (gpu, _) = test_gpu();
            let alpha = 1.702;
            let limit = 1.5;
            let glu = ClampedGlu { alpha, limit };
            let hidden = input.random(&[rows, 2 * ffn]);
            let grad = input.random(&[rows, ffn]);
            let plain = glu.with_libtorch(&hidden);
            let plain_grads = glu.backward_with_libtorch(&grad, &hidden);
            let tolerance = if input.bf16 { 8e-3 } else { 2e-6 };
            let (grad_hidden, again) = clamped_glu_backward(gpu, &grad, &hidden, alpha, limit);
            close(&grad_hidden, &plain_grads.0, tolerance)?;
            close(&again, &plain, tolerance)?;
            prop_assert!(again.equal(&clamped_glu(gpu, &hidden, alpha, limit)));
        }
    }
}
