//! Operations that nobody waits for get on, too: each group has a thread that looks after them when another rank has done something.

use super::{Shared, lock};
use crate::beside;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::Thread;
use std::time::Duration;

/// The longest sleep of the thread, after which it looks whether the group is still there.
const NAP: Duration = Duration::from_millis(200);

/// The thread of a group.
#[derive(Default)]
pub(super) struct Attendant {
    thread: OnceLock<Thread>,
    /// It has nothing to look after, and sleeps until it is called.
    idle: AtomicBool,
}

impl Attendant {
    /// Something may be under way that nobody waits for, or the group is no more.
    pub(super) fn call(&self) {
        if self.idle.load(Ordering::SeqCst)
            && self.idle.swap(false, Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        self.call();
    }
}

/// Looks after a group as long as it is used.
pub(super) fn look_after(group: &Arc<Shared>) {
    let weak = Arc::downgrade(group);
    group.attendant.thread.get_or_init(|| beside::spawn("shm", move || attend(&weak)));
}

fn attend(group: &Weak<Shared>) {
    while let Some(group) = group.upgrade() {
        let idle = &group.attendant.idle;
        if !group.is_left_alone() {
            idle.store(true, Ordering::SeqCst);
            // What has begun before that has not called this thread.
            if !group.is_left_alone() {
                drop(group);
                std::thread::park();
            }
            continue;
        }
        idle.store(false, Ordering::SeqCst);
        let rank = group.membership.position;
        let seen = group.segment.rung(rank);
        if !lock(&group.engine).get_on(&group.segment, &group.pending, true) {
            let segment = group.segment.clone();
            drop(group);
            segment.sleep(rank, seen, NAP);
        }
    }
}

/// This process and when it began, in one number.
pub(super) fn this_process() -> u64 {
    let process = std::process::id();
    u64::from(process) << 32 | began(process).unwrap_or(0)
}

/// Whether a process that has called itself so is still there.
pub(super) fn is_there(process: u64) -> bool {
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
        assert!(is_there(this_process()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        // It may have ended already, and is a zombie then.
        let began = began(child.id()).unwrap_or(1);
        let process = u64::from(child.id()) << 32 | began;
        child.wait().unwrap();
        assert!(!is_there(process));
        assert!(!is_there(this_process() ^ 1));
    }
}
