//! Key and value heads that serve several query heads each.

use tch::{Kind, Tensor};

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
