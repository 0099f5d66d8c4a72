//! Proves that a schedule can run, whatever the times of its passes.

use super::communication::Dependency;
use super::{Collective, Message, Order, Pass, PassKind, Payload, Schedule, Step};
use std::collections::{HashMap, HashSet};

/// Why a schedule cannot run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A pass that has to be there is not.
    #[error("rank {rank} never computes {pass}")]
    MissingPass {
        /// The rank.
        rank: usize,
        /// The pass.
        pass: Pass,
    },
    /// A pass is there twice, or has no place in this model.
    #[error("rank {rank}: {pass} {problem}")]
    InvalidPass {
        /// The rank.
        rank: usize,
        /// The pass.
        pass: Pass,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A pass comes before something it needs.
    #[error("rank {rank} cannot compute {pass}: {problem}")]
    UnmetDependency {
        /// The rank.
        rank: usize,
        /// The pass.
        pass: Pass,
        /// What is not there.
        problem: String,
    },
    /// Communication that no other rank answers, or in another order than it is answered.
    #[error("rank {rank}, {what}: {problem}")]
    UnmatchedCommunication {
        /// The rank.
        rank: usize,
        /// The step.
        what: String,
        /// What is wrong.
        problem: String,
    },
    /// Ranks wait for each other in a circle.
    #[error("the schedule stops: {}", .waiting.iter().map(|(rank, pass)| format!("rank {rank} waits before {pass}")).collect::<Vec<_>>().join(", "))]
    Deadlock {
        /// The pass that each stopped rank cannot begin.
        waiting: Vec<(usize, Pass)>,
    },
}

/// Checks that every pass is there once, that all a pass needs is there before it, that every message and collective
/// has its other side, in the same order, and that nothing waits in a circle.
///
/// # Errors
/// The first thing that is wrong, with the pass and the rank.
pub fn check(schedule: &Schedule) -> Result<(), ScheduleError> {
    let order = &schedule.order;
    for (rank, passes) in order.ranks.iter().enumerate() {
        check_passes(order, rank, passes)?;
    }
    for (rank, steps) in schedule.ranks.iter().enumerate() {
        check_rank(order, rank, steps)?;
    }
    check_messages(schedule)?;
    check_collectives(schedule)?;
    match find_deadlock(schedule) {
        Some(waiting) => Err(ScheduleError::Deadlock { waiting }),
        None => Ok(()),
    }
}

fn check_passes(order: &Order, rank: usize, passes: &[Pass]) -> Result<(), ScheduleError> {
    use PassKind::*;
    let mut seen = HashSet::new();
    for &pass in passes {
        let wrong = |problem| {
            Err(ScheduleError::InvalidPass {
                rank,
                pass,
                problem,
            })
        };
        if pass.microbatch >= order.microbatches {
            return wrong("is of a microbatch that does not exist");
        }
        if pass.chunk
            >= if pass.kind.is_vocabulary() {
                1
            } else {
                order.chunks
            }
        {
            return wrong("is of a chunk that does not exist");
        }
        if pass.kind.is_vocabulary() && order.vocabulary.is_none() {
            return wrong("belongs to vocabulary parallelism, which is off");
        }
        if !seen.insert(pass) {
            return wrong("is there twice");
        }
    }
    let need = |pass: Pass| {
        if seen.contains(&pass) {
            Ok(())
        } else {
            Err(ScheduleError::MissingPass { rank, pass })
        }
    };
    for microbatch in 0..order.microbatches {
        for chunk in 0..order.chunks {
            need(Pass::new(Forward, chunk, microbatch))?;
            let whole = Pass::new(Backward, chunk, microbatch);
            let input = Pass::new(BackwardInput, chunk, microbatch);
            let weight = Pass::new(BackwardWeight, chunk, microbatch);
            if seen.contains(&whole) {
                for part in [input, weight] {
                    if seen.contains(&part) {
                        return Err(ScheduleError::InvalidPass {
                            rank,
                            pass: part,
                            problem: "is part of a BW that is there too",
                        });
                    }
                }
            } else {
                need(input)?;
                need(weight)?;
            }
        }
        if let Some(vocabulary) = order.vocabulary {
            for kind in [Embed, EmbedBackward].iter().chain(vocabulary.passes()) {
                need(Pass::new(*kind, 0, microbatch))?;
            }
        }
    }
    Ok(())
}

/// Whether everything a pass needs on its own rank comes before it.
fn check_rank(order: &Order, rank: usize, steps: &[Step]) -> Result<(), ScheduleError> {
    let mut done = HashSet::new();
    let mut received = HashSet::new();
    let mut entered = HashSet::new();
    let mut sent = HashSet::new();
    let mut computed = Vec::new();
    for step in steps {
        match step {
            Step::Compute(pass) => {
                for need in order.dependencies(rank, *pass) {
                    let problem = match need {
                        Dependency::Message(message) if !received.contains(&message) => {
                            format!("{message} is not received")
                        }
                        Dependency::Collective(c) if !entered.contains(&c) => {
                            format!("{c} is not entered")
                        }
                        Dependency::Pass(other) if !is_done(&done, other) => {
                            format!("{other} is not before it")
                        }
                        _ => continue,
                    };
                    return Err(ScheduleError::UnmetDependency {
                        rank,
                        pass: *pass,
                        problem,
                    });
                }
                done.insert(*pass);
                computed.push(*pass);
            }
            Step::Receive(message, _) => {
                received.insert(*message);
            }
            Step::EnterCollective(collective) => {
                entered.insert(*collective);
            }
            Step::WaitSend(message) => {
                if !sent.remove(message) {
                    let problem = "is waited for before it is sent".to_string();
                    return Err(ScheduleError::UnmatchedCommunication {
                        rank,
                        what: message.to_string(),
                        problem,
                    });
                }
            }
            Step::Send(message, _) => {
                sent.insert(*message);
                let made = done
                    .iter()
                    .any(|&pass| order.sends(rank, pass).is_some_and(|(m, _)| m == *message));
                if !made {
                    let problem = "is sent before the pass that makes it".to_string();
                    return Err(ScheduleError::UnmatchedCommunication {
                        rank,
                        what: message.to_string(),
                        problem,
                    });
                }
            }
        }
    }
    if computed != order.ranks[rank] {
        let pass = order.ranks[rank]
            .iter()
            .find(|pass| !done.contains(pass))
            .copied();
        let pass = pass.unwrap_or(computed[0]);
        return Err(ScheduleError::InvalidPass {
            rank,
            pass,
            problem: "is not where the order has it",
        });
    }
    Ok(())
}

/// A backward counts as done whether or not its weights' part is split off.
fn is_done(done: &HashSet<Pass>, pass: Pass) -> bool {
    let split = |kind| Pass { kind, ..pass };
    done.contains(&pass)
        || (pass.kind.gives_input_gradient()
            && (done.contains(&split(PassKind::Backward))
                || done.contains(&split(PassKind::BackwardInput))))
}

/// Messages of one payload, stage and pair of ranks travel in one order on both sides.
fn check_messages(schedule: &Schedule) -> Result<(), ScheduleError> {
    type Channel = (usize, usize, Payload, usize);
    let mut sent: HashMap<Channel, Vec<Message>> = HashMap::new();
    let mut received: HashMap<Channel, Vec<Message>> = HashMap::new();
    for (rank, steps) in schedule.ranks.iter().enumerate() {
        for step in steps {
            match step {
                Step::Send(m, to) => sent
                    .entry((rank, *to, m.payload, m.stage))
                    .or_default()
                    .push(*m),
                Step::Receive(m, from) => received
                    .entry((*from, rank, m.payload, m.stage))
                    .or_default()
                    .push(*m),
                Step::Compute(_) | Step::EnterCollective(_) | Step::WaitSend(_) => {}
            }
        }
    }
    let channels: std::collections::BTreeSet<Channel> =
        sent.keys().chain(received.keys()).copied().collect();
    for channel @ (from, to, ..) in channels {
        let out = sent.remove(&channel).unwrap_or_default();
        let into = received.remove(&channel).unwrap_or_default();
        if let Some(message) = out.iter().find(|m| !into.contains(m)) {
            let problem = format!("rank {to} does not receive it");
            return Err(ScheduleError::UnmatchedCommunication {
                rank: from,
                what: format!("sending {message}"),
                problem,
            });
        }
        if let Some(message) = into.iter().find(|m| !out.contains(m)) {
            let problem = format!("rank {from} does not send it");
            return Err(ScheduleError::UnmatchedCommunication {
                rank: to,
                what: format!("receiving {message}"),
                problem,
            });
        }
        if let Some((message, _)) = out.iter().zip(&into).find(|(a, b)| a != b) {
            let problem = format!("rank {to} receives in another order");
            return Err(ScheduleError::UnmatchedCommunication {
                rank: from,
                what: format!("sending {message}"),
                problem,
            });
        }
    }
    Ok(())
}

/// All ranks enter the collectives of one kind in the order of microbatches, each once.
fn check_collectives(schedule: &Schedule) -> Result<(), ScheduleError> {
    for (rank, steps) in schedule.ranks.iter().enumerate() {
        let mut next: HashMap<_, usize> = HashMap::new();
        for step in steps {
            let Step::EnterCollective(collective) = step else {
                continue;
            };
            let expected = next.entry(collective.kind).or_insert(0);
            if collective.microbatch != *expected {
                let problem = format!("microbatch {expected} is next for this collective");
                return Err(ScheduleError::UnmatchedCommunication {
                    rank,
                    what: collective.to_string(),
                    problem,
                });
            }
            *expected += 1;
        }
        for (kind, count) in next {
            if count != schedule.order.microbatches {
                let what = Collective {
                    kind,
                    microbatch: count,
                }
                .to_string();
                return Err(ScheduleError::UnmatchedCommunication {
                    rank,
                    what,
                    problem: "is never entered".into(),
                });
            }
        }
    }
    Ok(())
}

/// Runs the lists until nothing moves: the passes that ranks are stuck at, or None if all end.
fn find_deadlock(schedule: &Schedule) -> Option<Vec<(usize, Pass)>> {
    let order = &schedule.order;
    let mut at = vec![0; schedule.ranks.len()];
    let mut sent: HashSet<Message> = HashSet::new();
    // How many ranks have given what the collective needs.
    let mut entered: HashMap<Collective, HashSet<usize>> = HashMap::new();
    loop {
        let mut moved = false;
        for (rank, steps) in schedule.ranks.iter().enumerate() {
            while let Some(step) = steps.get(at[rank]) {
                match step {
                    Step::Compute(pass) => {
                        let ready = order
                            .dependencies(rank, *pass)
                            .iter()
                            .all(|need| match need {
                                Dependency::Message(message) => sent.contains(message),
                                Dependency::Collective(c) => complete(order, *c, entered.get(c)),
                                Dependency::Pass(_) => true, // earlier on this rank
                            });
                        if !ready {
                            break;
                        }
                    }
                    Step::Send(message, _) => {
                        sent.insert(*message);
                    }
                    Step::EnterCollective(collective) => {
                        entered.entry(*collective).or_default().insert(rank);
                    }
                    Step::Receive(..) | Step::WaitSend(_) => {}
                }
                at[rank] += 1;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    let waiting: Vec<(usize, Pass)> = (0..at.len())
        .filter_map(|rank| match schedule.ranks[rank].get(at[rank]) {
            Some(Step::Compute(pass)) => Some((rank, *pass)),
            _ => None,
        })
        .collect();
    (!waiting.is_empty()).then_some(waiting)
}

/// Whether a collective can complete once `entered` have entered it: a broadcast when its root has, others when all have.
fn complete(order: &Order, collective: Collective, entered: Option<&HashSet<usize>>) -> bool {
    let mut contributors = (0..order.ranks.len())
        .filter(|&rank| !super::communication::receives_only(order, rank, collective.kind));
    entered.is_some_and(|entered| contributors.all(|rank| entered.contains(&rank)))
}
