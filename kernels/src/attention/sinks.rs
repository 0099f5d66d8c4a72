//! Attention sinks: a learned logit per query head that takes weight and gives no value
//! (arXiv 2309.17453, section 3.3, as gpt-oss has them).
//!
//! With the log-sum-exp `l` of the scores and the logit `s`, the weights of all keys shrink by
//! `exp(l - l')`, where `l' = log(exp(l) + exp(s))`. Backward of attention needs `l'` and the
//! smaller output in place of its own, and no other change.

use tch::{Kind, Tensor};

/// Adds a logit per head to the softmax of attention.
///
/// `out` `[B, H, S, dv]` and `lse` `[B, H, S]` fp32 are the results of attention without sinks;
/// `sinks` is `[H]`. Returns what takes their place, also in backward of attention.
pub fn add_sinks(mut out: Tensor, lse: &Tensor, sinks: &Tensor) -> (Tensor, Tensor) {
    let with_sinks = lse.logaddexp(&by_head(sinks));
    let factor = (lse - &with_sinks).exp().unsqueeze(-1);
    let _ = out.g_mul_(&factor);
    (out, with_sinks)
}

/// Returns the gradient of the sinks `[H]` in fp32.
///
/// `grad` is that of the output `[B, H, S, dv]`; `out` and `lse` are the results of [`add_sinks`].
pub fn sinks_gradient(grad: &Tensor, out: &Tensor, lse: &Tensor, sinks: &Tensor) -> Tensor {
    let product = grad.to_kind(Kind::Float) * out.to_kind(Kind::Float);
    let delta = product.sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
    let weight = (by_head(sinks) - lse).exp();
    let by_head = (weight * delta).sum_dim_intlist([0i64, 2].as_slice(), false, Kind::Float);
    -by_head
}

/// Returns the sinks in fp32, `[1, H, 1]`.
fn by_head(sinks: &Tensor) -> Tensor {
    sinks.to_kind(Kind::Float).view([1, -1, 1])
}
