//! Moving rows between token order and expert order, with gradients that are gathers too: no scatter, no atomic
//! addition, so the same input gives the same bits.
// Shapes: T tokens, K choices, N = T * K slots, D hidden.

use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// `x_td` `[T, D]` to slots `[N, D]`. The gradient of a token is the sum over its choices, in order.
pub(crate) fn gather_slots(x_td: &Tensor, token_of_slot: &Tensor, slot_of_choice: &Tensor) -> Result<Tensor, Error> {
    let out = tch::no_grad(|| x_td.index_select(0, token_of_slot));
    let (tokens, hidden) = x_td.size2().map_err(|e| Error::new(e.to_string()))?;
    let slot_of_choice = slot_of_choice.shallow_clone();
    let mut out = attach_backward(&[x_td], vec![out], move |grads| {
        Ok(vec![grads[0].as_ref().map(|grad_nd| {
            let grad_tkd = grad_nd.index_select(0, &slot_of_choice).view([tokens, -1, hidden]);
            grad_tkd.sum_dim_intlist([1i64].as_slice(), false, grad_nd.kind())
        })])
    })?;
    Ok(out.remove(0))
}

/// The weighted sum over a token's choices: slots `y_nd` `[N, D]` and `weights_tk` `[T, K]` to `[T, D]`.
pub(crate) fn combine_slots(
    y_nd: &Tensor,
    weights_tk: &Tensor,
    token_of_slot: &Tensor,
    slot_of_choice: &Tensor,
) -> Result<Tensor, Error> {
    let (tokens, top_k) = weights_tk.size2().map_err(|e| Error::new(e.to_string()))?;
    let hidden = y_nd.size()[1];
    let kind = y_nd.kind();
    let by_token = move |y_nd: &Tensor, slot_of_choice: &Tensor| {
        y_nd.index_select(0, slot_of_choice).view([tokens, top_k, hidden])
    };
    let weights = weights_tk.detach().to_kind(kind);
    let out = tch::no_grad(|| {
        (by_token(y_nd, slot_of_choice) * weights.unsqueeze(-1)).sum_dim_intlist([1i64].as_slice(), false, kind)
    });
    let (y, slot_of_choice, token_of_slot) =
        (y_nd.detach(), slot_of_choice.shallow_clone(), token_of_slot.shallow_clone());
    let weights_kind = weights_tk.kind();
    let mut out = attach_backward(&[y_nd, weights_tk], vec![out], move |grads| {
        let Some(grad_td) = &grads[0] else { return Ok(vec![None, None]) };
        // Products are summed in fp32: the router learns from them.
        let products = by_token(&y, &slot_of_choice) * grad_td.unsqueeze(1);
        let grad_weights = products.sum_dim_intlist([-1i64].as_slice(), false, Kind::Float).to_kind(weights_kind);
        // The weight of each slot, from that of each choice: the permutation turned round.
        let weight_of_slot =
            weights.flatten(0, -1).empty_like().index_copy(0, &slot_of_choice, &weights.flatten(0, -1));
        let grad_y = grad_td.index_select(0, &token_of_slot) * weight_of_slot.unsqueeze(-1);
        Ok(vec![Some(grad_y), Some(grad_weights)])
    })?;
    Ok(out.remove(0))
}

/// Row `i` of the result is row `order[i]` of `x`; `place` is the inverse permutation.
pub(crate) fn permute_rows(x: &Tensor, order: &Tensor, place: &Tensor) -> Result<Tensor, Error> {
    let out = tch::no_grad(|| x.index_select(0, order));
    let place = place.shallow_clone();
    let mut out = attach_backward(&[x], vec![out], move |grads| {
        Ok(vec![grads[0].as_ref().map(|grad| grad.index_select(0, &place))])
    })?;
    Ok(out.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan_send;
    use parallel::{Accelerator, Cpu};

    #[test]
    fn gathering_and_combining_have_the_gradients_of_plain_indexing() {
        let experts = [2i64, 0, 1, 2, 0, 1];
        let plan = plan_send(&experts, 2, 3);
        let (tokens, slots) = (Tensor::from_slice(&plan.token_of_slot), Tensor::from_slice(&plan.slot_of_choice));
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0).set_requires_grad(true);
        let (x, w) = (random(&[3, 4]), random(&[3, 2]));
        let probe = random(&[3, 4]).detach();

        let rows = gather_slots(&x, &tokens, &slots).unwrap();
        let out = combine_slots(&(&rows * &rows), &w, &tokens, &slots).unwrap();
        (&out * &probe).sum(Kind::Float).backward();
        let (grad_x, grad_w) = (x.grad().copy(), w.grad().copy());
        let (mut x, mut w) = (x, w);
        x.zero_grad();
        w.zero_grad();

        let rows = x.index_select(0, &tokens);
        let by_token = (&rows * &rows).index_select(0, &slots).view([3, 2, 4]);
        let plain = (by_token * w.unsqueeze(-1)).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        (&plain * &probe).sum(Kind::Float).backward();
        assert!(out.allclose(&plain, 1e-6, 1e-6, false));
        assert!(grad_x.allclose(&x.grad(), 1e-6, 1e-6, false));
        assert!(grad_w.allclose(&w.grad(), 1e-6, 1e-6, false));
    }
}
