//! The progress thread of a group, which continues operations that no other thread waits for.

use super::{segment::Doorbell, state::ShmState};
use crate::background;
use std::sync::{Arc, Weak};

/// Starts the progress thread, which ends with the group.
pub(super) fn spawn_progress_thread(group: &Arc<ShmState>) {
    let group = Arc::downgrade(group);
    background::spawn("shm", move || progress_loop(&group));
}

fn progress_loop(group: &Weak<ShmState>) {
    while let Some(group) = group.upgrade() {
        let rank = group.membership.position;
        let segment = &group.segment;
        let seen = segment.doorbell_count(rank, Doorbell::ProgressThread);
        let moved =
            segment.needs_progress_thread(rank) && group.engine.lock().make_progress(segment, true);
        if !moved {
            let segment = segment.clone();
            drop(group);
            segment.sleep(rank, Doorbell::ProgressThread, seen, None);
        }
    }
}
