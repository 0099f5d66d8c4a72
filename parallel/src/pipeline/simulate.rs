//! Estimates the time and the memory of a schedule from the times of its passes.

use super::communication::{Dependency, receives_only};
use super::{Collective, Message, Order, Pass, PassKind, Schedule, Step, Vocabulary};
use std::collections::{HashMap, HashSet};

/// Times of passes and of communication, in any one unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Time of F, for each stage.
    pub forward: Vec<f64>,
    /// Time of B, for each stage.
    pub backward_input: Vec<f64>,
    /// Time of W, for each stage; BW takes the time of B and W.
    pub backward_weight: Vec<f64>,
    /// Times of the passes of vocabulary parallelism, for each rank.
    pub vocabulary: Vec<VocabularyCosts>,
    /// From the end of a pass to the arrival of its tensor at a neighbor.
    pub send: f64,
    /// From the last rank's entry to the end of a collective.
    pub collective: f64,
}

/// Times of one rank's passes of vocabulary parallelism.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct VocabularyCosts {
    pub logits: f64,
    pub normalize: f64,
    pub logits_backward: f64,
    pub embed: f64,
    pub embed_backward: f64,
}

impl VocabularyCosts {
    /// Estimates the costs of a rank whose part of the logits takes the time `logits`.
    ///
    /// The output layer has three GEMMs of that size: the logits in S, the weight gradient in T,
    /// and the input gradient in T, or in S with `vocab-2`.
    pub fn from_logits(vocabulary: Vocabulary, logits: f64) -> VocabularyCosts {
        let input_gradient_in_t = vocabulary.gradient_after_t();
        let gemms_in_s = if input_gradient_in_t { 1.0 } else { 2.0 };
        let gemms_in_t = if input_gradient_in_t { 2.0 } else { 1.0 };
        VocabularyCosts {
            logits: gemms_in_s * logits,
            logits_backward: gemms_in_t * logits,
            ..VocabularyCosts::default()
        }
    }
}

impl Costs {
    /// Returns equal times for all stages, without time for communication.
    pub fn uniform(
        stages: usize,
        forward: f64,
        backward_input: f64,
        backward_weight: f64,
    ) -> Costs {
        Costs {
            forward: vec![forward; stages],
            backward_input: vec![backward_input; stages],
            backward_weight: vec![backward_weight; stages],
            vocabulary: vec![VocabularyCosts::default(); stages],
            send: 0.0,
            collective: 0.0,
        }
    }

    /// Returns the time of `pass` on `rank`.
    pub fn pass_time(&self, order: &Order, rank: usize, pass: Pass) -> f64 {
        let stage = order.stage(rank, pass.chunk);
        let vocabulary = || self.vocabulary[rank];
        match pass.kind {
            PassKind::Forward => self.forward[stage],
            PassKind::Backward => self.backward_input[stage] + self.backward_weight[stage],
            PassKind::BackwardInput => self.backward_input[stage],
            PassKind::BackwardWeight => self.backward_weight[stage],
            PassKind::Logits => vocabulary().logits,
            PassKind::Normalize => vocabulary().normalize,
            PassKind::LogitsBackward => vocabulary().logits_backward,
            PassKind::Embed => vocabulary().embed,
            PassKind::EmbedBackward => vocabulary().embed_backward,
        }
    }
}

/// The time span of one pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    pub pass: Pass,
    pub start: f64,
    pub end: f64,
}

/// The course of a simulated step.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// The spans of each rank, in order.
    pub ranks: Vec<Vec<Span>>,
    /// Time from the first pass to the last.
    pub total: f64,
    /// For each rank, the most microbatches whose activations it held at once.
    ///
    /// A chunk's activations count from the start of F to the end of BW or W, as one microbatch
    /// divided by the number of chunks.
    pub peak_microbatches: Vec<f64>,
    /// As `peak_microbatches`, but until the end of BW or B: the memory of a rank if W needs
    /// little.
    pub peak_microbatches_until_b: Vec<f64>,
}

impl Timeline {
    /// Returns the longest idle time of a rank between its first and its last pass.
    ///
    /// This is the bubble as defined in arXiv 2401.10241, section 5.3.
    pub fn bubble(&self) -> f64 {
        let idle = |spans: &Vec<Span>| {
            let first = spans.first()?;
            let last = spans.last()?;
            Some(last.end - first.start - busy(spans))
        };
        self.ranks.iter().filter_map(idle).fold(0.0, f64::max)
    }

    /// Returns the time in which `rank` computes.
    pub fn busy(&self, rank: usize) -> f64 {
        busy(&self.ranks[rank])
    }
}

fn busy(spans: &[Span]) -> f64 {
    spans.iter().map(|span| span.end - span.start).sum()
}

/// Simulates a schedule that [`super::check::check`] accepts.
///
/// Each rank runs its list. A pass starts when everything it depends on has arrived.
///
/// # Panics
/// If the schedule deadlocks, or `costs` are for another number of stages.
pub fn simulate(schedule: &Schedule, costs: &Costs) -> Timeline {
    let order = &schedule.order;
    let ranks = schedule.ranks.len();
    let mut run = Simulation {
        schedule,
        costs,
        at: vec![0; ranks],
        clock: vec![0.0; ranks],
        spans: vec![Vec::new(); ranks],
        arrival: HashMap::new(),
        entered: HashMap::new(),
    };
    let mut moved = true;
    while std::mem::take(&mut moved) {
        for rank in 0..ranks {
            while run.advance(rank) {
                moved = true;
            }
        }
    }
    let is_finished = |rank: usize| run.at[rank] == schedule.ranks[rank].len();
    assert!(
        (0..ranks).all(is_finished),
        "the schedule deadlocks: check it before it is simulated"
    );
    let chunks = order.chunks as f64;
    let peaks = |until: HeldUntil| {
        let spans = run.spans.iter();
        spans
            .map(|spans| peak_held(spans, until) as f64 / chunks)
            .collect()
    };
    Timeline {
        total: run.clock.iter().copied().fold(0.0, f64::max),
        peak_microbatches: peaks(HeldUntil::WeightGradient),
        peak_microbatches_until_b: peaks(HeldUntil::InputGradient),
        ranks: run.spans,
    }
}

/// The time at which a rank entered a collective.
struct Entry {
    rank: usize,
    time: f64,
}

struct Simulation<'a> {
    schedule: &'a Schedule,
    costs: &'a Costs,
    /// The next step of each rank.
    at: Vec<usize>,
    clock: Vec<f64>,
    spans: Vec<Vec<Span>>,
    arrival: HashMap<Message, f64>,
    entered: HashMap<Collective, Vec<Entry>>,
}

impl Simulation<'_> {
    /// Runs the next step of a rank, and returns false if it cannot start yet.
    fn advance(&mut self, rank: usize) -> bool {
        let Some(step) = self.schedule.ranks[rank].get(self.at[rank]) else {
            return false;
        };
        match *step {
            Step::Compute(pass) => {
                let Some(start) = self.start_time(rank, pass) else {
                    return false;
                };
                let time = self.costs.pass_time(&self.schedule.order, rank, pass);
                let end = start + time;
                self.spans[rank].push(Span { pass, start, end });
                self.clock[rank] = end;
            }
            Step::Send(message, _) => {
                let arrival = self.clock[rank] + self.costs.send;
                self.arrival.insert(message, arrival);
            }
            Step::EnterCollective(collective) => {
                let time = self.clock[rank];
                let entries = self.entered.entry(collective).or_default();
                entries.push(Entry { rank, time });
            }
            Step::Receive(..) | Step::WaitSend(_) => {}
        }
        self.at[rank] += 1;
        true
    }

    /// Returns the time at which `pass` can start, if that is known.
    fn start_time(&self, rank: usize, pass: Pass) -> Option<f64> {
        let mut start = self.clock[rank];
        for dependency in self.schedule.order.dependencies(rank, pass) {
            let ready = match dependency {
                Dependency::Message(message) => *self.arrival.get(&message)?,
                Dependency::Collective(collective) => self.completion(collective)?,
                // Earlier on this rank.
                Dependency::Pass(_) => 0.0,
            };
            start = start.max(ready);
        }
        Some(start)
    }

    /// Returns the time at which a collective is complete, if all its contributors have entered.
    fn completion(&self, collective: Collective) -> Option<f64> {
        let order = &self.schedule.order;
        let entries = self.entered.get(&collective)?;
        let mut last = 0.0f64;
        for rank in 0..order.ranks.len() {
            if !receives_only(order, rank, collective.kind) {
                let entry = entries.iter().find(|entry| entry.rank == rank)?;
                last = last.max(entry.time);
            }
        }
        Some(last + self.costs.collective)
    }
}

/// The pass that frees a chunk's activations, if its backward is split; else BW does.
#[derive(Clone, Copy, PartialEq)]
enum HeldUntil {
    InputGradient,
    WeightGradient,
}

/// Returns the most activations held at once, in chunks.
fn peak_held(spans: &[Span], until: HeldUntil) -> usize {
    let id = |pass: Pass| (pass.chunk, pass.microbatch);
    let split: HashSet<(usize, usize)> = spans
        .iter()
        .filter(|span| span.pass.kind == PassKind::BackwardInput)
        .map(|span| id(span.pass))
        .collect();
    let mut held = 0usize;
    let mut peak = 0;
    for Span { pass, .. } in spans {
        let is_freed = match pass.kind {
            PassKind::Backward => true,
            PassKind::BackwardInput => until == HeldUntil::InputGradient,
            PassKind::BackwardWeight => {
                until == HeldUntil::WeightGradient && split.contains(&id(*pass))
            }
            _ => false,
        };
        held -= usize::from(is_freed);
        held += usize::from(pass.kind == PassKind::Forward);
        peak = peak.max(held);
    }
    peak
}
