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
    let TensorSlice {
        global_shape,
        offset,
        shape,
        ..
    } = slice;
    // A vector is one row.
    let last = shape.len() - 1;
    let stride = global_shape[last];
    let rows_before = if last > 0 { offset[0] } else { 0 };
    GlobalRows {
        elements,
        skipped: 0,
        key,
        first: (rows_before * stride + offset[last]) as u64,
        columns: shape[last] as usize,
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::{Device, Kind};

    fn rounded(wide: &Tensor, slices: Vec<TensorSlice>, number: usize) -> Tensor {
        let wide = wide.contiguous();
        let out = Tensor::zeros(wide.size(), (Kind::BFloat16, Device::Cpu));
        Rounding::new(slices, 5, 7).round(&wide, &out, number);
        out
    }

    fn slice(name: &str, global: [i64; 2], rows: &Range<i64>, columns: &Range<i64>) -> TensorSlice {
        let mut slice = TensorSlice::whole(name, &global);
        slice.offset = vec![rows.start, columns.start];
        slice.shape = vec![rows.end - rows.start, columns.end - columns.start];
        slice
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn slices_of_two_tensors_round_as_the_tensors(
            [rows, columns] in [1i64..20, 1i64..20],
            cuts in any::<[prop::sample::Index; 3]>(),
            chunk in any::<[prop::sample::Index; 2]>(),
        ) {
            tch::manual_seed(rows * 100 + columns);
            let random = || Tensor::randn([rows, columns], (Kind::Float, Device::Cpu));
            let [a, b] = [random(), random()];
            let whole = |name: &str, x: &Tensor| {
                rounded(x, vec![TensorSlice::whole(name, &[rows, columns])], 1)
            };
            let [whole_a, whole_b] = [whole("a", &a), whole("b", &b)];
            // The last rows of one tensor and the first of another, and some columns of them.
            let [first, last, column] = cuts;
            let first = first.index(rows as usize) as i64;
            let last = last.index(rows as usize) as i64 + 1;
            let column = column.index(columns as usize) as i64;
            let part = |a: &Tensor, b: &Tensor| {
                let both = [a.narrow(0, first, rows - first), b.narrow(0, 0, last)];
                Tensor::cat(&both, 0).narrow(1, column, columns - column).contiguous()
            };
            let global = [rows, columns];
            let slices = vec![
                slice("a", global, &(first..rows), &(column..columns)),
                slice("b", global, &(0..last), &(column..columns)),
            ];
            let wide = part(&a, &b);
            let expected = part(&whole_a, &whole_b);
            prop_assert!(rounded(&wide, slices.clone(), 1).equal(&expected));
            // Elements that follow each other.
            let len = wide.numel();
            let start = chunk[0].index(len) as i64;
            let count = chunk[1].index(len - start as usize) as i64 + 1;
            let rounding = Rounding::new(slices, 5, 7).elements(&(start..start + count));
            let out = Tensor::zeros([count], (Kind::BFloat16, Device::Cpu));
            rounding.round(&wide.view([-1]).narrow(0, start, count), &out, 1);
            prop_assert!(out.equal(&expected.view([-1]).narrow(0, start, count)));
        }
    }

    #[test]
    fn random_numbers_differ_by_name_step_and_tensor() {
        let wide = Tensor::full([4000], 1.0 + 0.5 / 128.0, (Kind::Float, Device::Cpu));
        let of = |name: &str, step: u64, number: usize| {
            let out = Tensor::zeros([4000], (Kind::BFloat16, Device::Cpu));
            let slices = [TensorSlice::whole(name, &[4000])];
            Rounding::new(slices, 5, step).round(&wide, &out, number);
            out
        };
        let first = of("a", 1, 0);
        assert!(of("a", 1, 0).equal(&first));
        for other in [of("b", 1, 0), of("a", 2, 0), of("a", 1, 1)] {
            let equal = other
                .eq_tensor(&first)
                .to_kind(Kind::Float)
                .mean(Kind::Float);
            // Half of the elements are equal by chance.
            assert!((equal.double_value(&[]) - 0.5).abs() < 0.05);
        }
    }
}
