//! The sink of all contributions, which reduces buckets as they become complete.

use super::bucket::Bucket;
use crate::{
    CommError, GradientSum, Work,
    weight::{DeferredGradient, GradientSink},
};
use std::collections::VecDeque;
use tch::Device;

/// Number of sharded buckets that are reduced at once; each needs a buffer of its own.
pub const MAX_REDUCTIONS: usize = 2;

/// A weight's bucket, and its position among the bucket's members.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Location {
    pub(super) bucket: usize,
    pub(super) member: usize,
}

pub(super) struct BucketState {
    pub(super) buckets: Vec<Bucket>,
    /// By index of the weight.
    pub(super) locations: Vec<Location>,
    pub(super) device: Device,
    /// True if full gradients stay until the end of the step.
    pub(super) keep_full: bool,
    /// True during a step: complete buckets are reduced.
    pub(super) reducing: bool,
    /// The next bucket to reduce in the order of the plan.
    pub(super) next: usize,
    /// Sharded buckets that are being reduced, the oldest first.
    pub(super) in_flight: VecDeque<usize>,
    /// Collects contributions while they are deferred.
    pub(super) deferred: Option<Vec<DeferredGradient>>,
}

impl GradientSink for BucketState {
    fn defer(&mut self, contribution: DeferredGradient) -> Option<DeferredGradient> {
        match &mut self.deferred {
            Some(list) => {
                list.push(contribution);
                None
            }
            None => Some(contribution),
        }
    }

    fn sum(&mut self, index: usize) -> GradientSum {
        let Location { bucket, member } = self.locations[index];
        let (sum, unwritten) = self.buckets[bucket].sum(member, self.device);
        GradientSum::new(sum, unwritten)
    }

    fn ready(&mut self, index: usize) -> Result<(), CommError> {
        let number = self.locations[index].bucket;
        let bucket = &mut self.buckets[number];
        bucket.pending = bucket.pending.saturating_sub(1);
        if bucket.reduced_in_order(self.keep_full) {
            while self.reducing && self.next_is_complete() {
                self.reduce_next()?;
            }
        } else if self.reducing && bucket.pending == 0 {
            bucket.expect(1);
            self.reduce(number)?;
        }
        Ok(())
    }
}

impl BucketState {
    /// Forgets all gradients and begins a step of `microbatches` backwards.
    pub(super) fn begin(&mut self, microbatches: usize) {
        for bucket in &mut self.buckets {
            bucket.clear();
            let until_reduction = if bucket.reduced_in_order(self.keep_full) {
                microbatches
            } else {
                1
            };
            bucket.expect(until_reduction);
        }
        self.reducing = true;
        self.next = 0;
    }

    /// Ends the step: reduces what is left, and waits for it.
    pub(super) fn finish(&mut self) -> Result<(), CommError> {
        // A weight outside of the loss leaves its bucket incomplete; its gradient is zero.
        while self.next < self.buckets.len() {
            self.reduce_next()?;
        }
        for number in 0..self.buckets.len() {
            if !self.buckets[number].reduced_in_order(self.keep_full) {
                self.reduce(number)?;
            }
        }
        self.in_flight.clear();
        for bucket in &mut self.buckets {
            bucket.wait_reduction()?;
        }
        let mut works = Vec::new();
        for bucket in &self.buckets {
            works.extend(bucket.reduce_replicas()?);
        }
        works.into_iter().try_for_each(Work::wait)?;
        self.reducing = false;
        Ok(())
    }

    /// True if the next bucket of the plan is complete, or is not reduced in order.
    fn next_is_complete(&self) -> bool {
        let next = self.buckets.get(self.next);
        next.is_some_and(|bucket| !bucket.reduced_in_order(self.keep_full) || bucket.pending == 0)
    }

    fn reduce_next(&mut self) -> Result<(), CommError> {
        let number = self.next;
        self.next += 1;
        if self.buckets[number].reduced_in_order(self.keep_full) {
            self.reduce(number)
        } else {
            Ok(())
        }
    }

    fn reduce(&mut self, number: usize) -> Result<(), CommError> {
        let is_sharded = self.buckets[number].is_sharded();
        if is_sharded
            && self.in_flight.len() == MAX_REDUCTIONS
            && let Some(oldest) = self.in_flight.pop_front()
            && !self.in_flight.contains(&oldest)
        {
            self.buckets[oldest].wait_reduction()?;
        }
        self.buckets[number].reduce(self.keep_full)?;
        if is_sharded {
            self.in_flight.push_back(number);
        }
        Ok(())
    }
}
