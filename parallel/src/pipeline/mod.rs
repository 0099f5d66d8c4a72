//! Pipeline schedules as plain data: what every rank computes, sends and receives, in order.
//!
//! - [`schedules`] generates the orders of the papers; [`OrderFile`] parses a user's own order;
//! - [`vocabulary`] inserts the passes of vocabulary parallelism into any order;
//! - [`refine`] moves passes to shorten the step;
//! - [`communication`] inserts sends, receives and collectives;
//! - [`check`] proves that a schedule can run;
//! - [`simulate`] estimates its time and memory, and [`draw`] draws it.
//!
//! Only [`Executor`], which runs a schedule, handles tensors. `docs/glossary.md` defines pass,
//! order, schedule and lane.

pub mod check;
pub mod communication;
pub mod draw;
mod execute;
mod lane;
pub mod refine;
pub mod schedules;
pub mod simulate;
mod text;
pub mod vocabulary;

pub use execute::{Executor, Stages};
pub use lane::CollectiveFn;
pub use text::OrderFile;

use serde::{Deserialize, Serialize};

/// A kind of computation: of one stage (F, B, W), or of every rank for vocabulary parallelism.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PassKind {
    /// `F`: forward of a stage.
    Forward,
    /// `BW`: backward of a stage, for its input and its weights.
    Backward,
    /// `B`: gradient of a stage's input.
    BackwardInput,
    /// `W`: gradient of a stage's weights.
    BackwardWeight,
    /// `S`: this rank's logits and their statistics; with `vocab-2` also its part of the input
    /// gradient.
    Logits,
    /// `N`: exponentials and their sum, given the largest logit of all ranks; only with `naive`.
    Normalize,
    /// `T`: gradient of this rank's part of the output layer; except with `vocab-2` also its part
    /// of the input gradient.
    LogitsBackward,
    /// `IF`: lookup in this rank's part of the embedding.
    Embed,
    /// `IB`: gradient of this rank's part of the embedding.
    EmbedBackward,
}

impl PassKind {
    /// All kinds with their names in text.
    pub const NAMES: [(PassKind, &'static str); 9] = [
        (PassKind::Forward, "F"),
        (PassKind::Backward, "BW"),
        (PassKind::BackwardInput, "B"),
        (PassKind::BackwardWeight, "W"),
        (PassKind::Logits, "S"),
        (PassKind::Normalize, "N"),
        (PassKind::LogitsBackward, "T"),
        (PassKind::Embed, "IF"),
        (PassKind::EmbedBackward, "IB"),
    ];

    /// Returns the name in text.
    pub fn name(self) -> &'static str {
        PassKind::NAMES
            .iter()
            .find(|(kind, _)| *kind == self)
            .map_or("", |(_, name)| name)
    }

    /// True if every rank runs it, rather than one stage.
    pub fn is_vocabulary(self) -> bool {
        use PassKind::*;
        matches!(
            self,
            Logits | Normalize | LogitsBackward | Embed | EmbedBackward
        )
    }

    /// True if it computes the gradient of a stage's input.
    pub fn gives_input_gradient(self) -> bool {
        matches!(self, PassKind::Backward | PassKind::BackwardInput)
    }
}

/// One pass of one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pass {
    pub kind: PassKind,
    /// The rank's model chunk; 0 for passes of vocabulary parallelism.
    pub chunk: usize,
    pub microbatch: usize,
}

impl Pass {
    /// Creates a pass; `chunk` is 0 for vocabulary parallelism.
    pub fn new(kind: PassKind, chunk: usize, microbatch: usize) -> Pass {
        Pass {
            kind,
            chunk,
            microbatch,
        }
    }
}

/// The assignment of stages to ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Chunk `c` of rank `r` is stage `c * ranks + r`.
    Loop,
    /// As `Loop`, but odd chunks run backwards over the ranks: where the direction turns,
    /// consecutive stages are on one rank.
    V,
}

/// An algorithm of vocabulary parallelism (arXiv 2411.05288).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vocabulary {
    /// Three barriers: the largest logit after S, the sum of exponentials after N, the input
    /// gradient after T.
    Naive,
    /// As `vocab-1`, but all ranks stop and run S and T together (nnScaler, OSDI 2024).
    Interlaced,
    /// Algorithm 1 with two barriers: statistics after S, the input gradient after T.
    #[serde(rename = "vocab-1")]
    Vocab1,
    /// Algorithm 2 with one barrier: statistics and the input gradient after S.
    #[serde(rename = "vocab-2")]
    Vocab2,
}

impl Vocabulary {
    /// Returns the number of additional microbatches that a pipeline of `ranks` ranks holds.
    ///
    /// That is one for each collective between the last stage's forward and its backward, apart
    /// from the first broadcast. If all ranks stop for the output layer, it is half of the ranks.
    pub fn extra_microbatches(self, ranks: usize) -> usize {
        match self {
            Vocabulary::Naive => 3,
            Vocabulary::Interlaced => ranks / 2,
            Vocabulary::Vocab1 => 2,
            Vocabulary::Vocab2 => 1,
        }
    }

    /// Returns the passes of the output layer for one microbatch, in order.
    pub fn passes(self) -> &'static [PassKind] {
        match self {
            Vocabulary::Naive => &[
                PassKind::Logits,
                PassKind::Normalize,
                PassKind::LogitsBackward,
            ],
            _ => &[PassKind::Logits, PassKind::LogitsBackward],
        }
    }

    /// True if T also computes the input gradient, which ranks then sum.
    pub fn gradient_after_t(self) -> bool {
        self != Vocabulary::Vocab2
    }
}

/// The passes of every rank, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Number of microbatches of a step.
    pub microbatches: usize,
    /// Number of model chunks per rank.
    pub chunks: usize,
    pub placement: Placement,
    /// None if the first and the last stage compute the embedding and the output layer.
    pub vocabulary: Option<Vocabulary>,
    /// The passes of each rank.
    pub ranks: Vec<Vec<Pass>>,
}

impl Order {
    /// Returns the total number of stages.
    pub fn stages(&self) -> usize {
        self.ranks.len() * self.chunks
    }

    /// Returns the stage that is chunk `chunk` of rank `rank`.
    pub fn stage(&self, rank: usize, chunk: usize) -> usize {
        stage_at(self.placement, self.ranks.len(), rank, chunk)
    }

    /// Returns the rank and the chunk of a stage.
    pub fn rank_and_chunk(&self, stage: usize) -> (usize, usize) {
        let ranks = self.ranks.len();
        let chunk = stage / ranks;
        let position = stage % ranks;
        let rank = if runs_backwards(self.placement, chunk) {
            ranks - 1 - position
        } else {
            position
        };
        (rank, chunk)
    }
}

/// Returns the stage that is chunk `chunk` of rank `rank` of `ranks`.
pub fn stage_at(placement: Placement, ranks: usize, rank: usize, chunk: usize) -> usize {
    let position = if runs_backwards(placement, chunk) {
        ranks - 1 - rank
    } else {
        rank
    };
    chunk * ranks + position
}

/// True if the stages of `chunk` run from the last rank to the first.
fn runs_backwards(placement: Placement, chunk: usize) -> bool {
    placement == Placement::V && chunk % 2 == 1
}

/// A kind of tensor that neighboring stages exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Payload {
    /// The input of a stage, from the stage before.
    Activation,
    /// The gradient of the output of a stage, from the stage after.
    Gradient,
}

/// A tensor that one rank sends to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    pub payload: Payload,
    /// The stage that needs it.
    pub stage: usize,
    pub microbatch: usize,
}

/// A collective over all ranks of the pipeline.
///
/// Ranks enter the collectives of one kind in the order of microbatches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CollectiveKind {
    /// C0: broadcasts the last stage's output.
    Hidden,
    /// Finds the largest logit; only with `naive`.
    Maximum,
    /// C1: combines the statistics of the logits; with `vocab-2` it also sums the input gradient.
    Statistics,
    /// C2: sums the input gradient for the last stage; except with `vocab-2`.
    HiddenGradient,
    /// Sums the parts of the embedding for the first stage.
    Embedding,
    /// Broadcasts the gradient of the first stage's input.
    EmbeddingGradient,
}

/// A collective for one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Collective {
    pub kind: CollectiveKind,
    pub microbatch: usize,
}

/// One entry of a rank's list.
///
/// Only [`Step::Compute`] takes the rank's time. The others start something that a later pass waits
/// for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Waits for the dependencies of the pass, then computes it.
    Compute(Pass),
    /// Starts to send to the rank.
    Send(Message, usize),
    /// Starts to receive from the rank.
    Receive(Message, usize),
    /// Waits until the message has been sent, and frees it. By then it is certain to have arrived.
    WaitSend(Message),
    EnterCollective(Collective),
}

/// An order with its communication: all that an executor needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    pub order: Order,
    /// The steps of each rank.
    pub ranks: Vec<Vec<Step>>,
}

#[cfg(test)]
mod tests;
