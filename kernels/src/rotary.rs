//! Rotary position embedding (arXiv 2104.09864) in the half-split form.
//!
//! Elements `i` and `i + n / 2` of the first `n` of a head form a pair that rotates by the angle of
//! its position. The other elements of a head stay.

use crate::{
    cuda,
    number::Number,
    positions::RowPositions,
    profile::{Cost, span},
    rotary_tables::RotaryTables,
    rows::{HostData, Indices, for_kind, for_rows, host_kind},
    tensors::sizes,
};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Rotates `x` `[batch, heads, sequence, d]` by `cos` and `sin` `[rows, n / 2]` of its dtype, for
/// `n` up to `d`.
///
/// `positions` `[batch, sequence]` int64 holds the row of the tables that each token rotates by.
/// Without it, every sequence rotates by the first rows in order. The result has the memory layout
/// of `x`: heads before positions, or after them.
///
/// # Panics
/// If the positions have another shape, dtype or device, or the tables have too few rows for a
/// sequence without them. On the host also if a position is not a row of the tables, which GPUs do
/// not check.
pub fn apply_rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: Option<&Tensor>) -> Tensor {
    let cost = || Cost::passes(2.0, x);
    span("rotary", "forward", cost, || {
        let [batch, heads, length] = sizes(x);
        let positions = positions.map(|positions| {
            let expected = (x.device(), Kind::Int64);
            assert_eq!((positions.device(), positions.kind()), expected);
            assert_eq!(sizes(positions), [batch, length]);
            positions.contiguous()
        });
        let positions = positions.as_ref();
        let [rows] = sizes(cos);
        assert!(positions.is_some() || rows >= length);
        // A projection leaves memory order `[batch, sequence, heads, d]`.
        let heads_first = x.is_contiguous();
        let flat = if heads_first {
            x.shallow_clone()
        } else {
            x.transpose(1, 2)
        };
        let like_x = |out: Tensor| {
            if heads_first {
                out
            } else {
                out.transpose(1, 2)
            }
        };
        let order = RowPositions {
            rows_per_position: if heads_first { 1 } else { heads },
            positions: length,
            rows_per_sequence: heads * length,
        };
        let tables = RotaryTables {
            cos,
            sin,
            positions,
        };
        if let Some(gpu) = cuda::gpu(&[&flat, cos, sin]) {
            return like_x(cuda::apply_rotary(gpu, &flat, tables, order));
        }
        let Some(kind) = host_kind(&[&flat, cos, sin]) else {
            return by_libtorch(x, tables);
        };
        let out = flat.empty_like();
        for_kind!(kind, on_threads(&flat, tables, &out, order));
        like_x(out)
    })
}

fn by_libtorch(x: &Tensor, tables: RotaryTables) -> Tensor {
    let [width, half] = [x, tables.cos].map(|tensor| tensor.size()[tensor.dim() - 1]);
    let length = x.size()[2];
    let of_tokens = |table: &Tensor| match tables.positions {
        None => table.narrow(0, 0, length),
        Some(positions) => {
            let rows = table.index_select(0, &positions.flatten(0, -1));
            rows.view([-1, 1, length, half])
        }
    };
    let [cos, sin] = [tables.cos, tables.sin].map(of_tokens);
    let out = x.empty_like();
    let store = |start: i64, value: &Tensor| {
        let mut part = out.narrow(-1, start, value.size()[value.dim() - 1]);
        part.copy_(value);
    };
    let [first, second] = [0, half].map(|start| x.narrow(-1, start, half));
    store(0, &(&first * &cos - &second * &sin));
    store(half, &(&second * &cos + &first * &sin));
    store(2 * half, &x.narrow(-1, 2 * half, width - 2 * half));
    out
}

/// Number of rows that a thread rotates at once.
const ROWS: usize = 16;

fn on_threads<T>(x: &Tensor, tables: RotaryTables, out: &Tensor, order: RowPositions)
where
    T: Number,
{
    let [_, _, _, width] = sizes(x);
    let [rows, half] = sizes(tables.cos);
    let count = x.numel().checked_div(width).unwrap_or(0);
    let [cos, sin] = [tables.cos, tables.sin].map(|table| table.to_kind(Kind::Float));
    // SAFETY: `host_kind` has checked `x`, and the caller creates `out`.
    let [x, out] = unsafe { HostData::<T>::of_all([x, out]) };
    // SAFETY: `host_kind` has checked the tables, which are fp32 now.
    let [cos, sin] = unsafe { HostData::<f32>::of_all([&cos, &sin]) };
    let positions = tables.positions.map(|positions| {
        // SAFETY: the caller has made them contiguous, and checked their device and dtype.
        let tokens = unsafe { Indices::<i64>::of(positions) };
        (tokens, positions.numel())
    });
    let angles = Angles {
        half,
        cos: cos.rows(&(0..rows), half),
        sin: sin.rows(&(0..rows), half),
        positions: positions
            .as_ref()
            .map(|(tokens, count)| tokens.rows(&(0..*count), 1)),
    };
    for_rows(count, width, |_, rows| {
        let mut wide = vec![0.0; ROWS * width];
        for start in rows.clone().step_by(ROWS) {
            let rows = start..(start + ROWS).min(rows.end);
            let x = x.rows(&rows, width);
            // SAFETY: each row belongs to one thread.
            let rotated = unsafe { out.rows_mut(&rows, width) };
            let wide = &mut wide[..x.len()];
            rotate_rows(x, start, order, angles, wide, rotated, width);
        }
    });
}

/// The tables of the angles, `[rows, half]` each.
#[derive(Clone, Copy)]
struct Angles<'a> {
    half: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    /// The row of each token, unless the row is the token's position.
    positions: Option<&'a [i64]>,
}

/// Rotates rows of `width` elements from row number `start`, in the fp32 buffer `wide`.
///
/// Without the buffer, the loops over short bf16 rows would not compile to vector code.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn rotate_rows<T>(
    x: &[T],
    start: usize,
    order: RowPositions,
    angles: Angles,
    wide: &mut [f32],
    out: &mut [T],
    width: usize,
) where
    T: Number,
{
    let Angles {
        half,
        cos,
        sin,
        positions,
    } = angles;
    for (wide, x) in wide.iter_mut().zip(x) {
        *wide = x.wide();
    }
    for (row, elements) in wide.chunks_exact_mut(width).enumerate() {
        let row = start + row;
        let position = match positions {
            None => order.of_row(row),
            Some(positions) => positions[order.token_of_row(row)] as usize,
        };
        let at = position * half;
        let cos = &cos[at..at + half];
        let sin = &sin[at..at + half];
        let (first, second) = elements.split_at_mut(half);
        let pairs = first.iter_mut().zip(&mut second[..half]);
        for ((first, second), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
            let rotated = *first * cos - *second * sin;
            *second = *second * cos + *first * sin;
            *first = rotated;
        }
    }
    for (out, wide) in out.iter_mut().zip(&*wide) {
        *out = T::narrow(*wide);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::{TestTensor, randn, tolerances};
    use tch::Device;

    /// Returns tensors `[2, 4, 5, d]` with heads after positions, with heads before positions, as a
    /// view with gaps, and with heads of which only the first 6 elements turn.
    fn layouts(kind: Kind) -> [Tensor; 4] {
        let random = |shape: &[i64]| randn(shape, kind);
        [
            random(&[2, 5, 4, 6]).transpose(1, 2),
            random(&[2, 4, 5, 6]),
            random(&[2, 5, 8, 6]).narrow(2, 1, 4).transpose(1, 2),
            random(&[2, 5, 4, 9]).transpose(1, 2),
        ]
    }

    #[test]
    fn pairs_rotate_by_the_angle_of_their_position() {
        let positions = [3i64, 4, 0, 1, 2, 0, 0, 6, 1, 2];
        let positions = Tensor::from_slice(&positions).view([2, 5]);
        for (kind, tolerance) in tolerances(1e-6, 2e-2) {
            for (rows, positions) in [(5, None), (7, Some(&positions))] {
                let [cos, sin] = [(); 2].map(|()| randn(&[rows, 3], kind));
                let tables = RotaryTables {
                    cos: &cos,
                    sin: &sin,
                    positions,
                };
                for x in layouts(kind) {
                    let plain = plain(&x, tables);
                    let close = |ours: &Tensor| {
                        let ours = ours.to_f64();
                        ours.allclose(&plain, tolerance, tolerance, false)
                    };
                    assert!(close(&apply_rotary(&x, &cos, &sin, positions)), "{kind:?}");
                    assert!(close(&by_libtorch(&x, tables)), "{kind:?}");
                }
            }
        }
    }

    #[test]
    fn positions_in_order_give_the_bits_of_none() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let [cos, sin] = [(); 2].map(|()| randn(&[5, 3], kind));
            let in_order = Tensor::arange(5, (Kind::Int64, Device::Cpu)).expand([2, 5], false);
            for x in layouts(kind) {
                let without = apply_rotary(&x, &cos, &sin, None);
                assert_eq!(apply_rotary(&x, &cos, &sin, Some(&in_order)), without);
            }
        }
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn a_position_outside_of_the_tables_is_refused() {
        let [cos, sin] = [(); 2].map(|()| randn(&[4, 3], Kind::Float));
        let positions = Tensor::from_slice(&[0i64, 4]).view([1, 2]);
        let x = randn(&[1, 1, 2, 6], Kind::Float);
        let _ = apply_rotary(&x, &cos, &sin, Some(&positions));
    }

    /// Rotates token by token by the formula, in fp64.
    fn plain(x: &Tensor, tables: RotaryTables) -> Tensor {
        let out = x.to_f64().copy();
        let half = tables.cos.size()[1];
        let [batch, _, length] = sizes(x);
        for sequence in 0..batch as i64 {
            for token in 0..length as i64 {
                let given = tables.positions;
                let row = given.map_or(token, |given| given.int64_value(&[sequence, token]));
                let [cos, sin] = [tables.cos, tables.sin].map(|table| table.get(row).to_f64());
                let mut heads = out.get(sequence).narrow(1, token, 1).squeeze_dim(1);
                let first = heads.narrow(1, 0, half).copy();
                let second = heads.narrow(1, half, half).copy();
                let rotated = [
                    &first * &cos - &second * &sin,
                    &second * &cos + &first * &sin,
                ];
                heads = heads.narrow(1, 0, 2 * half);
                heads.copy_(&Tensor::cat(&rotated, 1));
            }
        }
        out
    }
}
