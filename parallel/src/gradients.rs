//! Gradients summed over replicas, in buckets, while backward still runs.
//!
//! Every weight's gradient lives in an fp32 flat buffer, a *bucket*: weights in reverse order of use, so that a bucket is
//! complete early in backward. Layers add each contribution to its place as they compute it ([`Weight::add_gradient`]).
//! When the last contribution of a step has come, the bucket starts an asynchronous all-reduce.
//!
//! # Collective
//! Buckets are reduced in the order of the plan, on every rank, whatever the order in which gradients come.

use crate::{Accelerator, CommError, Communicator, ReduceOp, Weight, Work};
use std::sync::{Arc, Mutex};
use tch::{Kind, Tensor};
use torch_ext::Error;

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
        open.push(BucketPlan { group, members: vec![index], len });
    }
    done.extend(open);
    // In the order in which their last gradient comes: the lower the least parameter, the later.
    done.sort_by_key(|bucket| std::cmp::Reverse(bucket.members.iter().min().copied()));
    done
}

struct Bucket {
    flat: Tensor,
    group: Arc<dyn Communicator>,
    /// Contributions of one microbatch to its members.
    uses: usize,
    /// Contributions that are still to come in this step.
    pending: usize,
    work: Option<Work>,
}

pub(crate) struct State {
    buckets: Vec<Bucket>,
    /// Whether a step is under way, so that complete buckets are to be reduced.
    reducing: bool,
    /// The next bucket to reduce.
    next: usize,
    /// Where contributions to weights' gradients are kept instead of being computed.
    deferred: Option<Vec<Deferred>>,
}

/// A contribution to a weight's gradient that is still to be computed.
pub type Deferred = Box<dyn FnOnce() -> Result<(), Error> + Send>;

impl State {
    /// Keeps `contribution` for later, or gives it back to be computed now.
    pub(crate) fn defer(&mut self, contribution: Deferred) -> Option<Deferred> {
        match &mut self.deferred {
            Some(list) => {
                list.push(contribution);
                None
            }
            None => Some(contribution),
        }
    }

    /// A contribution to a member of `bucket` is there.
    pub(crate) fn ready(&mut self, bucket: usize) -> Result<(), CommError> {
        self.buckets[bucket].pending = self.buckets[bucket].pending.saturating_sub(1);
        while self.reducing && self.buckets.get(self.next).is_some_and(|bucket| bucket.pending == 0) {
            self.reduce_next()?;
        }
        Ok(())
    }

    fn reduce_next(&mut self) -> Result<(), CommError> {
        let bucket = &mut self.buckets[self.next];
        bucket.work = Some(bucket.group.all_reduce(&bucket.flat, ReduceOp::Sum)?);
        self.next += 1;
        Ok(())
    }
}

/// The gradients of a model's weights.
pub struct GradientBuckets {
    state: Arc<Mutex<State>>,
    views: Vec<Tensor>,
}

impl GradientBuckets {
    /// Gives each of `weights` a place for its gradient; each comes with the number of its group in `groups`.
    /// `bucket_bytes` is the size up to which weights share one all-reduce.
    ///
    /// # Errors
    /// When a weight already has such a place.
    pub fn new(
        weights: &[(Weight, usize)],
        groups: &[Arc<dyn Communicator>],
        bucket_bytes: usize,
        accelerator: &dyn Accelerator,
    ) -> Result<GradientBuckets, Error> {
        let sizes: Vec<_> = weights.iter().map(|(weight, group)| (weight.value().numel(), *group)).collect();
        let plans = plan_buckets(&sizes, bucket_bytes / 4);
        let mut views: Vec<Option<Tensor>> = weights.iter().map(|_| None).collect();
        let mut buckets = Vec::new();
        let mut bucket_of = vec![0; weights.len()];
        for plan in &plans {
            let flat = accelerator.zeros(&[plan.len as i64], Kind::Float);
            let mut offset = 0;
            for &member in &plan.members {
                let value = weights[member].0.value();
                let len = value.numel() as i64;
                views[member] = Some(flat.narrow(0, offset, len).view(value.size().as_slice()));
                bucket_of[member] = buckets.len();
                offset += len;
            }
            let uses = plan.members.iter().map(|&member| weights[member].0.uses()).sum();
            buckets.push(Bucket { flat, group: groups[plan.group].clone(), uses, pending: 0, work: None });
        }
        let views: Vec<Tensor> = views.into_iter().map(|view| view.expect("every weight is in a bucket")).collect();
        let state = Arc::new(Mutex::new(State { buckets, reducing: false, next: 0, deferred: None }));
        for ((weight, _), (view, bucket)) in weights.iter().zip(views.iter().zip(bucket_of)) {
            weight.collect_in(view.shallow_clone(), bucket, state.clone())?;
        }
        Ok(GradientBuckets { state, views })
    }

    /// Sets all gradients to zero and begins a step of `microbatches` backwards through every weight.
    pub fn begin(&self, microbatches: usize) {
        let mut state = self.lock();
        tch::no_grad(|| {
            for bucket in &mut state.buckets {
                let _ = bucket.flat.zero_();
                bucket.pending = bucket.uses * microbatches;
            }
        });
        (state.reducing, state.next) = (true, 0);
    }

    /// Runs `backward` and keeps its contributions to weights' gradients for later: calling them adds them up. (A
    /// pipeline's B without its W.)
    ///
    /// # Errors
    /// Those of `backward`.
    pub fn without_weights<T, E>(&self, backward: impl FnOnce() -> Result<T, E>) -> Result<(T, Vec<Deferred>), E> {
        self.lock().deferred = Some(Vec::new());
        let result = backward();
        let deferred = self.lock().deferred.take().unwrap_or_default();
        Ok((result?, deferred))
    }

    /// Waits until every gradient is the sum over its replicas.
    ///
    /// # Collective
    /// All ranks, after the last backward of a step.
    ///
    /// # Errors
    /// When an all-reduce failed.
    pub fn finish(&self) -> Result<(), CommError> {
        let mut state = self.lock();
        // A weight that took no part in the loss leaves its bucket incomplete: its gradient is zero.
        while state.next < state.buckets.len() {
            state.reduce_next()?;
        }
        for bucket in &mut state.buckets {
            if let Some(work) = bucket.work.take() {
                work.wait()?;
            }
        }
        state.reducing = false;
        Ok(())
    }

    /// The fp32 gradient of weight `index`, of the weight's shape.
    pub fn gradient(&self, index: usize) -> &Tensor {
        &self.views[index]
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the gradients")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, Local, linear};
    use proptest::prelude::*;

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
        let (a, b) = (new(2), new(3));
        let group: Arc<dyn Communicator> = Arc::new(Local::new(0, "data"));
        let gradients = GradientBuckets::new(&[(a.clone(), 0), (b.clone(), 0)], &[group], 1 << 20, &Cpu).unwrap();
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
                    (linear(&x, &a).unwrap().sum(kind) + linear(&x, &b).unwrap().sum(kind) * 2.0).backward();
                }
                gradients.finish().unwrap();
                assert_eq!(gradients.gradient(0).kind(), Kind::Float);
                assert_eq!(list(gradients.gradient(0)), [4., 4.]);
                assert_eq!(list(gradients.gradient(1)), [8., 8., 8.]);
            }
        }
    }

    #[test]
    fn weights_gradients_can_be_put_off() {
        let (a, _b, gradients) = weights(Kind::Float);
        gradients.begin(1);
        let x = Cpu.zeros(&[1, 1], Kind::Float).fill_(5.0).set_requires_grad(true);
        let loss = linear(&x, &a).unwrap().sum(Kind::Float);
        let ((), deferred) = gradients.without_weights(|| loss.f_backward()).unwrap();
        assert_eq!((list(&x.grad()), list(gradients.gradient(0))), (vec![4.], vec![0., 0.]));
        for contribution in deferred {
            contribution().unwrap();
        }
        gradients.finish().unwrap();
        assert_eq!(list(gradients.gradient(0)), [5., 5.]);
    }

    #[test]
    fn a_weight_outside_of_the_loss_has_a_zero_gradient() {
        let (a, _b, gradients) = weights(Kind::Float);
        gradients.begin(1);
        linear(&Cpu.zeros(&[1, 1], Kind::Float), &a).unwrap().sum(Kind::Float).backward();
        gradients.finish().unwrap();
        assert_eq!(list(gradients.gradient(1)), [0., 0., 0.]);
    }
}
