//! Rows of parameters that scale the scores of attention heads.

use std::ops::Range;

/// Rows of one parameter of an attention block that make queries or keys: the same part of the rows
/// of each head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ScoreRows {
    /// Name of the parameter within its block.
    pub(crate) part: &'static str,
    /// Rows of each head.
    pub(crate) head_rows: usize,
    /// The part, within the rows of each head.
    pub(crate) rows: Range<usize>,
    pub(crate) makes: ScorePart,
}

/// The part of a score that rows make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScorePart {
    /// A query whose key is made by rows of kind `Key`.
    Query,
    /// The key of one or more query heads.
    Key,
    /// A query whose key all heads of the block share.
    QueryOfSharedKey,
}

/// The rows of an attention block that make queries and keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockScoreRows {
    /// Number of query heads.
    pub(crate) heads: usize,
    /// Number of key heads. Each serves the same number of consecutive query heads.
    pub(crate) key_heads: usize,
    pub(crate) parts: Vec<ScoreRows>,
}
