//! Rows between token order and the order in which they are sent, with gradients.
//!
//! The gradients are gathers too. Without scatter and atomic addition, equal inputs give equal
//! bits.
// Shapes: T tokens, C routed tokens per token, N rows, D hidden.

use kernels::{combine, combine_backward};
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// The rows of each token, at most C.
pub(crate) struct Permutation {
    /// `[N]` int32.
    token_of_row: Tensor,
    /// `[T, C]` int32; -1 if the routed token has no row.
    row_of_routed_token: Tensor,
}

impl Permutation {
    /// Creates a permutation from `[N]` and `[T * C]`, int32 on the device of the rows.
    pub(crate) fn new(
        token_of_row: Tensor,
        row_of_routed_token: &Tensor,
        per_token: usize,
    ) -> Permutation {
        let tokens = row_of_routed_token.numel() / per_token;
        Permutation {
            token_of_row,
            row_of_routed_token: row_of_routed_token.view([tokens as i64, per_token as i64]),
        }
    }

    /// Sorts routed tokens by their expert below `num_experts`, on the device of `experts_tk`
    /// `[T, K]` int64. Also returns the end of each expert's rows, `[num_experts]` int32.
    ///
    /// The host waits for nothing.
    pub(crate) fn by_expert(experts_tk: &Tensor, num_experts: usize) -> (Permutation, Tensor) {
        let device = experts_tk.device();
        let top_k = experts_tk.size()[1];
        let (sorted, order) = experts_tk.flatten(0, -1).sort_stable(true, 0, false);
        let rows = Tensor::arange(order.numel() as i64, (Kind::Int, device));
        let mut row_of_routed_token = rows.empty_like();
        let _ = row_of_routed_token.index_copy_(0, &order, &rows);
        let token_of_row = order.divide_scalar_mode(top_k, "floor").to_kind(Kind::Int);
        let all = Tensor::arange(num_experts as i64, (Kind::Int64, device));
        let ends = all.searchsorted(&sorted, true, true, "right", None::<&Tensor>);
        let permutation = Permutation::new(token_of_row, &row_of_routed_token, top_k as usize);
        (permutation, ends)
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
    use proptest::prelude::*;

    /// A permutation of 2 routed tokens per token, of 3 experts on one rank.
    fn permutation(experts: &[Option<usize>]) -> Permutation {
        let target = |&expert: &Option<usize>| expert.map(|expert| RowTarget { rank: 0, expert });
        let routed = RoutedTokens {
            targets: experts.iter().map(target).collect(),
            per_token: 2,
            num_experts: 3,
        };
        let plan = plan_send(&routed, 1);
        let [token_of_row, row_of_routed_token] =
            [&plan.token_of_row, &plan.row_of_routed_token].map(|list| Tensor::from_slice(list));
        Permutation::new(token_of_row, &row_of_routed_token, 2)
    }

    proptest! {
        #[test]
        fn sorting_on_the_device_gives_the_hosts_plan(
            experts in prop::collection::vec(0usize..3, 0..40),
        ) {
            let experts = &experts[..experts.len() / 2 * 2];
            let targets: Vec<Option<usize>> = experts
                .iter()
                .copied()
                .map(Some)
                .collect();
            let plan = permutation(&targets);
            let numbers: Vec<i64> = experts
                .iter()
                .map(|&expert| expert as i64)
                .collect();
            let experts_tk = Tensor::from_slice(&numbers).view([experts.len() as i64 / 2, 2]);
            let (ours, ends) = Permutation::by_expert(&experts_tk, 3);
            prop_assert_eq!(ours.token_of_row.kind(), Kind::Int);
            prop_assert!(
                ours.token_of_row
                    .equal(&plan.token_of_row)
            );
            prop_assert_eq!(ours.row_of_routed_token.kind(), Kind::Int);
            prop_assert!(
                ours.row_of_routed_token
                    .equal(&plan.row_of_routed_token)
            );
            let up_to = |last: usize| {
                experts
                    .iter()
                    .filter(|&&expert| expert <= last)
                    .count()
            };
            let expected: Vec<i32> = (0..3)
                .map(|last| up_to(last) as i32)
                .collect();
            prop_assert_eq!(ends.kind(), Kind::Int);
            prop_assert_eq!(Vec::<i32>::try_from(ends).unwrap(), expected);
        }
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
