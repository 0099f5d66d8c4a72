//! The embedding: one row of a matrix for each token.

use parallel::Weight;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Rows of `weight_vd` `[V, D]` for `tokens_t` `[T]` int64: `[T, D]`.
pub(crate) fn embed(tokens_t: &Tensor, weight_vd: &Weight) -> Result<Tensor, Error> {
    let out = tch::no_grad(|| weight_vd.value().index_select(0, tokens_t));
    let (tokens, used) = (tokens_t.shallow_clone(), weight_vd.clone());
    let mut out = attach_backward(&[weight_vd.value()], vec![out], move |grads| {
        let Some(grad) = &grads[0] else { return Ok(vec![None]) };
        let (tokens, grad) = (tokens.shallow_clone(), grad.shallow_clone());
        used.add_gradient(move |sum| {
            let _ = sum.shallow_clone().index_add_(0, &tokens, &grad.to_kind(Kind::Float));
            Ok(())
        })?;
        Ok(vec![None])
    })?;
    Ok(out.remove(0))
}
