//! Tensor parallelism with sequence parallelism.
//!
//! Tensor parallelism: Megatron-LM, arXiv 1909.08053, section 3. Sequence parallelism:
//! arXiv 2205.05198, section 4.2.2.
//!
//! Between the blocks of a layer every rank has its own rows of the tokens. A block gathers all
//! rows, computes its columns or heads, and leaves each rank its rows of the sum. Rows are
//! transferred in chunks, so that transfers overlap with computation: while one chunk is computed,
//! the next is gathered and the last is summed, in forward and in backward.
// Shapes: n rows of a rank, R ranks, D hidden.

use crate::{
    Activation, Communicator, ReduceOp, Work,
    collectives::{PendingGradient, fill, take},
    recompute::SavedTensor,
};
use std::{ops::Range, sync::Arc};
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// The ranks that split every matrix.
#[derive(Clone)]
pub struct TensorParallel {
    group: Arc<dyn Communicator>,
    chunks: usize,
}

impl TensorParallel {
    /// Creates tensor parallelism over `group` that transfers rows in `chunks` parts.
    pub fn new(group: Arc<dyn Communicator>, chunks: usize) -> TensorParallel {
        TensorParallel { group, chunks }
    }

    /// Returns the communicator of the ranks.
    pub fn group(&self) -> &Arc<dyn Communicator> {
        &self.group
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> usize {
        self.group.size()
    }

    /// Returns this rank's number within the group.
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// Returns the number of times that a block's forward uses a weight.
    pub fn uses_per_forward(&self) -> usize {
        if self.size() == 1 {
            return 1;
        }
        self.chunks
    }

    /// Returns this rank's part of `0..total`, which the group size divides.
    pub fn local_range(&self, total: i64) -> Range<i64> {
        let per_rank = total / self.size() as i64;
        let start = per_rank * self.rank() as i64;
        start..start + per_rank
    }

    /// Returns the rows, of `rows`, in chunk `index`.
    fn chunk(&self, rows: i64, index: usize) -> Range<i64> {
        let chunks = self.chunks as i64;
        let index = index as i64;
        let start = rows * index / chunks;
        let end = rows * (index + 1) / chunks;
        start..end
    }

    /// Returns `compute` of all rows `[R * n, D]`, of which `x_nd` `[n, D]` are this rank's.
    ///
    /// This is a column-parallel layer. `compute` returns tensors with one row for each of its
    /// rows.
    ///
    /// # Collective
    /// All ranks of the group, in forward and in backward, as for the other layers here.
    ///
    /// # Errors
    /// The errors of `compute`, and if a collective fails.
    pub fn column_parallel(
        &self,
        x_nd: &Activation,
        mut compute: impl FnMut(&Activation) -> Result<Vec<Tensor>, Error>,
    ) -> Result<Vec<Tensor>, Error> {
        if self.size() == 1 {
            return compute(x_nd);
        }
        let ranks = self.size() as i64;
        let mut parts: Vec<Vec<Tensor>> = Vec::new();
        for chunk in self.start_gather(x_nd)? {
            let outputs = compute(&chunk.wait()?)?;
            parts.resize_with(outputs.len(), Vec::new);
            for (parts, output) in parts.iter_mut().zip(outputs) {
                let width = output.size()[1];
                parts.push(output.view([ranks, -1, width]));
            }
        }
        let join = |parts: &Vec<Tensor>| Tensor::cat(parts, 1).flatten(0, 1);
        Ok(parts.iter().map(join).collect())
    }

    /// Returns this rank's rows `[n, D]` of the sum over ranks of `compute` of all rows of `x`.
    ///
    /// This is a row-parallel layer; `x` is `[R * n, ...]`.
    ///
    /// # Errors
    /// See [`TensorParallel::column_parallel`].
    pub fn row_parallel(
        &self,
        x: &Tensor,
        mut compute: impl FnMut(&Tensor) -> Result<Tensor, Error>,
    ) -> Result<Tensor, Error> {
        if self.size() == 1 {
            return compute(x);
        }
        let width = x.size()[1];
        let by_rank = x.view([self.size() as i64, -1, width]);
        let rows = by_rank.size()[1];
        let mut sum = ChunkedReduceScatter::new(self.group.clone());
        for index in 0..self.chunks {
            let chunk = self.chunk(rows, index);
            let len = chunk.end - chunk.start;
            let chunk = by_rank
                .narrow(1, chunk.start, len)
                .reshape([self.size() as i64 * len, width]);
            sum.add(&compute(&chunk)?)?;
        }
        sum.finish()
    }

    /// Returns this rank's rows `[n, D]` of the sum over ranks of `compute` of all rows.
    ///
    /// This is a column-parallel layer and the row-parallel one after it. `x_nd` `[n, D]` are this
    /// rank's rows.
    ///
    /// # Errors
    /// See [`TensorParallel::column_parallel`].
    pub fn column_row_parallel(
        &self,
        x_nd: &Activation,
        mut compute: impl FnMut(&Activation) -> Result<Tensor, Error>,
    ) -> Result<Tensor, Error> {
        if self.size() == 1 {
            return compute(x_nd);
        }
        let mut sum = ChunkedReduceScatter::new(self.group.clone());
        for chunk in self.start_gather(x_nd)? {
            sum.add(&compute(&chunk.wait()?)?)?;
        }
        sum.finish()
    }

    /// Starts to gather the chunks of every rank's rows.
    ///
    /// Backward keeps only this rank's rows and gathers the others again.
    fn start_gather(&self, x: &Activation) -> Result<Vec<PendingChunk>, Error> {
        let x_nd = &x.value;
        let (rows, width) = x_nd.size2().map_err(libtorch_error)?;
        let mut outputs = Vec::new();
        let mut works = Vec::new();
        for index in 0..self.chunks {
            let chunk = self.chunk(rows, index);
            let len = chunk.end - chunk.start;
            let all = Tensor::empty([self.size() as i64 * len, width], options(x_nd));
            let own = tch::no_grad(|| x_nd.detach().narrow(0, chunk.start, len).contiguous());
            works.push(self.group.all_gather(&all, &own)?);
            outputs.push(all);
        }
        // Each receives this rank's rows of the sum of a chunk's gradient.
        let slots: Vec<PendingGradient> =
            works.iter().map(|_| PendingGradient::default()).collect();
        let filled = slots.clone();
        let outputs = attach_backward(&[x_nd], outputs, move |_| {
            let parts: Vec<Tensor> = filled.iter().map(take).collect::<Result<_, _>>()?;
            Ok(vec![Some(Tensor::cat(&parts, 0))])
        })?;
        let mut chunks = Vec::new();
        for (index, ((all, work), gradient)) in
            outputs.into_iter().zip(works).zip(slots).enumerate()
        {
            chunks.push(PendingChunk {
                group: self.group.clone(),
                all,
                work,
                gradient,
                saved: x.saved(),
                own: self.chunk(rows, index),
            });
        }
        Ok(chunks)
    }
}

/// A chunk of every rank's rows that is being gathered.
struct PendingChunk {
    group: Arc<dyn Communicator>,
    /// `[R * len, D]`, part of the graph.
    all: Tensor,
    work: Work,
    gradient: PendingGradient,
    /// All chunks of this rank's rows `[n, D]`.
    saved: SavedTensor,
    /// The rows of `saved` in this chunk.
    own: Range<i64>,
}

impl PendingChunk {
    /// Waits for the chunk, which backward gathers again.
    fn wait(self) -> Result<Activation, Error> {
        self.work.wait()?;
        let group = self.group;
        let saved = self.saved;
        let own = self.own;
        let width = self.all.size()[1];
        let value = sum_gradient(&self.all, group.clone(), self.gradient)?;
        Ok(Activation::recomputable(value, move || {
            let len = own.end - own.start;
            let own = saved.get()?.narrow(0, own.start, len).contiguous();
            let all = Tensor::empty([len * group.size() as i64, width], options(&own));
            group.all_gather(&all, &own).and_then(Work::wait)?;
            Ok(all)
        }))
    }
}

/// Returns `all`, whose gradient is summed over ranks: this rank's rows of it go to `slot`.
fn sum_gradient(
    all: &Tensor,
    group: Arc<dyn Communicator>,
    slot: PendingGradient,
) -> Result<Tensor, Error> {
    let shape = all.size();
    let kind = all.kind();
    let device = all.device();
    let mut outputs = attach_backward(&[all], vec![all.detach()], move |grads| {
        let grad = grad_or_zeros(&grads[0], &shape, kind, device).contiguous();
        let own_rows = shape[0] / group.size() as i64;
        let own = Tensor::empty([own_rows, shape[1]], (kind, device));
        let work = group.reduce_scatter(&own, &grad, ReduceOp::Sum)?;
        fill(&slot, work, own);
        // The gradient reaches the input through the slot.
        Ok(vec![None])
    })?;
    Ok(outputs.remove(0))
}

/// A reduce-scatter of rows, chunk by chunk.
struct ChunkedReduceScatter {
    group: Arc<dyn Communicator>,
    chunks: Vec<PendingSum>,
}

/// A chunk that is being summed.
struct PendingSum {
    work: Work,
    /// This rank's rows of the chunk.
    own: Tensor,
    /// An empty tensor that makes the chunk's node run after the sum's in backward.
    link: Tensor,
    /// Brings the chunk its gradient.
    gradient: PendingGradient,
}

impl ChunkedReduceScatter {
    fn new(group: Arc<dyn Communicator>) -> ChunkedReduceScatter {
        ChunkedReduceScatter {
            group,
            chunks: Vec::new(),
        }
    }

    /// Starts to sum a chunk `[R * n, D]`, the rows of one rank after those of another.
    fn add(&mut self, chunk: &Tensor) -> Result<(), Error> {
        let (rows, width) = chunk.size2().map_err(libtorch_error)?;
        let own_rows = rows / self.group.size() as i64;
        let own = Tensor::empty([own_rows, width], options(chunk));
        let addend = tch::no_grad(|| chunk.detach().contiguous());
        let work = self.group.reduce_scatter(&own, &addend, ReduceOp::Sum)?;
        let gradient = PendingGradient::default();
        let arrived = gradient.clone();
        let link = Tensor::zeros([0], (Kind::Float, chunk.device()));
        let mut link = attach_backward(&[chunk], vec![link], move |_| {
            Ok(vec![Some(take(&arrived)?)])
        })?;
        self.chunks.push(PendingSum {
            work,
            own,
            link: link.remove(0),
            gradient,
        });
        Ok(())
    }

    /// Waits for the sum and returns this rank's rows of it.
    fn finish(self) -> Result<Tensor, Error> {
        let mut parts = Vec::new();
        let mut links = Vec::new();
        let mut slots = Vec::new();
        for chunk in self.chunks {
            chunk.work.wait()?;
            parts.push(chunk.own);
            links.push(chunk.link);
            slots.push(chunk.gradient);
        }
        let sizes = parts
            .iter()
            .map(|part| part.size()[0])
            .collect::<Vec<i64>>();
        let sum = tch::no_grad(|| Tensor::cat(&parts, 0));
        let inputs: Vec<&Tensor> = links.iter().collect();
        let shape = sum.size();
        let kind = sum.kind();
        let device = sum.device();
        let group = self.group;
        let mut outputs = attach_backward(&inputs, vec![sum], move |grads| {
            let grad = grad_or_zeros(&grads[0], &shape, kind, device);
            // Backward reaches the last chunk first.
            let mut end = shape[0];
            for (size, slot) in sizes.iter().zip(&slots).rev() {
                let own = grad.narrow(0, end - size, *size).contiguous();
                let rows = size * group.size() as i64;
                let all = Tensor::empty([rows, shape[1]], (kind, device));
                let work = group.all_gather(&all, &own)?;
                fill(slot, work, all);
                end -= size;
            }
            Ok(slots.iter().map(|_| None).collect())
        })?;
        Ok(outputs.remove(0))
    }
}

fn options(tensor: &Tensor) -> (Kind, Device) {
    (tensor.kind(), tensor.device())
}

/// Returns an output's gradient, or zeros if the loss does not depend on it.
fn grad_or_zeros(grad: &Option<Tensor>, shape: &[i64], kind: Kind, device: Device) -> Tensor {
    match grad {
        Some(grad) => grad.shallow_clone(),
        None => Tensor::zeros(shape, (kind, device)),
    }
}

fn libtorch_error(error: tch::TchError) -> Error {
    Error::new(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Accelerator, Cpu, run_on_threads};
    use parking_lot::Mutex;
    use std::time::Duration;

    /// The results and the input's gradients on one rank.
    struct Results {
        in_one: Tensor,
        in_two: Tensor,
        grad_in_one: Tensor,
        grad_in_two: Tensor,
    }

    /// Computes `silu(x a) b` with `a` split by columns and `b` by rows, in one call and in two.
    fn compute_split(tensor: &TensorParallel, operands: [Tensor; 4]) -> Results {
        let [x, a, b, probe] = operands;
        let rows = tensor.local_range(6);
        let columns = tensor.local_range(8);
        let x = x.narrow(0, rows.start, 3).copy().set_requires_grad(true);
        let a = a.narrow(1, columns.start, 4);
        let b = b.narrow(0, columns.start, 4);
        let probe = probe.narrow(0, rows.start, 3);
        let kept = Activation::kept(&x);
        let in_one = tensor
            .column_row_parallel(&kept, |x| Ok(x.value.matmul(&a).silu().matmul(&b)))
            .unwrap();
        let hidden = tensor
            .column_parallel(&kept, |x| Ok(vec![x.value.matmul(&a).silu()]))
            .unwrap()
            .remove(0);
        let in_two = tensor
            .row_parallel(&hidden, |hidden| Ok(hidden.matmul(&b)))
            .unwrap();
        (&in_one * &probe).sum(Kind::Float).backward();
        let grad_in_one = x.grad().copy();
        (&in_two * &probe).sum(Kind::Float).backward();
        Results {
            in_one: in_one.detach(),
            in_two: in_two.detach(),
            grad_in_two: x.grad() - &grad_in_one,
            grad_in_one,
        }
    }

    #[test]
    fn a_split_block_has_the_values_and_gradients_of_the_whole() {
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let operands = [[6, 4], [4, 8], [8, 4], [6, 4]].map(|shape| random(&shape));
        let [x, a, b, probe] = &operands;
        let x = x.copy().set_requires_grad(true);
        let whole = x.matmul(a).silu().matmul(b);
        (&whole * probe).sum(Kind::Float).backward();
        for chunks in [1, 2, 5] {
            let shared = Mutex::new(operands.each_ref().map(Tensor::copy));
            let results = run_on_threads(2, Duration::from_secs(20), move |world| {
                let operands = shared.lock().each_ref().map(Tensor::copy);
                let group = world.all("tensor").unwrap();
                compute_split(&TensorParallel::new(group, chunks), operands)
            });
            let all = |pick: fn(&Results) -> &Tensor| {
                let parts: Vec<&Tensor> = results.iter().map(pick).collect();
                Tensor::cat(&parts, 0)
            };
            let assert_close = |actual: Tensor, expected: &Tensor| {
                let close = actual.allclose(expected, 1e-5, 1e-6, false);
                assert!(close, "{chunks} chunks");
            };
            assert_close(all(|r| &r.in_one), &whole.detach());
            assert_close(all(|r| &r.in_two), &whole.detach());
            assert_close(all(|r| &r.grad_in_one), &x.grad());
            assert_close(all(|r| &r.grad_in_two), &x.grad());
        }
    }
}
