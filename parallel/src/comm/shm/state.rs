//! The state of a group, and how threads wait for its operations.

use super::{
    super::Membership,
    buffer::Completion,
    engine::Engine,
    process::is_alive,
    segment::{Doorbell, Segment},
};
use crate::background;
use parking_lot::Mutex;
use std::{
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};

/// The number of times that a waiting thread polls before it sleeps.
struct SpinLimits {
    spins: usize,
    spins_and_yields: usize,
}

/// For a thread whose rank computes nothing meanwhile.
const SPIN_LIMITS: SpinLimits = SpinLimits {
    spins: 50,
    spins_and_yields: 100,
};

/// A background thread never spins, since its rank computes meanwhile.
const NO_SPINS: SpinLimits = SpinLimits {
    spins: 0,
    spins_and_yields: 0,
};

/// The pieces by which a thread advances operations when it starts one, or has waited for one: the
/// number that a ring holds. More would delay what the thread computes.
const MAX_PROGRESS_CALLS: usize = 8;

/// The time between two liveness checks of the other ranks by a sleeping thread.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(200);

pub(super) struct ShmState {
    pub(super) membership: Membership,
    pub(super) timeout: Duration,
    pub(super) segment: Arc<Segment>,
    pub(super) engine: Mutex<Engine>,
}

impl ShmState {
    /// Advances all operations until the one with this completion is complete.
    pub(super) fn wait(&self, completion: &Completion) -> Result<(), String> {
        if let Some(result) = completion.get() {
            return result;
        }
        let waiters = self.segment.waiters(self.membership.position);
        waiters.fetch_add(1, Ordering::SeqCst);
        let result = self.wait_until_done(completion);
        self.finish_waiting(&mut self.engine.lock());
        result
    }

    /// Deregisters the calling thread as a waiter, after all progress possible without blocking.
    ///
    /// Waking the progress thread takes as long as a small operation, and most operations are
    /// waited for as soon as they have started.
    pub(super) fn finish_waiting(&self, engine: &mut Engine) {
        let rank = self.membership.position;
        let doorbell_count = || self.segment.doorbell_count(rank, Doorbell::Waiting);
        // Makes visible what was written to rings before this thread was counted.
        fence(Ordering::SeqCst);
        let mut count_when_idle = None;
        for _ in 0..MAX_PROGRESS_CALLS {
            let seen = doorbell_count();
            if !engine.make_progress(&self.segment, true) && doorbell_count() == seen {
                count_when_idle = Some(seen);
                break;
            }
        }
        let waiters = self.segment.waiters(rank);
        waiters.fetch_sub(1, Ordering::SeqCst);
        // Other ranks have rung for the waiters, of which this thread may have been the only one.
        if count_when_idle != Some(doorbell_count()) {
            self.segment.ring_doorbell(rank);
        }
    }

    fn wait_until_done(&self, completion: &Completion) -> Result<(), String> {
        let rank = self.membership.position;
        let spin_limits = if background::is_background() {
            NO_SPINS
        } else {
            SPIN_LIMITS
        };
        let mut idle_rounds = 0;
        let mut sleeping_since = None;
        let mut last_liveness_check = None;
        let mut dead_rank: Option<usize> = None;
        loop {
            let seen = self.segment.doorbell_count(rank, Doorbell::Waiting);
            let moved = {
                let mut engine = self.engine.lock();
                let others_wait = self.segment.waiters(rank).load(Ordering::SeqCst) > 1;
                let moved = engine.make_progress(&self.segment, others_wait);
                if let Some(result) = completion.get() {
                    return result;
                }
                if let Some(reason) = &engine.abort_reason {
                    return Err(reason.clone());
                }
                moved
            };
            // Data that the dead rank left in its rings is used first.
            if let Some(dead) = dead_rank.take().filter(|_| !moved) {
                let dead = self.membership.members[dead];
                self.abort_with(&format!("rank {dead} of the group has exited"));
                continue;
            }
            if moved {
                idle_rounds = 0;
                continue;
            }
            idle_rounds += 1;
            if idle_rounds < spin_limits.spins {
                std::hint::spin_loop();
                continue;
            }
            if idle_rounds < spin_limits.spins_and_yields {
                std::thread::yield_now();
                continue;
            }
            let since = *sleeping_since.get_or_insert_with(Instant::now);
            self.segment
                .sleep(rank, Doorbell::Waiting, seen, Some(LIVENESS_INTERVAL));
            if since.elapsed() > self.timeout {
                self.abort_with(&format!("timed out after {:.1?}", self.timeout));
            }
            let last_check = last_liveness_check.get_or_insert(since);
            if last_check.elapsed() >= LIVENESS_INTERVAL {
                *last_check = Instant::now();
                dead_rank = self.find_dead_rank();
            }
        }
    }

    /// Returns a rank that an operation in progress waits for and whose process has exited.
    fn find_dead_rank(&self) -> Option<usize> {
        let engine = self.engine.lock();
        let is_dead = |rank: &usize| {
            let identity = self.segment.process(*rank).load(Ordering::SeqCst);
            engine.depends_on(*rank) && !is_alive(identity)
        };
        (0..self.membership.members.len()).find(is_dead)
    }

    /// Aborts the group: it accepts no operation, and writes to none of the tensors given to it.
    pub(super) fn abort_with(&self, reason: &str) {
        let rank = self.membership.position;
        let mut engine = self.engine.lock();
        engine.abort(reason);
        self.segment.pending(rank).store(0, Ordering::SeqCst);
        drop(engine);
        self.segment.ring_doorbell(rank);
    }
}

impl Drop for ShmState {
    fn drop(&mut self) {
        self.segment.wake_progress_thread(self.membership.position);
    }
}
