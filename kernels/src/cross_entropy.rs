//! Cross-entropy with the gradient in the memory of the logits.

use crate::{
    cuda,
    number::Number,
    profile::{Cost, span},
    rows::{HostData, for_kind, for_rows, host_kind},
    softmax::exponentials,
    tensors::{LAST_DIM, empty_f32, sizes},
};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Returns the cross-entropy of each token, `[T]` fp32, which is zero for a negative label.
///
/// Logits `[T, V]` are divided by `divisor`; `labels` are `[T]` int64. If there is a `factor`, the
/// logits become the gradient of the sum of the losses, times `factor`.
pub fn cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    divisor: f64,
    factor: Option<f64>,
) -> Tensor {
    let cost = || Cost::passes(2.0, logits);
    span("cross-entropy", "forward and backward", cost, || {
        let inverse = 1.0 / divisor as f32;
        let scaled_factor = factor.map(|factor| (factor / divisor) as f32);
        if let Some(gpu) = cuda::gpu(&[logits])
            .filter(|_| cuda::same_device_contiguous(logits, labels, Kind::Int64))
        {
            return cuda::cross_entropy(gpu, logits, labels, inverse, scaled_factor);
        }
        if let Some(kind) = host_kind(&[logits]).filter(|_| labels.is_contiguous()) {
            let losses = empty_f32(logits, [labels.numel()]);
            for_kind!(
                kind,
                on_threads(logits, labels, &losses, inverse, scaled_factor)
            );
            return losses;
        }
        by_libtorch(logits, labels, divisor, factor)
    })
}

fn by_libtorch(
    logits: &Tensor,
    labels: &Tensor,
    divisor: f64,
    gradient_factor: Option<f64>,
) -> Tensor {
    let counted = labels.ge(0).to_kind(Kind::Float).unsqueeze(-1);
    let targets = labels.clamp_min(0).unsqueeze(-1);
    let wide = logits.to_kind(Kind::Float) / divisor;
    let normalizer = wide.logsumexp(LAST_DIM, true);
    let losses = &normalizer - wide.gather(1, &targets, false);
    let losses = (losses * &counted).squeeze_dim(-1);
    if let Some(gradient_factor) = gradient_factor {
        let mut grad = (wide - normalizer).exp_();
        let _ = grad.scatter_add_(1, &targets, &-counted.ones_like());
        let grad = grad.multiply_(&(counted * (gradient_factor / divisor)));
        logits.shallow_clone().copy_(&grad);
    }
    losses
}

fn on_threads<T>(
    logits: &Tensor,
    labels: &Tensor,
    losses: &Tensor,
    inverse: f32,
    factor: Option<f32>,
) where
    T: Number,
{
    let count = losses.numel();
    let [_, width] = sizes(logits);
    // SAFETY: `host_kind` has checked the logits, and the caller creates the losses.
    let logits = unsafe { HostData::<T>::of(logits) };
    // SAFETY: as above.
    let losses = unsafe { HostData::<f32>::of(losses) };
    let labels = Vec::<i64>::try_from(labels).expect("labels are int64");
    for_rows(count, width, |_, rows| {
        let mut wide = vec![0f32; width];
        for row in rows {
            let rows = row..row + 1;
            // SAFETY: each row belongs to one thread.
            let logits = unsafe { logits.rows_mut(&rows, width) };
            // SAFETY: as above.
            let loss = unsafe { losses.rows_mut(&rows, 1) };
            loss[0] = token_loss(logits, labels[row], &mut wide, inverse, factor);
        }
    });
}

/// Returns the loss of one token. Its logits become gradients if there is a factor.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn token_loss<T>(
    logits: &mut [T],
    label: i64,
    wide: &mut [f32],
    inverse: f32,
    factor: Option<f32>,
) -> f32
where
    T: Number,
{
    if label < 0 {
        if factor.is_some() {
            logits.fill(T::narrow(0.0));
        }
        return 0.0;
    }
    let label_logit = logits[label as usize].wide() * inverse;
    let (highest, sum) = exponentials(logits, wide, inverse);
    if let Some(factor) = factor {
        let scale = factor / sum;
        for (logit, wide) in logits.iter_mut().zip(wide.iter()) {
            *logit = T::narrow(wide * scale);
        }
        let label_grad = wide[label as usize] * scale - factor;
        logits[label as usize] = T::narrow(label_grad);
    }
    sum.ln() + highest - label_logit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::{TestTensor, randn, tolerances};
    use tch::{Reduction, kind::INT64_CPU};

    #[test]
    fn it_matches_libtorch() {
        for (kind, tolerance) in tolerances(2e-6, 1e-2) {
            for (tokens, vocab) in [(0, 5), (1, 1), (7, 33), (40, 1000)] {
                let logits = randn(&[tokens, vocab], kind) * 4.0;
                let labels = Tensor::randint(vocab, [tokens], INT64_CPU);
                if tokens > 2 {
                    let _ = labels.narrow(0, 1, 1).fill_(-100);
                }
                let wide = logits.to_f64().set_requires_grad(true);
                let scaled = &wide / 1.5;
                let plain =
                    scaled.cross_entropy_loss(&labels, None::<Tensor>, Reduction::None, -100, 0.0);
                (plain.sum(Kind::Double) * 0.25).backward();
                let close = |ours: &Tensor, plain: &Tensor, tolerance: f64| {
                    let ours = ours.to_f64();
                    assert!(
                        ours.allclose(plain, tolerance, tolerance, false),
                        "{kind:?} {tokens} {vocab}"
                    );
                };
                for factor in [None, Some(0.25)] {
                    let losses = cross_entropy(&logits, &labels, 1.5, factor);
                    close(&losses, &plain.detach(), 2e-6);
                }
                if tokens > 0 {
                    close(&logits, &wide.grad(), tolerance);
                }
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        let logits = Tensor::from_slice(&[1f32, f32::NAN, 2.0]).view([1, 3]);
        let labels = Tensor::from_slice(&[0i64]);
        let losses = cross_entropy(&logits, &labels, 1.0, Some(1.0));
        assert!(losses.double_value(&[0]).is_nan());
        assert!(logits.double_value(&[0, 2]).is_nan());
    }
}
