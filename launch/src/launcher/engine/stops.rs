//! Requests to stop: the first is orderly, and a second from the same process insists.

use super::event::Source;
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FirstStop {
    pub(crate) source: Source,
    pub(crate) signal: i32,
    pub(crate) at: Duration,
}

#[derive(Debug, Default)]
pub(crate) struct Stops {
    first: Option<FirstStop>,
    /// True once a user does not want to wait for the orderly stop.
    pub(crate) insists: bool,
}

impl Stops {
    /// Records the `count`th signal to a process.
    ///
    /// A scheduler sends the same signal to all processes at once, which is one request. Only the
    /// launcher and agents get two signals on purpose.
    pub(crate) fn note(&mut self, source: Source, signal: i32, count: usize, at: Duration) {
        match self.first {
            None => self.first = Some(FirstStop { source, signal, at }),
            Some(_) => {
                let may_insist = matches!(source, Source::Launcher | Source::Agent(_));
                self.insists |= may_insist && count > 1;
            }
        }
    }

    pub(crate) fn first(&self) -> Option<FirstStop> {
        self.first
    }

    /// Returns the exit status of a stopped run, by the shell's convention.
    pub(crate) fn status(&self) -> Option<u8> {
        let first = self.first?;
        Some(128 + first.signal as u8)
    }
}
