//! Dispatch and combine: tokens go to the ranks that work on their experts, and their results come back.
//!
//! Which rank works on a choice is planned from the routed tokens of all ranks: its expert's home, or, where ranks would be loaded
//! unevenly, another one that borrows the weights ([`LeastLoaded`]). Rows go straight there, or to their node first
//! ([`Hierarchy`]).
//!
//! # Collective
//! Every rank of the expert group, in the same order: one all-gather of counts, one all-to-all of rows there, one back; in
//! backward the last two again, in reverse. Hierarchical dispatch adds three small ones more.

use crate::hierarchy;
use crate::lending::least_loaded::Planner;
use crate::lending::transfer::{Lending, PendingWeights};
use crate::permute::{Permutation, permute_rows};
use crate::plan::{
    ExpertTopology, RankPlan, chunk_range, count_tokens_per_expert, plan_receive, plan_send,
    rank_plan,
};
use parallel::collectives::{PendingAllToAll, start_all_to_all};
use parallel::{Activation, Communicator, Weight, Work};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// Full ranks lend experts to others.
#[derive(Clone)]
pub struct LeastLoaded {
    /// Decides which, for all layers.
    pub planner: Arc<Mutex<Planner>>,
    /// The ranks of the expert group; nothing but weights and their gradients travels here.
    pub lending: Arc<dyn Communicator>,
}

/// A token crosses to a node once, whatever the number of its experts there, and is forwarded within the node.
#[derive(Clone)]
pub struct Hierarchy {
    /// The ranks of the expert group on this node.
    pub intra_node: Arc<dyn Communicator>,
    /// One rank of each node: the ranks with the same number within their node.
    pub inter_node: Arc<dyn Communicator>,
}

/// The ranks that share a layer's experts evenly.
pub struct Dispatcher {
    group: Arc<dyn Communicator>,
    topology: ExpertTopology,
    least_loaded: Option<LeastLoaded>,
    hierarchy: Option<Hierarchy>,
    chunks: usize,
    /// For each expert its position; owners hold neighbouring physical slots.
    physical_slots: Mutex<Arc<Vec<i64>>>,
}

/// Where a layer's routed tokens go: the same for a forward and for computing it again.
#[derive(Clone)]
pub struct DispatchPlan {
    physical_slots: Arc<Vec<i64>>,
    pub(crate) rank_plan: Arc<RankPlan>,
    pub(crate) lending: Option<Arc<Lending>>,
    /// Seconds that it took, without the collective.
    pub seconds: f64,
}

/// Rows at their experts, and the return path.
pub struct Dispatched {
    /// `[R, D]`: rows in order of the experts that this rank works on.
    pub rows_rd: Activation,
    /// Rows for each of them: its own, then lent ones.
    pub counts: Vec<i64>,
    dispatch_route: DispatchRoute,
}

/// Results on the return path to their tokens.
pub struct PendingCombine {
    token_exchange: TokenExchange,
    pending: PendingRows,
    weights_tc: Option<Tensor>,
}

impl PendingCombine {
    /// Waits for them: the sum over each token's routed tokens, `[T, D]`.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn wait(self) -> Result<Tensor, Error> {
        self.token_exchange
            .wait_combine(self.pending, self.weights_tc.as_ref())
    }
}

/// Rows in flight to their experts.
pub struct PendingDispatch {
    dispatch_route: DispatchRoute,
    counts: Vec<i64>,
    pending: PendingRows,
}

/// One or two all-to-all exchanges.
pub(crate) struct DispatchRoute(pub(crate) Vec<TokenExchange>);

/// Tokens to permuted rows, rows to other ranks, and the return path.
pub(crate) struct TokenExchange {
    pub(crate) permutation: Permutation,
    pub(crate) all_to_all: Option<AllToAll>,
}

/// What a group of more than one rank adds.
pub(crate) struct AllToAll {
    pub(crate) group: Arc<dyn Communicator>,
    pub(crate) input_splits: Vec<i64>,
    pub(crate) output_splits: Vec<i64>,
    /// The order of received rows and the inverse, where it is not that in which they come.
    pub(crate) order: Option<(Tensor, Tensor)>,
}

enum PendingRows {
    Local(Tensor),
    PendingAllToAll(PendingAllToAll),
}

impl TokenExchange {
    fn start(&self, x_td: &Tensor) -> Result<PendingRows, Error> {
        let rows = self.permutation.gather(x_td)?;
        Ok(match &self.all_to_all {
            None => PendingRows::Local(rows),
            Some(AllToAll {
                group,
                input_splits,
                output_splits,
                ..
            }) => PendingRows::PendingAllToAll(start_all_to_all(
                &rows,
                group,
                output_splits,
                input_splits,
            )?),
        })
    }

    fn wait(&self, pending: PendingRows) -> Result<Tensor, Error> {
        let rows = match pending {
            PendingRows::Local(rows) => return Ok(rows),
            PendingRows::PendingAllToAll(in_flight) => in_flight.wait()?,
        };
        match self
            .all_to_all
            .as_ref()
            .and_then(|all_to_all| all_to_all.order.as_ref())
        {
            Some((order, inverse)) => permute_rows(&rows, order, inverse),
            None => Ok(rows),
        }
    }

    pub(crate) fn run(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        self.wait(self.start(x_td)?)
    }

    /// Starts to send rows back.
    fn start_combine(&self, y_rd: &Tensor) -> Result<PendingRows, Error> {
        let Some(AllToAll {
            group,
            input_splits,
            output_splits,
            order,
        }) = &self.all_to_all
        else {
            return Ok(PendingRows::Local(y_rd.shallow_clone()));
        };
        let mut rows = y_rd.shallow_clone();
        if let Some((order, inverse)) = order {
            rows = permute_rows(&rows, inverse, order)?;
        }
        Ok(PendingRows::PendingAllToAll(start_all_to_all(
            &rows,
            group,
            input_splits,
            output_splits,
        )?))
    }

    /// Waits for them, and sums each token's with `weights_tc`, or as they are.
    fn wait_combine(
        &self,
        pending: PendingRows,
        weights_tc: Option<&Tensor>,
    ) -> Result<Tensor, Error> {
        let rows = match pending {
            PendingRows::Local(rows) => rows,
            PendingRows::PendingAllToAll(in_flight) => in_flight.wait()?,
        };
        match weights_tc {
            Some(weights) => self.permutation.combine_weighted(&rows, weights),
            None => self.permutation.combine(&rows),
        }
    }

    fn copy(&self) -> TokenExchange {
        let all_to_all = self.all_to_all.as_ref().map(|all_to_all| AllToAll {
            group: all_to_all.group.clone(),
            input_splits: all_to_all.input_splits.clone(),
            output_splits: all_to_all.output_splits.clone(),
            order: all_to_all
                .order
                .as_ref()
                .map(|(order, inverse)| (order.shallow_clone(), inverse.shallow_clone())),
        });
        TokenExchange {
            permutation: self.permutation.copy(),
            all_to_all,
        }
    }
}

impl DispatchRoute {
    fn run(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        let mut rows = x_td.shallow_clone();
        for token_exchange in &self.0 {
            rows = token_exchange.run(&rows)?;
        }
        Ok(rows)
    }

    fn copy(&self) -> DispatchRoute {
        DispatchRoute(self.0.iter().map(TokenExchange::copy).collect())
    }
}

impl DispatchPlan {
    /// Starts to send lent weights to those that work on them; None where no expert is lent.
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
    /// A dispatcher of `num_experts` experts over the ranks of `group`; tokens travel in `chunks` chunks.
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

    /// For each expert its position: the first owner holds the first physical slots, and so on.
    pub fn physical_slots(&self) -> Arc<Vec<i64>> {
        self.physical_slots.lock().clone()
    }

    /// Says that experts have moved.
    pub fn set_physical_slots(&self, physical_slots: Vec<i64>) {
        *self.physical_slots.lock() = Arc::new(physical_slots);
    }

    /// In how many chunks tokens travel.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// Decides where the routed tokens `experts` `[T * K]`, of this rank's tokens and on the host, are worked on.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn plan(&self, experts: &[i64], top_k: usize) -> Result<DispatchPlan, Error> {
        let physical_slots = self.physical_slots();
        let num_experts = physical_slots.len();
        let count_chunk = |chunk: usize| {
            let tokens = chunk_range(experts.len() / top_k, chunk, self.chunks);
            count_tokens_per_expert(
                &to_physical_slots(
                    &experts[tokens.start * top_k..tokens.end * top_k],
                    &physical_slots,
                ),
                num_experts,
            )
        };
        let own: Vec<i64> = (0..self.chunks).flat_map(count_chunk).collect();
        let counts = if self.group.size() == 1 {
            own
        } else {
            gather(&self.group, &own)?
        };
        let started = Instant::now();
        let loads: Vec<i64> = (0..num_experts)
            .map(|e| counts.iter().skip(e).step_by(num_experts).sum())
            .collect();
        let owners = self.topology.owners();
        let assignment = match &self.least_loaded {
            Some(LeastLoaded { planner, .. }) => planner.lock().plan(&loads, owners),
            None => crate::lending::assignment::Assignment::standard(&loads, owners),
        };
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

    /// Starts to send each of the tokens `x_td` `[T, D]`, of chunk `chunk`, to its experts; `experts` are their routed tokens,
    /// `[T * K]`, on the host.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn start(
        &self,
        x_td: &Tensor,
        experts: &[i64],
        top_k: usize,
        plan: &DispatchPlan,
        chunk: usize,
    ) -> Result<PendingDispatch, Error> {
        let rank_plan = &plan.rank_plan;
        let slices = self.topology.slices;
        let ranks = self.group.size();
        let num_experts = plan.physical_slots.len();
        let experts = to_physical_slots(experts, &plan.physical_slots);
        let owners = rank_plan.chunks[chunk].owners(&experts, num_experts);
        // A choice of a split expert is one for each rank with a slice of it.
        let routed_tokens: Vec<Option<(usize, usize)>> = experts
            .iter()
            .zip(owners)
            .flat_map(|(&expert, owner)| {
                (0..slices).map(move |slice| Some((owner * slices + slice, expert as usize)))
            })
            .collect();
        let per_token = top_k * slices;
        let device = x_td.device();
        let (dispatch_route, counts) = match &self.hierarchy {
            Some(hierarchy) => hierarchy::dispatch_route(
                hierarchy,
                &self.topology.nodes,
                &routed_tokens,
                per_token,
                num_experts,
                &rank_plan.computed_experts,
                device,
            )?,
            None => {
                let send = plan_send(&routed_tokens, per_token, ranks, num_experts);
                let token_exchange = |all_to_all| TokenExchange {
                    permutation: Permutation::new(&send, per_token, device),
                    all_to_all,
                };
                if ranks == 1 {
                    (DispatchRoute(vec![token_exchange(None)]), send.counts)
                } else {
                    let receive = plan_receive(
                        &rank_plan.chunks[chunk].incoming,
                        &rank_plan.computed_experts,
                        ranks,
                        num_experts,
                    );
                    let all_to_all = AllToAll {
                        group: self.group.clone(),
                        input_splits: send.input_splits.clone(),
                        output_splits: receive.output_splits,
                        order: Some((
                            upload(&receive.order, device),
                            upload(&receive.inverse, device),
                        )),
                    };
                    (
                        DispatchRoute(vec![token_exchange(Some(all_to_all))]),
                        receive.counts,
                    )
                }
            }
        };
        let pending = dispatch_route.0[0].start(x_td)?;
        Ok(PendingDispatch {
            dispatch_route,
            counts,
            pending,
        })
    }

    /// Starts to bring the experts' results `y_rd` `[R, D]` back to their tokens, whose routed tokens weigh `weights_tk` `[T, K]`.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn start_combine(
        &self,
        y_rd: &Tensor,
        dispatched: Dispatched,
        weights_tk: &Tensor,
    ) -> Result<PendingCombine, Error> {
        let mut weights_tc = weights_tk.shallow_clone();
        if self.topology.slices > 1 {
            // The slices' results are summed with the same weight.
            let (tokens, top_k) = weights_tc.size2().map_err(|e| Error::new(e.to_string()))?;
            let slices = self.topology.slices as i64;
            weights_tc = weights_tc
                .unsqueeze(-1)
                .expand([tokens, top_k, slices], false);
            weights_tc = weights_tc.reshape([tokens, top_k * slices]);
        }
        let mut hops = dispatched.dispatch_route.0;
        let last = hops
            .pop()
            .ok_or_else(|| Error::new("the dispatch has no stage"))?;
        let pending = last.start_combine(y_rd)?;
        let Some(first) = hops.pop() else {
            return Ok(PendingCombine {
                token_exchange: last,
                pending,
                weights_tc: Some(weights_tc),
            });
        };
        // A node's results are summed there, and come back as one row.
        let summed = last.wait_combine(pending, Some(&first.run(&weights_tc)?))?;
        let pending = first.start_combine(&summed)?;
        Ok(PendingCombine {
            token_exchange: first,
            pending,
            weights_tc: None,
        })
    }

    /// Bytes of rows that this rank sent to other nodes in flight to experts, without indices and weights. (So many
    /// again come back, and twice as many in backward.)
    pub fn internode_bytes(&self, dispatched: &Dispatched) -> i64 {
        let Some(AllToAll { input_splits, .. }) = &dispatched.dispatch_route.0[0].all_to_all else {
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
    /// Waits for the rows. With `keep` they are kept for backward; otherwise the tokens are sent again then, as `saved`
    /// has them.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn wait(
        self,
        saved: impl Fn() -> Result<Tensor, Error> + Send + 'static,
        keep: bool,
    ) -> Result<Dispatched, Error> {
        let PendingDispatch {
            dispatch_route,
            counts,
            pending,
        } = self;
        let mut rows = dispatch_route.0[0].wait(pending)?;
        for token_exchange in &dispatch_route.0[1..] {
            rows = token_exchange.run(&rows)?;
        }
        let rows_rd = if keep {
            Activation::kept(&rows)
        } else {
            let again = dispatch_route.copy();
            Activation::recomputable(rows, move || again.run(&saved()?))
        };
        Ok(Dispatched {
            rows_rd,
            counts,
            dispatch_route,
        })
    }
}

/// The physical slots of chosen experts.
fn to_physical_slots(experts: &[i64], physical_slots: &[i64]) -> Vec<i64> {
    experts
        .iter()
        .map(|&expert| physical_slots[expert as usize])
        .collect()
}

pub(crate) fn upload(numbers: &[i64], device: Device) -> Tensor {
    Tensor::from_slice(numbers).to_device(device)
}

/// Every rank's numbers, rank after rank. They are counts of rows, so 32 bits do.
fn gather(group: &Arc<dyn Communicator>, numbers: &[i64]) -> Result<Vec<i64>, Error> {
    let own: Vec<i32> = numbers.iter().map(|&number| number as i32).collect();
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
