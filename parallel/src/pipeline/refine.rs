//! Moves passes of an order to where they shorten the step, by the times of its passes. The orders of the papers suppose that F, B and
//! W take equal times, and most know nothing of the vocabulary's passes. (arXiv 2401.10241, section 3, makes an order anew by times; this
//! goes on from one that is there.)

use super::communication::Dependency;
use super::simulate::Costs;
use super::{Collective, Order, Pass, PassKind, Vocabulary};
use std::collections::HashMap;

/// How many places a pass is moved at most, at once.
const MAX_SHIFT: usize = 6;
/// How long a message takes at least, and a collective, in parts of a mean F: without room an order that is right on paper waits for
/// whatever is late.
const MIN_COMMUNICATION: [f64; 2] = [0.05, 0.1];
/// Passes that are gone through before the best order so far is taken: a tenth of a second.
const PASS_BUDGET: usize = 4_000_000;
/// Gains below this part of a step are none.
const MIN_GAIN: f64 = 1e-6;

/// `order`, or one that takes less time by `costs` and holds no more, on any rank, of microbatches and of logits. Passes of one kind
/// and chunk stay in their order.
///
/// Left as they are: orders that neither split the backward nor share the vocabulary out, which are what their names say; those with
/// `naive` and `interlaced`, which are there to compare with; those that cannot run.
///
/// A pure function: all ranks find the same.
pub fn refined(order: &Order, costs: &Costs) -> Order {
    let splits = order
        .ranks
        .iter()
        .flatten()
        .any(|pass| pass.kind == PassKind::BackwardWeight);
    match order.vocabulary {
        Some(Vocabulary::Naive | Vocabulary::Interlaced) => return order.clone(),
        None if !splits => return order.clone(),
        _ => {}
    }
    let graph = DependencyGraph::new(order, costs);
    let mut lists = graph.lists.clone();
    let limits: Vec<PeakHeld> = lists.iter().map(|list| graph.held(list)).collect();
    let Some(mut best) = graph.run(&lists) else {
        return order.clone();
    };
    let mut left = PASS_BUDGET / graph.passes.len().max(1);
    // Only what lies on the longest way through a step can shorten it.
    while let Some((shorter, run)) =
        graph
            .critical_path(&lists, &best)
            .into_iter()
            .find_map(|(rank, at)| {
                nearby_positions(at, lists[rank].len()).find_map(|to| {
                    let list = graph.moved(&lists[rank], at, to)?;
                    if left == 0 || !graph.held(&list).within(&limits[rank]) {
                        return None;
                    }
                    left -= 1;
                    let mut lists = lists.clone();
                    lists[rank] = list;
                    let run = graph.run(&lists)?;
                    (run.total < best.total * (1.0 - MIN_GAIN)).then_some((lists, run))
                })
            })
    {
        (lists, best) = (shorter, run);
    }
    let passes = |list: Vec<usize>| list.into_iter().map(|pass| graph.passes[pass].1).collect();
    Order {
        ranks: lists.into_iter().map(passes).collect(),
        ..order.clone()
    }
}

/// Places near `at` in a list of `len`, the nearest first.
fn nearby_positions(at: usize, len: usize) -> impl Iterator<Item = usize> {
    let around = move |far: usize| [at.checked_sub(far), Some(at + far).filter(|&to| to < len)];
    (1..=MAX_SHIFT).flat_map(around).flatten()
}

/// What passes wait for. They are known by numbers.
struct DependencyGraph {
    /// Rank and pass.
    passes: Vec<(usize, Pass)>,
    times: Vec<f64>,
    /// For each pass, those that it waits for, and how long after their end it can begin.
    needs: Vec<Vec<(usize, f64)>>,
    lists: Vec<Vec<usize>>,
}

/// When passes end, and the whole.
struct EndTimes {
    ends: Vec<f64>,
    total: f64,
}

/// The most that a rank holds: chunks' activations until their weights' gradients are made, and until their inputs' are, and logits.
#[derive(Default, Clone, Copy)]
struct PeakHeld {
    until_weights: usize,
    until_inputs: usize,
    logits: usize,
}

impl PeakHeld {
    fn within(self, limit: &PeakHeld) -> bool {
        self.until_weights <= limit.until_weights
            && self.until_inputs <= limit.until_inputs
            && self.logits <= limit.logits
    }
}

impl DependencyGraph {
    fn new(order: &Order, costs: &Costs) -> DependencyGraph {
        let forward = costs.forward.iter().sum::<f64>() / costs.forward.len().max(1) as f64;
        let [send, collective] = [costs.send, costs.collective];
        let send = send.max(MIN_COMMUNICATION[0] * forward);
        let collective = collective.max(MIN_COMMUNICATION[1] * forward);
        let mut graph = DependencyGraph {
            passes: Vec::new(),
            times: Vec::new(),
            needs: Vec::new(),
            lists: Vec::new(),
        };
        let mut numbers = HashMap::new();
        let mut contributors: HashMap<Collective, Vec<usize>> = HashMap::new();
        for (rank, passes) in order.ranks.iter().enumerate() {
            let first = graph.passes.len();
            for &pass in passes {
                let number = graph.passes.len();
                numbers.insert((rank, pass), number);
                order
                    .contributes_to(rank, pass)
                    .into_iter()
                    .for_each(|to| contributors.entry(to).or_default().push(number));
                graph.passes.push((rank, pass));
                graph.times.push(costs.of(order, rank, pass));
            }
            graph.lists.push((first..graph.passes.len()).collect());
        }
        // A backward that gives the input's gradient, whether or not its other part is split off.
        let number_of = |rank: usize, pass: Pass| {
            let split = Pass {
                kind: PassKind::BackwardInput,
                ..pass
            };
            let whole = numbers.get(&(rank, pass));
            whole
                .or_else(|| {
                    numbers
                        .get(&(rank, split))
                        .filter(|_| pass.kind == PassKind::Backward)
                })
                .copied()
        };
        let needs_of = |&(rank, pass): &(usize, Pass)| {
            let of_need = |need| match need {
                Dependency::Pass(other) => number_of(rank, other)
                    .map(|number| (number, 0.0))
                    .into_iter()
                    .collect(),
                Dependency::Message(message) => {
                    let (peer, producer) = order.producer(message);
                    let number = number_of(peer, producer);
                    number.map(|number| (number, send)).into_iter().collect()
                }
                Dependency::Collective(of) => {
                    let contributors = contributors.get(&of).into_iter().flatten();
                    contributors
                        .map(|&contributor| (contributor, collective))
                        .collect::<Vec<_>>()
                }
            };
            order
                .dependencies(rank, pass)
                .into_iter()
                .flat_map(of_need)
                .collect()
        };
        graph.needs = graph.passes.iter().map(needs_of).collect();
        graph
    }

    /// When passes end, if they can all run in this order.
    fn run(&self, lists: &[Vec<usize>]) -> Option<EndTimes> {
        let mut ends = vec![f64::NAN; self.passes.len()];
        let mut at = vec![0; lists.len()];
        let mut clock = vec![0.0f64; lists.len()];
        let mut left = self.passes.len();
        while left > 0 {
            let before = left;
            for (rank, list) in lists.iter().enumerate() {
                while let Some(&pass) = list.get(at[rank]) {
                    let mut needs = self.needs[pass].iter();
                    // What has not ended is not a number.
                    let ready = needs.try_fold(clock[rank], |ready, &(other, after)| {
                        let opens = ends[other] + after;
                        (!opens.is_nan()).then_some(f64::max(ready, opens))
                    });
                    let Some(ready) = ready else { break };
                    clock[rank] = ready + self.times[pass];
                    ends[pass] = clock[rank];
                    at[rank] += 1;
                    left -= 1;
                }
            }
            if left == before {
                return None;
            }
        }
        Some(EndTimes {
            ends,
            total: clock.into_iter().fold(0.0, f64::max),
        })
    }

    /// The passes of which each ends when the next begins, from the last one on: ranks, and places in their lists.
    fn critical_path(&self, lists: &[Vec<usize>], run: &EndTimes) -> Vec<(usize, usize)> {
        let mut place = vec![0; self.passes.len()];
        lists.iter().for_each(|list| {
            list.iter()
                .enumerate()
                .for_each(|(at, &pass)| place[pass] = at)
        });
        let mut way = Vec::new();
        let mut next = (0..self.passes.len()).max_by(|&a, &b| run.ends[a].total_cmp(&run.ends[b]));
        while let Some(pass) = next {
            let rank = self.passes[pass].0;
            let at = place[pass];
            way.push((rank, at));
            let before = at.checked_sub(1).map(|before| (lists[rank][before], 0.0));
            let all = self.needs[pass].iter().copied().chain(before);
            let latest = all.max_by(|a, b| (run.ends[a.0] + a.1).total_cmp(&(run.ends[b.0] + b.1)));
            next = latest.map(|(other, _)| other);
        }
        way
    }

    /// `list` with what is at `at` moved to `to`, unless it would pass another one of its kind and chunk.
    fn moved(&self, list: &[usize], at: usize, to: usize) -> Option<Vec<usize>> {
        let (_, pass) = self.passes[list[at]];
        let over = if to < at {
            &list[to..at]
        } else {
            &list[at + 1..=to]
        };
        let alike = |&other: &usize| {
            let (_, other) = self.passes[other];
            let both = pass.kind.gives_input_gradient() && other.kind.gives_input_gradient();
            other.chunk == pass.chunk && (other.kind == pass.kind || both)
        };
        if over.iter().any(alike) {
            return None;
        }
        let mut list = list.to_vec();
        let pass = list.remove(at);
        list.insert(to, pass);
        Some(list)
    }

    fn held(&self, list: &[usize]) -> PeakHeld {
        let mut weights = 0usize;
        let mut inputs = 0usize;
        let mut logits = 0usize;
        let mut most = PeakHeld::default();
        for &pass in list {
            match self.passes[pass].1.kind {
                PassKind::Forward => (weights, inputs) = (weights + 1, inputs + 1),
                PassKind::Backward => {
                    (weights, inputs) = (weights.saturating_sub(1), inputs.saturating_sub(1))
                }
                PassKind::BackwardInput => inputs = inputs.saturating_sub(1),
                PassKind::BackwardWeight => weights = weights.saturating_sub(1),
                PassKind::Logits => logits += 1,
                PassKind::LogitsBackward => logits = logits.saturating_sub(1),
                PassKind::Normalize | PassKind::Embed | PassKind::EmbedBackward => {}
            }
            most.until_weights = most.until_weights.max(weights);
            most.until_inputs = most.until_inputs.max(inputs);
            most.logits = most.logits.max(logits);
        }
        most
    }
}
