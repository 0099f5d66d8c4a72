//! An MoE layer: router, dispatch, experts, combine, and shared experts overlapped with them.

use crate::{
    balance::{BalanceScope, RouterStats},
    dispatch::{DispatchPlan, Dispatcher, PendingCombine, PendingDispatch, TokensPerExpert},
    experts::{GemmPrecision, GluNetworks, grouped_glu, grouped_glu_with_lent},
    lending::weights::LentWeights,
    plan::{chunk_range, count_tokens_by_group, group_ranges},
    router::{Router, Routing},
    selection_gap,
};
use parallel::{
    Activation, Communicator, ReduceOp, Weight, Work, add_bias, linear_f32, tensor::TensorParallel,
};
use parking_lot::Mutex;
use std::{ops::Range, sync::Arc};
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// Tensors of an MoE layer. E experts in all, D hidden, S shared ffn.
pub struct MoeWeights {
    /// `[E, D]`.
    pub router: Weight,
    /// `[E]`, added to the logits.
    pub router_bias: Option<Weight>,
    /// `[E]` fp32, added to the scores that select experts. Gradients do not train it.
    pub bias: Mutex<Option<Tensor>>,
    /// This rank's experts; a slice of each if ranks split experts.
    pub experts: GluNetworks,
    pub shared: Option<SharedExperts>,
}

/// Shared experts, which process every token.
pub struct SharedExperts {
    /// All of them as one network of width S, split like a dense layer.
    pub network: GluNetworks,
    /// `[1, D]`: the sigmoid of its product with a token multiplies the token's result.
    pub gate: Option<Weight>,
}

/// An MoE layer, with the process groups that it works in.
pub struct MoeLayer {
    pub router: Router,
    pub dispatcher: Dispatcher,
    /// The tokens that the balancing statistics cover.
    pub balance_scope: BalanceScope,
    /// The ranks that split dense matrices.
    pub tensor: TensorParallel,
    /// The ranks that have tokens of the same sequences.
    pub sequence: Arc<dyn Communicator>,
    /// Arithmetic of the routed experts.
    pub gemm: GemmPrecision,
    pub save: SavePolicy,
    pub weights: MoeWeights,
}

/// Activations that are kept for backward instead of being recomputed.
#[derive(Debug, Clone, Copy)]
pub struct SavePolicy {
    /// True if the experts' inputs are kept. Otherwise backward repeats the dispatch.
    pub dispatched: bool,
    /// True if the experts' gate-up products are kept.
    pub experts: bool,
}

/// Output of an MoE layer.
pub struct MoeOutput {
    /// `[T, D]`.
    pub hidden_td: Tensor,
    /// For the auxiliary losses.
    pub stats: RouterStats,
    pub moe_stats: MoeStats,
}

/// Work of a layer on this rank in one forward pass.
#[derive(Debug, Clone, Default)]
pub struct MoeStats {
    /// Routed tokens of this rank per expert.
    pub tokens_per_expert: TokensPerExpert,
    /// Routed tokens that this rank computed.
    pub computed_tokens: i64,
    /// The part of `computed_tokens` that belongs to lent experts.
    pub lent_tokens: i64,
    /// Bytes of expert weights that this rank lent.
    pub lent_bytes: i64,
    /// Bytes of rows that this rank sent to other nodes.
    pub internode_bytes: i64,
    pub plan_seconds: f64,
}

/// Routing of a forward pass, which recomputation repeats.
#[derive(Clone, Default)]
pub struct RoutingReplay(Arc<Mutex<Option<RecordedRouting>>>);

struct RecordedRouting {
    experts_tk: Tensor,
    plan: DispatchPlan,
    counts_ge: Tensor,
}

/// Results of the routed experts, summed per token.
pub struct RoutedOutput {
    /// `[T, D]`.
    pub hidden_td: Tensor,
    /// Result of the overlapped computation.
    pub overlapped: Option<Tensor>,
    pub moe_stats: MoeStats,
}

impl MoeLayer {
    /// Computes the layer for this rank's tokens `x_td` `[T, D]`, which belong to `sequences`
    /// sequences. A second forward with the same `replay` uses the same experts.
    ///
    /// Every rank that splits sequences by position has an equal part of each sequence. Every rank
    /// that splits matrices has a contiguous range of those tokens.
    ///
    /// # Collective
    /// Every rank of the expert group, with any number of tokens, and the ranks that split
    /// sequences and matrices.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn forward(
        &self,
        x_td: &Activation,
        sequences: usize,
        replay: &RoutingReplay,
    ) -> Result<MoeOutput, Error> {
        let groups = match self.balance_scope {
            BalanceScope::Sequence => sequences,
            BalanceScope::Microbatch | BalanceScope::Batch => 1,
        };
        let tokens = x_td.value.size()[0] as usize;
        let tokens_of_all = tokens * self.tensor.size();
        let ranges = group_ranges(
            self.tensor.rank() * tokens,
            tokens,
            tokens_of_all / groups,
            groups,
        );
        let recorded = replay.0.lock().take();
        let recorded_experts = recorded.as_ref().map(|recorded| &recorded.experts_tk);
        let routing = self.route(x_td, recorded_experts, &ranges)?;
        let (plan, counted) = match recorded {
            // The plan has the routes, so that the experts are not fetched again.
            Some(recorded) => (recorded.plan, Counted::Before(recorded.counts_ge)),
            None => self.plan(&routing.experts_tk)?,
        };
        let forward_shared = |x_td: &Activation| self.forward_shared(x_td);
        let RoutedOutput {
            mut hidden_td,
            overlapped,
            moe_stats,
        } = self.forward_planned(
            x_td,
            &routing.weights_tk,
            counted.experts(),
            &plan,
            forward_shared,
        )?;
        if let Some(shared) = overlapped {
            hidden_td = hidden_td + shared;
        }
        let counts_ge = self.count_by_group(&routing.experts_tk, counted, &ranges)?;
        *replay.0.lock() = Some(RecordedRouting {
            experts_tk: routing.experts_tk.shallow_clone(),
            plan,
            counts_ge: counts_ge.shallow_clone(),
        });
        let stats = RouterStats {
            counts_ge,
            tokens_per_group: (tokens * self.sequence.size() / groups) as f64,
            prob_sums_ge: routing.prob_sums_ge,
            z_sum: routing.z_sum,
            experts_tk: routing.experts_tk,
        };
        Ok(MoeOutput {
            hidden_td,
            stats,
            moe_stats,
        })
    }

    /// Plans the dispatch of tokens with experts `experts_tk` `[T, K]`.
    fn plan(&self, experts_tk: &Tensor) -> Result<(DispatchPlan, Counted), Error> {
        if self.dispatcher.plans_on_device(experts_tk.device()) {
            let plan = self.dispatcher.plan_on_device(experts_tk)?;
            return Ok((plan, Counted::OnDevice));
        }
        let experts = Vec::<i64>::try_from(experts_tk.flatten(0, -1).contiguous())
            .map_err(|e| Error::new(e.to_string()))?;
        let plan = self.dispatcher.plan(&experts, self.router.top_k)?;
        Ok((plan, Counted::OnHost(experts)))
    }

    fn route(
        &self,
        x_td: &Activation,
        recorded_experts: Option<&Tensor>,
        groups: &[Range<usize>],
    ) -> Result<Routing, Error> {
        // bf16 logits would be too coarse: close experts would tie.
        let mut logits_te = linear_f32(x_td, &self.weights.router)?;
        if let Some(bias) = &self.weights.router_bias {
            logits_te = add_bias(&logits_te, bias)?;
        }
        let bias = self.weights.bias.lock();
        let bias = bias.as_ref().map(Tensor::shallow_clone);
        if recorded_experts.is_none() {
            selection_gap::record(&self.router, &logits_te, bias.as_ref());
        }
        self.router
            .route(&logits_te, bias.as_ref(), recorded_experts, groups)
    }

    fn forward_shared(&self, x_td: &Activation) -> Result<Option<Tensor>, Error> {
        let Some(SharedExperts { network, gate }) = &self.weights.shared else {
            return Ok(None);
        };
        let compute = |x: &Activation| {
            let rows = x.value.size()[0];
            grouped_glu(x, network, &[rows], self.save.experts)
        };
        let out = self.tensor.column_row_parallel(x_td, compute)?;
        let Some(gate) = gate else {
            return Ok(Some(out));
        };
        let gate_t1 = linear_f32(x_td, gate)?.sigmoid().to_kind(out.kind());
        Ok(Some(out * gate_t1))
    }

    /// Counts the routed tokens of each expert in each group, `[G, E]` fp32, over the ranks that
    /// have tokens of the same sequences.
    fn count_by_group(
        &self,
        experts_tk: &Tensor,
        counted: Counted,
        groups: &[Range<usize>],
    ) -> Result<Tensor, Error> {
        let num_experts = self.router.num_experts;
        let counts_ge = match counted {
            Counted::Before(counts_ge) => return Ok(counts_ge),
            Counted::OnHost(experts) if experts_tk.device() == Device::Cpu => {
                let top_k = self.router.top_k;
                let counts = count_tokens_by_group(&experts, top_k, groups, num_experts);
                Tensor::from_slice(&counts).view([groups.len() as i64, num_experts as i64])
            }
            _ => count_by_group_on_device(experts_tk, groups, num_experts),
        };
        self.sequence
            .all_reduce(&counts_ge, ReduceOp::Sum)
            .and_then(Work::wait)
            .map_err(|e| Error::new(e.to_string()))?;
        Ok(counts_ge)
    }

    /// Computes the routed experts by `plan`: dispatch, experts, and the sum with the routing
    /// weights `weights_tk` `[T, K]`. `experts` are `[T * K]`. Calls `overlapped` while rows are in
    /// flight.
    ///
    /// # Collective
    /// Every rank of the expert group.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn forward_routed(
        &self,
        x_td: &Activation,
        weights_tk: &Tensor,
        experts: Vec<i64>,
        plan: &DispatchPlan,
        overlapped: impl FnOnce(&Activation) -> Result<Option<Tensor>, Error>,
    ) -> Result<RoutedOutput, Error> {
        self.forward_planned(x_td, weights_tk, &experts, plan, overlapped)
    }

    /// Does what [`MoeLayer::forward_routed`] does. `experts` may be empty if the plan has the
    /// routes.
    fn forward_planned(
        &self,
        x_td: &Activation,
        weights_tk: &Tensor,
        experts: &[i64],
        plan: &DispatchPlan,
        overlapped: impl FnOnce(&Activation) -> Result<Option<Tensor>, Error>,
    ) -> Result<RoutedOutput, Error> {
        let experts_here = &self.weights.experts;
        let num_chunks = self.dispatcher.chunks();
        let mut pending_weights = plan.fetch(experts_here)?;
        // All chunks are in flight before the first is computed. The results of a chunk are in
        // flight while the next one is computed.
        let chunks = self.start_chunks(x_td, weights_tk, experts, plan)?;
        let overlapped = overlapped(x_td)?;
        let mut lent_weights: Option<LentWeights> = None;
        let mut combines = Vec::new();
        let mut moe_stats = self.new_stats(plan);
        for chunk in chunks {
            let saved = x_td.saved();
            let Range { start, end } = chunk.tokens;
            let dispatched = chunk.dispatch.wait(
                move || Ok(saved.get()?.narrow(0, start, end - start)),
                self.save.dispatched,
            )?;
            if let (Some(pending), Some(lending)) = (pending_weights.take(), &plan.lending) {
                lent_weights = Some(LentWeights::new(
                    lending.clone(),
                    pending.wait()?,
                    self.save.dispatched,
                    num_chunks,
                ));
            }
            let groups = dispatched.groups.clone();
            let [_, lent_groups] = groups.split_at(plan.rank_plan.num_local);
            moe_stats.computed_tokens += groups.num_rows();
            moe_stats.lent_tokens += lent_groups.num_rows();
            moe_stats.internode_bytes += self.dispatcher.internode_bytes(&dispatched);
            let y_rd = grouped_glu_with_lent(
                &dispatched.rows_rd,
                experts_here,
                lent_weights.clone(),
                &groups,
                &self.gemm,
                self.save.experts,
            )?;
            let combine = self
                .dispatcher
                .start_combine(&y_rd, dispatched, &chunk.weights_tk)?;
            combines.push(combine);
        }
        if let Some(lent_weights) = lent_weights {
            lent_weights.release();
        }
        let mut hidden_td = combines
            .into_iter()
            .map(PendingCombine::wait)
            .collect::<Result<Vec<_>, _>>()?;
        let hidden_td = if num_chunks == 1 {
            hidden_td.remove(0)
        } else {
            Tensor::cat(&hidden_td, 0)
        };
        Ok(RoutedOutput {
            hidden_td,
            overlapped,
            moe_stats,
        })
    }

    fn start_chunks(
        &self,
        x_td: &Activation,
        weights_tk: &Tensor,
        experts: &[i64],
        plan: &DispatchPlan,
    ) -> Result<Vec<ChunkInFlight>, Error> {
        let top_k = self.router.top_k;
        let num_chunks = self.dispatcher.chunks();
        let ranges: Vec<Range<usize>> = (0..num_chunks)
            .map(|chunk| chunk_range(x_td.value.size()[0] as usize, chunk, num_chunks))
            .collect();
        let split = |rows: &Tensor| {
            if num_chunks == 1 {
                return vec![rows.shallow_clone()];
            }
            let sizes = ranges
                .iter()
                .map(|range| range.len() as i64)
                .collect::<Vec<i64>>();
            rows.split_with_sizes(&sizes, 0)
        };
        let tokens = split(&x_td.value);
        let weights = split(weights_tk);
        let mut chunks = Vec::new();
        for (index, (tokens, weights_tk)) in tokens.iter().zip(weights).enumerate() {
            let Range { start, end } = ranges[index];
            // Empty if the plan has the routes already.
            let experts = experts.get(start * top_k..end * top_k).unwrap_or_default();
            chunks.push(ChunkInFlight {
                tokens: start as i64..end as i64,
                weights_tk,
                dispatch: self.dispatcher.start(tokens, experts, top_k, plan, index)?,
            });
        }
        Ok(chunks)
    }

    /// Returns the figures that are known before any token is computed.
    fn new_stats(&self, plan: &DispatchPlan) -> MoeStats {
        let lent = plan
            .lending
            .as_ref()
            .map_or(0, |lending| lending.num_lent());
        MoeStats {
            tokens_per_expert: plan.tokens_per_expert(),
            lent_bytes: lent * self.weights.experts.bytes(),
            plan_seconds: plan.seconds,
            ..MoeStats::default()
        }
    }
}

/// Counts the tokens of `experts_tk` `[T, K]` for each expert in each group, `[G, E]` fp32, without
/// waiting for their device. Sums of whole numbers are exact in any order.
fn count_by_group_on_device(
    experts_tk: &Tensor,
    groups: &[Range<usize>],
    num_experts: usize,
) -> Tensor {
    let device = experts_tk.device();
    let ones = Tensor::ones_like(experts_tk).to_kind(Kind::Float);
    let shape = [groups.len() as i64, num_experts as i64];
    let counts_ge = Tensor::zeros(shape, (Kind::Float, device));
    for (index, group) in groups.iter().enumerate() {
        let of_group = |x: &Tensor| x.narrow(0, group.start as i64, group.len() as i64);
        let experts = of_group(experts_tk).flatten(0, -1);
        let ones = of_group(&ones).flatten(0, -1);
        let _ = counts_ge.get(index as i64).scatter_add_(0, &experts, &ones);
    }
    counts_ge
}

/// The source of the counts for the balance losses.
enum Counted {
    /// The recorded counts `[G, E]`.
    Before(Tensor),
    /// The experts `[T * K]`, which the host has fetched to plan.
    OnHost(Vec<i64>),
    /// The device, which has planned.
    OnDevice,
}

impl Counted {
    /// Returns the experts that the dispatch needs to plan its routes.
    fn experts(&self) -> &[i64] {
        match self {
            Counted::OnHost(experts) => experts,
            Counted::Before(_) | Counted::OnDevice => &[],
        }
    }
}

/// A range of a rank's tokens on the way to their experts.
struct ChunkInFlight {
    tokens: Range<i64>,
    weights_tk: Tensor,
    dispatch: PendingDispatch,
}
