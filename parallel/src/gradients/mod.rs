//! Gradients summed over replicas, in buckets, while backward still runs.
//!
//! Every weight's gradient lives in a *bucket*, a flat fp32 buffer. Buckets hold weights in reverse
//! order of use, so that backward completes the first buckets early. Layers add each contribution
//! in place ([`Weight::add_gradient`]). Nothing clears the buffer: the first contribution
//! overwrites it.
//!
//! After the last contribution of a step the bucket starts an asynchronous all-reduce. If ranks
//! shard the sum (ZeRO, arXiv 1910.02054), it starts a reduce-scatter by rows instead. If full
//! gradients are not kept (ZeRO-2), this happens after every microbatch, and the buffer is freed.
//!
//! # Collective
//! All ranks reduce buckets in the order of the plan, whatever the order in which gradients come.
//! Buckets that are not kept are reduced as they become complete. That order is the same on
//! replicas, which run the same passes.

mod bucket;
mod plan;
mod state;

pub use bucket::Replication;
pub use plan::{BucketPlan, plan_buckets};
pub use state::MAX_REDUCTIONS;

use crate::{Accelerator, CommError, Weight, weight::DeferredGradient};
use bucket::Bucket;
use parking_lot::Mutex;
use state::{BucketState, Location};
use std::{collections::VecDeque, sync::Arc};
use tch::{Kind, Tensor};
use torch_ext::Error;

/// The gradients of a model's weights.
pub struct GradientBuckets {
    state: Arc<Mutex<BucketState>>,
}

impl GradientBuckets {
    /// Allocates gradients and attaches them to `weights`.
    ///
    /// Each weight comes with the index of its ranks in `replications`. Weights share a reduction
    /// up to `bucket_bytes`. If ranks shard the sums, full gradients stay until the end of a step
    /// only with `keep_full`.
    ///
    /// # Errors
    /// If a weight already has a gradient.
    pub fn new(
        weights: &[(Weight, usize)],
        replications: &[Replication],
        bucket_bytes: usize,
        keep_full: bool,
        accelerator: &dyn Accelerator,
    ) -> Result<GradientBuckets, Error> {
        let elements = |weight: &Weight| weight.shape().iter().product::<i64>() as usize;
        let sizes: Vec<(usize, usize)> = weights
            .iter()
            .map(|(weight, group)| (elements(weight), *group))
            .collect();
        let plans = plan_buckets(&sizes, bucket_bytes / size_of::<f32>());
        let mut locations = vec![Location::default(); weights.len()];
        let mut buckets = Vec::new();
        for (bucket, plan) in plans.iter().enumerate() {
            for (member, &index) in plan.members.iter().enumerate() {
                locations[index] = Location { bucket, member };
            }
            let replication = replications[plan.group].clone();
            buckets.push(Bucket::new(
                plan,
                weights,
                replication,
                keep_full,
                accelerator,
            ));
        }
        let state = BucketState {
            buckets,
            locations,
            device: accelerator.zeros(&[0], Kind::Float).device(),
            keep_full,
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
        self.state.lock().begin(microbatches);
    }

    /// Runs `backward` and returns its contributions to the gradients of weights for later.
    ///
    /// Calling a contribution adds it. This is the B of a pipeline without its W.
    ///
    /// # Errors
    /// The errors of `backward`.
    pub fn defer_weight_gradients<T, E>(
        &self,
        backward: impl FnOnce() -> Result<T, E>,
    ) -> Result<(T, Vec<DeferredGradient>), E> {
        self.state.lock().deferred = Some(Vec::new());
        let result = backward();
        let deferred = self.state.lock().deferred.take();
        Ok((result?, deferred.unwrap_or_default()))
    }

    /// Waits until every gradient, or this rank's rows of it, is the sum over its replicas.
    ///
    /// # Collective
    /// All ranks, after the last backward of a step.
    ///
    /// # Errors
    /// If a reduction failed.
    pub fn finish(&self) -> Result<(), CommError> {
        self.state.lock().finish()
    }

    /// Returns the fp32 gradient of this rank's rows of weight `index`.
    ///
    /// Its shape is `[rows, columns]`, see [`crate::matrix_shape`].
    pub fn gradient(&self, index: usize) -> Tensor {
        let mut state = self.state.lock();
        let Location { bucket, member } = state.locations[index];
        state.buckets[bucket].gradient(member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, linear, run_on_threads};
    use std::time::Duration;

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
                    let of_a = linear(&x, &a).unwrap().sum(kind);
                    let of_b = linear(&x, &b).unwrap().sum(kind);
                    (of_a + of_b * 2.0).backward();
                }
                gradients.finish().unwrap();
                assert_eq!(gradients.gradient(0).kind(), Kind::Float);
                assert_eq!(list(&gradients.gradient(0)), [4., 4.]);
                assert_eq!(list(&gradients.gradient(1)), [8., 8., 8.]);
            }
        }
    }

    #[test]
    fn weight_gradients_can_be_deferred() {
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
        assert_eq!(list(&x.grad()), [4.]);
        assert_eq!(list(&gradients.gradient(0)), [0., 0.]);
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
        let x = Cpu.zeros(&[1, 1], Kind::Float);
        let loss = linear(&x, &a).unwrap().sum(Kind::Float);
        loss.backward();
        gradients.finish().unwrap();
        assert_eq!(list(&gradients.gradient(1)), [0., 0., 0.]);
    }

    #[test]
    fn sharded_sums_are_rows_of_the_whole_kept_or_not() {
        // 5 rows on 2 ranks with 2 replicas: in each of 3 microbatches every rank adds its number
        // to each row.
        for keep in [true, false] {
            let ranks = run_on_threads(4, Duration::from_secs(20), move |world| {
                let rank = world.rank();
                let shard_group = world
                    .group("shard_group", &[rank / 2 * 2, rank / 2 * 2 + 1])
                    .unwrap();
                let replica_ranks = vec![rank % 2, rank % 2 + 2];
                let replica_group = world.group("replica_group", &replica_ranks).unwrap();
                let weight = Weight::new(Cpu.zeros(&[5, 2], Kind::Float));
                let replication = Replication {
                    shard_group,
                    replica_group,
                    replica_ranks,
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
                        let mut sum = contribution.sum().tensor().shallow_clone();
                        let _ = sum.g_add_scalar_(rank as f64);
                        contribution.finish().unwrap();
                    }
                    gradients.finish().unwrap();
                }
                list(&gradients.gradient(0))
            });
            for (rank, values) in ranks.iter().enumerate() {
                let elements = if rank % 2 == 0 { 6 } else { 4 };
                assert_eq!(*values, vec![18.0; elements], "rank {rank}");
            }
        }
    }
}
