//! How long a schedule takes, and what each rank holds, from the times of its passes.

use super::communication::{Dependency, receives_only};
use super::{Collective, Message, Order, Pass, PassKind, Schedule, Step, Vocabulary};
use std::collections::HashMap;

/// Times of passes and of communication, in any one unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// F of each stage.
    pub forward: Vec<f64>,
    /// B of each stage: the input's gradient alone.
    pub backward_input: Vec<f64>,
    /// W of each stage; a BW takes both.
    pub backward_weight: Vec<f64>,
    /// S, T, IF and IB of each rank, where the vocabulary is shared out.
    pub vocabulary: Vec<VocabularyCosts>,
    /// From the end of a pass to the arrival of its tensor at a neighbour.
    pub send: f64,
    /// From the last rank's entry to the end of a collective.
    pub collective: f64,
}

/// Times of one rank's passes of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct VocabularyCosts {
    /// S.
    pub logits: f64,
    /// N.
    pub normalize: f64,
    /// T.
    pub logits_backward: f64,
    /// IF.
    pub embed: f64,
    /// IB.
    pub embed_backward: f64,
}

impl VocabularyCosts {
    /// Those by `vocabulary`, of a rank whose part of the logits takes `logits` to compute: three products of the same size, of which S
    /// has that one, and T those for both gradients, unless S has the input's.
    pub fn of(vocabulary: Vocabulary, logits: f64) -> VocabularyCosts {
        let (of_s, of_t) = if vocabulary.gradient_after_t() {
            (1.0, 2.0)
        } else {
            (2.0, 1.0)
        };
        VocabularyCosts {
            logits: of_s * logits,
            logits_backward: of_t * logits,
            ..VocabularyCosts::default()
        }
    }
}

impl Costs {
    /// The same F, B and W for every stage, nothing for communication.
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

    /// The time of `pass` on `rank`.
    pub fn of(&self, order: &Order, rank: usize, pass: Pass) -> f64 {
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

/// One pass as it ran.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// The pass.
    pub pass: Pass,
    /// When it began.
    pub start: f64,
    /// When it ended.
    pub end: f64,
}

/// A simulated step.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// What each rank did, in order.
    pub ranks: Vec<Vec<Span>>,
    /// From the first pass to the last.
    pub total: f64,
    /// The most chunk activations each rank held at once, in whole microbatches of the rank (chunks divided by
    /// their number): from the start of F to the end of its BW or W.
    pub peak_microbatches: Vec<f64>,
    /// The same from the start of F to the end of its BW or B: what a rank holds where W needs little.
    pub peak_microbatches_until_b: Vec<f64>,
}

impl Timeline {
    /// The longest time that a rank does nothing between its first pass and its last, as arXiv 2401.10241, section 5.3,
    /// counts it.
    pub fn bubble(&self) -> f64 {
        let idle = |spans: &Vec<Span>| {
            let (first, last) = spans.first().zip(spans.last())?;
            Some(
                last.end
                    - first.start
                    - spans.iter().map(|span| span.end - span.start).sum::<f64>(),
            )
        };
        self.ranks.iter().filter_map(idle).fold(0.0, f64::max)
    }

    /// Time in which `rank` computes.
    pub fn busy(&self, rank: usize) -> f64 {
        self.ranks[rank]
            .iter()
            .map(|span| span.end - span.start)
            .sum()
    }
}

/// Runs a schedule that [`super::check::check`] accepts: each rank goes through its list, and a pass starts when what
/// it needs has arrived.
///
/// # Panics
/// When the schedule stops, or `costs` are not for its number of stages.
pub fn simulate(schedule: &Schedule, costs: &Costs) -> Timeline {
    let order = &schedule.order;
    let ranks = schedule.ranks.len();
    let mut at = vec![0; ranks];
    let mut clock = vec![0.0f64; ranks];
    let mut spans: Vec<Vec<Span>> = vec![Vec::new(); ranks];
    let mut arrival: HashMap<Message, f64> = HashMap::new();
    let mut entered: HashMap<Collective, Vec<(usize, f64)>> = HashMap::new();
    let mut moved = true;
    while moved {
        moved = false;
        for (rank, steps) in schedule.ranks.iter().enumerate() {
            while let Some(step) = steps.get(at[rank]) {
                match step {
                    Step::Compute(pass) => {
                        let ready = order.dependencies(rank, *pass).iter().try_fold(
                            clock[rank],
                            |ready, need| {
                                let at = match need {
                                    Dependency::Message(message) => *arrival.get(message)?,
                                    Dependency::Collective(c) => {
                                        completion(order, *c, entered.get(c)?, costs.collective)?
                                    }
                                    Dependency::Pass(_) => 0.0, // earlier on this rank
                                };
                                Some(f64::max(ready, at))
                            },
                        );
                        let Some(start) = ready else { break };
                        let end = start + costs.of(order, rank, *pass);
                        spans[rank].push(Span {
                            pass: *pass,
                            start,
                            end,
                        });
                        clock[rank] = end;
                    }
                    Step::Send(message, _) => {
                        arrival.insert(*message, clock[rank] + costs.send);
                    }
                    Step::EnterCollective(collective) => entered
                        .entry(*collective)
                        .or_default()
                        .push((rank, clock[rank])),
                    Step::Receive(..) | Step::WaitSend(_) => {}
                }
                at[rank] += 1;
                moved = true;
            }
        }
    }
    assert!(
        (0..ranks).all(|rank| at[rank] == schedule.ranks[rank].len()),
        "a schedule that stops cannot be simulated: check it first"
    );
    let total = clock.iter().copied().fold(0.0, f64::max);
    let peak =
        |rank: usize, weights: bool| peak_held(&spans[rank], weights) as f64 / order.chunks as f64;
    Timeline {
        total,
        peak_microbatches: (0..ranks).map(|rank| peak(rank, true)).collect(),
        peak_microbatches_until_b: (0..ranks).map(|rank| peak(rank, false)).collect(),
        ranks: spans,
    }
}

/// When a collective is complete, if all whose part it needs have entered it.
fn completion(
    order: &Order,
    collective: Collective,
    entered: &[(usize, f64)],
    cost: f64,
) -> Option<f64> {
    let contributors =
        (0..order.ranks.len()).filter(|&rank| !receives_only(order, rank, collective.kind));
    let mut last = 0.0f64;
    for contributor in contributors {
        last = last.max(entered.iter().find(|(rank, _)| *rank == contributor)?.1);
    }
    Some(last + cost)
}

/// The most forwards whose backward has not ended.
fn peak_held(spans: &[Span], until_weights: bool) -> usize {
    let split = spans
        .iter()
        .any(|span| span.pass.kind == PassKind::BackwardWeight);
    let mut held = 0usize;
    let mut peak = 0;
    let split_off: std::collections::HashSet<(usize, usize)> = spans
        .iter()
        .filter(|span| split && span.pass.kind == PassKind::BackwardInput)
        .map(|span| (span.pass.chunk, span.pass.microbatch))
        .collect();
    for span in spans {
        let id = (span.pass.chunk, span.pass.microbatch);
        match span.pass.kind {
            PassKind::Forward => {
                held += 1;
                peak = peak.max(held);
            }
            PassKind::Backward => held -= 1,
            PassKind::BackwardInput if !until_weights => held -= 1,
            PassKind::BackwardWeight if until_weights && split_off.contains(&id) => held -= 1,
            _ => {}
        }
    }
    peak
}
