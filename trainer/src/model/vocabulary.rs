//! Embedding and output layer split by rows over all ranks of a pipeline (arXiv 2411.05288,
//! sections 3 and 4).
//!
//! The rows are split over the ranks of the pipeline times the tensor-parallel ranks. In pass S
//! each rank computes its logits and their softmax against its own statistics. The ranks then
//! exchange a maximum, a sum and the label's logit per token, from which one factor per token
//! corrects the softmax.
//!
//! - `vocab-1`: T computes the input's gradient.
//! - `vocab-2`: S computes it against local statistics, and the same factor corrects it.
//! - `naive`: S ends with the logits. The ranks agree on the largest, N computes exponentials, and
//!   the factor is one over their sum.
// Shapes: T tokens, D hidden, V vocabulary, v rows of it on this rank.

use super::{
    activations::FP32_BYTES,
    loss::{IGNORED, LossScale, OutputShape, logits_chunk_bytes},
};
use kernels::{gemm_into, softmax, softmax_gradient};
use parallel::{
    CommError, Communicator, ReduceOp, Weight,
    pipeline::{CollectiveFn, Vocabulary},
};
use std::ops::Range;
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// Results of pass S on this rank, for pass T.
pub(crate) struct LocalSoftmax {
    /// `[T, D]`.
    hidden: Tensor,
    /// `[T, v]` in the model's dtype: softmax over this rank's rows only. With `naive` in fp32: the
    /// logits, and after N their exponentials.
    probs: Tensor,
    /// `[T]` int64: the label's row on this rank.
    target: Tensor,
    /// `[T]` fp32: 1 if this rank has the label's row, else 0.
    owned: Tensor,
    /// `[T]` fp32: gradient of the total loss with respect to each token's loss, over the divisor
    /// of the logits.
    weight: Tensor,
    /// `[3, T]` fp32: maximum, sum of exponentials, label's logit.
    statistics: Tensor,
    /// Set only with `vocab-2`.
    input_gradient: Option<InputGradient>,
}

/// The two terms of the input's gradient, each `[T, D]`.
struct InputGradient {
    /// Rows of the matrix, weighted by the softmax.
    mixed: Tensor,
    /// Row of the label.
    target: Tensor,
}

impl InputGradient {
    fn shallow_clone(&self) -> InputGradient {
        InputGradient {
            mixed: self.mixed.shallow_clone(),
            target: self.target.shallow_clone(),
        }
    }
}

/// Returns start and length of chunks of tokens whose fp32 logits stay within the limit.
fn chunks(tokens: i64, rows: i64, device: Device) -> impl Iterator<Item = (i64, i64)> {
    let fitting = logits_chunk_bytes(device == Device::Cpu) / 4 / rows.max(1) as usize;
    let chunk = fitting.clamp(1, tokens.max(1) as usize) as i64;
    let starts = (0..tokens).step_by(chunk as usize);
    starts.map(move |start| (start, chunk.min(tokens - start)))
}

/// Returns the bytes that the passes of `algorithm` keep of one microbatch from S to T.
pub(crate) fn softmax_bytes(shape: &OutputShape, algorithm: Vocabulary) -> u64 {
    let states = shape.tokens * shape.hidden * shape.element;
    let logits = shape.tokens * shape.rows;
    match algorithm {
        // The hidden states, and the gradient of the input on its way to the last stage.
        Vocabulary::Vocab1 | Vocabulary::Interlaced => logits * shape.element + 2 * states,
        // Also the parts of that gradient, and what the exchange makes of them.
        Vocabulary::Vocab2 => logits * shape.element + 5 * states,
        Vocabulary::Naive => {
            // The logits of a chunk, and their quotient.
            let chunks = 2 * (logits_chunk_bytes(shape.on_host) as u64).min(logits * FP32_BYTES);
            logits * FP32_BYTES + chunks + 2 * states
        }
    }
}

/// Runs pass S for hidden states `[T, D]` and labels `[T]`. `weight` has the rows `rows` of the
/// output layer. Without an `algorithm` it computes nothing for gradients.
pub(crate) fn logits(
    hidden: &Tensor,
    weight: &Weight,
    rows: &Range<usize>,
    labels_t: &Tensor,
    scale: LossScale,
    algorithm: Option<Vocabulary>,
) -> LocalSoftmax {
    let kind = hidden.kind();
    let device = hidden.device();
    let divisor = scale.logits_divisor;
    let matrix = weight.value();
    let tokens = hidden.size()[0];
    let own = rows.len() as i64;
    let shifted = labels_t - rows.start as i64;
    let inside = shifted.ge(0).logical_and(&shifted.lt(own));
    let owned = inside.to_kind(Kind::Float);
    let target = shifted.clamp(0, own - 1);
    let statistics = Tensor::zeros([3, tokens], (Kind::Float, device));
    let naive = algorithm == Some(Vocabulary::Naive);
    let saved_tokens = if algorithm.is_some() { tokens } else { 0 };
    let saved_kind = if naive { Kind::Float } else { kind };
    let probs = Tensor::empty([saved_tokens, own], (saved_kind, device));
    let input_gradient = (algorithm == Some(Vocabulary::Vocab2)).then(|| InputGradient {
        target: matrix.index_select(0, &target) * owned.unsqueeze(1).to_kind(kind),
        mixed: hidden.empty_like(),
    });
    for (start, len) in chunks(tokens, own, device) {
        let x = hidden.narrow(0, start, len);
        let statistic = |index: i64| statistics.get(index).narrow(0, start, len);
        // The softmax overwrites the logits, in the memory that is saved.
        let logits = if algorithm.is_some() && !naive {
            probs.narrow(0, start, len)
        } else {
            Tensor::empty([len, own], (kind, device))
        };
        gemm_into(&logits, &x, &matrix.tr());
        let index = target.narrow(0, start, len).unsqueeze(1);
        let of_target = logits.gather(1, &index, false).squeeze_dim(1);
        let of_target = of_target.to_kind(Kind::Float) * owned.narrow(0, start, len) / divisor;
        statistic(2).copy_(&of_target);
        if naive {
            let logits = logits.to_kind(Kind::Float) / divisor;
            statistic(0).copy_(&logits.amax([1i64].as_slice(), false));
            probs.narrow(0, start, len).copy_(&logits);
            continue;
        }
        let (largest, sum) = softmax(&logits, divisor, &logits);
        statistic(0).copy_(&largest);
        statistic(1).copy_(&sum);
        if let Some(InputGradient { mixed, .. }) = &input_gradient {
            gemm_into(&mixed.narrow(0, start, len), &logits, &matrix);
        }
    }
    let counted = labels_t.not_equal(IGNORED).to_kind(Kind::Float);
    LocalSoftmax {
        hidden: hidden.shallow_clone(),
        probs,
        target,
        owned,
        weight: counted * (scale.factor / divisor),
        statistics,
        input_gradient,
    }
}

impl LocalSoftmax {
    /// Returns the largest logit of each token on this rank, `[T]`.
    pub(crate) fn largest(&self) -> Tensor {
        self.statistics.get(0).copy()
    }

    /// Runs pass N: subtracts all ranks' largest logit `[T]` and computes exponentials and their
    /// sum on this rank.
    pub(crate) fn normalize(&mut self, largest: &Tensor) {
        self.statistics.get(0).copy_(largest);
        let device = self.probs.device();
        for (start, len) in chunks(self.probs.size()[0], self.probs.size()[1], device) {
            let mut chunk = self.probs.narrow(0, start, len);
            let exponentials = chunk
                .subtract_(&largest.narrow(0, start, len).unsqueeze(1))
                .exp_();
            let sum = exponentials.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            self.statistics.get(1).narrow(0, start, len).copy_(&sum);
        }
    }

    /// Returns the collective after N. It gives the weighted loss summed over tokens, and one over
    /// the sum of all ranks' exponentials `[T]`.
    pub(crate) fn sum_over_ranks(&self, divisor: f64) -> CollectiveFn {
        let largest = self.statistics.get(0).copy();
        let weight = self.weight.shallow_clone();
        let sums = self.statistics.narrow(0, 1, 2).copy();
        Box::new(move |group: &dyn Communicator| {
            group.all_reduce(&sums, ReduceOp::Sum)?.wait()?;
            let total = sums.get(0);
            let of_target = sums.get(1);
            let losses = total.log() + &largest - of_target;
            let loss = (losses * &weight).sum(Kind::Float) * divisor;
            Ok(vec![loss, total.reciprocal()])
        })
    }

    /// Returns collective C1. It gives the weighted loss summed over tokens, the factor `[T]` that
    /// corrects this rank's softmax, and with `vocab-2` the rows `rows` of the input's gradient.
    pub(crate) fn exchange(&self, divisor: f64, rows: Option<Range<i64>>) -> CollectiveFn {
        let own = self.statistics.shallow_clone();
        let weight = self.weight.shallow_clone();
        let input_gradient = self
            .input_gradient
            .as_ref()
            .map(InputGradient::shallow_clone);
        Box::new(move |group: &dyn Communicator| {
            let tokens = own.size()[1];
            let ranks = group.size() as i64;
            let all = Tensor::empty([3 * ranks, tokens], (own.kind(), own.device()));
            group.all_gather(&all, &own)?.wait()?;
            let all = all.view([ranks, 3, tokens]);
            let largest = all.select(1, 0);
            let sums = all.select(1, 1);
            let targets = all.select(1, 2);
            let first = [0i64];
            let highest = largest.amax(first.as_slice(), false);
            let scaled = sums * (largest - &highest).exp();
            let total = scaled.sum_dim_intlist(first.as_slice(), false, Kind::Float);
            let of_target = targets.sum_dim_intlist(first.as_slice(), false, Kind::Float);
            let losses = total.log() + highest - of_target;
            let loss = (losses * &weight).sum(Kind::Float) * divisor;
            let correction = scaled.get(group.rank() as i64) / total;
            let mut results = vec![loss, correction.shallow_clone()];
            if let Some(InputGradient { mixed, target }) = &input_gradient {
                let by_token = |t: &Tensor| t.unsqueeze(1).to_kind(mixed.kind());
                let gradient = (mixed * by_token(&correction) - target) * by_token(&weight);
                group.all_reduce(&gradient, ReduceOp::Sum)?.wait()?;
                results.extend(rows.as_ref().map(|rows| narrow(&gradient, rows)));
            }
            Ok::<_, CommError>(results)
        })
    }

    /// Runs pass T: adds the gradient of this rank's rows. With `with_input` it also returns this
    /// rank's part of the input's gradient `[T, D]`.
    pub(crate) fn backward(
        self,
        weight: &Weight,
        correction: &Tensor,
        with_input: bool,
    ) -> Result<Option<Tensor>, Error> {
        let kind = self.hidden.kind();
        let matrix = weight.value();
        let gradient = with_input.then(|| self.hidden.empty_like());
        let contribution = weight.contribution()?;
        let device = self.hidden.device();
        for (start, len) in chunks(self.hidden.size()[0], self.probs.size()[1], device) {
            let part = |t: &Tensor| t.narrow(0, start, len);
            let scale = part(correction) * part(&self.weight);
            let minus = part(&self.owned) * part(&self.weight);
            let of_logits = part(&self.probs);
            softmax_gradient(&of_logits, &scale, &part(&self.target), &minus);
            let of_logits = of_logits.to_kind(kind);
            let sum = contribution.sum();
            sum.gemm_accumulate(&of_logits.tr(), &part(&self.hidden));
            if let Some(gradient) = &gradient {
                gemm_into(&gradient.narrow(0, start, len), &of_logits, &matrix);
            }
        }
        contribution.finish()?;
        Ok(gradient)
    }
}

fn narrow(tensor: &Tensor, rows: &Range<i64>) -> Tensor {
    tensor.narrow(0, rows.start, rows.end - rows.start)
}

/// Returns the collective that gives the maximum over all ranks.
pub(crate) fn maximum(largest: Tensor) -> CollectiveFn {
    Box::new(move |group: &dyn Communicator| {
        group.all_reduce(&largest, ReduceOp::Max)?.wait()?;
        Ok(vec![largest.shallow_clone()])
    })
}

/// Returns the collective C2, and that of the embedding: it sums `part` over the ranks and gives
/// the rows `rows` to the ranks that need any.
pub(crate) fn sum(part: Tensor, rows: Option<Range<i64>>) -> CollectiveFn {
    Box::new(move |group: &dyn Communicator| {
        group.all_reduce(&part, ReduceOp::Sum)?.wait()?;
        Ok(rows.iter().map(|rows| narrow(&part, rows)).collect())
    })
}

/// Returns the collective C0, and that of the embedding's backward: it broadcasts the rows of the
/// ranks `roots` into `whole`. `own` has this rank's rows if it is one of them.
pub(crate) fn collect(whole: Tensor, own: Option<Tensor>, roots: Range<usize>) -> CollectiveFn {
    Box::new(move |group: &dyn Communicator| {
        let rows = whole.size()[0] / roots.len() as i64;
        for (index, root) in roots.clone().enumerate() {
            let part = whole.narrow(0, index as i64 * rows, rows);
            if let Some(own) = own.as_ref().filter(|_| root == group.rank()) {
                part.shallow_clone().copy_(own);
            }
            group.broadcast(&part, root)?.wait()?;
        }
        Ok(vec![whole.shallow_clone()])
    })
}

/// Runs pass IF: looks up `tokens_t` `[T]` in this rank's rows. Returns `[T, D]`, zero for tokens
/// of other ranks.
pub(crate) fn embed_rows(tokens_t: &Tensor, weight: &Weight, rows: &Range<usize>) -> Tensor {
    let (index, inside) = local_rows(tokens_t, rows);
    let found = weight.value().index_select(0, &index);
    &found * inside.to_kind(found.kind())
}

/// Runs pass IB: adds to `sum` the gradient of this rank's rows, given that of the embedded tokens
/// `[T, D]`.
pub(crate) fn add_rows(tokens_t: &Tensor, gradient: &Tensor, sum: &Tensor, rows: &Range<usize>) {
    let (index, inside) = local_rows(tokens_t, rows);
    let targets = index.masked_fill(&inside.squeeze_dim(1).eq(0.0), -1);
    kernels::add_rows(sum, &targets, &gradient.contiguous());
}

/// Returns the row of each token on this rank, and an fp32 column: 1 if this rank has it, else 0.
fn local_rows(tokens_t: &Tensor, rows: &Range<usize>) -> (Tensor, Tensor) {
    let shifted = tokens_t - rows.start as i64;
    let inside = shifted.ge(0).logical_and(&shifted.lt(rows.len() as i64));
    let index = shifted.clamp(0, rows.len() as i64 - 1);
    (index, inside.to_kind(Kind::Float).unsqueeze(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_few_large_chunks() {
        // A microbatch of 4 x 4096 tokens and 50304 words.
        let count = |device| chunks(16_384, 50_304, device).count();
        assert_eq!(count(Device::Cpu), 198);
        assert_eq!(count(Device::Cuda(0)), 7);
        for device in [Device::Cpu, Device::Cuda(0)] {
            let mut end = 0;
            for (start, len) in chunks(16_384, 50_304, device) {
                assert_eq!(start, end);
                assert!(len as usize * 4 * 50_304 <= logits_chunk_bytes(device == Device::Cpu));
                end += len;
            }
            assert_eq!(end, 16_384);
        }
    }
}
