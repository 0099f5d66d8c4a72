//! Dispatch and combine: tokens go to the ranks that work on their experts, and their results come back.
//!
//! Which rank works on a choice is planned from the choices of all ranks: its expert's home, or, where ranks would be loaded
//! unevenly, another one that borrows the weights ([`LeastLoaded`]). Rows go straight there, or to their node first
//! ([`Hierarchy`]).
//!
//! # Collective
//! Every rank of the expert group, in the same order: one all-gather of counts, one all-to-all of rows there, one back; in
//! backward the last two again, the other way round. By way of nodes three small ones more.

use crate::foreign::{Fetching, Lending};
use crate::hierarchy;
use crate::least_loaded::Planner;
use crate::plan::{Route, Sites, count, part_of, plan_receive, plan_send, route};
use crate::rows::{Slots, permute_rows};
use parallel::collectives::{Travelling, start_all_to_all};
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

/// A token crosses to a node once, whatever the number of its experts there, and spreads inside.
#[derive(Clone)]
pub struct Hierarchy {
    /// The ranks of the expert group on this node.
    pub inside: Arc<dyn Communicator>,
    /// One rank of each node: those with this rank's number inside of theirs.
    pub across: Arc<dyn Communicator>,
}

/// The ranks that share a layer's experts evenly.
pub struct Dispatcher {
    group: Arc<dyn Communicator>,
    sites: Sites,
    least_loaded: Option<LeastLoaded>,
    hierarchy: Option<Hierarchy>,
    parts: usize,
    /// For each expert its position; owners hold neighbouring positions.
    positions: Mutex<Arc<Vec<i64>>>,
}

/// Where a layer's choices go: the same for a forward and for computing it again.
#[derive(Clone)]
pub struct Plan {
    positions: Arc<Vec<i64>>,
    pub(crate) route: Arc<Route>,
    pub(crate) lending: Option<Arc<Lending>>,
    /// Seconds that it took, without the collective.
    pub seconds: f64,
}

/// Rows at their experts, and the way back.
pub struct Dispatched {
    /// `[R, D]`: rows in order of the experts that this rank works on.
    pub rows_rd: Activation,
    /// Rows for each of them: its own, then borrowed ones.
    pub counts: Vec<i64>,
    way: Way,
}

/// Results on their way back to their tokens.
pub struct Returning {
    hop: Hop,
    moving: Moving,
    weights_tc: Option<Tensor>,
}

impl Returning {
    /// Waits for them: the sum over each token's choices, `[T, D]`.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn arrive(self) -> Result<Tensor, Error> {
        self.hop.arrive_back(self.moving, self.weights_tc.as_ref())
    }
}

/// Rows on their way to their experts.
pub struct Sending {
    way: Way,
    counts: Vec<i64>,
    moving: Moving,
}

/// One exchange of rows, or two.
pub(crate) struct Way(pub(crate) Vec<Hop>);

/// Tokens to slots, slots to other ranks, and the way back.
pub(crate) struct Hop {
    pub(crate) slots: Slots,
    pub(crate) exchange: Option<Exchange>,
}

/// What a group of more than one rank adds.
pub(crate) struct Exchange {
    pub(crate) group: Arc<dyn Communicator>,
    pub(crate) rows_to: Vec<i64>,
    pub(crate) rows_from: Vec<i64>,
    /// The order of received rows and the inverse, where it is not that in which they come.
    pub(crate) order: Option<(Tensor, Tensor)>,
}

enum Moving {
    Here(Tensor),
    Travelling(Travelling),
}

impl Hop {
    fn start(&self, x_td: &Tensor) -> Result<Moving, Error> {
        let slots = self.slots.gather(x_td)?;
        Ok(match &self.exchange {
            None => Moving::Here(slots),
            Some(Exchange {
                group,
                rows_to,
                rows_from,
                ..
            }) => Moving::Travelling(start_all_to_all(&slots, group, rows_from, rows_to)?),
        })
    }

    fn arrive(&self, moving: Moving) -> Result<Tensor, Error> {
        let rows = match moving {
            Moving::Here(rows) => return Ok(rows),
            Moving::Travelling(travelling) => travelling.arrive()?,
        };
        match self
            .exchange
            .as_ref()
            .and_then(|exchange| exchange.order.as_ref())
        {
            Some((order, place)) => permute_rows(&rows, order, place),
            None => Ok(rows),
        }
    }

    pub(crate) fn there(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        self.arrive(self.start(x_td)?)
    }

    /// Starts to send rows back.
    fn start_back(&self, y_rd: &Tensor) -> Result<Moving, Error> {
        let Some(Exchange {
            group,
            rows_to,
            rows_from,
            order,
        }) = &self.exchange
        else {
            return Ok(Moving::Here(y_rd.shallow_clone()));
        };
        let mut rows = y_rd.shallow_clone();
        if let Some((order, place)) = order {
            rows = permute_rows(&rows, place, order)?;
        }
        Ok(Moving::Travelling(start_all_to_all(
            &rows, group, rows_to, rows_from,
        )?))
    }

    /// Waits for them, and sums each token's with `weights_tc`, or as they are.
    fn arrive_back(&self, moving: Moving, weights_tc: Option<&Tensor>) -> Result<Tensor, Error> {
        let rows = match moving {
            Moving::Here(rows) => rows,
            Moving::Travelling(travelling) => travelling.arrive()?,
        };
        match weights_tc {
            Some(weights) => self.slots.combine_weighted(&rows, weights),
            None => self.slots.combine(&rows),
        }
    }

    fn copy(&self) -> Hop {
        let exchange = self.exchange.as_ref().map(|exchange| Exchange {
            group: exchange.group.clone(),
            rows_to: exchange.rows_to.clone(),
            rows_from: exchange.rows_from.clone(),
            order: exchange
                .order
                .as_ref()
                .map(|(order, place)| (order.shallow_clone(), place.shallow_clone())),
        });
        Hop {
            slots: self.slots.copy(),
            exchange,
        }
    }
}

impl Way {
    fn there(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        let mut rows = x_td.shallow_clone();
        for hop in &self.0 {
            rows = hop.there(&rows)?;
        }
        Ok(rows)
    }

    fn copy(&self) -> Way {
        Way(self.0.iter().map(Hop::copy).collect())
    }
}

impl Plan {
    /// Starts to send borrowed weights to those that work on them; None where nobody borrows any.
    pub(crate) fn fetch(&self, gate_up: &Weight, down: &Weight) -> Result<Option<Fetching>, Error> {
        self.lending
            .as_ref()
            .map(|lending| lending.fetch(&gate_up.value(), &down.value()))
            .transpose()
    }
}

impl Dispatcher {
    /// A dispatcher of `num_experts` experts over the ranks of `group`; tokens travel in `parts` parts.
    pub fn new(
        group: Arc<dyn Communicator>,
        num_experts: usize,
        sites: Sites,
        least_loaded: Option<LeastLoaded>,
        hierarchy: Option<Hierarchy>,
        parts: usize,
    ) -> Dispatcher {
        let positions = Mutex::new(Arc::new((0..num_experts as i64).collect()));
        Dispatcher {
            group,
            sites,
            least_loaded,
            hierarchy,
            parts,
            positions,
        }
    }

    /// For each expert its position: the first owner holds the first positions, and so on.
    pub fn positions(&self) -> Arc<Vec<i64>> {
        self.positions.lock().clone()
    }

    /// Says that experts have moved.
    pub fn place(&self, positions: Vec<i64>) {
        *self.positions.lock() = Arc::new(positions);
    }

    /// In how many parts tokens travel.
    pub fn parts(&self) -> usize {
        self.parts
    }

    /// Decides where the choices `experts` `[T * K]`, of this rank's tokens and on the host, are worked on.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn plan(&self, experts: &[i64], top_k: usize) -> Result<Plan, Error> {
        let positions = self.positions();
        let num_experts = positions.len();
        let of_part = |part: usize| {
            let tokens = part_of(experts.len() / top_k, part, self.parts);
            count(
                &placed(
                    &experts[tokens.start * top_k..tokens.end * top_k],
                    &positions,
                ),
                num_experts,
            )
        };
        let own: Vec<i64> = (0..self.parts).flat_map(of_part).collect();
        let counts = if self.group.size() == 1 {
            own
        } else {
            gather(&self.group, &own)?
        };
        let started = Instant::now();
        let loads: Vec<i64> = (0..num_experts)
            .map(|e| counts.iter().skip(e).step_by(num_experts).sum())
            .collect();
        let owners = self.sites.owners();
        let assignment = match &self.least_loaded {
            Some(LeastLoaded { planner, .. }) => planner.lock().plan(&loads, owners),
            None => crate::assignment::Assignment::standard(&loads, owners),
        };
        let route = route(
            &counts,
            self.parts,
            &assignment,
            &self.sites,
            self.group.rank(),
        );
        let seconds = started.elapsed().as_secs_f64();
        let lending = self
            .least_loaded
            .as_ref()
            .and_then(|ll| Lending::new(&route, &self.sites, &ll.lending));
        Ok(Plan {
            positions,
            route: Arc::new(route),
            lending,
            seconds,
        })
    }

    /// Starts to send each of the tokens `x_td` `[T, D]`, of part `part`, to its experts; `experts` are their choices,
    /// `[T * K]`, on the host.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn start(
        &self,
        x_td: &Tensor,
        experts: &[i64],
        top_k: usize,
        plan: &Plan,
        part: usize,
    ) -> Result<Sending, Error> {
        let route = &plan.route;
        let slices = self.sites.slices;
        let ranks = self.group.size();
        let num_experts = plan.positions.len();
        let experts = placed(experts, &plan.positions);
        let owners = route.parts[part].owners(&experts, num_experts);
        // A choice of a split expert is one for each rank with a slice of it.
        let choices: Vec<Option<(usize, usize)>> = experts
            .iter()
            .zip(owners)
            .flat_map(|(&expert, owner)| {
                (0..slices).map(move |slice| Some((owner * slices + slice, expert as usize)))
            })
            .collect();
        let per_token = top_k * slices;
        let device = x_td.device();
        let (way, counts) = match &self.hierarchy {
            Some(hierarchy) => hierarchy::way(
                hierarchy,
                &self.sites.nodes,
                &choices,
                per_token,
                num_experts,
                &route.work,
                device,
            )?,
            None => {
                let send = plan_send(&choices, per_token, ranks, num_experts);
                let hop = |exchange| Hop {
                    slots: Slots::new(&send, per_token, device),
                    exchange,
                };
                if ranks == 1 {
                    (Way(vec![hop(None)]), send.counts)
                } else {
                    let receive =
                        plan_receive(&route.parts[part].incoming, &route.work, ranks, num_experts);
                    let exchange = Exchange {
                        group: self.group.clone(),
                        rows_to: send.rows_to.clone(),
                        rows_from: receive.rows_from,
                        order: Some((
                            upload(&receive.order, device),
                            upload(&receive.place, device),
                        )),
                    };
                    (Way(vec![hop(Some(exchange))]), receive.counts)
                }
            }
        };
        let moving = way.0[0].start(x_td)?;
        Ok(Sending {
            way,
            counts,
            moving,
        })
    }

    /// Starts to bring the experts' results `y_rd` `[R, D]` back to their tokens, whose choices weigh `weights_tk` `[T, K]`.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn start_back(
        &self,
        y_rd: &Tensor,
        dispatched: Dispatched,
        weights_tk: &Tensor,
    ) -> Result<Returning, Error> {
        let mut weights_tc = weights_tk.shallow_clone();
        if self.sites.slices > 1 {
            // The slices' results are summed with the same weight.
            let (tokens, choices) = weights_tc.size2().map_err(|e| Error::new(e.to_string()))?;
            let slices = self.sites.slices as i64;
            weights_tc = weights_tc
                .unsqueeze(-1)
                .expand([tokens, choices, slices], false);
            weights_tc = weights_tc.reshape([tokens, choices * slices]);
        }
        let mut hops = dispatched.way.0;
        let last = hops
            .pop()
            .ok_or_else(|| Error::new("a way without a hop"))?;
        let moving = last.start_back(y_rd)?;
        let Some(first) = hops.pop() else {
            return Ok(Returning {
                hop: last,
                moving,
                weights_tc: Some(weights_tc),
            });
        };
        // A node's results are summed there, and come back as one row.
        let summed = last.arrive_back(moving, Some(&first.there(&weights_tc)?))?;
        let moving = first.start_back(&summed)?;
        Ok(Returning {
            hop: first,
            moving,
            weights_tc: None,
        })
    }

    /// Bytes of rows that this rank sent to other nodes on their way to experts, without indices and weights. (So many
    /// again come back, and twice as many in backward.)
    pub fn bytes_across(&self, dispatched: &Dispatched) -> i64 {
        let Some(Exchange { rows_to, .. }) = &dispatched.way.0[0].exchange else {
            return 0;
        };
        let node = self.sites.nodes[self.group.rank()];
        let rows: i64 = match &self.hierarchy {
            Some(hierarchy) => rows_to.iter().sum::<i64>() - rows_to[hierarchy.across.rank()],
            None => rows_to
                .iter()
                .zip(&self.sites.nodes)
                .filter(|(_, other)| **other != node)
                .map(|(rows, _)| rows)
                .sum(),
        };
        let value = &dispatched.rows_rd.value;
        rows * value.size()[1] * value.kind().elt_size_in_bytes() as i64
    }
}

impl Sending {
    /// Waits for the rows. With `keep` they are kept for backward; otherwise the tokens are sent again then, as `saved`
    /// has them.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn arrive(
        self,
        saved: impl Fn() -> Result<Tensor, Error> + Send + 'static,
        keep: bool,
    ) -> Result<Dispatched, Error> {
        let Sending {
            way,
            counts,
            moving,
        } = self;
        let mut rows = way.0[0].arrive(moving)?;
        for hop in &way.0[1..] {
            rows = hop.there(&rows)?;
        }
        let rows_rd = if keep {
            Activation::kept(&rows)
        } else {
            let again = way.copy();
            Activation::again(rows, move || again.there(&saved()?))
        };
        Ok(Dispatched {
            rows_rd,
            counts,
            way,
        })
    }
}

/// The positions of chosen experts.
fn placed(experts: &[i64], positions: &[i64]) -> Vec<i64> {
    experts
        .iter()
        .map(|&expert| positions[expert as usize])
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
