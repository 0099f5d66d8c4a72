//! Tensor parallelism with sequence parallelism (arXiv 1909.08053, section 3; arXiv 2205.05198, section 4.2.2).
//!
//! Between a layer's blocks every rank has its own rows of the tokens. A block gathers all rows, computes its share of the
//! columns or heads, and leaves each rank its rows of the sum. Rows travel in chunks: while one is computed on, the next is
//! gathered and the last is summed, forward and backward.
// Shapes: n rows of a rank, R ranks, D hidden.

use crate::collectives::{PendingGradient, fill, take};
use crate::{Activation, Communicator, ReduceOp, Work};
use std::ops::Range;
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// The ranks that split every matrix.
#[derive(Clone)]
pub struct TensorParallel {
    group: Arc<dyn Communicator>,
    chunks: usize,
}

impl TensorParallel {
    /// For the ranks of `group`; rows travel in `chunks` parts.
    pub fn new(group: Arc<dyn Communicator>, chunks: usize) -> TensorParallel {
        TensorParallel { group, chunks }
    }

    /// The ranks.
    pub fn group(&self) -> &Arc<dyn Communicator> {
        &self.group
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.group.size()
    }

    /// This one among them.
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// How often a weight is used by a block's forward.
    pub fn uses_per_forward(&self) -> usize {
        if self.size() == 1 { 1 } else { self.chunks }
    }

    /// This rank's part of `0..total`, where ranks have as many each.
    pub fn local_range(&self, total: i64) -> Range<i64> {
        let each = total / self.size() as i64;
        each * self.rank() as i64..each * (self.rank() as i64 + 1)
    }

    fn chunk(&self, rows: i64, index: usize) -> (i64, i64) {
        let chunks = self.chunks as i64;
        let index = index as i64;
        let start = rows * index / chunks;
        let end = rows * (index + 1) / chunks;
        (start, end - start)
    }

    /// `compute` on all rows, of which `x_nd` `[n, D]` are this rank's: what it returns for `[R * n, D]`, tensors of one row
    /// for each of its rows. (A column-parallel layer.)
    ///
    /// # Collective
    /// All ranks of the group, forward and backward; so for all that follow.
    ///
    /// # Errors
    /// Those of `compute`, and when a collective fails.
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
        for chunk in self.gather(x_nd)? {
            let outputs = compute(&chunk()?)?;
            parts.resize_with(outputs.len(), Vec::new);
            for (parts, output) in parts.iter_mut().zip(outputs) {
                let width = output.size()[1];
                parts.push(output.view([ranks, -1, width]));
            }
        }
        Ok(parts
            .iter()
            .map(|parts| Tensor::cat(parts, 1).flatten(0, 1))
            .collect())
    }

    /// This rank's rows `[n, D]` of the sum over ranks of `compute` on all rows `x` `[R * n, ...]`. (A row-parallel layer.)
    ///
    /// # Errors
    /// As [`TensorParallel::column_parallel`].
    pub fn row_parallel(
        &self,
        x: &Tensor,
        mut compute: impl FnMut(&Tensor) -> Result<Tensor, Error>,
    ) -> Result<Tensor, Error> {
        if self.size() == 1 {
            return compute(x);
        }
        let ranks = self.size() as i64;
        let width = x.size()[1];
        let by_rank = x.view([ranks, -1, width]);
        let rows = by_rank.size()[1];
        let mut sum = ChunkedReduceScatter::new(self.group.clone());
        for index in 0..self.chunks {
            let (start, len) = self.chunk(rows, index);
            sum.add(&compute(
                &by_rank.narrow(1, start, len).reshape([ranks * len, width]),
            )?)?;
        }
        sum.finish()
    }

    /// This rank's rows `[n, D]` of the sum over ranks of `compute` on all rows, of which `x_nd` `[n, D]` are this rank's. (A
    /// column-parallel layer and the row-parallel one after it.)
    ///
    /// # Errors
    /// As [`TensorParallel::column_parallel`].
    pub fn column_row_parallel(
        &self,
        x_nd: &Activation,
        mut compute: impl FnMut(&Activation) -> Result<Tensor, Error>,
    ) -> Result<Tensor, Error> {
        if self.size() == 1 {
            return compute(x_nd);
        }
        let mut sum = ChunkedReduceScatter::new(self.group.clone());
        for chunk in self.gather(x_nd)? {
            sum.add(&compute(&chunk()?)?)?;
        }
        sum.finish()
    }

    /// Starts to gather the chunks of every rank's rows; calling one waits for it.
    ///
    /// Only this rank's rows are kept for backward; what it needs of the others' is gathered again.
    fn gather(
        &self,
        x: &Activation,
    ) -> Result<Vec<impl FnOnce() -> Result<Activation, Error> + use<>>, Error> {
        let x_nd = &x.value;
        let ranks = self.size() as i64;
        let (rows, width) = x_nd.size2().map_err(|e| Error::new(e.to_string()))?;
        let mut outputs = Vec::new();
        let mut works = Vec::new();
        for index in 0..self.chunks {
            let (start, len) = self.chunk(rows, index);
            let all = Tensor::empty([ranks * len, width], (x_nd.kind(), x_nd.device()));
            let own = tch::no_grad(|| x_nd.detach().narrow(0, start, len).contiguous());
            works.push(self.group.all_gather(&all, &own)?);
            outputs.push(all);
        }
        // What each chunk's gradient becomes: this rank's rows of its sum.
        let slots: Vec<PendingGradient> =
            works.iter().map(|_| PendingGradient::default()).collect();
        let ends = slots.clone();
        let outputs = attach_backward(&[x_nd], outputs, move |_| {
            let parts: Vec<Tensor> = ends.iter().map(take).collect::<Result<_, _>>()?;
            Ok(vec![Some(Tensor::cat(&parts, 0))])
        })?;
        let chunks = outputs.into_iter().zip(works).zip(slots).enumerate().map(
            |(index, ((all, work), slot))| {
                let saved = x.saved();
                let again = self.group.clone();
                let group = self.group.clone();
                let (start, len) = self.chunk(rows, index);
                move || {
                    work.wait()?;
                    let shape = all.size();
                    let options = (all.kind(), all.device());
                    let mut out = attach_backward(&[&all], vec![all.detach()], move |grads| {
                        let grad = match &grads[0] {
                            Some(grad) => grad.contiguous(),
                            None => Tensor::zeros(shape.as_slice(), options),
                        };
                        let part =
                            Tensor::empty([shape[0] / group.size() as i64, shape[1]], options);
                        let work = group.reduce_scatter(&part, &grad, ReduceOp::Sum)?;
                        fill(&slot, work, part);
                        // It goes on through the slot.
                        Ok(vec![None])
                    })?;
                    Ok(Activation::recomputable(out.remove(0), move || {
                        let own = saved.get()?.narrow(0, start, len).contiguous();
                        let all = Tensor::empty(
                            [len * again.size() as i64, width],
                            (own.kind(), own.device()),
                        );
                        again.all_gather(&all, &own).and_then(Work::wait)?;
                        Ok(all)
                    }))
                }
            },
        );
        Ok(chunks.collect())
    }
}

/// Chunks on their way to be summed.
struct ChunkedReduceScatter {
    group: Arc<dyn Communicator>,
    /// This rank's rows of each chunk.
    parts: Vec<(Work, Tensor)>,
    /// Makes the chunks' nodes come after the sum's in backward, and what brings them their gradients.
    links: Vec<(Tensor, PendingGradient)>,
}

impl ChunkedReduceScatter {
    fn new(group: Arc<dyn Communicator>) -> ChunkedReduceScatter {
        ChunkedReduceScatter {
            group,
            parts: Vec::new(),
            links: Vec::new(),
        }
    }

    /// A chunk `[R * n, D]`: rank after rank.
    fn add(&mut self, chunk: &Tensor) -> Result<(), Error> {
        let (rows, width) = chunk.size2().map_err(|e| Error::new(e.to_string()))?;
        let part = Tensor::empty(
            [rows / self.group.size() as i64, width],
            (chunk.kind(), chunk.device()),
        );
        let own = tch::no_grad(|| chunk.detach().contiguous());
        let work = self.group.reduce_scatter(&part, &own, ReduceOp::Sum)?;
        self.parts.push((work, part));
        let slot = PendingGradient::default();
        let arrived = slot.clone();
        let link = Tensor::zeros([0], (Kind::Float, chunk.device()));
        let mut link = attach_backward(&[chunk], vec![link], move |_| {
            Ok(vec![Some(take(&arrived)?)])
        })?;
        self.links.push((link.remove(0), slot));
        Ok(())
    }

    fn finish(self) -> Result<Tensor, Error> {
        let mut parts = Vec::new();
        for (work, part) in self.parts {
            work.wait()?;
            parts.push(part);
        }
        let sizes: Vec<i64> = parts.iter().map(|part| part.size()[0]).collect();
        let sum = tch::no_grad(|| Tensor::cat(&parts, 0));
        let (links, slots): (Vec<Tensor>, Vec<PendingGradient>) = self.links.into_iter().unzip();
        let inputs: Vec<&Tensor> = links.iter().collect();
        let shape = sum.size();
        let options = (sum.kind(), sum.device());
        let group = self.group;
        let mut out = attach_backward(&inputs, vec![sum], move |grads| {
            let grad = match &grads[0] {
                Some(grad) => grad.shallow_clone(),
                None => Tensor::zeros(shape.as_slice(), options),
            };
            // The last chunk's backward is the first to come.
            let mut end = shape[0];
            for (size, slot) in sizes.iter().zip(&slots).rev() {
                let own = grad.narrow(0, end - size, *size).contiguous();
                let all = Tensor::empty([size * group.size() as i64, shape[1]], options);
                let work = group.all_gather(&all, &own)?;
                fill(slot, work, all);
                end -= size;
            }
            Ok(slots.iter().map(|_| None).collect())
        })?;
        Ok(out.remove(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Accelerator, Cpu, run_on_threads};
    use parking_lot::Mutex;
    use std::time::Duration;

    /// `silu(x a) b` with `a` split by columns and `b` by rows.
    #[test]
    fn a_split_block_has_the_values_and_gradients_of_the_whole() {
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let x = random(&[6, 4]);
        let a = random(&[4, 8]);
        let b = random(&[8, 4]);
        let probe = random(&[6, 4]);
        let whole_x = x.copy().set_requires_grad(true);
        let whole = whole_x.matmul(&a).silu().matmul(&b);
        (&whole * &probe).sum(Kind::Float).backward();
        let expected = (whole.detach(), whole_x.grad());
        let shared = Mutex::new((x, a, b, probe));
        for chunks in [1, 2, 5] {
            let shared = {
                let all = shared.lock();
                Mutex::new([&all.0, &all.1, &all.2, &all.3].map(Tensor::copy))
            };
            let parts = run_on_threads(2, Duration::from_secs(20), move |world| {
                let [x, a, b, probe] = shared.lock().each_ref().map(Tensor::copy);
                let tensor = TensorParallel::new(world.all("tensor").unwrap(), chunks);
                let rows = tensor.local_range(6);
                let columns = tensor.local_range(8);
                let x = x.narrow(0, rows.start, 3).copy().set_requires_grad(true);
                let a = a.narrow(1, columns.start, 4);
                let b = b.narrow(0, columns.start, 4);
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
                let probe = probe.narrow(0, rows.start, 3);
                (&in_one * &probe).sum(Kind::Float).backward();
                let first = x.grad().copy();
                (&in_two * &probe).sum(Kind::Float).backward();
                (
                    in_one.detach(),
                    in_two.detach(),
                    first.copy(),
                    x.grad() - first,
                )
            });
            let all = |pick: fn(&(Tensor, Tensor, Tensor, Tensor)) -> &Tensor| {
                Tensor::cat(&parts.iter().map(pick).collect::<Vec<_>>(), 0)
            };
            for out in [all(|p| &p.0), all(|p| &p.1)] {
                assert!(
                    out.allclose(&expected.0, 1e-5, 1e-6, false),
                    "{chunks} chunks"
                );
            }
            for grad in [all(|p| &p.2), all(|p| &p.3)] {
                assert!(
                    grad.allclose(&expected.1, 1e-5, 1e-6, false),
                    "{chunks} chunks"
                );
            }
        }
    }
}
