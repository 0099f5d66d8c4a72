//! Experts' weights that ranks lend to those that help them, and the gradients on their way home.
//!
//! Two ranks exchange one message, whatever the number of experts: all that one lends the other. In backward the gradients
//! of lent weights go the other way, in fp32, and are added to their owner's helper by helper, so the sum is the same each
//! time; two helpers' gradients exist at once, however many they are. Where no weight is lent, nothing is sent.
//!
//! # Collective
//! Every rank of the group comes to each exchange in the same order, on a communicator that carries nothing else.
// Shapes: F ffn, D hidden, M experts lent to this rank.

use crate::dispatch::edge;
use crate::plan::{Route, Sites};
use parallel::{Communicator, Work};
use std::collections::HashMap;
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::Error;

/// Weights go under one tag, gradients under another: a rank may be ahead of another by one of them.
const WEIGHTS: i32 = 1;
const GRADIENTS: i32 = 2;

/// What is lent to whom, as one rank sees it.
pub(crate) struct Lending {
    group: Arc<dyn Communicator>,
    /// Ranks that this one lends to, and which of its experts.
    lent: Vec<(usize, Vec<i64>)>,
    /// Ranks that lend to this one, and how many experts.
    borrowed: Vec<(usize, i64)>,
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
    sent: Work,
    elements: i64,
    /// Those of the first helpers.
    arriving: Vec<(Work, Tensor)>,
    lending: Arc<Lending>,
}

impl Lending {
    /// None where no weight is lent to anyone.
    pub(crate) fn new(route: &Route, sites: &Sites, group: &Arc<dyn Communicator>) -> Option<Arc<Lending>> {
        if route.transfers.is_empty() {
            return None;
        }
        let (owner, slice) = (group.rank() / sites.slices, group.rank() % sites.slices);
        let first = route.work.first().copied().unwrap_or(0);
        let mut lending = Lending { group: group.clone(), lent: Vec::new(), borrowed: Vec::new() };
        // They come by sender, receiver and expert; weights go between ranks with the same slice.
        for transfer in &route.transfers {
            let (from, to) = (transfer.from * sites.slices + slice, transfer.to * sites.slices + slice);
            if transfer.from == owner {
                let expert = (transfer.expert - first) as i64;
                match lending.lent.last_mut().filter(|(rank, _)| *rank == to) {
                    Some((_, experts)) => experts.push(expert),
                    None => lending.lent.push((to, vec![expert])),
                }
            }
            if transfer.to == owner {
                match lending.borrowed.last_mut().filter(|(rank, _)| *rank == from) {
                    Some((_, experts)) => *experts += 1,
                    None => lending.borrowed.push((from, 1)),
                }
            }
        }
        Some(Arc::new(lending))
    }

    /// Every rank of `group` lends its first expert to the next.
    pub(crate) fn ring(group: &Arc<dyn Communicator>) -> Arc<Lending> {
        let (rank, ranks) = (group.rank(), group.size());
        let (next, previous) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        Arc::new(Lending { group: group.clone(), lent: vec![(next, vec![0])], borrowed: vec![(previous, 1)] })
    }

    /// How many experts this rank lends, counted once for each helper.
    pub(crate) fn num_lent(&self) -> i64 {
        self.lent.iter().map(|(_, experts)| experts.len() as i64).sum()
    }

    fn num_borrowed(&self) -> i64 {
        self.borrowed.iter().map(|(_, experts)| experts).sum()
    }

    /// Of `[M, elements]` what each lender's experts are, with its rank.
    fn by_lender(&self, all: &Tensor) -> Vec<(Tensor, usize)> {
        let mut first = 0;
        let part = |&(rank, experts): &(usize, i64)| {
            first += experts;
            (all.narrow(0, first - experts, experts), rank)
        };
        self.borrowed.iter().map(part).collect()
    }

    /// Starts to send this rank's weights `[L, 2F, D]` and `[L, D, F]` to those that are lent them.
    pub(crate) fn fetch(&self, gate_up: &Tensor, down: &Tensor) -> Result<Fetching, Error> {
        let elements = numel(gate_up) + numel(down);
        // Helpers with the same experts get the same buffer.
        let mut packed: HashMap<&[i64], Tensor> = HashMap::new();
        for (_, experts) in &self.lent {
            packed.entry(experts).or_insert_with(|| {
                let parts =
                    experts.iter().flat_map(|&e| [gate_up, down].map(|weights| weights.select(0, e).view([-1])));
                tch::no_grad(|| Tensor::cat(&parts.collect::<Vec<_>>(), 0))
            });
        }
        let sends: Vec<_> = self.lent.iter().map(|(rank, experts)| (&packed[experts.as_slice()], *rank)).collect();
        let weights = Tensor::empty([self.num_borrowed(), elements], (gate_up.kind(), gate_up.device()));
        let parts = self.by_lender(&weights);
        let receives: Vec<_> = parts.iter().map(|(part, rank)| (part, *rank)).collect();
        let work = self.group.exchange(&sends, &receives, WEIGHTS).map_err(edge)?;
        Ok(Fetching { work, weights })
    }

    /// Starts to send the gradients `[M, elements]` of borrowed weights home.
    pub(crate) fn give_back(self: &Arc<Lending>, gradients: &Tensor) -> Result<Returning, Error> {
        let parts = self.by_lender(gradients);
        let sends: Vec<_> = parts.iter().map(|(part, rank)| (part, *rank)).collect();
        let sent = self.group.exchange(&sends, &[], GRADIENTS).map_err(edge)?;
        let elements = gradients.size()[1];
        let receive = |helper| self.receive(helper, elements, gradients);
        let arriving = self.lent.iter().take(2).map(receive).collect::<Result<_, _>>()?;
        Ok(Returning { sent, elements, arriving, lending: self.clone() })
    }

    /// Starts to receive what `helper` computed, on the device of `like`.
    fn receive(&self, helper: &(usize, Vec<i64>), elements: i64, like: &Tensor) -> Result<(Work, Tensor), Error> {
        let (rank, experts) = helper;
        let part = Tensor::empty([experts.len() as i64, elements], (Kind::Float, like.device()));
        Ok((self.group.exchange(&[], &[(&part, *rank)], GRADIENTS).map_err(edge)?, part))
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
        let Returning { sent, elements, mut arriving, lending } = self;
        // Helper by helper, each with its experts in order.
        for (number, (_, experts)) in lending.lent.iter().enumerate() {
            let (work, part) = arriving.remove(0);
            work.wait().map_err(edge)?;
            for (row, &expert) in experts.iter().enumerate() {
                let [of_gate_up, of_down] = parts(&part.get(row as i64), gate_up, down);
                let _ = gate_up.select(0, expert).g_add_(&of_gate_up);
                let _ = down.select(0, expert).g_add_(&of_down);
            }
            if let Some(next) = lending.lent.get(number + 2) {
                arriving.push(lending.receive(next, elements, &part)?);
            }
        }
        sent.wait().map_err(edge)
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
