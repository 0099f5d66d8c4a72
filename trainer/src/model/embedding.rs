//! Embedding lookup with tensor parallelism.

use super::vocabulary::{add_rows, embed_rows};
use parallel::{Weight, collectives::scatter_to_group, tensor::TensorParallel};
use std::ops::Range;
use tch::Tensor;
use torch_ext::{Error, attach_backward};

/// Returns this rank's part `[T / ranks, D]` of the embedding of `tokens_t` `[T]` int64. `weight`
/// has the rows `rows` of the matrix.
///
/// # Collective
/// All ranks of `tensor`, forward and backward.
pub(crate) fn embed(
    tokens_t: &Tensor,
    weight: &Weight,
    rows: &Range<usize>,
    tensor: &TensorParallel,
) -> Result<Tensor, Error> {
    let out = tch::no_grad(|| embed_rows(tokens_t, weight, rows));
    let tokens = tokens_t.shallow_clone();
    let used = weight.clone();
    let rows = rows.clone();
    let mut out = attach_backward(&[&weight.tracker()], vec![out], move |grads| {
        let Some(grad) = &grads[0] else {
            return Ok(vec![None]);
        };
        let tokens = tokens.shallow_clone();
        let grad = grad.shallow_clone();
        let rows = rows.clone();
        used.add_gradient(move |sum| {
            add_rows(&tokens, &grad, sum.tensor(), &rows);
            Ok(())
        })?;
        Ok(vec![None])
    })?;
    if tensor.size() == 1 {
        Ok(out.remove(0))
    } else {
        scatter_to_group(&out[0], tensor.group())
    }
}
