//! Load balancing: the auxiliary loss, the z-loss, and the loss-free bias.
//!
//! For a group of `n` tokens, with `c_e` routed tokens of expert `e` and mean router probability
//! `p_e`, the loss is `E / (K n) * sum_e c_e p_e`. It is 1 when balanced (Switch Transformer, arXiv
//! 2101.03961, eq. 4, over K routed tokens). [`BalanceScope`] defines the groups. All losses are
//! *contributions*: their sum over microbatches and ranks is the value of the whole batch in every
//! layout.
// Shapes: L layers, G groups of tokens, E experts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Tokens over which expert use is balanced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BalanceScope {
    /// Each sequence separately.
    Sequence,
    /// Each microbatch, as in most trainers. The loss depends on the size of the microbatch.
    Microbatch,
    /// All tokens of a step, on all ranks (arXiv 2501.11873). Counting them before the first
    /// backward costs one more forward pass per microbatch.
    Batch,
}

/// Statistics of one layer's router in one forward pass.
pub struct RouterStats {
    /// `[G, E]` fp32, no gradient: routed tokens per expert, of the group's tokens on all ranks.
    pub counts_ge: Tensor,
    /// Tokens of each group, on all ranks. All groups have an equal number.
    pub tokens_per_group: f64,
    /// `[G, E]` fp32, differentiable: router probabilities summed over the group's tokens on this
    /// rank.
    pub prob_sums_ge: Tensor,
    /// Scalar fp32, differentiable: squared log-sum-exp of the logits, summed over this rank's
    /// tokens.
    pub z_sum: Tensor,
    /// `[T, K]` int64: the experts of this rank's tokens.
    pub experts_tk: Tensor,
}

/// Totals of a whole step, which normalize the contribution of one forward pass.
pub struct BatchTotals<'a> {
    /// Groups of tokens in the whole step, over all ranks and microbatches.
    pub groups: f64,
    /// Positions in the whole step. Each is routed, so the balance and z losses are means over
    /// them, whether or not its label counts.
    pub positions: f64,
    /// Positions in the whole step whose label counts in the cross-entropy. It may be 0.
    pub counted_tokens: f64,
    /// `[L, E]` fp32: routed tokens in the whole step, for [`BalanceScope::Batch`].
    pub counts_le: Option<&'a Tensor>,
}

/// Returns one forward's contribution to the load-balancing loss, a scalar summed over layers.
///
/// If `pool_layers` is true, it is computed once from statistics averaged over layers, like in HF
/// transformers.
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
        // One group, the step. The probabilities are this forward's part of the group's mean.
        Some(counts_le) => (counts_le.unsqueeze(1), totals.positions, 1.0),
        None => {
            let counts_lge = stack(|s| &s.counts_ge);
            (counts_lge, stats[0].tokens_per_group, 1.0 / totals.groups)
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

/// Returns one forward's contribution to the router z-loss, summed over layers (ST-MoE, arXiv
/// 2202.08906, eq. 5).
pub fn z_loss(stats: &[RouterStats], totals: &BatchTotals) -> Tensor {
    let z_sums: Vec<&Tensor> = stats.iter().map(|s| &s.z_sum).collect();
    Tensor::stack(&z_sums, 0).sum(Kind::Float) / totals.positions
}

/// Adds `rate` to the loss-free bias `[E]` of experts with fewer routed tokens than the mean, and
/// subtracts it from the others (arXiv 2408.15664, algorithm 1). `counts_e` `[E]` are the routed
/// tokens of the whole step.
pub fn update_bias(bias_e: &mut Tensor, counts_e: &Tensor, rate: f64) {
    tch::no_grad(|| {
        let counts_e = counts_e.to_kind(Kind::Float);
        let below = (counts_e.mean(Kind::Float) - &counts_e).sign();
        let _ = bias_e
            .f_add_(&(below * rate))
            .expect("the bias has one number per expert, like the counts");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(counts: &[f32], probs: &[f32], groups: i64, top_k: usize) -> RouterStats {
        let routed_tokens: f32 = counts.iter().sum();
        RouterStats {
            counts_ge: Tensor::from_slice(counts).view([groups, -1]),
            tokens_per_group: f64::from(routed_tokens) / top_k as f64 / groups as f64,
            experts_tk: Tensor::zeros([0, top_k as i64], (Kind::Int64, tch::Device::Cpu)),
            prob_sums_ge: Tensor::from_slice(probs).view([groups, -1]),
            z_sum: Tensor::from_slice(&[3f32]).sum(Kind::Float),
        }
    }

    fn totals(groups: f64, positions: f64) -> BatchTotals<'static> {
        BatchTotals {
            groups,
            positions,
            counted_tokens: positions,
            counts_le: None,
        }
    }

    fn loss(stats: &[RouterStats], top_k: usize, totals: &BatchTotals) -> f64 {
        load_balance_loss(stats, top_k, false, totals).double_value(&[])
    }

    #[test]
    fn balanced_is_one_and_collapsed_is_the_number_of_experts() {
        let balanced = stats(&[2., 2., 2., 2.], &[1., 1., 1., 1.], 1, 2);
        let balanced_loss = loss(&[balanced], 2, &totals(1.0, 4.0));
        assert!((balanced_loss - 1.0).abs() < 1e-6);
        let collapsed = stats(&[4., 0., 0., 0.], &[4., 0., 0., 0.], 1, 1);
        let collapsed_loss = loss(&[collapsed], 1, &totals(1.0, 4.0));
        assert!((collapsed_loss - 4.0).abs() < 1e-6);
    }

    #[test]
    fn contributions_of_two_microbatches_add_up_to_the_batch() {
        let a = stats(&[3., 1.], &[2.5, 1.5], 1, 1);
        let b = stats(&[1., 3.], &[2., 2.], 1, 1);
        let whole = Tensor::from_slice(&[4f32, 4.]).view([1, 2]);
        let of_batch = BatchTotals {
            counts_le: Some(&whole),
            ..totals(2.0, 8.0)
        };
        let contributions = [a, b].map(|stats| loss(&[stats], 1, &of_batch));
        let sum: f64 = contributions.iter().sum();
        let once = stats(&[4., 4.], &[4.5, 3.5], 1, 1);
        let expected = loss(&[once], 1, &totals(1.0, 8.0));
        assert!((sum - expected).abs() < 1e-6);
    }

    #[test]
    fn sequences_are_balanced_separately() {
        let two = stats(&[2., 0., 0., 2.], &[2., 0., 0., 2.], 2, 1);
        // Each sequence is collapsed although the batch is balanced.
        let loss = loss(&[two], 1, &totals(2.0, 4.0));
        assert!((loss - 2.0).abs() < 1e-6);
    }

    #[test]
    fn the_bias_moves_towards_rarely_used_experts() {
        let mut bias = Tensor::from_slice(&[0f32, 0., 0.]);
        update_bias(&mut bias, &Tensor::from_slice(&[9f32, 3., 6.]), 0.1);
        assert_eq!(Vec::<f32>::try_from(bias).unwrap(), [-0.1, 0.1, 0.0]);
    }
}
