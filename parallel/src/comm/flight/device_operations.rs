//! Operations that are queued on a device, and the thread that asks the device about them.
//!
//! A driver may block until the device is idle, for example while it loads a kernel, and the device
//! may wait for another rank meanwhile. So this thread holds no lock while it asks. The recorder's
//! other thread, which calls no driver, decides which operations are late.

use super::{
    super::{Communicator, Progress},
    RecorderState,
    calls::Call,
};
use crate::background;
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock, Weak,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

/// Interval between two questions to the device about the same operation.
const INSPECTION_INTERVAL: Duration = Duration::from_millis(100);
/// The time after a timeout in which an operation that was complete by then is noticed.
const INSPECTION_DELAY: Duration = Duration::from_millis(300);

/// An operation that a device has not completed as far as this rank knows.
pub(super) struct PendingOperation {
    pub(super) call: Call,
    pub(super) group: Arc<dyn Communicator>,
    /// The device's message, once the operation has failed.
    failure: Option<String>,
}

/// A queued operation that failed.
pub(super) struct FailedOperation {
    pub(super) call: Call,
    /// The device's message; `None` after a timeout.
    pub(super) reason: Option<String>,
}

/// An operation about which the thread asks.
struct Inspection {
    id: u64,
    progress: Progress,
}

/// The queued operations of a rank.
#[derive(Default)]
pub(super) struct DeviceOperations {
    /// By the ids of their calls.
    pending: Mutex<BTreeMap<u64, PendingOperation>>,
    /// The way to the thread, which the first operation starts.
    inspections: OnceLock<Sender<Inspection>>,
}

impl DeviceOperations {
    /// Returns the oldest operation that failed or took longer than `timeout`.
    pub(super) fn first_failed(&self, timeout: Duration) -> Option<FailedOperation> {
        let pending = self.pending.lock();
        let has_failed = |operation: &&PendingOperation| {
            let elapsed = operation.call.started.elapsed();
            operation.failure.is_some() || elapsed > timeout + INSPECTION_DELAY
        };
        let failed = pending.values().find(has_failed)?;
        Some(FailedOperation {
            call: failed.call.clone(),
            reason: failed.failure.clone(),
        })
    }

    /// Aborts the groups of all operations. Returns before they are aborted.
    pub(super) fn abort(&self) {
        let pending = std::mem::take(&mut *self.pending.lock());
        let operations = pending.into_values();
        let groups = operations.map(|operation| (operation.call.group.number, operation.group));
        for group in groups.collect::<BTreeMap<_, _>>().into_values() {
            // Each on a thread of its own. An abort calls the driver, which may block until another
            // group is aborted.
            background::spawn("abort", move || group.abort());
        }
    }
}

impl RecorderState {
    /// Watches an operation until its device has completed it.
    pub(super) fn watch(
        self: &Arc<Self>,
        id: u64,
        call: Call,
        group: Arc<dyn Communicator>,
        progress: Progress,
    ) {
        let operations = &self.device_operations;
        let operation = PendingOperation {
            call,
            group,
            failure: None,
        };
        operations.pending.lock().insert(id, operation);
        let inspections = operations.inspections.get_or_init(|| {
            let (sender, inbox) = channel();
            let recorder = Arc::downgrade(self);
            let device = self.device;
            background::spawn("device", move || {
                if let Err(error) = torch_ext::use_device(device) {
                    tracing::warn!("cannot watch operations on the device: {error}");
                }
                inspect(&recorder, &inbox);
            });
            sender
        });
        // The thread ends with the recorder.
        let _ = inspections.send(Inspection { id, progress });
    }

    fn completed(&self, id: u64) {
        let now = self.start.elapsed().as_secs_f64();
        let completed = self.device_operations.pending.lock().remove(&id);
        // An aborted operation has not ended.
        if completed.is_some()
            && let Some(call) = self.log.lock().get(id)
        {
            call.ended_s = Some(now);
        }
    }

    fn failed_on_device(&self, id: u64, reason: String) {
        if let Some(operation) = self.device_operations.pending.lock().get_mut(&id) {
            operation.failure = Some(reason);
        }
    }
}

/// Asks the device about all operations until the recorder is dropped.
fn inspect(recorder: &Weak<RecorderState>, inbox: &Receiver<Inspection>) {
    let mut inspections = Vec::new();
    loop {
        if inspections.is_empty() {
            let Ok(next) = inbox.recv() else { return };
            inspections.push(next);
        }
        thread::sleep(INSPECTION_INTERVAL);
        inspections.extend(inbox.try_iter());
        inspections.retain(|inspection| {
            let progress = (inspection.progress)();
            let Some(recorder) = recorder.upgrade() else {
                return false;
            };
            match progress {
                Ok(false) => return true,
                Ok(true) => recorder.completed(inspection.id),
                Err(reason) => recorder.failed_on_device(inspection.id, reason),
            }
            false
        });
    }
}
