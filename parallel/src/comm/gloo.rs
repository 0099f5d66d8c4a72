//! The Gloo communicator, over TCP; device tensors are staged in host memory.

use super::{CommError, Communicator, Membership, ReduceOp, Staged, Work, check_splits};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tch::Tensor;
use torch_ext::{GlooDevice, Store};

/// A group of ranks that are connected by Gloo.
///
/// All-gather and reduce-scatter use Gloo's all-to-all, which is several times faster than Gloo's
/// own versions. The sum then runs in rank order on every rank, so it is the same each time. Above
/// [`MAX_MESH_SIZE`] ranks both use Gloo's rings.
pub(crate) struct Gloo {
    state: Arc<GlooState>,
}

/// The largest group in which all ranks send to all others for an operation that can do without.
pub(crate) const MAX_MESH_SIZE: usize = 64;

struct GlooState {
    group: torch_ext::Gloo,
    membership: Membership,
    aborted: AtomicBool,
}

type Started = Result<torch_ext::Work, torch_ext::Error>;

impl GlooState {
    fn error(&self, operation: &'static str, reason: impl ToString) -> CommError {
        self.membership.error(operation, reason)
    }
}

impl Gloo {
    /// Connects to the other members of the group.
    ///
    /// # Errors
    /// If a member does not join within `timeout`.
    pub(crate) fn join(
        store: &Store,
        membership: Membership,
        timeout: Duration,
        device: &GlooDevice,
    ) -> Result<Gloo, CommError> {
        let rank = membership.position;
        let size = membership.members.len();
        let group = torch_ext::Gloo::new(store, rank, size, timeout, device)
            .map_err(|e| membership.error("joining", e))?;
        Ok(Gloo {
            state: Arc::new(GlooState {
                group,
                membership,
                aborted: AtomicBool::new(false),
            }),
        })
    }

    /// Starts a collective, which Gloo continues in the background. It writes the first of
    /// `tensors`.
    fn collective(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        start: impl FnOnce(&torch_ext::Gloo, &[Tensor]) -> Started,
    ) -> Result<Work, CommError> {
        let state = self.state.clone();
        if state.aborted.load(Ordering::SeqCst) {
            return Err(state.error(operation, "the group was aborted"));
        }
        let staged = Staged::new(tensors, true);
        let work = start(&state.group, &staged.host).map_err(|e| state.error(operation, e))?;
        Ok(Work::new(move || {
            work.wait(|| state.aborted.load(Ordering::SeqCst))
                .map_err(|e| state.error(operation, e))?;
            staged.finish();
            Ok(())
        }))
    }

    /// Gathers around a ring, see [`Communicator::all_gather`].
    fn ring_all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.check_parts("all_gather", output, input)?;
        if input.numel() == 0 {
            return Ok(Work::done());
        }
        self.collective("all_gather", &[output, input], |group, host| {
            group.all_gather(&host[0], &host[1])
        })
    }

    /// Reduces around a ring, see [`Communicator::reduce_scatter`].
    fn ring_reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.check_parts("reduce_scatter", input, output)?;
        let sums = input.copy();
        let work = self.collective("reduce_scatter", &[&sums], |group, host| {
            group.all_reduce(&host[0], op)
        })?;
        let mut parts = vec![self.size() as i64];
        parts.extend(output.size());
        let own = self.rank() as i64;
        let mut output = output.shallow_clone();
        Ok(Work::new(move || {
            work.wait()?;
            tch::no_grad(|| output.copy_(&sums.view(parts.as_slice()).select(0, own)));
            Ok(())
        }))
    }

    /// Rejects tensors unless `whole` has one `part` per rank.
    fn check_parts(
        &self,
        operation: &'static str,
        whole: &Tensor,
        part: &Tensor,
    ) -> Result<(), CommError> {
        let size = self.size();
        let is_contiguous = whole.is_contiguous() && part.is_contiguous();
        let fits = whole.kind() == part.kind() && whole.numel() == part.numel() * size;
        if fits && is_contiguous {
            return Ok(());
        }
        let describe = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
        let whole = describe(whole);
        let part = describe(part);
        let reason = format!("{whole} is not one contiguous part {part} for each of {size} ranks");
        Err(self.state.error(operation, reason))
    }

    fn point_to_point(
        &self,
        operation: &'static str,
        tensor: &Tensor,
        start: impl FnOnce(&torch_ext::Gloo, &Tensor) -> Started,
    ) -> Result<Work, CommError> {
        let state = self.state.clone();
        let staged = Staged::new(&[tensor], operation == "recv");
        let work = start(&state.group, &staged.host[0]).map_err(|e| state.error(operation, e))?;
        Ok(Work::new(move || {
            work.wait_point_to_point()
                .map_err(|e| state.error(operation, e))?;
            staged.finish();
            Ok(())
        }))
    }
}

impl Communicator for Gloo {
    fn backend(&self) -> &'static str {
        "gloo"
    }
    fn rank(&self) -> usize {
        self.state.membership.position
    }
    fn size(&self) -> usize {
        self.state.membership.members.len()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.collective("all_reduce", &[tensor], |group, host| {
            group.all_reduce(&host[0], op)
        })
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.collective("broadcast", &[tensor], |group, host| {
            group.broadcast(&host[0], root)
        })
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        if self.size() > MAX_MESH_SIZE {
            return self.ring_all_gather(output, input);
        }
        let rows = vec![input.size().first().copied().unwrap_or(0); self.size()];
        let copies = Tensor::cat(&vec![input; self.size()], 0);
        check_splits(output, &copies, &rows, &rows, self.size())
            .map_err(|e| self.state.error("all_gather", e))?;
        self.collective("all_gather", &[output, &copies], |group, host| {
            group.all_to_all(&host[0], &host[1], &rows, &rows)
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        if self.size() > MAX_MESH_SIZE {
            return self.ring_reduce_scatter(output, input, op);
        }
        let rows = vec![output.size().first().copied().unwrap_or(0); self.size()];
        let parts = input.empty_like();
        check_splits(&parts, input, &rows, &rows, self.size())
            .map_err(|e| self.state.error("reduce_scatter", e))?;
        let work = self.collective("reduce_scatter", &[&parts, input], |group, host| {
            group.all_to_all(&host[0], &host[1], &rows, &rows)
        })?;
        let mut shape = vec![self.size() as i64];
        shape.extend(output.size());
        let output = output.shallow_clone();
        Ok(Work::new(move || {
            work.wait()?;
            tch::no_grad(|| {
                let parts = parts.view(shape.as_slice());
                let dim = [0i64].as_slice();
                let combined = match op {
                    ReduceOp::Sum => parts.sum_dim_intlist(dim, false, parts.kind()),
                    ReduceOp::Min => parts.amin(dim, false),
                    ReduceOp::Max => parts.amax(dim, false),
                };
                output.shallow_clone().copy_(&combined);
            });
            Ok(())
        }))
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        check_splits(output, input, output_splits, input_splits, self.size())
            .map_err(|e| self.state.error("all_to_all", e))?;
        self.collective("all_to_all", &[output, input], |group, host| {
            group.all_to_all(&host[0], &host[1], output_splits, input_splits)
        })
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.point_to_point("send", tensor, |group, host| group.send(host, to, tag))
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.point_to_point("recv", tensor, |group, host| group.recv(host, from, tag))
    }
    fn barrier(&self) -> Result<Work, CommError> {
        self.collective("barrier", &[], |group, _| group.barrier())
    }
    fn abort(&self) {
        self.state.aborted.store(true, Ordering::SeqCst);
    }
}
