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
//!
//! With one expert rank a device sorts the tokens itself; the host fetches the counts and waits
//! once per layer. With more ranks the host makes the plan, from the fetched experts.

pub use crate::hierarchy::Hierarchy;

use crate::{
    exchange::{AllToAll, DispatchRoute, PendingRows, TokenExchange},
    hierarchy,
    lending::{
        assignment::Assignment,
        least_loaded::Planner,
        transfer::{Lending, PendingWeights},
    },
    permute::Permutation,
    plan::{
        ExpertTopology, RankPlan, RoutedTokens, RowTarget, chunk_range, count_tokens_per_expert,
        plan_receive, rank_plan,
    },
};
use kernels::upload;
use parallel::{Activation, Communicator, Weight, Work};
use parking_lot::Mutex;
use std::{sync::Arc, time::Instant};
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
    /// The routes of the chunks that were started: recomputation uses them again.
    routes: Arc<Mutex<Vec<Option<ChunkRoute>>>>,
    /// Routed tokens of each chunk and physical slot of this rank's tokens, `[chunks * E]`.
    own_counts: Arc<Vec<i64>>,
}

/// The way of a chunk's tokens to their experts.
struct ChunkRoute {
    route: DispatchRoute,
    /// Rows for each expert that this rank computes.
    counts: Vec<i64>,
}

impl ChunkRoute {
    fn copy(&self) -> ChunkRoute {
        ChunkRoute {
            route: self.route.copy(),
            counts: self.counts.clone(),
        }
    }
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
    /// Returns the routed tokens of this rank per expert, `[E]`.
    pub(crate) fn tokens_per_expert(&self) -> Vec<i64> {
        let num_experts = self.physical_slots.len();
        let of_slot = |&slot: &i64| {
            let chunks = self.own_counts.iter().skip(slot as usize);
            chunks.step_by(num_experts).sum()
        };
        self.physical_slots.iter().map(of_slot).collect()
    }

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
        let count_chunk = |chunk: usize| {
            let tokens = chunk_range(experts.len() / top_k, chunk, self.chunks);
            let experts = &experts[tokens.start * top_k..tokens.end * top_k];
            let counts = count_tokens_per_expert(experts, physical_slots.len());
            in_slot_order(&counts, &physical_slots)
        };
        let own: Vec<i64> = (0..self.chunks).flat_map(count_chunk).collect();
        self.plan_from_counts(own, physical_slots.clone())
    }

    /// Plans as [`Dispatcher::plan`] does where this rank has all experts, without fetching
    /// `experts_tk` `[T, K]` from its device. Waits for the counts only.
    ///
    /// # Errors
    /// If libtorch fails.
    pub(crate) fn plan_on_device(&self, experts_tk: &Tensor) -> Result<DispatchPlan, Error> {
        let physical_slots = self.physical_slots();
        let num_experts = physical_slots.len();
        let device = experts_tk.device();
        let is_renumbered = !physical_slots.iter().copied().eq(0..num_experts as i64);
        let slots_tk = if is_renumbered {
            let slots: Vec<i32> = physical_slots.iter().map(|&slot| slot as i32).collect();
            let slots = upload(&[&slots], device)?.remove(0).to_kind(Kind::Int64);
            slots
                .index_select(0, &experts_tk.flatten(0, -1))
                .view_as(experts_tk)
        } else {
            experts_tk.shallow_clone()
        };
        let tokens = experts_tk.size()[0] as usize;
        let mut permutations = Vec::new();
        let mut ends = Vec::new();
        for chunk in 0..self.chunks {
            let range = chunk_range(tokens, chunk, self.chunks);
            let slots_tk = slots_tk.narrow(0, range.start as i64, range.len() as i64);
            let (permutation, ends_e) = Permutation::by_expert(&slots_tk, num_experts);
            permutations.push(permutation);
            ends.push(ends_e);
        }
        let ends = Vec::<i64>::try_from(Tensor::cat(&ends, 0)).map_err(failed)?;
        let counts: Vec<i64> = ends.chunks(num_experts).flat_map(differences).collect();
        let plan = self.plan_from_counts(counts.clone(), physical_slots)?;
        let route = |(permutation, counts): (Permutation, &[i64])| {
            let exchange = TokenExchange {
                permutation,
                all_to_all: None,
            };
            Some(ChunkRoute {
                route: DispatchRoute(vec![exchange]),
                counts: counts.to_vec(),
            })
        };
        let routes = permutations.into_iter().zip(counts.chunks(num_experts));
        *plan.routes.lock() = routes.map(route).collect();
        Ok(plan)
    }

    /// True if [`Dispatcher::plan_on_device`] can plan for tokens on `device`. On processors the
    /// host's plan is faster.
    pub(crate) fn plans_on_device(&self, device: Device) -> bool {
        self.group.size() == 1 && device != Device::Cpu
    }

    /// Plans from the routed tokens of this rank by chunk and physical slot, `[chunks * E]`.
    fn plan_from_counts(
        &self,
        own: Vec<i64>,
        physical_slots: Arc<Vec<i64>>,
    ) -> Result<DispatchPlan, Error> {
        let num_experts = physical_slots.len();
        let own_counts = Arc::new(own);
        let gathered;
        let counts = if self.group.size() == 1 {
            &*own_counts
        } else {
            gathered = all_gather_counts(&self.group, &own_counts)?;
            &gathered
        };
        let started = Instant::now();
        let assignment = self.assign(counts, num_experts);
        let rank_plan = rank_plan(
            counts,
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
            routes: Arc::default(),
            own_counts,
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

    /// Starts to send the tokens `x_td` `[T, D]` of chunk `chunk` to their `experts` `[T * K]`. The
    /// experts of a chunk that was started before are not read.
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
        let known = plan
            .routes
            .lock()
            .get(chunk)
            .and_then(Option::as_ref)
            .map(ChunkRoute::copy);
        let ChunkRoute { route, counts } = match known {
            Some(known) => known,
            None => {
                let made = self.route(x_td.device(), experts, top_k, plan, chunk)?;
                let mut routes = plan.routes.lock();
                routes.resize_with(self.chunks, || None);
                routes[chunk] = Some(made.copy());
                made
            }
        };
        let pending = route.start(x_td)?;
        Ok(PendingDispatch {
            route,
            counts,
            pending,
        })
    }

    /// Plans the route of a chunk's tokens, which are on `device`.
    fn route(
        &self,
        device: Device,
        experts: &[i64],
        top_k: usize,
        plan: &DispatchPlan,
        chunk: usize,
    ) -> Result<ChunkRoute, Error> {
        let Some(hierarchy) = &self.hierarchy else {
            return self.direct_route(device, experts, top_k, plan, chunk);
        };
        let (route, counts) = hierarchy::dispatch_route(
            hierarchy,
            &self.topology.nodes,
            &self.routed_tokens(experts, top_k, plan, chunk),
            &plan.rank_plan.computed_experts,
            device,
        )?;
        Ok(ChunkRoute { route, counts })
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

    fn direct_route(
        &self,
        device: Device,
        experts: &[i64],
        top_k: usize,
        plan: &DispatchPlan,
        chunk: usize,
    ) -> Result<ChunkRoute, Error> {
        let DispatchPlan {
            physical_slots,
            rank_plan,
            ..
        } = plan;
        let chunk_plan = &rank_plan.chunks[chunk];
        let send = chunk_plan.send_plan(experts, top_k, physical_slots, &self.topology);
        let per_token = top_k * self.topology.slices;
        let ranks = self.group.size();
        if ranks == 1 {
            let exchange = TokenExchange::new(&send, per_token, None, device)?;
            return Ok(ChunkRoute {
                route: DispatchRoute(vec![exchange]),
                counts: send.counts,
            });
        }
        let receive = plan_receive(
            &chunk_plan.incoming,
            &rank_plan.computed_experts,
            ranks,
            physical_slots.len(),
        );
        let received = Some((&self.group, &receive));
        let exchange = TokenExchange::new(&send, per_token, received, device)?;
        Ok(ChunkRoute {
            route: DispatchRoute(vec![exchange]),
            counts: receive.counts,
        })
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
        let (tokens, top_k) = weights_tk.size2().map_err(failed)?;
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

/// Puts counts by expert into the order of physical slots.
fn in_slot_order(counts: &[i64], physical_slots: &[i64]) -> Vec<i64> {
    let mut by_slot = vec![0; counts.len()];
    for (&count, &slot) in counts.iter().zip(physical_slots) {
        by_slot[slot as usize] = count;
    }
    by_slot
}

/// Returns the lengths of consecutive ranges with these ends.
fn differences(ends: &[i64]) -> impl Iterator<Item = i64> {
    let starts = std::iter::once(&0).chain(ends);
    ends.iter().zip(starts).map(|(end, start)| end - start)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::new(error.to_string())
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
    let all = Vec::<i32>::try_from(all).map_err(failed)?;
    Ok(all.into_iter().map(i64::from).collect())
}
