//! Small collectives of large groups, through a tree of small groups.
//!
//! Values are gathered on each machine, then among machines, and come back the same way. A rank has
//! few connections, and an operation takes a number of hops that grows with the logarithm of the
//! number of ranks. Sums have one order, so they are the same each time. Everything else uses the
//! communicator of the whole group, which is joined when it is first needed.

mod plan;

use super::{
    CommError, Communicator, LazyComm, Membership, ReduceOp, Staged, Work,
    deferred::{AbortFlag, Deferred},
};
use crate::background;
use parking_lot::Mutex;
use plan::{Level, MAX_FANOUT, TreePlan};
use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};
use tch::{Device, Kind, Tensor};

/// Bytes per rank up to which a tree is faster than a ring: it has fewer hops, but each rank on the
/// way sends everything to several others.
const TREE_BYTES_PER_RANK: usize = 2 << 10;

/// Joins the group of these global ranks on level `usize` of a tree.
pub(crate) type JoinLevel =
    Box<dyn Fn(usize, &[usize]) -> Result<Arc<dyn Communicator>, CommError> + Send>;

/// A group that is too large for connections between all of its ranks.
pub(crate) struct TreeComm {
    membership: Membership,
    timeout: Duration,
    /// The whole group, for large tensors and messages.
    whole: LazyComm,
    abort_flag: AbortFlag,
    jobs: Mutex<Jobs>,
    /// The groups of the levels that have been joined.
    joined: Arc<Mutex<Vec<Arc<dyn Communicator>>>>,
}

/// An operation of the tree, which returns its result in host memory.
type Run = Box<dyn FnOnce(&mut Tree) -> Result<Tensor, CommError> + Send>;

struct Job {
    run: Run,
    done: Sender<Result<Tensor, CommError>>,
}

/// The way to the thread that runs a tree's operations in order.
enum Jobs {
    /// The thread starts with the first operation.
    Unused(Box<Tree>),
    Started(Sender<Job>),
}

/// The groups of this rank's levels, which are joined by the first operation.
struct Tree {
    plan: TreePlan,
    /// The group's ranks in the order of the tree.
    members: Vec<usize>,
    join_level: JoinLevel,
    levels: Vec<JoinedLevel>,
    joined: Arc<Mutex<Vec<Arc<dyn Communicator>>>>,
    membership: Membership,
    abort_flag: AbortFlag,
}

struct JoinedLevel {
    level: Level,
    group: Arc<dyn Communicator>,
}

impl TreeComm {
    /// Returns a group whose ranks are on these machines. `whole` is its flat communicator.
    pub(crate) fn new(
        membership: Membership,
        machines: &[u32],
        timeout: Duration,
        whole: LazyComm,
        join_level: JoinLevel,
    ) -> TreeComm {
        TreeComm::with_fanout(membership, machines, timeout, whole, join_level, MAX_FANOUT)
    }

    fn with_fanout(
        membership: Membership,
        machines: &[u32],
        timeout: Duration,
        whole: LazyComm,
        join_level: JoinLevel,
        fanout: usize,
    ) -> TreeComm {
        let plan = TreePlan::new(machines, membership.position, fanout);
        let global = |&rank: &usize| membership.members[rank];
        let members = plan.order.iter().map(global).collect();
        let abort_flag = AbortFlag::default();
        let joined = Arc::default();
        let tree = Tree {
            plan,
            members,
            join_level,
            levels: Vec::new(),
            joined: Arc::clone(&joined),
            membership: membership.clone(),
            abort_flag: abort_flag.clone(),
        };
        TreeComm {
            membership,
            timeout,
            whole,
            abort_flag,
            jobs: Mutex::new(Jobs::Unused(Box::new(tree))),
            joined,
        }
    }

    /// True if an operation on this many bytes in all goes through the tree.
    fn is_small(&self, bytes: usize) -> bool {
        bytes <= TREE_BYTES_PER_RANK * self.membership.size()
    }

    /// Runs an operation on the tree's thread; `finish` uses its result.
    fn operation(
        &self,
        name: &'static str,
        run: impl FnOnce(&mut Tree) -> Result<Tensor, CommError> + Send + 'static,
        finish: impl FnOnce(Tensor) + Send + 'static,
    ) -> Result<Work, CommError> {
        let membership = self.membership.clone();
        self.abort_flag
            .check()
            .map_err(|reason| membership.error(name, reason))?;
        let (done, deferred) = Deferred::new(&self.abort_flag);
        let job = Job {
            run: Box::new(run),
            done,
        };
        // After a failure the thread has ended, and the wait tells so.
        let _ = self.jobs.lock().sender().send(job);
        let timeout = self.timeout;
        Ok(Work::new(move || {
            let result = deferred
                .wait(timeout)
                .map_err(|reason| membership.error(name, reason))?;
            // The operation of a level has a message of its own.
            let result = result.map_err(|error| membership.error(name, error.reason))?;
            finish(result);
            Ok(())
        }))
    }
}

impl Jobs {
    fn sender(&mut self) -> Sender<Job> {
        if let Jobs::Started(sender) = self {
            return sender.clone();
        }
        let (sender, jobs) = channel();
        if let Jobs::Unused(tree) = std::mem::replace(self, Jobs::Started(sender.clone())) {
            background::spawn("tree", move || tree.run(&jobs));
        }
        sender
    }
}

impl Tree {
    fn run(mut self, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            let result = (job.run)(&mut self);
            let has_failed = result.is_err();
            let _ = job.done.send(result);
            if has_failed {
                // The ranks may be at different operations now.
                self.abort_flag.set();
                abort_all(&self.joined.lock());
                return;
            }
        }
    }

    /// Joins the groups of all levels, if that has not been done.
    fn join(&mut self) -> Result<(), CommError> {
        for level in self.plan.levels.iter().skip(self.levels.len()) {
            let global = |&position: &usize| self.members[position];
            let members: Vec<usize> = level.members.iter().map(global).collect();
            let group = (self.join_level)(level.number, &members)?;
            let joined = self
                .abort_flag
                .unless_aborted(|| self.joined.lock().push(group.clone()));
            joined.map_err(|reason| self.membership.error("joining", reason))?;
            self.levels.push(JoinedLevel {
                level: level.clone(),
                group,
            });
        }
        Ok(())
    }

    /// Gathers rows `[count, width]` of all ranks at the root, in the order of the tree. `rows_of`
    /// returns the number of rows of a range of positions. Other ranks get their part of the tree.
    fn gather(
        &mut self,
        own: Tensor,
        rows_of: impl Fn(std::ops::Range<usize>) -> i64,
    ) -> Result<Tensor, CommError> {
        self.join()?;
        let mut gathered = own;
        for JoinedLevel { level, group } in &self.levels {
            let parts = level
                .members
                .iter()
                .zip(&level.counts)
                .map(|(&first, &count)| rows_of(first..first + count));
            let parts: Vec<i64> = parts.collect();
            let mut send = vec![0; parts.len()];
            send[0] = gathered.size()[0];
            let (receive, total) = if self.plan.leads(level) {
                let total = parts.iter().sum();
                (parts, total)
            } else {
                (vec![0; parts.len()], 0)
            };
            let width = gathered.size()[1];
            let into = Tensor::empty([total, width], (gathered.kind(), Device::Cpu));
            group
                .all_to_all(&into, &gathered, &receive, &send)?
                .wait()?;
            if self.plan.leads(level) {
                gathered = into;
            }
        }
        Ok(gathered)
    }

    /// Copies `values` of the root to all ranks, in place.
    fn spread(&mut self, values: &Tensor) -> Result<(), CommError> {
        self.join()?;
        for JoinedLevel { group, .. } in self.levels.iter().rev() {
            group.broadcast(values, 0)?.wait()?;
        }
        Ok(())
    }

    /// Gathers and spreads the rows `[1, width]` of all ranks `[size, width]`, in rank order.
    fn all_gather(&mut self, own: Tensor) -> Result<Tensor, CommError> {
        let size = self.plan.order.len() as i64;
        let width = own.size()[1];
        let kind = own.kind();
        let gathered = self.gather(own, |positions| positions.len() as i64)?;
        let all = if self.plan.position == 0 {
            gathered
        } else {
            Tensor::empty([size, width], (kind, Device::Cpu))
        };
        self.spread(&all)?;
        let mut position_of = vec![0; self.plan.order.len()];
        for (position, &rank) in self.plan.order.iter().enumerate() {
            position_of[rank] = position as i64;
        }
        Ok(all.index_select(0, &Tensor::from_slice(&position_of)))
    }

    /// Returns the reduction of all ranks' values. `own` is overwritten.
    fn all_reduce(&mut self, own: Tensor, op: ReduceOp) -> Result<Tensor, CommError> {
        self.join()?;
        for JoinedLevel { group, .. } in &self.levels {
            group.all_reduce(&own, op)?.wait()?;
        }
        self.spread(&own)?;
        Ok(own)
    }

    /// Returns the row `[1, width]` of the rank at position `root`.
    fn broadcast(&mut self, own: Tensor, root: usize) -> Result<Tensor, CommError> {
        let values = if self.plan.position == root {
            own
        } else {
            own.narrow(0, 0, 0)
        };
        let width = values.size()[1];
        let kind = values.kind();
        let rows_of = |positions: std::ops::Range<usize>| i64::from(positions.contains(&root));
        let gathered = self.gather(values, rows_of)?;
        let value = if self.plan.position == 0 {
            gathered
        } else {
            Tensor::empty([1, width], (kind, Device::Cpu))
        };
        self.spread(&value)?;
        Ok(value)
    }
}

fn abort_all(groups: &[Arc<dyn Communicator>]) {
    for group in groups {
        group.abort();
    }
}

/// Returns the bytes of a contiguous tensor in host memory, `[1, bytes]`.
fn as_row(tensor: &Tensor) -> Tensor {
    tensor.view([1, -1]).view_dtype(Kind::Uint8)
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

impl Communicator for TreeComm {
    fn backend(&self) -> &'static str {
        self.whole.backend()
    }
    fn rank(&self) -> usize {
        self.membership.position
    }
    fn size(&self) -> usize {
        self.membership.size()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        if tensor.numel() == 0 || !self.is_small(bytes(tensor)) || !tensor.is_contiguous() {
            return self.whole.all_reduce(tensor, op);
        }
        let staged = Staged::new(&[tensor], true);
        let own = staged.host[0].copy();
        let run = move |tree: &mut Tree| tree.all_reduce(own, op);
        self.operation("all_reduce", run, move |reduced| {
            staged.finish_with(&reduced)
        })
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        let is_known = root < self.size() && tensor.is_contiguous();
        if tensor.numel() == 0 || !self.is_small(bytes(tensor)) || !is_known {
            return self.whole.broadcast(tensor, root);
        }
        let staged = Staged::new(&[tensor], true);
        let own = as_row(&staged.host[0]).copy();
        let run = move |tree: &mut Tree| {
            let root = tree.plan.order.iter().position(|&rank| rank == root);
            tree.broadcast(own, root.expect("the root is in the group"))
        };
        self.operation("broadcast", run, move |row| staged.finish_with_bytes(&row))
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        let fits = output.kind() == input.kind() && output.numel() == input.numel() * self.size();
        let is_contiguous = output.is_contiguous() && input.is_contiguous();
        let is_usual = fits && is_contiguous && input.numel() > 0;
        if !is_usual || !self.is_small(bytes(output)) {
            return self.whole.all_gather(output, input);
        }
        let staged = Staged::new(&[output, input], true);
        let own = as_row(&staged.host[1]).copy();
        let run = move |tree: &mut Tree| tree.all_gather(own);
        self.operation("all_gather", run, move |rows| {
            staged.finish_with_bytes(&rows)
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.whole.reduce_scatter(output, input, op)
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        self.whole
            .all_to_all(output, input, output_splits, input_splits)
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.whole.send(tensor, to, tag)
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.whole.recv(tensor, from, tag)
    }
    fn barrier(&self) -> Result<Work, CommError> {
        let one = Tensor::from_slice(&[1u8]);
        let run = move |tree: &mut Tree| tree.all_reduce(one, ReduceOp::Max);
        self.operation("barrier", run, drop)
    }
    fn abort(&self) {
        self.abort_flag.set();
        abort_all(&self.joined.lock());
        self.whole.abort();
    }
}

#[cfg(test)]
mod tests;
