//! Dispatch and combine: tokens go to the ranks that own their experts, and their results come back.
//!
//! # Collective
//! Every rank of the expert group, in the same order: one all-to-all of counts, one of rows there, one back; in
//! backward the last two again, the other way round.

use crate::Routing;
use crate::plan::{ReceivePlan, SendPlan, plan_receive, plan_send, spread};
use crate::rows::{combine_slots, gather_slots, permute_rows};
use parallel::{Activation, Communicator, collectives};
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::Error;

/// Rows at their experts, and the way back.
pub struct Dispatched {
    /// `[R, D]`: rows in order of this rank's experts.
    pub rows_rd: Activation,
    /// Rows for each of this rank's experts.
    pub counts: Vec<i64>,
    send: SendPlan,
    way: Way,
}

/// Where rows go.
struct Way {
    token_of_slot: Tensor,
    slot_of_choice: Tensor,
    exchange: Option<Exchange>,
}

/// What a group of more than one rank adds.
struct Exchange {
    group: Arc<dyn Communicator>,
    rows_to: Vec<i64>,
    rows_from: Vec<i64>,
    order: Tensor,
    place: Tensor,
}

impl Way {
    fn there(&self, x_td: &Tensor) -> Result<Tensor, Error> {
        let slots = gather_slots(x_td, &self.token_of_slot, &self.slot_of_choice)?;
        let Some(Exchange { group, rows_to, rows_from, order, place }) = &self.exchange else { return Ok(slots) };
        permute_rows(&collectives::all_to_all(&slots, group, rows_from, rows_to)?, order, place)
    }

    fn copy(&self) -> Way {
        let exchange = self.exchange.as_ref().map(|exchange| Exchange {
            group: exchange.group.clone(),
            rows_to: exchange.rows_to.clone(),
            rows_from: exchange.rows_from.clone(),
            order: exchange.order.shallow_clone(),
            place: exchange.place.shallow_clone(),
        });
        let (token_of_slot, slot_of_choice) = (self.token_of_slot.shallow_clone(), self.slot_of_choice.shallow_clone());
        Way { token_of_slot, slot_of_choice, exchange }
    }
}

/// The ranks that share a layer's experts evenly.
pub struct Dispatcher {
    group: Arc<dyn Communicator>,
    slices: usize,
}

impl Dispatcher {
    /// A dispatcher over the ranks of `group`; each `slices` neighbours split the same experts.
    pub fn new(group: Arc<dyn Communicator>, slices: usize) -> Dispatcher {
        Dispatcher { group, slices }
    }

    /// Sends each of the tokens `x_td` `[T, D]` to its experts. `experts` are the choices of a routing, `[T * K]`, on
    /// the host. With `keep` the rows are kept for backward; otherwise they are sent again then.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn dispatch(
        &self,
        x_td: &Activation,
        experts: &[i64],
        top_k: usize,
        num_experts: usize,
        keep: bool,
    ) -> Result<Dispatched, Error> {
        let ranks = self.group.size();
        let spread = spread(experts, num_experts, ranks / self.slices, self.slices);
        let send = plan_send(&spread, top_k * self.slices, num_experts * self.slices);
        let device = x_td.value.device();
        let upload = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(device);
        let mut way = Way {
            token_of_slot: upload(&send.token_of_slot),
            slot_of_choice: upload(&send.slot_of_choice),
            exchange: None,
        };
        let mut counts = send.counts.clone();
        if ranks > 1 {
            let local = send.counts.len() / ranks;
            let plan: ReceivePlan = plan_receive(&self.exchange_counts(&send.counts, local)?, ranks);
            way.exchange = Some(Exchange {
                group: self.group.clone(),
                rows_to: send.counts.chunks(local).map(|rank| rank.iter().sum()).collect(),
                order: upload(&plan.order),
                place: upload(&plan.place),
                rows_from: plan.rows_from,
            });
            counts = plan.counts;
        }
        let rows = way.there(&x_td.value)?;
        let rows_rd = if keep {
            Activation::kept(&rows)
        } else {
            let (tokens, again) = (x_td.saved(), way.copy());
            Activation::again(rows, move || again.there(&tokens.get()?))
        };
        Ok(Dispatched { rows_rd, counts, send, way })
    }

    /// Choices of each expert among this rank's own tokens, `[E]`.
    pub fn choices(&self, dispatched: &Dispatched) -> Vec<i64> {
        let counts = &dispatched.send.counts;
        // Every slice of an expert has the same.
        let local = counts.len() / self.group.size();
        counts.chunks(local).step_by(self.slices).flatten().copied().collect()
    }

    /// Brings the experts' results `y_rd` `[R, D]` back to their tokens and sums them by the routing's weights:
    /// `[T, D]`.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn combine(&self, y_rd: &Tensor, dispatched: &Dispatched, routing: &Routing) -> Result<Tensor, Error> {
        let Way { token_of_slot, slot_of_choice, exchange } = &dispatched.way;
        let slots = match exchange {
            None => y_rd.shallow_clone(),
            Some(Exchange { group, rows_to, rows_from, order, place }) => {
                let by_rank = permute_rows(y_rd, place, order)?;
                collectives::all_to_all(&by_rank, group, rows_to, rows_from)?
            }
        };
        let mut weights_tk = routing.weights_tk.shallow_clone();
        if self.slices > 1 {
            // The slices' results are summed with the same weight.
            let (tokens, choices) = weights_tk.size2().map_err(|e| Error::new(e.to_string()))?;
            let slices = self.slices as i64;
            weights_tk = weights_tk.unsqueeze(-1).expand([tokens, choices, slices], false);
            weights_tk = weights_tk.reshape([tokens, choices * slices]);
        }
        combine_slots(&slots, &weights_tk, token_of_slot, slot_of_choice)
    }

    /// How many rows every rank sends for each of this rank's experts, rank-major.
    fn exchange_counts(&self, counts: &[i64], local: usize) -> Result<Vec<i64>, Error> {
        let splits = vec![local as i64; self.group.size()];
        let mine = Tensor::from_slice(counts);
        let theirs = mine.empty_like();
        let failed = |e: parallel::CommError| Error::new(e.to_string());
        self.group.all_to_all(&theirs, &mine, &splits, &splits).map_err(failed)?.wait().map_err(failed)?;
        debug_assert_eq!(theirs.kind(), Kind::Int64);
        Vec::<i64>::try_from(theirs).map_err(|e| Error::new(e.to_string()))
    }
}
