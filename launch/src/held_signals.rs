//! Holds signals back while a process loads libtorch, which takes a moment: before `signals` has
//! set its handlers, they would kill the process.

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// The signals that `signals` handles.
const HANDLED: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGXCPU,
];

pub(crate) fn handled() -> SigSet {
    HANDLED.into_iter().collect()
}

/// Holds the handled signals back in this thread, and in programs that it starts. Returns the
/// signals that were held back before.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn hold() -> nix::Result<SigSet> {
    handled().thread_swap_mask(SigmaskHow::SIG_BLOCK)
}
