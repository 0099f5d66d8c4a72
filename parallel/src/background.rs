//! Background threads: they carry messages while a rank computes, often on the rank's only core.

use nix::libc;
use std::{cell::Cell, thread::Builder};

/// The time slice that a background thread requests, in ns; a computing thread has milliseconds.
const TIME_SLICE_NS: u64 = 100_000;

thread_local! {
    static IS_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// Starts a background thread; tools such as `top` list it as `name`.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    let body = || {
        IS_BACKGROUND.set(true);
        request_short_time_slices();
        body();
    };
    Builder::new()
        .name(name.into())
        .spawn(body)
        .expect("the system starts another thread");
}

/// True if this is a background thread. It sleeps instead of spinning, since another thread
/// computes meanwhile.
pub(crate) fn is_background() -> bool {
    IS_BACKGROUND.get()
}

/// Makes this thread run as soon as it is woken, not when the computing thread's slice ends.
///
/// The kernel prefers the thread that requested the shorter slice. This needs Linux 6.12 (earlier
/// kernels ignore the number) and no privilege.
fn request_short_time_slices() {
    // SAFETY: the call takes two numbers; PRIO_PROCESS with 0 means this thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: libc::SCHED_FLAG_KEEP_POLICY as u64,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: TIME_SLICE_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel reads `size` bytes of the structure. If it refuses, the thread is
    // unchanged.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_background_thread_has_a_name_and_keeps_policy_and_nice_value() {
        let policy_and_nice = || {
            // SAFETY: both calls take and return numbers.
            unsafe {
                (
                    libc::sched_getscheduler(0),
                    libc::getpriority(libc::PRIO_PROCESS, 0),
                )
            }
        };
        let (sender, receiver) = channel();
        let name = || std::thread::current().name().map(str::to_string);
        spawn("carrier", move || {
            sender
                .send((is_background(), name(), policy_and_nice()))
                .expect("the test receives it")
        });
        assert_eq!(
            receiver.recv(),
            Ok((true, Some("carrier".into()), policy_and_nice()))
        );
        assert!(!is_background());
    }
}
