//! Causal flash attention in host memory (arXiv 2307.08691).
//!
//! On some processors our own loops run, which need no copies of the key heads. Elsewhere
//! libtorch's kernel runs.

#[cfg(target_arch = "x86_64")]
mod loops;

use crate::profile::{Cost, span};
use crate::tensors::sizes;
use tch::{Device, Kind, Tensor};

/// Returns causal attention `[B, H, S, d]` and the log-sum-exp of its scores `[B, H, S]` fp32.
///
/// Queries are `[B, H, S, d]`, keys and values `[B, G, S, d]`, in host memory and of one dtype.
/// Each key head serves `H / G` consecutive query heads.
///
/// # Panics
/// If the shapes do not match.
pub fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    score_scale: f64,
) -> (Tensor, Tensor) {
    check(query, key, value);
    let cost = || cost(query, key, 2.0);
    span("attention", "forward", cost, || {
        causal_attention(query, key, value, score_scale)
    })
}

fn causal_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    score_scale: f64,
) -> (Tensor, Tensor) {
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = loops::supports_attention(query, key, value) {
        return loops::attention([query, key, value], score_scale, instructions);
    }
    let times = query.size()[1] / key.size()[1];
    let [key, value] = [key, value].map(|x| repeat_heads(x, times));
    Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
        query,
        &key,
        &value,
        0.0,
        true,
        None::<&Tensor>,
        score_scale,
    )
}

/// Returns the gradients of queries, keys and values, in their dtype.
///
/// `grad` is the gradient of the output; `out` and `lse` are the results of [`attention`].
///
/// # Panics
/// If the shapes do not match.
pub fn attention_backward(
    grad: &Tensor,
    [query, key, value]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    scale: f64,
) -> [Tensor; 3] {
    check(query, key, value);
    assert!(
        grad.size() == query.size() && out.size() == query.size(),
        "attention: gradient or output differs from query shape {:?}",
        query.size()
    );
    let grad = grad.to_kind(query.kind());
    let grad = if grad.stride()[3] == 1 {
        grad
    } else {
        grad.contiguous()
    };
    let inputs = [query, key, value];
    let cost = || cost(query, key, 5.0);
    span("attention", "backward", cost, || {
        backward(&grad, inputs, out, lse, scale)
    })
}

/// Returns the cost of `products` GEMMs over all pairs of a query and an earlier key.
fn cost(query: &Tensor, key: &Tensor, products: f64) -> Cost {
    let [_, _, length] = sizes(query);
    let pairs = query.numel() as f64 * length as f64 / 2.0;
    let elements = (query.numel() + key.numel()) as f64;
    let bytes = elements * query.kind().elt_size_in_bytes() as f64;
    Cost {
        flops: products * 2.0 * pairs,
        bytes: products * bytes,
    }
}

fn backward(
    grad: &Tensor,
    [query, key, value]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    scale: f64,
) -> [Tensor; 3] {
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = loops::supports_attention(query, key, value)
        .filter(|_| lse.is_contiguous() && out.stride()[3] == 1)
    {
        let inputs = [query, key, value];
        return loops::attention_backward(grad, inputs, out, lse, scale, instructions);
    }
    let times = query.size()[1] / key.size()[1];
    let [key, value] = [key, value].map(|x| repeat_heads(x, times));
    let (grad_query, grad_key, grad_value) =
        Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            query,
            &key,
            &value,
            out,
            lse,
            0.0,
            true,
            None::<&Tensor>,
            scale,
        );
    let sum_heads = |grad: Tensor| {
        if times == 1 {
            grad
        } else {
            sum_repeated_heads(&grad, times).to_kind(grad.kind())
        }
    };
    [grad_query, sum_heads(grad_key), sum_heads(grad_value)]
}

fn check(query: &Tensor, key: &Tensor, value: &Tensor) {
    let q = query.size();
    let k = key.size();
    let alike = k == value.size() && q.len() == 4 && [q[0], q[2], q[3]] == [k[0], k[2], k[3]];
    let same_kind = query.kind() == key.kind() && query.kind() == value.kind();
    let on_host = query.device() == Device::Cpu;
    let divides = alike && k[1] > 0 && q[1] % k[1] == 0;
    assert!(
        divides && same_kind && on_host,
        "attention: unsupported shapes, query {q:?} and key {k:?}"
    );
}

/// Repeats each key or value head for every query head it serves: `[B, G, s, d]` to
/// `[B, G * times, s, d]`.
pub fn repeat_heads(x: &Tensor, times: i64) -> Tensor {
    if times == 1 {
        return x.shallow_clone();
    }
    let size = x.size();
    let batch = size[0];
    let heads = size[1];
    let length = size[2];
    let width = size[3];
    let repeated = x
        .unsqueeze(2)
        .expand([batch, heads, times, length, width], false);
    repeated.reshape([batch, heads * times, length, width])
}

/// Returns the gradient of [`repeat_heads`] in fp32.
pub fn sum_repeated_heads(grad: &Tensor, times: i64) -> Tensor {
    let size = grad.size();
    let batch = size[0];
    let heads = size[1];
    let length = size[2];
    let width = size[3];
    let grouped = grad
        .to_kind(Kind::Float)
        .view([batch, heads / times, times, length, width]);
    grouped.sum_dim_intlist([2i64].as_slice(), false, Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::LAST_DIM;
    use crate::tensors::tests::{TestTensor, tolerances};
    use proptest::prelude::*;
    use tch::kind::FLOAT_CPU;

    /// Returns attention and log-sum-exps in fp64.
    fn plain_attention(
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        score_scale: f64,
    ) -> (Tensor, Tensor) {
        let times = query.size()[1] / key.size()[1];
        let key = key.repeat_interleave_self_int(times, 1, None);
        let value = value.repeat_interleave_self_int(times, 1, None);
        let later = Tensor::ones([query.size()[2]; 2], (Kind::Bool, Device::Cpu)).triu(1);
        let scores = (query.matmul(&key.transpose(2, 3)) * score_scale)
            .masked_fill(&later, f64::NEG_INFINITY);
        let out = scores.softmax(-1, Kind::Double).matmul(&value);
        (out, scores.logsumexp(LAST_DIM, false))
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
            width in 1i64..9,
            transposed: bool,
            odd: bool,
            large: bool,
            seed in 0i64..1000,
        ) {
            tch::set_num_threads(1);
            tch::manual_seed(seed);
            let width = if odd { 16 * width - 4 } else { 16 * width };
            let magnitude = if large { 5.0 } else { 1.0 };
            let random = |heads: i64, kind| {
                let shape = [batch, length, heads, width];
                let x = Tensor::randn(shape, FLOAT_CPU) * magnitude;
                let x = x.to_kind(kind).transpose(1, 2);
                if transposed { x } else { x.contiguous() }
            };
            let scale = 0.7 / (width as f64).sqrt();
            // The error of a weight is the rounding error of its score, which grows with the score.
            let cancels = if large { 30.0 } else { 0.1 };
            for (kind, tolerance) in tolerances(2e-5, 2e-2) {
                let tolerance = tolerance * magnitude;
                let heads = times * kv_heads;
                let [q, grad] = [(); 2].map(|()| random(heads, kind));
                let [k, v] = [(); 2].map(|()| random(kv_heads, kind));
                let wide = [&q, &k, &v].map(|x| x.to_f64().set_requires_grad(true));
                let (expected, expected_lse) = plain_attention(&wide[0], &wide[1], &wide[2], scale);
                (&expected * grad.to_f64()).sum(Kind::Double).backward();
                let (out, lse) = attention(&q, &k, &v, scale);
                prop_assert!(off(&out, &expected.detach(), cancels) < tolerance);
                prop_assert!(off(&lse, &expected_lse.detach(), cancels) < tolerance);
                let grads = attention_backward(&grad, [&q, &k, &v], &out, &lse, scale);
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
            let shape = [3, heads, 130, 32];
            Tensor::randn(shape, (Kind::BFloat16, Device::Cpu))
        };
        let [q, grad] = [(); 2].map(|()| random(4));
        let [k, v] = [(); 2].map(|()| random(2));
        let all = |threads| {
            tch::set_num_threads(threads);
            let (out, lse) = attention(&q, &k, &v, 0.2);
            let [a, b, c] = attention_backward(&grad, [&q, &k, &v], &out, &lse, 0.2);
            [out, lse, a, b, c]
        };
        for (one, three) in all(1).iter().zip(&all(3)) {
            assert!(one.equal(three));
        }
    }
}
