//! What a router makes of its logits, and their gradient: one pass over tokens each way. It is a few numbers a token, so that
//! some thirty operations of libtorch for them cost what calling them costs.
// Shapes: T tokens, E experts, K choices of a token, G groups of tokens.

use crate::cuda;
use crate::exponential::exp;
use crate::profile::{Cost, part};
use crate::rows::{Indices, Numbers, for_rows, host_kind};
use crate::softmax::exponentials;
use multiversion::multiversion;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Tokens whose sums are added up together, whatever the number of threads.
const CHUNK: usize = 64;
/// How many numbers of a plain pass one logit costs.
const COSTS: usize = 8;
/// Keeps a sum of scores something to divide by.
const TINY: f32 = 1e-20;

/// How logits become weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterScoring {
    /// Whether each logit's score is its sigmoid, instead of the softmax over all.
    pub sigmoid: bool,
    /// Whether the weights of a token's choices are made to sum to one.
    pub normalize: bool,
    /// Factor on all weights, after that.
    pub scale: f64,
}

/// What became of logits.
pub struct RouterOutput {
    /// `[T, K]` fp32: the weight of each choice.
    pub weights_tk: Tensor,
    /// `[G, E]` fp32: over a group's tokens, the sum of scores that sum to one over the experts.
    pub prob_sums_ge: Tensor,
    /// `[]` fp32: the sum over all tokens of the square of their logits' log-sum-exp.
    pub z_sum: Tensor,
}

/// Whether [`select_experts`], [`router`] and [`router_backward`] go through such logits.
pub fn supports_router(logits_te: &Tensor) -> bool {
    let fits = logits_te.kind() == Kind::Float && logits_te.dim() == 2 && logits_te.size()[1] > 0;
    fits && (host_kind(&[logits_te]).is_some() || gpu(logits_te).is_some())
}

fn gpu(logits_te: &Tensor) -> Option<&'static dyn cuda::Gpu> {
    cuda::gpu(&[logits_te]).filter(|_| logits_te.size()[1] as usize <= cuda::MAX_EXPERTS)
}

/// The `top_k` experts with the highest scores, plus `bias_e` `[E]` fp32, of each token's logits `[T, E]`: `[T, K]` int64, the best
/// first, of equals that with the lower number.
///
/// # Panics
/// When there are fewer experts, or the logits are not such as [`supports_router`] says.
pub fn select_experts(
    logits_te: &Tensor,
    bias_e: Option<&Tensor>,
    top_k: usize,
    sigmoid: bool,
) -> Tensor {
    assert!(supports_router(logits_te));
    let count = logits_te.size()[0];
    let width = logits_te.size()[1] as usize;
    assert!(top_k <= width, "{top_k} of {width} experts");
    let cost = || Cost::passes(1.0, logits_te);
    if let Some(gpu) = gpu(logits_te) {
        let by_gpu = || cuda::select_experts(gpu, logits_te, bias_e, top_k, sigmoid);
        return part("router", "select_experts", cost, by_gpu);
    }
    let bias = bias_e.map(|bias| Vec::<f32>::try_from(bias).expect("the bias is fp32"));
    let bias = bias.unwrap_or_else(|| vec![0.0; width]);
    let chosen = Tensor::empty([count, top_k as i64], (Kind::Int64, logits_te.device()));
    // SAFETY: in host memory without gaps, of the types that are named.
    let (logits, to) = unsafe { (Numbers::<f32>::of(logits_te), Numbers::<i64>::of(&chosen)) };
    part("router", "select_experts", cost, || {
        for_rows(count as usize, COSTS * width, |_, rows| {
            // SAFETY: parts of threads do not overlap.
            let to = unsafe { to.part_mut(&rows, top_k) };
            select_experts_rows(logits.part(&rows, width), &bias, sigmoid, to, top_k);
        });
    });
    chosen
}

/// Weights of the choices `experts_tk` `[T, K]` int64 by logits `[T, E]`, and what losses of balance are made of, for `groups` of
/// neighbouring tokens, one after another, that hold all of them.
///
/// # Panics
/// When the logits are not such as [`supports_router`] says, the groups do not hold all tokens in order, or an expert is not a column.
pub fn router(
    logits_te: &Tensor,
    experts_tk: &Tensor,
    router: RouterScoring,
    groups: &[Range<usize>],
) -> RouterOutput {
    let cost = || Cost::passes(1.0, logits_te);
    if let Some(gpu) = gpu(logits_te) {
        check_inputs(logits_te, experts_tk, groups);
        return part("router", "forward", cost, || {
            cuda::router(gpu, logits_te, experts_tk, router, groups)
        });
    }
    let all = Tokens::of(logits_te, experts_tk, groups);
    let width = all.width;
    let top_k = all.top_k;
    let fresh = |shape: &[i64]| Tensor::empty(shape, (Kind::Float, logits_te.device()));
    let weights_tk = fresh(&experts_tk.size());
    let mut sums = vec![0f64; groups.len() * width];
    let mut z_sum = 0.0;
    part("router", "forward", cost, || {
        let partial = Tensor::empty(
            [all.chunks.len() as i64, width as i64 + 1],
            (Kind::Double, logits_te.device()),
        );
        // SAFETY: in host memory without gaps, of the types that are named.
        let (weights, partial) = unsafe {
            (
                Numbers::<f32>::of(&weights_tk),
                Numbers::<f64>::of(&partial),
            )
        };
        all.for_chunks(|index, Chunk { tokens, .. }| {
            let place = index..index + 1;
            // SAFETY: a chunk's are one part's.
            let (weights, sums) = unsafe {
                (
                    weights.part_mut(tokens, top_k),
                    partial.part_mut(&place, width + 1),
                )
            };
            forward(
                all.logits(tokens),
                all.experts(tokens),
                router,
                weights,
                sums,
            );
        });
        for (index, chunk) in all.chunks.iter().enumerate() {
            let (z, here) = partial
                .part(&(index..index + 1), width + 1)
                .split_last()
                .expect("there is one more");
            sums[chunk.group * width..]
                .iter_mut()
                .zip(here)
                .for_each(|(sum, x)| *sum += x);
            z_sum += z;
        }
    });
    let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
    let prob_sums_ge = Tensor::from_slice(&sums).view([groups.len() as i64, width as i64]);
    RouterOutput {
        weights_tk,
        prob_sums_ge,
        z_sum: Tensor::from(z_sum as f32),
    }
}

/// The gradient of logits `[T, E]`, from those of what [`router`] made of them; of each that has one.
///
/// # Panics
/// As [`router`].
pub fn router_backward(
    logits_te: &Tensor,
    experts_tk: &Tensor,
    router: RouterScoring,
    groups: &[Range<usize>],
    [grad_weights, grad_sums, grad_z]: [Option<&Tensor>; 3],
) -> Tensor {
    let cost = || Cost::passes(2.0, logits_te);
    if let Some(gpu) = gpu(logits_te) {
        check_inputs(logits_te, experts_tk, groups);
        let of = [grad_weights, grad_sums, grad_z];
        return part("router", "backward", cost, || {
            cuda::router_backward(gpu, logits_te, experts_tk, router, groups, of)
        });
    }
    let all = Tokens::of(logits_te, experts_tk, groups);
    let width = all.width;
    let top_k = all.top_k;
    let gradient = Tensor::empty(logits_te.size(), (Kind::Float, logits_te.device()));
    let numbers = |tensor: Option<&Tensor>, count: usize| match tensor {
        Some(tensor) => {
            Vec::<f32>::try_from(tensor.contiguous().view([-1])).expect("gradients are fp32")
        }
        None => vec![0.0; count],
    };
    part("router", "backward", cost, || {
        let grad_weights = numbers(grad_weights, experts_tk.numel());
        let grad_sums = numbers(grad_sums, groups.len() * width);
        let grad_z = numbers(grad_z, 1)[0];
        // SAFETY: in host memory without gaps, fp32.
        let to = unsafe { Numbers::<f32>::of(&gradient) };
        all.for_chunks(|_, Chunk { group, tokens }| {
            let grad_weights = &grad_weights[tokens.start * top_k..tokens.end * top_k];
            let grad_probs = &grad_sums[group * width..(group + 1) * width];
            // SAFETY: a chunk's are one part's.
            let to = unsafe { to.part_mut(tokens, width) };
            backward(
                all.logits(tokens),
                all.experts(tokens),
                router,
                (grad_weights, grad_probs, grad_z),
                to,
            );
        });
    });
    gradient
}

/// Panics unless choices are such as go with logits, and groups hold all tokens in order.
fn check_inputs(logits_te: &Tensor, experts_tk: &Tensor, groups: &[Range<usize>]) {
    let count = logits_te.size()[0] as usize;
    let in_order = groups
        .iter()
        .try_fold(0, |end, group| (group.start == end).then_some(group.end));
    assert!(
        supports_router(logits_te) && in_order == Some(count),
        "{groups:?} are not {count} tokens"
    );
    assert!(
        cuda::same_device_contiguous(logits_te, experts_tk, Kind::Int64)
            && experts_tk.size()[0] as usize == count
    );
}

/// Neighbouring tokens of a group.
struct Chunk {
    group: usize,
    tokens: Range<usize>,
}

/// Tokens' logits and choices, in chunks.
struct Tokens<'a> {
    logits: Numbers<f32>,
    experts: Indices<'a>,
    width: usize,
    top_k: usize,
    chunks: Vec<Chunk>,
}

impl<'a> Tokens<'a> {
    fn of(logits_te: &'a Tensor, experts_tk: &'a Tensor, groups: &[Range<usize>]) -> Tokens<'a> {
        check_inputs(logits_te, experts_tk, groups);
        let width = logits_te.size()[1] as usize;
        // SAFETY: in host memory without gaps, of the types that are named.
        let (logits, experts) = unsafe { (Numbers::<f32>::of(logits_te), Indices::of(experts_tk)) };
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
            top_k: experts_tk.size()[1] as usize,
            chunks: chunks.collect(),
        }
    }

    fn logits(&self, tokens: &Range<usize>) -> &[f32] {
        self.logits.part(tokens, self.width)
    }

    fn experts(&self, tokens: &Range<usize>) -> &[i64] {
        self.experts.part(tokens, self.top_k)
    }

    /// Calls `body` for each chunk, and its number, on as many threads as that is worth.
    fn for_chunks(&self, body: impl Fn(usize, &Chunk) + Sync) {
        for_rows(
            self.chunks.len(),
            CHUNK * COSTS * self.width,
            |_, chunks| {
                chunks.for_each(|index| body(index, &self.chunks[index]));
            },
        );
    }
}

/// A token's softmax into `probs`: its logits' log-sum-exp.
#[inline(always)]
fn softmax(logits: &[f32], probs: &mut [f32]) -> f32 {
    let (largest, sum) = exponentials(logits, probs, 1.0);
    probs.iter_mut().for_each(|prob| *prob /= sum);
    largest + sum.ln()
}

#[inline(always)]
fn sigmoid(logits: &[f32], scores: &mut [f32]) {
    scores
        .iter_mut()
        .zip(logits)
        .for_each(|(score, logit)| *score = 1.0 / (1.0 + exp(-logit)));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn select_experts_rows(
    logits: &[f32],
    bias: &[f32],
    by_sigmoid: bool,
    to: &mut [i64],
    top_k: usize,
) {
    let width = bias.len();
    let mut scores = vec![0f32; width];
    for (logits, to) in logits
        .chunks_exact(width)
        .zip(to.chunks_exact_mut(top_k.max(1)))
    {
        if by_sigmoid {
            sigmoid(logits, &mut scores)
        } else {
            softmax(logits, &mut scores);
        }
        scores
            .iter_mut()
            .zip(bias)
            .for_each(|(score, bias)| *score += bias);
        for place in 0..to.len() {
            let (taken, rest) = to.split_at_mut(place);
            // What is not a number is never better, but somebody is chosen all the same.
            let mut best: Option<usize> = None;
            for (expert, &score) in scores.iter().enumerate() {
                if best.is_none_or(|best| score > scores[best]) && !taken.contains(&(expert as i64))
                {
                    best = Some(expert);
                }
            }
            rest[0] = best.expect("there are no fewer experts than choices") as i64;
        }
    }
}

/// Weights, and sums over these tokens: of each expert's probabilities, then of squared log-sum-exps.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn forward(
    logits: &[f32],
    experts: &[i64],
    router: RouterScoring,
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
        if router.sigmoid {
            sigmoid(logits, &mut scores);
            let all = scores.iter().sum::<f32>() + TINY;
            probs
                .iter_mut()
                .zip(&scores)
                .for_each(|(prob, score)| *prob = score / all);
        }
        let scores = if router.sigmoid { &scores } else { &probs };
        let place = token * top_k..(token + 1) * top_k;
        let mut chosen = 0.0;
        for (weight, &expert) in weights[place.clone()]
            .iter_mut()
            .zip(&experts[place.clone()])
        {
            *weight = scores[expert as usize];
            chosen += *weight;
        }
        let factor = router.scale as f32 / if router.normalize { chosen + TINY } else { 1.0 };
        weights[place]
            .iter_mut()
            .for_each(|weight| *weight *= factor);
        sums.iter_mut()
            .zip(&probs)
            .for_each(|(sum, prob)| *sum += f64::from(*prob));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn backward(
    logits: &[f32],
    experts: &[i64],
    router: RouterScoring,
    (grad_weights, grad_probs, grad_z): (&[f32], &[f32], f32),
    to: &mut [f32],
) {
    let width = grad_probs.len();
    let mut softened = vec![0f32; width];
    let mut sigmoids = vec![0f32; width];
    let mut grad_scores = vec![0f32; width];
    let top_k = experts.len() * width / logits.len();
    for (token, (logits, to)) in logits
        .chunks_exact(width)
        .zip(to.chunks_exact_mut(width))
        .enumerate()
    {
        let normalizer = softmax(logits, &mut softened);
        if router.sigmoid {
            sigmoid(logits, &mut sigmoids);
            // A probability is a score over the sum of all.
            let all = sigmoids.iter().sum::<f32>() + TINY;
            let mean = sigmoids
                .iter()
                .zip(grad_probs)
                .map(|(score, of)| score * of)
                .sum::<f32>()
                / all;
            grad_scores
                .iter_mut()
                .zip(grad_probs)
                .for_each(|(to, of)| *to = (of - mean) / all);
        } else {
            grad_scores.copy_from_slice(grad_probs);
        }
        let scores = if router.sigmoid { &sigmoids } else { &softened };
        let place = token * top_k..(token + 1) * top_k;
        let experts = &experts[place.clone()];
        let grad_weights = &grad_weights[place];
        let mut factor = router.scale as f32;
        let mut mean = 0.0;
        if router.normalize {
            // A weight is a score over the sum of those that were chosen.
            let chosen = experts
                .iter()
                .map(|&expert| scores[expert as usize])
                .sum::<f32>()
                + TINY;
            mean = experts
                .iter()
                .zip(grad_weights)
                .map(|(&expert, of)| scores[expert as usize] * of)
                .sum::<f32>()
                / chosen;
            factor /= chosen;
        }
        for (&expert, of) in experts.iter().zip(grad_weights) {
            grad_scores[expert as usize] += (of - mean) * factor;
        }
        let grad_normalizer = 2.0 * grad_z * normalizer;
        if router.sigmoid {
            for (to, ((of, score), soft)) in to
                .iter_mut()
                .zip(grad_scores.iter().zip(&sigmoids).zip(&softened))
            {
                *to = of * score * (1.0 - score) + grad_normalizer * soft;
            }
        } else {
            let mean = grad_scores
                .iter()
                .zip(&softened)
                .map(|(of, soft)| of * soft)
                .sum::<f32>();
            for (to, (of, soft)) in to.iter_mut().zip(grad_scores.iter().zip(&softened)) {
                *to = soft * (of - mean + grad_normalizer);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    pub(crate) fn plain(
        logits: &Tensor,
        experts: &Tensor,
        router: RouterScoring,
        groups: &[Range<usize>],
    ) -> [Tensor; 3] {
        let sum = |x: &Tensor| x.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        let soft = logits.softmax(-1, Kind::Double);
        let scores = if router.sigmoid {
            logits.sigmoid()
        } else {
            soft
        };
        let chosen = scores.gather(1, experts, false);
        let weights = if router.normalize {
            &chosen / sum(&chosen)
        } else {
            chosen
        } * router.scale;
        let probs = &scores / sum(&scores);
        let of = |group: &Range<usize>| {
            let probs = probs.narrow(0, group.start as i64, group.len() as i64);
            probs.sum_dim_intlist([0i64].as_slice(), false, Kind::Double)
        };
        let sums = Tensor::stack(&groups.iter().map(of).collect::<Vec<_>>(), 0);
        [
            weights,
            sums,
            logits
                .logsumexp([-1i64].as_slice(), false)
                .square()
                .sum(Kind::Double),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn it_is_what_libtorch_makes_of_them(
            lens in proptest::collection::vec(0usize..150, 1..4), width in 1i64..40, top_k in 1i64..9, threads in 1i32..4,
            sigmoid: bool, normalize: bool, which in 1usize..8,
        ) {
            tch::set_num_threads(threads);
            let top_k = top_k.min(width);
            let groups: Vec<_> = lens.iter().scan(0, |end, len| { *end += len; Some(*end - len..*end) }).collect();
            let count = lens.iter().sum::<usize>() as i64;
            let router = RouterScoring { sigmoid, normalize, scale: 1.5 };
            let logits = Tensor::randn([count, width], (Kind::Float, Device::Cpu)) * 3.0;
            let experts = select_experts(&logits, None, top_k as usize, sigmoid);
            let made = super::router(&logits, &experts, router, &groups);
            let ours = [made.weights_tk, made.prob_sums_ge, made.z_sum];
            let wide = logits.to_kind(Kind::Double).set_requires_grad(true);
            let theirs = plain(&wide, &experts, router, &groups);
            // The gradients of some of them.
            let grads: Vec<_> = theirs.iter().map(|x| Tensor::randn(x.size(), (Kind::Float, Device::Cpu))).collect();
            let some: [Option<&Tensor>; 3] = std::array::from_fn(|i| (which >> i & 1 > 0).then_some(&grads[i]));
            let mut loss = wide.sum(Kind::Double) * 0.0;
            for (x, grad) in theirs.iter().zip(some) {
                if let Some(grad) = grad {
                    loss += (x * grad).sum(Kind::Double);
                }
            }
            loss.backward();
            for (ours, theirs) in ours.iter().zip(&theirs) {
                prop_assert!(ours.to_kind(Kind::Double).allclose(&theirs.detach(), 1e-5, 1e-6, false));
            }
            let gradient = router_backward(&logits, &experts, router, &groups, some);
            prop_assert!(gradient.to_kind(Kind::Double).allclose(&wide.grad(), 1e-4, 1e-5, false));
            // Threads change no bit.
            tch::set_num_threads(1);
            let alone = super::router(&logits, &experts, router, &groups);
            prop_assert!(alone.prob_sums_ge == ours[1] && alone.z_sum == ours[2] && alone.weights_tk == ours[0]);
            prop_assert!(router_backward(&logits, &experts, router, &groups, some) == gradient);
        }

        #[test]
        fn the_best_are_chosen(count in 0i64..90, width in 1i64..40, top_k in 1i64..9, biased: bool, sigmoid: bool) {
            let top_k = top_k.min(width);
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
            let (logits, bias) = (random(&[count, width]), random(&[width]) * 0.2);
            let scores = if sigmoid { logits.sigmoid() } else { logits.softmax(-1, Kind::Float) };
            let scores = if biased { scores + &bias } else { scores };
            let ours = select_experts(&logits, biased.then_some(&bias), top_k as usize, sigmoid);
            let (best, _) = scores.topk(top_k, -1, true, true);
            prop_assert!(scores.gather(1, &ours, false).allclose(&best, 1e-5, 1e-6, false));
        }
    }

    #[test]
    fn of_equals_the_first_is_chosen_and_of_what_is_no_number_somebody() {
        let logits =
            Tensor::from_slice(&[1f32, 2.0, 2.0, 2.0, f32::NAN, 0.0, 1.0, 0.0]).view([2, 4]);
        let chosen: Vec<i64> =
            Vec::try_from(select_experts(&logits, None, 3, false).view([-1])).unwrap();
        assert_eq!(chosen[..3], [1, 2, 3]);
        let mut second = chosen[3..].to_vec();
        second.sort_unstable();
        second.dedup();
        assert!(second.len() == 3 && second.iter().all(|expert| (0..4).contains(expert)));
        let plain = RouterScoring {
            sigmoid: false,
            normalize: false,
            scale: 1.0,
        };
        let made = router(
            &logits,
            &Tensor::zeros([2, 1], (Kind::Int64, Device::Cpu)),
            plain,
            &[0..1, 1..2],
        );
        assert!(
            made.z_sum.double_value(&[]).is_nan() && made.weights_tk.double_value(&[1, 0]).is_nan()
        );
    }
}
