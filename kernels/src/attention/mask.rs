//! Masks that are added to scores.

use tch::{Kind, Tensor};

/// Score of an invisible key. Its exponential is zero in every dtype, and unlike infinity it has
/// defined differences.
const MASKED_SCORE: f64 = -65504.0;

/// Returns a mask of dtype `kind` to add to scores: zero where the boolean `is_visible` is true.
///
/// A key elsewhere gets no weight, unless a query sees no key at all.
pub fn added_mask(is_visible: &Tensor, kind: Kind) -> Tensor {
    let scores = Tensor::zeros(is_visible.size(), (kind, is_visible.device()));
    scores.masked_fill(&is_visible.logical_not(), MASKED_SCORE)
}

/// Keeps, of a boolean `[..., S, S]`, the keys that causal attention lets each query see.
///
/// `window` is that of [`AttentionOptions`](super::AttentionOptions).
pub fn causal_part(is_visible: &Tensor, window: Option<i64>) -> Tensor {
    let earlier = is_visible.tril(0);
    match window {
        Some(window) => earlier.triu(1 - window),
        None => earlier,
    }
}
