//! The output layer and its cross-entropy together, in chunks of tokens: the logits of a whole microbatch never
//! exist at once, and the gradients of a chunk are taken while its logits are at hand.
// Shapes: T tokens, D hidden, V vocabulary.

use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// The label of a position that does not count.
pub(crate) const IGNORED: i64 = -100;

/// Logits of one chunk take up to this many bytes.
const CHUNK_BYTES: usize = 16 << 20;

/// The sum over tokens of the cross-entropy of `x_td` `[T, D]` times `weight_vd` `[V, D]` against `labels_t` `[T]`,
/// times `factor`: an fp32 scalar. Logits are divided by `logits_divisor` first. Labels of [`IGNORED`] do not count.
pub(crate) fn cross_entropy(
    x_td: &Tensor,
    weight_vd: &Tensor,
    labels_t: &Tensor,
    factor: f64,
    logits_divisor: f64,
) -> Result<Tensor, Error> {
    let needs_grad = x_td.requires_grad() || weight_vd.requires_grad();
    let tokens = x_td.size()[0];
    let vocab = weight_vd.size()[0];
    let chunk = (CHUNK_BYTES / 4 / vocab as usize).clamp(1, tokens.max(1) as usize) as i64;
    let kind = x_td.kind();
    let (x, weight) = (x_td.detach(), weight_vd.detach());
    let (loss, grads) = tch::no_grad(|| {
        let mut loss = Tensor::zeros([], (Kind::Float, x.device()));
        // The weight's gradient is summed over chunks in fp32.
        let mut grads = needs_grad.then(|| (x.empty_like(), Tensor::zeros(weight.size(), (Kind::Float, x.device()))));
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
            if let Some((grad_x, grad_weight)) = &mut grads {
                // softmax - onehot, in the logits' own memory.
                let mut grad = logits.subtract_(&normalizer).exp_();
                let minus_one = targets.to_kind(Kind::Float).fill_(-1.0);
                let _ = grad.scatter_add_(1, &targets, &minus_one);
                let grad = grad.multiply_(&(counted * (factor / logits_divisor))).to_kind(kind);
                grad_x.narrow(0, start, len).copy_(&grad.matmul(&weight));
                if kind == Kind::Float {
                    let _ = grad_weight.addmm_(&grad.tr(), &x);
                } else {
                    *grad_weight += grad.tr().matmul(&x).to_kind(Kind::Float);
                }
            }
            start += len;
        }
        (loss * factor, grads)
    });
    let Some((grad_x, grad_weight)) = grads else { return Ok(loss) };
    let mut out = attach_backward(&[x_td, weight_vd], vec![loss], move |grads| {
        let Some(upstream) = &grads[0] else { return Ok(vec![None, None]) };
        let scaled = |grad: &Tensor| grad.multiply(&upstream.to_kind(grad.kind())).to_kind(kind);
        Ok(vec![Some(scaled(&grad_x)), Some(scaled(&grad_weight))])
    })?;
    Ok(out.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu};

    #[test]
    fn chunks_give_the_loss_and_gradients_of_plain_cross_entropy() {
        // A vocabulary so large that a chunk holds 41 of the 100 tokens.
        let (tokens, hidden, vocab) = (100i64, 6i64, 100_000i64);
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0).set_requires_grad(true);
        let (x, weight) = (random(&[tokens, hidden]), random(&[vocab, hidden]));
        let mut labels: Vec<i64> = (0..tokens).map(|t| t * 997 % vocab).collect();
        labels[3] = IGNORED;
        let labels = Tensor::from_slice(&labels);
        let ours = cross_entropy(&x, &weight, &labels, 0.5, 2.0).unwrap();
        (&ours * 3.0).backward();
        let grads = (x.grad().copy(), weight.grad().copy());
        let (mut x, mut weight) = (x, weight);
        x.zero_grad();
        weight.zero_grad();
        let logits = x.matmul(&weight.tr()) / 2.0;
        let plain = logits.cross_entropy_loss(&labels, None::<Tensor>, tch::Reduction::Sum, IGNORED, 0.0) * 0.5;
        (&plain * 3.0).backward();
        assert!(ours.allclose(&plain, 1e-5, 1e-5, false));
        assert!(grads.0.allclose(&x.grad(), 1e-4, 1e-6, false));
        assert!(grads.1.allclose(&weight.grad(), 1e-4, 1e-6, false));
        let without = tch::no_grad(|| cross_entropy(&x.detach(), &weight.detach(), &labels, 0.5, 2.0)).unwrap();
        assert!(without.allclose(&plain, 1e-5, 1e-5, false));
    }
}
