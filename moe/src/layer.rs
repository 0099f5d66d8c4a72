//! One mixture-of-experts layer: router, dispatch, experts, combine, and shared experts beside them.

use crate::balance::{RouterStats, Statistics};
use crate::borrowed::Borrowed;
use crate::dispatch::{Dispatcher, Plan, Returning};
use crate::experts::{Gemm, grouped_swiglu, grouped_swiglu_with};
use crate::plan::{count, count_choices, part_of, segments};
use crate::router::{Router, Routing};
use parallel::tensor::TensorParallel;
use parallel::{Activation, Communicator, ReduceOp, Weight, linears};
use parking_lot::Mutex;
use std::sync::Arc;
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
    /// The arithmetic of the routed experts' products.
    pub gemm: Gemm,
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
    /// What it did.
    pub seen: Seen,
}

/// What a layer did with this rank's tokens, and for others.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// The experts of each token, `[T * K]`.
    pub experts: Vec<i64>,
    /// This rank's choices of each expert, `[E]`.
    pub choices: Vec<i64>,
    /// Rows that this rank worked on.
    pub rows: i64,
    /// Those of them that were for borrowed experts.
    pub borrowed_rows: i64,
    /// Bytes of experts' weights that this rank lent.
    pub lent_bytes: i64,
    /// Bytes of rows that it sent to other nodes.
    pub bytes_across: i64,
    /// Seconds that the plan took.
    pub plan_seconds: f64,
}

/// What a forward that is computed again has to do as before: which experts were chosen, and who worked on them.
#[derive(Clone, Default)]
pub struct Replay(Arc<Mutex<Option<(Tensor, Plan)>>>);

/// Experts' results, by token.
pub struct Mixed {
    /// `[T, D]`.
    pub hidden_td: Tensor,
    /// What was computed meanwhile.
    pub beside: Option<Tensor>,
    /// What was done.
    pub seen: Seen,
}

impl MoeLayer {
    /// This rank's tokens `x_td` `[T, D]` through the layer: as many of each of `sequences` sequences on every rank that
    /// splits them by position, and of those a part of neighbours on each that splits matrices. A second forward with the
    /// same `replay` makes the same choices.
    ///
    /// # Collective
    /// Every rank of the expert group, with any number of tokens, and those that split sequences and matrices.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn forward(
        &self,
        x_td: &Activation,
        sequences: usize,
        replay: &Replay,
    ) -> Result<MoeOutput, Error> {
        let tokens = x_td.value.size()[0] as usize;
        let logits_te = linears(x_td, &[&self.weights.gate])?
            .remove(0)
            .to_kind(Kind::Float);
        let bias = self
            .weights
            .bias
            .as_ref()
            .map(|bias| bias.lock().shallow_clone());
        let before = replay.0.lock().take();
        let (chosen, plan) =
            before.map_or((None, None), |(chosen, plan)| (Some(chosen), Some(plan)));
        let in_all = tokens * self.tensor.size();
        let groups = if self.statistics == Statistics::Sequence {
            sequences
        } else {
            1
        };
        let own = segments(self.tensor.rank() * tokens, tokens, in_all / groups, groups);
        let routing = self
            .router
            .route(&logits_te, bias.as_ref(), chosen.as_ref(), &own)?;
        let experts = Vec::<i64>::try_from(routing.experts_tk.flatten(0, -1).contiguous())
            .map_err(|e| Error::new(e.to_string()))?;
        let Router {
            top_k, num_experts, ..
        } = self.router;
        let plan = match plan {
            Some(plan) => plan,
            None => self.dispatcher.plan(&experts, top_k)?,
        };
        *replay.0.lock() = Some((routing.experts_tk.shallow_clone(), plan.clone()));
        let shared = |x_td: &Activation| match &self.weights.shared {
            None => Ok(None),
            Some((gate_up, down)) => {
                let network = |x: &Activation| {
                    grouped_swiglu(x, gate_up, down, &[x.value.size()[0]], self.keep.experts)
                };
                self.tensor.block(x_td, network).map(Some)
            }
        };
        let Mixed {
            mut hidden_td,
            beside,
            seen,
        } = self.mix(x_td, &routing.weights_tk, experts, &plan, shared)?;
        if let Some(shared) = beside {
            hidden_td = hidden_td + shared;
        }

        let counts = count_choices(&seen.experts, top_k, &own, num_experts);
        let counts_ge = Tensor::from_slice(&counts).view([groups as i64, num_experts as i64]);
        let counts_ge = counts_ge.to_device(x_td.value.device());
        let reduced = self
            .sequence
            .all_reduce(&counts_ge, ReduceOp::Sum)
            .and_then(parallel::Work::wait);
        reduced.map_err(|e| Error::new(e.to_string()))?;
        let Routing {
            prob_sums_ge,
            z_sum,
            ..
        } = routing;
        let stats = RouterStats {
            counts_ge,
            prob_sums_ge,
            z_sum,
        };
        Ok(MoeOutput {
            hidden_td,
            stats,
            seen,
        })
    }

    /// Dispatch, experts and the sum with weights `weights_tk` `[T, K]`, for choices `experts` `[T * K]` that are made and planned. While
    /// rows travel, `beside` is computed.
    ///
    /// # Collective
    /// Every rank of the expert group.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn mix(
        &self,
        x_td: &Activation,
        weights_tk: &Tensor,
        experts: Vec<i64>,
        plan: &Plan,
        beside: impl FnOnce(&Activation) -> Result<Option<Tensor>, Error>,
    ) -> Result<Mixed, Error> {
        let Router {
            top_k, num_experts, ..
        } = &self.router;
        let MoeWeights { gate_up, down, .. } = &self.weights;
        let parts = self.dispatcher.parts();
        let mut fetching = plan.fetch(gate_up, down)?;
        // All parts are on their way before the first is worked on; its results are while the next one is.
        let ranges: Vec<_> = (0..parts)
            .map(|part| part_of(experts.len() / top_k, part, parts))
            .collect();
        let sizes: Vec<i64> = ranges.iter().map(|range| range.len() as i64).collect();
        let (tokens, weights) = match parts {
            1 => (
                vec![x_td.value.shallow_clone()],
                vec![weights_tk.shallow_clone()],
            ),
            _ => (
                x_td.value.split_with_sizes(&sizes, 0),
                weights_tk.split_with_sizes(&sizes, 0),
            ),
        };
        let mut sending = Vec::new();
        for (part, (tokens, range)) in tokens.iter().zip(&ranges).enumerate() {
            let experts = &experts[range.start * top_k..range.end * top_k];
            sending.push(self.dispatcher.start(tokens, experts, *top_k, plan, part)?);
        }
        let beside = beside(x_td)?;
        let mut borrowed = None;
        let mut returning = Vec::new();
        let mut rows = 0;
        let mut borrowed_rows = 0;
        let mut bytes_across = 0;
        for ((sending, range), weights) in sending.into_iter().zip(&ranges).zip(&weights) {
            let saved = x_td.saved();
            let start = range.start as i64;
            let len = range.len() as i64;
            let dispatched = sending.arrive(
                move || Ok(saved.get()?.narrow(0, start, len)),
                self.keep.rows,
            )?;
            if let (Some(fetching), Some(lending)) = (fetching.take(), &plan.lending) {
                borrowed = Some(Borrowed::new(
                    lending.clone(),
                    fetching.arrive()?,
                    self.keep.rows,
                    parts,
                ));
            }
            let counts = &dispatched.counts;
            rows += counts.iter().sum::<i64>();
            borrowed_rows += counts[plan.route.held..].iter().sum::<i64>();
            bytes_across += self.dispatcher.bytes_across(&dispatched);
            let rows_rd = &dispatched.rows_rd;
            let borrowed = borrowed.clone();
            let y_rd = grouped_swiglu_with(
                rows_rd,
                gate_up,
                down,
                borrowed,
                counts,
                self.gemm,
                self.keep.experts,
            )?;
            returning.push(self.dispatcher.start_back(&y_rd, dispatched, weights)?);
        }
        borrowed.iter().for_each(Borrowed::forget);
        let mut hidden_td = returning
            .into_iter()
            .map(Returning::arrive)
            .collect::<Result<Vec<_>, _>>()?;
        let hidden_td = if parts == 1 {
            hidden_td.remove(0)
        } else {
            Tensor::cat(&hidden_td, 0)
        };
        let elements: i64 = [gate_up, down]
            .iter()
            .map(|weight| weight.shape()[1..].iter().product::<i64>())
            .sum();
        let lent = plan
            .lending
            .as_ref()
            .map_or(0, |lending| lending.num_lent());
        let seen = Seen {
            choices: count(&experts, *num_experts),
            experts,
            rows,
            borrowed_rows,
            lent_bytes: lent * elements * gate_up.kind().elt_size_in_bytes() as i64,
            bytes_across,
            plan_seconds: plan.seconds,
        };
        Ok(Mixed {
            hidden_td,
            beside,
            seen,
        })
    }
}
