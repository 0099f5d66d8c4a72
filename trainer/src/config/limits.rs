//! Largest sizes that a configuration may give. They are far above any real model, and so small
//! that the products of a few of them do not overflow 64 bits.

/// Ranks of a run, and of each axis.
pub(crate) const MAX_RANKS: usize = 1 << 20;
/// Layers of a model.
pub(crate) const MAX_LAYERS: usize = 1 << 14;
/// Heads of a layer.
pub(crate) const MAX_HEADS: usize = 1 << 16;
/// Widths: hidden, of a head, and of a feed-forward network.
pub(crate) const MAX_WIDTH: usize = 1 << 24;
/// Experts of a layer.
pub(crate) const MAX_EXPERTS: usize = 1 << 16;
/// Token ids are 32-bit integers.
pub(crate) const MAX_VOCABULARY: usize = 1 << 31;
/// Tokens of a sequence.
pub(crate) const MAX_TOKENS: usize = 1 << 30;
/// Sequences of a step.
pub(crate) const MAX_SEQUENCES: usize = 1 << 30;
/// Chunks into which ranks split a transfer.
pub(crate) const MAX_CHUNKS: usize = 1 << 10;
/// Nodes of a redundancy group: the erasure code's symbols are bytes.
pub(crate) const MAX_GROUP: usize = 254;
/// Checkpoints that a run keeps.
pub(crate) const MAX_CHECKPOINTS: usize = 1 << 30;
/// Parameters of a model.
pub(crate) const MAX_PARAMETERS: u128 = 1 << 50;
/// Elements of the largest tensor of a microbatch.
pub(crate) const MAX_ACTIVATION: u128 = 1 << 42;
/// Layers times ranks of an estimate of memory.
pub(crate) const MAX_ESTIMATED_LAYERS: usize = 1 << 23;
/// Timeouts: about thirty years.
pub(crate) const MAX_SECONDS: u64 = 1_000_000_000;
