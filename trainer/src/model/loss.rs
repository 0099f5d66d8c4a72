//! Output layer and cross-entropy in one pass over chunks of tokens.
//!
//! The logits of a whole microbatch never exist at once. The gradients of a chunk are computed
//! while its logits are in memory.
// Shapes: T tokens, D hidden, V vocabulary.

use kernels::{gemm, gemm_into, softmax, softmax_gradient};
use parallel::{Communicator, Contribution, Weight};
use std::{ops::Range, sync::Arc};
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Label of a position that does not enter the loss.
pub(crate) const IGNORED: i64 = -100;

/// Returns the limit for the logits of one chunk, in bytes.
///
/// A processor's caches hold a small chunk. A device needs many tokens to be busy, and each chunk
/// reads the matrix and its gradient.
pub(crate) fn logits_chunk_bytes(on_host: bool) -> usize {
    if on_host { 16 << 20 } else { 512 << 20 }
}

/// Sizes of the output layer on a rank for one microbatch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OutputShape {
    pub(crate) tokens: u64,
    pub(crate) hidden: u64,
    /// Rows of the vocabulary on this rank.
    pub(crate) rows: u64,
    /// Bytes of an element in the model's dtype.
    pub(crate) element: u64,
    /// True if the model is on the CPU.
    pub(crate) on_host: bool,
}

/// Returns the bytes of temporary tensors of [`cross_entropy`]. With `is_split`, ranks split the
/// vocabulary and gather the hidden states of all tokens.
pub(crate) fn loss_bytes(shape: &OutputShape, is_split: bool) -> u64 {
    let row = shape.rows.max(1) * shape.element;
    let fitting = logits_chunk_bytes(shape.on_host) as u64 / row;
    let logits = fitting.clamp(1, shape.tokens.max(1)) * row;
    let states = shape.tokens * shape.hidden * shape.element;
    // Logits, which their gradient overwrites, and the gradient of the hidden states.
    logits + states + if is_split { states } else { 0 }
}

/// The rows of the vocabulary on this rank, and the ranks that have the others.
pub(crate) struct VocabularyRows<'a> {
    pub(crate) rows: Range<usize>,
    /// Rows of the whole vocabulary.
    pub(crate) total: usize,
    pub(crate) group: &'a Arc<dyn Communicator>,
}

/// Scaling of logits and loss.
#[derive(Clone, Copy)]
pub(crate) struct LossScale {
    /// Factor of each token's loss in the total loss.
    pub(crate) factor: f64,
    /// Divisor of the logits before the softmax.
    pub(crate) logits_divisor: f64,
}

/// Returns the summed cross-entropy of the hidden states `x_td` `[T, D]` against `labels_t` `[T]`.
///
/// `weight_vd` has the rows `own` of the output layer `[V, D]`. The loss is an fp32 scalar, the
/// same on every rank of the vocabulary; labels [`IGNORED`] do not enter it. The gradient of `x_td`
/// is this rank's part of a sum.
///
/// If `x_td` requires a gradient, the weight's gradient is added at once. The loss must therefore
/// enter the total loss unscaled.
///
/// # Collective
/// All ranks of the vocabulary.
pub(crate) fn cross_entropy(
    x_td: &Tensor,
    weight_vd: &Weight,
    labels_t: &Tensor,
    scale: LossScale,
    own: &VocabularyRows,
) -> Result<Tensor, Error> {
    let (loss, grad) = tch::no_grad(|| loss_in_chunks(x_td, weight_vd, labels_t, scale, own))?;
    match grad {
        Some(grad) => with_gradient(loss, x_td, grad),
        None => Ok(loss),
    }
}

/// Returns `scalar` with the gradient `grad` with respect to `x`, provided that it enters the total
/// loss unscaled.
pub(crate) fn with_gradient(scalar: Tensor, x: &Tensor, grad: Tensor) -> Result<Tensor, Error> {
    let mut out = attach_backward(&[x], vec![scalar], move |grads| {
        Ok(vec![grads[0].as_ref().map(|_| grad.shallow_clone())])
    })?;
    Ok(out.remove(0))
}

/// Returns the loss, and its gradient with respect to `x_td` if `x_td` requires one.
fn loss_in_chunks(
    x_td: &Tensor,
    weight_vd: &Weight,
    labels_t: &Tensor,
    scale: LossScale,
    own: &VocabularyRows,
) -> Result<(Tensor, Option<Tensor>), Error> {
    let x = x_td.detach();
    let weight = weight_vd.value();
    let tokens = x.size()[0];
    // The same on every rank, although some have a row less.
    let rows = own.total.div_ceil(own.group.size());
    let row_bytes = rows * x.kind().elt_size_in_bytes();
    let limit = logits_chunk_bytes(x.device() == Device::Cpu);
    let chunk = (limit / row_bytes).clamp(1, tokens.max(1) as usize) as i64;
    let mut loss = Tensor::zeros([], (Kind::Float, x.device()));
    let grad_x = x_td.requires_grad().then(|| x.empty_like());
    let contribution = match &grad_x {
        Some(_) => Some(weight_vd.contribution()?),
        None => None,
    };
    let mut start = 0;
    while start < tokens {
        let len = chunk.min(tokens - start);
        let x = x.narrow(0, start, len);
        let labels = labels_t.narrow(0, start, len);
        let logits = gemm(&x, &weight.tr());
        let needs_grad = grad_x.is_some();
        let (sum, grad) = match own.group.size() {
            1 => {
                let losses = kernels::cross_entropy(
                    &logits,
                    &labels,
                    scale.logits_divisor,
                    needs_grad.then_some(scale.factor),
                );
                (losses.sum(Kind::Float), logits)
            }
            _ => chunk_loss(logits, &labels, scale, own, needs_grad)?,
        };
        loss += sum;
        if let (Some(grad_x), Some(contribution)) = (&grad_x, &contribution) {
            gemm_into(&grad_x.narrow(0, start, len), &grad, &weight);
            contribution.sum().gemm_accumulate(&grad.tr(), &x);
        }
        start += len;
    }
    contribution.map_or(Ok(()), Contribution::finish)?;
    Ok((loss * scale.factor, grad_x))
}

/// Returns the loss of a chunk from this rank's logits `[T, v]`. With `needs_grad`, overwrites the
/// logits with their gradient.
fn chunk_loss(
    logits: Tensor,
    labels_t: &Tensor,
    scale: LossScale,
    own: &VocabularyRows,
    needs_grad: bool,
) -> Result<(Tensor, Tensor), Error> {
    let vocab = logits.size()[1];
    let counted = labels_t.not_equal(IGNORED).to_kind(Kind::Float);
    // Labels of other ranks' rows point to the first row with weight 0.
    let shifted = labels_t - own.rows.start as i64;
    let inside = shifted
        .ge(0)
        .logical_and(&shifted.lt(vocab))
        .to_kind(Kind::Float);
    let targets = shifted.clamp(0, vocab - 1);
    let picked = logits
        .gather(1, &targets.unsqueeze(1), false)
        .squeeze_dim(1)
        .to_kind(Kind::Float)
        * &inside
        / scale.logits_divisor;
    // Softmax over this rank's rows, in the memory of the logits.
    let (largest, sum) = softmax(&logits, scale.logits_divisor, &logits);
    let own_normalizer = largest + sum.log();
    let (normalizer, picked) = combine_ranks(&own_normalizer, &picked, own.group)?;
    let loss = ((&normalizer - picked) * &counted).sum(Kind::Float);
    if needs_grad {
        let weight = counted * (scale.factor / scale.logits_divisor);
        let correction = (own_normalizer - normalizer).exp() * &weight;
        softmax_gradient(&logits, &correction, &targets, &(inside * weight));
    }
    Ok((loss, logits))
}

/// Returns the log-sum-exp over all ranks' logits and the label's logit, `[T]` each, given this
/// rank's.
fn combine_ranks(
    normalizer: &Tensor,
    picked: &Tensor,
    group: &Arc<dyn Communicator>,
) -> Result<(Tensor, Tensor), Error> {
    let own = Tensor::stack(&[normalizer, picked], 0);
    let ranks = group.size() as i64;
    let all = Tensor::empty([2 * ranks, own.size()[1]], (own.kind(), own.device()));
    let gathered = group.all_gather(&all, &own).and_then(parallel::Work::wait);
    gathered.map_err(|e| Error::new(e.to_string()))?;
    let all = all.view([ranks, 2, -1]);
    let first = [0i64];
    let normalizer = all.select(1, 0).logsumexp(first.as_slice(), false);
    let picked = all
        .select(1, 1)
        .sum_dim_intlist(first.as_slice(), false, Kind::Float);
    Ok((normalizer, picked))
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu, GradientBuckets, Replication, run_on_threads};
    use parking_lot::Mutex;
    use std::time::Duration;

    #[test]
    fn chunks_give_the_loss_and_gradients_of_plain_cross_entropy() {
        // A vocabulary so large that a chunk holds 41 of the 100 tokens.
        let tokens = 100i64;
        let hidden = 6i64;
        let vocab = 100_000i64;
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let x = random(&[tokens, hidden]).set_requires_grad(true);
        let value = random(&[vocab, hidden]);
        let mut labels: Vec<i64> = (0..tokens).map(|t| t * 997 % vocab).collect();
        labels[3] = IGNORED;
        let labels = Tensor::from_slice(&labels);
        let shared = Mutex::new([x.detach(), value.copy(), labels.copy()]);
        // On one rank, and split over three ranks.
        let run = move |ranks: usize, shared: Mutex<[Tensor; 3]>| {
            run_on_threads(ranks, Duration::from_secs(20), move |world| {
                let [x, value, labels] = shared.lock().each_ref().map(Tensor::copy);
                let x = x.set_requires_grad(true);
                let rank = world.rank();
                let rows = vocab as usize * rank / ranks..vocab as usize * (rank + 1) / ranks;
                let weight =
                    Weight::new(value.narrow(0, rows.start as i64, rows.len() as i64).copy());
                let alone = [Replication::alone()];
                let gradients =
                    GradientBuckets::new(&[(weight.clone(), 0)], &alone, 1 << 20, true, &Cpu)
                        .unwrap();
                gradients.begin(1);
                let group = world.all("vocabulary").unwrap();
                let own = VocabularyRows {
                    rows,
                    total: vocab as usize,
                    group: &group,
                };
                let scale = LossScale {
                    factor: 0.5,
                    logits_divisor: 2.0,
                };
                let loss = cross_entropy(&x, &weight, &labels, scale, &own).unwrap();
                loss.backward();
                let gradients = (x.grad().copy(), gradients.gradient(0).copy());
                let detached = x.detach();
                let without = cross_entropy(&detached, &weight, &labels, scale, &own).unwrap();
                (loss.detach(), without, gradients.0, gradients.1)
            })
        };
        let weight_leaf = value.set_requires_grad(true);
        let logits = x.matmul(&weight_leaf.tr()) / 2.0;
        let plain =
            logits.cross_entropy_loss(&labels, None::<Tensor>, tch::Reduction::Sum, IGNORED, 0.0)
                * 0.5;
        plain.backward();
        let grad_x = x.grad();
        for ranks in [1, 3] {
            let copies = shared.lock().each_ref().map(Tensor::copy);
            let parts = run(ranks, Mutex::new(copies));
            let zeros = grad_x.zeros_like();
            let sum_of_inputs = parts.iter().fold(zeros, |sum, part| sum + &part.2);
            let of_weight = Tensor::cat(&parts.iter().map(|part| &part.3).collect::<Vec<_>>(), 0);
            for (ours, without, _, _) in &parts {
                assert!(
                    ours.allclose(&plain, 1e-5, 1e-5, false)
                        && without.allclose(&plain, 1e-5, 1e-5, false)
                );
            }
            assert!(
                sum_of_inputs.allclose(&grad_x, 1e-4, 1e-6, false),
                "{ranks} ranks"
            );
            assert!(
                of_weight.allclose(&weight_leaf.grad(), 1e-4, 1e-6, false),
                "{ranks} ranks"
            );
        }
    }
}
