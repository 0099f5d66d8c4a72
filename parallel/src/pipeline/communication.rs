//! Inserts the communication between passes into an order.
//!
//! A tensor is sent right after the pass that produces it. A receive, or a broadcast that a rank
//! only receives, is started one computation before the pass that needs it, so that they overlap.
//! Embedding passes take next to no time and do not count as a computation.

use super::{
    Collective, CollectiveKind, Message, Order, Pass, PassKind, Payload, Schedule, Step, Vocabulary,
};
use std::collections::HashMap;

/// Something that a pass waits for on its own rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dependency {
    /// A tensor from another rank.
    Message(Message),
    Collective(Collective),
    /// Another pass of the same rank.
    Pass(Pass),
}

impl Order {
    /// Returns what `pass` on rank `rank` waits for.
    pub fn dependencies(&self, rank: usize, pass: Pass) -> Vec<Dependency> {
        let stage = self.stage(rank, pass.chunk);
        let microbatch = pass.microbatch;
        let collective = |kind| vec![Dependency::Collective(Collective { kind, microbatch })];
        match pass.kind {
            PassKind::Forward if stage > 0 => {
                let input = Message {
                    payload: Payload::Activation,
                    stage,
                    microbatch,
                };
                vec![self.message_or_pass(rank, input)]
            }
            PassKind::Forward if self.vocabulary.is_some() => collective(CollectiveKind::Embedding),
            PassKind::Forward => vec![],
            PassKind::Backward | PassKind::BackwardInput => self.backward_dependencies(rank, pass),
            PassKind::BackwardWeight => vec![Dependency::Pass(Pass {
                kind: PassKind::BackwardInput,
                ..pass
            })],
            PassKind::Logits => collective(CollectiveKind::Hidden),
            PassKind::Normalize => collective(CollectiveKind::Maximum),
            PassKind::LogitsBackward => collective(CollectiveKind::Statistics),
            PassKind::Embed => vec![],
            PassKind::EmbedBackward => collective(CollectiveKind::EmbeddingGradient),
        }
    }

    /// Returns the forward of the same stage and the source of the output's gradient.
    fn backward_dependencies(&self, rank: usize, pass: Pass) -> Vec<Dependency> {
        let stage = self.stage(rank, pass.chunk);
        let microbatch = pass.microbatch;
        let forward = Pass {
            kind: PassKind::Forward,
            ..pass
        };
        let mut dependencies = vec![Dependency::Pass(forward)];
        if stage + 1 < self.stages() {
            let gradient = Message {
                payload: Payload::Gradient,
                stage,
                microbatch,
            };
            dependencies.push(self.message_or_pass(rank, gradient));
        } else if let Some(vocabulary) = self.vocabulary {
            let kind = if vocabulary.gradient_after_t() {
                CollectiveKind::HiddenGradient
            } else {
                CollectiveKind::Statistics
            };
            dependencies.push(Dependency::Collective(Collective { kind, microbatch }));
        }
        dependencies
    }

    /// Returns `message` to rank `rank`, or the pass that produces it if that is on the same rank.
    fn message_or_pass(&self, rank: usize, message: Message) -> Dependency {
        let (peer, producer) = self.producer(message);
        if peer == rank {
            Dependency::Pass(producer)
        } else {
            Dependency::Message(message)
        }
    }

    /// Returns the tensor that `pass` on rank `rank` produces for another rank, and that rank.
    pub fn sends(&self, rank: usize, pass: Pass) -> Option<(Message, usize)> {
        let stage = self.stage(rank, pass.chunk);
        let (payload, neighbor) = match pass.kind {
            PassKind::Forward if stage + 1 < self.stages() => (Payload::Activation, stage + 1),
            kind if kind.gives_input_gradient() && stage > 0 => (Payload::Gradient, stage - 1),
            _ => return None,
        };
        let message = Message {
            payload,
            stage: neighbor,
            microbatch: pass.microbatch,
        };
        let (peer, _) = self.rank_and_chunk(neighbor);
        (peer != rank).then_some((message, peer))
    }

    /// Returns the rank and the pass that produce `message`.
    ///
    /// A backward is named BW, even if it is split into B and W.
    pub(super) fn producer(&self, message: Message) -> (usize, Pass) {
        let (stage, kind) = match message.payload {
            Payload::Activation => (message.stage - 1, PassKind::Forward),
            Payload::Gradient => (message.stage + 1, PassKind::Backward),
        };
        let (rank, chunk) = self.rank_and_chunk(stage);
        (rank, Pass::new(kind, chunk, message.microbatch))
    }

    /// Returns the collective to which `pass` on rank `rank` contributes.
    ///
    /// The rank enters it right after the pass.
    pub fn contributes_to(&self, rank: usize, pass: Pass) -> Option<Collective> {
        let vocabulary = self.vocabulary?;
        let stage = self.stage(rank, pass.chunk);
        let kind = match pass.kind {
            PassKind::Forward if stage + 1 == self.stages() => CollectiveKind::Hidden,
            PassKind::Logits if vocabulary == Vocabulary::Naive => CollectiveKind::Maximum,
            PassKind::Logits | PassKind::Normalize => CollectiveKind::Statistics,
            PassKind::LogitsBackward if vocabulary.gradient_after_t() => {
                CollectiveKind::HiddenGradient
            }
            PassKind::Embed => CollectiveKind::Embedding,
            kind if kind.gives_input_gradient() && stage == 0 => CollectiveKind::EmbeddingGradient,
            _ => return None,
        };
        Some(Collective {
            kind,
            microbatch: pass.microbatch,
        })
    }
}

/// Returns the order with its sends, receives and collectives.
pub fn with_communication(order: Order) -> Schedule {
    let ranks = (0..order.ranks.len())
        .map(|rank| rank_steps(&order, rank))
        .collect();
    insert_send_waits(Schedule { order, ranks })
}

/// Inserts the waits for sends, at points where the messages are certain to have arrived.
///
/// Such a point is a pass that can only start after the receiver has used the message. A rank that
/// waits there never waits for a rank that waits for it.
fn insert_send_waits(mut schedule: Schedule) -> Schedule {
    let mut insertion = WaitInsertion::new(&schedule);
    while insertion.advance() {}
    schedule.ranks = insertion.finish();
    schedule
}

/// A position in a rank's steps.
#[derive(Clone, Copy)]
struct StepPosition {
    rank: usize,
    index: usize,
}

/// A run of the schedule in which ranks learn, by messages, which steps of others are over.
struct WaitInsertion<'a> {
    schedule: &'a Schedule,
    /// The pass that uses each message.
    used_at: HashMap<Message, StepPosition>,
    /// For each sent message, the sender's `known`.
    with_message: HashMap<Message, Vec<usize>>,
    ranks: Vec<RankInsertion>,
}

/// The progress of one rank.
struct RankInsertion {
    /// Number of its steps that are over.
    at: usize,
    /// Number of steps of each rank that this one knows to be over.
    known: Vec<usize>,
    /// Messages that it may not know to have arrived.
    outstanding: Vec<Message>,
    /// Its steps so far, with the waits.
    steps: Vec<Step>,
}

impl WaitInsertion<'_> {
    fn new(schedule: &Schedule) -> WaitInsertion<'_> {
        let mut used_at = HashMap::new();
        for (rank, steps) in schedule.ranks.iter().enumerate() {
            for (index, step) in steps.iter().enumerate() {
                let Step::Compute(pass) = step else { continue };
                for dependency in schedule.order.dependencies(rank, *pass) {
                    if let Dependency::Message(message) = dependency {
                        used_at.insert(message, StepPosition { rank, index });
                    }
                }
            }
        }
        let ranks = schedule.ranks.len();
        let rank = || RankInsertion {
            at: 0,
            known: vec![0; ranks],
            outstanding: Vec::new(),
            steps: Vec::new(),
        };
        WaitInsertion {
            schedule,
            used_at,
            with_message: HashMap::new(),
            ranks: (0..ranks).map(|_| rank()).collect(),
        }
    }

    /// Runs every rank as far as it can go, and returns true if any made progress.
    fn advance(&mut self) -> bool {
        let mut moved = false;
        for rank in 0..self.ranks.len() {
            while self.advance_rank(rank) {
                moved = true;
            }
        }
        moved
    }

    /// Runs the next step of a rank, and returns false if it cannot start yet.
    fn advance_rank(&mut self, rank: usize) -> bool {
        let schedule = self.schedule;
        let state = &mut self.ranks[rank];
        let Some(&step) = schedule.ranks[rank].get(state.at) else {
            return false;
        };
        if let Step::Compute(pass) = step {
            let dependencies = schedule.order.dependencies(rank, pass);
            let received = dependencies
                .iter()
                .filter_map(|dependency| match dependency {
                    Dependency::Message(message) => Some(self.with_message.get(message)),
                    Dependency::Collective(_) | Dependency::Pass(_) => None,
                });
            let Some(received) = received.collect::<Option<Vec<_>>>() else {
                return false;
            };
            for sender_knew in received {
                for (known, &theirs) in state.known.iter_mut().zip(sender_knew) {
                    *known = (*known).max(theirs);
                }
            }
        }
        state.at += 1;
        state.known[rank] = state.at;
        state.steps.push(step);
        match step {
            Step::Send(message, _) => {
                self.with_message.insert(message, state.known.clone());
                state.outstanding.push(message);
            }
            Step::Compute(_) => state.wait_for_arrived(&self.used_at),
            _ => {}
        }
        true
    }

    /// Returns the steps of each rank.
    fn finish(self) -> Vec<Vec<Step>> {
        let mut lists = Vec::new();
        for (state, steps) in self.ranks.into_iter().zip(&self.schedule.ranks) {
            let mut list = state.steps;
            // A deadlocked schedule stays whole, so that the check can explain it.
            list.extend(&steps[state.at..]);
            list.extend(state.outstanding.into_iter().map(Step::WaitSend));
            lists.push(list);
        }
        lists
    }
}

impl RankInsertion {
    /// Inserts the waits for messages that have arrived for certain.
    fn wait_for_arrived(&mut self, used_at: &HashMap<Message, StepPosition>) {
        let has_arrived = |message: &Message| {
            let used = used_at.get(message);
            used.is_some_and(|used| self.known[used.rank] > used.index)
        };
        let (arrived, outstanding): (Vec<Message>, Vec<Message>) = self
            .outstanding
            .iter()
            .partition(|message| has_arrived(message));
        self.outstanding = outstanding;
        self.steps.extend(arrived.into_iter().map(Step::WaitSend));
    }
}

/// Returns the steps of a rank without waits for sends.
fn rank_steps(order: &Order, rank: usize) -> Vec<Step> {
    let passes = &order.ranks[rank];
    let mut steps = Vec::new();
    let mut started = 0;
    for (index, &pass) in passes.iter().enumerate() {
        // While this pass computes, the communication of the next computation and of the lookups
        // before it is in progress.
        let next = passes[index + 1..]
            .iter()
            .position(|&pass| !is_lookup(pass));
        let until = next.map_or(passes.len(), |next| index + 2 + next);
        for &coming in &passes[started..until] {
            steps.extend(steps_to_start(order, rank, coming));
        }
        started = until;
        steps.push(Step::Compute(pass));
        if let Some((message, peer)) = order.sends(rank, pass) {
            steps.push(Step::Send(message, peer));
        }
        let collective = order.contributes_to(rank, pass);
        steps.extend(collective.map(Step::EnterCollective));
    }
    steps
}

/// True if `pass` takes next to no time.
fn is_lookup(pass: Pass) -> bool {
    matches!(pass.kind, PassKind::Embed | PassKind::EmbedBackward)
}

/// Returns the steps to start before `pass`: receives, and collectives that the rank only receives.
fn steps_to_start(order: &Order, rank: usize, pass: Pass) -> Vec<Step> {
    let mut steps = Vec::new();
    for dependency in order.dependencies(rank, pass) {
        match dependency {
            Dependency::Message(message) => {
                let (sender, _) = order.producer(message);
                steps.push(Step::Receive(message, sender));
            }
            Dependency::Collective(collective) if receives_only(order, rank, collective.kind) => {
                steps.push(Step::EnterCollective(collective));
            }
            Dependency::Collective(_) | Dependency::Pass(_) => {}
        }
    }
    steps
}

/// True if `rank` contributes nothing to collectives of `kind`: a broadcast from another rank.
pub(super) fn receives_only(order: &Order, rank: usize, kind: CollectiveKind) -> bool {
    let root_stage = match kind {
        CollectiveKind::Hidden => order.stages() - 1,
        CollectiveKind::EmbeddingGradient => 0,
        CollectiveKind::Maximum | CollectiveKind::Statistics => return false,
        CollectiveKind::HiddenGradient | CollectiveKind::Embedding => return false,
    };
    let (root, _) = order.rank_and_chunk(root_stage);
    rank != root
}
