//! Transfer of lent weights to helpers, and of their gradients home.
//!
//! Two ranks exchange one message for all experts that one lends the other. In backward, gradients
//! return in fp32, in rounds. In each round every owner receives the gradients of one helper and
//! adds them, so the order of the sum is fixed. At most two helpers' gradients exist at once. If no
//! weight is lent, nothing is sent.
//!
//! # Collective
//! Every rank of the group takes part in each exchange, in the same order, on a communicator that
//! carries nothing else.
// Shapes: L local experts, M experts lent to this rank.
//
// An expert's weights are one tensor of each of several stacks `[L, ...]`.

use crate::{
    lending::assignment::Transfer,
    plan::{ExpertTopology, RankPlan},
};
use parallel::{Communicator, Work};
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};
use tch::{Kind, Tensor};
use torch_ext::Error;

/// Message tags. A rank may send gradients while another still receives weights.
const WEIGHTS: i32 = 1;
const GRADIENTS: i32 = 2;

/// The lending of one layer, as one rank sees it.
pub(crate) struct Lending {
    group: Arc<dyn Communicator>,
    /// Experts that this rank lends, by helper.
    helpers: Vec<HelperRank>,
    /// Experts that this rank receives, by owner.
    loans: Vec<Loan>,
    /// Largest number of helpers of any rank of the group.
    rounds: usize,
}

/// A rank that this one lends experts to.
struct HelperRank {
    rank: usize,
    /// Indices among this rank's experts.
    experts: Vec<i64>,
}

/// Experts that another rank lends to this one.
struct Loan {
    owner_rank: usize,
    num_experts: i64,
    /// The round in which the gradients return: the index of this rank among the owner's helpers.
    round: usize,
}

/// Lent weights in flight.
#[must_use]
pub(crate) struct PendingWeights {
    work: Work,
    weights: Tensor,
}

/// Gradients of lent weights in flight.
#[must_use]
pub(crate) struct PendingGradients {
    lending: Arc<Lending>,
    /// Gradients that this rank returns, `[M, elements]`.
    gradients: Tensor,
    in_flight: VecDeque<Round>,
}

/// A round in flight, with the gradients that this rank receives from a helper.
struct Round {
    work: Work,
    received: Option<Tensor>,
}

impl Lending {
    /// Returns the lending of a plan, or None if no rank lends anything.
    pub(crate) fn new(
        rank_plan: &RankPlan,
        topology: &ExpertTopology,
        group: &Arc<dyn Communicator>,
    ) -> Option<Arc<Lending>> {
        if rank_plan.transfers.is_empty() {
            return None;
        }
        let owner = group.rank() / topology.slices;
        let slice = group.rank() % topology.slices;
        let first = rank_plan.computed_experts.first().copied().unwrap_or(0);
        let mut lending = Lending {
            group: group.clone(),
            helpers: Vec::new(),
            loans: Vec::new(),
            rounds: 0,
        };
        let mut previous: Option<Transfer> = None;
        let mut round = 0;
        // Transfers are sorted by sender, receiver and expert. Weights are sent between ranks with
        // the same slice.
        for &transfer in &rank_plan.transfers {
            round = match previous {
                Some(last) if last.from == transfer.from => {
                    round + usize::from(last.to != transfer.to)
                }
                _ => 0,
            };
            previous = Some(transfer);
            lending.rounds = lending.rounds.max(round + 1);
            if transfer.from == owner {
                let helper = transfer.to * topology.slices + slice;
                lending.lend(helper, (transfer.expert - first) as i64);
            }
            if transfer.to == owner {
                let owner_rank = transfer.from * topology.slices + slice;
                lending.receive(owner_rank, round);
            }
        }
        Some(Arc::new(lending))
    }

    fn lend(&mut self, rank: usize, expert: i64) {
        match self.helpers.last_mut() {
            Some(helper) if helper.rank == rank => helper.experts.push(expert),
            _ => self.helpers.push(HelperRank {
                rank,
                experts: vec![expert],
            }),
        }
    }

    fn receive(&mut self, owner_rank: usize, round: usize) {
        match self.loans.last_mut() {
            Some(loan) if loan.owner_rank == owner_rank => loan.num_experts += 1,
            _ => self.loans.push(Loan {
                owner_rank,
                num_experts: 1,
                round,
            }),
        }
    }

    /// Returns a lending in which every rank of `group` lends its first expert to the next rank.
    pub(crate) fn ring(group: &Arc<dyn Communicator>) -> Arc<Lending> {
        let rank = group.rank();
        let ranks = group.size();
        let next = (rank + 1) % ranks;
        let previous = (rank + ranks - 1) % ranks;
        let loans = vec![Loan {
            owner_rank: previous,
            num_experts: 1,
            round: 0,
        }];
        Arc::new(Lending {
            group: group.clone(),
            helpers: vec![HelperRank {
                rank: next,
                experts: vec![0],
            }],
            loans,
            rounds: 1,
        })
    }

    /// Returns the number of experts that this rank lends, each counted once per helper.
    pub(crate) fn num_lent(&self) -> i64 {
        let helpers = self.helpers.iter();
        helpers.map(|helper| helper.experts.len() as i64).sum()
    }

    fn num_received(&self) -> i64 {
        self.loans.iter().map(|loan| loan.num_experts).sum()
    }

    /// Returns the rows of `[M, elements]` that belong to each loan.
    fn by_owner<'a>(&'a self, all: &Tensor) -> Vec<(Tensor, &'a Loan)> {
        let mut start = 0;
        let mut parts = Vec::new();
        for loan in &self.loans {
            parts.push((all.narrow(0, start, loan.num_experts), loan));
            start += loan.num_experts;
        }
        parts
    }

    /// Starts to send weights of this rank's experts to its helpers, from all stacks `[L, ...]`.
    pub(crate) fn fetch(&self, stacks: &[Tensor]) -> Result<PendingWeights, Error> {
        let elements = stacks.iter().map(|stack| expert_numel(&stack.size())).sum();
        // Helpers with equal experts share a buffer.
        let mut packed: HashMap<&[i64], Tensor> = HashMap::new();
        for helper in &self.helpers {
            packed
                .entry(&helper.experts)
                .or_insert_with(|| pack_experts(&helper.experts, stacks));
        }
        let sends: Vec<_> = self
            .helpers
            .iter()
            .map(|helper| (&packed[helper.experts.as_slice()], helper.rank))
            .collect();
        let options = (stacks[0].kind(), stacks[0].device());
        let weights = Tensor::empty([self.num_received(), elements], options);
        let parts = self.by_owner(&weights);
        let receives: Vec<_> = parts
            .iter()
            .map(|(part, loan)| (part, loan.owner_rank))
            .collect();
        let work = self.group.exchange(&sends, &receives, WEIGHTS)?;
        Ok(PendingWeights { work, weights })
    }

    /// Starts to send the gradients `[M, elements]` of lent weights home.
    pub(crate) fn send_gradients(
        self: &Arc<Lending>,
        gradients: &Tensor,
    ) -> Result<PendingGradients, Error> {
        let mut pending = PendingGradients {
            lending: self.clone(),
            gradients: gradients.shallow_clone(),
            in_flight: VecDeque::new(),
        };
        for round in 0..self.rounds.min(2) {
            pending.start(round)?;
        }
        Ok(pending)
    }
}

impl PendingWeights {
    /// Waits for the weights `[M, elements]`, in the order of the lent experts.
    pub(crate) fn wait(self) -> Result<Tensor, Error> {
        self.work.wait()?;
        Ok(self.weights)
    }
}

impl PendingGradients {
    fn start(&mut self, round: usize) -> Result<(), Error> {
        let Lending { group, helpers, .. } = &*self.lending;
        let parts = self.lending.by_owner(&self.gradients);
        let sends: Vec<_> = parts
            .iter()
            .filter(|(_, loan)| loan.round == round)
            .map(|(part, loan)| (part, loan.owner_rank))
            .collect();
        let elements = self.gradients.size()[1];
        let helper = helpers.get(round);
        let received = helper.map(|helper| {
            let shape = [helper.experts.len() as i64, elements];
            Tensor::empty(shape, (Kind::Float, self.gradients.device()))
        });
        let receives: Vec<_> = received
            .iter()
            .zip(helper)
            .map(|(received, helper)| (received, helper.rank))
            .collect();
        let work = group.exchange(&sends, &receives, GRADIENTS)?;
        self.in_flight.push_back(Round { work, received });
        Ok(())
    }

    /// Waits for the helpers' gradients, and adds them to the gradients `[L, ...]` of this rank's
    /// experts, one for each stack.
    pub(crate) fn wait_and_add_to(mut self, stacks: &[&Tensor]) -> Result<(), Error> {
        let lending = self.lending.clone();
        let shapes = stacks
            .iter()
            .map(|stack| stack.size())
            .collect::<Vec<Vec<i64>>>();
        for round in 0..lending.rounds {
            let Round { work, received } = self
                .in_flight
                .pop_front()
                .expect("two rounds are in flight, or all that remain");
            work.wait()?;
            if let Some(received) = received {
                for (stack, gradients) in stacks.iter().zip(split_stacks(&received, &shapes)) {
                    for (row, &expert) in lending.helpers[round].experts.iter().enumerate() {
                        let gradient = gradients.get(row as i64);
                        let _ = stack.select(0, expert).g_add_(&gradient);
                    }
                }
            }
            if round + 2 < lending.rounds {
                self.start(round + 2)?;
            }
        }
        Ok(())
    }
}

/// Copies the weights of `experts` into one buffer: for each expert those of all stacks.
fn pack_experts(experts: &[i64], stacks: &[Tensor]) -> Tensor {
    let of_expert = |&expert: &i64| {
        let weights = stacks.iter().map(move |stack| stack.select(0, expert));
        weights.map(|weights| weights.view([-1]))
    };
    let weights: Vec<Tensor> = experts.iter().flat_map(of_expert).collect();
    tch::no_grad(|| Tensor::cat(&weights, 0))
}

/// Divides experts' elements `[M, elements]` into stacks `[M, ...]`, for owners' stacks of these
/// shapes `[L, ...]`. One expert's part of a stack is contiguous.
pub(crate) fn split_stacks(flat: &Tensor, shapes: &[Vec<i64>]) -> Vec<Tensor> {
    let mut start = 0;
    let mut stacks = Vec::new();
    for shape in shapes {
        let elements = expert_numel(shape);
        let mut shape = shape.clone();
        shape[0] = flat.size()[0];
        stacks.push(flat.narrow(1, start, elements).view(shape.as_slice()));
        start += elements;
    }
    stacks
}

/// Returns the number of elements of one expert in weights of this shape.
pub(crate) fn expert_numel(shape: &[i64]) -> i64 {
    shape[1..].iter().product()
}
