//! The sequence positions of a tensor's rows.

/// The rule that maps the number of a row to its position.
#[derive(Clone, Copy)]
pub(crate) struct RowPositions {
    /// Number of consecutive rows with the same position.
    pub(crate) rows_per_position: usize,
    /// Number of positions in a sequence, after which they repeat.
    pub(crate) positions: usize,
}

impl RowPositions {
    #[inline(always)]
    pub(crate) fn of_row(self, row: usize) -> usize {
        row / self.rows_per_position % self.positions
    }
}
