//! Launches of the router kernels in `source/router.cu`.

use super::launch::{Argument, BlockShape, Gpu, KernelLaunch, Variant, arguments};
use crate::{
    routing::{RouterGradients, RouterOutput, RouterScoring},
    tensors::{FIRST_DIM, empty_f32, sizes, slice_rows},
};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Warps of a block, each of which works on one token at a time.
const WARPS: usize = 4;
/// Tokens that a block sums in the forward pass.
const TOKENS_PER_BLOCK: usize = 16;
/// Limit of the kernels: each of a warp's 32 threads marks its taken experts in 32 bits.
pub(crate) const MAX_EXPERTS: usize = 1024;
/// Logits are fp32. The router kernels read them by element whatever the variant.
const VARIANT: Variant = Variant {
    kind: Kind::Float,
    vectors: true,
};

fn launch<'a>(
    name: &'static str,
    blocks: usize,
    shared_floats: usize,
    arguments: &'a [Argument],
) -> KernelLaunch<'a> {
    KernelLaunch {
        name,
        variant: VARIANT,
        blocks,
        block: BlockShape {
            threads_per_row: 32,
            rows: WARPS,
        },
        shared: shared_floats * size_of::<f32>(),
        arguments,
    }
}

/// Runs [`crate::select_experts`] for at most [`MAX_EXPERTS`] experts.
pub(crate) fn select_experts(
    gpu: &dyn Gpu,
    logits: &Tensor,
    bias: Option<&Tensor>,
    top_k: usize,
    sigmoid: bool,
) -> Tensor {
    let [tokens, experts] = sizes(logits);
    let chosen = Tensor::empty(
        [tokens as i64, top_k as i64],
        (Kind::Int64, logits.device()),
    );
    let arguments = arguments![
        logits,
        bias,
        &chosen,
        tokens,
        experts,
        top_k,
        usize::from(sigmoid)
    ];
    let blocks = tokens.div_ceil(WARPS);
    let launch = launch("select_experts", blocks, WARPS * experts, &arguments);
    gpu.run(&launch, logits);
    chosen
}

/// Runs [`crate::router`] for at most [`MAX_EXPERTS`] experts.
pub(crate) fn router(
    gpu: &dyn Gpu,
    logits: &Tensor,
    chosen: &Tensor,
    router: RouterScoring,
    groups: &[Range<usize>],
) -> RouterOutput {
    let [_, experts] = sizes(logits);
    let [tokens, top_k] = sizes(chosen);
    let weights_tk = empty_f32(logits, [tokens, top_k]);
    let mut sums = Vec::new();
    for group in groups {
        let rows = |x: &Tensor| slice_rows(x, group);
        let [group_logits, group_chosen, group_weights] = [logits, chosen, &weights_tk].map(rows);
        let blocks = group.len().div_ceil(TOKENS_PER_BLOCK);
        let partial = empty_f32(logits, [blocks, experts + 1]);
        let sigmoid = usize::from(router.sigmoid);
        let normalize = usize::from(router.normalize);
        let arguments = arguments![
            &group_logits,
            &group_chosen,
            &group_weights,
            &partial,
            group.len(),
            experts,
            top_k,
            TOKENS_PER_BLOCK,
            sigmoid,
            normalize,
            router.scale as f32,
        ];
        let shared = WARPS * (2 * experts + 1);
        gpu.run(&launch("router", blocks, shared, &arguments), logits);
        sums.push(partial.sum_dim_intlist(FIRST_DIM, false, Kind::Float));
    }
    let sums = Tensor::stack(&sums, 0);
    let prob_sums_ge = sums.narrow(1, 0, experts as i64).contiguous();
    let z_sum = sums.select(1, experts as i64).sum(Kind::Float);
    RouterOutput {
        weights_tk,
        prob_sums_ge,
        z_sum,
    }
}

/// Runs [`crate::router_backward`] for at most [`MAX_EXPERTS`] experts.
pub(crate) fn router_backward(
    gpu: &dyn Gpu,
    logits: &Tensor,
    chosen: &Tensor,
    router: RouterScoring,
    groups: &[Range<usize>],
    grads: RouterGradients,
) -> Tensor {
    let [_, experts] = sizes(logits);
    let [_, top_k] = sizes(chosen);
    let out = logits.empty_like();
    let grad_weights = grads.weights_tk.map(Tensor::contiguous);
    let grad_sums = grads.prob_sums_ge.map(Tensor::contiguous);
    let grad_z = grads.z_sum.map(Tensor::contiguous);
    for (index, group) in groups.iter().enumerate() {
        let rows = |x: &Tensor| slice_rows(x, group);
        let [group_logits, group_chosen, group_out] = [logits, chosen, &out].map(rows);
        let grad_weights = grad_weights.as_ref().map(rows);
        let grad_sums = grad_sums.as_ref().map(|sums| sums.get(index as i64));
        let sigmoid = usize::from(router.sigmoid);
        let normalize = usize::from(router.normalize);
        let arguments = arguments![
            &group_logits,
            &group_chosen,
            grad_weights.as_ref(),
            grad_sums.as_ref(),
            grad_z.as_ref(),
            &group_out,
            group.len(),
            experts,
            top_k,
            sigmoid,
            normalize,
            router.scale as f32,
        ];
        let blocks = group.len().div_ceil(WARPS);
        let shared = 3 * WARPS * experts;
        let launch = launch("router_backward", blocks, shared, &arguments);
        gpu.run(&launch, logits);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::tests::{close, test_gpu, with_cases},
        router::tests::{consecutive, plain},
        tensors::tests::TestTensor,
    };
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(with_cases(30))]
        #[test]
        fn it_matches_libtorch(
            lens in proptest::collection::vec(0usize..100, 1..3),
            experts in prop_oneof![1i64..40, Just(64), Just(130)],
            top_k in 1i64..9,
            sigmoid: bool,
            normalize: bool,
            biased: bool,
            which in 1usize..8,
        ) {
            let (gpu, device) = test_gpu();
            let top_k = top_k.min(experts);
            let groups = consecutive(&lens);
            let count = lens.iter().sum::<usize>() as i64;
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, device));
            let logits = random(&[count, experts]) * 3.0;
            let bias = biased.then(|| random(&[experts]));
            let chosen = select_experts(gpu, &logits, bias.as_ref(), top_k as usize, sigmoid);
            let scores = if sigmoid {
                logits.sigmoid()
            } else {
                logits.softmax(-1, Kind::Float)
            };
            let biased = bias.map_or(scores.shallow_clone(), |bias| scores + bias);
            let (best, _) = biased.topk(top_k, -1, true, true);
            close(&biased.gather(1, &chosen, false), &best, 1e-5)?;
            let sorted = chosen.sort(-1, false).0;
            let others = top_k - 1;
            let apart = sorted.narrow(1, 1, others) - sorted.narrow(1, 0, others);
            prop_assert_eq!(
                apart
                    .eq(0)
                    .sum(Kind::Int64)
                    .int64_value(&[]),
                0
            );

            let scoring = RouterScoring {
                sigmoid,
                normalize,
                scale: 1.5,
            };
            let wide = logits
                .to_f64()
                .set_requires_grad(true);
            let plain = plain(&wide, &chosen, scoring, &groups);
            let ours = router(gpu, &logits, &chosen, scoring, &groups);
            let ours = [ours.weights_tk, ours.prob_sums_ge, ours.z_sum];
            for (ours, plain) in ours.iter().zip(&plain) {
                close(ours, plain, 3e-5)?;
            }
            // Only some of the three outputs have a gradient.
            let wanted = |index: usize| which >> index & 1 == 1;
            let random = |index: usize| wanted(index).then(|| random(&plain[index].size()));
            let grads: [Option<Tensor>; 3] = std::array::from_fn(random);
            let mut total = Tensor::zeros([], (Kind::Double, device));
            for (x, grad) in plain.iter().zip(&grads) {
                if let Some(grad) = grad {
                    total = total + (x * grad.to_f64()).sum(Kind::Double);
                }
            }
            total.backward();
            let grads = RouterGradients {
                weights_tk: grads[0].as_ref(),
                prob_sums_ge: grads[1].as_ref(),
                z_sum: grads[2].as_ref(),
            };
            let ours = router_backward(gpu, &logits, &chosen, scoring, &groups, grads);
            close(&ours, &wide.grad(), 2e-5)?;
        }
    }

    #[test]
    fn ties_go_to_the_first_expert_and_nan_scores_still_choose() {
        let (gpu, device) = test_gpu();
        let logits = Tensor::from_slice(&[1f32, 2.0, 2.0, 2.0, f32::NAN, 0.0, 1.0, 0.0])
            .view([2, 4])
            .to_device(device);
        let chosen = select_experts(gpu, &logits, None, 3, false);
        let chosen = Vec::<i64>::try_from(chosen.view([-1])).unwrap();
        assert_eq!(chosen, [1, 2, 3, 0, 1, 2]);
    }
}
