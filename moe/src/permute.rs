//! Rows between token order and the order in which they are sent, with gradients.
//!
//! The gradients are gathers too. Without scatter and atomic addition, equal inputs give equal
//! bits.
// Shapes: T tokens, C routed tokens per token, N rows, D hidden.

use crate::plan::SendPlan;
use kernels::{combine, combine_backward};
use tch::{Device, Tensor};
use torch_ext::{Error, attach_backward};

/// The rows of each token, at most C.
pub(crate) struct Permutation {
    /// `[N]`.
    token_of_row: Tensor,
    /// `[T, C]`; -1 if the routed token has no row.
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

    /// Copies tokens `[T, D]` to their rows `[N, D]`. A token's gradient is the sum over its rows.
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

    /// Sums each token's rows: `[N, D]` to `[T, D]`.
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

    /// Sums each token's rows, each multiplied by its weight of `weights_tc` `[T, C]`.
    pub(crate) fn combine_weighted(
        &self,
        y_nd: &Tensor,
        weights_tc: &Tensor,
    ) -> Result<Tensor, Error> {
        let y = y_nd.detach();
        let weights = weights_tc.detach();
        let row_of_routed_token = self.row_of_routed_token.shallow_clone();
        let out = tch::no_grad(|| combine(&y, &row_of_routed_token, Some(&weights)));
        let mut out = attach_backward(&[y_nd, weights_tc], vec![out], move |grads| {
            let Some(grad_td) = &grads[0] else {
                return Ok(vec![None, None]);
            };
            let (grad_y, grad_weights) =
                combine_backward(grad_td, &y, &row_of_routed_token, &weights);
            Ok(vec![
                Some(grad_y),
                Some(grad_weights.to_kind(weights.kind())),
            ])
        })?;
        Ok(out.remove(0))
    }
}

/// Permutes the rows of `x`: row `i` of the result is row `order[i]`. `inverse` is the inverse
/// permutation.
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
    use crate::plan::{RoutedTokens, RowTarget, plan_send};
    use parallel::{Accelerator, Cpu};
    use tch::Kind;

    /// A permutation of 2 routed tokens per token, of 3 experts on one rank.
    fn permutation(experts: &[Option<usize>]) -> Permutation {
        let target = |&expert: &Option<usize>| expert.map(|expert| RowTarget { rank: 0, expert });
        let routed = RoutedTokens {
            targets: experts.iter().map(target).collect(),
            per_token: 2,
            num_experts: 3,
        };
        Permutation::new(&plan_send(&routed, 1), 2, Device::Cpu)
    }

    #[test]
    fn gathering_and_combining_have_the_gradients_of_plain_indexing() {
        // If `missing`, the last token has one expert less.
        for missing in [false, true] {
            let experts = [
                Some(2),
                Some(0),
                Some(1),
                Some(2),
                Some(0),
                Some(1).filter(|_| !missing),
            ];
            let permutation = permutation(&experts);
            let random = |shape: &[i64]| {
                Cpu.empty(shape, Kind::Float)
                    .uniform_(-1.0, 1.0)
                    .set_requires_grad(true)
            };
            let x = random(&[3, 4]);
            let w = random(&[3, 2]);
            let probe = random(&[3, 4]).detach();
            let second = random(&[3, 4]).detach();

            let rows = permutation.gather(&x).unwrap();
            let squares = &rows * &rows;
            let out = permutation.combine_weighted(&squares, &w).unwrap();
            let sum = permutation.combine(&squares).unwrap();
            (&out * &probe + &sum * &second).sum(Kind::Float).backward();
            let grad_x = x.grad().copy();
            let grad_w = w.grad().copy();
            let mut x = x;
            let mut w = w;
            x.zero_grad();
            w.zero_grad();

            let is_sent = experts.map(|expert| f32::from(u8::from(expert.is_some())));
            let is_sent = Tensor::from_slice(&is_sent).view([3, 2, 1]);
            let by_token = (&x * &x).unsqueeze(1) * is_sent;
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
    fn no_token_and_no_row() {
        let x = Cpu.zeros(&[0, 4], Kind::Float).set_requires_grad(true);
        let permutation = permutation(&[]);
        let rows = permutation.gather(&x).unwrap();
        let weights = Cpu.zeros(&[0, 2], Kind::Float);
        let out = permutation.combine_weighted(&rows, &weights).unwrap();
        out.sum(Kind::Float).backward();
        assert_eq!((out.size(), x.grad().size()), (vec![0, 4], vec![0, 4]));
    }
}
