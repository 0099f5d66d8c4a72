//! The sequence positions of a tensor's rows.

/// The rule that maps the number of a row to its position and its token.
#[derive(Clone, Copy)]
pub(crate) struct RowPositions {
    /// Number of consecutive rows with the same position.
    pub(crate) rows_per_position: usize,
    /// Number of positions in a sequence, after which they repeat.
    pub(crate) positions: usize,
    /// Number of consecutive rows of a sequence.
    pub(crate) rows_per_sequence: usize,
}

impl RowPositions {
    /// Returns the position of a row in its sequence.
    #[inline(always)]
    pub(crate) fn of_row(self, row: usize) -> usize {
        row / self.rows_per_position % self.positions
    }

    /// Returns the number of a row's token among the tokens of all sequences.
    #[inline(always)]
    pub(crate) fn token_of_row(self, row: usize) -> usize {
        row / self.rows_per_sequence * self.positions + self.of_row(row)
    }
}
