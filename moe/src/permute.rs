//! Moving rows between token order and slot order, with gradients that are gathers too: no scatter, no atomic
//! addition, so the same input gives the same bits.
// Shapes: T tokens, C choices of a token, N slots, D hidden.

use crate::plan::SendPlan;
use kernels::{combine, combine_backward};
use tch::{Device, Tensor};
use torch_ext::{Error, attach_backward};

/// Which slots tokens have: at most C each.
pub(crate) struct Permutation {
    /// `[N]`.
    token_of_row: Tensor,
    /// `[T, C]`; -1 where there is none.
    row_of_routed_token: Tensor,
}

impl Permutation {
    pub(crate) fn new(plan: &SendPlan, per_token: usize, device: Device) -> Permutation {
        let upload = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(device);
        let tokens = plan.row_of_routed_token.len() / per_token;
        let row_of_routed_token =
            upload(&plan.row_of_routed_token).view([tokens as i64, per_token as i64]);
        Permutation {
            token_of_row: upload(&plan.token_of_row),
            row_of_routed_token,
        }
    }

    pub(crate) fn copy(&self) -> Permutation {
        Permutation {
            token_of_row: self.token_of_row.shallow_clone(),
            row_of_routed_token: self.row_of_routed_token.shallow_clone(),
        }
    }

    /// `x_td` `[T, D]` to slots `[N, D]`. The gradient of a token is the sum over its slots.
    pub(crate) fn gather(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        let out = tch::no_grad(|| x_td.index_select(0, &self.token_of_row));
        let row_of_routed_token = self.row_of_routed_token.shallow_clone();
        let mut out = attach_backward(&[x_td], vec![out], move |grads| {
            Ok(vec![grads[0].as_ref().map(|grad_nd| {
                combine(&grad_nd.contiguous(), &row_of_routed_token, None)
            })])
        })?;
        Ok(out.remove(0))
    }

    /// The sum over a token's slots, the other way round than [`Permutation::gather`]: `[N, D]` to `[T, D]`.
    pub(crate) fn combine(&self, y_nd: &Tensor) -> Result<Tensor, Error> {
        let out = tch::no_grad(|| combine(&y_nd.detach(), &self.row_of_routed_token, None));
        let token_of_row = self.token_of_row.shallow_clone();
        let mut out = attach_backward(&[y_nd], vec![out], move |grads| {
            Ok(vec![
                grads[0]
                    .as_ref()
                    .map(|grad_td| grad_td.index_select(0, &token_of_row)),
            ])
        })?;
        Ok(out.remove(0))
    }

    /// The same sum, each choice with its weight of `weights_tc` `[T, C]`.
    pub(crate) fn combine_weighted(
        &self,
        y_nd: &Tensor,
        weights_tc: &Tensor,
    ) -> Result<Tensor, Error> {
        let y = y_nd.detach();
        let weights = weights_tc.detach();
        let slots = self.row_of_routed_token.shallow_clone();
        let out = tch::no_grad(|| combine(&y, &slots, Some(&weights)));
        let mut out = attach_backward(&[y_nd, weights_tc], vec![out], move |grads| {
            let Some(grad_td) = &grads[0] else {
                return Ok(vec![None, None]);
            };
            let (grad_y, grad_weights) = combine_backward(grad_td, &y, &slots, &weights);
            Ok(vec![
                Some(grad_y),
                Some(grad_weights.to_kind(weights.kind())),
            ])
        })?;
        Ok(out.remove(0))
    }
}

/// Row `i` of the result is row `order[i]` of `x`; `inverse` is the inverse permutation.
pub(crate) fn permute_rows(x: &Tensor, order: &Tensor, inverse: &Tensor) -> Result<Tensor, Error> {
    let out = tch::no_grad(|| x.index_select(0, order));
    let inverse = inverse.shallow_clone();
    let mut out = attach_backward(&[x], vec![out], move |grads| {
        Ok(vec![
            grads[0].as_ref().map(|grad| grad.index_select(0, &inverse)),
        ])
    })?;
    Ok(out.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan_send;
    use parallel::{Accelerator, Cpu};
    use tch::Kind;

    #[test]
    fn gathering_and_combining_have_the_gradients_of_plain_indexing() {
        // The second time one token has one choice less.
        for missing in [false, true] {
            let experts = [
                Some(2),
                Some(0),
                Some(1),
                Some(2),
                Some(0),
                Some(1).filter(|_| !missing),
            ];
            let plan = plan_send(
                &experts.map(|expert| expert.map(|expert| (0, expert))),
                2,
                1,
                3,
            );
            let slots = Permutation::new(&plan, 2, Device::Cpu);
            let random = |shape: &[i64]| {
                Cpu.empty(shape, Kind::Float)
                    .uniform_(-1.0, 1.0)
                    .set_requires_grad(true)
            };
            let x = random(&[3, 4]);
            let w = random(&[3, 2]);
            let probe = random(&[3, 4]).detach();
            let second = random(&[3, 4]).detach();

            let rows = slots.gather(&x).unwrap();
            let squares = &rows * &rows;
            let out = slots.combine_weighted(&squares, &w).unwrap();
            let sum = slots.combine(&squares).unwrap();
            (&out * &probe + &sum * &second).sum(Kind::Float).backward();
            let grad_x = x.grad().copy();
            let grad_w = w.grad().copy();
            let mut x = x;
            let mut w = w;
            x.zero_grad();
            w.zero_grad();

            // Every choice's row is its token's.
            let there =
                Tensor::from_slice(&experts.map(|expert| f32::from(u8::from(expert.is_some()))))
                    .view([3, 2, 1]);
            let by_token = (&x * &x).unsqueeze(1) * there;
            let plain = (&by_token * w.unsqueeze(-1)).sum_dim_intlist(
                [1i64].as_slice(),
                false,
                Kind::Float,
            );
            let plain_sum = by_token.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            (&plain * &probe + &plain_sum * &second)
                .sum(Kind::Float)
                .backward();
            assert!(out.allclose(&plain, 1e-6, 1e-6, false));
            assert!(sum.allclose(&plain_sum, 1e-6, 1e-6, false));
            assert!(grad_x.allclose(&x.grad(), 1e-6, 1e-6, false));
            assert!(grad_w.allclose(&w.grad(), 1e-6, 1e-6, false));
        }
    }

    #[test]
    fn no_token_and_no_slot_at_all() {
        let x = Cpu.zeros(&[0, 4], Kind::Float).set_requires_grad(true);
        let slots = Permutation::new(&plan_send(&[], 2, 1, 3), 2, Device::Cpu);
        let out = slots
            .combine_weighted(&slots.gather(&x).unwrap(), &Cpu.zeros(&[0, 2], Kind::Float))
            .unwrap();
        out.sum(Kind::Float).backward();
        assert_eq!((out.size(), x.grad().size()), (vec![0, 4], vec![0, 4]));
    }
}
