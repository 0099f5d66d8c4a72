//! Operations that nobody waits for get on, too: each group has a thread that looks after them when another rank has done something.

use super::segment::Doorbell;
use super::{ShmState, lock};
use crate::background;
use std::sync::{Arc, Weak};

/// Looks after a group as long as it is used.
pub(super) fn spawn_progress_thread(group: &Arc<ShmState>) {
    let group = Arc::downgrade(group);
    background::spawn("shm", move || progress_loop(&group));
}

fn progress_loop(group: &Weak<ShmState>) {
    while let Some(group) = group.upgrade() {
        let rank = group.membership.position;
        let seen = group.segment.doorbell_count(rank, Doorbell::ProgressThread);
        if !group.segment.needs_progress_thread(rank)
            || !lock(&group.engine).make_progress(&group.segment, true)
        {
            let segment = group.segment.clone();
            drop(group);
            segment.sleep(rank, Doorbell::ProgressThread, seen, None);
        }
    }
}

/// This process and when it began, in one number.
pub(super) fn process_identity() -> u64 {
    let process = std::process::id();
    u64::from(process) << 32 | began(process).unwrap_or(0)
}

/// Whether a process that has called itself so is still there.
pub(super) fn is_alive(process: u64) -> bool {
    process == 0 || began((process >> 32) as u32) == Some(process & 0xffff_ffff)
}

/// When a process began, in the kernel's ticks: the lower half. None where it is gone or has ended.
fn began(process: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may hold anything; the state comes after it, and the 22nd field is the time.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X");
    let ticks: u64 = fields.nth(18)?.parse().ok()?;
    (!ended).then_some(ticks & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_that_ended_are_not_there() {
        assert!(is_alive(process_identity()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        // It may have ended already, and is a zombie then.
        let began = began(child.id()).unwrap_or(1);
        let process = u64::from(child.id()) << 32 | began;
        child.wait().unwrap();
        assert!(!is_alive(process));
        assert!(!is_alive(process_identity() ^ 1));
    }
}
