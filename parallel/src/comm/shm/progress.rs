//! Operations that nobody waits for get on, too: a thread of the process looks after them.

use super::{Shared, lock};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

/// Between two looks: after one that was of use, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_micros(50), Duration::from_micros(800));
/// Looks in vain after which the thread sleeps until an operation begins.
const PATIENCE: usize = 50;

static GROUPS: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());
static LOOKER: OnceLock<Thread> = OnceLock::new();
static ASLEEP: AtomicBool = AtomicBool::new(false);

/// Looks after a group as long as it is used.
pub(super) fn look_after(group: &Arc<Shared>) {
    GROUPS.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(group));
    LOOKER.get_or_init(|| std::thread::spawn(look).thread().clone());
}

/// An operation has begun.
pub(super) fn wake() {
    if ASLEEP.load(Ordering::SeqCst)
        && ASLEEP.swap(false, Ordering::SeqCst)
        && let Some(looker) = LOOKER.get()
    {
        looker.unpark();
    }
}

fn look() {
    let (mut pause, mut in_vain) = (PAUSE.1, 0);
    loop {
        let (any, moved) = look_at_all();
        pause = if moved { PAUSE.0 } else { (pause * 2).min(PAUSE.1) };
        in_vain = if any { 0 } else { in_vain + 1 };
        if in_vain < PATIENCE {
            std::thread::sleep(pause);
            continue;
        }
        ASLEEP.store(true, Ordering::SeqCst);
        // What began before that has not woken this thread.
        if !look_at_all().0 {
            while ASLEEP.load(Ordering::SeqCst) {
                std::thread::park();
            }
        }
        ASLEEP.store(false, Ordering::SeqCst);
        in_vain = 0;
    }
}

/// Gets on with what nobody waits for: whether anything is under way, and whether anything was possible.
fn look_at_all() -> (bool, bool) {
    let groups: Vec<Arc<Shared>> = {
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| group.strong_count() > 0);
        groups.iter().filter_map(Weak::upgrade).collect()
    };
    let (mut any, mut moved) = (false, false);
    for group in groups {
        if group.pending.load(Ordering::SeqCst) == 0 {
            continue;
        }
        any = true;
        // Whoever waits gets on by himself.
        while group.waiters.load(Ordering::SeqCst) == 0
            && lock(&group.engine).get_on(&group.segment, &group.pending, true)
        {
            moved = true;
        }
    }
    (any, moved)
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
