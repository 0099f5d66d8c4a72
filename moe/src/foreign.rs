//! Experts' weights that ranks lend to those that help them, and the gradients on their way home.
//!
//! Two ranks exchange one message, whatever the number of experts: all that one lends the other. In backward the gradients
//! of lent weights go the other way, in fp32, and are added to their owner's helper by helper, so the sum is the same each
//! time. Where no weight is lent, nothing is sent.
//!
//! # Collective
//! Every rank of the group, lending or not, enters each exchange, in the same order, on a communicator of its own.
// Shapes: F ffn, D hidden, M experts lent to this rank.

use crate::plan::{Route, Sites};
use parallel::{CommError, Communicator, Work};
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::Error;

/// What is lent to whom, as one rank sees it.
pub(crate) struct Lending {
    group: Arc<dyn Communicator>,
    /// By rank: which of this rank's experts it is lent.
    lent: Vec<Vec<i64>>,
    /// By rank: how many experts it lends this one.
    borrowed: Vec<i64>,
}

/// Weights on their way.
#[must_use]
pub(crate) struct Fetching {
    work: Work,
    weights: Tensor,
}

/// Gradients on their way home.
#[must_use]
pub(crate) struct Returning {
    work: Work,
    gradients: Tensor,
    lending: Arc<Lending>,
}

fn edge(error: CommError) -> Error {
    Error::new(error.to_string())
}

impl Lending {
    /// None where no weight is lent to anyone.
    pub(crate) fn new(route: &Route, sites: &Sites, group: &Arc<dyn Communicator>) -> Option<Arc<Lending>> {
        if route.transfers.is_empty() {
            return None;
        }
        let (owner, slice) = (group.rank() / sites.slices, group.rank() % sites.slices);
        let first = route.work.first().copied().unwrap_or(0);
        let (mut lent, mut borrowed) = (vec![Vec::new(); sites.ranks()], vec![0; sites.ranks()]);
        for transfer in &route.transfers {
            // Between ranks with the same slice.
            if transfer.from == owner {
                lent[transfer.to * sites.slices + slice].push((transfer.expert - first) as i64);
            }
            if transfer.to == owner {
                borrowed[transfer.from * sites.slices + slice] += 1;
            }
        }
        Some(Arc::new(Lending { group: group.clone(), lent, borrowed }))
    }

    /// How many experts this rank lends, counted once for each helper.
    pub(crate) fn num_lent(&self) -> i64 {
        self.lent.iter().map(|experts| experts.len() as i64).sum()
    }

    fn splits(&self, elements: i64) -> (Vec<i64>, Vec<i64>) {
        let lent = self.lent.iter().map(|experts| experts.len() as i64 * elements).collect();
        (lent, self.borrowed.iter().map(|experts| experts * elements).collect())
    }

    /// Starts to send this rank's weights `[L, 2F, D]` and `[L, D, F]` to those that are lent them.
    pub(crate) fn fetch(&self, gate_up: &Tensor, down: &Tensor) -> Result<Fetching, Error> {
        let elements = numel(gate_up) + numel(down);
        let (lent, borrowed) = self.splits(elements);
        let options = (gate_up.kind(), gate_up.device());
        let parts: Vec<Tensor> = self
            .lent
            .iter()
            .flatten()
            .flat_map(|&expert| [gate_up.select(0, expert).view([-1]), down.select(0, expert).view([-1])])
            .collect();
        let sent = if parts.is_empty() { Tensor::empty([0], options) } else { tch::no_grad(|| Tensor::cat(&parts, 0)) };
        let weights = Tensor::empty([borrowed.iter().sum::<i64>()], options);
        let work = self.group.all_to_all(&weights, &sent, &borrowed, &lent).map_err(edge)?;
        Ok(Fetching { work, weights: weights.view([-1, elements]) })
    }

    /// Starts to send the gradients `[M, elements]` of borrowed weights home.
    pub(crate) fn give_back(self: &Arc<Lending>, gradients: &Tensor) -> Result<Returning, Error> {
        let elements = gradients.size()[1];
        let (lent, borrowed) = self.splits(elements);
        let home = Tensor::empty([lent.iter().sum::<i64>()], (Kind::Float, gradients.device()));
        let work = self.group.all_to_all(&home, &gradients.view([-1]), &lent, &borrowed).map_err(edge)?;
        Ok(Returning { work, gradients: home.view([-1, elements]), lending: self.clone() })
    }
}

impl Fetching {
    /// Waits for them: `[M, elements]`, in order of their experts.
    pub(crate) fn arrive(self) -> Result<Tensor, Error> {
        self.work.wait().map_err(edge)?;
        Ok(self.weights)
    }
}

impl Returning {
    /// Waits for what helpers computed, and adds it to the gradients `[L, 2F, D]` and `[L, D, F]` of this rank's experts.
    pub(crate) fn add_to(self, gate_up: &Tensor, down: &Tensor) -> Result<(), Error> {
        self.work.wait().map_err(edge)?;
        // Helper by helper, each with its experts in order.
        for (row, &expert) in self.lending.lent.iter().flatten().enumerate() {
            let [of_gate_up, of_down] = parts(&self.gradients.get(row as i64), gate_up, down);
            let _ = gate_up.select(0, expert).g_add_(&of_gate_up);
            let _ = down.select(0, expert).g_add_(&of_down);
        }
        Ok(())
    }
}

/// One expert's elements as matrices of the shapes that `gate_up` `[L, 2F, D]` and `down` `[L, D, F]` have.
pub(crate) fn parts(flat: &Tensor, gate_up: &Tensor, down: &Tensor) -> [Tensor; 2] {
    let (first, second) = (numel(gate_up), numel(down));
    [flat.narrow(0, 0, first).view(&gate_up.size()[1..]), flat.narrow(0, first, second).view(&down.size()[1..])]
}

/// Elements of one expert.
pub(crate) fn numel(weights: &Tensor) -> i64 {
    weights.size()[1..].iter().product()
}
