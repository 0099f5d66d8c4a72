//! Launches of the softmax and cross-entropy kernels in `source/cross_entropy.cu`.

use super::launch::{Argument, BlockShape, Gpu, KernelLaunch, Variant, arguments};
use crate::tensors::{empty_f32, sizes};
use tch::Tensor;

/// Most threads of a block, which processes one token.
const MAX_THREADS: usize = 512;

fn launch<'a>(
    name: &'static str,
    variant: Variant,
    tokens: usize,
    width: usize,
    arguments: &'a [Argument],
) -> KernelLaunch<'a> {
    let threads_per_row = (width / variant.vector())
        .clamp(32, MAX_THREADS)
        .next_power_of_two();
    KernelLaunch {
        name,
        variant,
        blocks: tokens,
        block: BlockShape {
            threads_per_row,
            rows: 1,
        },
        shared: 0,
        arguments,
    }
}

pub(crate) fn softmax(
    gpu: &dyn Gpu,
    logits: &Tensor,
    divisor: f64,
    out: &Tensor,
) -> (Tensor, Tensor) {
    let [tokens, width] = sizes(logits);
    let largest = empty_f32(logits, [tokens]);
    let sum = empty_f32(logits, [tokens]);
    let inverse = 1.0 / divisor as f32;
    let variant = Variant::of(&[logits, out], width);
    let arguments = arguments![logits, out, &largest, &sum, width, inverse];
    let launch = launch("softmax", variant, tokens, width, &arguments);
    gpu.run(&launch, logits);
    (largest, sum)
}

/// Runs [`crate::softmax_gradient`] on contiguous tensors. A label out of range traps on the GPU.
pub(crate) fn softmax_gradient(
    gpu: &dyn Gpu,
    probs: &Tensor,
    scale: &Tensor,
    labels: &Tensor,
    minus: &Tensor,
) {
    let [tokens, width] = sizes(probs);
    let variant = Variant::of(&[probs], width);
    let arguments = arguments![probs, scale, labels, minus, width];
    let launch = launch("softmax_gradient", variant, tokens, width, &arguments);
    gpu.run(&launch, probs);
}

/// Runs [`crate::cross_entropy`] with logits times `inverse` and, if there is a `factor`, gradients
/// times that. A label out of range traps on the GPU.
pub(crate) fn cross_entropy(
    gpu: &dyn Gpu,
    logits: &Tensor,
    labels: &Tensor,
    inverse: f32,
    factor: Option<f32>,
) -> Tensor {
    let [tokens, width] = sizes(logits);
    let losses = empty_f32(logits, [tokens]);
    let variant = Variant::of(&[logits], width);
    let wanted = usize::from(factor.is_some());
    let factor = factor.unwrap_or(0.0);
    let arguments = arguments![logits, labels, &losses, width, inverse, factor, wanted];
    let launch = launch("cross_entropy", variant, tokens, width, &arguments);
    gpu.run(&launch, logits);
    losses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::tests::{TestInput, close, test_gpu, with_cases},
        tensors::{LAST_DIM, tests::TestTensor},
    };
    use proptest::prelude::*;
    use tch::{Kind, Reduction};

    fn width() -> impl Strategy<Value = i64> {
        prop_oneof![
            1i64..80,
            (1i64..40).prop_map(|n| n * 8),
            Just(5000),
            Just(5003)
        ]
    }

    proptest! {
        #![proptest_config(with_cases(50))]
        #[test]
        fn it_matches_libtorch(
            tokens in 0i64..20,
            width in width(),
            input: TestInput,
        ) {
            let (gpu, device) = test_gpu();
            let logits = input.random(&[tokens, width]) * 4.0;
            let labels = Tensor::randint(width, [tokens], (Kind::Int64, device));
            if tokens > 2 {
                let _ = labels.narrow(0, 1, 1).fill_(-100);
            }
            let wide = logits
                .to_f64()
                .set_requires_grad(true);
            let scaled = &wide / 1.5;
            let plain =
                scaled.cross_entropy_loss(&labels, None::<Tensor>, Reduction::None, -100, 0.0);
            (plain.sum(Kind::Double) * 0.25).backward();
            let before = logits.copy();
            let inverse = 1.0 / 1.5;
            close(
                &cross_entropy(gpu, &logits, &labels, inverse, None),
                &plain,
                4e-6,
            )?;
            prop_assert!(logits.equal(&before));
            let factor = Some(0.25 / 1.5);
            close(
                &cross_entropy(gpu, &logits, &labels, inverse, factor),
                &plain,
                4e-6,
            )?;
            let tolerance = if input.bf16 { 1e-2 } else { 2e-6 };
            close(&logits, &wide.grad(), tolerance)?;
        }

        #[test]
        fn vocabulary_shards_add_up_to_the_softmax_and_its_gradient(
            tokens in 0i64..20,
            own in width(),
            other in 1i64..50,
            input: TestInput,
        ) {
            let (gpu, device) = test_gpu();
            let all = input.random(&[tokens, own + other]) * 4.0;
            let wide = all.to_f64() / 1.5;
            let whole = wide
                .softmax(-1, Kind::Double)
                .narrow(1, 0, own);
            let logits = all.narrow(1, 0, own).contiguous();
            let (largest, sum) = softmax(gpu, &logits, 1.5, &logits);
            let own_wide = wide.narrow(1, 0, own);
            close(&largest, &own_wide.amax(LAST_DIM, false), 1e-5)?;
            let own_log = own_wide.logsumexp(LAST_DIM, false);
            close(&(sum.log() + &largest), &own_log, 1e-5)?;
            // The weight of this shard in the softmax over the whole vocabulary.
            let share = (own_log - wide.logsumexp(LAST_DIM, false)).exp();
            let labels = Tensor::randint(own, [tokens], (Kind::Int64, device));
            let minus = Tensor::rand([tokens], (Kind::Float, device));
            let scale = (share * 0.5).to_kind(Kind::Float);
            softmax_gradient(gpu, &logits, &scale, &labels, &minus);
            let minus = minus.to_f64().unsqueeze(1);
            let plain = (whole * 0.5).scatter_add(1, &labels.unsqueeze(1), &-minus);
            let tolerance = if input.bf16 { 1e-2 } else { 2e-6 };
            close(&logits, &plain, tolerance)?;
        }
    }

    #[test]
    fn nan_stays_nan() {
        let (gpu, device) = test_gpu();
        let logits = Tensor::from_slice(&[1f32, f32::NAN, 2.0])
            .view([1, 3])
            .to_device(device);
        let labels = Tensor::from_slice(&[0i64]).to_device(device);
        let losses = cross_entropy(gpu, &logits, &labels, 1.0, Some(1.0));
        assert!(losses.double_value(&[0]).is_nan());
        assert!(logits.double_value(&[0, 2]).is_nan());
    }
}
