//! Counter of a rank's progress, which its keeper watches to detect hangs.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Steps and smaller units of progress of this rank. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct ProgressCounter {
    step: Arc<AtomicU64>,
    ticks: Arc<AtomicU64>,
}

impl ProgressCounter {
    /// Records progress, from anywhere in the rank's work.
    pub(crate) fn tick(&self) {
        self.ticks.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that `step` steps are done.
    pub(crate) fn step_done(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
        self.tick();
    }

    pub(crate) fn step(&self) -> u64 {
        self.step.load(Ordering::Relaxed)
    }

    pub(crate) fn ticks(&self) -> u64 {
        self.ticks.load(Ordering::Relaxed)
    }
}
