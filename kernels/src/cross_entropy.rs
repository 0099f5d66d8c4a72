//! Cross-entropy of logits that are at hand, with its gradient in their own memory.

use crate::cuda;
use crate::number::Number;
use crate::profile::{Cost, part};
use crate::rows::{Numbers, for_kind, for_rows, host_kind};
use crate::softmax::exponentials;
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Of logits `[T, V]`, divided by `divisor`, against `labels` `[T]` int64: each token's loss, `[T]` fp32; none for labels that are
/// negative. With `factor` the logits become their own gradients: of the sum of the losses, times `factor`.
pub fn cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    divisor: f64,
    factor: Option<f64>,
) -> Tensor {
    let cost = || Cost::passes(2.0, logits);
    part("cross-entropy", "both", cost, || {
        let width = logits.size()[1];
        let scales = (
            1.0 / divisor as f32,
            factor.map(|factor| (factor / divisor) as f32),
        );
        if let Some(gpu) = cuda::gpu(&[logits])
            .filter(|_| cuda::same_device_contiguous(logits, labels, Kind::Int64))
        {
            return cuda::cross_entropy(gpu, logits, labels, scales);
        }
        if let Some(kind) = host_kind(&[logits]).filter(|_| labels.is_contiguous()) {
            let losses = Tensor::empty([labels.numel() as i64], (Kind::Float, logits.device()));
            for_kind!(
                kind,
                on_threads(logits, labels, &losses, (width as usize, scales))
            );
            return losses;
        }
        let counted = labels.ge(0).to_kind(Kind::Float).unsqueeze(-1);
        let targets = labels.clamp_min(0).unsqueeze(-1);
        let wide = logits.to_kind(Kind::Float) / divisor;
        let normalizer = wide.logsumexp([-1i64].as_slice(), true);
        let losses = ((&normalizer - wide.gather(1, &targets, false)) * &counted).squeeze_dim(-1);
        if let Some(factor) = factor {
            let mut grad = (wide - normalizer).exp_();
            let _ = grad.scatter_add_(1, &targets, &-counted.ones_like());
            logits
                .shallow_clone()
                .copy_(&grad.multiply_(&(counted * (factor / divisor))));
        }
        losses
    })
}

fn on_threads<T: Number>(
    logits: &Tensor,
    labels: &Tensor,
    losses: &Tensor,
    (width, (inverse, factor)): (usize, (f32, Option<f32>)),
) {
    let count = losses.numel();
    // SAFETY: all are in host memory without gaps, of the type that is named.
    let (logits, losses) = unsafe { (Numbers::<T>::of(logits), Numbers::<f32>::of(losses)) };
    let labels = Vec::<i64>::try_from(labels).expect("labels are int64");
    for_rows(count, width, |_, rows| {
        let mut wide = vec![0f32; width];
        for row in rows {
            let place = row..row + 1;
            // SAFETY: parts of threads do not overlap.
            let (logits, loss) =
                unsafe { (logits.part_mut(&place, width), losses.part_mut(&place, 1)) };
            loss[0] = one(logits, labels[row], &mut wide, inverse, factor);
        }
    });
}

/// The loss of one token; its logits become gradients where there is a factor.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn one<T: Number>(
    logits: &mut [T],
    label: i64,
    wide: &mut [f32],
    inverse: f32,
    factor: Option<f32>,
) -> f32 {
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
        logits[label as usize] = T::narrow(wide[label as usize] * scale - factor);
    }
    sum.ln() + highest - label_logit
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Reduction};

    #[test]
    fn it_is_libtorchs_cross_entropy_with_its_gradient() {
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)] {
            for (tokens, vocab) in [(0, 5), (1, 1), (7, 33), (40, 1000)] {
                let logits = (Tensor::randn([tokens, vocab], (Kind::Float, Device::Cpu)) * 4.0)
                    .to_kind(kind);
                let labels = Tensor::randint(vocab, [tokens], (Kind::Int64, Device::Cpu));
                if tokens > 2 {
                    let _ = labels.narrow(0, 1, 1).fill_(-100);
                }
                let wide = logits.to_kind(Kind::Double).set_requires_grad(true);
                let scaled = &wide / 1.5;
                let plain =
                    scaled.cross_entropy_loss(&labels, None::<Tensor>, Reduction::None, -100, 0.0);
                (plain.sum(Kind::Double) * 0.25).backward();
                let close = |ours: &Tensor, plain: &Tensor, tolerance: f64| {
                    let ours = ours.to_kind(Kind::Double);
                    assert!(
                        ours.allclose(plain, tolerance, tolerance, false),
                        "{kind:?} {tokens} {vocab}"
                    );
                };
                close(
                    &cross_entropy(&logits, &labels, 1.5, None),
                    &plain.detach(),
                    2e-6,
                );
                close(
                    &cross_entropy(&logits, &labels, 1.5, Some(0.25)),
                    &plain.detach(),
                    2e-6,
                );
                if tokens > 0 {
                    close(&logits, &wide.grad(), tolerance);
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        let logits = Tensor::from_slice(&[1f32, f32::NAN, 2.0]).view([1, 3]);
        assert!(
            cross_entropy(&logits, &Tensor::from_slice(&[0i64]), 1.0, Some(1.0))
                .double_value(&[0])
                .is_nan()
        );
        assert!(logits.double_value(&[0, 2]).is_nan());
    }
}
