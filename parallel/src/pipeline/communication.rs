//! Inserts into an order what its passes exchange.
//!
//! A tensor is sent right after the pass that makes it; a receive, and a collective, is started one pass before the
//! one that needs it, so that it runs beside a computation: lookups in the embedding and their gradients are none.

use super::{
    Collective, CollectiveKind, Message, Order, Pass, PassKind, Payload, Schedule, Step, Vocabulary,
};
use std::collections::HashMap;

/// What a pass waits for on its own rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dependency {
    /// A tensor from another rank.
    Message(Message),
    /// A collective.
    Collective(Collective),
    /// Another pass of the same rank.
    Pass(Pass),
}

impl Order {
    /// What `pass` on rank `rank` waits for.
    pub fn dependencies(&self, rank: usize, pass: Pass) -> Vec<Dependency> {
        use PassKind::*;
        let Pass {
            kind,
            chunk,
            microbatch,
        } = pass;
        let collective = |kind| Dependency::Collective(Collective { kind, microbatch });
        let stage = self.stage(rank, chunk);
        let last = self.stages() - 1;
        match kind {
            Forward if stage == 0 && self.vocabulary.is_some() => {
                vec![collective(CollectiveKind::Embedding)]
            }
            Forward if stage == 0 => vec![],
            Forward => vec![self.neighbour_dependency(
                rank,
                stage - 1,
                Forward,
                Payload::Activation,
                stage,
                microbatch,
            )],
            Backward | BackwardInput if stage == last => {
                let mut needs = vec![Dependency::Pass(Pass::new(Forward, chunk, microbatch))];
                needs.extend(self.vocabulary.map(|algorithm| {
                    collective(if algorithm.gradient_after_t() {
                        CollectiveKind::HiddenGradient
                    } else {
                        CollectiveKind::Statistics
                    })
                }));
                needs
            }
            Backward | BackwardInput => {
                let from = self.neighbour_dependency(
                    rank,
                    stage + 1,
                    Backward,
                    Payload::Gradient,
                    stage,
                    microbatch,
                );
                vec![
                    Dependency::Pass(Pass::new(Forward, chunk, microbatch)),
                    from,
                ]
            }
            BackwardWeight => vec![Dependency::Pass(Pass::new(
                BackwardInput,
                chunk,
                microbatch,
            ))],
            Logits => vec![collective(CollectiveKind::Hidden)],
            Normalize => vec![collective(CollectiveKind::Maximum)],
            LogitsBackward => vec![collective(CollectiveKind::Statistics)],
            Embed => vec![],
            EmbedBackward => vec![collective(CollectiveKind::EmbeddingGradient)],
        }
    }

    /// The neighbour's tensor: a message, or a pass where the neighbour is this rank.
    fn neighbour_dependency(
        &self,
        rank: usize,
        neighbour: usize,
        producer: PassKind,
        payload: Payload,
        stage: usize,
        microbatch: usize,
    ) -> Dependency {
        let (peer, chunk) = self.rank_and_chunk(neighbour);
        if peer == rank {
            Dependency::Pass(Pass::new(producer, chunk, microbatch))
        } else {
            Dependency::Message(Message {
                payload,
                stage,
                microbatch,
            })
        }
    }

    /// The tensor that `pass` on rank `rank` makes for another rank, and that rank.
    pub fn sends(&self, rank: usize, pass: Pass) -> Option<(Message, usize)> {
        let stage = self.stage(rank, pass.chunk);
        let (payload, neighbour) = match pass.kind {
            PassKind::Forward if stage + 1 < self.stages() => (Payload::Activation, stage + 1),
            kind if kind.gives_input_gradient() && stage > 0 => (Payload::Gradient, stage - 1),
            _ => return None,
        };
        let (peer, _) = self.rank_and_chunk(neighbour);
        (peer != rank).then_some((
            Message {
                payload,
                stage: neighbour,
                microbatch: pass.microbatch,
            },
            peer,
        ))
    }

    /// The rank that makes `message`, and the pass that does, a backward whether or not its weights' part is split off.
    pub(super) fn producer(&self, message: Message) -> (usize, Pass) {
        let (stage, kind) = match message.payload {
            Payload::Activation => (message.stage - 1, PassKind::Forward),
            Payload::Gradient => (message.stage + 1, PassKind::Backward),
        };
        let (rank, chunk) = self.rank_and_chunk(stage);
        (rank, Pass::new(kind, chunk, message.microbatch))
    }

    /// The collective that `pass` on rank `rank` gives something to: the rank enters it right after the pass.
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

/// The order with its sends, receives and collectives.
pub fn with_communication(order: Order) -> Schedule {
    let ranks = order
        .ranks
        .iter()
        .enumerate()
        .map(|(rank, passes)| rank_steps(&order, rank, passes))
        .collect();
    insert_send_waits(Schedule { order, ranks })
}

/// Sent tensors are kept until it is certain that they have arrived: until a pass that can only have started after the
/// receiver used them. Waiting there never waits for a rank that waits for this one.
fn insert_send_waits(mut schedule: Schedule) -> Schedule {
    let ranks = schedule.ranks.len();
    // Where each message is used: rank, and number of the step in its list.
    let mut used_at: HashMap<Message, (usize, usize)> = HashMap::new();
    for (rank, steps) in schedule.ranks.iter().enumerate() {
        for (index, step) in steps.iter().enumerate() {
            let Step::Compute(pass) = step else { continue };
            for need in schedule.order.dependencies(rank, *pass) {
                if let Dependency::Message(message) = need {
                    used_at.insert(message, (rank, index));
                }
            }
        }
    }
    // Steps of each rank that are certain to be over, as known to a rank at its current step and sent with messages.
    let mut known: Vec<Vec<usize>> = vec![vec![0; ranks]; ranks];
    let mut with_message: HashMap<Message, Vec<usize>> = HashMap::new();
    let mut outstanding: Vec<Vec<Message>> = vec![Vec::new(); ranks];
    let mut lists: Vec<Vec<Step>> = vec![Vec::new(); ranks];
    let mut at = vec![0; ranks];
    let mut moved = true;
    while std::mem::take(&mut moved) {
        for rank in 0..ranks {
            while let Some(&step) = schedule.ranks[rank].get(at[rank]) {
                if let Step::Compute(pass) = step {
                    let needs = schedule.order.dependencies(rank, pass);
                    let messages = needs.iter().filter_map(|need| match need {
                        Dependency::Message(message) => Some(with_message.get(message)),
                        Dependency::Collective(_) | Dependency::Pass(_) => None,
                    });
                    let Some(clocks) = messages.collect::<Option<Vec<_>>>() else {
                        break;
                    };
                    for clock in clocks {
                        known[rank]
                            .iter_mut()
                            .zip(clock)
                            .for_each(|(own, &theirs)| *own = (*own).max(theirs));
                    }
                }
                at[rank] += 1;
                moved = true;
                known[rank][rank] = at[rank];
                lists[rank].push(step);
                match step {
                    Step::Send(message, _) => {
                        with_message.insert(message, known[rank].clone());
                        outstanding[rank].push(message);
                    }
                    Step::Compute(_) => {
                        let arrived = |message: &Message| {
                            used_at
                                .get(message)
                                .is_some_and(|&(peer, index)| known[rank][peer] > index)
                        };
                        let (over, left) = outstanding[rank]
                            .iter()
                            .partition(|message| arrived(message));
                        outstanding[rank] = left;
                        let over: Vec<Message> = over;
                        lists[rank].extend(over.into_iter().map(Step::WaitSend));
                    }
                    _ => {}
                }
            }
        }
    }
    for rank in 0..ranks {
        // A schedule that stops is kept whole, for the check to say why.
        lists[rank].extend(&schedule.ranks[rank][at[rank]..]);
        lists[rank].extend(outstanding[rank].drain(..).map(Step::WaitSend));
    }
    schedule.ranks = lists;
    schedule
}

fn rank_steps(order: &Order, rank: usize, passes: &[Pass]) -> Vec<Step> {
    let mut list = Vec::new();
    let mut started = 0;
    for (index, &pass) in passes.iter().enumerate() {
        // Under way while this pass computes: what the next computation needs, and lookups before it.
        let next = passes[index + 1..]
            .iter()
            .position(|&pass| !is_lookup(pass));
        let until = next.map_or(passes.len(), |next| index + 2 + next);
        for &coming in &passes[started..until] {
            list.extend(steps_to_start(order, rank, coming));
        }
        started = until;
        list.push(Step::Compute(pass));
        list.extend(
            order
                .sends(rank, pass)
                .map(|(message, peer)| Step::Send(message, peer)),
        );
        list.extend(order.contributes_to(rank, pass).map(Step::EnterCollective));
    }
    list
}

/// Whether `pass` takes next to no time.
fn is_lookup(pass: Pass) -> bool {
    matches!(pass.kind, PassKind::Embed | PassKind::EmbedBackward)
}

/// What has to be started for `pass`: receives, and collectives that this rank gives nothing to.
fn steps_to_start(order: &Order, rank: usize, pass: Pass) -> Vec<Step> {
    let start = |need| match need {
        Dependency::Message(message) => Some(Step::Receive(message, order.producer(message).0)),
        Dependency::Collective(collective) if receives_only(order, rank, collective.kind) => {
            Some(Step::EnterCollective(collective))
        }
        Dependency::Collective(_) | Dependency::Pass(_) => None,
    };
    order
        .dependencies(rank, pass)
        .into_iter()
        .filter_map(start)
        .collect()
}

/// Whether `rank` enters collectives of this kind only to take something from them: broadcasts, on ranks other than
/// their root.
pub(super) fn receives_only(order: &Order, rank: usize, kind: CollectiveKind) -> bool {
    match kind {
        CollectiveKind::Hidden => rank != order.rank_and_chunk(order.stages() - 1).0,
        CollectiveKind::EmbeddingGradient => rank != order.rank_and_chunk(0).0,
        CollectiveKind::Maximum | CollectiveKind::Statistics => false,
        CollectiveKind::HiddenGradient | CollectiveKind::Embedding => false,
    }
}
