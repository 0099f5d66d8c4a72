//! Holds signals back while a process loads libtorch, which takes a moment: before `signals` has
//! set its handlers, they would kill the process.

use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Variable with the mask of signals that were ignored when `moerun` started. `moerun-core` cannot
/// tell, because libraries set handlers while they are loaded.
pub(crate) const IGNORED: &str = "MOERUN_IGNORED_SIGNALS";

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

/// Returns the mask of signals that this process ignores, with bit 0 for signal 1. It is 0 if /proc
/// is missing.
pub(crate) fn ignored_mask() -> u64 {
    mask_in(&std::fs::read_to_string("/proc/self/status").unwrap_or_default())
}

fn mask_in(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "Name:\tmoerun\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n";
        assert_eq!(mask_in(status), 0x1001);
        assert_eq!(mask_in("SigIgn:\tx\n"), 0);
        assert_eq!(mask_in(""), 0);
        // Programs in Rust ignore SIGPIPE from their start.
        assert_eq!(ignored_mask() >> 12 & 1, 1);
    }
}
