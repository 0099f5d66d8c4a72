//! Load balancing: the auxiliary loss over chosen statistics, the z-loss, and the loss-free bias.
//!
//! For a group of `n` tokens with `c_e` routed tokens of expert `e` and mean router probability `p_e`, the loss is
//! `E / (K n) * sum_e c_e p_e`, 1 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4, over K routed tokens). What
//! a group is, is [`BalanceScope`]. All losses are *contributions*: summed over microbatches and ranks they give the
//! value for the whole batch, the same in every layout.
// Shapes: L layers, G groups of tokens, E experts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// The tokens over which expert use is balanced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BalanceScope {
    /// Each sequence by itself.
    Sequence,
    /// Each microbatch: changes with the microbatch's size, as in most trainers.
    Microbatch,
    /// All tokens of a step, on all ranks (arXiv 2501.11873). This costs one more forward pass per microbatch, to
    /// count before the first backward.
    Batch,
}

/// What one layer's router did in one forward.
pub struct RouterStats {
    /// `[G, E]` fp32, no gradient: routed tokens of each expert by all tokens of the group, on whatever rank.
    pub counts_ge: Tensor,
    /// `[G, E]` fp32, differentiable: router probabilities summed over the group's tokens on this rank.
    pub prob_sums_ge: Tensor,
    /// Scalar fp32, differentiable: sum over this rank's tokens of the squared log-sum-exp of the logits.
    pub z_sum: Tensor,
}

/// The parts of a whole step that one forward is measured against.
pub struct BatchTotals<'a> {
    /// Groups of tokens in the whole step, over all ranks and microbatches.
    pub groups: f64,
    /// Tokens in the whole step.
    pub tokens: f64,
    /// `[L, E]` fp32: routed tokens in the whole step, for [`BalanceScope::Batch`].
    pub counts_le: Option<&'a Tensor>,
}

/// This forward's contribution to the load-balancing loss, a scalar: summed over layers, or with `pool_layers`
/// computed once from statistics averaged over layers, as HF transformers does.
pub fn load_balance_loss(
    stats: &[RouterStats],
    top_k: usize,
    pool_layers: bool,
    totals: &BatchTotals,
) -> Tensor {
    let stack = |part: fn(&RouterStats) -> &Tensor| {
        Tensor::stack(&stats.iter().map(part).collect::<Vec<_>>(), 0)
    };
    let probs_lge = stack(|s| &s.prob_sums_ge);
    let (counts_lge, tokens, weight) = match totals.counts_le {
        // One group, the step: counts are the step's, probabilities this forward's part of its mean.
        Some(counts_le) => (counts_le.unsqueeze(1), totals.tokens, 1.0),
        None => {
            let counts_lge = stack(|s| &s.counts_ge);
            // Groups of one forward have the same number of tokens.
            let tokens = tokens_per_group(&stats[0], top_k);
            (counts_lge, tokens, 1.0 / totals.groups)
        }
    };
    let experts = probs_lge.size()[2] as f64;
    let factor = experts / (top_k as f64 * tokens * tokens) * weight;
    if pool_layers {
        let layers = [0i64];
        let counts = counts_lge.mean_dim(layers.as_slice(), false, Kind::Float);
        let probs = probs_lge.mean_dim(layers.as_slice(), false, Kind::Float);
        (counts * probs).sum(Kind::Float) * factor
    } else {
        (counts_lge * probs_lge).sum(Kind::Float) * factor
    }
}

fn tokens_per_group(stats: &RouterStats, top_k: usize) -> f64 {
    let routed_tokens = stats.counts_ge.sum(Kind::Double).double_value(&[]);
    routed_tokens / top_k as f64 / stats.counts_ge.size()[0] as f64
}

/// This forward's contribution to the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), summed over layers.
pub fn z_loss(stats: &[RouterStats], totals: &BatchTotals) -> Tensor {
    Tensor::stack(&stats.iter().map(|s| &s.z_sum).collect::<Vec<_>>(), 0).sum(Kind::Float)
        / totals.tokens
}

/// Moves the loss-free bias `[E]` by `rate` towards the experts used less than the mean, given the routed tokens
/// `counts_e` `[E]` of the whole step (arXiv 2408.15664, algorithm 1).
pub fn update_bias(bias_e: &mut Tensor, counts_e: &Tensor, rate: f64) {
    tch::no_grad(|| {
        let counts_e = counts_e.to_kind(Kind::Float);
        let below = (counts_e.mean(Kind::Float) - &counts_e).sign();
        let _ = bias_e
            .f_add_(&(below * rate))
            .expect("bias and counts have one number an expert");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(counts: &[f32], probs: &[f32], groups: i64) -> RouterStats {
        RouterStats {
            counts_ge: Tensor::from_slice(counts).view([groups, -1]),
            prob_sums_ge: Tensor::from_slice(probs).view([groups, -1]),
            z_sum: Tensor::from_slice(&[3f32]).sum(Kind::Float),
        }
    }

    fn totals(groups: f64, tokens: f64) -> BatchTotals<'static> {
        BatchTotals {
            groups,
            tokens,
            counts_le: None,
        }
    }

    #[test]
    fn balanced_is_one_and_collapsed_is_the_number_of_experts() {
        let balanced = stats(&[2., 2., 2., 2.], &[1., 1., 1., 1.], 1);
        assert!(
            (load_balance_loss(&[balanced], 2, false, &totals(1.0, 4.0)).double_value(&[]) - 1.0)
                .abs()
                < 1e-6
        );
        let collapsed = stats(&[4., 0., 0., 0.], &[4., 0., 0., 0.], 1);
        assert!(
            (load_balance_loss(&[collapsed], 1, false, &totals(1.0, 4.0)).double_value(&[]) - 4.0)
                .abs()
                < 1e-6
        );
    }

    #[test]
    fn contributions_of_two_microbatches_add_up_to_the_batch() {
        let a = stats(&[3., 1.], &[2.5, 1.5], 1);
        let b = stats(&[1., 3.], &[2., 2.], 1);
        let whole = Tensor::from_slice(&[4f32, 4.]).view([1, 2]);
        let totals = BatchTotals {
            groups: 2.0,
            tokens: 8.0,
            counts_le: Some(&whole),
        };
        let parts: f64 = [a, b]
            .map(|s| load_balance_loss(&[s], 1, false, &totals).double_value(&[]))
            .iter()
            .sum();
        let once = stats(&[4., 4.], &[4.5, 3.5], 1);
        let expected = load_balance_loss(
            &[once],
            1,
            false,
            &BatchTotals {
                groups: 1.0,
                tokens: 8.0,
                counts_le: None,
            },
        );
        assert!((parts - expected.double_value(&[])).abs() < 1e-6);
    }

    #[test]
    fn sequences_are_balanced_one_by_one() {
        let two = stats(&[2., 0., 0., 2.], &[2., 0., 0., 2.], 2);
        // Each sequence is collapsed although the batch is balanced.
        assert!(
            (load_balance_loss(&[two], 1, false, &totals(2.0, 4.0)).double_value(&[]) - 2.0).abs()
                < 1e-6
        );
    }

    #[test]
    fn the_bias_moves_towards_the_unused() {
        let mut bias = Tensor::from_slice(&[0f32, 0., 0.]);
        update_bias(&mut bias, &Tensor::from_slice(&[9f32, 3., 6.]), 0.1);
        assert_eq!(Vec::<f32>::try_from(bias).unwrap(), [-0.1, 0.1, 0.0]);
    }
}
