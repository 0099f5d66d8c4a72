//! The router: expert selection, routing weights and balance sums, in one pass over tokens each
//! way.
//!
//! A token has few logits, so that the cost of some thirty libtorch operations would be call
//! overhead.
// Shapes: T tokens, E experts, K chosen experts of a token, G groups of tokens.

use crate::{
    cuda,
    exponential::exp,
    profile::{Cost, span},
    routing::{RouterGradients, RouterOutput, RouterScoring},
    rows::{HostData, Indices, for_rows, host_kind},
    softmax::exponentials,
    tensors::{empty_f32, sizes},
};
use multiversion::multiversion;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Tokens that are summed together, whatever the number of threads.
const CHUNK: usize = 64;
/// Cost of a logit, in elements of a plain pass.
const LOGIT_COST: usize = 8;
/// Keeps the sum of scores a nonzero divisor.
const TINY: f32 = 1e-20;

/// True if [`select_experts`], [`router`] and [`router_backward`] accept these logits.
pub fn supports_router(logits_te: &Tensor) -> bool {
    if logits_te.kind() != Kind::Float || logits_te.dim() != 2 {
        return false;
    }
    let [_, experts] = sizes(logits_te);
    experts > 0 && (host_kind(&[logits_te]).is_some() || gpu(logits_te).is_some())
}

fn gpu(logits_te: &Tensor) -> Option<&'static dyn cuda::Gpu> {
    let [_, experts] = sizes(logits_te);
    cuda::gpu(&[logits_te]).filter(|_| experts <= cuda::MAX_EXPERTS)
}

/// Selects the `top_k` experts with the highest scores for each token, `[T, K]` int64.
///
/// A score is that of a logit in `[T, E]`, plus the expert's bias in `[E]` fp32. The order is
/// descending; ties go to the lower index.
///
/// # Panics
/// If there are fewer experts, or [`supports_router`] refuses the logits.
pub fn select_experts(
    logits_te: &Tensor,
    bias_e: Option<&Tensor>,
    top_k: usize,
    sigmoid: bool,
) -> Tensor {
    assert!(supports_router(logits_te));
    let [count, width] = sizes(logits_te);
    assert!(top_k <= width, "top_k {top_k} exceeds {width} experts");
    let cost = || Cost::passes(1.0, logits_te);
    if let Some(gpu) = gpu(logits_te) {
        let by_gpu = || cuda::select_experts(gpu, logits_te, bias_e, top_k, sigmoid);
        return span("router", "select_experts", cost, by_gpu);
    }
    let bias = bias_e
        .map(|bias| Vec::<f32>::try_from(bias).expect("the bias is fp32"))
        .unwrap_or_else(|| vec![0.0; width]);
    let shape = [count as i64, top_k as i64];
    let experts_tk = Tensor::empty(shape, (Kind::Int64, logits_te.device()));
    // SAFETY: the tensor is contiguous in host memory and has this dtype.
    let logits = unsafe { HostData::<f32>::of(logits_te) };
    // SAFETY: as above.
    let experts = unsafe { HostData::<i64>::of(&experts_tk) };
    span("router", "select_experts", cost, || {
        for_rows(count, LOGIT_COST * width, |_, rows| {
            // SAFETY: each row belongs to one thread.
            let selected = unsafe { experts.rows_mut(&rows, top_k) };
            let logits = logits.rows(&rows, width);
            select_experts_rows(logits, &bias, sigmoid, selected, top_k);
        });
    });
    experts_tk
}

/// Computes the routing weights of the selected experts `[T, K]` int64 from logits `[T, E]`, and
/// the sums that balance losses need.
///
/// `groups` are consecutive ranges that cover all tokens.
///
/// # Panics
/// If [`supports_router`] refuses the logits, the groups do not cover the tokens, or an expert is
/// out of range.
pub fn router(
    logits_te: &Tensor,
    experts_tk: &Tensor,
    scoring: RouterScoring,
    groups: &[Range<usize>],
) -> RouterOutput {
    let cost = || Cost::passes(1.0, logits_te);
    if let Some(gpu) = gpu(logits_te) {
        check_inputs(logits_te, experts_tk, groups);
        return span("router", "forward", cost, || {
            cuda::router(gpu, logits_te, experts_tk, scoring, groups)
        });
    }
    let all = Tokens::chunked(logits_te, experts_tk, groups);
    let width = all.width;
    let top_k = all.top_k;
    let weights_tk = empty_f32(logits_te, sizes::<2>(experts_tk));
    let mut sums = vec![0f64; groups.len() * width];
    let mut z_sum = 0.0;
    span("router", "forward", cost, || {
        let shape = [all.chunks.len() as i64, width as i64 + 1];
        let partial = Tensor::empty(shape, (Kind::Double, logits_te.device()));
        // SAFETY: the tensor is contiguous in host memory and has this dtype.
        let weights = unsafe { HostData::<f32>::of(&weights_tk) };
        // SAFETY: as above.
        let partial = unsafe { HostData::<f64>::of(&partial) };
        all.for_chunks(|index, Chunk { tokens, .. }| {
            // SAFETY: each chunk belongs to one thread.
            let weights = unsafe { weights.rows_mut(tokens, top_k) };
            // SAFETY: as above.
            let sums = unsafe { partial.rows_mut(&(index..index + 1), width + 1) };
            let logits = all.logits(tokens);
            forward(logits, all.experts(tokens), scoring, weights, sums);
        });
        for (index, chunk) in all.chunks.iter().enumerate() {
            let (z, probs) = partial
                .rows(&(index..index + 1), width + 1)
                .split_last()
                .expect("the z sum follows the probabilities");
            let sums = &mut sums[chunk.group * width..];
            for (sum, x) in sums.iter_mut().zip(probs) {
                *sum += x;
            }
            z_sum += z;
        }
    });
    let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
    let shape = [groups.len() as i64, width as i64];
    let prob_sums_ge = Tensor::from_slice(&sums).view(shape);
    RouterOutput {
        weights_tk,
        prob_sums_ge,
        z_sum: Tensor::from(z_sum as f32),
    }
}

/// Returns the gradient of the logits `[T, E]`, given the gradients of the outputs of [`router`].
///
/// # Panics
/// As [`router`].
pub fn router_backward(
    logits_te: &Tensor,
    experts_tk: &Tensor,
    scoring: RouterScoring,
    groups: &[Range<usize>],
    grads: RouterGradients,
) -> Tensor {
    let cost = || Cost::passes(2.0, logits_te);
    if let Some(gpu) = gpu(logits_te) {
        check_inputs(logits_te, experts_tk, groups);
        return span("router", "backward", cost, || {
            cuda::router_backward(gpu, logits_te, experts_tk, scoring, groups, grads)
        });
    }
    let all = Tokens::chunked(logits_te, experts_tk, groups);
    let width = all.width;
    let top_k = all.top_k;
    let gradient = logits_te.empty_like();
    let elements = |tensor: Option<&Tensor>, count: usize| match tensor {
        Some(tensor) => {
            Vec::<f32>::try_from(tensor.contiguous().view([-1])).expect("gradients are fp32")
        }
        None => vec![0.0; count],
    };
    span("router", "backward", cost, || {
        let grad_weights = elements(grads.weights_tk, experts_tk.numel());
        let grad_sums = elements(grads.prob_sums_ge, groups.len() * width);
        let grad_z = elements(grads.z_sum, 1)[0];
        // SAFETY: the tensor is contiguous in host memory and has this dtype.
        let out = unsafe { HostData::<f32>::of(&gradient) };
        all.for_chunks(|_, Chunk { group, tokens }| {
            let grads = ChunkGradients {
                weights: &grad_weights[tokens.start * top_k..tokens.end * top_k],
                probs: &grad_sums[group * width..(group + 1) * width],
                z: grad_z,
            };
            // SAFETY: each chunk belongs to one thread.
            let out = unsafe { out.rows_mut(tokens, width) };
            let logits = all.logits(tokens);
            backward(logits, all.experts(tokens), scoring, grads, out);
        });
    });
    gradient
}

/// Panics unless the experts match the logits and the groups cover the tokens.
fn check_inputs(logits_te: &Tensor, experts_tk: &Tensor, groups: &[Range<usize>]) {
    let [count] = sizes(logits_te);
    let in_order = groups
        .iter()
        .try_fold(0, |end, group| (group.start == end).then_some(group.end));
    assert!(
        supports_router(logits_te) && in_order == Some(count),
        "router: unsupported logits, or groups {groups:?} do not cover {count} tokens"
    );
    assert!(
        cuda::same_device_contiguous(logits_te, experts_tk, Kind::Int64)
            && experts_tk.size()[0] as usize == count,
        "router: the selected experts do not match the logits"
    );
}

/// Consecutive tokens of one group.
struct Chunk {
    group: usize,
    tokens: Range<usize>,
}

/// The logits and selected experts of all tokens, divided into chunks.
struct Tokens<'a> {
    logits: HostData<f32>,
    experts: Indices<'a, i64>,
    width: usize,
    top_k: usize,
    chunks: Vec<Chunk>,
}

impl<'a> Tokens<'a> {
    fn chunked(
        logits_te: &'a Tensor,
        experts_tk: &'a Tensor,
        groups: &[Range<usize>],
    ) -> Tokens<'a> {
        check_inputs(logits_te, experts_tk, groups);
        let [_, width] = sizes(logits_te);
        let [_, top_k] = sizes(experts_tk);
        // SAFETY: the tensor is contiguous in host memory and has this dtype.
        let logits = unsafe { HostData::<f32>::of(logits_te) };
        // SAFETY: as above.
        let experts = unsafe { Indices::of(experts_tk) };
        let chunks = groups.iter().enumerate().flat_map(|(group, tokens)| {
            let end = tokens.end;
            tokens.clone().step_by(CHUNK).map(move |start| Chunk {
                group,
                tokens: start..(start + CHUNK).min(end),
            })
        });
        Tokens {
            logits,
            experts,
            width,
            top_k,
            chunks: chunks.collect(),
        }
    }

    fn logits(&self, tokens: &Range<usize>) -> &[f32] {
        self.logits.rows(tokens, self.width)
    }

    fn experts(&self, tokens: &Range<usize>) -> &[i64] {
        self.experts.rows(tokens, self.top_k)
    }

    /// Calls `body` with the index of each chunk and the chunk, in parallel.
    fn for_chunks(&self, body: impl Fn(usize, &Chunk) + Sync) {
        let cost = CHUNK * LOGIT_COST * self.width;
        for_rows(self.chunks.len(), cost, |_, indices| {
            for index in indices {
                body(index, &self.chunks[index]);
            }
        });
    }
}

/// Writes the softmax of a token's logits to `probs` and returns their log-sum-exp.
#[inline(always)]
fn softmax(logits: &[f32], probs: &mut [f32]) -> f32 {
    let (largest, sum) = exponentials(logits, probs, 1.0);
    for prob in probs {
        *prob /= sum;
    }
    largest + sum.ln()
}

#[inline(always)]
fn sigmoid(logits: &[f32], scores: &mut [f32]) {
    for (score, logit) in scores.iter_mut().zip(logits) {
        *score = 1.0 / (1.0 + exp(-logit));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn select_experts_rows(
    logits: &[f32],
    bias: &[f32],
    by_sigmoid: bool,
    experts: &mut [i64],
    top_k: usize,
) {
    let width = bias.len();
    let mut scores = vec![0f32; width];
    let chosen = experts.chunks_exact_mut(top_k.max(1));
    for (logits, chosen) in logits.chunks_exact(width).zip(chosen) {
        if by_sigmoid {
            sigmoid(logits, &mut scores)
        } else {
            softmax(logits, &mut scores);
        }
        for (score, bias) in scores.iter_mut().zip(bias) {
            *score += bias;
        }
        for k in 0..chosen.len() {
            let (taken, rest) = chosen.split_at_mut(k);
            // NaN is never better, but `top_k` experts are selected even then.
            let mut best: Option<usize> = None;
            for (expert, &score) in scores.iter().enumerate() {
                let is_better = best.is_none_or(|best| score > scores[best]);
                if is_better && !taken.contains(&(expert as i64)) {
                    best = Some(expert);
                }
            }
            rest[0] = best.expect("top_k is at most the number of experts") as i64;
        }
    }
}

/// Computes the weights of these tokens. `sums` receives each expert's summed probabilities, then
/// the summed squares of the log-sum-exps.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn forward(
    logits: &[f32],
    experts: &[i64],
    scoring: RouterScoring,
    weights: &mut [f32],
    sums: &mut [f64],
) {
    let width = sums.len() - 1;
    let mut probs = vec![0f32; width];
    let mut scores = vec![0f32; width];
    let top_k = experts.len() * width / logits.len();
    sums.fill(0.0);
    for (token, logits) in logits.chunks_exact(width).enumerate() {
        let normalizer = softmax(logits, &mut probs);
        sums[width] += f64::from(normalizer) * f64::from(normalizer);
        if scoring.sigmoid {
            sigmoid(logits, &mut scores);
            let all = scores.iter().sum::<f32>() + TINY;
            for (prob, score) in probs.iter_mut().zip(&scores) {
                *prob = score / all;
            }
        }
        let scores = if scoring.sigmoid { &scores } else { &probs };
        let experts = &experts[token * top_k..(token + 1) * top_k];
        let weights = &mut weights[token * top_k..(token + 1) * top_k];
        let mut chosen = 0.0;
        for (weight, &expert) in weights.iter_mut().zip(experts) {
            *weight = scores[expert as usize];
            chosen += *weight;
        }
        let divisor = if scoring.normalize {
            chosen + TINY
        } else {
            1.0
        };
        let factor = scoring.scale as f32 / divisor;
        for weight in weights {
            *weight *= factor;
        }
        for (sum, prob) in sums.iter_mut().zip(&probs) {
            *sum += f64::from(*prob);
        }
    }
}

/// The gradients of the router's outputs for a chunk of tokens.
#[derive(Clone, Copy)]
struct ChunkGradients<'a> {
    weights: &'a [f32],
    /// Gradients of the probability sums of the chunk's group.
    probs: &'a [f32],
    z: f32,
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn backward(
    logits: &[f32],
    experts: &[i64],
    scoring: RouterScoring,
    grads: ChunkGradients,
    out: &mut [f32],
) {
    let grad_probs = grads.probs;
    let width = grad_probs.len();
    let mut softened = vec![0f32; width];
    let mut sigmoids = vec![0f32; width];
    let mut grad_scores = vec![0f32; width];
    let top_k = experts.len() * width / logits.len();
    let rows = logits.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for (token, (logits, out)) in rows.enumerate() {
        let normalizer = softmax(logits, &mut softened);
        if scoring.sigmoid {
            sigmoid(logits, &mut sigmoids);
            // A probability is a score over the sum of all scores.
            let all = sigmoids.iter().sum::<f32>() + TINY;
            let mean = sigmoids
                .iter()
                .zip(grad_probs)
                .map(|(score, grad)| score * grad)
                .sum::<f32>()
                / all;
            for (grad_score, grad) in grad_scores.iter_mut().zip(grad_probs) {
                *grad_score = (grad - mean) / all;
            }
        } else {
            grad_scores.copy_from_slice(grad_probs);
        }
        let scores = if scoring.sigmoid {
            &sigmoids
        } else {
            &softened
        };
        let routed = token * top_k..(token + 1) * top_k;
        let experts = &experts[routed.clone()];
        let grad_weights = &grads.weights[routed];
        let mut factor = scoring.scale as f32;
        let mut mean = 0.0;
        if scoring.normalize {
            // A routing weight is a score over the sum of the chosen scores.
            let chosen = experts
                .iter()
                .map(|&expert| scores[expert as usize])
                .sum::<f32>()
                + TINY;
            mean = experts
                .iter()
                .zip(grad_weights)
                .map(|(&expert, grad)| scores[expert as usize] * grad)
                .sum::<f32>()
                / chosen;
            factor /= chosen;
        }
        for (&expert, grad) in experts.iter().zip(grad_weights) {
            grad_scores[expert as usize] += (grad - mean) * factor;
        }
        let grad_normalizer = 2.0 * grads.z * normalizer;
        if scoring.sigmoid {
            let inputs = grad_scores.iter().zip(&sigmoids).zip(&softened);
            for (out, ((grad, score), soft)) in out.iter_mut().zip(inputs) {
                *out = grad * score * (1.0 - score) + grad_normalizer * soft;
            }
        } else {
            let mean = grad_scores
                .iter()
                .zip(&softened)
                .map(|(grad, soft)| grad * soft)
                .sum::<f32>();
            let inputs = grad_scores.iter().zip(&softened);
            for (out, (grad, soft)) in out.iter_mut().zip(inputs) {
                *out = soft * (grad - mean + grad_normalizer);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tensors::{
        FIRST_DIM, LAST_DIM, slice_rows,
        tests::{TestTensor, randn},
    };
    use proptest::prelude::*;
    use tch::kind::INT64_CPU;

    /// Returns consecutive ranges of these lengths.
    pub(crate) fn consecutive(lens: &[usize]) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        let mut end = 0;
        for len in lens {
            ranges.push(end..end + len);
            end += len;
        }
        ranges
    }

    /// Returns the outputs of the router, by libtorch in fp64.
    pub(crate) fn plain(
        logits: &Tensor,
        experts: &Tensor,
        scoring: RouterScoring,
        groups: &[Range<usize>],
    ) -> [Tensor; 3] {
        let sum = |x: &Tensor| x.sum_dim_intlist(LAST_DIM, true, Kind::Double);
        let soft = logits.softmax(-1, Kind::Double);
        let scores = if scoring.sigmoid {
            logits.sigmoid()
        } else {
            soft
        };
        let chosen = scores.gather(1, experts, false);
        let weights = if scoring.normalize {
            &chosen / sum(&chosen)
        } else {
            chosen
        } * scoring.scale;
        let probs = &scores / sum(&scores);
        let group_sum = |group: &Range<usize>| {
            slice_rows(&probs, group).sum_dim_intlist(FIRST_DIM, false, Kind::Double)
        };
        let sums: Vec<Tensor> = groups.iter().map(group_sum).collect();
        let normalizers = logits.logsumexp(LAST_DIM, false);
        let z_sum = normalizers.square().sum(Kind::Double);
        [weights, Tensor::stack(&sums, 0), z_sum]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn it_matches_libtorch(
            lens in proptest::collection::vec(0usize..150, 1..4),
            width in 1i64..40,
            top_k in 1i64..9,
            threads in 1i32..4,
            sigmoid: bool,
            normalize: bool,
            which in 1usize..8,
        ) {
            tch::set_num_threads(threads);
            let top_k = top_k.min(width);
            let groups = consecutive(&lens);
            let count = lens.iter().sum::<usize>() as i64;
            let scoring = RouterScoring {
                sigmoid,
                normalize,
                scale: 1.5,
            };
            let logits = randn(&[count, width], Kind::Float) * 3.0;
            let experts = select_experts(&logits, None, top_k as usize, sigmoid);
            let ours = router(&logits, &experts, scoring, &groups);
            let ours = [ours.weights_tk, ours.prob_sums_ge, ours.z_sum];
            let wide = logits
                .to_f64()
                .set_requires_grad(true);
            let theirs = plain(&wide, &experts, scoring, &groups);
            // Only some of the outputs have a gradient.
            let random = |i: usize| {
                let wanted = which >> i & 1 > 0;
                wanted.then(|| randn(&theirs[i].size(), Kind::Float))
            };
            let grads: [Option<Tensor>; 3] = std::array::from_fn(random);
            let mut loss = wide.sum(Kind::Double) * 0.0;
            for (x, grad) in theirs.iter().zip(&grads) {
                if let Some(grad) = grad {
                    loss += (x * grad).sum(Kind::Double);
                }
            }
            loss.backward();
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let ours = ours.to_f64();
                prop_assert!(ours.allclose(&theirs.detach(), 1e-5, 1e-6, false));
            }
            let grads = RouterGradients {
                weights_tk: grads[0].as_ref(),
                prob_sums_ge: grads[1].as_ref(),
                z_sum: grads[2].as_ref(),
            };
            let gradient = router_backward(&logits, &experts, scoring, &groups, grads);
            let wide_gradient = gradient.to_f64();
            prop_assert!(wide_gradient.allclose(&wide.grad(), 1e-4, 1e-5, false));
            // The number of threads changes no bit.
            tch::set_num_threads(1);
            let again = router(&logits, &experts, scoring, &groups);
            prop_assert!(again.weights_tk == ours[0]);
            prop_assert!(again.prob_sums_ge == ours[1]);
            prop_assert!(again.z_sum == ours[2]);
            let again = router_backward(&logits, &experts, scoring, &groups, grads);
            prop_assert!(again == gradient);
        }

        #[test]
        fn the_best_experts_are_selected(
            count in 0i64..90,
            width in 1i64..40,
            top_k in 1i64..9,
            biased: bool,
            sigmoid: bool,
        ) {
            let top_k = top_k.min(width);
            let logits = randn(&[count, width], Kind::Float);
            let bias = randn(&[width], Kind::Float) * 0.2;
            let scores = if sigmoid {
                logits.sigmoid()
            } else {
                logits.softmax(-1, Kind::Float)
            };
            let scores = if biased { scores + &bias } else { scores };
            let bias = biased.then_some(&bias);
            let ours = select_experts(&logits, bias, top_k as usize, sigmoid);
            let (best, _) = scores.topk(top_k, -1, true, true);
            prop_assert!(
                scores
                    .gather(1, &ours, false)
                    .allclose(&best, 1e-5, 1e-6, false)
            );
        }
    }

    #[test]
    fn ties_go_to_the_first_expert_and_nan_scores_still_choose() {
        let logits =
            Tensor::from_slice(&[1f32, 2.0, 2.0, 2.0, f32::NAN, 0.0, 1.0, 0.0]).view([2, 4]);
        let chosen: Vec<i64> =
            Vec::try_from(select_experts(&logits, None, 3, false).view([-1])).unwrap();
        assert_eq!(chosen[..3], [1, 2, 3]);
        let mut second = chosen[3..].to_vec();
        second.sort_unstable();
        second.dedup();
        let is_valid = |expert: &i64| (0..4).contains(expert);
        assert!(second.len() == 3 && second.iter().all(is_valid));
        let scoring = RouterScoring {
            sigmoid: false,
            normalize: false,
            scale: 1.0,
        };
        let experts = Tensor::zeros([2, 1], INT64_CPU);
        let output = router(&logits, &experts, scoring, &[0..1, 1..2]);
        assert!(output.z_sum.double_value(&[]).is_nan());
        assert!(output.weights_tk.double_value(&[1, 0]).is_nan());
    }
}
