//! Gradients summed over replicas, in buckets, while backward still runs.
//!
//! Every weight's gradient lives in an fp32 flat buffer, a *bucket*: weights in reverse order of use, so that a bucket is
//! complete early in backward. Layers add each contribution to its place as they compute it ([`Weight::add_gradient`]); nobody
//! clears it before, and the first contribution is written there.
//! When the last contribution of a step has come, the bucket starts an asynchronous all-reduce, or, where ranks share the
//! sum out (ZeRO, arXiv 1910.02054), a reduce-scatter by rows. Where whole gradients are not kept (ZeRO-2), that happens
//! after every microbatch, and the bucket's memory is given back.
//!
//! # Collective
//! Buckets are reduced in the order of the plan, on every rank, whatever the order in which gradients come; those that are
//! not kept in the order in which they are complete, which replicas with the same passes have in common.

use crate::sharding::own_rows;
use crate::{Accelerator, CommError, Communicator, Local, ReduceOp, Weight, Work};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// The ranks that hold the same weights.
#[derive(Clone)]
pub struct Replication {
    /// Those that share out sums of gradients and what is computed from them, rows by rows; alone: each has all rows.
    pub shard_group: Arc<dyn Communicator>,
    /// Those that have the same rows.
    pub replica_group: Arc<dyn Communicator>,
}

impl Replication {
    /// A rank that holds its weights alone.
    pub fn alone() -> Replication {
        let local: Arc<dyn Communicator> = Arc::new(Local::new(0, "alone"));
        Replication {
            shard_group: local.clone(),
            replica_group: local,
        }
    }
}

/// Which parameters share a flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketPlan {
    /// Number of the group whose ranks hold the same parameters.
    pub group: usize,
    /// The parameters' numbers, in the order of the buffer.
    pub members: Vec<usize>,
    /// Elements in all.
    pub len: usize,
}

/// Packs parameters, given as (elements, group), from the last to the first. A bucket holds parameters of one group
/// and at most `capacity` elements, unless a single parameter is larger.
pub fn plan_buckets(parameters: &[(usize, usize)], capacity: usize) -> Vec<BucketPlan> {
    let mut done: Vec<BucketPlan> = Vec::new();
    let mut open: Vec<BucketPlan> = Vec::new();
    for (index, &(len, group)) in parameters.iter().enumerate().rev() {
        if let Some(position) = open.iter().position(|bucket| bucket.group == group) {
            if open[position].len + len <= capacity {
                open[position].members.push(index);
                open[position].len += len;
                continue;
            }
            done.push(open.remove(position));
        }
        open.push(BucketPlan {
            group,
            members: vec![index],
            len,
        });
    }
    done.extend(open);
    // In the order in which their last gradient comes: the lower the least parameter, the later.
    done.sort_by_key(|bucket| std::cmp::Reverse(bucket.members.iter().min().copied()));
    done
}

/// A weight's place in its bucket.
struct Member {
    /// Its rows and columns: all dims but the last, and the last.
    rows: i64,
    cols: i64,
    /// Where it begins in the whole bucket, and in each rank's share.
    offset: i64,
    own_offset: i64,
    own: std::ops::Range<i64>,
    /// Whether nothing has been added to it since the step began, or memory was taken for it: it holds whatever was there.
    unwritten: bool,
}

struct Bucket {
    members: Vec<Member>,
    len: i64,
    /// Elements of a rank's share, the last rank's padded.
    share: i64,
    /// `[len]`; None where it is not kept and no contribution is there.
    whole: Option<Tensor>,
    /// `[share]`, where ranks share the sum out.
    own: Option<Tensor>,
    replication: Replication,
    /// Contributions of one microbatch to its members.
    uses: usize,
    /// Contributions that are still to come until the next reduction.
    pending: usize,
    /// The reduction under way, and where this rank's share arrives.
    work: Option<(Work, Option<Tensor>)>,
}

impl Bucket {
    fn reduce(&mut self, keep: bool) -> Result<(), CommError> {
        self.wait_reduction()?;
        self.zero_unwritten();
        if self.own.is_none() {
            let whole = self
                .whole
                .as_ref()
                .expect("a bucket that is not shared out is kept");
            self.work = Some((
                self.replication
                    .replica_group
                    .all_reduce(whole, ReduceOp::Sum)?,
                None,
            ));
            return Ok(());
        }
        let Some(whole) = (if keep {
            self.whole.as_ref().map(Tensor::shallow_clone)
        } else {
            self.whole.take()
        }) else {
            return Ok(());
        };
        let group = &self.replication.shard_group;
        let options = (Kind::Float, whole.device());
        let shares = Tensor::zeros([group.size() as i64, self.share], options);
        tch::no_grad(|| {
            for member in &self.members {
                let rows = whole
                    .narrow(0, member.offset, member.rows * member.cols)
                    .view([member.rows, member.cols]);
                for rank in 0..group.size() {
                    let theirs = own_rows(member.rows, rank, group.size());
                    let len = theirs.end - theirs.start;
                    let place =
                        shares
                            .get(rank as i64)
                            .narrow(0, member.own_offset, len * member.cols);
                    place
                        .view([len, member.cols])
                        .copy_(&rows.narrow(0, theirs.start, len));
                }
            }
        });
        let part = Tensor::empty([self.share], options);
        self.work = Some((
            group.reduce_scatter(&part, &shares.view([-1]), ReduceOp::Sum)?,
            Some(part),
        ));
        Ok(())
    }

    /// Gradients to which nothing was added are zero.
    fn zero_unwritten(&mut self) {
        let Some(whole) = &self.whole else { return };
        for member in self.members.iter_mut().filter(|member| member.unwritten) {
            let _ = tch::no_grad(|| {
                whole
                    .narrow(0, member.offset, member.rows * member.cols)
                    .zero_()
            });
            member.unwritten = false;
        }
    }

    /// Waits for the reduction under way.
    fn wait_reduction(&mut self) -> Result<(), CommError> {
        if let Some((work, part)) = self.work.take() {
            work.wait()?;
            if let (Some(part), Some(own)) = (part, &self.own) {
                let _ = tch::no_grad(|| own.shallow_clone().g_add_(&part));
            }
        }
        Ok(())
    }
}

pub(crate) struct BucketState {
    buckets: Vec<Bucket>,
    /// Bucket and number in it of each weight.
    locations: Vec<(usize, usize)>,
    device: Device,
    /// Whether whole gradients stay until the step's end.
    keep: bool,
    /// Whether a step is under way, so that complete buckets are to be reduced.
    reducing: bool,
    /// The next bucket to reduce.
    next: usize,
    /// Buckets whose shares are on their way, the oldest first.
    in_flight: VecDeque<usize>,
    /// Where contributions to weights' gradients are kept instead of being computed.
    deferred: Option<Vec<DeferredGradient>>,
}

/// A contribution to a weight's gradient that is still to be computed.
pub type DeferredGradient = Box<dyn FnOnce() -> Result<(), Error> + Send>;

impl BucketState {
    /// Keeps `contribution` for later, or gives it back to be computed now.
    pub(crate) fn defer(&mut self, contribution: DeferredGradient) -> Option<DeferredGradient> {
        match &mut self.deferred {
            Some(list) => {
                list.push(contribution);
                None
            }
            None => Some(contribution),
        }
    }

    /// The whole fp32 gradient of weight `index` so far, flat; and whether nothing was added to it yet, so that it is to be written, as
    /// the caller will.
    pub(crate) fn sum(&mut self, index: usize) -> (Tensor, bool) {
        let (bucket, member) = self.locations[index];
        let device = self.device;
        let bucket = &mut self.buckets[bucket];
        if bucket.whole.is_none() {
            bucket
                .members
                .iter_mut()
                .for_each(|member| member.unwritten = true);
        }
        let len = bucket.len;
        let whole = bucket
            .whole
            .get_or_insert_with(|| Tensor::empty([len], (Kind::Float, device)));
        let member = &mut bucket.members[member];
        (
            whole.narrow(0, member.offset, member.rows * member.cols),
            std::mem::take(&mut member.unwritten),
        )
    }

    /// A contribution to weight `index` is there.
    pub(crate) fn ready(&mut self, index: usize) -> Result<(), CommError> {
        let number = self.locations[index].0;
        let bucket = &mut self.buckets[number];
        bucket.pending = bucket.pending.saturating_sub(1);
        if !bucket.reduced_in_order(self.keep) {
            if self.reducing && bucket.pending == 0 {
                bucket.pending = bucket.uses;
                self.reduce(number)?;
            }
            return Ok(());
        }
        while self.reducing
            && self
                .buckets
                .get(self.next)
                .is_some_and(|b| !b.reduced_in_order(self.keep) || b.pending == 0)
        {
            self.reduce_next()?;
        }
        Ok(())
    }

    fn reduce_next(&mut self) -> Result<(), CommError> {
        let number = self.next;
        self.next += 1;
        if self.buckets[number].reduced_in_order(self.keep) {
            self.reduce(number)
        } else {
            Ok(())
        }
    }

    fn reduce(&mut self, number: usize) -> Result<(), CommError> {
        let shared_out = self.buckets[number].own.is_some();
        // What travels needs memory of its own: not more than two at a time.
        if shared_out
            && self.in_flight.len() == 2
            && let Some(oldest) = self.in_flight.pop_front()
            && !self.in_flight.contains(&oldest)
        {
            self.buckets[oldest].wait_reduction()?;
        }
        self.buckets[number].reduce(self.keep)?;
        if shared_out {
            self.in_flight.push_back(number);
        }
        Ok(())
    }
}

impl Bucket {
    /// Whether it is reduced once, in the order of the plan.
    fn reduced_in_order(&self, keep: bool) -> bool {
        keep || self.own.is_none()
    }
}

/// The gradients of a model's weights.
pub struct GradientBuckets {
    state: Arc<Mutex<BucketState>>,
}

impl GradientBuckets {
    /// Gives each of `weights` a place for its gradient; each comes with the number of its ranks in `replications`.
    /// `bucket_bytes` is the size up to which weights share one reduction. Where ranks share sums out, whole gradients
    /// are kept during a step only with `keep`.
    ///
    /// # Errors
    /// When a weight already has such a place.
    pub fn new(
        weights: &[(Weight, usize)],
        replications: &[Replication],
        bucket_bytes: usize,
        keep: bool,
        accelerator: &dyn Accelerator,
    ) -> Result<GradientBuckets, Error> {
        let sizes: Vec<_> = weights
            .iter()
            .map(|(weight, group)| (weight.shape().iter().product::<i64>() as usize, *group))
            .collect();
        let plans = plan_buckets(&sizes, bucket_bytes / 4);
        let mut locations = vec![(0, 0); weights.len()];
        let mut buckets = Vec::new();
        for plan in &plans {
            let replication = replications[plan.group].clone();
            let rank = replication.shard_group.rank();
            let ranks = replication.shard_group.size();
            let mut offset = 0;
            let mut share = 0;
            let mut members = Vec::new();
            for &member in &plan.members {
                locations[member] = (buckets.len(), members.len());
                let (rows, cols) = matrix_shape(weights[member].0.shape());
                let own = own_rows(rows, rank, ranks);
                members.push(Member {
                    rows,
                    cols,
                    offset,
                    own_offset: share,
                    own,
                    unwritten: true,
                });
                offset += rows * cols;
                share += own_rows(rows, 0, ranks).end * cols;
            }
            let shared_out = ranks > 1;
            buckets.push(Bucket {
                members,
                len: offset,
                share,
                whole: (keep || !shared_out).then(|| accelerator.zeros(&[offset], Kind::Float)),
                own: shared_out.then(|| accelerator.zeros(&[share], Kind::Float)),
                replication,
                uses: plan
                    .members
                    .iter()
                    .map(|&member| weights[member].0.uses())
                    .sum(),
                pending: 0,
                work: None,
            });
        }
        let device = accelerator.zeros(&[0], Kind::Float).device();
        let state = BucketState {
            buckets,
            locations,
            device,
            keep,
            reducing: false,
            next: 0,
            in_flight: VecDeque::new(),
            deferred: None,
        };
        let state = Arc::new(Mutex::new(state));
        for (index, (weight, _)) in weights.iter().enumerate() {
            weight.attach_sink(index, state.clone())?;
        }
        Ok(GradientBuckets { state })
    }

    /// Forgets all gradients and begins a step of `microbatches` backwards through every weight.
    pub fn begin(&self, microbatches: usize) {
        let mut state = self.lock();
        let keep = state.keep;
        tch::no_grad(|| {
            for bucket in &mut state.buckets {
                bucket
                    .members
                    .iter_mut()
                    .for_each(|member| member.unwritten = true);
                if let Some(own) = &mut bucket.own {
                    let _ = own.zero_();
                }
                bucket.pending = bucket.uses
                    * if bucket.reduced_in_order(keep) {
                        microbatches
                    } else {
                        1
                    };
            }
        });
        (state.reducing, state.next) = (true, 0);
    }

    /// Runs `backward` and keeps its contributions to weights' gradients for later: calling them adds them up. (A
    /// pipeline's B without its W.)
    ///
    /// # Errors
    /// Those of `backward`.
    pub fn defer_weight_gradients<T, E>(
        &self,
        backward: impl FnOnce() -> Result<T, E>,
    ) -> Result<(T, Vec<DeferredGradient>), E> {
        self.lock().deferred = Some(Vec::new());
        let result = backward();
        let deferred = self.lock().deferred.take().unwrap_or_default();
        Ok((result?, deferred))
    }

    /// Waits until every gradient, or this rank's rows of it, is the sum over its replicas.
    ///
    /// # Collective
    /// All ranks, after the last backward of a step.
    ///
    /// # Errors
    /// When a reduction failed.
    pub fn finish(&self) -> Result<(), CommError> {
        let mut state = self.lock();
        // A weight that took no part in the loss leaves its bucket incomplete: its gradient is zero.
        while state.next < state.buckets.len() {
            state.reduce_next()?;
        }
        for number in 0..state.buckets.len() {
            if !state.buckets[number].reduced_in_order(state.keep) {
                state.reduce(number)?;
            }
        }
        state.in_flight.clear();
        state
            .buckets
            .iter_mut()
            .try_for_each(Bucket::wait_reduction)?;
        let mut works = Vec::new();
        for bucket in &state.buckets {
            if let Some(own) = bucket
                .own
                .as_ref()
                .filter(|_| bucket.replication.replica_group.size() > 1)
            {
                works.push(
                    bucket
                        .replication
                        .replica_group
                        .all_reduce(own, ReduceOp::Sum)?,
                );
            }
        }
        works.into_iter().try_for_each(Work::wait)?;
        state.reducing = false;
        Ok(())
    }

    /// The fp32 gradient of this rank's rows of weight `index`: `[rows, columns]`, all dims but the last as one.
    pub fn gradient(&self, index: usize) -> Tensor {
        let mut state = self.lock();
        let (bucket, member) = state.locations[index];
        let bucket = &mut state.buckets[bucket];
        bucket.zero_unwritten();
        let Member {
            rows,
            cols,
            offset,
            own_offset,
            ref own,
            ..
        } = bucket.members[member];
        match (&bucket.own, &bucket.whole) {
            (Some(share), _) => {
                let rows = own.end - own.start;
                share.narrow(0, own_offset, rows * cols).view([rows, cols])
            }
            (None, Some(whole)) => whole.narrow(0, offset, rows * cols).view([rows, cols]),
            (None, None) => unreachable!("a bucket that is not shared out is kept"),
        }
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, BucketState> {
        self.state.lock()
    }
}

/// Rows and columns of a weight: all dims but the last, and the last; a vector is one column.
pub fn matrix_shape(shape: &[i64]) -> (i64, i64) {
    match shape {
        [] => (1, 1),
        [len] => (*len, 1),
        [rows @ .., cols] => (rows.iter().product(), *cols),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, linear, run_on_threads};
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn every_parameter_is_in_one_bucket_of_its_group(
            parameters in prop::collection::vec((1usize..200, 0usize..3), 0..60),
            capacity in 1usize..500,
        ) {
            let plan = plan_buckets(&parameters, capacity);
            let mut seen = vec![0; parameters.len()];
            for bucket in &plan {
                prop_assert_eq!(bucket.len, bucket.members.iter().map(|&m| parameters[m].0).sum::<usize>());
                prop_assert!(bucket.len <= capacity || bucket.members.len() == 1);
                for &member in &bucket.members {
                    seen[member] += 1;
                    prop_assert_eq!(parameters[member].1, bucket.group);
                }
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
            // A bucket is complete no later than the next one.
            let complete: Vec<_> = plan.iter().map(|b| *b.members.iter().min().unwrap()).collect();
            prop_assert!(complete.is_sorted_by(|a, b| a > b));
        }
    }

    fn weights(kind: Kind) -> (Weight, Weight, GradientBuckets) {
        let new = |n: i64| Weight::new(Cpu.zeros(&[n, 1], kind).fill_(2.0));
        let a = new(2);
        let b = new(3);
        let alone = [Replication::alone()];
        let gradients = GradientBuckets::new(
            &[(a.clone(), 0), (b.clone(), 0)],
            &alone,
            1 << 20,
            true,
            &Cpu,
        )
        .unwrap();
        (a, b, gradients)
    }

    fn list(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    #[test]
    fn gradients_of_several_backwards_add_up_in_fp32() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (a, b, gradients) = weights(kind);
            for _ in 0..2 {
                gradients.begin(2);
                for x in [1.0, 3.0] {
                    let x = Cpu.zeros(&[1, 1], kind).fill_(x);
                    (linear(&x, &a).unwrap().sum(kind) + linear(&x, &b).unwrap().sum(kind) * 2.0)
                        .backward();
                }
                gradients.finish().unwrap();
                assert_eq!(gradients.gradient(0).kind(), Kind::Float);
                assert_eq!(list(&gradients.gradient(0)), [4., 4.]);
                assert_eq!(list(&gradients.gradient(1)), [8., 8., 8.]);
            }
        }
    }

    #[test]
    fn weights_gradients_can_be_put_off() {
        let (a, _b, gradients) = weights(Kind::Float);
        gradients.begin(1);
        let x = Cpu
            .zeros(&[1, 1], Kind::Float)
            .fill_(5.0)
            .set_requires_grad(true);
        let loss = linear(&x, &a).unwrap().sum(Kind::Float);
        let ((), deferred) = gradients
            .defer_weight_gradients(|| loss.f_backward())
            .unwrap();
        assert_eq!(
            (list(&x.grad()), list(&gradients.gradient(0))),
            (vec![4.], vec![0., 0.])
        );
        for contribution in deferred {
            contribution().unwrap();
        }
        gradients.finish().unwrap();
        assert_eq!(list(&gradients.gradient(0)), [5., 5.]);
    }

    #[test]
    fn a_weight_outside_of_the_loss_has_a_zero_gradient() {
        let (a, _b, gradients) = weights(Kind::Float);
        gradients.begin(1);
        linear(&Cpu.zeros(&[1, 1], Kind::Float), &a)
            .unwrap()
            .sum(Kind::Float)
            .backward();
        gradients.finish().unwrap();
        assert_eq!(list(&gradients.gradient(1)), [0., 0., 0.]);
    }

    #[test]
    fn shared_out_sums_are_rows_of_the_whole_kept_or_not() {
        // 5 rows over 2 ranks and 2 replicas of them: every rank adds its number to each row, in each of 3 microbatches.
        for keep in [true, false] {
            let ranks = run_on_threads(4, Duration::from_secs(20), move |world| {
                let rank = world.rank();
                let shard_group = world
                    .group("shard_group", &[rank / 2 * 2, rank / 2 * 2 + 1])
                    .unwrap();
                let replica_group = world
                    .group("replica_group", &[rank % 2, rank % 2 + 2])
                    .unwrap();
                let weight = Weight::new(Cpu.zeros(&[5, 2], Kind::Float));
                let replication = Replication {
                    shard_group,
                    replica_group,
                };
                let gradients = GradientBuckets::new(
                    &[(weight.clone(), 0)],
                    &[replication],
                    1 << 20,
                    keep,
                    &Cpu,
                )
                .unwrap();
                for _ in 0..2 {
                    gradients.begin(3);
                    for _ in 0..3 {
                        let contribution = weight.contribution().unwrap();
                        let _ = contribution
                            .sum()
                            .tensor()
                            .shallow_clone()
                            .g_add_scalar_(rank as f64);
                        contribution.finish().unwrap();
                    }
                    gradients.finish().unwrap();
                }
                list(&gradients.gradient(0))
            });
            for (rank, values) in ranks.iter().enumerate() {
                assert_eq!(
                    *values,
                    vec![18.0; if rank % 2 == 0 { 6 } else { 4 }],
                    "rank {rank}"
                );
            }
        }
    }
}
