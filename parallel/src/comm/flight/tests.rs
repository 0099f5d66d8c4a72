//! Tests of the recorder with operations on a device of the tests' own.

use super::{
    super::{CommError, Communicator, Local, Membership, ReduceOp, Work},
    FlightRecorder, Timeouts,
    calls::MAX_CALLS,
};
use crate::StoreServer;
use parking_lot::Mutex;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};

/// Long enough for a slow machine.
const LONG: Duration = Duration::from_secs(30);

/// Returns true once the device has completed an operation, or the driver's message.
type Query = Arc<dyn Fn() -> Result<bool, String> + Send + Sync>;

/// A group of one rank whose sums are queued on a device, which answers by `query`.
struct OnDevice {
    local: Local,
    query: Query,
    aborted: Sender<()>,
}

impl Communicator for OnDevice {
    fn backend(&self) -> &'static str {
        "test"
    }
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn all_reduce(&self, _tensor: &Tensor, _op: ReduceOp) -> Result<Work, CommError> {
        let query = self.query.clone();
        Ok(Work::queued(|| Ok(()), move || query()))
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.local.broadcast(tensor, root)
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.local.all_gather(output, input)
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.local.reduce_scatter(output, input, op)
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        self.local
            .all_to_all(output, input, output_splits, input_splits)
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.local.send(tensor, to, tag)
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.local.recv(tensor, from, tag)
    }
    fn barrier(&self) -> Result<Work, CommError> {
        self.local.barrier()
    }
    fn abort(&self) {
        // The test may have ended.
        let _ = self.aborted.send(());
    }
}

/// A recorded group on a device, with the recorder's store.
struct Recorded {
    recorder: FlightRecorder,
    group: Arc<dyn Communicator>,
    aborted: Receiver<()>,
    _server: StoreServer,
}

impl Recorded {
    fn start(timeouts: Timeouts, query: Query) -> Recorded {
        let server = StoreServer::local().unwrap();
        let store = crate::store::connect(server.access(), LONG).unwrap();
        let recorder = FlightRecorder::start(0, None, timeouts, store, Device::Cpu);
        let (sender, aborted) = channel();
        let on_device = Arc::new(OnDevice {
            local: Local::new(0, "experts"),
            query,
            aborted: sender,
        });
        let group = recorder.wrap(on_device, Membership::new("experts", &[0], 0).unwrap());
        Recorded {
            recorder,
            group,
            aborted,
            _server: server,
        }
    }

    /// Queues a sum of the group, and waits as a rank does: without the device.
    fn sum(&self) -> Result<(), CommError> {
        let x = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        self.group.all_reduce(&x, ReduceOp::Sum)?.wait()
    }

    /// Waits for the first failure without noticing it as a rank does.
    fn await_failure(&self) -> String {
        let start = Instant::now();
        while start.elapsed() < LONG {
            if let Some(failure) = &*self.recorder.0.failure.lock() {
                return failure.error.to_string();
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("no failure was reported");
    }
}

#[test]
fn a_driver_that_blocks_does_not_silence_the_timeout() {
    let (blocked, is_blocked) = channel();
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let query: Query = Arc::new(move || {
        // Until the end of the test.
        let _ = blocked.send(());
        let _ = released.lock().recv();
        Ok(true)
    });
    let timeouts = Timeouts {
        operation: Duration::from_secs(2),
        stuck: Duration::from_millis(500),
    };
    let recorded = Recorded::start(timeouts, query);
    let (sender, stuck) = channel();
    recorded.recorder.on_stuck(move |error| {
        let _ = sender.send(error.to_string());
    });
    recorded.sum().unwrap();
    is_blocked.recv_timeout(LONG).unwrap();
    // The driver blocks from here on. Calls are still recorded.
    let start = Instant::now();
    recorded.sum().unwrap();
    recorded.group.barrier().unwrap().wait().unwrap();
    assert!(start.elapsed() < timeouts.operation / 2);
    assert_eq!(recorded.recorder.0.log.lock().calls.len(), 3);
    let expected = "call 1, all_reduce in group 'experts'";
    let failure = recorded.await_failure();
    assert!(failure.contains(expected), "{failure}");
    assert!(failure.contains("not done after 2.0s"), "{failure}");
    recorded.aborted.recv_timeout(LONG).unwrap();
    // The group has two operations in the queue, but is aborted once.
    assert!(recorded.aborted.try_recv().is_err());
    assert_eq!(stuck.recv_timeout(LONG).unwrap(), failure);
    assert!(recorded.sum().is_err());
    drop(release);
}

#[test]
fn a_failure_is_reported_after_its_call_has_left_the_log() {
    let has_failed = Arc::new(AtomicBool::new(false));
    let failing = has_failed.clone();
    let query: Query = Arc::new(move || {
        if failing.load(Ordering::SeqCst) {
            return Err("the link is broken".into());
        }
        Ok(false)
    });
    let recorded = Recorded::start(Timeouts::of_operations(LONG), query);
    recorded.sum().unwrap();
    for _ in 0..MAX_CALLS {
        recorded.group.barrier().unwrap().wait().unwrap();
    }
    let first = recorded.recorder.0.log.lock().get(0).cloned();
    assert!(first.is_none(), "{first:?}");
    has_failed.store(true, Ordering::SeqCst);
    let failure = recorded.await_failure();
    assert!(failure.contains("the link is broken"), "{failure}");
    recorded.aborted.recv_timeout(LONG).unwrap();
}

#[test]
fn completed_operations_end_in_the_log() {
    let recorded = Recorded::start(Timeouts::of_operations(LONG), Arc::new(|| Ok(true)));
    recorded.sum().unwrap();
    let start = Instant::now();
    let has_ended = || {
        let mut log = recorded.recorder.0.log.lock();
        log.get(0).is_some_and(|call| call.ended_s.is_some())
    };
    while !has_ended() {
        assert!(start.elapsed() < LONG, "the operation is still pending");
        thread::sleep(Duration::from_millis(20));
    }
    recorded.recorder.check().unwrap();
}
