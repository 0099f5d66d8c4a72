//! Gloo, over TCP: the communicator of CPUs, and of any device whose tensors are staged through host memory.

use super::{CommError, Communicator, Membership, ReduceOp, Staged, Work, check_splits};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tch::Tensor;
use torch_ext::{GlooAddress, Store};

/// A group of ranks joined by Gloo.
///
/// All-gather and reduce-scatter are built on all-to-all, which Gloo carries several times faster than its own
/// (the sum then runs in rank order on every rank, so it is the same each time).
pub struct Gloo {
    shared: Arc<GlooState>,
}

struct GlooState {
    group: torch_ext::Gloo,
    membership: Membership,
    aborted: AtomicBool,
}

impl GlooState {
    fn error(&self, operation: &'static str, reason: impl ToString) -> CommError {
        self.membership.error(operation, reason)
    }
}

impl Gloo {
    /// Joins the group `name` of the global ranks `members`, of which this process is `rank`.
    ///
    /// # Errors
    /// When the others do not come within `timeout`.
    pub fn join(
        store: &Store,
        name: &str,
        members: &[usize],
        rank: usize,
        timeout: Duration,
        at: &GlooAddress,
    ) -> Result<Gloo, CommError> {
        let membership = Membership::new(name, members, rank)?;
        let group = torch_ext::Gloo::new(store, membership.position, members.len(), timeout, at)
            .map_err(|e| membership.error("joining", e))?;
        Ok(Gloo {
            shared: Arc::new(GlooState {
                group,
                membership,
                aborted: AtomicBool::new(false),
            }),
        })
    }

    /// Starts a collective on host memory, which goes on in the background. The first of `tensors` is what it writes.
    fn run(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        start: impl FnOnce(&torch_ext::Gloo, &[Tensor]) -> Result<torch_ext::Work, torch_ext::Error>,
    ) -> Result<Work, CommError> {
        let shared = self.shared.clone();
        if shared.aborted.load(Ordering::SeqCst) {
            return Err(shared.error(operation, "the group was aborted"));
        }
        let staged = Staged::new(tensors, true);
        let work = start(&shared.group, &staged.host).map_err(|e| shared.error(operation, e))?;
        Ok(Work::new(move || {
            work.wait(|| shared.aborted.load(Ordering::SeqCst))
                .map_err(|e| shared.error(operation, e))?;
            staged.finish();
            Ok(())
        }))
    }

    fn point_to_point(
        &self,
        operation: &'static str,
        tensor: &Tensor,
        start: impl FnOnce(&torch_ext::Gloo, &Tensor) -> Result<torch_ext::Work, torch_ext::Error>,
    ) -> Result<Work, CommError> {
        let shared = self.shared.clone();
        let staged = Staged::new(&[tensor], operation == "recv");
        let work = start(&shared.group, &staged.host[0]).map_err(|e| shared.error(operation, e))?;
        Ok(Work::new(move || {
            work.wait_point_to_point()
                .map_err(|e| shared.error(operation, e))?;
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
        self.shared.membership.position
    }
    fn size(&self) -> usize {
        self.shared.membership.members.len()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.run("all_reduce", &[tensor], |group, host| {
            group.all_reduce(&host[0], op)
        })
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.run("broadcast", &[tensor], |group, host| {
            group.broadcast(&host[0], root)
        })
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        let rows = vec![input.size().first().copied().unwrap_or(0); self.size()];
        let copies = Tensor::cat(&vec![input; self.size()], 0);
        check_splits(output, &copies, &rows, &rows, self.size())
            .map_err(|e| self.shared.error("all_gather", e))?;
        self.run("all_gather", &[output, &copies], |group, host| {
            group.all_to_all(&host[0], &host[1], &rows, &rows)
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        let rows = vec![output.size().first().copied().unwrap_or(0); self.size()];
        let parts = input.empty_like();
        check_splits(&parts, input, &rows, &rows, self.size())
            .map_err(|e| self.shared.error("reduce_scatter", e))?;
        let work = self.run("reduce_scatter", &[&parts, input], |group, host| {
            group.all_to_all(&host[0], &host[1], &rows, &rows)
        })?;
        let mut shape = vec![self.size() as i64];
        shape.extend(output.size());
        let output = output.shallow_clone();
        Ok(Work::new(move || {
            work.wait()?;
            tch::no_grad(|| {
                let parts = parts.view(shape.as_slice());
                let combined = match op {
                    ReduceOp::Sum => parts.sum_dim_intlist([0i64].as_slice(), false, parts.kind()),
                    ReduceOp::Min => parts.amin([0i64].as_slice(), false),
                    ReduceOp::Max => parts.amax([0i64].as_slice(), false),
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
            .map_err(|e| self.shared.error("all_to_all", e))?;
        self.run("all_to_all", &[output, input], |group, host| {
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
        self.run("barrier", &[], |group, _| group.barrier())
    }
    fn abort(&self) {
        self.shared.aborted.store(true, Ordering::SeqCst);
    }
}
