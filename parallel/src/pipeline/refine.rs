//! Moves passes of an order to shorten the step, given the times of its passes.
//!
//! The orders of the papers assume that F, B and W take equal times, and most ignore the passes of
//! vocabulary parallelism. arXiv 2401.10241, section 3, builds an order from times; this module
//! improves an existing one.

use super::{
    Collective, Order, Pass, PassKind, Vocabulary, communication::Dependency, simulate::Costs,
};
use std::collections::HashMap;

/// The largest distance, in positions, by which one move shifts a pass.
const MAX_SHIFT: usize = 6;
/// The least time of a message, as a fraction of the mean F.
///
/// Without slack, an order that is optimal on paper waits for whatever is late.
const MIN_SEND: f64 = 0.05;
/// The least time of a collective, as a fraction of the mean F.
const MIN_COLLECTIVE: f64 = 0.1;
/// Passes that the search simulates before it returns the best order so far: a tenth of a second.
const PASS_BUDGET: usize = 4_000_000;
/// Passes in the lists that the search compares before it returns the best order so far. Only
/// orders with very long lists reach it, whose moves are mostly refused before a simulation.
const COMPARISON_BUDGET: usize = 500_000_000;
/// The least gain of a move, as a fraction of the step.
const MIN_GAIN: f64 = 1e-6;

/// Returns `order`, or one that takes less time by `costs`.
///
/// On no rank does the result hold more microbatches or logits. Passes of one kind and chunk stay
/// in their order. Unchanged are orders that neither split the backward nor use vocabulary
/// parallelism, because their names define them; orders with `naive` and `interlaced`, which exist
/// for comparison; and orders that cannot run.
///
/// This is a pure function: all ranks find the same order.
pub fn refined(order: &Order, costs: &Costs) -> Order {
    if !is_refinable(order) {
        return order.clone();
    }
    let graph = DependencyGraph::new(order, costs);
    let Some(mut search) = Search::new(&graph) else {
        return order.clone();
    };
    while search.improve() {}
    let passes = |list: &Vec<usize>| list.iter().map(|&pass| graph.passes[pass].pass).collect();
    Order {
        ranks: search.lists.iter().map(passes).collect(),
        ..order.clone()
    }
}

fn is_refinable(order: &Order) -> bool {
    match order.vocabulary {
        Some(Vocabulary::Naive | Vocabulary::Interlaced) => false,
        Some(Vocabulary::Vocab1 | Vocabulary::Vocab2) => true,
        None => {
            let mut passes = order.ranks.iter().flatten();
            passes.any(|pass| pass.kind == PassKind::BackwardWeight)
        }
    }
}

/// A local search: it moves one pass at a time while this shortens the step.
struct Search<'a> {
    graph: &'a DependencyGraph,
    /// The passes of each rank.
    lists: Vec<Vec<usize>>,
    times: EndTimes,
    /// The most that each rank may hold.
    limits: Vec<PeakHeld>,
    /// Number of orders that may still be simulated.
    runs_left: usize,
    /// Number of passes in lists that may still be compared.
    comparisons_left: usize,
}

impl Search<'_> {
    /// Returns None if the order cannot run.
    fn new(graph: &DependencyGraph) -> Option<Search<'_>> {
        let lists = graph.lists.clone();
        Some(Search {
            graph,
            times: graph.run(&lists)?,
            limits: lists.iter().map(|list| graph.peak_held(list)).collect(),
            runs_left: PASS_BUDGET / graph.passes.len().max(1),
            comparisons_left: COMPARISON_BUDGET,
            lists,
        })
    }

    /// Makes the first move that shortens the step, and returns false if there is none.
    fn improve(&mut self) -> bool {
        // Only passes on the critical path can shorten the step.
        for position in self.graph.critical_path(&self.lists, &self.times) {
            let len = self.lists[position.rank].len();
            for to in nearby_positions(position.index, len) {
                if self.try_move(position, to) {
                    return true;
                }
            }
        }
        false
    }

    /// Moves a pass to `to` if this is allowed and shortens the step.
    fn try_move(&mut self, position: Position, to: usize) -> bool {
        let Position { rank, index } = position;
        if self.comparisons_left == 0 {
            return false;
        }
        let Some(list) = self.graph.moved(&self.lists[rank], index, to) else {
            return false;
        };
        self.comparisons_left = self.comparisons_left.saturating_sub(list.len());
        if self.runs_left == 0 || !self.graph.peak_held(&list).is_within(&self.limits[rank]) {
            return false;
        }
        self.runs_left -= 1;
        let before = std::mem::replace(&mut self.lists[rank], list);
        let longest = self.times.total * (1.0 - MIN_GAIN);
        match self.graph.run(&self.lists) {
            Some(times) if times.total < longest => {
                self.times = times;
                true
            }
            _ => {
                self.lists[rank] = before;
                false
            }
        }
    }
}

/// Returns the positions near `at` in a list of `len`, the nearest first.
fn nearby_positions(at: usize, len: usize) -> impl Iterator<Item = usize> {
    let around = move |distance: usize| {
        let before = at.checked_sub(distance);
        let after = Some(at + distance).filter(|&to| to < len);
        [before, after]
    };
    (1..=MAX_SHIFT).flat_map(around).flatten()
}

/// A pass and its rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RankPass {
    rank: usize,
    pass: Pass,
}

/// A pass that another one waits for.
#[derive(Clone, Copy)]
struct Edge {
    /// Index of the pass.
    pass: usize,
    /// Time from its end until the other can start.
    delay: f64,
}

/// A position in the list of a rank.
#[derive(Clone, Copy)]
struct Position {
    rank: usize,
    index: usize,
}

/// The dependencies between passes, which are known by index.
struct DependencyGraph {
    passes: Vec<RankPass>,
    times: Vec<f64>,
    /// For each pass, those that it waits for.
    dependencies: Vec<Vec<Edge>>,
    /// The passes of each rank.
    lists: Vec<Vec<usize>>,
}

/// The times at which passes end.
struct EndTimes {
    ends: Vec<f64>,
    total: f64,
}

/// The most that a rank holds at once.
#[derive(Default, Clone, Copy)]
struct PeakHeld {
    /// Chunks whose weight gradients are not computed yet.
    until_weights: usize,
    /// Chunks whose input gradients are not computed yet.
    until_inputs: usize,
    /// Microbatches between S and T.
    logits: usize,
}

impl PeakHeld {
    fn is_within(self, limit: &PeakHeld) -> bool {
        self.until_weights <= limit.until_weights
            && self.until_inputs <= limit.until_inputs
            && self.logits <= limit.logits
    }

    fn max(self, other: PeakHeld) -> PeakHeld {
        PeakHeld {
            until_weights: self.until_weights.max(other.until_weights),
            until_inputs: self.until_inputs.max(other.until_inputs),
            logits: self.logits.max(other.logits),
        }
    }
}

/// The indices by which a graph's dependencies are found.
struct Indices<'a> {
    order: &'a Order,
    passes: HashMap<RankPass, usize>,
    contributors: HashMap<Collective, Vec<usize>>,
    /// Time of a message.
    send: f64,
    /// Time of a collective.
    collective: f64,
}

impl Indices<'_> {
    /// Returns the index of a pass, or of its B if it is a backward that is split.
    fn pass(&self, rank: usize, pass: Pass) -> Option<usize> {
        let index = |pass| self.passes.get(&RankPass { rank, pass }).copied();
        let kind = PassKind::BackwardInput;
        let split = || index(Pass { kind, ..pass }).filter(|_| pass.kind == PassKind::Backward);
        index(pass).or_else(split)
    }

    /// Returns the passes that a pass waits for.
    fn edges(&self, waiting: &RankPass) -> Vec<Edge> {
        let RankPass { rank, pass } = *waiting;
        let mut edges = Vec::new();
        let edge = |pass, delay| Edge { pass, delay };
        for dependency in self.order.dependencies(rank, pass) {
            match dependency {
                Dependency::Pass(other) => {
                    let index = self.pass(rank, other);
                    edges.extend(index.map(|index| edge(index, 0.0)));
                }
                Dependency::Message(message) => {
                    let (peer, producer) = self.order.producer(message);
                    let index = self.pass(peer, producer);
                    edges.extend(index.map(|index| edge(index, self.send)));
                }
                Dependency::Collective(collective) => {
                    let contributors = self.contributors.get(&collective);
                    let contributors = contributors.into_iter().flatten();
                    edges.extend(contributors.map(|&index| edge(index, self.collective)));
                }
            }
        }
        edges
    }
}

impl DependencyGraph {
    fn new(order: &Order, costs: &Costs) -> DependencyGraph {
        let mean_forward = costs.forward.iter().sum::<f64>() / costs.forward.len().max(1) as f64;
        let mut indices = Indices {
            order,
            passes: HashMap::new(),
            contributors: HashMap::new(),
            send: costs.send.max(MIN_SEND * mean_forward),
            collective: costs.collective.max(MIN_COLLECTIVE * mean_forward),
        };
        let mut graph = DependencyGraph {
            passes: Vec::new(),
            times: Vec::new(),
            dependencies: Vec::new(),
            lists: Vec::new(),
        };
        for (rank, passes) in order.ranks.iter().enumerate() {
            let first = graph.passes.len();
            for &pass in passes {
                let index = graph.passes.len();
                indices.passes.insert(RankPass { rank, pass }, index);
                if let Some(collective) = order.contributes_to(rank, pass) {
                    let contributors = indices.contributors.entry(collective).or_default();
                    contributors.push(index);
                }
                graph.passes.push(RankPass { rank, pass });
                graph.times.push(costs.pass_time(order, rank, pass));
            }
            graph.lists.push((first..graph.passes.len()).collect());
        }
        let edges = graph.passes.iter().map(|pass| indices.edges(pass));
        graph.dependencies = edges.collect();
        graph
    }

    /// Returns when passes end, or None if they cannot all run in this order.
    fn run(&self, lists: &[Vec<usize>]) -> Option<EndTimes> {
        // Not a number until the pass has ended.
        let mut ends = vec![f64::NAN; self.passes.len()];
        let mut at = vec![0; lists.len()];
        let mut clock = vec![0.0f64; lists.len()];
        let mut left = self.passes.len();
        while left > 0 {
            let before = left;
            for (rank, list) in lists.iter().enumerate() {
                while let Some(&pass) = list.get(at[rank]) {
                    let Some(start) = self.start(pass, clock[rank], &ends) else {
                        break;
                    };
                    clock[rank] = start + self.times[pass];
                    ends[pass] = clock[rank];
                    at[rank] += 1;
                    left -= 1;
                }
            }
            if left == before {
                return None;
            }
        }
        let total = clock.into_iter().fold(0.0, f64::max);
        Some(EndTimes { ends, total })
    }

    /// Returns when `pass` can start on a rank that is free from `clock` on, if that is known.
    fn start(&self, pass: usize, clock: f64, ends: &[f64]) -> Option<f64> {
        let mut start = clock;
        for edge in &self.dependencies[pass] {
            let ready = ends[edge.pass] + edge.delay;
            if ready.is_nan() {
                return None;
            }
            start = start.max(ready);
        }
        Some(start)
    }

    /// Returns the positions of the passes that determine the total time, from the last one on.
    fn critical_path(&self, lists: &[Vec<usize>], times: &EndTimes) -> Vec<Position> {
        let mut positions = vec![0; self.passes.len()];
        for list in lists {
            for (index, &pass) in list.iter().enumerate() {
                positions[pass] = index;
            }
        }
        let ends = &times.ends;
        let ready = |edge: &Edge| ends[edge.pass] + edge.delay;
        let mut path = Vec::new();
        let mut next = (0..self.passes.len()).max_by(|&a, &b| ends[a].total_cmp(&ends[b]));
        while let Some(pass) = next {
            let rank = self.passes[pass].rank;
            let index = positions[pass];
            path.push(Position { rank, index });
            let before = index.checked_sub(1).map(|before| Edge {
                pass: lists[rank][before],
                delay: 0.0,
            });
            let edges = self.dependencies[pass].iter().copied().chain(before);
            let latest = edges.max_by(|a, b| ready(a).total_cmp(&ready(b)));
            next = latest.map(|edge| edge.pass);
        }
        path
    }

    /// Returns `list` with the pass at `from` moved to `to`.
    ///
    /// None if it would overtake another pass of its kind and chunk.
    fn moved(&self, list: &[usize], from: usize, to: usize) -> Option<Vec<usize>> {
        let moving = self.passes[list[from]].pass;
        let overtaken = if to < from {
            &list[to..from]
        } else {
            &list[from + 1..=to]
        };
        let gives_gradient = moving.kind.gives_input_gradient();
        let must_stay_in_order = |&index: &usize| {
            let other = self.passes[index].pass;
            let both_give_gradients = gives_gradient && other.kind.gives_input_gradient();
            other.chunk == moving.chunk && (other.kind == moving.kind || both_give_gradients)
        };
        if overtaken.iter().any(must_stay_in_order) {
            return None;
        }
        let mut list = list.to_vec();
        let pass = list.remove(from);
        list.insert(to, pass);
        Some(list)
    }

    /// Returns the most that a rank with the passes of `list` holds.
    fn peak_held(&self, list: &[usize]) -> PeakHeld {
        let mut held = PeakHeld::default();
        let mut peak = PeakHeld::default();
        for &pass in list {
            let PeakHeld {
                until_weights,
                until_inputs,
                logits,
            } = &mut held;
            match self.passes[pass].pass.kind {
                PassKind::Forward => {
                    *until_weights += 1;
                    *until_inputs += 1;
                }
                PassKind::Backward => {
                    *until_weights = until_weights.saturating_sub(1);
                    *until_inputs = until_inputs.saturating_sub(1);
                }
                PassKind::BackwardInput => *until_inputs = until_inputs.saturating_sub(1),
                PassKind::BackwardWeight => *until_weights = until_weights.saturating_sub(1),
                PassKind::Logits => *logits += 1,
                PassKind::LogitsBackward => *logits = logits.saturating_sub(1),
                PassKind::Normalize | PassKind::Embed | PassKind::EmbedBackward => {}
            }
            peak = peak.max(held);
        }
        peak
    }
}
