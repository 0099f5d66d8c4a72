//! Threads that carry messages beside a rank's computation, often on the only processor that the rank has.

use nix::libc;
use std::cell::Cell;
use std::thread::Builder;

/// Nanoseconds for which such a thread asks to run at a time; what computes has milliseconds.
const TIME_SLICE_NS: u64 = 100_000;

thread_local! {
    static IS_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// Starts one, called `name` where threads are listed.
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

/// Whether this thread is one: where it has to wait it sleeps at once, for another one computes meanwhile.
pub(crate) fn is_background() -> bool {
    IS_BACKGROUND.get()
}

/// Lets this thread run when it is woken, and not when the computation's slice has ended: the kernel prefers whoever asked for a
/// shorter one (since Linux 6.12; earlier ones pass over the number). That needs no privilege.
fn request_short_time_slices() {
    // SAFETY: it takes two numbers: that of a thread is meant, and 0 is this one's.
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
    // SAFETY: the kernel reads as many bytes as the structure says it has. One that refuses leaves the thread as it is.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_background_thread_has_a_name_and_keeps_policy_and_nice_value() {
        let of_this_thread = || {
            // SAFETY: they take numbers, and give one.
            unsafe {
                (
                    libc::sched_getscheduler(0),
                    libc::getpriority(libc::PRIO_PROCESS, 0),
                )
            }
        };
        let (say, hear) = channel();
        let name = || std::thread::current().name().map(str::to_string);
        spawn("carrier", move || {
            say.send((is_background(), name(), of_this_thread()))
                .expect("it is heard")
        });
        assert_eq!(
            hear.recv(),
            Ok((true, Some("carrier".into()), of_this_thread()))
        );
        assert!(!is_background());
    }
}
