//! Dispatch and combine: tokens go to the ranks that own their experts, and their results come back.
//!
//! # Collective
//! Every rank of the expert group, in the same order: one all-to-all of counts, one of rows there, one back; in
//! backward the last two again, the other way round.

use crate::Routing;
use crate::plan::{ReceivePlan, SendPlan, plan_receive, plan_send};
use crate::rows::{combine_slots, gather_slots, permute_rows};
use parallel::{Communicator, collectives};
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::Error;

/// Rows at their experts, and the way back.
pub struct Dispatched {
    /// `[R, D]`: rows in order of this rank's experts.
    pub rows_rd: Tensor,
    /// Rows for each of this rank's experts.
    pub counts: Vec<i64>,
    send: SendPlan,
    token_of_slot: Tensor,
    slot_of_choice: Tensor,
    exchange: Option<Exchange>,
}

/// What a group of more than one rank adds.
struct Exchange {
    rows_to: Vec<i64>,
    plan: ReceivePlan,
    order: Tensor,
    place: Tensor,
}

impl Dispatched {
    /// Choices of each expert among this rank's own tokens, `[E]`.
    pub fn choices(&self) -> &[i64] {
        &self.send.counts
    }
}

/// The ranks that share a layer's experts evenly.
pub struct Dispatcher {
    group: Arc<dyn Communicator>,
}

impl Dispatcher {
    /// A dispatcher over the ranks of `group`.
    pub fn new(group: Arc<dyn Communicator>) -> Dispatcher {
        Dispatcher { group }
    }

    /// Sends each of the tokens `x_td` `[T, D]` to its experts. `experts` are the choices of `routing`, `[T * K]`, on
    /// the host.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn dispatch(
        &self,
        x_td: &Tensor,
        experts: &[i64],
        top_k: usize,
        num_experts: usize,
    ) -> Result<Dispatched, Error> {
        let send = plan_send(experts, top_k, num_experts);
        let device = x_td.device();
        let token_of_slot = Tensor::from_slice(&send.token_of_slot).to_device(device);
        let slot_of_choice = Tensor::from_slice(&send.slot_of_choice).to_device(device);
        let slots = gather_slots(x_td, &token_of_slot, &slot_of_choice)?;
        let ranks = self.group.size();
        if ranks == 1 {
            let counts = send.counts.clone();
            return Ok(Dispatched { rows_rd: slots, counts, send, token_of_slot, slot_of_choice, exchange: None });
        }
        let local = num_experts / ranks;
        let plan = plan_receive(&self.exchange_counts(&send.counts, local)?, ranks);
        let rows_to: Vec<i64> = send.counts.chunks(local).map(|rank| rank.iter().sum()).collect();
        let received = collectives::all_to_all(&slots, &self.group, &plan.rows_from, &rows_to)?;
        let order = Tensor::from_slice(&plan.order).to_device(device);
        let place = Tensor::from_slice(&plan.place).to_device(device);
        let rows_rd = permute_rows(&received, &order, &place)?;
        let counts = plan.counts.clone();
        let exchange = Some(Exchange { rows_to, plan, order, place });
        Ok(Dispatched { rows_rd, counts, send, token_of_slot, slot_of_choice, exchange })
    }

    /// Brings the experts' results `y_rd` `[R, D]` back to their tokens and sums them by the routing's weights:
    /// `[T, D]`.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn combine(&self, y_rd: &Tensor, dispatched: &Dispatched, routing: &Routing) -> Result<Tensor, Error> {
        let slots = match &dispatched.exchange {
            None => y_rd.shallow_clone(),
            Some(exchange) => {
                let by_rank = permute_rows(y_rd, &exchange.place, &exchange.order)?;
                collectives::all_to_all(&by_rank, &self.group, &exchange.rows_to, &exchange.plan.rows_from)?
            }
        };
        combine_slots(&slots, &routing.weights_tk, &dispatched.token_of_slot, &dispatched.slot_of_choice)
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
