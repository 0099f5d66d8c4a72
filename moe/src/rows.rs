//! Moving rows between token order and slot order, with gradients that are gathers too: no scatter, no atomic
//! addition, so the same input gives the same bits.
// Shapes: T tokens, C choices of a token, N slots, D hidden.

use crate::plan::SendPlan;
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Which slots tokens have: at most C each.
pub(crate) struct Slots {
    tokens: i64,
    per_token: i64,
    /// `[N]`.
    token_of_slot: Tensor,
    /// `[T * C]`; some slot where there is none.
    slot_of_choice: Tensor,
    /// `[T, C, 1]` fp32, 1 where there is a slot; None where there always is.
    present: Option<Tensor>,
}

impl Slots {
    pub(crate) fn new(plan: &SendPlan, per_token: usize, device: Device) -> Slots {
        let upload = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(device);
        let (per_token, choices) = (per_token as i64, plan.slot_of_choice.len() as i64);
        let all = plan.token_of_slot.len() == plan.slot_of_choice.len();
        let slots = upload(&plan.slot_of_choice);
        let present = (!all).then(|| slots.ge(0).to_kind(Kind::Float).view([choices / per_token, per_token, 1]));
        Slots {
            tokens: choices / per_token,
            per_token,
            token_of_slot: upload(&plan.token_of_slot),
            slot_of_choice: if all { slots } else { slots.clamp_min(0) },
            present,
        }
    }

    pub(crate) fn copy(&self) -> Slots {
        Slots {
            tokens: self.tokens,
            per_token: self.per_token,
            token_of_slot: self.token_of_slot.shallow_clone(),
            slot_of_choice: self.slot_of_choice.shallow_clone(),
            present: self.present.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// Rows `[N, D]` as `[T, C, D]`, whatever where a token has no slot.
    fn by_token(&self, y_nd: &Tensor) -> Tensor {
        let hidden = y_nd.size()[1];
        let shape = [self.tokens, self.per_token, hidden];
        if y_nd.size()[0] == 0 {
            return Tensor::zeros(shape, (y_nd.kind(), y_nd.device()));
        }
        y_nd.index_select(0, &self.slot_of_choice).view(shape)
    }

    /// The sum of each token's rows, in order of its choices: `[T, D]`.
    fn sum(&self, y_nd: &Tensor) -> Tensor {
        let mut y_tcd = self.by_token(y_nd);
        if let Some(present) = &self.present {
            y_tcd = y_tcd * present.to_kind(y_nd.kind());
        }
        over_choices(&y_tcd)
    }

    /// `x_td` `[T, D]` to slots `[N, D]`. The gradient of a token is the sum over its slots.
    pub(crate) fn gather(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        let out = tch::no_grad(|| x_td.index_select(0, &self.token_of_slot));
        let slots = self.copy();
        let mut out = attach_backward(&[x_td], vec![out], move |grads| {
            Ok(vec![grads[0].as_ref().map(|grad_nd| slots.sum(grad_nd))])
        })?;
        Ok(out.remove(0))
    }

    /// The sum over a token's slots, the other way round than [`Slots::gather`]: `[N, D]` to `[T, D]`.
    pub(crate) fn combine(&self, y_nd: &Tensor) -> Result<Tensor, Error> {
        let out = tch::no_grad(|| self.sum(&y_nd.detach()));
        let token_of_slot = self.token_of_slot.shallow_clone();
        let mut out = attach_backward(&[y_nd], vec![out], move |grads| {
            Ok(vec![grads[0].as_ref().map(|grad_td| grad_td.index_select(0, &token_of_slot))])
        })?;
        Ok(out.remove(0))
    }

    /// The same sum, each choice with its weight of `weights_tc` `[T, C]`.
    pub(crate) fn combine_weighted(&self, y_nd: &Tensor, weights_tc: &Tensor) -> Result<Tensor, Error> {
        let kind = y_nd.kind();
        let mut weights = weights_tc.detach().to_kind(kind).unsqueeze(-1);
        if let Some(present) = &self.present {
            weights = weights * present.to_kind(kind);
        }
        let out = tch::no_grad(|| over_choices(&(self.by_token(y_nd) * &weights)));
        let (y, slots, weights_kind) = (y_nd.detach(), self.copy(), weights_tc.kind());
        let mut out = attach_backward(&[y_nd, weights_tc], vec![out], move |grads| {
            let Some(grad_td) = &grads[0] else { return Ok(vec![None, None]) };
            let product = slots.by_token(&y) * grad_td.unsqueeze(1);
            let mut grad_weights = product.to_kind(Kind::Float).sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
            if let Some(present) = &slots.present {
                grad_weights = grad_weights * present.squeeze_dim(-1);
            }
            let mut grad_y = grad_td.index_select(0, &slots.token_of_slot);
            let _ = grad_y.g_mul_(&slots.weight_of_slot(&weights));
            Ok(vec![Some(grad_y), Some(grad_weights.to_kind(weights_kind))])
        })?;
        Ok(out.remove(0))
    }

    /// `weights` `[T, C, 1]` by slot: `[N, 1]`.
    fn weight_of_slot(&self, weights: &Tensor) -> Tensor {
        let (mut slots, mut flat) = (self.slot_of_choice.shallow_clone(), weights.flatten(0, -1));
        if let Some(present) = &self.present {
            let choices = present.flatten(0, -1).nonzero().squeeze_dim(-1);
            (slots, flat) = (slots.index_select(0, &choices), flat.index_select(0, &choices));
        }
        flat.empty_like().index_copy(0, &slots, &flat).unsqueeze(-1)
    }
}

/// `[T, C, D]` summed to `[T, D]`: with one choice there is nothing to add, and no pass over memory to make.
fn over_choices(y_tcd: &Tensor) -> Tensor {
    match y_tcd.size()[1] {
        1 => y_tcd.squeeze_dim(1),
        _ => y_tcd.sum_dim_intlist([1i64].as_slice(), false, y_tcd.kind()),
    }
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
        // The second time one token has one choice less.
        for missing in [false, true] {
            let experts = [Some(2), Some(0), Some(1), Some(2), Some(0), Some(1).filter(|_| !missing)];
            let plan = plan_send(&experts.map(|expert| expert.map(|expert| (0, expert))), 2, 1, 3);
            let slots = Slots::new(&plan, 2, Device::Cpu);
            let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0).set_requires_grad(true);
            let (x, w) = (random(&[3, 4]), random(&[3, 2]));
            let (probe, second) = (random(&[3, 4]).detach(), random(&[3, 4]).detach());

            let rows = slots.gather(&x).unwrap();
            let squares = &rows * &rows;
            let out = slots.combine_weighted(&squares, &w).unwrap();
            let sum = slots.combine(&squares).unwrap();
            (&out * &probe + &sum * &second).sum(Kind::Float).backward();
            let (grad_x, grad_w) = (x.grad().copy(), w.grad().copy());
            let (mut x, mut w) = (x, w);
            x.zero_grad();
            w.zero_grad();

            // Every choice's row is its token's.
            let there =
                Tensor::from_slice(&experts.map(|expert| f32::from(u8::from(expert.is_some())))).view([3, 2, 1]);
            let by_token = (&x * &x).unsqueeze(1) * there;
            let plain = (&by_token * w.unsqueeze(-1)).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            let plain_sum = by_token.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            (&plain * &probe + &plain_sum * &second).sum(Kind::Float).backward();
            assert!(out.allclose(&plain, 1e-6, 1e-6, false));
            assert!(sum.allclose(&plain_sum, 1e-6, 1e-6, false));
            assert!(grad_x.allclose(&x.grad(), 1e-6, 1e-6, false));
            assert!(grad_w.allclose(&w.grad(), 1e-6, 1e-6, false));
        }
    }

    #[test]
    fn no_token_and_no_slot_at_all() {
        let x = Cpu.zeros(&[0, 4], Kind::Float).set_requires_grad(true);
        let slots = Slots::new(&plan_send(&[], 2, 1, 3), 2, Device::Cpu);
        let out = slots.combine_weighted(&slots.gather(&x).unwrap(), &Cpu.zeros(&[0, 2], Kind::Float)).unwrap();
        out.sum(Kind::Float).backward();
        assert_eq!((out.size(), x.grad().size()), (vec![0, 4], vec![0, 4]));
    }
}
