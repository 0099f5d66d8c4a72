//! Proves that a schedule can run, whatever the times of its passes.

use super::{
    Collective, Message, Order, Pass, PassKind, Payload, Schedule, Step,
    communication::{Dependency, receives_only},
};
use std::collections::{BTreeSet, HashMap, HashSet};

/// A reason why a schedule cannot run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    #[error("rank {rank}: {pass} is missing")]
    MissingPass { rank: usize, pass: Pass },
    /// A pass that appears twice or does not belong to the model.
    #[error("rank {rank}: {pass} {problem}")]
    InvalidPass {
        rank: usize,
        pass: Pass,
        problem: &'static str,
    },
    /// A pass that comes before something it depends on.
    #[error("rank {rank}: cannot compute {pass}: {problem}")]
    UnmetDependency {
        rank: usize,
        pass: Pass,
        problem: String,
    },
    /// Communication that no other rank matches, or that other ranks match in another order.
    #[error("rank {rank}: {what}: {problem}")]
    UnmatchedCommunication {
        rank: usize,
        what: String,
        problem: String,
    },
    #[error("deadlock: {}", describe(.waiting))]
    Deadlock {
        /// Each blocked rank and the pass that it cannot start.
        waiting: Vec<(usize, Pass)>,
    },
}

fn describe(waiting: &[(usize, Pass)]) -> String {
    let rank = |(rank, pass): &(usize, Pass)| format!("rank {rank} waits before {pass}");
    let ranks: Vec<String> = waiting.iter().map(rank).collect();
    ranks.join(", ")
}

/// Checks that a schedule is complete and cannot deadlock.
///
/// Every pass appears once, after all that it depends on. Every message and collective has its
/// counterpart, in the same order. No ranks wait for each other in a circle.
///
/// # Errors
/// The first problem, with the pass and the rank.
pub fn check(schedule: &Schedule) -> Result<(), ScheduleError> {
    let order = &schedule.order;
    for (rank, passes) in order.ranks.iter().enumerate() {
        check_passes(order, rank, passes)?;
    }
    for (rank, steps) in schedule.ranks.iter().enumerate() {
        check_steps(order, rank, steps)?;
    }
    check_messages(schedule)?;
    check_collectives(schedule)?;
    match find_deadlock(schedule) {
        Some(waiting) => Err(ScheduleError::Deadlock { waiting }),
        None => Ok(()),
    }
}

/// Checks that a rank computes every pass of the order exactly once, and no other.
fn check_passes(order: &Order, rank: usize, passes: &[Pass]) -> Result<(), ScheduleError> {
    let mut present = HashSet::new();
    for &pass in passes {
        let problem =
            pass_problem(order, pass).or((!present.insert(pass)).then_some("appears twice"));
        if let Some(problem) = problem {
            return Err(ScheduleError::InvalidPass {
                rank,
                pass,
                problem,
            });
        }
    }
    for microbatch in 0..order.microbatches {
        for chunk in 0..order.chunks {
            let forward = Pass::new(PassKind::Forward, chunk, microbatch);
            require(rank, &present, forward)?;
            check_backward(rank, &present, forward)?;
        }
        if let Some(vocabulary) = order.vocabulary {
            let embedding = [PassKind::Embed, PassKind::EmbedBackward];
            for &kind in embedding.iter().chain(vocabulary.passes()) {
                require(rank, &present, Pass::new(kind, 0, microbatch))?;
            }
        }
    }
    Ok(())
}

/// Returns the reason why `pass` does not belong to the order, if any.
fn pass_problem(order: &Order, pass: Pass) -> Option<&'static str> {
    let is_vocabulary = pass.kind.is_vocabulary();
    let chunks = if is_vocabulary { 1 } else { order.chunks };
    if pass.microbatch >= order.microbatches {
        Some("has a microbatch that does not exist")
    } else if pass.chunk >= chunks {
        Some("has a chunk that does not exist")
    } else if is_vocabulary && order.vocabulary.is_none() {
        Some("belongs to vocabulary parallelism, which is off")
    } else {
        None
    }
}

fn require(rank: usize, present: &HashSet<Pass>, pass: Pass) -> Result<(), ScheduleError> {
    if present.contains(&pass) {
        Ok(())
    } else {
        Err(ScheduleError::MissingPass { rank, pass })
    }
}

/// Checks that the backward of `forward` is either BW, or B and W.
fn check_backward(
    rank: usize,
    present: &HashSet<Pass>,
    forward: Pass,
) -> Result<(), ScheduleError> {
    let with_kind = |kind| Pass { kind, ..forward };
    let parts = [PassKind::BackwardInput, PassKind::BackwardWeight].map(with_kind);
    if present.contains(&with_kind(PassKind::Backward)) {
        if let Some(&pass) = parts.iter().find(|part| present.contains(part)) {
            return Err(ScheduleError::InvalidPass {
                rank,
                pass,
                problem: "is part of a BW that is also present",
            });
        }
        return Ok(());
    }
    for part in parts {
        require(rank, present, part)?;
    }
    Ok(())
}

/// The steps of one rank so far.
#[derive(Default)]
struct RankProgress {
    done: HashSet<Pass>,
    computed: Vec<Pass>,
    received: HashSet<Message>,
    entered: HashSet<Collective>,
    sent: HashSet<Message>,
}

impl RankProgress {
    /// Returns the reason why a pass with this dependency cannot run, if any.
    fn unmet(&self, dependency: Dependency) -> Option<String> {
        match dependency {
            Dependency::Message(message) if !self.received.contains(&message) => {
                Some(format!("{message} is not received"))
            }
            Dependency::Collective(collective) if !self.entered.contains(&collective) => {
                Some(format!("{collective} is not entered"))
            }
            Dependency::Pass(other) if !self.is_done(other) => {
                Some(format!("{other} does not come before it"))
            }
            _ => None,
        }
    }

    /// True if a pass on this rank that is done makes `message`.
    fn has_made(&self, order: &Order, rank: usize, message: Message) -> bool {
        let made_by = |kind: PassKind, stage: usize| {
            let (producer, chunk) = order.rank_and_chunk(stage);
            let pass = Pass::new(kind, chunk, message.microbatch);
            producer == rank && self.is_done(pass)
        };
        match message.payload {
            Payload::Activation => {
                message.stage > 0 && made_by(PassKind::Forward, message.stage - 1)
            }
            Payload::Gradient => made_by(PassKind::Backward, message.stage + 1),
        }
    }

    /// True if `pass` is done; a backward may be split into B and W, of which B counts.
    fn is_done(&self, pass: Pass) -> bool {
        let has = |kind| self.done.contains(&Pass { kind, ..pass });
        let either = || has(PassKind::Backward) || has(PassKind::BackwardInput);
        has(pass.kind) || (pass.kind.gives_input_gradient() && either())
    }
}

/// Checks that everything a step needs on its own rank comes before it.
fn check_steps(order: &Order, rank: usize, steps: &[Step]) -> Result<(), ScheduleError> {
    let mut progress = RankProgress::default();
    let unmatched = |message: &Message, problem: &str| ScheduleError::UnmatchedCommunication {
        rank,
        what: message.to_string(),
        problem: problem.to_string(),
    };
    for step in steps {
        match step {
            Step::Compute(pass) => {
                for dependency in order.dependencies(rank, *pass) {
                    if let Some(problem) = progress.unmet(dependency) {
                        return Err(ScheduleError::UnmetDependency {
                            rank,
                            pass: *pass,
                            problem,
                        });
                    }
                }
                progress.done.insert(*pass);
                progress.computed.push(*pass);
            }
            Step::Receive(message, _) => {
                progress.received.insert(*message);
            }
            Step::EnterCollective(collective) => {
                progress.entered.insert(*collective);
            }
            Step::WaitSend(message) => {
                if !progress.sent.remove(message) {
                    return Err(unmatched(message, "is waited for before it is sent"));
                }
            }
            Step::Send(message, _) => {
                progress.sent.insert(*message);
                if !progress.has_made(order, rank, *message) {
                    return Err(unmatched(message, "is sent before the pass that makes it"));
                }
            }
        }
    }
    check_computed(order, rank, &progress)
}

/// Checks that a rank's steps compute the passes of its order.
fn check_computed(
    order: &Order,
    rank: usize,
    progress: &RankProgress,
) -> Result<(), ScheduleError> {
    let expected = &order.ranks[rank];
    if progress.computed == *expected {
        return Ok(());
    }
    let mut missing = expected.iter().filter(|pass| !progress.done.contains(pass));
    let pass = missing.next().copied();
    Err(ScheduleError::InvalidPass {
        rank,
        pass: pass.unwrap_or(progress.computed[0]),
        problem: "is not where the order has it",
    })
}

/// Messages of one payload for one stage, between two ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Channel {
    from: usize,
    to: usize,
    payload: Payload,
    stage: usize,
}

impl Channel {
    fn new(from: usize, to: usize, message: &Message) -> Channel {
        Channel {
            from,
            to,
            payload: message.payload,
            stage: message.stage,
        }
    }
}

/// Checks that both sides of every channel have the same messages in the same order.
fn check_messages(schedule: &Schedule) -> Result<(), ScheduleError> {
    let mut sent: HashMap<Channel, Vec<Message>> = HashMap::new();
    let mut received: HashMap<Channel, Vec<Message>> = HashMap::new();
    for (rank, steps) in schedule.ranks.iter().enumerate() {
        for step in steps {
            match step {
                Step::Send(message, to) => {
                    let channel = Channel::new(rank, *to, message);
                    sent.entry(channel).or_default().push(*message);
                }
                Step::Receive(message, from) => {
                    let channel = Channel::new(*from, rank, message);
                    received.entry(channel).or_default().push(*message);
                }
                Step::Compute(_) | Step::EnterCollective(_) | Step::WaitSend(_) => {}
            }
        }
    }
    let channels = sent
        .keys()
        .chain(received.keys())
        .copied()
        .collect::<BTreeSet<Channel>>();
    for channel in channels {
        let sent = sent.remove(&channel).unwrap_or_default();
        let received = received.remove(&channel).unwrap_or_default();
        check_channel(channel, &sent, &received)?;
    }
    Ok(())
}

fn check_channel(
    channel: Channel,
    sent: &[Message],
    received: &[Message],
) -> Result<(), ScheduleError> {
    let Channel { from, to, .. } = channel;
    let unsent = |message: &Message, problem: String| ScheduleError::UnmatchedCommunication {
        rank: from,
        what: format!("sending {message}"),
        problem,
    };
    let all_sent: HashSet<&Message> = sent.iter().collect();
    let all_received: HashSet<&Message> = received.iter().collect();
    if let Some(message) = sent.iter().find(|message| !all_received.contains(message)) {
        return Err(unsent(message, format!("rank {to} does not receive it")));
    }
    if let Some(message) = received.iter().find(|message| !all_sent.contains(message)) {
        return Err(ScheduleError::UnmatchedCommunication {
            rank: to,
            what: format!("receiving {message}"),
            problem: format!("rank {from} does not send it"),
        });
    }
    let mut pairs = sent.iter().zip(received);
    match pairs.find(|(sent, received)| sent != received) {
        Some((message, _)) => {
            let problem = format!("rank {to} receives in another order");
            Err(unsent(message, problem))
        }
        None => Ok(()),
    }
}

/// Checks that all ranks enter the collectives of one kind once, in the order of microbatches.
fn check_collectives(schedule: &Schedule) -> Result<(), ScheduleError> {
    for (rank, steps) in schedule.ranks.iter().enumerate() {
        let unmatched = |collective: Collective, problem| ScheduleError::UnmatchedCommunication {
            rank,
            what: collective.to_string(),
            problem,
        };
        let mut entered: HashMap<_, usize> = HashMap::new();
        for step in steps {
            let Step::EnterCollective(collective) = step else {
                continue;
            };
            let expected = entered.entry(collective.kind).or_insert(0);
            if collective.microbatch != *expected {
                let problem = format!("microbatch {expected} is next for this collective");
                return Err(unmatched(*collective, problem));
            }
            *expected += 1;
        }
        for (kind, microbatch) in entered {
            if microbatch != schedule.order.microbatches {
                let missing = Collective { kind, microbatch };
                return Err(unmatched(missing, "is never entered".into()));
            }
        }
    }
    Ok(())
}

/// A run of all ranks in which passes take no time.
struct DryRun<'a> {
    schedule: &'a Schedule,
    /// The next step of each rank.
    at: Vec<usize>,
    sent: HashSet<Message>,
    /// The ranks that have entered each collective.
    entered: HashMap<Collective, HashSet<usize>>,
}

impl DryRun<'_> {
    fn step(&self, rank: usize) -> Option<Step> {
        self.schedule.ranks[rank].get(self.at[rank]).copied()
    }

    /// Runs the next step of a rank, and returns false if it cannot start yet.
    fn advance(&mut self, rank: usize) -> bool {
        match self.step(rank) {
            None => return false,
            Some(Step::Compute(pass)) if !self.is_ready(rank, pass) => return false,
            Some(Step::Send(message, _)) => {
                self.sent.insert(message);
            }
            Some(Step::EnterCollective(collective)) => {
                self.entered.entry(collective).or_default().insert(rank);
            }
            Some(Step::Compute(_) | Step::Receive(..) | Step::WaitSend(_)) => {}
        }
        self.at[rank] += 1;
        true
    }

    fn is_ready(&self, rank: usize, pass: Pass) -> bool {
        let dependencies = self.schedule.order.dependencies(rank, pass);
        dependencies.iter().all(|dependency| match dependency {
            Dependency::Message(message) => self.sent.contains(message),
            Dependency::Collective(collective) => self.is_complete(*collective),
            // Earlier on this rank.
            Dependency::Pass(_) => true,
        })
    }

    /// True if every rank that contributes has entered: for a broadcast its root, else all ranks.
    fn is_complete(&self, collective: Collective) -> bool {
        let Some(entered) = self.entered.get(&collective) else {
            return false;
        };
        let order = &self.schedule.order;
        let mut ranks = 0..order.ranks.len();
        ranks.all(|rank| entered.contains(&rank) || receives_only(order, rank, collective.kind))
    }
}

/// Returns each blocked rank and the pass that it cannot start, or None if all ranks finish.
fn find_deadlock(schedule: &Schedule) -> Option<Vec<(usize, Pass)>> {
    let ranks = schedule.ranks.len();
    let mut run = DryRun {
        schedule,
        at: vec![0; ranks],
        sent: HashSet::new(),
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
    let blocked = |rank| match run.step(rank) {
        Some(Step::Compute(pass)) => Some((rank, pass)),
        _ => None,
    };
    let waiting = (0..ranks)
        .filter_map(blocked)
        .collect::<Vec<(usize, Pass)>>();
    (!waiting.is_empty()).then_some(waiting)
}
