//! Causal flash attention in host memory (arXiv 2307.08691), and the parts of attention elsewhere.
//!
//! On some processors our own loops run, which need no copies of the key heads and skip the keys
//! outside of a sliding window. Elsewhere libtorch's kernel runs.

mod block;
mod heads;
mod largest_score;
#[cfg(target_arch = "x86_64")]
mod loops;
mod mask;
mod options;
mod sinks;

pub use block::{QUERY_TILE, ScoreMask, block_attention, block_attention_backward};
pub use heads::{repeat_heads, sum_repeated_heads};
pub use largest_score::raise_to_largest_scores;
pub use mask::{added_mask, causal_part};
pub use options::AttentionOptions;
pub use sinks::{add_sinks, sinks_gradient};

use crate::{
    profile::{Cost, span},
    tensors::sizes,
};
use tch::{Device, Tensor};

/// Divisor of the widths of heads that our own loops take, on processors that have them.
pub const HEAD_MULTIPLE: usize = 16;

/// Returns causal attention `[B, H, S, dv]` and the log-sum-exp of its scores `[B, H, S]` fp32.
///
/// Queries are `[B, H, S, dk]`, keys `[B, G, S, dk]` and values `[B, G, S, dv]`, in host memory and
/// of one dtype. Each key head serves `H / G` consecutive query heads.
///
/// # Panics
/// If the shapes do not match, or the window is empty.
pub fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    options: &AttentionOptions,
) -> (Tensor, Tensor) {
    let inputs = [query, key, value];
    check(inputs, options);
    let gemms = Gemms {
        of_keys: 1.0,
        of_values: 1.0,
    };
    let cost = || cost(inputs, options, &gemms);
    span("attention", "forward", cost, || forward(inputs, options))
}

fn forward(inputs: [&Tensor; 3], options: &AttentionOptions) -> (Tensor, Tensor) {
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = loops::supports_attention(inputs, options) {
        return loops::attention(inputs, options, instructions);
    }
    block_attention(inputs, ScoreMask::Causal(options.window), options.scale)
}

/// Returns the gradients of queries, keys and values, in their dtype.
///
/// `grad` is the gradient of the output. `out` and `lse` are the results of [`attention`], or of
/// attention over more keys than these, such as [`add_sinks`].
///
/// # Panics
/// If the shapes do not match, or the window is empty.
pub fn attention_backward(
    grad: &Tensor,
    inputs: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    options: &AttentionOptions,
) -> [Tensor; 3] {
    check(inputs, options);
    let [query, _, value] = inputs;
    let mut shape = query.size();
    shape[3] = value.size()[3];
    assert!(
        grad.size() == shape && out.size() == shape,
        "attention: the shape of gradient or output is not {shape:?}"
    );
    let grad = grad.to_kind(query.kind());
    let grad = if grad.stride()[3] == 1 {
        grad
    } else {
        grad.contiguous()
    };
    let gemms = Gemms {
        of_keys: 3.0,
        of_values: 2.0,
    };
    let cost = || cost(inputs, options, &gemms);
    span("attention", "backward", cost, || {
        backward(&grad, inputs, out, lse, options)
    })
}

fn backward(
    grad: &Tensor,
    inputs: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    options: &AttentionOptions,
) -> [Tensor; 3] {
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = loops::supports_attention(inputs, options)
        .filter(|_| lse.is_contiguous() && out.stride()[3] == 1)
    {
        return loops::attention_backward(grad, inputs, out, lse, options, instructions);
    }
    let mask = ScoreMask::Causal(options.window);
    block_attention_backward(grad, inputs, out, lse, mask, options.scale)
        .map(|gradient| gradient.to_kind(grad.kind()))
}

/// Numbers of GEMMs over all pairs of a query and a key that it sees.
struct Gemms {
    /// GEMMs over the width of a key.
    of_keys: f64,
    /// GEMMs over the width of a value.
    of_values: f64,
}

fn cost([query, key, value]: [&Tensor; 3], options: &AttentionOptions, gemms: &Gemms) -> Cost {
    let [batch, heads, length, key_width] = sizes(query);
    let [_, _, _, value_width] = sizes(value);
    let window = options.keys_per_query(length) as f64;
    let rows = (batch * heads * length) as f64;
    // Queries at the start of a sequence see a triangle of keys.
    let pairs = rows * (window - window * window / (2.0 * length as f64));
    let widths = gemms.of_keys * key_width as f64 + gemms.of_values * value_width as f64;
    let of_keys = query.numel() + key.numel();
    let of_values = rows * value_width as f64 + value.numel() as f64;
    let elements = gemms.of_keys * of_keys as f64 + gemms.of_values * of_values;
    Cost {
        flops: 2.0 * pairs * widths,
        bytes: elements * query.kind().elt_size_in_bytes() as f64,
    }
}

fn check([query, key, value]: [&Tensor; 3], options: &AttentionOptions) {
    let q = query.size();
    let k = key.size();
    let v = value.size();
    let alike = [&q, &k, &v].iter().all(|size| size.len() == 4)
        && [q[0], q[2], q[3]] == [k[0], k[2], k[3]]
        && v[..3] == k[..3];
    let same_kind = query.kind() == key.kind() && query.kind() == value.kind();
    let on_host = query.device() == Device::Cpu;
    let divides = alike && k[1] > 0 && q[1] % k[1] == 0;
    assert!(
        divides && same_kind && on_host,
        "attention: unsupported shapes, query {q:?}, key {k:?} and value {v:?}"
    );
    let window = options.window;
    assert!(
        window.is_none_or(|window| window > 0),
        "attention: empty window"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::{
        LAST_DIM,
        tests::{TestTensor, tolerances},
    };
    use proptest::prelude::*;
    use tch::{Kind, kind::FLOAT_CPU};

    /// Returns attention and log-sum-exps in fp64, with sinks `[H]` as logits of one more key, as
    /// gpt-oss computes them.
    fn plain_attention(
        [query, key, value]: [&Tensor; 3],
        sinks: Option<&Tensor>,
        options: &AttentionOptions,
    ) -> (Tensor, Tensor) {
        let times = query.size()[1] / key.size()[1];
        let key = key.repeat_interleave_self_int(times, 1, None);
        let value = value.repeat_interleave_self_int(times, 1, None);
        let length = query.size()[2];
        let position = Tensor::arange(length, (Kind::Int64, Device::Cpu));
        let distance = position.unsqueeze(1) - position.unsqueeze(0);
        let far = distance.ge(options.window.unwrap_or(length));
        let mut scores = (query.matmul(&key.transpose(2, 3)) * options.scale)
            .masked_fill(&distance.lt(0).logical_or(&far), f64::NEG_INFINITY);
        if let Some(sinks) = sinks {
            let [batch, heads, length] = sizes(query).map(|size| size as i64);
            let sinks = sinks.view([1, heads, 1, 1]);
            let column = sinks.expand([batch, heads, length, 1], false);
            scores = Tensor::cat(&[scores, column], -1);
        }
        let weights = scores.softmax(-1, Kind::Double).narrow(-1, 0, length);
        (weights.matmul(&value), scores.logsumexp(LAST_DIM, false))
    }

    /// Returns the largest difference over the largest element of `b`, which is taken to be at
    /// least `cancels`: with one key, for example, the gradient of the scores cancels to zero.
    fn off(a: &Tensor, b: &Tensor, cancels: f64) -> f64 {
        let most = |x: &Tensor| f64::try_from(x.abs().max()).unwrap();
        most(&(a.to_f64() - b)) / most(b).max(cancels)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn it_matches_the_formula_in_fp64(
            batch in 1i64..3,
            kv_heads in 1i64..4,
            times in 1i64..4,
            length in prop_oneof![1i64..70, 200i64..620],
            key_width in 1i64..9,
            value_width in 1i64..9,
            same_width: bool,
            window in prop_oneof![Just(None), (1i64..700).prop_map(Some)],
            with_sinks: bool,
            transposed: bool,
            odd: bool,
            large: bool,
            seed in 0i64..1000,
        ) {
            tch::set_num_threads(1);
            tch::manual_seed(seed);
            let elements = |lines: i64| if odd { 16 * lines - 4 } else { 16 * lines };
            let width = elements(key_width);
            let value_width = if same_width {
                width
            } else {
                elements(value_width)
            };
            let magnitude = if large { 5.0 } else { 1.0 };
            let random = |heads: i64, width: i64, kind| {
                let shape = [batch, length, heads, width];
                let x = Tensor::randn(shape, FLOAT_CPU) * magnitude;
                let x = x.to_kind(kind).transpose(1, 2);
                if transposed { x } else { x.contiguous() }
            };
            let options = AttentionOptions {
                scale: 0.7 / (width as f64).sqrt(),
                window,
            };
            // The error of a weight is the rounding error of its score, which grows with the score.
            let cancels = if large { 30.0 } else { 0.1 };
            for (kind, tolerance) in tolerances(2e-5, 2e-2) {
                let tolerance = tolerance * magnitude;
                let heads = times * kv_heads;
                let [q, grad] = [width, value_width].map(|width| random(heads, width, kind));
                let [k, v] = [width, value_width].map(|width| random(kv_heads, width, kind));
                let sinks = Tensor::randn([heads], FLOAT_CPU) * magnitude * 2.0;
                let wide = [&q, &k, &v].map(|x| x.to_f64().set_requires_grad(true));
                let wide_sinks = sinks
                    .to_f64()
                    .set_requires_grad(true);
                let used_sinks = with_sinks.then_some(&wide_sinks);
                let (expected, expected_lse) =
                    plain_attention(wide.each_ref(), used_sinks, &options);
                (&expected * grad.to_f64())
                    .sum(Kind::Double)
                    .backward();
                let (mut out, mut lse) = attention(&q, &k, &v, &options);
                if with_sinks {
                    (out, lse) = add_sinks(out, &lse, &sinks);
                }
                prop_assert!(off(&out, &expected.detach(), cancels) < tolerance);
                prop_assert!(off(&lse, &expected_lse.detach(), cancels) < tolerance);
                if with_sinks {
                    let ours = sinks_gradient(&grad, &out, &lse, &sinks);
                    // A sum over all positions, each with the error of its output.
                    let off = off(&ours, &wide_sinks.grad(), cancels);
                    prop_assert!(off < tolerance * 4.0, "sinks {:?} {}", kind, off);
                }
                let grads = attention_backward(&grad, [&q, &k, &v], &out, &lse, &options);
                for (ours, wide) in grads.iter().zip(&wide) {
                    let off = off(ours, &wide.grad(), cancels);
                    prop_assert!(off < tolerance, "{:?} {}", kind, off);
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let random = |heads: i64| {
            let shape = [3, heads, 330, 32];
            Tensor::randn(shape, (Kind::BFloat16, Device::Cpu))
        };
        let [q, grad] = [(); 2].map(|()| random(4));
        let [k, v] = [(); 2].map(|()| random(2));
        for window in [None, Some(40)] {
            let options = AttentionOptions { scale: 0.2, window };
            let all = |threads| {
                tch::set_num_threads(threads);
                let (out, lse) = attention(&q, &k, &v, &options);
                let [a, b, c] = attention_backward(&grad, [&q, &k, &v], &out, &lse, &options);
                [out, lse, a, b, c]
            };
            for (one, three) in all(1).iter().zip(&all(3)) {
                assert!(one.equal(three));
            }
        }
    }
}
