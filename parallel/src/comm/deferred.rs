//! Results of background threads, for which a rank waits no longer than its group's timeout.

use parking_lot::Mutex;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};

/// The longest time until a waiting thread notices that its group was aborted.
const ABORT_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// The state of a group that all of its deferred operations share.
#[derive(Clone, Default)]
pub(super) struct AbortFlag {
    is_aborted: Arc<AtomicBool>,
    /// Held while an operation starts, so that none starts after an abort.
    starting: Arc<Mutex<()>>,
}

impl AbortFlag {
    pub(super) fn set(&self) {
        let _no_start = self.starting.lock();
        self.is_aborted.store(true, Ordering::SeqCst);
    }

    /// Runs `start`, during which no abort can begin.
    ///
    /// # Errors
    /// If the group was aborted.
    pub(super) fn unless_aborted<T>(&self, start: impl FnOnce() -> T) -> Result<T, String> {
        let _no_abort = self.starting.lock();
        self.check()?;
        Ok(start())
    }

    /// # Errors
    /// If the group was aborted.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.is_aborted.load(Ordering::SeqCst) {
            return Err("the group was aborted".into());
        }
        Ok(())
    }
}

/// A result that another thread sends.
pub(super) struct Deferred<T> {
    result: Receiver<T>,
    abort_flag: AbortFlag,
}

impl<T> Deferred<T> {
    /// Returns the result, and the end at which another thread sends it.
    pub(super) fn new(abort_flag: &AbortFlag) -> (Sender<T>, Deferred<T>) {
        let (sender, result) = channel();
        let abort_flag = abort_flag.clone();
        (sender, Deferred { result, abort_flag })
    }

    /// Waits for the result.
    ///
    /// # Errors
    /// If the group is aborted meanwhile. After `timeout` this aborts it: the other ranks may be
    /// anywhere.
    pub(super) fn wait(self, timeout: Duration) -> Result<T, String> {
        let start = Instant::now();
        loop {
            match self.result.recv_timeout(ABORT_CHECK_INTERVAL) {
                Ok(result) => return Ok(result),
                Err(RecvTimeoutError::Disconnected) => {
                    self.abort_flag.check()?;
                    return Err("its background thread has ended".into());
                }
                Err(RecvTimeoutError::Timeout) => self.abort_flag.check()?,
            }
            if start.elapsed() > timeout {
                self.abort_flag.set();
                return Err(format!("timed out after {timeout:.1?}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_a_result_an_abort_or_its_timeout() {
        let long = Duration::from_secs(20);
        let flag = AbortFlag::default();
        let (sender, deferred) = Deferred::new(&flag);
        sender.send(7).unwrap();
        assert_eq!(deferred.wait(long), Ok(7));

        let (_sender, deferred) = Deferred::<u8>::new(&flag);
        let error = deferred.wait(Duration::from_millis(120)).unwrap_err();
        assert_eq!(error, "timed out after 120.0ms");
        assert!(flag.unless_aborted(|| ()).is_err());

        let flag = AbortFlag::default();
        let (_sender, deferred) = Deferred::<u8>::new(&flag);
        let other = flag.clone();
        let aborter = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            other.set();
        });
        assert_eq!(deferred.wait(long), Err("the group was aborted".into()));
        aborter.join().unwrap();
    }
}
