//! Causal attention in host memory, forward and backward, without a matrix of scores (arXiv 2307.08691): on some processors by loops
//! of our own, which need no copies of key heads, elsewhere by libtorch's kernel.

#[cfg(target_arch = "x86_64")]
mod loops;

use crate::profile::{Cost, part};
use tch::{Device, Kind, Tensor};

/// Every query's average over the values of the keys that are not after it, `[B, H, S, d]`, and its log-sum-exp `[B, H, S]` fp32:
/// of queries `[B, H, S, d]`, keys and values `[B, G, S, d]`, in host memory and of one dtype. Key heads serve neighbouring query
/// heads, as many each.
///
/// # Panics
/// When the shapes do not fit each other.
pub fn attention(query: &Tensor, key: &Tensor, value: &Tensor, scale: f64) -> (Tensor, Tensor) {
    check(query, key, value);
    part(
        "attention",
        "forward",
        || cost(query, key, 2.0),
        || forward(query, key, value, scale),
    )
}

fn forward(query: &Tensor, key: &Tensor, value: &Tensor, scale: f64) -> (Tensor, Tensor) {
    #[cfg(target_arch = "x86_64")]
    if let Some(by) = loops::supports_attention(query, key, value) {
        return loops::attention([query, key, value], scale, by);
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
        scale,
    )
}

/// The gradients of queries, keys and values, of their dtype, given that of the result; `out` and `lse` are what [`attention`] gave.
///
/// # Panics
/// When the shapes do not fit each other.
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
        "gradients of {:?}",
        query.size()
    );
    let grad = grad.to_kind(query.kind());
    let grad = if grad.stride()[3] == 1 {
        grad
    } else {
        grad.contiguous()
    };
    let inputs = [query, key, value];
    part(
        "attention",
        "backward",
        || cost(query, key, 5.0),
        || backward(&grad, inputs, out, lse, scale),
    )
}

/// What it has to do: so many products of queries and keys, half of which see each other.
fn cost(query: &Tensor, key: &Tensor, products: f64) -> Cost {
    let pairs = query.numel() as f64 * query.size()[2] as f64 / 2.0;
    let bytes = (query.numel() + key.numel()) as f64 * query.kind().elt_size_in_bytes() as f64;
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
    if let Some(by) = loops::supports_attention(query, key, value)
        .filter(|_| lse.is_contiguous() && out.stride()[3] == 1)
    {
        return loops::attention_backward(grad, [query, key, value], out, lse, scale, by);
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
    let joined = |grad: Tensor| {
        if times == 1 {
            grad
        } else {
            sum_repeated_heads(&grad, times).to_kind(grad.kind())
        }
    };
    [grad_query, joined(grad_key), joined(grad_value)]
}

fn check(query: &Tensor, key: &Tensor, value: &Tensor) {
    let q = query.size();
    let k = key.size();
    let fits = k == value.size() && q.len() == 4 && (q[0], q[2], q[3]) == (k[0], k[2], k[3]);
    let kinds =
        query.kind() == key.kind() && query.kind() == value.kind() && query.device() == Device::Cpu;
    assert!(
        fits && kinds && k[1] > 0 && q[1] % k[1] == 0,
        "attention of {q:?} over {k:?}"
    );
}

/// Each key or value head once for every query head it serves: `[B, G, s, d]` to `[B, G * times, s, d]`.
pub fn repeat_heads(x: &Tensor, times: i64) -> Tensor {
    if times == 1 {
        return x.shallow_clone();
    }
    let size = x.size();
    let batch = size[0];
    let heads = size[1];
    let length = size[2];
    let width = size[3];
    let wide = x
        .unsqueeze(2)
        .expand([batch, heads, times, length, width], false);
    wide.reshape([batch, heads * times, length, width])
}

/// The gradient of [`repeat_heads`], in fp32.
pub fn sum_repeated_heads(grad: &Tensor, times: i64) -> Tensor {
    let size = grad.size();
    let batch = size[0];
    let heads = size[1];
    let length = size[2];
    let width = size[3];
    let apart = grad
        .to_kind(Kind::Float)
        .view([batch, heads / times, times, length, width]);
    apart.sum_dim_intlist([2i64].as_slice(), false, Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// In fp64.
    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> (Tensor, Tensor) {
        let times = q.size()[1] / k.size()[1];
        let k = k.repeat_interleave_self_int(times, 1, None);
        let v = v.repeat_interleave_self_int(times, 1, None);
        let later = Tensor::ones([q.size()[2]; 2], (Kind::Bool, Device::Cpu)).triu(1);
        let scores = (q.matmul(&k.transpose(2, 3)) * scale).masked_fill(&later, f64::NEG_INFINITY);
        (
            scores.softmax(-1, Kind::Double).matmul(&v),
            scores.logsumexp([-1i64].as_slice(), false),
        )
    }

    /// The largest difference, over the largest number or that of what cancels in it: one key alone leaves scores no gradient.
    fn off(a: &Tensor, b: &Tensor, cancels: f64) -> f64 {
        let most = |x: &Tensor| f64::try_from(x.abs().max()).unwrap();
        most(&(a.to_kind(Kind::Double) - b)) / most(b).max(cancels)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn as_the_formula_in_fp64(
            batch in 1i64..3, kv_heads in 1i64..4, times in 1i64..4, length in prop_oneof![1i64..70, 200i64..620],
            width in 1i64..9, transposed: bool, odd: bool, large in 0..2, seed in 0i64..1000,
        ) {
            tch::set_num_threads(1);
            tch::manual_seed(seed);
            let width = if odd { 16 * width - 4 } else { 16 * width };
            let random = |heads: i64, kind| {
                let x = Tensor::randn([batch, length, heads, width], (Kind::Float, Device::Cpu)) * (1.0 + 4.0 * f64::from(large));
                let x = x.to_kind(kind).transpose(1, 2);
                if transposed { x } else { x.contiguous() }
            };
            let scale = 0.7 / (width as f64).sqrt();
            // The error of a weight is the rounding of its score, and large ones are rounded more.
            let (times_larger, cancels) = if large == 1 { (5.0, 30.0) } else { (1.0, 0.1) };
            for (kind, tolerance) in [(Kind::Float, 2e-5 * times_larger), (Kind::BFloat16, 2e-2 * times_larger)] {
                let [q, k, v, grad] = [times * kv_heads, kv_heads, kv_heads, times * kv_heads].map(|heads| random(heads, kind));
                let wide = [&q, &k, &v].map(|x| x.to_kind(Kind::Double).set_requires_grad(true));
                let (expected, expected_lse) = plain(&wide[0], &wide[1], &wide[2], scale);
                (&expected * grad.to_kind(Kind::Double)).sum(Kind::Double).backward();
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
    fn threads_change_no_bit() {
        let random = |heads: i64| Tensor::randn([3, heads, 130, 32], (Kind::BFloat16, Device::Cpu));
        let [q, k, v, grad] = [random(4), random(2), random(2), random(4)];
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
