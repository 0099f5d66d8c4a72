//! The flight recorder, which names the ranks that miss a collective.
//!
//! Every rank logs its calls. Twice a second it publishes the number of its last collective in each
//! group in the store. A call that takes too long is compared with what the other ranks published.
//! (PyTorch's flight recorder writes a similar log, which a person compares afterwards.)

mod calls;
mod device_operations;
mod diagnosis;
mod heartbeat;
mod inquiry;
mod recorded;
#[cfg(test)]
mod tests;

use super::{CommError, Communicator, Membership};
use crate::write_within;
use calls::{Call, Log, RecordedGroup, StartedCall};
use device_operations::{DeviceOperations, FailedOperation};
use heartbeat::{HEARTBEAT_INTERVAL, Heartbeat};
use inquiry::{Inquirer, Occasion};
use parking_lot::Mutex;
use recorded::RecordedComm;
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};
use tch::Device;
use torch_ext::Store;

/// The time that a diagnosis may take.
const DIAGNOSIS_TIMEOUT: Duration = Duration::from_secs(5);

/// The time in which the disk takes the log of calls.
const DUMP_TIMEOUT: Duration = Duration::from_secs(1);

/// A request to name the ranks that miss a call.
struct DiagnosisRequest {
    call: Call,
    answer: Sender<String>,
}

struct RecorderState {
    rank: usize,
    start: Instant,
    timeouts: Timeouts,
    /// The device on which operations are queued.
    device: Device,
    log: Mutex<Log>,
    /// The number of groups so far.
    groups: AtomicUsize,
    /// The file for the log if a call fails.
    dump: Mutex<Option<PathBuf>>,
    requests: Sender<DiagnosisRequest>,
    device_operations: DeviceOperations,
    /// The first failure of a queued operation.
    failure: Mutex<Option<Failure>>,
    on_stuck: Mutex<Option<StuckHandler>>,
    /// The rank that serves the store, unless the launcher does.
    store_rank: Option<usize>,
}

/// The times after which a recorder acts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    /// The time in which an operation must be complete.
    operation: Duration,
    /// A rank that does not notice a failure of its device for this long waits in the driver.
    stuck: Duration,
}

impl Timeouts {
    pub(crate) fn of_operations(operation: Duration) -> Timeouts {
        Timeouts {
            operation,
            stuck: Duration::from_secs(20),
        }
    }
}

struct Failure {
    error: CommError,
    since: Instant,
    /// True once this rank has noticed.
    reported: bool,
}

/// Called for a rank that does not notice a failure: it may wait in the device's driver forever.
type StuckHandler = Box<dyn Fn(&CommError) + Send>;

/// The recorder of one rank; clones share their state.
#[derive(Clone)]
pub(crate) struct FlightRecorder(Arc<RecorderState>);

impl FlightRecorder {
    /// Starts a recorder of a rank that computes on `device`.
    ///
    /// `store` is a connection of its own, which no other thread's wait can block. `store_rank` is
    /// the rank that serves the store, unless the launcher does.
    pub(crate) fn start(
        rank: usize,
        store_rank: Option<usize>,
        timeouts: Timeouts,
        store: Store,
        device: Device,
    ) -> FlightRecorder {
        let (requests, inbox) = channel();
        let state = Arc::new(RecorderState {
            rank,
            start: Instant::now(),
            timeouts,
            device,
            log: Mutex::default(),
            groups: AtomicUsize::default(),
            dump: Mutex::default(),
            requests,
            device_operations: DeviceOperations::default(),
            failure: Mutex::default(),
            on_stuck: Mutex::default(),
            store_rank,
        });
        // A rank that has joined has a heartbeat, so that others need not ask whether it has. If
        // the store is gone, the next request fails, too.
        Heartbeat::default().publish(rank, &store);
        let watched = Arc::downgrade(&state);
        std::thread::spawn(move || watch(&watched, &inbox, &store));
        FlightRecorder(state)
    }

    /// Sets the file to which all calls are written when one fails.
    pub(crate) fn dump_calls_to(&self, path: &Path) {
        *self.0.dump.lock() = Some(path.to_path_buf());
    }

    /// Sets the handler for a rank that is stuck in its device's driver after a failure.
    pub(crate) fn on_stuck(&self, handler: impl Fn(&CommError) + Send + 'static) {
        *self.0.on_stuck.lock() = Some(Box::new(handler));
    }

    /// Returns the first failure of an operation that was queued on a device.
    pub(crate) fn check(&self) -> Result<(), CommError> {
        match self.0.failure.lock().as_mut() {
            Some(failure) => {
                failure.reported = true;
                Err(failure.error.clone())
            }
            None => Ok(()),
        }
    }

    /// Returns the group with its calls recorded.
    pub(crate) fn wrap(
        &self,
        inner: Arc<dyn Communicator>,
        membership: Membership,
    ) -> Arc<dyn Communicator> {
        let number = self.0.groups.fetch_add(1, Ordering::Relaxed);
        Arc::new(RecordedComm {
            inner,
            recorder: self.clone(),
            group: Arc::new(RecordedGroup { number, membership }),
        })
    }

    /// Returns the seconds since the recorder started.
    fn seconds(&self) -> f64 {
        self.0.start.elapsed().as_secs_f64()
    }

    /// Logs a call before it starts.
    fn started(&self, call: Call, is_collective: bool) -> StartedCall {
        self.0.log.lock().add(call, is_collective)
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Call)) {
        if let Some(call) = self.0.log.lock().get(id) {
            change(call);
        }
    }

    fn ended(&self, id: u64) {
        let now = self.seconds();
        self.change(id, |call| call.ended_s = Some(now));
    }

    /// Writes the log, and adds the missing ranks to the error of a call that took too long.
    fn failed(&self, started: &StartedCall, mut error: CommError) -> CommError {
        let StartedCall { id, call } = started;
        if call.started.elapsed() >= self.0.timeouts.operation.mul_f64(0.8) {
            let mut log = self.0.log.lock();
            let known = log.get(*id).and_then(|call| call.missing.clone());
            drop(log);
            let missing = known.unwrap_or_else(|| self.request_diagnosis(call));
            error.reason = format!("{missing} ({})", error.reason);
            self.change(*id, |call| call.missing = Some(missing));
        }
        self.0.dump_calls();
        error
    }

    fn request_diagnosis(&self, call: &Call) -> String {
        let (answer, answered) = channel();
        let sent = self.0.requests.send(DiagnosisRequest {
            call: call.clone(),
            answer,
        });
        let missing = match sent {
            Ok(()) => answered.recv_timeout(DIAGNOSIS_TIMEOUT).ok(),
            Err(_) => None,
        };
        missing.unwrap_or_else(|| {
            let name = call.name();
            match self.0.store_rank {
                Some(rank) => {
                    format!("{name}: rank {rank}, which serves the store, does not answer")
                }
                None => {
                    format!("{name}: the store does not answer, so the missing ranks are unknown")
                }
            }
        })
    }
}

/// Publishes heartbeats, answers requests and watches calls until the recorder is dropped.
///
/// It calls no driver, which may block, so that it can always report what takes too long.
fn watch(recorder: &Weak<RecorderState>, requests: &Receiver<DiagnosisRequest>, store: &Store) {
    let mut beats = 0;
    let mut pause = Duration::ZERO;
    loop {
        let request = requests.recv_timeout(pause);
        pause = HEARTBEAT_INTERVAL;
        let Some(recorder) = recorder.upgrade() else {
            return;
        };
        let mut beat = || {
            beats += 1;
            let heartbeat = Heartbeat::new(beats, &recorder.log.lock());
            heartbeat.publish(recorder.rank, store)
        };
        if !beat() {
            // Without its store the run is ending.
            return;
        }
        match request {
            Ok(request) => {
                let call = &request.call;
                let mut inquirer = recorder.inquirer(store, &mut beat);
                let missing = inquirer.describe_missing_ranks(call, Occasion::Failed);
                // The caller may have stopped waiting.
                let _ = request.answer.send(missing);
            }
            Err(RecvTimeoutError::Timeout) => {
                recorder.warn_if_stalled(store, &mut beat);
                recorder.check_device_operations(store, &mut beat);
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl RecorderState {
    fn inquirer<'a>(&self, store: &'a Store, beat: &'a mut dyn FnMut() -> bool) -> Inquirer<'a> {
        Inquirer {
            store,
            rank: self.rank,
            beat,
        }
    }

    /// Reports a queued operation that failed or takes too long, and a rank that does not notice.
    fn check_device_operations(&self, store: &Store, beat: &mut dyn FnMut() -> bool) {
        let timeout = self.timeouts.operation;
        if let Some(FailedOperation { call, reason }) = self.device_operations.first_failed(timeout)
        {
            let reason = reason.unwrap_or_else(|| {
                let mut inquirer = self.inquirer(store, beat);
                let missing = inquirer.describe_missing_ranks(&call, Occasion::Failed);
                format!("{missing} (not done after {timeout:.1?})")
            });
            self.abort_queued(call.group.membership.error(call.operation, reason));
        }
        let is_stuck =
            |failure: &&Failure| !failure.reported && failure.since.elapsed() > self.timeouts.stuck;
        let failure = self.failure.lock();
        let stuck = failure.as_ref().filter(is_stuck);
        if let (Some(stuck), Some(handler)) = (stuck, &*self.on_stuck.lock()) {
            handler(&stuck.error);
        }
    }

    /// Records a failure and aborts the groups of all queued operations: the host may wait for any.
    fn abort_queued(&self, error: CommError) {
        tracing::error!("{error}");
        self.failure.lock().get_or_insert(Failure {
            error,
            since: Instant::now(),
            reported: false,
        });
        self.device_operations.abort();
        self.dump_calls();
    }

    /// Writes the log to its file; a failure only warns, since an error is being reported.
    fn dump_calls(&self) {
        let Some(path) = self.dump.lock().clone() else {
            return;
        };
        let dump = self.log.lock().to_json(self.rank);
        if let Err(error) = write_within(DUMP_TIMEOUT, path.clone(), dump) {
            tracing::warn!("cannot write {}: {error}", path.display());
        }
    }

    /// Warns about a call that takes too long, before it times out.
    fn warn_if_stalled(&self, store: &Store, beat: &mut dyn FnMut() -> bool) {
        let warn_after = (self.timeouts.operation / 2).min(Duration::from_secs(30));
        let is_stalled = |call: &&Call| {
            call.is_awaited() && call.missing.is_none() && call.started.elapsed() > warn_after
        };
        let stalled = self.log.lock().calls.iter().find(is_stalled).cloned();
        let Some(stalled) = stalled else { return };
        let mut inquirer = self.inquirer(store, beat);
        let missing = inquirer.describe_missing_ranks(&stalled, Occasion::Stalled);
        let waited = stalled.started.elapsed();
        tracing::warn!("{missing}; waiting for {waited:.0?}");
        let is_same = |call: &&mut Call| {
            call.started == stalled.started && call.operation == stalled.operation
        };
        if let Some(call) = self.log.lock().calls.iter_mut().find(is_same) {
            call.missing = Some(missing);
        }
    }
}
