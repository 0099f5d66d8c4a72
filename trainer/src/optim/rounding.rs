//! Stochastic rounding of the optimizer's state to bf16.
//!
//! The random numbers depend on the global name and index of an element, the step and the seed, so
//! that every layout rounds alike.

use checkpoint::TensorSlice;
use kernels::{GlobalRows, round_stochastically};
use std::{ops::Range, sync::Arc};
use tch::Tensor;

/// Positions of the elements of an update in the global tensors.
#[derive(Clone)]
pub(crate) struct Rounding {
    rows: Arc<[GlobalRows]>,
    /// First of the elements.
    start: i64,
}

impl Rounding {
    /// Returns the positions of a tensor whose rows are `slices`, for the random numbers of a step.
    pub(crate) fn new(
        slices: impl IntoIterator<Item = TensorSlice>,
        seed: u64,
        step: u64,
    ) -> Rounding {
        let mut start = 0;
        let rows = slices.into_iter().map(|slice| {
            let elements = start..start + slice.shape.iter().product::<i64>() as usize;
            start = elements.end;
            global_rows(&slice, elements, hash([seed, step], &slice.name))
        });
        Rounding {
            rows: rows.collect(),
            start: 0,
        }
    }

    pub(crate) fn elements(&self, range: &Range<i64>) -> Rounding {
        Rounding {
            rows: self.rows.clone(),
            start: self.start + range.start,
        }
    }

    /// Rounds `wide` to tensor `number` of the state.
    pub(crate) fn round(&self, wide: &Tensor, rounded: &Tensor, number: usize) {
        let start = self.start as usize;
        let range = start..start + wide.numel();
        let rows = self.rows.iter().filter_map(|rows| rows.within(&range));
        // Tensors of one parameter have random numbers of their own.
        let rows = rows.map(|rows| GlobalRows {
            key: hash([rows.key, number as u64], ""),
            ..rows
        });
        round_stochastically(wide, rounded, &rows.collect::<Vec<_>>());
    }
}

fn global_rows(slice: &TensorSlice, elements: Range<usize>, key: u64) -> GlobalRows {
    let (columns, stride, first_column) = match slice.shape[..] {
        [_, columns] => (columns, slice.global_shape[1], slice.offset[1]),
        _ => (1, 1, 0),
    };
    GlobalRows {
        elements,
        skipped: 0,
        key,
        first: (slice.offset[0] * stride + first_column) as u64,
        columns: columns as usize,
        stride: stride as u64,
    }
}

/// Returns an FNV-1a hash, which is equal on all machines.
fn hash(numbers: [u64; 2], name: &str) -> u64 {
    let bytes = numbers.into_iter().flat_map(u64::to_le_bytes);
    bytes
        .chain(name.bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        })
}
