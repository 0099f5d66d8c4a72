//! Facts of a microbatch that all layers use.

use super::documents::{DocumentPositions, Documents};
use std::sync::Arc;

/// Facts of a microbatch that all layers use.
#[derive(Clone)]
pub(crate) struct BatchContext {
    pub(crate) sequences: i64,
    /// Set if tokens attend only within their document.
    pub(crate) documents: Option<Arc<Documents>>,
    /// Set if positions begin at 0 in each document.
    pub(crate) positions: Option<Arc<DocumentPositions>>,
}

impl BatchContext {
    /// Returns the context of sequences that are one text each.
    pub(crate) fn of_whole_sequences(sequences: i64) -> BatchContext {
        BatchContext {
            sequences,
            documents: None,
            positions: None,
        }
    }
}
