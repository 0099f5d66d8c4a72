//! Stochastic rounding to bf16, with random numbers that depend only on an element's position.

use crate::{
    number::{Bf16, Number},
    profile::{Cost, span},
    rows::{HostData, for_rows, host_kind},
};
use multiversion::multiversion;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Elements of a chunk.
const WIDTH: usize = 1024;
/// Increment and multipliers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLIERS: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];
/// Its shifts, before each multiplication and after the last.
const SHIFTS: [u32; 3] = [30, 27, 31];

/// Rows of a global matrix that follow each other in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GlobalRows {
    /// Elements of the tensor in memory, seen as one row.
    pub elements: Range<usize>,
    /// Elements of the first row that lie before `elements`.
    pub skipped: usize,
    /// Seed of the random numbers of the global matrix.
    pub key: u64,
    /// Index of the first row's first element in the global matrix.
    pub first: u64,
    /// Elements of a row that are in memory.
    pub columns: usize,
    /// Elements of a row of the global matrix.
    pub stride: u64,
}

impl GlobalRows {
    /// Returns the part that lies in the elements `range`, with positions that begin there.
    pub fn within(&self, range: &Range<usize>) -> Option<GlobalRows> {
        let start = self.elements.start.max(range.start);
        let end = self.elements.end.min(range.end);
        (start < end).then(|| {
            let skipped = self.skipped + start - self.elements.start;
            let row = skipped / self.columns;
            GlobalRows {
                elements: start - range.start..end - range.start,
                skipped: skipped % self.columns,
                first: self.first + row as u64 * self.stride,
                ..self.clone()
            }
        })
    }
}

/// Rounds fp32 numbers to `rounded`, bf16, up or down with probabilities that make the mean of the
/// results the number. `rows` cover all elements.
///
/// The same on every device.
pub fn round_stochastically(wide: &Tensor, rounded: &Tensor, rows: &[GlobalRows]) {
    let cost = || Cost::passes(1.5, wide);
    span("optimizer", "stochastic rounding", cost, || {
        let is_on_host = host_kind(&[wide]) == Some(Kind::Float)
            && host_kind(&[rounded]) == Some(Kind::BFloat16);
        if is_on_host {
            on_threads(wide, rounded, rows);
        } else {
            tch::no_grad(|| by_libtorch(wide, rounded, rows));
        }
    });
}

fn on_threads(wide: &Tensor, rounded: &Tensor, rows: &[GlobalRows]) {
    // SAFETY: the caller has checked device, layout and dtype.
    let wide = unsafe { HostData::<f32>::of(wide) };
    // SAFETY: as above.
    let rounded = unsafe { HostData::<Bf16>::of(rounded) };
    for rows in rows {
        let count = rows.elements.len();
        for_rows(count.div_ceil(WIDTH), WIDTH, |_, chunks| {
            let start = rows.elements.start;
            let range = start + chunks.start * WIDTH..start + (chunks.end * WIDTH).min(count);
            let Some(part) = rows.within(&range) else {
                return;
            };
            // SAFETY: each chunk belongs to one thread.
            let out = unsafe { rounded.rows_mut(&range, 1) };
            round_rows(wide.rows(&range, 1), out, &part);
        });
    }
}

fn round_rows(wide: &[f32], out: &mut [Bf16], rows: &GlobalRows) {
    let mut done = 0;
    let mut index = rows.first + rows.skipped as u64;
    let mut len = rows.columns - rows.skipped;
    while done < wide.len() {
        let end = (done + len).min(wide.len());
        round_row(&wide[done..end], &mut out[done..end], rows.key, index);
        index += rows.stride - (rows.columns - len) as u64;
        len = rows.columns;
        done = end;
    }
}

/// Returns the 16 random bits of an element.
#[inline(always)]
fn random_bits(key: u64, index: u64) -> u32 {
    let mut z = index.wrapping_mul(INCREMENT);
    z = z.wrapping_add(key);
    for (shift, multiplier) in SHIFTS.into_iter().zip(MULTIPLIERS) {
        z ^= z >> shift;
        z = z.wrapping_mul(multiplier);
    }
    z ^= z >> SHIFTS[2];
    (z >> 48) as u32
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn round_row(wide: &[f32], out: &mut [Bf16], key: u64, first: u64) {
    let elements = out.iter_mut().zip(wide);
    for (index, (out, x)) in (first..).zip(elements) {
        let bits = x.to_bits().wrapping_add(random_bits(key, index));
        let bits = bits & 0xffff_0000;
        // NaN and infinities have no neighbors to round to.
        *out = Bf16::narrow(if x.is_finite() {
            f32::from_bits(bits)
        } else {
            *x
        });
    }
}

fn by_libtorch(wide: &Tensor, rounded: &Tensor, rows: &[GlobalRows]) {
    let device = wide.device();
    for rows in rows {
        let start = rows.elements.start as i64;
        let len = rows.elements.len() as i64;
        let x = wide.view([-1]).narrow(0, start, len);
        let positions = Tensor::arange(len, (Kind::Int64, device)) + rows.skipped as i64;
        let columns = rows.columns as i64;
        let row = positions.divide_scalar_mode(columns, "floor");
        let index = positions + row * (rows.stride as i64 - columns) + rows.first as i64;
        let mut z = index * INCREMENT as i64 + rows.key as i64;
        for (shift, multiplier) in SHIFTS.into_iter().zip(MULTIPLIERS) {
            z = z.bitwise_xor_tensor(&shifted(&z, shift)) * multiplier as i64;
        }
        z = z.bitwise_xor_tensor(&shifted(&z, SHIFTS[2]));
        let random = shifted(&z, 48).to_kind(Kind::Int);
        let bits = (x.view_dtype(Kind::Int) + random).bitwise_and(-65536);
        let finite = x.isfinite();
        let result = bits.view_dtype(Kind::Float).where_self(&finite, &x);
        rounded.view([-1]).narrow(0, start, len).copy_(&result);
    }
}

/// Shifts int64 numbers to the right, with zeros from the left.
fn shifted(x: &Tensor, bits: u32) -> Tensor {
    let mask = (1i64 << (64 - bits)) - 1;
    x.bitwise_right_shift_tensor_scalar(i64::from(bits))
        .bitwise_and(mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::{TestTensor, randn};
    use proptest::prelude::*;
    use tch::Device;

    /// The rows of a whole matrix.
    fn whole(key: u64, rows: usize, columns: usize) -> GlobalRows {
        GlobalRows {
            elements: 0..rows * columns,
            skipped: 0,
            key,
            first: 0,
            columns,
            stride: columns as u64,
        }
    }

    fn rounded(x: &Tensor, rows: &[GlobalRows]) -> Tensor {
        let out = Tensor::zeros(x.size(), (Kind::BFloat16, Device::Cpu));
        round_stochastically(x, &out, rows);
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn parts_of_a_matrix_round_as_the_whole(
            [rows, columns] in [1i64..40, 1i64..90],
            cuts in [0.0..1.0, 0.0..1.0, 0.0..1.0],
            key: u64,
            threads in 1i32..4,
        ) {
            tch::set_num_threads(threads);
            let x = randn(&[rows, columns], Kind::Float);
            let all = [whole(key, rows as usize, columns as usize)];
            let out = rounded(&x, &all);
            let theirs = out.zeros_like();
            by_libtorch(&x, &theirs, &all);
            prop_assert!(out.equal(&theirs));
            let at = |cut: f64, len: i64| (cut * (len + 1) as f64) as i64;
            // Any elements that follow each other.
            let count = rows * columns;
            let start = at(cuts[0], count - 1);
            let len = at(cuts[1], count - start);
            let flat = |x: &Tensor| {
                let row = x.view([-1]);
                row.narrow(0, start, len)
            };
            let range = start as usize..(start + len) as usize;
            let part = all[0].within(&range);
            let part: Vec<GlobalRows> = part.into_iter().collect();
            let ours = rounded(&flat(&x), &part);
            prop_assert!(ours.equal(&flat(&out)));
            // Some columns of all rows.
            let first = at(cuts[2], columns - 1);
            let some = |x: &Tensor| x.narrow(1, first, columns - first);
            let of_columns = GlobalRows {
                elements: 0..(rows * (columns - first)) as usize,
                first: first as u64,
                columns: (columns - first) as usize,
                ..all[0].clone()
            };
            let ours = rounded(&some(&x).contiguous(), &[of_columns]);
            prop_assert!(ours.equal(&some(&out)));
        }

        #[test]
        fn results_are_neighbors(bits: u32, key: u64) {
            let x = f32::from_bits(bits);
            let one = whole(key, 1, 1);
            let result = rounded(&Tensor::from_slice(&[x]), &[one]);
            let result = result.to_f64().double_value(&[0]);
            let down = bits & 0xffff_0000;
            let up = down.wrapping_add(0x1_0000);
            let neighbors = [down, up].map(|bits| f64::from(f32::from_bits(bits)));
            if x.is_finite() {
                prop_assert!(neighbors.contains(&result), "{x} {result}");
            } else {
                prop_assert_eq!(result.is_nan(), x.is_nan());
                prop_assert!(!result.is_finite());
            }
        }
    }

    #[test]
    fn the_mean_of_the_results_is_the_number() {
        let count = 1 << 20;
        // A quarter of the way from 1 to the next bf16 number.
        let x = Tensor::full([count], 1.0 + 0.25 / 128.0, (Kind::Float, Device::Cpu));
        let with_key = |key| rounded(&x, &[whole(key, 1, count as usize)]);
        let share = |chosen: Tensor| {
            let mean = chosen.to_f64().mean(Kind::Double);
            mean.double_value(&[])
        };
        let results = with_key(7);
        let ups = share(results.gt(1.0));
        assert!((ups - 0.25).abs() < 2e-3, "{ups}");
        let equal = share(results.eq_tensor(&with_key(8)));
        // Equal by chance: 1/16 + 9/16.
        assert!((equal - 0.625).abs() < 5e-3, "{equal}");
    }
}
