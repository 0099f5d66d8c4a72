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

use crate::plan::{Route, Sites};
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
    borrowed: Vec<Borrowed>,
    /// The most helpers that any rank of the group has.
    rounds: usize,
}

/// What a rank borrows of another.
struct Borrowed {
    lender: usize,
    experts: i64,
    /// When its gradients go home: which of the lender's helpers this rank is.
    round: usize,
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
    lending: Arc<Lending>,
    /// Of this rank's borrowed weights, `[M, elements]`.
    gradients: Tensor,
    /// The rounds under way, with what arrives in them.
    under_way: VecDeque<(Work, Option<Tensor>)>,
}

impl Lending {
    /// None where no weight is lent to anyone.
    pub(crate) fn new(
        route: &Route,
        sites: &Sites,
        group: &Arc<dyn Communicator>,
    ) -> Option<Arc<Lending>> {
        if route.transfers.is_empty() {
            return None;
        }
        let owner = group.rank() / sites.slices;
        let slice = group.rank() % sites.slices;
        let first = route.work.first().copied().unwrap_or(0);
        let mut lending = Lending {
            group: group.clone(),
            lent: Vec::new(),
            borrowed: Vec::new(),
            rounds: 0,
        };
        // The last sender and receiver, and which of the sender's helpers that receiver is.
        let mut last = None;
        let mut round = 0;
        // They come by sender, receiver and expert; weights go between ranks with the same slice.
        for transfer in &route.transfers {
            let from = transfer.from * sites.slices + slice;
            let to = transfer.to * sites.slices + slice;
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
                    .borrowed
                    .last_mut()
                    .filter(|borrowed| borrowed.lender == from)
                {
                    Some(borrowed) => borrowed.experts += 1,
                    None => lending.borrowed.push(Borrowed {
                        lender: from,
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
        let borrowed = vec![Borrowed {
            lender: previous,
            experts: 1,
            round: 0,
        }];
        Arc::new(Lending {
            group: group.clone(),
            lent: vec![(next, vec![0])],
            borrowed,
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

    fn num_borrowed(&self) -> i64 {
        self.borrowed.iter().map(|borrowed| borrowed.experts).sum()
    }

    /// Of `[M, elements]` what each lender's experts are.
    fn by_lender<'a>(&'a self, all: &Tensor) -> Vec<(Tensor, &'a Borrowed)> {
        let mut first = 0;
        let part = |borrowed: &'a Borrowed| {
            first += borrowed.experts;
            (
                all.narrow(0, first - borrowed.experts, borrowed.experts),
                borrowed,
            )
        };
        self.borrowed.iter().map(part).collect()
    }

    /// Starts to send this rank's weights `[L, 2F, D]` and `[L, D, F]` to those that are lent them.
    pub(crate) fn fetch(&self, gate_up: &Tensor, down: &Tensor) -> Result<Fetching, Error> {
        let elements = numel(&gate_up.size()) + numel(&down.size());
        // Helpers with the same experts get the same buffer.
        let mut packed: HashMap<&[i64], Tensor> = HashMap::new();
        for (_, experts) in &self.lent {
            packed.entry(experts).or_insert_with(|| {
                let parts = experts
                    .iter()
                    .flat_map(|&e| [gate_up, down].map(|weights| weights.select(0, e).view([-1])));
                tch::no_grad(|| Tensor::cat(&parts.collect::<Vec<_>>(), 0))
            });
        }
        let sends: Vec<_> = self
            .lent
            .iter()
            .map(|(rank, experts)| (&packed[experts.as_slice()], *rank))
            .collect();
        let weights = Tensor::empty(
            [self.num_borrowed(), elements],
            (gate_up.kind(), gate_up.device()),
        );
        let parts = self.by_lender(&weights);
        let receives: Vec<_> = parts
            .iter()
            .map(|(part, borrowed)| (part, borrowed.lender))
            .collect();
        let work = self.group.exchange(&sends, &receives, WEIGHTS)?;
        Ok(Fetching { work, weights })
    }

    /// Starts to send the gradients `[M, elements]` of borrowed weights home.
    pub(crate) fn give_back(self: &Arc<Lending>, gradients: &Tensor) -> Result<Returning, Error> {
        let under_way = VecDeque::new();
        let mut returning = Returning {
            lending: self.clone(),
            gradients: gradients.shallow_clone(),
            under_way,
        };
        for round in 0..self.rounds.min(2) {
            returning.start(round)?;
        }
        Ok(returning)
    }
}

impl Fetching {
    /// Waits for them: `[M, elements]`, in order of their experts.
    pub(crate) fn arrive(self) -> Result<Tensor, Error> {
        self.work.wait()?;
        Ok(self.weights)
    }
}

impl Returning {
    fn start(&mut self, round: usize) -> Result<(), Error> {
        let Lending { group, lent, .. } = &*self.lending;
        let parts = self.lending.by_lender(&self.gradients);
        let of_now = parts.iter().filter(|(_, borrowed)| borrowed.round == round);
        let sends: Vec<_> = of_now
            .map(|(part, borrowed)| (part, borrowed.lender))
            .collect();
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
        self.under_way
            .push_back((work, helper.map(|(part, _)| part)));
        Ok(())
    }

    /// Waits for what helpers computed, and adds it to the gradients `[L, 2F, D]` and `[L, D, F]` of this rank's experts.
    pub(crate) fn add_to(mut self, gate_up: &Tensor, down: &Tensor) -> Result<(), Error> {
        let lending = self.lending.clone();
        for round in 0..lending.rounds {
            let (work, part) = self
                .under_way
                .pop_front()
                .expect("two rounds are under way, or all that are left");
            work.wait()?;
            if let Some(part) = part {
                let [of_gate_up, of_down] = parts(&part, &gate_up.size(), &down.size());
                for (row, &expert) in lending.lent[round].1.iter().enumerate() {
                    let _ = gate_up
                        .select(0, expert)
                        .g_add_(&of_gate_up.get(row as i64));
                    let _ = down.select(0, expert).g_add_(&of_down.get(row as i64));
                }
            }
            if round + 2 < lending.rounds {
                self.start(round + 2)?;
            }
        }
        Ok(())
    }
}

/// Experts' elements, `[M, elements]`, as matrices: `[M, 2F, D]` and `[M, D, F]`, where `gate_up` is the shape `[L, 2F, D]` and `down`
/// `[L, D, F]`.
pub(crate) fn parts(flat: &Tensor, gate_up: &[i64], down: &[i64]) -> [Tensor; 2] {
    let mut start = 0;
    [gate_up, down].map(|like| {
        let elements = numel(like);
        let mut shape = like.to_vec();
        shape[0] = flat.size()[0];
        start += elements;
        flat.narrow(1, start - elements, elements)
            .view(shape.as_slice())
    })
}

/// Elements of one expert, of weights of such a shape.
pub(crate) fn numel(shape: &[i64]) -> i64 {
    shape[1..].iter().product()
}
