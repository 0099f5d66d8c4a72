//! Rotary position embedding (arXiv 2104.09864) in the half-split form: element `i` of a head turns with element
//! `i + head_dim / 2`.

use crate::cuda;
use crate::number::Number;
use crate::profile::{Cost, part};
use crate::rows::{Numbers, for_kind, for_rows, host_kind};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// `x` `[batch, heads, sequence, d]` turned by `cos` and `sin` `[sequence, d / 2]` of its dtype, laid out in memory as `x` is:
/// heads before positions, or after them.
pub fn apply_rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let cost = || Cost::passes(2.0, x);
    part("rotation", "both", cost, || {
        let heads = x.size()[1] as usize;
        let positions = x.size()[2] as usize;
        // In memory `[batch, sequence, heads, d]`, as a projection leaves it, or as it says.
        let (flat, between) = if x.is_contiguous() {
            (x.shallow_clone(), 1)
        } else {
            (x.transpose(1, 2), heads)
        };
        let as_x = |out: Tensor| {
            if between == 1 {
                out
            } else {
                out.transpose(1, 2)
            }
        };
        if let Some(gpu) = cuda::gpu(&[&flat, cos, sin]) {
            return as_x(cuda::apply_rotary(
                gpu,
                &flat,
                [cos, sin],
                between,
                positions,
            ));
        }
        let Some(kind) = host_kind(&[&flat, cos, sin]) else {
            let halves = x.chunk(2, -1);
            let out = x.empty_like();
            let parts = out.chunk(2, -1);
            parts[0]
                .shallow_clone()
                .copy_(&(&halves[0] * cos - &halves[1] * sin));
            parts[1]
                .shallow_clone()
                .copy_(&(&halves[1] * cos + &halves[0] * sin));
            return out;
        };
        let out = flat.empty_like();
        for_kind!(
            kind,
            on_threads(&flat, [cos, sin], &out, (between, positions))
        );
        as_x(out)
    })
}

/// Rows of a thread that are turned at a time.
const ROWS: usize = 16;

fn on_threads<T: Number>(
    x: &Tensor,
    [cos, sin]: [&Tensor; 2],
    out: &Tensor,
    (between, positions): (usize, usize),
) {
    let width = x.size()[3] as usize;
    let count = x.numel().checked_div(width).unwrap_or(0);
    let [cos, sin] = [cos, sin].map(|table| table.to_kind(Kind::Float));
    // SAFETY: all were checked, or made, to be in host memory without gaps, of the type that is named.
    let (x, out, cos, sin) = unsafe {
        (
            Numbers::<T>::of(x),
            Numbers::<T>::of(out),
            Numbers::<f32>::of(&cos),
            Numbers::<f32>::of(&sin),
        )
    };
    let cos = cos.part(&(0..positions), width / 2);
    let sin = sin.part(&(0..positions), width / 2);
    for_rows(count, width, |_, rows| {
        let mut wide = vec![0.0; ROWS * width];
        for start in rows.clone().step_by(ROWS) {
            let rows = start..(start + ROWS).min(rows.end);
            // SAFETY: parts of threads do not overlap.
            let out = unsafe { out.part_mut(&rows, width) };
            rotate_rows(
                x.part(&rows, width),
                (start, between, positions),
                [cos, sin],
                &mut wide[..out.len()],
                out,
            );
        }
    });
}

/// Turns rows from `start` on, by way of `wide`: loops over a short row alone would not become vectors in 16 bits.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn rotate_rows<T: Number>(
    x: &[T],
    (start, between, positions): (usize, usize, usize),
    [cos, sin]: [&[f32]; 2],
    wide: &mut [f32],
    out: &mut [T],
) {
    let half = cos.len() / positions;
    wide.iter_mut()
        .zip(x)
        .for_each(|(wide, x)| *wide = x.wide());
    for (row, pair) in wide.chunks_exact_mut(2 * half).enumerate() {
        let position = (start + row) / between % positions * half;
        let cos = &cos[position..position + half];
        let sin = &sin[position..position + half];
        let (first, second) = pair.split_at_mut(half);
        for ((first, second), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
            (*first, *second) = (*first * cos - *second * sin, *second * cos + *first * sin);
        }
    }
    out.iter_mut()
        .zip(&*wide)
        .for_each(|(out, wide)| *out = T::narrow(*wide));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn pairs_turn_by_the_angles_of_their_position() {
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 2e-2)] {
            let random =
                |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            let cos = random(&[5, 3]);
            let sin = random(&[5, 3]);
            // As a projection leaves it; as it says; and with gaps.
            let layouts = [
                random(&[2, 5, 4, 6]).transpose(1, 2),
                random(&[2, 4, 5, 6]),
                random(&[2, 5, 8, 6]).narrow(2, 1, 4).transpose(1, 2),
            ];
            for x in layouts {
                let ours = apply_rotary(&x, &cos, &sin).to_kind(Kind::Double);
                let wide = |x: &Tensor| x.to_kind(Kind::Double);
                let halves = wide(&x).chunk(2, -1);
                let cos = wide(&cos);
                let sin = wide(&sin);
                let plain = [
                    &halves[0] * &cos - &halves[1] * &sin,
                    &halves[1] * &cos + &halves[0] * &sin,
                ];
                assert!(
                    ours.allclose(&Tensor::cat(&plain, -1), tolerance, tolerance, false),
                    "{kind:?}"
                );
            }
        }
    }
}
