//! Options of causal attention.

/// Options of causal attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionOptions {
    /// Factor of the scores.
    pub scale: f64,
    /// Number of positions that a query sees: its own and those just before it (arXiv 2004.05150,
    /// section 3.1). All earlier ones if unset.
    pub window: Option<i64>,
}

impl AttentionOptions {
    /// Returns the largest number of keys that a query of a sequence of `length` sees.
    pub(super) fn keys_per_query(&self, length: usize) -> usize {
        self.window
            .map_or(length, |window| length.min(window as usize))
    }
}
