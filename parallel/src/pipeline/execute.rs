//! Runs a schedule on one rank.

use super::{
    Collective, CollectiveKind, Message, Order, Pass, PassKind, Payload, Schedule, Step,
    communication::Dependency,
    lane::{CollectiveFn, Lane},
    simulate::Span,
};
use crate::{Accelerator, CommError, Communicator, Work};
use kernels::profile::{Cost, span};
use std::{collections::HashMap, sync::Arc, time::Instant};
use tch::Tensor;

/// The stages of one rank.
pub trait Stages {
    type Error: From<CommError>;

    /// Computes `pass`.
    ///
    /// `inputs` are the tensors that it depends on ([`super::Order::dependencies`]): the output of
    /// the stage before for F, the gradient of the stage's output for B and BW, the collective's
    /// result for passes of vocabulary parallelism. F returns its output, and B or BW the gradient
    /// of its input, if another stage needs it.
    ///
    /// # Errors
    /// If the computation fails.
    fn compute(&mut self, pass: Pass, inputs: Vec<Tensor>) -> Result<Option<Tensor>, Self::Error>;

    /// Returns this rank's part in `collective`; called right after the pass that contributes to
    /// it.
    ///
    /// # Errors
    /// If the contribution is not available.
    fn collective_fn(&mut self, collective: Collective) -> Result<CollectiveFn, Self::Error>;

    /// Returns an empty tensor with the shape and dtype of those that stages exchange.
    fn buffer(&self) -> Tensor;
}

/// Runs schedules with the communicators of a pipeline.
pub struct Executor {
    /// The ranks of the pipeline, for tensors between stages.
    messages: Arc<dyn Communicator>,
    lanes: HashMap<CollectiveKind, Lane>,
}

/// A message that is being sent or received.
struct Transfer {
    tensor: Tensor,
    work: Work,
}

/// Counts of the collectives on one lane.
#[derive(Default, Clone, Copy)]
struct LaneProgress {
    entered: usize,
    ended: usize,
}

/// The state of one step.
struct StepState<'a> {
    schedule: &'a Schedule,
    rank: usize,
    start: Instant,
    received: HashMap<Message, Transfer>,
    sent: HashMap<Message, Transfer>,
    /// Tensors from one stage of this rank to the next.
    local: HashMap<Message, Tensor>,
    /// Number of passes that still need each collective.
    users: HashMap<Collective, usize>,
    lanes: HashMap<CollectiveKind, LaneProgress>,
    results: HashMap<Collective, Vec<Tensor>>,
    spans: Vec<Span>,
}

impl StepState<'_> {
    fn new(schedule: &Schedule, rank: usize) -> StepState<'_> {
        StepState {
            schedule,
            rank,
            start: Instant::now(),
            received: HashMap::new(),
            sent: HashMap::new(),
            local: HashMap::new(),
            users: collective_users(&schedule.order, rank),
            lanes: HashMap::new(),
            results: HashMap::new(),
            spans: Vec::new(),
        }
    }

    fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn stage(&self, pass: Pass) -> usize {
        self.schedule.order.stage(self.rank, pass.chunk)
    }

    /// Removes the result of a collective if no other pass needs it, else copies the handles.
    fn take_result(&mut self, collective: Collective) -> Vec<Tensor> {
        let users = self.users.get_mut(&collective);
        let users = users.expect("the pass is one of the users");
        *users -= 1;
        let result = if *users == 0 {
            self.results.remove(&collective)
        } else {
            let shared = self.results.get(&collective);
            shared.map(|tensors| tensors.iter().map(Tensor::shallow_clone).collect())
        };
        result.unwrap_or_default()
    }
}

/// Returns the number of passes of `rank` that depend on each collective.
fn collective_users(order: &Order, rank: usize) -> HashMap<Collective, usize> {
    let mut users = HashMap::new();
    for &pass in &order.ranks[rank] {
        for dependency in order.dependencies(rank, pass) {
            if let Dependency::Collective(collective) = dependency {
                *users.entry(collective).or_insert(0) += 1;
            }
        }
    }
    users
}

impl Executor {
    /// Creates an executor for the ranks of `messages`, which are in pipeline order.
    ///
    /// Their stages are on `device`. `collectives` are groups of the same ranks, one for each kind
    /// of collective in the schedules.
    ///
    /// # Errors
    /// If the device has no stream for a collective.
    pub fn new(
        messages: Arc<dyn Communicator>,
        collectives: impl IntoIterator<Item = (CollectiveKind, Arc<dyn Communicator>)>,
        device: &dyn Accelerator,
    ) -> Result<Executor, torch_ext::Error> {
        let mut lanes = HashMap::new();
        for (kind, group) in collectives {
            lanes.insert(kind, Lane::new(group, device)?);
        }
        Ok(Executor { messages, lanes })
    }

    /// Runs this rank's steps and returns when each pass ran, in seconds from the start.
    ///
    /// # Collective
    /// All ranks of the pipeline, with the same checked schedule.
    ///
    /// # Errors
    /// The first error of a pass or a transfer.
    pub fn run<S>(&self, schedule: &Schedule, stages: &mut S) -> Result<Vec<Span>, S::Error>
    where
        S: Stages,
    {
        let rank = self.messages.rank();
        let mut state = StepState::new(schedule, rank);
        for step in &schedule.ranks[rank] {
            match *step {
                Step::Compute(pass) => self.compute(&mut state, stages, pass)?,
                Step::Receive(message, from) => {
                    let tensor = stages.buffer();
                    let work = self.messages.recv(&tensor, from, tag(schedule, message))?;
                    state.received.insert(message, Transfer { tensor, work });
                }
                Step::Send(message, to) => {
                    let tensor = state
                        .local
                        .remove(&message)
                        .expect("the pass before made it")
                        .contiguous();
                    let work = self.messages.send(&tensor, to, tag(schedule, message))?;
                    state.sent.insert(message, Transfer { tensor, work });
                }
                Step::WaitSend(message) => {
                    let transfer = state.sent.remove(&message);
                    let Transfer { tensor, work } =
                        transfer.expect("a checked schedule waits only for what it sent");
                    work.wait()?;
                    drop(tensor);
                }
                Step::EnterCollective(collective) => {
                    let collective_fn = stages.collective_fn(collective)?;
                    self.lane(collective.kind).enter(collective_fn)?;
                    state.lanes.entry(collective.kind).or_default().entered += 1;
                }
            }
        }
        self.finish_collectives(&mut state)?;
        Ok(state.spans)
    }

    fn lane(&self, kind: CollectiveKind) -> &Lane {
        self.lanes
            .get(&kind)
            .expect("each kind of collective in the schedule has a group")
    }

    /// Waits for the collectives whose results no pass of this rank needed.
    fn finish_collectives(&self, state: &mut StepState) -> Result<(), CommError> {
        let kinds: Vec<CollectiveKind> = state.lanes.keys().copied().collect();
        for kind in kinds {
            while state.lanes[&kind].ended < state.lanes[&kind].entered {
                self.next_result(state, kind)?;
            }
        }
        Ok(())
    }

    /// Waits for the next collective of a kind; they end in the order of microbatches.
    fn next_result(&self, state: &mut StepState, kind: CollectiveKind) -> Result<(), CommError> {
        // The collective itself runs on its lane; this records the time for which it delays the
        // rank.
        let result = span("communication", "wait", Cost::default, || {
            self.lane(kind).next()
        })?;
        let lane = state.lanes.get_mut(&kind).expect("it was entered");
        let collective = Collective {
            kind,
            microbatch: lane.ended,
        };
        lane.ended += 1;
        let users = state.users.get(&collective);
        if users.is_some_and(|&users| users > 0) {
            state.results.insert(collective, result);
        }
        Ok(())
    }

    fn compute<S>(&self, state: &mut StepState, stages: &mut S, pass: Pass) -> Result<(), S::Error>
    where
        S: Stages,
    {
        let inputs = self.inputs(state, pass)?;
        let start = state.seconds();
        let output = span("pass", pass.kind.name(), Cost::default, || {
            stages.compute(pass, inputs)
        })?;
        let end = state.seconds();
        state.spans.push(Span { pass, start, end });
        let num_stages = state.schedule.order.stages();
        let message = output_message(num_stages, state.stage(pass), pass);
        if let (Some(tensor), Some(message)) = (output, message) {
            state.local.insert(message, tensor);
        }
        Ok(())
    }

    /// Waits for the tensors that `pass` depends on.
    fn inputs(&self, state: &mut StepState, pass: Pass) -> Result<Vec<Tensor>, CommError> {
        let order = &state.schedule.order;
        let mut inputs = Vec::new();
        for dependency in order.dependencies(state.rank, pass) {
            match dependency {
                Dependency::Message(message) => {
                    let transfer = state.received.remove(&message);
                    let Transfer { tensor, work } =
                        transfer.expect("a checked schedule receives it before");
                    work.wait()?;
                    inputs.push(tensor);
                }
                // A stage of the same rank made it.
                Dependency::Pass(other) if other.chunk != pass.chunk => {
                    let message = input_message(state.stage(pass), pass);
                    let tensor = state.local.remove(&message);
                    inputs.push(tensor.expect("a checked schedule computes it before"));
                }
                Dependency::Pass(_) => {}
                Dependency::Collective(collective) => {
                    while !state.results.contains_key(&collective) {
                        self.next_result(state, collective.kind)?;
                    }
                    inputs.extend(state.take_result(collective));
                }
            }
        }
        Ok(inputs)
    }
}

/// Returns the tensor of a neighboring stage that `pass` of `stage` takes.
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

/// Returns the tensor for a neighboring stage that `pass` of `stage` makes.
fn output_message(num_stages: usize, stage: usize, pass: Pass) -> Option<Message> {
    let neighbor = match pass.kind {
        PassKind::Forward => Some(stage + 1).filter(|&next| next < num_stages),
        kind if kind.gives_input_gradient() => stage.checked_sub(1),
        _ => None,
    }?;
    Some(input_message(neighbor, pass))
}

fn tag(schedule: &Schedule, message: Message) -> i32 {
    let payload = match message.payload {
        Payload::Activation => 0,
        Payload::Gradient => 1,
    };
    let index = message.microbatch * schedule.order.stages() + message.stage;
    (index * 2 + payload) as i32
}
