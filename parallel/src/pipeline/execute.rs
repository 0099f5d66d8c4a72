//! Carries a schedule out on one rank.

use super::communication::Dependency;
use super::lane::Lane;
use super::simulate::Span;
use super::{Collective, CollectiveKind, Message, Pass, PassKind, Payload, Schedule, Step};
use crate::{Accelerator, CommError, Communicator, Work};
use kernels::profile::{Cost, span};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use tch::Tensor;

/// What a rank does in a collective. It runs beside the passes, on a lane of its own, so it may compute between operations; its
/// result goes to the passes that need the collective. It is called once, and the tensors in it live until its result is there.
pub type CollectiveFn = Box<dyn Fn(&dyn Communicator) -> Result<Vec<Tensor>, CommError> + Send>;

/// The stages of one rank.
pub trait Stages {
    /// What can go wrong.
    type Error: From<CommError>;

    /// Computes `pass`. `inputs` are what it needs from elsewhere ([`super::Order::dependencies`]): for F the output of the stage
    /// before, for B and BW the gradient of its own output, for passes of the vocabulary the collective's result. F gives
    /// its output and B or BW the gradient of its input, where another stage needs it.
    ///
    /// # Errors
    /// Its own.
    fn compute(&mut self, pass: Pass, inputs: Vec<Tensor>) -> Result<Option<Tensor>, Self::Error>;

    /// What this rank does in `collective`; called right after the pass that gives something to it.
    ///
    /// # Errors
    /// Its own.
    fn collective_fn(&mut self, collective: Collective) -> Result<CollectiveFn, Self::Error>;

    /// An empty tensor of the kind that travels between stages.
    fn buffer(&self) -> Tensor;
}

/// Carries schedules out.
pub struct Executor {
    /// The ranks of the pipeline, for tensors between stages.
    messages: Arc<dyn Communicator>,
    lanes: HashMap<CollectiveKind, Lane>,
}

/// A step under way.
struct StepState<'a> {
    schedule: &'a Schedule,
    rank: usize,
    began: Instant,
    received: HashMap<Message, (Tensor, Work)>,
    sent: HashMap<Message, (Tensor, Work)>,
    /// From one stage of this rank to the next.
    local: HashMap<Message, Tensor>,
    /// How many passes still need each collective.
    users: HashMap<Collective, usize>,
    /// Collectives entered, and those of them that have ended, of each kind.
    lanes: HashMap<CollectiveKind, (usize, usize)>,
    collected: HashMap<Collective, Vec<Tensor>>,
    spans: Vec<Span>,
}

impl Executor {
    /// For the ranks of `messages`, in order of pipeline, whose stages are on `device`. `collectives` are groups of the same ranks,
    /// one for each kind that the schedules have.
    ///
    /// # Errors
    /// When the device has no queue for a collective.
    pub fn new(
        messages: Arc<dyn Communicator>,
        collectives: impl IntoIterator<Item = (CollectiveKind, Arc<dyn Communicator>)>,
        device: &dyn Accelerator,
    ) -> Result<Executor, torch_ext::Error> {
        let lanes = collectives
            .into_iter()
            .map(|(kind, group)| Ok((kind, Lane::new(group, device)?)));
        Ok(Executor {
            messages,
            lanes: lanes.collect::<Result<_, torch_ext::Error>>()?,
        })
    }

    /// Goes through this rank's list; what was computed when, in seconds.
    ///
    /// # Collective
    /// All ranks of the pipeline, with the same checked schedule.
    ///
    /// # Errors
    /// The first of a pass or a transfer.
    pub fn run<S: Stages>(
        &self,
        schedule: &Schedule,
        stages: &mut S,
    ) -> Result<Vec<Span>, S::Error> {
        let rank = self.messages.rank();
        let mut users = HashMap::new();
        for need in schedule.order.ranks[rank]
            .iter()
            .flat_map(|&pass| schedule.order.dependencies(rank, pass))
        {
            if let Dependency::Collective(collective) = need {
                *users.entry(collective).or_insert(0) += 1;
            }
        }
        let mut run = StepState {
            schedule,
            rank,
            began: Instant::now(),
            received: HashMap::new(),
            sent: HashMap::new(),
            local: HashMap::new(),
            users,
            lanes: HashMap::new(),
            collected: HashMap::new(),
            spans: Vec::new(),
        };
        for step in &schedule.ranks[rank] {
            match *step {
                Step::Compute(pass) => self.compute(&mut run, stages, pass)?,
                Step::Receive(message, from) => {
                    let buffer = stages.buffer();
                    let work = self.messages.recv(&buffer, from, tag(schedule, message))?;
                    run.received.insert(message, (buffer, work));
                }
                Step::Send(message, to) => {
                    let tensor = run
                        .local
                        .remove(&message)
                        .expect("it was made right before")
                        .contiguous();
                    let work = self.messages.send(&tensor, to, tag(schedule, message))?;
                    run.sent.insert(message, (tensor, work));
                }
                Step::WaitSend(message) => {
                    let (_tensor, work) = run
                        .sent
                        .remove(&message)
                        .expect("a checked schedule finishes what it sent");
                    work.wait()?;
                }
                Step::EnterCollective(collective) => {
                    let exchange = stages.collective_fn(collective)?;
                    self.lane(collective.kind).enter(exchange)?;
                    run.lanes.entry(collective.kind).or_insert((0, 0)).0 += 1;
                }
            }
        }
        // Those that nobody here needed have to end, too.
        let kinds: Vec<CollectiveKind> = run.lanes.keys().copied().collect();
        for kind in kinds {
            while run.lanes[&kind].1 < run.lanes[&kind].0 {
                self.next_result(&mut run, kind)?;
            }
        }
        Ok(run.spans)
    }

    fn lane(&self, kind: CollectiveKind) -> &Lane {
        self.lanes
            .get(&kind)
            .expect("there is a group for each kind of collective in the schedule")
    }

    /// Waits for the next collective of a kind; they end in the order of microbatches.
    fn next_result(&self, run: &mut StepState, kind: CollectiveKind) -> Result<(), CommError> {
        // The exchange itself goes on elsewhere; here is what it holds this rank up.
        let result = span("communication", "wait", Cost::default, || {
            self.lane(kind).next()
        })?;
        let (_, ended) = run.lanes.get_mut(&kind).expect("it was entered");
        let collective = Collective {
            kind,
            microbatch: *ended,
        };
        *ended += 1;
        if run.users.get(&collective).is_some_and(|&users| users > 0) {
            run.collected.insert(collective, result);
        }
        Ok(())
    }

    fn compute<S: Stages>(
        &self,
        run: &mut StepState,
        stages: &mut S,
        pass: Pass,
    ) -> Result<(), S::Error> {
        let order = &run.schedule.order;
        let mut inputs = Vec::new();
        for need in order.dependencies(run.rank, pass) {
            match need {
                Dependency::Message(message) => {
                    let (tensor, work) = run
                        .received
                        .remove(&message)
                        .expect("a checked schedule receives it first");
                    work.wait()?;
                    inputs.push(tensor);
                }
                // A stage of the same rank made it.
                Dependency::Pass(other) if other.chunk != pass.chunk => {
                    let message = input_message(order.stage(run.rank, pass.chunk), pass);
                    inputs.push(
                        run.local
                            .remove(&message)
                            .expect("a checked schedule makes it first"),
                    );
                }
                Dependency::Pass(_) => {}
                Dependency::Collective(collective) => {
                    inputs.extend(self.collected(run, collective)?)
                }
            }
        }
        let start = run.began.elapsed().as_secs_f64();
        let made = span("pass", pass.kind.name(), Cost::default, || {
            stages.compute(pass, inputs)
        })?;
        run.spans.push(Span {
            pass,
            start,
            end: run.began.elapsed().as_secs_f64(),
        });
        if let (Some(tensor), Some(message)) = (
            made,
            output_message(order.stages(), order.stage(run.rank, pass.chunk), pass),
        ) {
            run.local.insert(message, tensor);
        }
        Ok(())
    }

    /// The result of a collective, when it is there.
    fn collected(&self, run: &mut StepState, wanted: Collective) -> Result<Vec<Tensor>, CommError> {
        while !run.collected.contains_key(&wanted) {
            self.next_result(run, wanted.kind)?;
        }
        let users = run
            .users
            .get_mut(&wanted)
            .expect("this pass is one of them");
        *users -= 1;
        let tensors = if *users == 0 {
            run.collected.remove(&wanted)
        } else {
            run.collected
                .get(&wanted)
                .map(|tensors| tensors.iter().map(Tensor::shallow_clone).collect())
        };
        Ok(tensors.unwrap_or_default())
    }
}

/// The tensor from a neighbouring stage that `pass` of `stage` takes.
fn input_message(stage: usize, pass: Pass) -> Message {
    let payload = if pass.kind == PassKind::Forward {
        Payload::Activation
    } else {
        Payload::Gradient
    };
    Message {
        payload,
        stage,
        microbatch: pass.microbatch,
    }
}

/// The tensor for a neighbouring stage that `pass` of `stage` makes.
fn output_message(stages: usize, stage: usize, pass: Pass) -> Option<Message> {
    let neighbour = match pass.kind {
        PassKind::Forward => Some(stage + 1).filter(|&next| next < stages),
        kind if kind.gives_input_gradient() => stage.checked_sub(1),
        _ => None,
    }?;
    Some(input_message(neighbour, pass))
}

fn tag(schedule: &Schedule, message: Message) -> i32 {
    let payload = match message.payload {
        Payload::Activation => 0,
        Payload::Gradient => 1,
    };
    ((message.microbatch * schedule.order.stages() + message.stage) * 2 + payload) as i32
}
