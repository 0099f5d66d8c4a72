//! A gradient bucket: one flat buffer that is reduced by one collective.

use super::plan::BucketPlan;
use crate::{
    Accelerator, CommError, Communicator, Local, ReduceOp, Weight, Work,
    rows::{matrix_shape, own_rows},
};
use std::{ops::Range, sync::Arc};
use tch::{Kind, Tensor};

/// The ranks that hold the same weights.
#[derive(Clone)]
pub struct Replication {
    /// Ranks that shard the sums of gradients and the optimizer state by rows; one rank holds all.
    pub shard_group: Arc<dyn Communicator>,
    /// Ranks that hold the same rows.
    pub replica_group: Arc<dyn Communicator>,
    /// The ranks of `replica_group`, in its order.
    pub replica_ranks: Vec<usize>,
}

impl Replication {
    /// Returns the replication of a rank that holds its weights alone.
    pub fn alone() -> Replication {
        let local: Arc<dyn Communicator> = Arc::new(Local::new(0, "alone"));
        Replication {
            shard_group: local.clone(),
            replica_group: local,
            replica_ranks: vec![0],
        }
    }
}

/// A weight's position in its bucket.
struct Member {
    rows: i64,
    cols: i64,
    /// Offset in the full buffer.
    offset: i64,
    /// Offset in each rank's shard.
    shard_offset: i64,
    own_rows: Range<i64>,
    /// True until the first contribution of a step: the memory is uninitialized.
    unwritten: bool,
}

impl Member {
    fn flat(&self, full: &Tensor) -> Tensor {
        full.narrow(0, self.offset, self.rows * self.cols)
    }

    fn matrix(&self, full: &Tensor) -> Tensor {
        self.flat(full).view([self.rows, self.cols])
    }

    /// Returns the place of `rows` rows of this member in a rank's `shard`.
    fn in_shard(&self, shard: &Tensor, rows: i64) -> Tensor {
        shard
            .narrow(0, self.shard_offset, rows * self.cols)
            .view([rows, self.cols])
    }
}

/// A reduction that has been started.
struct PendingReduction {
    work: Work,
    /// Receives this rank's shard, if the bucket is sharded.
    received: Option<Tensor>,
}

pub(super) struct Bucket {
    members: Vec<Member>,
    len: i64,
    /// Elements of a rank's shard; the last rank's is padded.
    shard_len: i64,
    /// `[len]`; None if full gradients are not kept and no contribution has come.
    full: Option<Tensor>,
    /// `[shard_len]`, if the ranks shard the sum.
    shard: Option<Tensor>,
    replication: Replication,
    /// Contributions of one microbatch to all members.
    uses: usize,
    /// Contributions missing until the next reduction.
    pub(super) pending: usize,
    reduction: Option<PendingReduction>,
}

impl Bucket {
    /// Allocates the bucket of `plan`; weights come with their group's index.
    pub(super) fn new(
        plan: &BucketPlan,
        weights: &[(Weight, usize)],
        replication: Replication,
        keep_full: bool,
        accelerator: &dyn Accelerator,
    ) -> Bucket {
        let rank = replication.shard_group.rank();
        let ranks = replication.shard_group.size();
        let mut len = 0;
        let mut shard_len = 0;
        let mut uses = 0;
        let mut members = Vec::new();
        for &index in &plan.members {
            let weight = &weights[index].0;
            let (rows, cols) = matrix_shape(weight.shape());
            members.push(Member {
                rows,
                cols,
                offset: len,
                shard_offset: shard_len,
                own_rows: own_rows(rows, rank, ranks),
                unwritten: true,
            });
            len += rows * cols;
            shard_len += own_rows(rows, 0, ranks).end * cols;
            uses += weight.uses();
        }
        let zeros = |len| accelerator.zeros(&[len], Kind::Float);
        let is_sharded = ranks > 1;
        Bucket {
            members,
            len,
            shard_len,
            full: (keep_full || !is_sharded).then(|| zeros(len)),
            shard: is_sharded.then(|| zeros(shard_len)),
            replication,
            uses,
            pending: 0,
            reduction: None,
        }
    }

    pub(super) fn is_sharded(&self) -> bool {
        self.shard.is_some()
    }

    /// True if it is reduced once per step, in the order of the plan.
    pub(super) fn reduced_in_order(&self, keep_full: bool) -> bool {
        keep_full || !self.is_sharded()
    }

    /// Forgets the contributions of the step before.
    pub(super) fn clear(&mut self) {
        self.mark_unwritten();
        if let Some(shard) = &mut self.shard {
            let _ = tch::no_grad(|| shard.zero_());
        }
    }

    /// Expects the contributions of `microbatches` backwards until the next reduction.
    pub(super) fn expect(&mut self, microbatches: usize) {
        self.pending = self.uses * microbatches;
    }

    /// Returns the flat gradient of `member` so far, and true if it must be overwritten.
    pub(super) fn sum(&mut self, member: usize, device: tch::Device) -> (Tensor, bool) {
        if self.full.is_none() {
            self.mark_unwritten();
        }
        let len = self.len;
        let full = self
            .full
            .get_or_insert_with(|| Tensor::empty([len], (Kind::Float, device)));
        let member = &mut self.members[member];
        let unwritten = std::mem::take(&mut member.unwritten);
        (member.flat(full), unwritten)
    }

    /// Returns this rank's rows of the gradient of `member`: `[rows, columns]`.
    pub(super) fn gradient(&mut self, member: usize) -> Tensor {
        self.zero_unwritten();
        let member = &self.members[member];
        match (&self.shard, &self.full) {
            (Some(shard), _) => {
                let own = &member.own_rows;
                member.in_shard(shard, own.end - own.start)
            }
            (None, Some(full)) => member.matrix(full),
            (None, None) => unreachable!("a bucket without a shard is kept"),
        }
    }

    /// Starts to sum the gradient over the ranks that hold the weights.
    pub(super) fn reduce(&mut self, keep_full: bool) -> Result<(), CommError> {
        self.wait_reduction()?;
        self.zero_unwritten();
        if self.is_sharded() {
            self.start_reduce_scatter(keep_full)
        } else {
            self.start_all_reduce()
        }
    }

    fn start_all_reduce(&mut self) -> Result<(), CommError> {
        let full = self
            .full
            .as_ref()
            .expect("a bucket without a shard is kept");
        let group = &self.replication.replica_group;
        self.reduction = Some(PendingReduction {
            work: group.all_reduce(full, ReduceOp::Sum)?,
            received: None,
        });
        Ok(())
    }

    fn start_reduce_scatter(&mut self, keep_full: bool) -> Result<(), CommError> {
        let full = if keep_full {
            self.full.as_ref().map(Tensor::shallow_clone)
        } else {
            self.full.take()
        };
        let Some(full) = full else {
            return Ok(());
        };
        let shards = self.pack_shards(&full);
        let received = Tensor::empty([self.shard_len], (Kind::Float, full.device()));
        let group = &self.replication.shard_group;
        let work = group.reduce_scatter(&received, &shards.view([-1]), ReduceOp::Sum)?;
        self.reduction = Some(PendingReduction {
            work,
            received: Some(received),
        });
        Ok(())
    }

    /// Copies each rank's rows of all members to its shard: `[ranks, shard_len]`.
    fn pack_shards(&self, full: &Tensor) -> Tensor {
        let ranks = self.replication.shard_group.size();
        let options = (Kind::Float, full.device());
        let shards = Tensor::zeros([ranks as i64, self.shard_len], options);
        tch::no_grad(|| {
            for member in &self.members {
                let matrix = member.matrix(full);
                for rank in 0..ranks {
                    let rows = own_rows(member.rows, rank, ranks);
                    let len = rows.end - rows.start;
                    member
                        .in_shard(&shards.get(rank as i64), len)
                        .copy_(&matrix.narrow(0, rows.start, len));
                }
            }
        });
        shards
    }

    /// Starts to sum this rank's shard over its replicas, if there are any.
    pub(super) fn reduce_replicas(&self) -> Result<Option<Work>, CommError> {
        let group = &self.replication.replica_group;
        match &self.shard {
            Some(shard) if group.size() > 1 => Ok(Some(group.all_reduce(shard, ReduceOp::Sum)?)),
            _ => Ok(None),
        }
    }

    /// Waits for the started reduction, if any.
    pub(super) fn wait_reduction(&mut self) -> Result<(), CommError> {
        let Some(reduction) = self.reduction.take() else {
            return Ok(());
        };
        reduction.work.wait()?;
        if let (Some(received), Some(shard)) = (reduction.received, &self.shard) {
            let _ = tch::no_grad(|| shard.shallow_clone().g_add_(&received));
        }
        Ok(())
    }

    fn mark_unwritten(&mut self) {
        for member in &mut self.members {
            member.unwritten = true;
        }
    }

    /// Zeroes the gradients that nothing was added to.
    fn zero_unwritten(&mut self) {
        let Some(full) = &self.full else { return };
        for member in self.members.iter_mut().filter(|member| member.unwritten) {
            let _ = tch::no_grad(|| member.flat(full).zero_());
            member.unwritten = false;
        }
    }
}
