//! The output layer and its cross-entropy together, in chunks of tokens: the logits of a whole microbatch never
//! exist at once, and the gradients of a chunk are taken while its logits are at hand.
// Shapes: T tokens, D hidden, V vocabulary.

use parallel::{Contribution, Weight, add_product};
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// The label of a position that does not count.
pub(crate) const IGNORED: i64 = -100;

/// Logits of one chunk take up to this many bytes.
const CHUNK_BYTES: usize = 4 << 20;

/// The sum over tokens of the cross-entropy of `x_td` `[T, D]` times `weight_vd` `[V, D]` against `labels_t` `[T]`,
/// times `factor`: an fp32 scalar. Logits are divided by `logits_divisor` first. Labels of [`IGNORED`] do not count.
///
/// Where gradients are on, the weight's is added up here and now: the result has to enter the total loss as it is.
pub(crate) fn cross_entropy(
    x_td: &Tensor,
    weight_vd: &Weight,
    labels_t: &Tensor,
    factor: f64,
    logits_divisor: f64,
) -> Result<Tensor, Error> {
    let (loss, grad) = tch::no_grad(|| chunks(x_td, weight_vd, labels_t, factor, logits_divisor))?;
    match grad {
        Some(grad) => with_gradient(loss, x_td, grad),
        None => Ok(loss),
    }
}

/// `scalar` as something whose gradient with respect to `x` is `grad`, when it enters the total loss as it is.
pub(crate) fn with_gradient(scalar: Tensor, x: &Tensor, grad: Tensor) -> Result<Tensor, Error> {
    let mut out =
        attach_backward(&[x], vec![scalar], move |grads| Ok(vec![grads[0].as_ref().map(|_| grad.shallow_clone())]))?;
    Ok(out.remove(0))
}

/// The loss, and its gradient with respect to `x_td` where that is needed.
fn chunks(
    x_td: &Tensor,
    weight_vd: &Weight,
    labels_t: &Tensor,
    factor: f64,
    logits_divisor: f64,
) -> Result<(Tensor, Option<Tensor>), Error> {
    let (x, weight, kind) = (x_td.detach(), weight_vd.value().detach(), x_td.kind());
    let (tokens, vocab) = (x.size()[0], weight.size()[0]);
    let chunk = (CHUNK_BYTES / 4 / vocab as usize).clamp(1, tokens.max(1) as usize) as i64;
    let mut loss = Tensor::zeros([], (Kind::Float, x.device()));
    let grad_x = x_td.requires_grad().then(|| x.empty_like());
    let contribution = grad_x.is_some().then(|| weight_vd.contribution()).transpose()?;
    let mut start = 0;
    while start < tokens {
        let len = chunk.min(tokens - start);
        let x = x.narrow(0, start, len);
        let labels = labels_t.narrow(0, start, len).unsqueeze(1);
        let counted = labels.not_equal(IGNORED).to_kind(Kind::Float);
        let targets = labels.clamp_min(0);
        let mut logits = x.matmul(&weight.tr()).to_kind(Kind::Float);
        if logits_divisor != 1.0 {
            logits /= logits_divisor;
        }
        let normalizer = logits.logsumexp([-1i64].as_slice(), true);
        let picked = logits.gather(1, &targets, false);
        loss += ((&normalizer - picked) * &counted).sum(Kind::Float);
        if let (Some(grad_x), Some(contribution)) = (&grad_x, &contribution) {
            // softmax - onehot, in the logits' own memory.
            let mut grad = logits.subtract_(&normalizer).exp_();
            let minus_one = targets.to_kind(Kind::Float).fill_(-1.0);
            let _ = grad.scatter_add_(1, &targets, &minus_one);
            let grad = grad.multiply_(&(counted * (factor / logits_divisor))).to_kind(kind);
            grad_x.narrow(0, start, len).copy_(&grad.matmul(&weight));
            add_product(contribution.sum(), &grad.tr(), &x);
        }
        start += len;
    }
    contribution.map_or(Ok(()), Contribution::finish)?;
    Ok((loss * factor, grad_x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Communicator, Cpu, GradientBuckets, Local};
    use std::sync::Arc;

    #[test]
    fn chunks_give_the_loss_and_gradients_of_plain_cross_entropy() {
        // A vocabulary so large that a chunk holds 41 of the 100 tokens.
        let (tokens, hidden, vocab) = (100i64, 6i64, 100_000i64);
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let (mut x, value) = (random(&[tokens, hidden]).set_requires_grad(true), random(&[vocab, hidden]));
        let weight = Weight::new(value.copy());
        let alone: Arc<dyn Communicator> = Arc::new(Local::new(0, "alone"));
        let gradients = GradientBuckets::new(&[(weight.clone(), 0)], &[alone], 1 << 20, &Cpu).unwrap();
        gradients.begin(1);
        let mut labels: Vec<i64> = (0..tokens).map(|t| t * 997 % vocab).collect();
        labels[3] = IGNORED;
        let labels = Tensor::from_slice(&labels);
        let ours = cross_entropy(&x, &weight, &labels, 0.5, 2.0).unwrap();
        ours.backward();
        let grad_x = x.grad().copy();
        x.zero_grad();
        let weight_leaf = value.set_requires_grad(true);
        let logits = x.matmul(&weight_leaf.tr()) / 2.0;
        let plain = logits.cross_entropy_loss(&labels, None::<Tensor>, tch::Reduction::Sum, IGNORED, 0.0) * 0.5;
        plain.backward();
        assert!(ours.allclose(&plain, 1e-5, 1e-5, false));
        assert!(grad_x.allclose(&x.grad(), 1e-4, 1e-6, false));
        assert!(gradients.gradient(0).allclose(&weight_leaf.grad(), 1e-4, 1e-6, false));
        let without = tch::no_grad(|| cross_entropy(&x, &weight, &labels, 0.5, 2.0)).unwrap();
        assert!(without.allclose(&plain, 1e-5, 1e-5, false));
    }
}
