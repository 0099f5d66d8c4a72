//! Signals from a user or a scheduler, counted.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// The number of signals received so far, and the last of them.
#[derive(Clone, Default)]
pub(super) struct Signals {
    count: Arc<AtomicUsize>,
    last: Arc<AtomicUsize>,
}

impl Signals {
    pub(super) fn install() -> Result<Signals> {
        let signals = Signals::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let mut received =
                signal_hook::iterator::Signals::new([signal]).context("cannot handle signals")?;
            let signals = signals.clone();
            std::thread::spawn(move || {
                for signal in received.forever() {
                    signals.last.store(signal as usize, Ordering::SeqCst);
                    signals.count.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        Ok(signals)
    }

    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Returns the status to exit with: 0, or the shell's convention for the last signal.
    pub(super) fn exit_status(&self) -> u8 {
        match self.count() {
            0 => 0,
            _ => 128 + self.last.load(Ordering::SeqCst) as u8,
        }
    }
}
