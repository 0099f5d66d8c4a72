//! One mixture-of-experts layer: router, dispatch, experts, combine, and shared experts beside them.

use crate::balance::{RouterStats, Statistics};
use crate::dispatch::Dispatcher;
use crate::experts::grouped_swiglu;
use crate::plan::{count_choices, segments};
use crate::router::Router;
use parallel::tensor::TensorParallel;
use parallel::{Activation, Communicator, ReduceOp, Weight, linears};
use std::sync::{Arc, Mutex};
use tch::{Kind, Tensor};
use torch_ext::Error;

/// The tensors of a layer. E experts in all, L on this rank, D hidden, F expert ffn, S shared ffn.
pub struct MoeWeights {
    /// `[E, D]`.
    pub gate: Weight,
    /// `[E]` fp32, not trained by gradient: the loss-free bias, where it is used.
    pub bias: Option<Mutex<Tensor>>,
    /// `[L, 2F, D]`; less of F where ranks split experts.
    pub gate_up: Weight,
    /// `[L, D, F]`, likewise.
    pub down: Weight,
    /// `[1, 2S, D]` and `[1, D, S]`: experts that every token visits, as one; split as dense layers are.
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
    /// The ranks that split dense matrices.
    pub tensor: TensorParallel,
    /// The ranks that have tokens of the same sequences.
    pub sequence: Arc<dyn Communicator>,
    /// What is kept for backward.
    pub keep: Keep,
    /// The layer's tensors.
    pub weights: MoeWeights,
}

/// What is kept for backward, and not computed again.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    /// Rows as they are at their experts.
    pub rows: bool,
    /// The experts' gate-up products.
    pub experts: bool,
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
    /// This rank's tokens `x_td` `[T, D]` through the layer: as many of each of `sequences` sequences on every rank that
    /// splits them by position, and of those a part of neighbours on each that splits matrices.
    ///
    /// # Collective
    /// Every rank of the expert group, with any number of tokens, and those that split sequences and matrices.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn forward(&self, x_td: &Activation, sequences: usize) -> Result<MoeOutput, Error> {
        let tokens = x_td.value.size()[0] as usize;
        let logits_te = linears(x_td, &[&self.weights.gate])?.remove(0).to_kind(Kind::Float);
        let bias = self.weights.bias.as_ref().map(|bias| bias.lock().expect("nobody panics with it").shallow_clone());
        let routing = self.router.route(&logits_te, bias.as_ref());
        let experts = Vec::<i64>::try_from(routing.experts_tk.flatten(0, -1).contiguous())
            .map_err(|e| Error::new(e.to_string()))?;

        let Router { top_k, num_experts, .. } = self.router;
        let dispatched = self.dispatcher.dispatch(x_td, &experts, top_k, num_experts, self.keep.rows)?;
        let rows = dispatched.counts.iter().sum();
        let MoeWeights { gate_up, down, .. } = &self.weights;
        let y_rd = grouped_swiglu(&dispatched.rows_rd, gate_up, down, &dispatched.counts, self.keep.experts)?;
        let mut hidden_td = self.dispatcher.combine(&y_rd, &dispatched, &routing)?;
        if let Some((gate_up, down)) = &self.weights.shared {
            let shared = self
                .tensor
                .block(x_td, |x| grouped_swiglu(x, gate_up, down, &[x.value.size()[0]], self.keep.experts))?;
            hidden_td = hidden_td + shared;
        }

        let in_all = tokens * self.tensor.size();
        let groups = if self.statistics == Statistics::Sequence { sequences } else { 1 };
        let own = segments(self.tensor.rank() * tokens, tokens, in_all / groups, groups);
        let counts = count_choices(&experts, top_k, &own, num_experts);
        let counts_ge = Tensor::from_slice(&counts).view([groups as i64, num_experts as i64]);
        let counts_ge = counts_ge.to_device(x_td.value.device());
        let reduced = self.sequence.all_reduce(&counts_ge, ReduceOp::Sum).and_then(parallel::Work::wait);
        reduced.map_err(|e| Error::new(e.to_string()))?;
        let sum_of = |tokens: &std::ops::Range<usize>| {
            let probs = routing.probs_te.narrow(0, tokens.start as i64, tokens.len() as i64);
            probs.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
        };
        let stats = RouterStats {
            counts_ge,
            prob_sums_ge: Tensor::stack(&own.iter().map(sum_of).collect::<Vec<_>>(), 0),
            z_sum: logits_te.logsumexp([-1i64].as_slice(), false).square().sum(Kind::Float),
        };
        Ok(MoeOutput { hidden_td, stats, choices: self.dispatcher.choices(&dispatched), rows })
    }
}
