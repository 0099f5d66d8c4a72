//! Softmax over a shard of the vocabulary, and its gradient once the other shards are known.

use crate::{
    cuda,
    exponential::exp,
    number::Number,
    profile::{Cost, span},
    rows::{HostData, Indices, for_kind, for_rows, host_kind},
    tensors::{LAST_DIM, empty_f32, sizes},
};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Elements that are combined in parallel.
const LANES: usize = 16;

/// Writes the softmax of each row of `logits / divisor` to `out`.
///
/// Both are `[T, V]` and share a dtype; they may be the same tensor. Returns the maximum of each
/// row, `[T]` fp32, and the sum of the exponentials of the differences from it, `[T]` fp32.
pub fn softmax(logits: &Tensor, divisor: f64, out: &Tensor) -> (Tensor, Tensor) {
    let cost = || Cost::passes(2.0, logits);
    span("cross-entropy", "softmax", cost, || {
        if let Some(gpu) = cuda::gpu(&[logits, out]) {
            return cuda::softmax(gpu, logits, divisor, out);
        }
        let Some(kind) = host_kind(&[logits, out]) else {
            let wide = logits.to_kind(Kind::Float) / divisor;
            let largest = wide.amax(LAST_DIM, true);
            let mut exponentials = (wide - &largest).exp_();
            let sum = exponentials.sum_dim_intlist(LAST_DIM, true, Kind::Float);
            out.shallow_clone().copy_(&exponentials.divide_(&sum));
            return (largest.squeeze_dim(1), sum.squeeze_dim(1));
        };
        let [count] = sizes(logits);
        let largest = empty_f32(logits, [count]);
        let sum = empty_f32(logits, [count]);
        let inverse = 1.0 / divisor as f32;
        for_kind!(
            kind,
            softmax_on_threads(logits, out, &largest, &sum, inverse)
        );
        (largest, sum)
    })
}

/// Computes the gradient of the logits, `probs * prob_factors - label_factors * onehot(labels)`, in
/// place.
///
/// `probs` is `[T, V]`, `labels` is `[T]` int64, `prob_factors` and `label_factors` are `[T]` fp32.
///
/// # Panics
/// If a label is out of range.
pub fn softmax_gradient(
    probs: &Tensor,
    prob_factors: &Tensor,
    labels: &Tensor,
    label_factors: &Tensor,
) {
    let cost = || Cost::passes(2.0, probs);
    span("cross-entropy", "gradient", cost, || {
        let [count] = sizes(probs);
        let fits = [prob_factors, labels, label_factors]
            .iter()
            .all(|x| x.is_contiguous() && x.numel() == count);
        let fits_gpu = fits
            && cuda::same_device_contiguous(probs, prob_factors, Kind::Float)
            && cuda::same_device_contiguous(probs, labels, Kind::Int64)
            && cuda::same_device_contiguous(probs, label_factors, Kind::Float);
        if let Some(gpu) = cuda::gpu(&[probs]).filter(|_| fits_gpu) {
            return cuda::softmax_gradient(gpu, probs, prob_factors, labels, label_factors);
        }
        match host_kind(&[probs]).filter(|_| fits) {
            Some(kind) => for_kind!(
                kind,
                softmax_gradient_on_threads(probs, prob_factors, labels, label_factors)
            ),
            None => {
                let mut grad = probs.to_kind(Kind::Float) * prob_factors.unsqueeze(1);
                let grad = grad.scatter_add_(1, &labels.unsqueeze(1), &-label_factors.unsqueeze(1));
                probs.shallow_clone().copy_(&grad);
            }
        }
    });
}

fn softmax_on_threads<T>(
    logits: &Tensor,
    out: &Tensor,
    largest: &Tensor,
    sum: &Tensor,
    inverse: f32,
) where
    T: Number,
{
    let [count, width] = sizes(logits);
    // SAFETY: `host_kind` has checked these, and the caller creates the others.
    let [logits, out] = unsafe { HostData::<T>::of_all([logits, out]) };
    // SAFETY: as above.
    let [largest, sum] = unsafe { HostData::<f32>::of_all([largest, sum]) };
    for_rows(count, width, |_, rows| {
        let mut wide = vec![0f32; width];
        for row in rows {
            let rows = row..row + 1;
            let (highest, total) =
                vector_exponentials(logits.rows(&rows, width), &mut wide, inverse);
            // SAFETY: each row belongs to one thread.
            unsafe {
                largest.rows_mut(&rows, 1)[0] = highest;
                sum.rows_mut(&rows, 1)[0] = total;
            }
            // SAFETY: as above, and the row's logits are not read again.
            let out = unsafe { out.rows_mut(&rows, width) };
            narrow(&wide, 1.0 / total, out);
        }
    });
}

fn softmax_gradient_on_threads<T>(
    probs: &Tensor,
    prob_factors: &Tensor,
    labels: &Tensor,
    label_factors: &Tensor,
) where
    T: Number,
{
    let [count, width] = sizes(probs);
    // SAFETY: the caller has checked all devices, layouts and dtypes.
    let probs = unsafe { HostData::<T>::of(probs) };
    // SAFETY: as above.
    let labels = unsafe { Indices::<i64>::of(labels) };
    // SAFETY: as above.
    let [prob_factors, label_factors] =
        unsafe { HostData::<f32>::of_all([prob_factors, label_factors]) };
    for_rows(count, width, |_, rows| {
        for row in rows {
            let rows = row..row + 1;
            // SAFETY: each row belongs to one thread.
            let probs = unsafe { probs.rows_mut(&rows, width) };
            let prob_factors = prob_factors.rows(&rows, 1)[0];
            let label_factors = label_factors.rows(&rows, 1)[0];
            let label = labels.rows(&rows, 1)[0] as usize;
            let label_grad = probs[label].wide() * prob_factors - label_factors;
            scale_row(probs, prob_factors);
            probs[label] = T::narrow(label_grad);
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn vector_exponentials<T>(logits: &[T], wide: &mut [f32], inverse_divisor: f32) -> (f32, f32)
where
    T: Number,
{
    exponentials(logits, wide, inverse_divisor)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn narrow<T>(wide: &[f32], scale: f32, out: &mut [T])
where
    T: Number,
{
    for (out, wide) in out.iter_mut().zip(wide) {
        *out = T::narrow(wide * scale);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn scale_row<T>(row: &mut [T], scale: f32)
where
    T: Number,
{
    for x in row {
        *x = T::narrow(x.wide() * scale);
    }
}

/// Writes `exp(logits * inverse_divisor - highest)` to `wide`, where `highest` is the maximum of
/// `logits * inverse_divisor`. Returns `highest` and the sum of the exponentials.
#[inline(always)]
pub(crate) fn exponentials<T>(logits: &[T], wide: &mut [f32], inverse_divisor: f32) -> (f32, f32)
where
    T: Number,
{
    let mut highest = [f32::NEG_INFINITY; LANES];
    let scale = |wide: &mut [f32], logits: &[T], highest: &mut [f32; LANES]| {
        for ((wide, logit), highest) in wide.iter_mut().zip(logits).zip(highest) {
            *wide = logit.wide() * inverse_divisor;
            // NaN is ignored here and propagates by the sum.
            *highest = if *wide > *highest { *wide } else { *highest };
        }
    };
    // Chunks of a constant length compile to vector code.
    let (whole, few) = logits.as_chunks::<LANES>();
    let (to_whole, to_few) = wide.as_chunks_mut::<LANES>();
    for (wide, logits) in to_whole.iter_mut().zip(whole) {
        scale(wide, logits, &mut highest);
    }
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
    for wide in whole {
        exponential(wide, &mut sums);
    }
    exponential(few, &mut sums);
    (highest, sums.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::{TestTensor, randn, tolerances};
    use tch::kind::{FLOAT_CPU, INT64_CPU};

    #[test]
    fn vocabulary_shards_add_up_to_the_softmax_and_its_gradient() {
        for (kind, tolerance) in tolerances(2e-6, 1e-2) {
            for (tokens, own, other) in [(0, 3, 2), (1, 1, 4), (9, 40, 7), (30, 500, 800)] {
                let all = randn(&[tokens, own + other], kind) * 4.0;
                let wide = all.to_f64() / 1.5;
                let whole = wide.softmax(-1, Kind::Double).narrow(1, 0, own);
                let logits = all.narrow(1, 0, own).contiguous();
                let (largest, sum) = softmax(&logits, 1.5, &logits);
                let own_sum = (wide.narrow(1, 0, own) - largest.unsqueeze(1))
                    .exp()
                    .sum_dim_intlist(LAST_DIM, false, Kind::Double);
                let wide_sum = sum.to_f64();
                assert!(wide_sum.allclose(&own_sum, 1e-5, 1e-6, false));
                // The weight of this shard in the softmax over the whole vocabulary.
                let own_log = largest.to_f64() + own_sum.log();
                let share = (own_log - wide.logsumexp(LAST_DIM, false)).exp();
                let labels = Tensor::randint(own, [tokens], INT64_CPU);
                let minus = Tensor::rand([tokens], FLOAT_CPU);
                let scale = (share * 0.5).to_kind(Kind::Float);
                softmax_gradient(&logits, &scale, &labels, &minus);
                let minus = minus.to_f64().unsqueeze(1);
                let plain = (whole * 0.5).scatter_add(1, &labels.unsqueeze(1), &-minus);
                let ours = logits.to_f64();
                assert!(
                    ours.allclose(&plain, tolerance, tolerance, false),
                    "{kind:?}"
                );
            }
        }
    }
}
