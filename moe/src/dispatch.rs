//! Dispatch and combine: tokens go to the ranks that compute their experts, and results return.
//!
//! The plan follows from the routed tokens of all ranks. An expert's tokens go to its home, or, if
//! loads would be uneven, also to helpers that the home lends the weights to ([`LeastLoaded`]).
//! Rows are sent there directly, or through one rank of each node ([`Hierarchy`]).
//!
//! # Collective
//! Every rank of the expert group, in the same order: an all-gather of counts, an all-to-all of
//! rows to the experts, and one back. Backward repeats the last two in reverse order.
//! Hierarchical dispatch adds three small exchanges.

pub use crate::hierarchy::Hierarchy;

use crate::exchange::{AllToAll, DispatchRoute, PendingRows, TokenExchange};
use crate::hierarchy;
use crate::lending::assignment::Assignment;
use crate::lending::least_loaded::Planner;
use crate::lending::transfer::{Lending, PendingWeights};
use crate::permute::Permutation;
use crate::plan::{
    ExpertTopology, RankPlan, RoutedTokens, RowTarget, chunk_range, count_tokens_per_expert,
    plan_receive, plan_send, rank_plan,
};
use parallel::{Activation, Communicator, Weight, Work};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// Least-loaded dispatch: overloaded owners lend experts to helpers.
#[derive(Clone)]
pub struct LeastLoaded {
    /// Plans the lending of all layers.
    pub planner: Arc<Mutex<Planner>>,
    /// The ranks of the expert group; carries only weights and their gradients.
    pub lending: Arc<dyn Communicator>,
}

/// Dispatches the tokens of a layer to the ranks of an expert group.
pub struct Dispatcher {
    group: Arc<dyn Communicator>,
    topology: ExpertTopology,
    least_loaded: Option<LeastLoaded>,
    hierarchy: Option<Hierarchy>,
    chunks: usize,
    /// The physical slot of each expert; each owner holds a range of slots.
    physical_slots: Mutex<Arc<Vec<i64>>>,
}

/// Destinations of a layer's routed tokens. Forward and recomputation use the same plan.
#[derive(Clone)]
pub struct DispatchPlan {
    physical_slots: Arc<Vec<i64>>,
    pub(crate) rank_plan: Arc<RankPlan>,
    pub(crate) lending: Option<Arc<Lending>>,
    /// Seconds of planning, without the collective.
    pub seconds: f64,
}

/// Rows in flight to their experts.
pub struct PendingDispatch {
    route: DispatchRoute,
    counts: Vec<i64>,
    pending: PendingRows,
}

/// Rows at their experts, and the return path.
pub struct Dispatched {
    /// `[R, D]`, in the order of the experts that this rank computes.
    pub rows_rd: Activation,
    /// Rows for each expert that this rank computes: its own, then lent ones.
    pub counts: Vec<i64>,
    route: DispatchRoute,
}

/// Results on the return path to their tokens.
pub struct PendingCombine {
    exchange: TokenExchange,
    pending: PendingRows,
    weights_tc: Option<Tensor>,
}

impl DispatchPlan {
    /// Starts to send lent weights to helpers. Returns None if no rank lends an expert.
    pub(crate) fn fetch(
        &self,
        gate_up_proj: &Weight,
        down_proj: &Weight,
    ) -> Result<Option<PendingWeights>, Error> {
        self.lending
            .as_ref()
            .map(|lending| lending.fetch(&gate_up_proj.value(), &down_proj.value()))
            .transpose()
    }
}

impl Dispatcher {
    /// Creates a dispatcher of `num_experts` experts over the ranks of `group`, which sends the
    /// tokens in `chunks` chunks.
    pub fn new(
        group: Arc<dyn Communicator>,
        num_experts: usize,
        topology: ExpertTopology,
        least_loaded: Option<LeastLoaded>,
        hierarchy: Option<Hierarchy>,
        chunks: usize,
    ) -> Dispatcher {
        let physical_slots = Mutex::new(Arc::new((0..num_experts as i64).collect()));
        Dispatcher {
            group,
            topology,
            least_loaded,
            hierarchy,
            chunks,
            physical_slots,
        }
    }

    /// Returns the physical slot of each expert. The first owner holds the first slots, the next
    /// owner those that follow.
    pub fn physical_slots(&self) -> Arc<Vec<i64>> {
        self.physical_slots.lock().clone()
    }

    /// Sets the physical slot of each expert, after experts have moved.
    pub fn set_physical_slots(&self, physical_slots: Vec<i64>) {
        *self.physical_slots.lock() = Arc::new(physical_slots);
    }

    /// Returns the number of chunks in which tokens are sent.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// Plans which ranks compute the routed tokens. `experts` `[T * K]` are the experts of this
    /// rank's tokens.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn plan(&self, experts: &[i64], top_k: usize) -> Result<DispatchPlan, Error> {
        let physical_slots = self.physical_slots();
        let num_experts = physical_slots.len();
        let count_chunk = |chunk: usize| {
            let tokens = chunk_range(experts.len() / top_k, chunk, self.chunks);
            let experts = &experts[tokens.start * top_k..tokens.end * top_k];
            let slots = to_physical_slots(experts, &physical_slots);
            count_tokens_per_expert(&slots, num_experts)
        };
        let own: Vec<i64> = (0..self.chunks).flat_map(count_chunk).collect();
        let counts = if self.group.size() == 1 {
            own
        } else {
            all_gather_counts(&self.group, &own)?
        };
        let started = Instant::now();
        let assignment = self.assign(&counts, num_experts);
        let rank_plan = rank_plan(
            &counts,
            self.chunks,
            &assignment,
            &self.topology,
            self.group.rank(),
        );
        let seconds = started.elapsed().as_secs_f64();
        let lending = self
            .least_loaded
            .as_ref()
            .and_then(|ll| Lending::new(&rank_plan, &self.topology, &ll.lending));
        Ok(DispatchPlan {
            physical_slots,
            rank_plan: Arc::new(rank_plan),
            lending,
            seconds,
        })
    }

    fn assign(&self, counts: &[i64], num_experts: usize) -> Assignment {
        let loads: Vec<i64> = (0..num_experts)
            .map(|e| counts.iter().skip(e).step_by(num_experts).sum())
            .collect();
        let owners = self.topology.owners();
        match &self.least_loaded {
            Some(LeastLoaded { planner, .. }) => planner.lock().plan(&loads, owners),
            None => Assignment::standard(&loads, owners),
        }
    }

    /// Starts to send the tokens `x_td` `[T, D]` of chunk `chunk` to their `experts` `[T * K]`.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn start(
        &self,
        x_td: &Tensor,
        experts: &[i64],
        top_k: usize,
        plan: &DispatchPlan,
        chunk: usize,
    ) -> Result<PendingDispatch, Error> {
        let routed = self.routed_tokens(experts, top_k, plan, chunk);
        let device = x_td.device();
        let (route, counts) = match &self.hierarchy {
            Some(hierarchy) => hierarchy::dispatch_route(
                hierarchy,
                &self.topology.nodes,
                &routed,
                &plan.rank_plan.computed_experts,
                device,
            )?,
            None => self.direct_route(&routed, plan, chunk, device),
        };
        let pending = route.start(x_td)?;
        Ok(PendingDispatch {
            route,
            counts,
            pending,
        })
    }

    /// Returns the destinations of a chunk's routed tokens: for an expert that ranks split, one
    /// for each rank with a slice of it.
    fn routed_tokens(
        &self,
        experts: &[i64],
        top_k: usize,
        plan: &DispatchPlan,
        chunk: usize,
    ) -> RoutedTokens {
        let slices = self.topology.slices;
        let num_experts = plan.physical_slots.len();
        let experts = to_physical_slots(experts, &plan.physical_slots);
        let owners = plan.rank_plan.chunks[chunk].owners(&experts, num_experts);
        let targets = experts.iter().zip(owners).flat_map(|(&expert, owner)| {
            (0..slices).map(move |slice| {
                Some(RowTarget {
                    rank: owner * slices + slice,
                    expert: expert as usize,
                })
            })
        });
        RoutedTokens {
            targets: targets.collect(),
            per_token: top_k * slices,
            num_experts,
        }
    }

    /// Plans the direct route. Also returns the rows for each expert that this rank computes.
    fn direct_route(
        &self,
        routed: &RoutedTokens,
        plan: &DispatchPlan,
        chunk: usize,
        device: Device,
    ) -> (DispatchRoute, Vec<i64>) {
        let ranks = self.group.size();
        let send = plan_send(routed, ranks);
        let permutation = Permutation::new(&send, routed.per_token, device);
        if ranks == 1 {
            let exchange = TokenExchange {
                permutation,
                all_to_all: None,
            };
            return (DispatchRoute(vec![exchange]), send.counts);
        }
        let receive = plan_receive(
            &plan.rank_plan.chunks[chunk].incoming,
            &plan.rank_plan.computed_experts,
            ranks,
            routed.num_experts,
        );
        let all_to_all = AllToAll::ordered(self.group.clone(), send.input_splits, &receive, device);
        let exchange = TokenExchange {
            permutation,
            all_to_all: Some(all_to_all),
        };
        (DispatchRoute(vec![exchange]), receive.counts)
    }

    /// Starts to return the experts' results `y_rd` `[R, D]` to their tokens, which sum them with
    /// the routing weights `weights_tk` `[T, K]`.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn start_combine(
        &self,
        y_rd: &Tensor,
        dispatched: Dispatched,
        weights_tk: &Tensor,
    ) -> Result<PendingCombine, Error> {
        let weights_tc = self.repeat_per_slice(weights_tk)?;
        let mut exchanges = dispatched.route.0;
        let last = exchanges
            .pop()
            .ok_or_else(|| Error::new("combine: the dispatch has no exchange"))?;
        let pending = last.start_combine(y_rd)?;
        let Some(first) = exchanges.pop() else {
            return Ok(PendingCombine {
                exchange: last,
                pending,
                weights_tc: Some(weights_tc),
            });
        };
        // Each node sums its results and returns one row per token.
        let node_weights = first.run(&weights_tc)?;
        let summed = last.wait_combine(pending, Some(&node_weights))?;
        let pending = first.start_combine(&summed)?;
        Ok(PendingCombine {
            exchange: first,
            pending,
            weights_tc: None,
        })
    }

    /// Repeats each routing weight for every slice of its expert: `[T, K]` to `[T, K * slices]`.
    fn repeat_per_slice(&self, weights_tk: &Tensor) -> Result<Tensor, Error> {
        if self.topology.slices == 1 {
            return Ok(weights_tk.shallow_clone());
        }
        let (tokens, top_k) = weights_tk.size2().map_err(|e| Error::new(e.to_string()))?;
        let slices = self.topology.slices as i64;
        let repeated = weights_tk
            .unsqueeze(-1)
            .expand([tokens, top_k, slices], false);
        Ok(repeated.reshape([tokens, top_k * slices]))
    }

    /// Returns the bytes of rows that this rank sent to experts on other nodes, without indices
    /// and weights. An equal number returns, and backward sends twice that number.
    pub fn internode_bytes(&self, dispatched: &Dispatched) -> i64 {
        let Some(AllToAll { input_splits, .. }) = &dispatched.route.first().all_to_all else {
            return 0;
        };
        let node = self.topology.nodes[self.group.rank()];
        let rows: i64 = match &self.hierarchy {
            Some(hierarchy) => {
                input_splits.iter().sum::<i64>() - input_splits[hierarchy.inter_node.rank()]
            }
            None => input_splits
                .iter()
                .zip(&self.topology.nodes)
                .filter(|(_, other)| **other != node)
                .map(|(rows, _)| rows)
                .sum(),
        };
        let value = &dispatched.rows_rd.value;
        rows * value.size()[1] * value.kind().elt_size_in_bytes() as i64
    }
}

impl PendingDispatch {
    /// Waits for the rows. If `keep` is false, backward calls `saved` for the tokens and sends
    /// them again.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn wait(
        self,
        saved: impl Fn() -> Result<Tensor, Error> + Send + 'static,
        keep: bool,
    ) -> Result<Dispatched, Error> {
        let PendingDispatch {
            route,
            counts,
            pending,
        } = self;
        let rows = route.wait(pending)?;
        let rows_rd = if keep {
            Activation::kept(&rows)
        } else {
            let again = route.copy();
            Activation::recomputable(rows, move || again.run(&saved()?))
        };
        Ok(Dispatched {
            rows_rd,
            counts,
            route,
        })
    }
}

impl PendingCombine {
    /// Waits for the results and sums them per token: `[T, D]`.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn wait(self) -> Result<Tensor, Error> {
        self.exchange
            .wait_combine(self.pending, self.weights_tc.as_ref())
    }
}

fn to_physical_slots(experts: &[i64], physical_slots: &[i64]) -> Vec<i64> {
    experts
        .iter()
        .map(|&expert| physical_slots[expert as usize])
        .collect()
}

/// Gathers the counts of all ranks, in rank order. Counts of rows fit 32 bits.
fn all_gather_counts(group: &Arc<dyn Communicator>, counts: &[i64]) -> Result<Vec<i64>, Error> {
    let own: Vec<i32> = counts.iter().map(|&count| count as i32).collect();
    let all = Tensor::empty(
        [(own.len() * group.size()) as i64],
        (Kind::Int, Device::Cpu),
    );
    group
        .all_gather(&all, &Tensor::from_slice(&own))
        .and_then(Work::wait)?;
    let all = Vec::<i32>::try_from(all).map_err(|e| Error::new(e.to_string()))?;
    Ok(all.into_iter().map(i64::from).collect())
}
