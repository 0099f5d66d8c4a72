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
//! With one expert rank a device sorts the tokens itself, and the host reads the counts only if it
//! needs them. With more ranks the host makes the plan, from the fetched experts.

pub use crate::hierarchy::Hierarchy;

use crate::{
    exchange::{AllToAll, DispatchRoute, PendingRows, TokenExchange},
    experts::GluNetworks,
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
use kernels::{RowGroups, upload};
use parallel::{Activation, Communicator, Work};
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
    /// Routed tokens of this rank by physical slot, for each chunk.
    own_tokens: Vec<RowGroups>,
}

/// Routed tokens of a rank per expert. A device may still be counting them.
#[derive(Debug, Clone, Default)]
pub struct TokensPerExpert {
    physical_slots: Arc<Vec<i64>>,
    by_slot: Vec<RowGroups>,
}

impl TokensPerExpert {
    /// Returns the routed tokens of each expert, `[E]`. Waits for the device that counts them.
    pub fn get(&self) -> Vec<i64> {
        let of_slot = |&slot: &i64| {
            let chunks = self.by_slot.iter();
            chunks.map(|chunk| chunk.counts()[slot as usize]).sum()
        };
        self.physical_slots.iter().map(of_slot).collect()
    }
}

/// The way of a chunk's tokens to their experts.
struct ChunkRoute {
    route: DispatchRoute,
    /// Rows for each expert that this rank computes.
    groups: RowGroups,
}

impl ChunkRoute {
    fn copy(&self) -> ChunkRoute {
        ChunkRoute {
            route: self.route.copy(),
            groups: self.groups.clone(),
        }
    }
}

/// Rows in flight to their experts.
pub struct PendingDispatch {
    route: DispatchRoute,
    groups: RowGroups,
    pending: PendingRows,
}

/// Rows at their experts, and the return path.
pub struct Dispatched {
    /// `[R, D]`, in the order of the experts that this rank computes.
    pub rows_rd: Activation,
    /// Rows for each expert that this rank computes: its own, then lent ones.
    pub groups: RowGroups,
    route: DispatchRoute,
}

/// Results on the return path to their tokens.
pub struct PendingCombine {
    exchange: TokenExchange,
    pending: PendingRows,
    weights_tc: Option<Tensor>,
}

impl DispatchPlan {
    /// Returns the routed tokens of this rank per expert.
    pub(crate) fn tokens_per_expert(&self) -> TokensPerExpert {
        TokensPerExpert {
            physical_slots: self.physical_slots.clone(),
            by_slot: self.own_tokens.clone(),
        }
    }

    /// Starts to send lent weights to helpers. Returns None if no rank lends an expert.
    pub(crate) fn fetch(&self, experts: &GluNetworks) -> Result<Option<PendingWeights>, Error> {
        let fetch = |lending: &Arc<Lending>| lending.fetch(&experts.values());
        self.lending.as_ref().map(fetch).transpose()
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

    /// Plans as [`Dispatcher::plan`] does where this rank has all experts, on the device of
    /// `experts_tk` `[T, K]`. The host waits for nothing.
    ///
    /// # Errors
    /// If libtorch fails.
    pub(crate) fn plan_on_device(&self, experts_tk: &Tensor) -> Result<DispatchPlan, Error> {
        let physical_slots = self.physical_slots();
        let num_experts = physical_slots.len();
        let device = experts_tk.device();
        let is_renumbered = !physical_slots.iter().copied().eq(0..num_experts as i64);
        let slots_tk = if is_renumbered {
            let slots = physical_slots
                .iter()
                .map(|&slot| slot as i32)
                .collect::<Vec<i32>>();
            let slots = upload(&[&slots], device)?.remove(0).to_kind(Kind::Int64);
            slots
                .index_select(0, &experts_tk.flatten(0, -1))
                .view_as(experts_tk)
        } else {
            experts_tk.shallow_clone()
        };
        let tokens = experts_tk.size()[0] as usize;
        let mut routes = Vec::new();
        let mut own_tokens = Vec::new();
        for chunk in 0..self.chunks {
            let range = chunk_range(tokens, chunk, self.chunks);
            let slots_tk = slots_tk.narrow(0, range.start as i64, range.len() as i64);
            let (permutation, ends_e) = Permutation::by_expert(&slots_tk, num_experts);
            let groups = RowGroups::from_device(ends_e, slots_tk.numel() as i64)?;
            own_tokens.push(groups.clone());
            let exchange = TokenExchange {
                permutation,
                all_to_all: None,
            };
            routes.push(Some(ChunkRoute {
                route: DispatchRoute(vec![exchange]),
                groups,
            }));
        }
        Ok(DispatchPlan {
            physical_slots,
            rank_plan: Arc::new(RankPlan::of_single_rank(num_experts, self.chunks)),
            lending: None,
            seconds: 0.0,
            routes: Arc::new(Mutex::new(routes)),
            own_tokens,
        })
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
        let gathered;
        let counts = if self.group.size() == 1 {
            &own
        } else {
            gathered = all_gather_counts(&self.group, &own)?;
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
            own_tokens: own.chunks(num_experts).map(RowGroups::from).collect(),
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
        let ChunkRoute { route, groups } = match known {
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
            groups,
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
        let groups = RowGroups::new(counts);
        Ok(ChunkRoute { route, groups })
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
                groups: RowGroups::new(send.counts),
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
            groups: RowGroups::new(receive.counts),
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
            groups,
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
            groups,
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

fn failed(error: impl std::fmt::Display) -> Error {
    Error::new(error.to_string())
}

/// Gathers the counts of all ranks, in rank order. Counts of rows fit 32 bits.
fn all_gather_counts(group: &Arc<dyn Communicator>, counts: &[i64]) -> Result<Vec<i64>, Error> {
    let own = counts
        .iter()
        .map(|&count| count as i32)
        .collect::<Vec<i32>>();
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

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::Local;
    use proptest::prelude::*;

    const TOP_K: usize = 2;
    const HIDDEN: i64 = 3;

    #[derive(Debug, PartialEq)]
    struct Outcome {
        tokens_per_expert: Vec<i64>,
        computed_experts: Vec<usize>,
        num_local: usize,
        /// Rows of each expert, for each chunk.
        counts: Vec<Vec<i64>>,
        rows_rd: Vec<Tensor>,
        hidden_td: Vec<Tensor>,
        gradient_td: Tensor,
    }

    /// Dispatches `tokens` tokens by `plan` and combines their rows, each with a factor of its own.
    /// `experts` may be empty if the plan has the routes.
    fn run(
        dispatcher: &Dispatcher,
        plan: &DispatchPlan,
        tokens: usize,
        experts: &[i64],
    ) -> Outcome {
        let shape = [tokens as i64, HIDDEN];
        let numbers = Tensor::arange(shape[0] * HIDDEN, (Kind::Float, Device::Cpu));
        let x_td = numbers.sin().view(shape).set_requires_grad(true);
        let mut outcome = Outcome {
            tokens_per_expert: plan.tokens_per_expert().get(),
            computed_experts: plan.rank_plan.computed_experts.clone(),
            num_local: plan.rank_plan.num_local,
            counts: Vec::new(),
            rows_rd: Vec::new(),
            hidden_td: Vec::new(),
            gradient_td: Tensor::new(),
        };
        let chunks = dispatcher.chunks();
        for chunk in 0..chunks {
            let range = chunk_range(tokens, chunk, chunks);
            let of_chunk = |x: &Tensor| x.narrow(0, range.start as i64, range.len() as i64);
            let experts = experts
                .get(range.start * TOP_K..range.end * TOP_K)
                .unwrap_or_default();
            let pending = dispatcher.start(&of_chunk(&x_td), experts, TOP_K, plan, chunk);
            let dispatched = pending
                .unwrap()
                .wait(|| panic!("the rows are kept"), true)
                .unwrap();
            outcome.counts.push(dispatched.groups.counts().to_vec());
            let rows_rd = dispatched.rows_rd.value.shallow_clone();
            let numbers = Tensor::arange(rows_rd.size()[0], (Kind::Float, Device::Cpu));
            let y_rd = &rows_rd * numbers.cos().unsqueeze(1);
            let weights_tk = of_chunk(&x_td).narrow(1, 0, TOP_K as i64).detach();
            let combine = dispatcher.start_combine(&y_rd, dispatched, &weights_tk);
            outcome.rows_rd.push(rows_rd.detach());
            outcome.hidden_td.push(combine.unwrap().wait().unwrap());
        }
        Tensor::cat(&outcome.hidden_td, 0)
            .sum(Kind::Float)
            .backward();
        outcome.gradient_td = x_td.grad();
        outcome
    }

    proptest! {
        #[test]
        fn a_plan_of_the_device_is_the_plan_of_the_host(
            slots in Just((0..5).collect::<Vec<i64>>()).prop_shuffle(),
            experts in prop::collection::vec(0i64..5, TOP_K..40),
            chunks in 1usize..4,
        ) {
            let tokens = experts.len() / TOP_K;
            let experts = &experts[..tokens * TOP_K];
            let topology = ExpertTopology::on_one_node(1, 1);
            let alone = Arc::new(Local::new(0, "experts"));
            let dispatcher = Dispatcher::new(alone, 5, topology, None, None, chunks);
            dispatcher.set_physical_slots(slots);
            let on_host = dispatcher
                .plan(experts, TOP_K)
                .unwrap();
            let experts_tk = Tensor::from_slice(experts).view([-1, TOP_K as i64]);
            let on_device = dispatcher
                .plan_on_device(&experts_tk)
                .unwrap();
            prop_assert_eq!(
                run(&dispatcher, &on_device, tokens, &[]),
                run(&dispatcher, &on_host, tokens, experts)
            );
        }
    }
}
