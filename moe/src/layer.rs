//! One mixture-of-experts layer: router, dispatch, experts, combine, and shared experts beside them.

use crate::balance::{RouterStats, Statistics};
use crate::dispatch::Dispatcher;
use crate::experts::grouped_swiglu;
use crate::plan::count_choices;
use crate::router::Router;
use parallel::{Weight, linear};
use tch::{Kind, Tensor};
use torch_ext::Error;

/// The tensors of a layer. E experts in all, L on this rank, D hidden, F expert ffn, S shared ffn.
pub struct MoeWeights {
    /// `[E, D]`.
    pub gate: Weight,
    /// `[E]` fp32, not trained by gradient: the loss-free bias, where it is used.
    pub bias: Option<Tensor>,
    /// `[L, 2F, D]`.
    pub gate_up: Weight,
    /// `[L, D, F]`.
    pub down: Weight,
    /// `[1, 2S, D]` and `[1, D, S]`: experts that every token visits, as one.
    pub shared: Option<(Weight, Weight)>,
}

/// A mixture-of-experts layer.
pub struct MoeLayer {
    /// Chooses experts.
    pub router: Router,
    /// Carries rows to them.
    pub dispatcher: Dispatcher,
    /// The tokens that expert use is counted over.
    pub statistics: Statistics,
    /// The layer's tensors.
    pub weights: MoeWeights,
}

/// What a layer computed.
pub struct MoeOutput {
    /// `[T, D]`.
    pub hidden_td: Tensor,
    /// For the auxiliary losses.
    pub stats: RouterStats,
    /// Choices of each expert among this rank's tokens, `[E]`.
    pub choices: Vec<i64>,
    /// Rows that this rank's experts worked on.
    pub rows: i64,
}

impl MoeLayer {
    /// Tokens `x_td` `[T, D]` of sequences of `sequence_length` through the layer.
    ///
    /// # Collective
    /// Every rank of the expert group, with any number of tokens.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn forward(&self, x_td: &Tensor, sequence_length: usize) -> Result<MoeOutput, Error> {
        let tokens = x_td.size()[0] as usize;
        let logits_te = linear(x_td, &self.weights.gate)?.to_kind(Kind::Float);
        let routing = self.router.route(&logits_te, self.weights.bias.as_ref());
        let experts = Vec::<i64>::try_from(routing.experts_tk.flatten(0, -1).contiguous())
            .map_err(|e| Error::new(e.to_string()))?;

        let dispatched = self.dispatcher.dispatch(x_td, &experts, self.router.top_k, self.router.num_experts)?;
        let rows = dispatched.counts.iter().sum();
        let y_rd = grouped_swiglu(&dispatched.rows_rd, &self.weights.gate_up, &self.weights.down, &dispatched.counts)?;
        let mut hidden_td = self.dispatcher.combine(&y_rd, &dispatched, &routing)?;
        if let Some((gate_up, down)) = &self.weights.shared {
            hidden_td = hidden_td + grouped_swiglu(x_td, gate_up, down, &[tokens as i64])?;
        }

        let per_group = if self.statistics == Statistics::Sequence { sequence_length } else { tokens };
        let groups = (tokens / per_group.max(1)) as i64;
        let counts = count_choices(&experts, self.router.top_k, per_group, self.router.num_experts);
        let num_experts = self.router.num_experts as i64;
        let counts_ge = Tensor::from_slice(&counts).view([groups, num_experts]).to_device(x_td.device());
        let probs_gte = routing.probs_te.view([groups, per_group as i64, num_experts]);
        let stats = RouterStats {
            counts_ge,
            prob_sums_ge: probs_gte.sum_dim_intlist([1i64].as_slice(), false, Kind::Float),
            z_sum: logits_te.logsumexp([-1i64].as_slice(), false).square().sum(Kind::Float),
        };
        Ok(MoeOutput { hidden_td, stats, choices: dispatched.choices().to_vec(), rows })
    }
}
