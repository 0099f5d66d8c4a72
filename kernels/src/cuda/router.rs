//! What a router makes of its logits, and their gradient, `source/router.cu`.

use super::{Gpu, KernelLaunch, Variant, arguments};
use crate::router::{RouterOutput, RouterScoring};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Tokens of a block, one after another.
const WARPS: usize = 4;
/// Tokens whose sums a block adds up.
const TOKENS_PER_BLOCK: usize = 64;
/// A thread remembers in 32 bits which of its experts are taken, one of 32 threads.
pub(crate) const MAX_EXPERTS: usize = 1024;
/// Logits are fp32, and read one by one.
const VARIANT: Variant = Variant {
    kind: Kind::Float,
    vectors: true,
};

fn call<'a>(
    name: &'static str,
    blocks: usize,
    shared: usize,
    arguments: &'a [super::Argument],
) -> KernelLaunch<'a> {
    KernelLaunch {
        name,
        variant: VARIANT,
        blocks,
        block: (32, WARPS),
        shared: shared * size_of::<f32>(),
        arguments,
    }
}

/// As [`crate::select_experts`], of at most [`MAX_EXPERTS`].
pub(crate) fn select_experts(
    gpu: &dyn Gpu,
    logits: &Tensor,
    bias: Option<&Tensor>,
    top_k: usize,
    sigmoid: bool,
) -> Tensor {
    let [tokens, experts] = [0, 1].map(|dim| logits.size()[dim] as usize);
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
    gpu.run(
        &call(
            "select_experts",
            tokens.div_ceil(WARPS),
            WARPS * experts,
            &arguments,
        ),
        logits,
    );
    chosen
}

/// As [`crate::router`], likewise.
pub(crate) fn router(
    gpu: &dyn Gpu,
    logits: &Tensor,
    chosen: &Tensor,
    router: RouterScoring,
    groups: &[Range<usize>],
) -> RouterOutput {
    let experts = logits.size()[1] as usize;
    let top_k = chosen.size()[1] as usize;
    let weights_tk = Tensor::empty(chosen.size(), (Kind::Float, logits.device()));
    let mut sums = Vec::new();
    for group in groups {
        let part = |tensor: &Tensor| tensor.narrow(0, group.start as i64, group.len() as i64);
        let [group_logits, group_chosen, of_weights] = [logits, chosen, &weights_tk].map(part);
        let blocks = group.len().div_ceil(TOKENS_PER_BLOCK);
        let partial = Tensor::empty(
            [blocks as i64, experts as i64 + 1],
            (Kind::Float, logits.device()),
        );
        let sigmoid = usize::from(router.sigmoid);
        let normalize = usize::from(router.normalize);
        let arguments = arguments![
            &group_logits,
            &group_chosen,
            &of_weights,
            &partial,
            group.len(),
            experts,
            top_k,
            TOKENS_PER_BLOCK,
            sigmoid,
            normalize,
            router.scale as f32,
        ];
        gpu.run(
            &call("router", blocks, WARPS * (2 * experts + 1), &arguments),
            logits,
        );
        sums.push(partial.sum_dim_intlist([0i64].as_slice(), false, Kind::Float));
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

/// As [`crate::router_backward`], likewise.
pub(crate) fn router_backward(
    gpu: &dyn Gpu,
    logits: &Tensor,
    chosen: &Tensor,
    router: RouterScoring,
    groups: &[Range<usize>],
    of: [Option<&Tensor>; 3],
) -> Tensor {
    let experts = logits.size()[1] as usize;
    let top_k = chosen.size()[1] as usize;
    let out = logits.empty_like();
    let [of_weights, grad_sums, grad_z] = of.map(|of| of.map(Tensor::contiguous));
    for (index, group) in groups.iter().enumerate() {
        let part = |tensor: &Tensor| tensor.narrow(0, group.start as i64, group.len() as i64);
        let [group_logits, group_chosen, to] = [logits, chosen, &out].map(part);
        let of_weights = of_weights.as_ref().map(part);
        let grad_sums = grad_sums.as_ref().map(|sums| sums.get(index as i64));
        let sigmoid = usize::from(router.sigmoid);
        let normalize = usize::from(router.normalize);
        let arguments = arguments![
            &group_logits,
            &group_chosen,
            of_weights.as_ref(),
            grad_sums.as_ref(),
            grad_z.as_ref(),
            &to,
            group.len(),
            experts,
            top_k,
            sigmoid,
            normalize,
            router.scale as f32,
        ];
        let blocks = group.len().div_ceil(WARPS);
        gpu.run(
            &call("router_backward", blocks, 3 * WARPS * experts, &arguments),
            logits,
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::{close, test_gpu};
    use crate::router::tests::plain;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]
        #[test]
        fn it_is_what_libtorch_makes_of_them(
            lens in proptest::collection::vec(0usize..100, 1..3), experts in prop_oneof![1i64..40, Just(64), Just(130)],
            top_k in 1i64..9, sigmoid: bool, normalize: bool, biased: bool, which in 1usize..8,
        ) {
            let (gpu, device) = test_gpu();
            let top_k = top_k.min(experts);
            let groups: Vec<_> = lens.iter().scan(0, |end, len| { *end += len; Some(*end - len..*end) }).collect();
            let count = lens.iter().sum::<usize>() as i64;
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, device));
            let logits = random(&[count, experts]) * 3.0;
            let bias = biased.then(|| random(&[experts]));
            let chosen = select_experts(gpu, &logits, bias.as_ref(), top_k as usize, sigmoid);
            let scores = if sigmoid { logits.sigmoid() } else { logits.softmax(-1, Kind::Float) };
            let biased = bias.map_or(scores.shallow_clone(), |bias| scores + bias);
            let (best, _) = biased.topk(top_k, -1, true, true);
            close(&biased.gather(1, &chosen, false), &best, 1e-5)?;
            let sorted = chosen.sort(-1, false).0;
            let apart = sorted.narrow(1, 1, top_k - 1) - sorted.narrow(1, 0, top_k - 1);
            prop_assert_eq!(apart.eq(0).sum(Kind::Int64).int64_value(&[]), 0);

            let how = RouterScoring { sigmoid, normalize, scale: 1.5 };
            let wide = logits.to_kind(Kind::Double).set_requires_grad(true);
            let plain = plain(&wide, &chosen, how, &groups);
            let RouterOutput { weights_tk, prob_sums_ge, z_sum } = router(gpu, &logits, &chosen, how, &groups);
            for (ours, plain) in [&weights_tk, &prob_sums_ge, &z_sum].into_iter().zip(&plain) {
                close(ours, plain, 3e-5)?;
            }
            // Gradients of some of the three.
            let of: Vec<_> = plain.iter().map(|x| random(&x.size())).collect();
            let wanted = |index: usize| which >> index & 1 == 1;
            let some = [0, 1, 2].map(|index| wanted(index).then_some(&of[index]));
            let terms = plain.iter().zip(&of).enumerate().filter(|(index, _)| wanted(*index));
            let total: Tensor = terms.map(|(_, (x, of))| (x * of.to_kind(Kind::Double)).sum(Kind::Double)).sum();
            total.backward();
            let ours = router_backward(gpu, &logits, &chosen, how, &groups, some);
            close(&ours, &wide.grad(), 2e-5)?;
        }
    }

    #[test]
    fn of_equals_the_first_is_chosen_and_of_what_is_no_number_somebody() {
        let (gpu, device) = test_gpu();
        let logits = Tensor::from_slice(&[1f32, 2.0, 2.0, 2.0, f32::NAN, 0.0, 1.0, 0.0])
            .view([2, 4])
            .to_device(device);
        let chosen =
            Vec::<i64>::try_from(select_experts(gpu, &logits, None, 3, false).view([-1])).unwrap();
        assert_eq!(chosen, [1, 2, 3, 0, 1, 2]);
    }
}
