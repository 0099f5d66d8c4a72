//! Pipeline schedules as plain data: what every rank computes, sends and receives, in order.
//!
//! - [`schedules`] generates the known orders; a person's own can be parsed from text;
//! - [`vocabulary`] inserts the passes of vocabulary parallelism into any order;
//! - [`refine`] moves passes to where they shorten the step;
//! - [`communication`] inserts sends, receives and collectives;
//! - [`check`] proves that a schedule can run; [`simulate`] says how long it takes and what it holds; [`draw`] draws it.
//!
//! Nothing of this knows a tensor but [`Executor`], which carries a schedule out.

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

pub use execute::{CollectiveFn, Executor, Stages};
pub use text::OrderFile;

use serde::{Deserialize, Serialize};

/// A unit of computation of one stage (F, B, W) or of every rank (the vocabulary's S, T, IF and IB).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PassKind {
    /// `F`: forward of a stage.
    Forward,
    /// `BW`: backward of a stage, input and weights together.
    Backward,
    /// `B`: the gradient of a stage's input.
    BackwardInput,
    /// `W`: the gradient of a stage's weights.
    BackwardWeight,
    /// `S`: this rank's logits, their statistics, and with `vocab-2` the input gradient's parts.
    Logits,
    /// `N`: exponentials and their sum, given the largest logit of all ranks; with `naive` alone.
    Normalize,
    /// `T`: the gradient of this rank's part of the output layer, and but for `vocab-2` of its input.
    LogitsBackward,
    /// `IF`: lookup in this rank's part of the embedding.
    Embed,
    /// `IB`: the gradient of this rank's part of the embedding.
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

    /// Its name in text.
    pub fn name(self) -> &'static str {
        PassKind::NAMES
            .iter()
            .find(|(kind, _)| *kind == self)
            .map_or("", |(_, name)| name)
    }

    /// Whether every rank does it, not one stage.
    pub fn is_vocabulary(self) -> bool {
        use PassKind::*;
        matches!(
            self,
            Logits | Normalize | LogitsBackward | Embed | EmbedBackward
        )
    }

    /// Whether it gives the gradient of a stage's input.
    pub fn gives_input_gradient(self) -> bool {
        matches!(self, PassKind::Backward | PassKind::BackwardInput)
    }
}

/// One pass of one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pass {
    /// What is computed.
    pub kind: PassKind,
    /// Which of the rank's model chunks; 0 for passes of the vocabulary.
    pub chunk: usize,
    /// The microbatch, from 0 on.
    pub microbatch: usize,
}

impl Pass {
    /// A pass.
    pub fn new(kind: PassKind, chunk: usize, microbatch: usize) -> Pass {
        Pass {
            kind,
            chunk,
            microbatch,
        }
    }
}

/// How a rank's chunks lie in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Chunk `c` of rank `r` is stage `c * ranks + r`.
    Loop,
    /// As `Loop`, but every second chunk runs backwards over the ranks, so that neighbouring stages meet on one rank.
    V,
}

/// How the vocabulary's layers are computed by all ranks (arXiv 2411.05288).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vocabulary {
    /// Three barriers: the largest logit after S, the sum of exponentials after N, the input's gradient after T.
    Naive,
    /// As `vocab-1`, but all ranks stop and do S and T together (nnScaler's order, OSDI 2024).
    Interlaced,
    /// Algorithm 1, two barriers: statistics after S, the input's gradient after T.
    #[serde(rename = "vocab-1")]
    Vocab1,
    /// Algorithm 2, one barrier: statistics and the input's gradient after S.
    #[serde(rename = "vocab-2")]
    Vocab2,
}

impl Vocabulary {
    /// How many microbatches a pipeline of `ranks` ranks holds more for it: one for each collective between the last
    /// stage's forward and its backward, besides the first broadcast; half as many again where all stop for it.
    pub fn extra_microbatches(self, ranks: usize) -> usize {
        match self {
            Vocabulary::Naive => 3,
            Vocabulary::Interlaced => ranks / 2,
            Vocabulary::Vocab1 => 2,
            Vocabulary::Vocab2 => 1,
        }
    }

    /// What every rank does with the output layer for a microbatch, in order.
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

    /// Whether T also gives the input's gradient, which ranks then sum.
    pub fn gradient_after_t(self) -> bool {
        self != Vocabulary::Vocab2
    }
}

/// What every rank computes, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Microbatches of a step.
    pub microbatches: usize,
    /// Model chunks of a rank.
    pub chunks: usize,
    /// Where chunks lie.
    pub placement: Placement,
    /// Present where all ranks compute the vocabulary's layers; otherwise the first and the last stage do.
    pub vocabulary: Option<Vocabulary>,
    /// The passes of each rank.
    pub ranks: Vec<Vec<Pass>>,
}

impl Order {
    /// Stages in all.
    pub fn stages(&self) -> usize {
        self.ranks.len() * self.chunks
    }

    /// The stage that is chunk `chunk` of rank `rank`.
    pub fn stage(&self, rank: usize, chunk: usize) -> usize {
        stage_at(self.placement, self.ranks.len(), rank, chunk)
    }

    /// The rank and chunk of stage `stage`.
    pub fn rank_and_chunk(&self, stage: usize) -> (usize, usize) {
        let ranks = self.ranks.len();
        let chunk = stage / ranks;
        let at = stage % ranks;
        let turned = self.placement == Placement::V && chunk % 2 == 1;
        (if turned { ranks - 1 - at } else { at }, chunk)
    }
}

/// The stage that is chunk `chunk` of rank `rank` of `ranks`.
pub fn stage_at(placement: Placement, ranks: usize, rank: usize, chunk: usize) -> usize {
    let turned = placement == Placement::V && chunk % 2 == 1;
    chunk * ranks + if turned { ranks - 1 - rank } else { rank }
}

/// What travels between neighbouring stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Payload {
    /// The input of stage `stage`, from the stage before.
    Activation,
    /// The gradient of the output of stage `stage`, from the stage after.
    Gradient,
}

/// A tensor sent from one rank to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    /// What it is.
    pub payload: Payload,
    /// The stage that needs it.
    pub stage: usize,
    /// The microbatch.
    pub microbatch: usize,
}

/// Collectives over all ranks of the pipeline. Those of one kind are entered in the order of microbatches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CollectiveKind {
    /// C0: the last stage's output to every rank.
    Hidden,
    /// `naive` only: the largest logit.
    Maximum,
    /// C1: the statistics of the logits, with `vocab-2` also the sum of the input gradient's parts.
    Statistics,
    /// C2, but with `vocab-2`: the sum of the input gradient's parts to the last stage.
    HiddenGradient,
    /// The sum of the embedding's parts to the first stage.
    Embedding,
    /// The gradient of the first stage's input to every rank.
    EmbeddingGradient,
}

/// A collective of one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Collective {
    /// Which.
    pub kind: CollectiveKind,
    /// The microbatch.
    pub microbatch: usize,
}

/// One entry of a rank's list. Only [`Step::Compute`] takes the rank's time; the others start something that a later
/// pass waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Wait for what the pass needs, then compute.
    Compute(Pass),
    /// Start sending to the rank.
    Send(Message, usize),
    /// Start receiving from the rank.
    Receive(Message, usize),
    /// Wait until a tensor has been sent, and forget it. Stands where that is certain to have happened.
    WaitSend(Message),
    /// Enter a collective.
    EnterCollective(Collective),
}

/// An order with its communication: all that an executor needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// What is computed.
    pub order: Order,
    /// The list of each rank.
    pub ranks: Vec<Vec<Step>>,
}

#[cfg(test)]
mod tests;
