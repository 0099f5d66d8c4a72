//! Softmax over the part of a vocabulary that is at hand, and what becomes of it when the others' parts are known.

use crate::cuda;
use crate::exponential::exp;
use crate::number::Number;
use crate::profile::{Cost, part};
use crate::rows::{Indices, Numbers, for_kind, for_rows, host_kind};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Numbers that are combined side by side.
const LANES: usize = 16;

/// Of `logits` `[T, V]`, divided by `divisor`: the softmax of each row, of their dtype and in `out` `[T, V]`, which may be themselves;
/// the largest, `[T]` fp32; and the sum of the exponentials of all less the largest, `[T]` fp32.
pub fn softmax(logits: &Tensor, divisor: f64, out: &Tensor) -> (Tensor, Tensor) {
    let cost = || Cost::passes(2.0, logits);
    part("cross-entropy", "softmax", cost, || {
        let count = logits.size()[0];
        let width = logits.size()[1] as usize;
        if let Some(gpu) = cuda::gpu(&[logits, out]) {
            return cuda::softmax(gpu, logits, divisor, out);
        }
        let Some(kind) = host_kind(&[logits, out]) else {
            let wide = logits.to_kind(Kind::Float) / divisor;
            let largest = wide.amax([-1i64].as_slice(), true);
            let mut exponentials = (wide - &largest).exp_();
            let sum = exponentials.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
            out.shallow_clone().copy_(&exponentials.divide_(&sum));
            return (largest.squeeze_dim(1), sum.squeeze_dim(1));
        };
        let [largest, sum] =
            [(); 2].map(|()| Tensor::empty([count], (Kind::Float, logits.device())));
        for_kind!(
            kind,
            softmax_on_threads(logits, out, &largest, &sum, (width, 1.0 / divisor as f32))
        );
        (largest, sum)
    })
}

/// Makes of `probs` `[T, V]`, in their own memory, `probs * scale - minus * onehot(labels)`, with `labels` `[T]` int64 and the others
/// `[T]` fp32: gradients of logits.
///
/// # Panics
/// When a label is not a column.
pub fn softmax_gradient(probs: &Tensor, scale: &Tensor, labels: &Tensor, minus: &Tensor) {
    let cost = || Cost::passes(2.0, probs);
    part("cross-entropy", "gradient", cost, || {
        let count = probs.size()[0] as usize;
        let whole = [scale, labels, minus]
            .iter()
            .all(|x| x.is_contiguous() && x.numel() == count);
        let numbers = [
            (scale, Kind::Float),
            (labels, Kind::Int64),
            (minus, Kind::Float),
        ];
        let alike = whole
            && numbers
                .iter()
                .all(|(x, kind)| cuda::same_device_contiguous(probs, x, *kind));
        if let Some(gpu) = cuda::gpu(&[probs]).filter(|_| alike) {
            return cuda::softmax_gradient(gpu, probs, scale, labels, minus);
        }
        match host_kind(&[probs]).filter(|_| whole) {
            Some(kind) => for_kind!(kind, gradient_on_threads(probs, scale, labels, minus)),
            None => {
                let mut grad = probs.to_kind(Kind::Float) * scale.unsqueeze(1);
                let grad = grad.scatter_add_(1, &labels.unsqueeze(1), &-minus.unsqueeze(1));
                probs.shallow_clone().copy_(&grad);
            }
        }
    });
}

fn softmax_on_threads<T: Number>(
    logits: &Tensor,
    out: &Tensor,
    largest: &Tensor,
    sum: &Tensor,
    (width, inverse): (usize, f32),
) {
    let count = sum.numel();
    // SAFETY: all are in host memory without gaps, of the type that is named.
    let (logits, out) = unsafe { (Numbers::<T>::of(logits), Numbers::<T>::of(out)) };
    // SAFETY: likewise.
    let (largest, sum) = unsafe { (Numbers::<f32>::of(largest), Numbers::<f32>::of(sum)) };
    for_rows(count, width, |_, rows| {
        let mut wide = vec![0f32; width];
        for row in rows {
            let place = row..row + 1;
            let (highest, total) = exponentials_of(logits.part(&place, width), &mut wide, inverse);
            // SAFETY: parts of threads do not overlap, and nobody reads this row's logits any more.
            let (out, largest, sum) = unsafe {
                (
                    out.part_mut(&place, width),
                    largest.part_mut(&place, 1),
                    sum.part_mut(&place, 1),
                )
            };
            (largest[0], sum[0]) = (highest, total);
            narrow(&wide, 1.0 / total, out);
        }
    });
}

fn gradient_on_threads<T: Number>(probs: &Tensor, scale: &Tensor, labels: &Tensor, minus: &Tensor) {
    let count = probs.size()[0] as usize;
    let width = probs.size()[1] as usize;
    // SAFETY: all are in host memory without gaps, of the type that is named.
    let (probs, labels) = unsafe { (Numbers::<T>::of(probs), Indices::of(labels)) };
    // SAFETY: likewise.
    let (scale, minus) = unsafe { (Numbers::<f32>::of(scale), Numbers::<f32>::of(minus)) };
    for_rows(count, width, |_, rows| {
        for row in rows {
            let place = row..row + 1;
            // SAFETY: parts of threads do not overlap.
            let probs = unsafe { probs.part_mut(&place, width) };
            let scale = scale.part(&place, 1)[0];
            let minus = minus.part(&place, 1)[0];
            let label = labels.part(&place, 1)[0] as usize;
            let label_grad = probs[label].wide() * scale - minus;
            scaled(probs, scale);
            probs[label] = T::narrow(label_grad);
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn exponentials_of<T: Number>(logits: &[T], wide: &mut [f32], inverse: f32) -> (f32, f32) {
    exponentials(logits, wide, inverse)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn narrow<T: Number>(wide: &[f32], scale: f32, out: &mut [T]) {
    out.iter_mut()
        .zip(wide)
        .for_each(|(out, wide)| *out = T::narrow(wide * scale));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn scaled<T: Number>(row: &mut [T], scale: f32) {
    row.iter_mut()
        .for_each(|x| *x = T::narrow(x.wide() * scale));
}

/// Makes of `wide` the exponentials of `logits`, times `inverse`, less the largest; gives the largest and their sum.
#[inline(always)]
pub(crate) fn exponentials<T: Number>(logits: &[T], wide: &mut [f32], inverse: f32) -> (f32, f32) {
    let mut highest = [f32::NEG_INFINITY; LANES];
    let scale = |wide: &mut [f32], logits: &[T], highest: &mut [f32; LANES]| {
        for ((wide, logit), highest) in wide.iter_mut().zip(logits).zip(highest) {
            *wide = logit.wide() * inverse;
            // What is not a number stays out of it here, and comes back through the sum.
            *highest = if *wide > *highest { *wide } else { *highest };
        }
    };
    // Chunks of a known length become vectors.
    let (whole, few) = logits.as_chunks::<LANES>();
    let (to_whole, to_few) = wide.as_chunks_mut::<LANES>();
    to_whole
        .iter_mut()
        .zip(whole)
        .for_each(|(wide, logits)| scale(wide, logits, &mut highest));
    scale(to_few, few, &mut highest);
    let highest = highest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    let exponential = |wide: &mut [f32], sums: &mut [f32; LANES]| {
        for (wide, sum) in wide.iter_mut().zip(sums) {
            *wide = exp(*wide - highest);
            *sum += *wide;
        }
    };
    let (whole, few) = wide.as_chunks_mut::<LANES>();
    whole
        .iter_mut()
        .for_each(|wide| exponential(wide, &mut sums));
    exponential(few, &mut sums);
    (highest, sums.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn parts_of_a_vocabulary_make_the_whole_softmax_and_its_gradient() {
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)] {
            for (tokens, own, other) in [(0, 3, 2), (1, 1, 4), (9, 40, 7), (30, 500, 800)] {
                let all = (Tensor::randn([tokens, own + other], (Kind::Float, Device::Cpu)) * 4.0)
                    .to_kind(kind);
                let wide = all.to_kind(Kind::Double) / 1.5;
                let whole = wide.softmax(-1, Kind::Double).narrow(1, 0, own);
                let logits = all.narrow(1, 0, own).contiguous();
                let (largest, sum) = softmax(&logits, 1.5, &logits);
                let own_sum = (wide.narrow(1, 0, own) - largest.unsqueeze(1))
                    .exp()
                    .sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
                assert!(
                    sum.to_kind(Kind::Double)
                        .allclose(&own_sum, 1e-5, 1e-6, false)
                );
                // Of this part's weight in the whole, and a gradient's.
                let share = (largest.to_kind(Kind::Double) + own_sum.log()
                    - wide.logsumexp([-1i64].as_slice(), false))
                .exp();
                let labels = Tensor::randint(own, [tokens], (Kind::Int64, Device::Cpu));
                let minus = Tensor::rand([tokens], (Kind::Float, Device::Cpu));
                softmax_gradient(
                    &logits,
                    &(share * 0.5).to_kind(Kind::Float),
                    &labels,
                    &minus,
                );
                let plain = (whole * 0.5).scatter_add(
                    1,
                    &labels.unsqueeze(1),
                    &-minus.to_kind(Kind::Double).unsqueeze(1),
                );
                assert!(
                    logits
                        .to_kind(Kind::Double)
                        .allclose(&plain, tolerance, tolerance, false),
                    "{kind:?}"
                );
            }
        }
    }
}
