//! Memory of a block's activations, as blocks describe it.

use crate::config::layout::RecomputeConfig;
use parallel::MeshShape;

/// Bytes of an fp32 number.
pub(crate) const FP32_BYTES: u64 = 4;

/// Bytes of activations for one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Activations {
    /// Saved from forward to backward.
    pub(crate) saved: u64,
    /// Temporary tensors of backward.
    pub(crate) transient: u64,
}

/// The sequences of a microbatch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SequenceShape {
    /// Number of sequences, of which context-parallel ranks have a part each.
    pub(crate) count: usize,
    /// Tokens of a sequence, on all ranks together.
    pub(crate) length: usize,
    /// True if tokens see only their own document.
    pub(crate) has_documents: bool,
    /// True if ring attention splits sequences over ranks.
    pub(crate) in_ring: bool,
}

/// Everything that a block's activations on a rank depend on, besides the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockShape<'a> {
    pub(crate) mesh: MeshShape,
    /// Tokens of a microbatch inside a block, where tensor-parallel ranks split the matrices.
    pub(crate) tokens: u64,
    /// Tokens of a microbatch between blocks, where tensor-parallel ranks split the tokens.
    pub(crate) own_tokens: u64,
    /// Bytes of an element in the model's dtype.
    pub(crate) element: u64,
    pub(crate) recompute: &'a RecomputeConfig,
    /// True if the model is on the CPU.
    pub(crate) on_host: bool,
    pub(crate) sequences: SequenceShape,
}
