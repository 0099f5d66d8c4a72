//! Experts' weights that ranks lend to those that help them, and the gradients on their way home.
//!
//! Two ranks exchange one message, whatever the number of experts: all that one lends the other. In backward the gradients
//! of lent weights go the other way, in fp32, in rounds: in each one every owner hears of one of its helpers, and adds what that
//! one computed, so the sum is the same each time. Two helpers' gradients exist at once, however many they are. Where no weight is
//! lent, nothing is sent.
//!
//! # Collective
//! Every rank of the group comes to each exchange in the same order, on a communicator that carries nothing else.
// Shapes: F ffn, D hidden, M experts lent to this rank.

use crate::plan::{ExpertTopology, RankPlan};
use parallel::{Communicator, Work};
use std::collections::{HashMap, VecDeque};
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
    /// Ranks that lend to this one.
    loans: Vec<Loan>,
    /// The most helpers that any rank of the group has.
    rounds: usize,
}

/// What a rank borrows of another.
struct Loan {
    owner_rank: usize,
    experts: i64,
    /// When its gradients go home: which of the owner's helpers this rank is.
    round: usize,
}

/// Weights on their way.
#[must_use]
pub(crate) struct PendingWeights {
    work: Work,
    weights: Tensor,
}

/// Gradients on their way home.
#[must_use]
pub(crate) struct PendingGradients {
    lending: Arc<Lending>,
    /// Of this rank's lent weights, `[M, elements]`.
    gradients: Tensor,
    /// The rounds under way, with what arrives in them.
    in_flight: VecDeque<(Work, Option<Tensor>)>,
}

impl Lending {
    /// None where no weight is lent to anyone.
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
            lent: Vec::new(),
            loans: Vec::new(),
            rounds: 0,
        };
        // The last sender and receiver, and which of the sender's helpers that receiver is.
        let mut last = None;
        let mut round = 0;
        // They come by sender, receiver and expert; weights go between ranks with the same slice.
        for transfer in &rank_plan.transfers {
            let from = transfer.from * topology.slices + slice;
            let to = transfer.to * topology.slices + slice;
            if last != Some((transfer.from, transfer.to)) {
                round = if last.is_some_and(|(from, _)| from == transfer.from) {
                    round + 1
                } else {
                    0
                };
                last = Some((transfer.from, transfer.to));
                lending.rounds = lending.rounds.max(round + 1);
            }
            if transfer.from == owner {
                let expert = (transfer.expert - first) as i64;
                match lending.lent.last_mut().filter(|(rank, _)| *rank == to) {
                    Some((_, experts)) => experts.push(expert),
                    None => lending.lent.push((to, vec![expert])),
                }
            }
            if transfer.to == owner {
                match lending
                    .loans
                    .last_mut()
                    .filter(|loan| loan.owner_rank == from)
                {
                    Some(loan) => loan.experts += 1,
                    None => lending.loans.push(Loan {
                        owner_rank: from,
                        experts: 1,
                        round,
                    }),
                }
            }
        }
        Some(Arc::new(lending))
    }

    /// Every rank of `group` lends its first expert to the next.
    pub(crate) fn ring(group: &Arc<dyn Communicator>) -> Arc<Lending> {
        let rank = group.rank();
        let ranks = group.size();
        let next = (rank + 1) % ranks;
        let previous = (rank + ranks - 1) % ranks;
        let loans = vec![Loan {
            owner_rank: previous,
            experts: 1,
            round: 0,
        }];
        Arc::new(Lending {
            group: group.clone(),
            lent: vec![(next, vec![0])],
            loans,
            rounds: 1,
        })
    }

    /// How many experts this rank lends, counted once for each helper.
    pub(crate) fn num_lent(&self) -> i64 {
        self.lent
            .iter()
            .map(|(_, experts)| experts.len() as i64)
            .sum()
    }

    fn num_received(&self) -> i64 {
        self.loans.iter().map(|loan| loan.experts).sum()
    }

    /// Of `[M, elements]` what each owner's experts are.
    fn by_owner<'a>(&'a self, all: &Tensor) -> Vec<(Tensor, &'a Loan)> {
        let mut first = 0;
        let part = |loan: &'a Loan| {
            first += loan.experts;
            (all.narrow(0, first - loan.experts, loan.experts), loan)
        };
        self.loans.iter().map(part).collect()
    }

    /// Starts to send this rank's weights `[L, 2F, D]` and `[L, D, F]` to those that are lent them.
    pub(crate) fn fetch(
        &self,
        gate_up_proj: &Tensor,
        down_proj: &Tensor,
    ) -> Result<PendingWeights, Error> {
        let elements = expert_numel(&gate_up_proj.size()) + expert_numel(&down_proj.size());
        // Helpers with the same experts get the same buffer.
        let mut packed: HashMap<&[i64], Tensor> = HashMap::new();
        for (_, experts) in &self.lent {
            packed.entry(experts).or_insert_with(|| {
                let parts = experts.iter().flat_map(|&e| {
                    [gate_up_proj, down_proj].map(|weights| weights.select(0, e).view([-1]))
                });
                tch::no_grad(|| Tensor::cat(&parts.collect::<Vec<_>>(), 0))
            });
        }
        let sends: Vec<_> = self
            .lent
            .iter()
            .map(|(rank, experts)| (&packed[experts.as_slice()], *rank))
            .collect();
        let weights = Tensor::empty(
            [self.num_received(), elements],
            (gate_up_proj.kind(), gate_up_proj.device()),
        );
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
        let in_flight = VecDeque::new();
        let mut returning = PendingGradients {
            lending: self.clone(),
            gradients: gradients.shallow_clone(),
            in_flight,
        };
        for round in 0..self.rounds.min(2) {
            returning.start(round)?;
        }
        Ok(returning)
    }
}

impl PendingWeights {
    /// Waits for them: `[M, elements]`, in order of their experts.
    pub(crate) fn wait(self) -> Result<Tensor, Error> {
        self.work.wait()?;
        Ok(self.weights)
    }
}

impl PendingGradients {
    fn start(&mut self, round: usize) -> Result<(), Error> {
        let Lending { group, lent, .. } = &*self.lending;
        let parts = self.lending.by_owner(&self.gradients);
        let of_now = parts.iter().filter(|(_, loan)| loan.round == round);
        let sends: Vec<_> = of_now.map(|(part, loan)| (part, loan.owner_rank)).collect();
        let elements = self.gradients.size()[1];
        let helper = lent.get(round).map(|(helper, experts)| {
            let options = (Kind::Float, self.gradients.device());
            (
                Tensor::empty([experts.len() as i64, elements], options),
                *helper,
            )
        });
        let receives: Vec<_> = helper
            .iter()
            .map(|(part, helper)| (part, *helper))
            .collect();
        let work = group.exchange(&sends, &receives, GRADIENTS)?;
        self.in_flight
            .push_back((work, helper.map(|(part, _)| part)));
        Ok(())
    }

    /// Waits for what helpers computed, and adds it to the gradients `[L, 2F, D]` and `[L, D, F]` of this rank's experts.
    pub(crate) fn wait_and_add_to(
        mut self,
        gate_up_proj: &Tensor,
        down_proj: &Tensor,
    ) -> Result<(), Error> {
        let lending = self.lending.clone();
        for round in 0..lending.rounds {
            let (work, part) = self
                .in_flight
                .pop_front()
                .expect("two rounds are under way, or all that are left");
            work.wait()?;
            if let Some(part) = part {
                let [grad_gate_up, grad_down] =
                    split_matrices(&part, &gate_up_proj.size(), &down_proj.size());
                for (row, &expert) in lending.lent[round].1.iter().enumerate() {
                    let _ = gate_up_proj
                        .select(0, expert)
                        .g_add_(&grad_gate_up.get(row as i64));
                    let _ = down_proj
                        .select(0, expert)
                        .g_add_(&grad_down.get(row as i64));
                }
            }
            if round + 2 < lending.rounds {
                self.start(round + 2)?;
            }
        }
        Ok(())
    }
}

/// Experts' elements, `[M, elements]`, as matrices: `[M, 2F, D]` and `[M, D, F]`, where `gate_up_proj` is the shape `[L, 2F, D]` and `down_proj`
/// `[L, D, F]`.
pub(crate) fn split_matrices(
    flat: &Tensor,
    gate_up_proj: &[i64],
    down_proj: &[i64],
) -> [Tensor; 2] {
    let mut start = 0;
    [gate_up_proj, down_proj].map(|like| {
        let elements = expert_numel(like);
        let mut shape = like.to_vec();
        shape[0] = flat.size()[0];
        start += elements;
        flat.narrow(1, start - elements, elements)
            .view(shape.as_slice())
    })
}

/// Elements of one expert, of weights of such a shape.
pub(crate) fn expert_numel(shape: &[i64]) -> i64 {
    shape[1..].iter().product()
}
