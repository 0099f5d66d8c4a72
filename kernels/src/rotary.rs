//! Rotary position embedding (arXiv 2104.09864) in the half-split form.
//!
//! Elements `i` and `i + n / 2` of the first `n` of a head form a pair that rotates by the angle of
//! its position. The other elements of a head stay.

use crate::{
    cuda,
    number::Number,
    positions::RowPositions,
    profile::{Cost, span},
    rows::{HostData, for_kind, for_rows, host_kind},
    tensors::sizes,
};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Rotates `x` `[batch, heads, sequence, d]` by `cos` and `sin` `[sequence, n / 2]` of its dtype,
/// for `n` up to `d`.
///
/// The result has the memory layout of `x`: heads before positions, or after them.
pub fn apply_rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let cost = || Cost::passes(2.0, x);
    span("rotary", "forward", cost, || {
        let [_, heads, positions] = sizes(x);
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
            positions,
        };
        if let Some(gpu) = cuda::gpu(&[&flat, cos, sin]) {
            return like_x(cuda::apply_rotary(gpu, &flat, cos, sin, order));
        }
        let Some(kind) = host_kind(&[&flat, cos, sin]) else {
            return by_libtorch(x, cos, sin);
        };
        let out = flat.empty_like();
        for_kind!(kind, on_threads(&flat, cos, sin, &out, order));
        like_x(out)
    })
}

fn by_libtorch(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let [width, half] = [x, cos].map(|tensor| tensor.size()[tensor.dim() - 1]);
    let out = x.empty_like();
    let store = |start: i64, value: &Tensor| {
        let mut part = out.narrow(-1, start, value.size()[value.dim() - 1]);
        part.copy_(value);
    };
    let [first, second] = [0, half].map(|start| x.narrow(-1, start, half));
    store(0, &(&first * cos - &second * sin));
    store(half, &(&second * cos + &first * sin));
    store(2 * half, &x.narrow(-1, 2 * half, width - 2 * half));
    out
}

/// Number of rows that a thread rotates at once.
const ROWS: usize = 16;

fn on_threads<T>(x: &Tensor, cos: &Tensor, sin: &Tensor, out: &Tensor, order: RowPositions)
where
    T: Number,
{
    let [_, _, _, width] = sizes(x);
    let [_, half] = sizes(cos);
    let count = x.numel().checked_div(width).unwrap_or(0);
    let [cos, sin] = [cos, sin].map(|table| table.to_kind(Kind::Float));
    // SAFETY: `host_kind` has checked `x`, and the caller creates `out`.
    let [x, out] = unsafe { HostData::<T>::of_all([x, out]) };
    // SAFETY: `host_kind` has checked the tables, which are fp32 now.
    let [cos, sin] = unsafe { HostData::<f32>::of_all([&cos, &sin]) };
    let angles = Angles {
        half,
        cos: cos.rows(&(0..order.positions), half),
        sin: sin.rows(&(0..order.positions), half),
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

/// The tables of the angles, `[positions, half]` each.
#[derive(Clone, Copy)]
struct Angles<'a> {
    half: usize,
    cos: &'a [f32],
    sin: &'a [f32],
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
    let Angles { half, cos, sin } = angles;
    for (wide, x) in wide.iter_mut().zip(x) {
        *wide = x.wide();
    }
    for (row, elements) in wide.chunks_exact_mut(width).enumerate() {
        let at = order.of_row(start + row) * half;
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

    #[test]
    fn pairs_rotate_by_the_angle_of_their_position() {
        for (kind, tolerance) in tolerances(1e-6, 2e-2) {
            let random = |shape: &[i64]| randn(shape, kind);
            let cos = random(&[5, 3]);
            let sin = random(&[5, 3]);
            // Heads after positions, heads before positions, a view with gaps, and a head of which
            // only the first elements turn.
            let layouts = [
                random(&[2, 5, 4, 6]).transpose(1, 2),
                random(&[2, 4, 5, 6]),
                random(&[2, 5, 8, 6]).narrow(2, 1, 4).transpose(1, 2),
                random(&[2, 5, 4, 9]).transpose(1, 2),
            ];
            for x in layouts {
                let ours = apply_rotary(&x, &cos, &sin).to_f64();
                let close = |ours: &Tensor| {
                    let plain = plain(&x, &cos, &sin);
                    ours.allclose(&plain, tolerance, tolerance, false)
                };
                assert!(close(&ours), "{kind:?}");
                assert!(close(&by_libtorch(&x, &cos, &sin).to_f64()), "{kind:?}");
            }
        }
    }

    /// Rotates by the formula, in fp64.
    fn plain(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let [x, cos, sin] = [x, cos, sin].map(Tensor::to_f64);
        let half = cos.size()[1];
        let rest = x.size()[3] - 2 * half;
        let parts = x.split_with_sizes([half, half, rest], -1);
        let rotated = [
            &parts[0] * &cos - &parts[1] * &sin,
            &parts[1] * &cos + &parts[0] * &sin,
            parts[2].shallow_clone(),
        ];
        Tensor::cat(&rotated, -1)
    }
}
