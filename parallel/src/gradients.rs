//! Gradients summed over replicas, in buckets, while backward still runs.
//!
//! Every parameter's gradient lives in an fp32 flat buffer, a *bucket*: parameters in reverse order of use, so that
//! a bucket is complete early in backward. fp32 parameters accumulate into their part of the buffer directly; for
//! other dtypes the gradient is added to it as soon as it is there, and freed. In the last backward of a step each
//! complete bucket starts an asynchronous all-reduce.
//!
//! # Collective
//! Buckets are reduced in the order of the plan, on every rank, whatever the order in which gradients come.

use crate::{Accelerator, CommError, Communicator, ReduceOp, Work};
use std::sync::{Arc, Mutex};
use tch::{Kind, Tensor};
use torch_ext::{Error, on_grad_accumulated, set_grad};

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
    members: usize,
    pending: usize,
    work: Option<Work>,
}

struct State {
    buckets: Vec<Bucket>,
    /// Whether complete buckets are to be reduced in this backward.
    reducing: bool,
    /// The next bucket to reduce.
    next: usize,
}

impl State {
    fn ready(&mut self, bucket: usize) -> Result<(), CommError> {
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

/// The gradients of a model's parameters.
pub struct GradientBuckets {
    state: Arc<Mutex<State>>,
    views: Vec<Tensor>,
    /// Parameters whose own dtype is not fp32: their `.grad` must not outlive the hook.
    parameters: Vec<Tensor>,
}

impl GradientBuckets {
    /// Takes over the gradients of `parameters`, leaf tensors each with the number of its group in `groups`.
    /// `bucket_bytes` is the size up to which parameters share one all-reduce.
    ///
    /// # Errors
    /// When a tensor is not a leaf that requires grad.
    pub fn new(
        parameters: &[(Tensor, usize)],
        groups: &[Arc<dyn Communicator>],
        bucket_bytes: usize,
        accelerator: &dyn Accelerator,
    ) -> Result<GradientBuckets, Error> {
        let sizes: Vec<_> = parameters.iter().map(|(tensor, group)| (tensor.numel(), *group)).collect();
        let plans = plan_buckets(&sizes, bucket_bytes / 4);
        let mut views: Vec<Option<Tensor>> = parameters.iter().map(|_| None).collect();
        let mut buckets = Vec::new();
        let mut bucket_of = vec![0; parameters.len()];
        for plan in &plans {
            let flat = accelerator.zeros(&[plan.len as i64], Kind::Float);
            let mut offset = 0;
            for &member in &plan.members {
                let tensor = &parameters[member].0;
                let len = tensor.numel() as i64;
                views[member] = Some(flat.narrow(0, offset, len).view(tensor.size().as_slice()));
                bucket_of[member] = buckets.len();
                offset += len;
            }
            let members = plan.members.len();
            let group = groups[plan.group].clone();
            buckets.push(Bucket { flat, group, members, pending: members, work: None });
        }
        let views: Vec<Tensor> = views.into_iter().map(|view| view.expect("every parameter is in a bucket")).collect();
        let state = Arc::new(Mutex::new(State { buckets, reducing: false, next: 0 }));
        for ((tensor, _), (view, bucket)) in parameters.iter().zip(views.iter().zip(bucket_of)) {
            let state = state.clone();
            let direct = tensor.kind() == Kind::Float;
            if direct {
                set_grad(tensor, Some(view))?;
            }
            let view = view.shallow_clone();
            on_grad_accumulated(tensor, move |leaf| {
                if !direct {
                    let _ = view.shallow_clone().f_add_(&leaf.grad()).map_err(|e| Error::new(e.to_string()))?;
                    set_grad(leaf, None)?;
                }
                let mut state = state.lock().expect("no thread panics while it holds the gradients");
                state.ready(bucket).map_err(|e| Error::new(e.to_string()))
            })?;
        }
        let parameters = parameters.iter().map(|(tensor, _)| tensor.shallow_clone()).collect();
        Ok(GradientBuckets { state, views, parameters })
    }

    /// Sets all gradients to zero.
    pub fn zero(&self) {
        let state = self.lock();
        tch::no_grad(|| {
            for bucket in &state.buckets {
                let _ = bucket.flat.shallow_clone().zero_();
            }
        });
    }

    /// To be called before each backward: `last` when the gradients are to be summed over the replicas in it.
    pub fn begin_backward(&self, last: bool) {
        let mut state = self.lock();
        state.reducing = last;
        state.next = 0;
        for bucket in &mut state.buckets {
            bucket.pending = bucket.members;
        }
    }

    /// Waits until every gradient is the sum over its replicas.
    ///
    /// # Collective
    /// All ranks, after the backward that was begun with `last`.
    ///
    /// # Errors
    /// When an all-reduce failed.
    pub fn finish(&self) -> Result<(), CommError> {
        let mut state = self.lock();
        // A parameter that took no part in the loss leaves its bucket incomplete: its gradient is zero.
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

    /// The fp32 gradient of parameter `index`, of the parameter's shape.
    pub fn gradient(&self, index: usize) -> &Tensor {
        &self.views[index]
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the gradients")
    }
}

impl Drop for GradientBuckets {
    fn drop(&mut self) {
        for parameter in &self.parameters {
            // The buffers end with this object; the parameters go on without a gradient and without a hook.
            let _ = set_grad(parameter, None);
            let _ = on_grad_accumulated(parameter, |_| Ok(()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, Local};
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

    fn buckets(kind: Kind) -> (Tensor, Tensor, GradientBuckets) {
        let new = |n: i64| Cpu.zeros(&[n], kind).fill_(2.0).set_requires_grad(true);
        let (a, b) = (new(2), new(3));
        let group: Arc<dyn Communicator> = Arc::new(Local::new(0, "data"));
        let parameters = [(a.shallow_clone(), 0), (b.shallow_clone(), 0)];
        let gradients = GradientBuckets::new(&parameters, &[group], 1 << 20, &Cpu).unwrap();
        (a, b, gradients)
    }

    #[test]
    fn gradients_of_several_backwards_add_up_in_fp32() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (a, b, gradients) = buckets(kind);
            for last in [false, true] {
                gradients.begin_backward(last);
                ((&a * &a).sum(kind) + b.sum(kind)).backward();
            }
            gradients.finish().unwrap();
            assert_eq!(gradients.gradient(0).kind(), Kind::Float);
            assert_eq!(Vec::<f32>::try_from(gradients.gradient(0)).unwrap(), [8., 8.]);
            assert_eq!(Vec::<f32>::try_from(gradients.gradient(1)).unwrap(), [2., 2., 2.]);
            gradients.zero();
            assert_eq!(Vec::<f32>::try_from(gradients.gradient(0)).unwrap(), [0., 0.]);
        }
    }

    #[test]
    fn a_parameter_outside_of_the_loss_has_a_zero_gradient() {
        let (a, _b, gradients) = buckets(Kind::Float);
        gradients.begin_backward(true);
        a.sum(Kind::Float).backward();
        gradients.finish().unwrap();
        assert_eq!(Vec::<f32>::try_from(gradients.gradient(1)).unwrap(), [0., 0., 0.]);
    }
}
