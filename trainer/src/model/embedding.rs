//! The embedding: one row of a matrix for each token.

use super::vocabulary::{add_rows, rows_of};
use parallel::Weight;
use parallel::collectives::scatter_to_group;
use parallel::tensor::TensorParallel;
use std::ops::Range;
use tch::Tensor;
use torch_ext::{Error, attach_backward};

/// This rank's part of the rows for `tokens_t` `[T]` int64, `[T / ranks, D]`: each rank of `tensor` has rows `rows` of the
/// matrix, `weight`.
///
/// # Collective
/// All ranks of `tensor`, forward and backward.
pub(crate) fn embed(
    tokens_t: &Tensor,
    weight: &Weight,
    rows: &Range<usize>,
    tensor: &TensorParallel,
) -> Result<Tensor, Error> {
    let out = tch::no_grad(|| rows_of(tokens_t, weight, rows));
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
