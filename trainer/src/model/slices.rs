//! Global slices of the rows of a tensor.

use checkpoint::TensorSlice;
use std::ops::Range;

/// Rows of a parameter that are a slice of a global tensor.
#[derive(Debug, Clone)]
pub(crate) struct RowSlice {
    pub(super) slice: TensorSlice,
    pub(super) rows: Range<i64>,
}

/// Assigns consecutive rows to slices.
pub(super) fn row_slices(slices: Vec<TensorSlice>) -> Vec<RowSlice> {
    let mut next = 0;
    let row_slice = |slice: TensorSlice| {
        let rows = next..next + slice.shape[0];
        next = rows.end;
        RowSlice { slice, rows }
    };
    slices.into_iter().map(row_slice).collect()
}

/// Returns the parts of slices that lie in the rows `wanted`, with their rows.
pub(super) fn slices_in_rows(
    row_slices: &[RowSlice],
    wanted: &Range<i64>,
) -> impl Iterator<Item = (TensorSlice, Range<i64>)> {
    row_slices
        .iter()
        .filter_map(move |RowSlice { slice, rows }| {
            let start = rows.start.max(wanted.start);
            let end = rows.end.min(wanted.end);
            if start >= end {
                return None;
            }
            let mut slice = slice.clone();
            slice.offset[0] += start - rows.start;
            slice.shape[0] = end - start;
            Some((slice, start..end))
        })
}

/// Returns the parts of `slices`, which follow each other by rows, that lie in the rows `own`.
pub(crate) fn slices_of_rows(slices: Vec<TensorSlice>, own: &Range<i64>) -> Vec<TensorSlice> {
    let row_slices = row_slices(slices);
    let parts = slices_in_rows(&row_slices, own);
    parts.map(|(slice, _)| slice).collect()
}

/// Returns a slice of the tensor `name` of shape `global`: the range `along` in dimension `dim`,
/// and all of the other dimensions.
pub(crate) fn slice(name: &str, global: &[i64], dim: usize, along: &Range<i64>) -> TensorSlice {
    let mut slice = TensorSlice::whole(name, global);
    slice.offset[dim] = along.start;
    slice.shape[dim] = along.end - along.start;
    slice
}
