//! Embedding and output layer shared out by rows over the ranks of a pipeline, times those that split matrices (arXiv
//! 2411.05288, sections 3 and 4).
//!
//! Each rank computes its own logits and their softmax against its own statistics (S). What the ranks tell each other, a
//! maximum, a sum and the label's logit a token, turns that into the true softmax by one factor a token. With `vocab-2` S
//! also computes the input's gradient against local statistics, and the same factor corrects it; with `vocab-1` T does. With
//! `naive` S ends with the logits: the ranks agree on the largest, N takes exponentials, and the factor is one over their sum.
// Shapes: T tokens, D hidden, V vocabulary, v rows of it on this rank.

use super::loss::IGNORED;
use kernels::{gemm_into, softmax, softmax_gradient};
use parallel::pipeline::{CollectiveFn, Vocabulary};
use parallel::{CommError, Communicator, ReduceOp, Weight};
use std::ops::Range;
use tch::{Kind, Tensor};
use torch_ext::Error;

/// fp32 logits that exist at once take up to this many bytes.
const CHUNK_BYTES: usize = 16 << 20;

/// What S leaves for T.
pub(crate) struct LocalSoftmax {
    /// `[T, D]`.
    hidden: Tensor,
    /// `[T, v]`, of the model's dtype: softmax over this rank's rows alone. With `naive` fp32, logits, after N exponentials.
    probs: Tensor,
    /// `[T]` int64: the label's row on this rank, and whether it is one (fp32).
    target: Tensor,
    owned: Tensor,
    /// `[T]` fp32: the gradient of the total loss with respect to each token's loss, over the logits' divisor.
    weight: Tensor,
    /// `[3, T]` fp32: maximum, sum of exponentials, label's logit.
    statistics: Tensor,
    /// `vocab-2`: `[T, D]` each, the two parts of the input's gradient.
    parts: Option<(Tensor, Tensor)>,
}

/// Chunks of `tokens` whose logits over `rows` rows fit.
fn chunks(tokens: i64, rows: i64) -> impl Iterator<Item = (i64, i64)> {
    let chunk = (CHUNK_BYTES / 4 / rows.max(1) as usize).clamp(1, tokens.max(1) as usize) as i64;
    (0..tokens)
        .step_by(chunk as usize)
        .map(move |start| (start, chunk.min(tokens - start)))
}

/// S of hidden states `[T, D]` and labels `[T]`: rows `rows` of the output layer are `weight`. The loss of each token enters
/// the total with `factor`; without `learning` nothing is computed for gradients.
pub(crate) fn logits(
    hidden: &Tensor,
    weight: &Weight,
    rows: &Range<usize>,
    labels_t: &Tensor,
    factor: f64,
    divisor: f64,
    algorithm: Option<Vocabulary>,
) -> LocalSoftmax {
    let kind = hidden.kind();
    let matrix = weight.value();
    let tokens = hidden.size()[0];
    let own = rows.len() as i64;
    let float = (Kind::Float, hidden.device());
    let shifted = labels_t - rows.start as i64;
    let inside = shifted.ge(0).logical_and(&shifted.lt(own));
    let owned = inside.to_kind(Kind::Float);
    let target = shifted.clamp(0, own - 1);
    let statistics = Tensor::zeros([3, tokens], float);
    let naive = algorithm == Some(Vocabulary::Naive);
    let kept = if naive { Kind::Float } else { kind };
    let probs = Tensor::empty(
        [if algorithm.is_some() { tokens } else { 0 }, own],
        (kept, hidden.device()),
    );
    let parts = (algorithm == Some(Vocabulary::Vocab2)).then(|| {
        let of_target = matrix.index_select(0, &target) * owned.unsqueeze(1).to_kind(kind);
        (hidden.empty_like(), of_target)
    });
    for (start, len) in chunks(tokens, own) {
        let x = hidden.narrow(0, start, len);
        let part = |index: i64| statistics.get(index).narrow(0, start, len);
        // The logits become the softmax in the memory that keeps it.
        let logits = if algorithm.is_some() && !naive {
            probs.narrow(0, start, len)
        } else {
            Tensor::empty([len, own], (kind, hidden.device()))
        };
        gemm_into(&logits, &x, &matrix.tr());
        let of_target = logits
            .gather(1, &target.narrow(0, start, len).unsqueeze(1), false)
            .squeeze_dim(1);
        part(2).copy_(&(of_target.to_kind(Kind::Float) * owned.narrow(0, start, len) / divisor));
        if naive {
            let logits = logits.to_kind(Kind::Float) / divisor;
            part(0).copy_(&logits.amax([1i64].as_slice(), false));
            probs.narrow(0, start, len).copy_(&logits);
            continue;
        }
        let (largest, sum) = softmax(&logits, divisor, &logits);
        part(0).copy_(&largest);
        part(1).copy_(&sum);
        if let Some((mixed, _)) = &parts {
            gemm_into(&mixed.narrow(0, start, len), &logits, &matrix);
        }
    }
    let counted = labels_t.not_equal(IGNORED).to_kind(Kind::Float);
    LocalSoftmax {
        hidden: hidden.shallow_clone(),
        probs,
        target,
        owned,
        weight: counted * (factor / divisor),
        statistics,
        parts,
    }
}

impl LocalSoftmax {
    /// The largest logit of each token on this rank, `[T]`.
    pub(crate) fn largest(&self) -> Tensor {
        self.statistics.get(0).copy()
    }

    /// N: exponentials of the logits less the largest of all ranks' `[T]`, and their sum on this rank.
    pub(crate) fn normalize(&mut self, largest: &Tensor) {
        self.statistics.get(0).copy_(largest);
        for (start, len) in chunks(self.probs.size()[0], self.probs.size()[1]) {
            let mut chunk = self.probs.narrow(0, start, len);
            let exponentials = chunk
                .subtract_(&largest.narrow(0, start, len).unsqueeze(1))
                .exp_();
            let sum = exponentials.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            self.statistics.get(1).narrow(0, start, len).copy_(&sum);
        }
    }

    /// After N: the loss, summed over tokens and weighted, and one over the sum of all ranks' exponentials `[T]`.
    pub(crate) fn sum_over_ranks(&self, divisor: f64) -> CollectiveFn {
        let largest = self.statistics.get(0).copy();
        let weight = self.weight.shallow_clone();
        let sums = self.statistics.narrow(0, 1, 2).copy();
        Box::new(move |group: &dyn Communicator| {
            group.all_reduce(&sums, ReduceOp::Sum)?.wait()?;
            let total = sums.get(0);
            let of_target = sums.get(1);
            let loss = ((total.log() + &largest - of_target) * &weight).sum(Kind::Float) * divisor;
            Ok(vec![loss, total.reciprocal()])
        })
    }

    /// C1: the loss, summed over tokens and weighted, then the factor `[T]` that makes this rank's softmax the true one, and
    /// with `vocab-2` the rows `takes` of the input's gradient.
    pub(crate) fn exchange(&self, divisor: f64, takes: Option<Range<i64>>) -> CollectiveFn {
        let own = self.statistics.shallow_clone();
        let weight = self.weight.shallow_clone();
        let parts = self
            .parts
            .as_ref()
            .map(|(mixed, target)| (mixed.shallow_clone(), target.shallow_clone()));
        Box::new(move |group: &dyn Communicator| {
            let tokens = own.size()[1];
            let all = Tensor::empty(
                [3 * group.size() as i64, tokens],
                (own.kind(), own.device()),
            );
            group.all_gather(&all, &own)?.wait()?;
            let all = all.view([group.size() as i64, 3, tokens]);
            let largest = all.select(1, 0);
            let sums = all.select(1, 1);
            let targets = all.select(1, 2);
            let first = [0i64];
            let highest = largest.amax(first.as_slice(), false);
            let scaled = sums * (largest - &highest).exp();
            let total = scaled.sum_dim_intlist(first.as_slice(), false, Kind::Float);
            let of_target = targets.sum_dim_intlist(first.as_slice(), false, Kind::Float);
            let loss = ((total.log() + highest - of_target) * &weight).sum(Kind::Float) * divisor;
            let correction = scaled.get(group.rank() as i64) / total;
            let mut results = vec![loss, correction.shallow_clone()];
            if let Some((mixed, target)) = &parts {
                let by_token = |t: &Tensor| t.unsqueeze(1).to_kind(mixed.kind());
                let gradient = (mixed * by_token(&correction) - target) * by_token(&weight);
                group.all_reduce(&gradient, ReduceOp::Sum)?.wait()?;
                results.extend(takes.as_ref().map(|rows| narrow(&gradient, rows)));
            }
            Ok::<_, CommError>(results)
        })
    }

    /// T: adds the gradient of this rank's rows, and gives this rank's part of the input's gradient `[T, D]` where
    /// `input_too`.
    ///
    /// # Errors
    /// When nothing collects the gradient.
    pub(crate) fn backward(
        self,
        weight: &Weight,
        correction: &Tensor,
        input_too: bool,
    ) -> Result<Option<Tensor>, Error> {
        let kind = self.hidden.kind();
        let matrix = weight.value();
        let gradient = input_too.then(|| self.hidden.empty_like());
        let contribution = weight.contribution()?;
        for (start, len) in chunks(self.hidden.size()[0], self.probs.size()[1]) {
            let part = |t: &Tensor| t.narrow(0, start, len);
            let scale = part(correction) * part(&self.weight);
            let minus = part(&self.owned) * part(&self.weight);
            let of_logits = part(&self.probs);
            softmax_gradient(&of_logits, &scale, &part(&self.target), &minus);
            let of_logits = of_logits.to_kind(kind);
            contribution
                .sum()
                .gemm_accumulate(&of_logits.tr(), &self.hidden.narrow(0, start, len));
            if let Some(gradient) = &gradient {
                gemm_into(&gradient.narrow(0, start, len), &of_logits, &matrix);
            }
        }
        contribution.finish()?;
        Ok(gradient)
    }
}

/// The rows `rows` of `tensor`.
fn narrow(tensor: &Tensor, rows: &Range<i64>) -> Tensor {
    tensor.narrow(0, rows.start, rows.end - rows.start)
}

/// The largest of all ranks' numbers.
pub(crate) fn maximum(largest: Tensor) -> CollectiveFn {
    Box::new(move |group: &dyn Communicator| {
        group.all_reduce(&largest, ReduceOp::Max)?.wait()?;
        Ok(vec![largest.shallow_clone()])
    })
}

/// C2 and the sum of the embedding: of `part`, summed over the ranks, the rows `takes`, for those that need any.
pub(crate) fn sum(part: Tensor, takes: Option<Range<i64>>) -> CollectiveFn {
    Box::new(move |group: &dyn Communicator| {
        group.all_reduce(&part, ReduceOp::Sum)?.wait()?;
        Ok(takes.iter().map(|rows| narrow(&part, rows)).collect())
    })
}

/// C0 and the way back of the embedding: for all, what the ranks `roots` have, each as many rows, in `whole`; `own` is this
/// rank's part, where it is one of them.
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

/// IF: this rank's rows for `tokens_t` `[T]`, zero for tokens of other ranks: `[T, D]`.
pub(crate) fn rows_of(tokens_t: &Tensor, weight: &Weight, rows: &Range<usize>) -> Tensor {
    let (index, inside) = own_rows(tokens_t, rows);
    let found = weight.value().index_select(0, &index);
    &found * inside.to_kind(found.kind())
}

/// IB: adds to `sum` the gradient of this rank's rows, given that of the embedded tokens `[T, D]`.
pub(crate) fn add_rows(tokens_t: &Tensor, gradient: &Tensor, sum: &Tensor, rows: &Range<usize>) {
    let (index, inside) = own_rows(tokens_t, rows);
    let _ = sum
        .shallow_clone()
        .index_add_(0, &index, &(gradient.to_kind(Kind::Float) * inside));
}

/// The row of each token on this rank, and a column of ones where it has one, zeros elsewhere (fp32).
fn own_rows(tokens_t: &Tensor, rows: &Range<usize>) -> (Tensor, Tensor) {
    let shifted = tokens_t - rows.start as i64;
    let inside = shifted.ge(0).logical_and(&shifted.lt(rows.len() as i64));
    (
        shifted.clamp(0, rows.len() as i64 - 1),
        inside.to_kind(Kind::Float).unsqueeze(1),
    )
}
