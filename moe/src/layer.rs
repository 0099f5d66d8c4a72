//! An MoE layer: router, dispatch, experts, combine, and shared experts overlapped with them.

use crate::balance::{BalanceScope, RouterStats};
use crate::dispatch::{DispatchPlan, Dispatcher, PendingCombine};
use crate::experts::{GemmPrecision, grouped_swiglu, grouped_swiglu_with_lent};
use crate::lending::weights::LentWeights;
use crate::plan::{chunk_range, count_tokens_by_group, count_tokens_per_expert, group_ranges};
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
    pub router: Weight,
    /// `[E]` fp32, not trained by gradient: the loss-free bias, where it is used.
    pub bias: Option<Mutex<Tensor>>,
    /// `[L, 2F, D]`; less of F where ranks split experts.
    pub gate_up_proj: Weight,
    /// `[L, D, F]`, likewise.
    pub down_proj: Weight,
    /// `[1, 2S, D]` and `[1, D, S]`: experts that every token visits, as one; split as dense layers are.
    pub shared: Option<(Weight, Weight)>,
}

/// An MoE layer.
pub struct MoeLayer {
    /// Chooses experts.
    pub router: Router,
    /// Carries rows to them.
    pub dispatcher: Dispatcher,
    /// The tokens that expert use is counted over.
    pub balance_scope: BalanceScope,
    /// The ranks that split dense matrices.
    pub tensor: TensorParallel,
    /// The ranks that have tokens of the same sequences.
    pub sequence: Arc<dyn Communicator>,
    /// The arithmetic of the routed experts' products.
    pub gemm: GemmPrecision,
    /// What is kept for backward.
    pub keep: SavePolicy,
    /// The layer's tensors.
    pub weights: MoeWeights,
}

/// What is kept for backward, and not computed again.
#[derive(Debug, Clone, Copy)]
pub struct SavePolicy {
    /// Rows as they are at their experts.
    pub dispatched: bool,
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
    pub moe_stats: MoeStats,
}

/// What a layer did with this rank's tokens, and for others.
#[derive(Debug, Clone, Default)]
pub struct MoeStats {
    /// The experts of each token, `[T * K]`.
    pub experts: Vec<i64>,
    /// Routed tokens of this rank per expert, `[E]`.
    pub tokens_per_expert: Vec<i64>,
    /// Rows that this rank worked on.
    pub computed_tokens: i64,
    /// Those of them that were for lent experts.
    pub lent_tokens: i64,
    /// Bytes of experts' weights that this rank lent.
    pub lent_bytes: i64,
    /// Bytes of rows that it sent to other nodes.
    pub internode_bytes: i64,
    /// Seconds that the plan took.
    pub plan_seconds: f64,
}

/// What a forward that is computed again has to do as before: which experts were chosen, and who worked on them.
#[derive(Clone, Default)]
pub struct RoutingReplay(Arc<Mutex<Option<(Tensor, DispatchPlan)>>>);

/// Experts' results, by token.
pub struct RoutedOutput {
    /// `[T, D]`.
    pub hidden_td: Tensor,
    /// What was computed meanwhile.
    pub overlapped: Option<Tensor>,
    /// What was done.
    pub moe_stats: MoeStats,
}

impl MoeLayer {
    /// This rank's tokens `x_td` `[T, D]` through the layer: as many of each of `sequences` sequences on every rank that
    /// splits them by position, and of those a range of neighbours on each that splits matrices. A second forward with the
    /// same `replay` chooses the same experts.
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
        replay: &RoutingReplay,
    ) -> Result<MoeOutput, Error> {
        let tokens = x_td.value.size()[0] as usize;
        let logits_te = linears(x_td, &[&self.weights.router])?
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
        let groups = if self.balance_scope == BalanceScope::Sequence {
            sequences
        } else {
            1
        };
        let own = group_ranges(self.tensor.rank() * tokens, tokens, in_all / groups, groups);
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
            Some((gate_up_proj, down_proj)) => {
                let network = |x: &Activation| {
                    grouped_swiglu(
                        x,
                        gate_up_proj,
                        down_proj,
                        &[x.value.size()[0]],
                        self.keep.experts,
                    )
                };
                self.tensor.column_row_parallel(x_td, network).map(Some)
            }
        };
        let RoutedOutput {
            mut hidden_td,
            overlapped,
            moe_stats,
        } = self.forward_routed(x_td, &routing.weights_tk, experts, &plan, shared)?;
        if let Some(shared) = overlapped {
            hidden_td = hidden_td + shared;
        }

        let counts = count_tokens_by_group(&moe_stats.experts, top_k, &own, num_experts);
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
            moe_stats,
        })
    }

    /// Dispatch, experts and the sum with weights `weights_tk` `[T, K]`, for routed tokens `experts` `[T * K]` that are made and planned. While
    /// rows travel, `overlapped` is computed.
    ///
    /// # Collective
    /// Every rank of the expert group.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn forward_routed(
        &self,
        x_td: &Activation,
        weights_tk: &Tensor,
        experts: Vec<i64>,
        plan: &DispatchPlan,
        overlapped: impl FnOnce(&Activation) -> Result<Option<Tensor>, Error>,
    ) -> Result<RoutedOutput, Error> {
        let Router {
            top_k, num_experts, ..
        } = &self.router;
        let MoeWeights {
            gate_up_proj,
            down_proj,
            ..
        } = &self.weights;
        let chunks = self.dispatcher.chunks();
        let mut fetching = plan.fetch(gate_up_proj, down_proj)?;
        // All chunks are in flight before the first is worked on; its results are while the next one is.
        let ranges: Vec<_> = (0..chunks)
            .map(|chunk| chunk_range(experts.len() / top_k, chunk, chunks))
            .collect();
        let sizes: Vec<i64> = ranges.iter().map(|range| range.len() as i64).collect();
        let (tokens, weights) = match chunks {
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
        for (chunk, (tokens, range)) in tokens.iter().zip(&ranges).enumerate() {
            let experts = &experts[range.start * top_k..range.end * top_k];
            sending.push(
                self.dispatcher
                    .start(tokens, experts, *top_k, plan, chunk)?,
            );
        }
        let overlapped = overlapped(x_td)?;
        let mut lent_weights = None;
        let mut returning = Vec::new();
        let mut computed_tokens = 0;
        let mut lent_tokens = 0;
        let mut internode_bytes = 0;
        for ((sending, range), weights) in sending.into_iter().zip(&ranges).zip(&weights) {
            let saved = x_td.saved();
            let start = range.start as i64;
            let len = range.len() as i64;
            let dispatched = sending.wait(
                move || Ok(saved.get()?.narrow(0, start, len)),
                self.keep.dispatched,
            )?;
            if let (Some(fetching), Some(lending)) = (fetching.take(), &plan.lending) {
                lent_weights = Some(LentWeights::new(
                    lending.clone(),
                    fetching.wait()?,
                    self.keep.dispatched,
                    chunks,
                ));
            }
            let counts = &dispatched.counts;
            computed_tokens += counts.iter().sum::<i64>();
            lent_tokens += counts[plan.rank_plan.num_local..].iter().sum::<i64>();
            internode_bytes += self.dispatcher.internode_bytes(&dispatched);
            let rows_rd = &dispatched.rows_rd;
            let lent_weights = lent_weights.clone();
            let y_rd = grouped_swiglu_with_lent(
                rows_rd,
                gate_up_proj,
                down_proj,
                lent_weights,
                counts,
                self.gemm,
                self.keep.experts,
            )?;
            returning.push(self.dispatcher.start_combine(&y_rd, dispatched, weights)?);
        }
        lent_weights.iter().for_each(LentWeights::release);
        let mut hidden_td = returning
            .into_iter()
            .map(PendingCombine::wait)
            .collect::<Result<Vec<_>, _>>()?;
        let hidden_td = if chunks == 1 {
            hidden_td.remove(0)
        } else {
            Tensor::cat(&hidden_td, 0)
        };
        let elements: i64 = [gate_up_proj, down_proj]
            .iter()
            .map(|weight| weight.shape()[1..].iter().product::<i64>())
            .sum();
        let lent = plan
            .lending
            .as_ref()
            .map_or(0, |lending| lending.num_lent());
        let moe_stats = MoeStats {
            tokens_per_expert: count_tokens_per_expert(&experts, *num_experts),
            experts,
            computed_tokens,
            lent_tokens,
            lent_bytes: lent * elements * gate_up_proj.kind().elt_size_in_bytes() as i64,
            internode_bytes,
            plan_seconds: plan.seconds,
        };
        Ok(RoutedOutput {
            hidden_td,
            overlapped,
            moe_stats,
        })
    }
}
