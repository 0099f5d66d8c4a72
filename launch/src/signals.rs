//! Signals to a launcher, an agent or a rank: orderly stops, and requests for a checkpoint.
//!
//! | signal | meaning | exit status |
//! |---|---|---|
//! | SIGTERM, SIGINT, SIGHUP | stop in order | 143, 130, 129 |
//! | SIGUSR2, SIGXCPU | stop in order: schedulers announce the end of a job | 140, 152 |
//! | SIGUSR1 | write a checkpoint and continue | |
//!
//! A signal that was ignored when the process started stays ignored (`nohup`, background jobs of a
//! shell).
//!
//! Only a second SIGINT, a second or more after the first stop signal, asks to stop at once. Other
//! repeats come from programs: `timeout` and `srun` signal a process and its group, Slurm sends
//! SIGTERM before the time limit and again at it, LSF sends SIGINT and then SIGTERM, the kernel
//! sends SIGXCPU each second. All of them kill the process when they no longer want to wait.

use crate::held_signals;
use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use parking_lot::Mutex;
use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

/// The signals that ask to stop in order.
pub(crate) const STOPS: [Signal; 5] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR2,
    Signal::SIGXCPU,
];
const CHECKPOINT: Signal = Signal::SIGUSR1;

/// The time in which the terminal and a launcher may deliver the same SIGINT twice.
const INTERRUPT_WINDOW: Duration = Duration::from_secs(1);
/// The time in which the ranks of a run receive the same request for a checkpoint.
const CHECKPOINT_WINDOW: Duration = Duration::from_secs(2);

/// The reaction to a stop signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopMode {
    /// Exit: there is nothing to write yet.
    Exit,
    /// Count the first, and exit at the second request.
    ExitAtSecond,
    /// Only count: the caller acts on the count.
    Count,
}

/// Counts of the signals that this process has received.
#[derive(Clone)]
pub(crate) struct Signals {
    received: Arc<Mutex<Received>>,
}

impl Signals {
    /// Handles signals from now on, in [`StopMode::Exit`], also those that came while the program
    /// was loaded.
    ///
    /// # Errors
    /// If a handler cannot be installed.
    pub(crate) fn install() -> Result<Signals> {
        Signals::install_unless(&ignored_signals())
    }

    /// Also handles a SIGTERM that was ignored at the start: it is the launcher's order to stop.
    ///
    /// # Errors
    /// If a handler cannot be installed.
    pub(crate) fn install_in_launched_rank() -> Result<Signals> {
        let mut ignored = ignored_signals();
        ignored.remove(Signal::SIGTERM);
        Signals::install_unless(&ignored)
    }

    fn install_unless(ignored: &SigSet) -> Result<Signals> {
        let signals = Signals {
            received: Arc::new(Mutex::new(Received::default())),
        };
        let all = held_signals::handled();
        let handled = all.iter().filter(|signal| !ignored.contains(*signal));
        let numbers = handled.map(|signal| signal as i32);
        let nothing = Arc::new(AtomicBool::new(false));
        for signal in ignored {
            // Replaces a handler that a library may have set. This one does nothing.
            signal_hook::flag::register(signal as i32, nothing.clone())
                .context("cannot ignore signals")?;
        }
        let mut deliveries =
            signal_hook::iterator::Signals::new(numbers).context("cannot handle signals")?;
        let received = signals.received.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for number in deliveries.forever() {
                    if let Ok(signal) = Signal::try_from(number) {
                        receive(&received, signal);
                    }
                }
            })
            .context("cannot start the thread for signals")?;
        let_through().context("cannot receive signals")?;
        Ok(signals)
    }

    /// Sets the reaction to stop signals from now on.
    pub(crate) fn set_mode(&self, mode: StopMode) {
        self.received.lock().mode = mode;
    }

    /// Returns the number of requests to stop. From the second on, the process has to stop at once.
    pub(crate) fn stop_count(&self) -> usize {
        self.received.lock().stops
    }

    /// Returns the signal of the last request to stop.
    pub(crate) fn last_stop(&self) -> Option<Signal> {
        self.received.lock().last_stop
    }

    /// Returns the status to exit with: 0, or the shell's convention for the last stop signal.
    pub(crate) fn exit_status(&self) -> u8 {
        self.last_stop().map_or(0, stop_status)
    }

    /// True if a request for a checkpoint has come since [`Signals::take_checkpoint_requests`].
    pub(crate) fn wants_checkpoint(&self) -> bool {
        self.received.lock().checkpoints > 0
    }

    /// Returns the number of requests for a checkpoint since the last call.
    ///
    /// Signals that arrive shortly afterwards count as the same request, because schedulers signal
    /// all processes of a run.
    pub(crate) fn take_checkpoint_requests(&self) -> usize {
        let mut received = self.received.lock();
        received.last_checkpoint = Some(Instant::now());
        std::mem::take(&mut received.checkpoints)
    }
}

/// Returns the exit status of a process that `signal` stopped in order.
pub(crate) fn stop_status(signal: Signal) -> u8 {
    128 + signal as u8
}

/// Starts a program of moerun, which receives signals only once it has set its handlers.
pub(crate) fn while_held<T>(start: impl FnOnce() -> T) -> T {
    let before = held_signals::hold();
    let result = start();
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
    result
}

/// Lets signals through that `held_signals` held back.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn let_through() -> nix::Result<()> {
    held_signals::handled().thread_unblock()
}

/// Returns the signals that were ignored when `moerun` started, or its launcher.
pub(crate) fn ignored_signals() -> SigSet {
    let variable = std::env::var(held_signals::IGNORED).ok();
    let mask = variable.and_then(|mask| mask.parse().ok());
    let mask = mask.unwrap_or_else(held_signals::ignored_mask);
    let is_ignored = |signal: &Signal| mask >> (*signal as u32 - 1) & 1 == 1;
    let handled = held_signals::handled();
    handled.iter().filter(is_ignored).collect()
}

fn receive(received: &Mutex<Received>, signal: Signal) {
    let mut received = received.lock();
    if received.on_signal(signal, Instant::now()) {
        signal_hook::low_level::exit(i32::from(stop_status(signal)));
    }
}

struct Received {
    mode: StopMode,
    stops: usize,
    last_stop: Option<Signal>,
    last_stop_at: Option<Instant>,
    checkpoints: usize,
    last_checkpoint: Option<Instant>,
}

impl Default for Received {
    fn default() -> Received {
        Received {
            mode: StopMode::Exit,
            stops: 0,
            last_stop: None,
            last_stop_at: None,
            checkpoints: 0,
            last_checkpoint: None,
        }
    }
}

impl Received {
    /// Counts a signal. Returns true if the process has to exit at once.
    fn on_signal(&mut self, signal: Signal, now: Instant) -> bool {
        let is_recent = |at: Option<Instant>, window| {
            at.is_some_and(|at| now.saturating_duration_since(at) < window)
        };
        if signal == CHECKPOINT {
            if !is_recent(self.last_checkpoint, CHECKPOINT_WINDOW) {
                self.checkpoints += 1;
                self.last_checkpoint = Some(now);
            }
            return false;
        }
        let is_repeat = self.stops > 0
            && (signal != Signal::SIGINT || is_recent(self.last_stop_at, INTERRUPT_WINDOW));
        if is_repeat {
            return false;
        }
        self.stops += 1;
        self.last_stop = Some(signal);
        self.last_stop_at = Some(now);
        match self.mode {
            StopMode::Exit => true,
            StopMode::ExitAtSecond => self.stops > 1,
            StopMode::Count => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Signal::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};

    /// Delivers signals at these milliseconds and returns the counts.
    fn deliver(mode: StopMode, signals: &[(Signal, u64)]) -> (Received, bool) {
        let start = Instant::now();
        let mut received = Received {
            mode,
            ..Received::default()
        };
        let mut exits = false;
        for (signal, millis) in signals {
            exits |= received.on_signal(*signal, start + Duration::from_millis(*millis));
        }
        (received, exits)
    }

    #[test]
    fn only_a_later_interrupt_is_a_second_request() {
        let stops = |signals: &[(Signal, u64)]| deliver(StopMode::Count, signals).0.stops;
        assert_eq!(stops(&[(SIGTERM, 0), (SIGTERM, 1)]), 1);
        assert_eq!(stops(&[(SIGTERM, 0), (SIGTERM, 60_000)]), 1);
        assert_eq!(stops(&[(SIGTERM, 0), (SIGHUP, 1)]), 1);
        assert_eq!(stops(&[(SIGXCPU, 0), (SIGXCPU, 1000), (SIGXCPU, 2000)]), 1);
        assert_eq!(stops(&[(SIGUSR2, 0), (SIGTERM, 30_000)]), 1);
        assert_eq!(stops(&[(SIGINT, 0), (SIGTERM, 10_000)]), 1);
        assert_eq!(stops(&[(SIGINT, 0), (SIGINT, 300)]), 1);
        assert_eq!(stops(&[(SIGINT, 0), (SIGINT, 1500)]), 2);
        assert_eq!(stops(&[(SIGTERM, 0), (SIGINT, 5000)]), 2);
        assert_eq!(stops(&[(SIGUSR1, 0)]), 0);
    }

    #[test]
    fn the_mode_decides_when_the_process_exits() {
        let exits = |mode, signals: &[(Signal, u64)]| deliver(mode, signals).1;
        let twice = [(SIGINT, 0), (SIGINT, 2000)];
        assert!(exits(StopMode::Exit, &twice[..1]));
        assert!(!exits(StopMode::Exit, &[(SIGUSR1, 0)]));
        assert!(!exits(StopMode::ExitAtSecond, &twice[..1]));
        assert!(exits(StopMode::ExitAtSecond, &twice));
        assert!(!exits(StopMode::Count, &twice));
    }

    #[test]
    fn requests_for_a_checkpoint_within_seconds_are_one() {
        let checkpoints = |signals: &[(Signal, u64)]| {
            let (received, _) = deliver(StopMode::Count, signals);
            received.checkpoints
        };
        assert_eq!(checkpoints(&[(SIGUSR1, 0), (SIGUSR1, 20)]), 1);
        assert_eq!(checkpoints(&[(SIGUSR1, 0), (SIGUSR1, 2500)]), 2);
        assert_eq!(checkpoints(&[(SIGTERM, 0)]), 0);
    }

    #[test]
    fn statuses_are_those_of_a_shell() {
        for (signal, status) in [
            (SIGTERM, 143),
            (SIGINT, 130),
            (SIGHUP, 129),
            (SIGUSR2, 140),
            (SIGXCPU, 152),
        ] {
            assert_eq!(stop_status(signal), status);
        }
    }
}
