//! Launches of the SwiGLU kernels in `source/swiglu.cu`.

use super::launch::{Gpu, KernelLaunch, Variant, arguments};
use crate::tensors::{empty_as, sizes};
use tch::Tensor;

pub(crate) fn swiglu(gpu: &dyn Gpu, hidden: &Tensor) -> Tensor {
    let [rows, width] = sizes(hidden);
    let ffn = width / 2;
    let out = empty_as(hidden, [rows, ffn]);
    let variant = Variant::of(&[hidden, &out], ffn);
    let arguments = arguments![hidden, &out, rows, ffn];
    let launch = KernelLaunch::over_rows("swiglu", gpu, variant, rows, ffn, &arguments);
    gpu.run(&launch, hidden);
    out
}

pub(crate) fn swiglu_backward(
    gpu: &dyn Gpu,
    grad_out: &Tensor,
    hidden: &Tensor,
) -> (Tensor, Tensor) {
    let [rows, ffn] = sizes(grad_out);
    let grad_hidden = hidden.empty_like();
    let result = grad_out.empty_like();
    let variant = Variant::of(&[grad_out, hidden, &grad_hidden, &result], ffn);
    let arguments = arguments![grad_out, hidden, &grad_hidden, &result, rows, ffn];
    let launch = KernelLaunch::over_rows("swiglu_backward", gpu, variant, rows, ffn, &arguments);
    gpu.run(&launch, hidden);
    (grad_hidden, result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::tests::{TestInput, close, test_gpu, with_cases},
        tensors::tests::TestTensor,
    };
    use proptest::prelude::*;
    use tch::Kind;

    proptest! {
        #![proptest_config(with_cases(60))]
        #[test]
        fn it_matches_libtorch(
            rows in 0i64..70,
            ffn in prop_oneof![1i64..50, (1i64..20).prop_map(|n| n * 8), Just(2200)],
            input: TestInput,
        ) {
            let (gpu, _) = test_gpu();
            let hidden = input.random(&[rows, 2 * ffn]);
            let grad = input.random(&[rows, ffn]);
            let wide = hidden
                .to_f64()
                .set_requires_grad(true);
            let halves = wide.chunk(2, -1);
            let plain = halves[0].silu() * &halves[1];
            (&plain * grad.to_f64())
                .sum(Kind::Double)
                .backward();
            let tolerance = if input.bf16 { 8e-3 } else { 2e-6 };
            let (grad_hidden, again) = swiglu_backward(gpu, &grad, &hidden);
            close(&grad_hidden, &wide.grad(), tolerance)?;
            close(&again, &plain, tolerance)?;
            prop_assert!(again.equal(&swiglu(gpu, &hidden)));
        }
    }
}
