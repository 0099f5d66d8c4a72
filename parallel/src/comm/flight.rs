//! What each rank is at, so that one that does not come is named: every rank writes down its calls, and tells the others through
//! the store, twice a second, how far it is in each group. A call that takes too long is compared with what the others reported.
//! (PyTorch's flight recorder writes such a list too, for a person to compare afterwards.)

use super::{CommError, Communicator, Progress, ReduceOp, Work};
use kernels::profile::{self, span};
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use tch::Tensor;
use torch_ext::Store;

/// Between two signs of life.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// A rank without a heartbeat of life for so long has stopped.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(1600);
/// A rank that has not asked for so long how its operations went waits for its device.
const DEVICE_STUCK_TIMEOUT: Duration = Duration::from_secs(20);
/// Calls that are remembered.
const MAX_CALLS: usize = 2048;

/// One call of a collective, a send or a receive.
#[derive(Debug, Clone, Serialize)]
struct Call {
    #[serde(serialize_with = "as_text")]
    group: Arc<str>,
    #[serde(serialize_with = "as_list")]
    members: Arc<[usize]>,
    /// Tells the group from others of the same name.
    #[serde(skip)]
    key: Arc<str>,
    /// Counts the collectives of the group; every rank of it counts alike. None for sends and receives.
    number: Option<u64>,
    operation: &'static str,
    /// The other side of a send or receive, as a rank of the run.
    peer: Option<usize>,
    tensor: String,
    /// Since the recorder began.
    started_s: f64,
    ended_s: Option<f64>,
    #[serde(skip)]
    began: Instant,
    #[serde(skip)]
    waited_for: bool,
    /// Who is missing, once somebody looked.
    missing: Option<String>,
}

impl Call {
    fn name(&self) -> String {
        let number = self
            .number
            .map_or(String::new(), |number| format!("call {number}, "));
        let peer = match (self.operation, self.peer) {
            ("send", Some(peer)) => format!(" to rank {peer}"),
            (_, Some(peer)) => format!(" from rank {peer}"),
            _ => String::new(),
        };
        format!("{number}{}{peer} in group '{}'", self.operation, self.group)
    }
}

#[derive(Default)]
struct Log {
    calls: VecDeque<Call>,
    /// The number of the first of them, among all.
    first: u64,
    /// Collectives last_collective, by group.
    last_collective: BTreeMap<Arc<str>, (u64, &'static str)>,
}

impl Log {
    fn get(&mut self, id: u64) -> Option<&mut Call> {
        self.calls.get_mut(id.checked_sub(self.first)? as usize)
    }
}

/// What a rank tells the others.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Heartbeat {
    beat: u64,
    /// For each group, how many collectives it has last_collective, and the last of them.
    last_collective: BTreeMap<String, (u64, String)>,
    /// The call that it has waited for longest.
    waits: Option<String>,
}

/// A request of a thread whose call takes too long.
struct DiagnosisRequest {
    call: Call,
    answer: Sender<String>,
}

struct RecorderState {
    rank: usize,
    began: Instant,
    timeout: Duration,
    log: Mutex<Log>,
    dump: Mutex<Option<PathBuf>>,
    requests: Sender<DiagnosisRequest>,
    /// Operations that a device has not done yet.
    queued: Mutex<Vec<DeviceOperation>>,
    /// The first failure of those.
    failure: Mutex<Option<Failure>>,
    on_stuck: Mutex<Option<StuckHandler>>,
    /// The rank that serves the store, if a rank does.
    serves: Option<usize>,
}

/// An operation that a device was given.
struct DeviceOperation {
    id: u64,
    progress: Progress,
    inner: Arc<dyn Communicator>,
}

/// What a device could not do.
struct Failure {
    error: CommError,
    since: Instant,
    reported: bool,
}

/// What is done about a rank that does not request_diagnosis how its operations went: it may wait in the device's driver for ever.
type StuckHandler = Box<dyn Fn(&CommError) + Send>;

/// The calls of one rank; clones are the same recorder.
#[derive(Clone)]
pub(crate) struct FlightRecorder(Arc<RecorderState>);

impl FlightRecorder {
    /// Begins, with a connection of its own: whoever waits on another one cannot hold it up.
    pub(crate) fn begin(
        rank: usize,
        serves: Option<usize>,
        timeout: Duration,
        store: Store,
    ) -> FlightRecorder {
        let (requests, inbox) = channel();
        let log = Mutex::default();
        let dump = Mutex::default();
        let queued = Mutex::default();
        let failure = Mutex::default();
        let began = Instant::now();
        let on_stuck = Mutex::default();
        let shared = Arc::new(RecorderState {
            rank,
            began,
            timeout,
            log,
            dump,
            requests,
            queued,
            failure,
            on_stuck,
            serves,
        });
        let watched = Arc::downgrade(&shared);
        std::thread::spawn(move || {
            let mut beats = 0;
            let mut pause = Duration::ZERO;
            loop {
                let request = inbox.recv_timeout(pause);
                pause = HEARTBEAT_INTERVAL;
                let Some(shared) = watched.upgrade() else {
                    return;
                };
                let mut beat = || {
                    beats += 1;
                    store
                        .set(&heartbeat_key(shared.rank), &shared.heartbeat(beats))
                        .is_ok()
                };
                if !beat() {
                    // Without the store the run is at its end anyway.
                    return;
                }
                match request {
                    Ok(request) => drop(request.answer.send(missing(
                        &store,
                        shared.rank,
                        &request.call,
                        &mut beat,
                    ))),
                    Err(RecvTimeoutError::Timeout) => {
                        shared.warn_if_stalled(&store, &mut beat);
                        shared.check_device_operations(&store, &mut beat);
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        FlightRecorder(shared)
    }

    /// A file for all calls, written when one fails.
    pub(crate) fn dump_to(&self, path: &Path) {
        *lock(&self.0.dump) = Some(path.to_path_buf());
    }

    /// What is done about a rank that is stuck in its device's driver after a failure.
    pub(crate) fn on_stuck(&self, act: impl Fn(&CommError) + Send + 'static) {
        *lock(&self.0.on_stuck) = Some(Box::new(act));
    }

    /// Tells the first failure of what was queued on devices.
    pub(crate) fn check(&self) -> Result<(), CommError> {
        match lock(&self.0.failure).as_mut() {
            Some(failure) => {
                failure.reported = true;
                Err(failure.error.clone())
            }
            None => Ok(()),
        }
    }

    /// The same group, with its calls written down.
    pub(crate) fn wrap(
        &self,
        inner: Arc<dyn Communicator>,
        group: &str,
        members: &[usize],
    ) -> Arc<dyn Communicator> {
        let key = format!("{group}/{members:?}").into();
        Arc::new(RecordedComm {
            inner,
            recorder: self.clone(),
            group: group.into(),
            members: members.into(),
            key,
        })
    }

    fn started(&self, mut call: Call, counts: bool) -> u64 {
        let mut log = lock(&self.0.log);
        if counts {
            let last_collective = log
                .last_collective
                .entry(call.key.clone())
                .or_insert((0, call.operation));
            *last_collective = (last_collective.0 + 1, call.operation);
            call.number = Some(last_collective.0);
        }
        log.calls.push_back(call);
        if log.calls.len() > MAX_CALLS {
            log.calls.pop_front();
            log.first += 1;
        }
        log.first + log.calls.len() as u64 - 1
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Call)) {
        if let Some(call) = lock(&self.0.log).get(id) {
            change(call);
        }
    }

    fn ended(&self, id: u64) {
        let now = self.0.began.elapsed().as_secs_f64();
        self.change(id, |call| call.ended_s = Some(now));
    }

    /// Adds who is missing to the error of a call that took too long.
    fn failed(&self, id: u64, mut error: CommError) -> CommError {
        let call = lock(&self.0.log).get(id).cloned();
        if let Some(call) = call.filter(|call| call.began.elapsed() >= self.0.timeout.mul_f64(0.8))
        {
            let missing = call
                .missing
                .clone()
                .unwrap_or_else(|| self.request_diagnosis(&call));
            error.reason = format!("{missing} ({})", error.reason);
            self.change(id, |call| call.missing = Some(missing));
        }
        self.0.write();
        error
    }

    fn request_diagnosis(&self, call: &Call) -> String {
        let (answer, answered) = channel();
        let asked = self.0.requests.send(DiagnosisRequest {
            call: call.clone(),
            answer,
        });
        match asked
            .ok()
            .and_then(|()| answered.recv_timeout(Duration::from_secs(5)).ok())
        {
            Some(missing) => missing,
            None => match self.0.serves {
                Some(rank) => format!(
                    "{}: rank {rank}, which serves the store, does not answer",
                    call.name()
                ),
                None => format!(
                    "{}: who is missing cannot be found out: the store does not answer",
                    call.name()
                ),
            },
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

fn as_list<S: serde::Serializer>(ranks: &Arc<[usize]>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ranks.iter())
}

fn as_text<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

fn heartbeat_key(rank: usize) -> String {
    format!("heartbeat/{rank}")
}

impl RecorderState {
    fn heartbeat(&self, beat: u64) -> Vec<u8> {
        let log = lock(&self.log);
        let waits = log
            .calls
            .iter()
            .find(|call| call.waited_for && call.ended_s.is_none())
            .map(Call::name);
        let last_collective = log
            .last_collective
            .iter()
            .map(|(group, (count, operation))| {
                (group.to_string(), (*count, operation.to_string()))
            });
        serde_json::to_vec(&Heartbeat {
            beat,
            last_collective: last_collective.collect(),
            waits,
        })
        .expect("plain data")
    }

    /// Looks at what devices were given: what is done, what failed, what takes too long.
    fn check_device_operations(&self, store: &Store, beat: &mut dyn FnMut() -> bool) {
        let now = self.began.elapsed().as_secs_f64();
        let mut failed = None;
        lock(&self.queued).retain(|queued| {
            let result = (queued.progress)();
            let call = lock(&self.log).get(queued.id).cloned();
            let late = call
                .as_ref()
                .is_some_and(|call| call.began.elapsed() > self.timeout);
            match result {
                Ok(true) => {
                    if let Some(call) = lock(&self.log).get(queued.id) {
                        call.ended_s = Some(now);
                    }
                    return false;
                }
                Ok(false) if !late => return true,
                Ok(false) => failed = failed.take().or(Some((call, None))),
                Err(reason) => failed = failed.take().or(Some((call, Some(reason)))),
            }
            true
        });
        if let Some((Some(call), reason)) = failed {
            let reason = match reason {
                Some(reason) => reason,
                None => format!(
                    "{} (not done after {:.1?})",
                    missing(store, self.rank, &call, beat),
                    self.timeout
                ),
            };
            let group = call.group.to_string();
            let members = call.members.to_vec();
            let error = CommError {
                rank: self.rank,
                group,
                members,
                operation: call.operation,
                reason,
            };
            tracing::error!("{error}");
            lock(&self.failure).get_or_insert(Failure {
                error,
                since: Instant::now(),
                reported: false,
            });
            // The host may wait for any of them.
            let given_up = std::mem::take(&mut *lock(&self.queued));
            given_up.iter().for_each(|queued| queued.inner.abort());
            self.write();
        }
        let stuck = |failure: &&Failure| {
            !failure.reported && failure.since.elapsed() > DEVICE_STUCK_TIMEOUT
        };
        if let (Some(failure), Some(act)) = (
            lock(&self.failure).as_ref().filter(stuck),
            &*lock(&self.on_stuck),
        ) {
            act(&failure.error);
        }
    }

    /// Writes all calls down. It is worth less than the error that is being reported.
    fn write(&self) {
        let Some(path) = lock(&self.dump).clone() else {
            return;
        };
        let log = lock(&self.log);
        let all = serde_json::json!({ "rank": self.rank, "calls": log.calls });
        if let Err(error) = std::fs::write(&path, all.to_string()) {
            tracing::warn!("cannot write {}: {error}", path.display());
        }
    }

    /// Warns of a call that is waited for too long, before it fails.
    fn warn_if_stalled(&self, store: &Store, beat: &mut dyn FnMut() -> bool) {
        let warn_after = (self.timeout / 2).min(Duration::from_secs(30));
        let slow = |call: &&Call| {
            call.waited_for
                && call.ended_s.is_none()
                && call.missing.is_none()
                && call.began.elapsed() > warn_after
        };
        let stalled = lock(&self.log).calls.iter().find(slow).cloned();
        let Some(stalled) = stalled else { return };
        let missing = missing(store, self.rank, &stalled, beat);
        tracing::warn!("{missing}; waiting for {:.0?}", stalled.began.elapsed());
        let same =
            |call: &&mut Call| call.began == stalled.began && call.operation == stalled.operation;
        if let Some(call) = lock(&self.log).calls.iter_mut().find(same) {
            call.missing = Some(missing);
        }
    }
}

/// Which ranks have not come to a call, by their signs. Others may warn_if_stalled at this rank meanwhile: it goes on with its own.
fn missing(store: &Store, own: usize, call: &Call, beat: &mut dyn FnMut() -> bool) -> String {
    let others: Vec<usize> = match call.peer {
        Some(peer) => vec![peer],
        None => call
            .members
            .iter()
            .copied()
            .filter(|&rank| rank != own)
            .collect(),
    };
    let read = |rank: usize| -> Option<Heartbeat> {
        let key = heartbeat_key(rank);
        store
            .contains(&key)
            .ok()?
            .then(|| store.get(&key).ok())?
            .and_then(|text| serde_json::from_slice(&text).ok())
    };
    let before: Vec<Option<Heartbeat>> = others.iter().map(|&rank| read(rank)).collect();
    let began = Instant::now();
    while began.elapsed() < HEARTBEAT_TIMEOUT {
        std::thread::sleep(HEARTBEAT_INTERVAL / 2);
        beat();
    }
    let mut absent = Vec::new();
    for (&rank, before) in others.iter().zip(before) {
        let now = read(rank);
        let silent = now.as_ref().map(|heartbeat| heartbeat.beat)
            == before.as_ref().map(|heartbeat| heartbeat.beat);
        absent.extend(describe_rank(rank, silent, now.unwrap_or_default(), call));
    }
    if absent.is_empty() {
        format!(
            "{}: every rank has come to it and is alive; the network may be slow or cut",
            call.name()
        )
    } else {
        format!("{}: {}", call.name(), absent.join("; "))
    }
}

/// What is the matter with a rank; None where it does as it should.
fn describe_rank(rank: usize, silent: bool, heartbeat: Heartbeat, call: &Call) -> Option<String> {
    let (count, operation) = heartbeat
        .last_collective
        .get(&*call.key)
        .cloned()
        .unwrap_or_default();
    let at = match (count, silent) {
        (0, false) => "it has not called this group yet".to_string(),
        (0, true) => "when last heard of it had not called this group".to_string(),
        (_, false) => format!("its last call here is {count}, {operation}"),
        (_, true) => format!("when last heard of its last call here was {count}, {operation}"),
    };
    match call.number {
        _ if silent && heartbeat.beat == 0 => Some(format!("rank {rank} has never been heard of")),
        Some(number) if silent && count >= number => {
            Some(format!("rank {rank} has stopped inside this call"))
        }
        _ if silent => Some(format!("rank {rank} has stopped; {at}")),
        Some(number) if count < number => {
            let waits = heartbeat
                .waits
                .map_or(String::new(), |waits| format!(", and it waits for {waits}"));
            Some(format!("rank {rank} is missing; {at}{waits}"))
        }
        Some(_) => None,
        None => Some(format!(
            "rank {rank} is alive{}",
            heartbeat
                .waits
                .map_or(String::new(), |w| format!(" and waits for {w}"))
        )),
    }
}

/// A group whose calls are written down.
struct RecordedComm {
    inner: Arc<dyn Communicator>,
    recorder: FlightRecorder,
    group: Arc<str>,
    members: Arc<[usize]>,
    key: Arc<str>,
}

impl RecordedComm {
    fn call(
        &self,
        operation: &'static str,
        tensor: Option<&Tensor>,
        peer: Option<usize>,
        start: impl FnOnce() -> Result<Work, CommError>,
    ) -> Result<Work, CommError> {
        let call = Call {
            group: self.group.clone(),
            members: self.members.clone(),
            key: self.key.clone(),
            number: None,
            operation,
            peer: peer.and_then(|peer| self.members.get(peer).copied()),
            tensor: tensor.map_or(String::new(), |tensor| {
                format!("{:?} {:?}", tensor.kind(), tensor.size())
            }),
            started_s: self.recorder.0.began.elapsed().as_secs_f64(),
            ended_s: None,
            began: Instant::now(),
            waited_for: false,
            missing: None,
        };
        self.recorder.check()?;
        let moved = tensor.map_or(profile::Cost::default(), |tensor| {
            profile::Cost::passes(1.0, tensor)
        });
        let id = self.recorder.started(call, peer.is_none());
        let mut work = start().map_err(|error| self.recorder.failed(id, error))?;
        let recorder = self.recorder.clone();
        let progress = work.progress.take();
        let on_device = progress.is_some();
        if let Some(progress) = progress {
            lock(&recorder.0.queued).push(DeviceOperation {
                id,
                progress,
                inner: self.inner.clone(),
            });
        }
        Ok(Work::new(move || {
            recorder.change(id, |call| call.waited_for = true);
            let result = span("communication", operation, || moved, || work.wait());
            let result = result.map_err(|error| recorder.failed(id, error));
            if !on_device {
                recorder.ended(id);
            }
            result
        }))
    }
}

impl Communicator for RecordedComm {
    fn backend(&self) -> &'static str {
        self.inner.backend()
    }
    fn is_stream_ordered(&self) -> bool {
        self.inner.is_stream_ordered()
    }
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.call("all_reduce", Some(tensor), None, || {
            self.inner.all_reduce(tensor, op)
        })
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.call("broadcast", Some(tensor), None, || {
            self.inner.broadcast(tensor, root)
        })
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.call("all_gather", Some(input), None, || {
            self.inner.all_gather(output, input)
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.call("reduce_scatter", Some(input), None, || {
            self.inner.reduce_scatter(output, input, op)
        })
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        let start = || {
            self.inner
                .all_to_all(output, input, output_splits, input_splits)
        };
        self.call("all_to_all", Some(input), None, start)
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.call("send", Some(tensor), Some(to), || {
            self.inner.send(tensor, to, tag)
        })
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.call("recv", Some(tensor), Some(from), || {
            self.inner.recv(tensor, from, tag)
        })
    }
    fn exchange(
        &self,
        sends: &[(&Tensor, usize)],
        receives: &[(&Tensor, usize)],
        tag: i32,
    ) -> Result<Work, CommError> {
        let first = sends
            .iter()
            .chain(receives)
            .next()
            .map(|(tensor, _)| *tensor);
        self.call("exchange", first, None, || {
            self.inner.exchange(sends, receives, tag)
        })
    }
    fn barrier(&self) -> Result<Work, CommError> {
        self.call("barrier", None, None, || self.inner.barrier())
    }
    fn check(&self) -> Result<(), CommError> {
        self.recorder.check().and_then(|()| self.inner.check())
    }
    fn abort(&self) {
        self.inner.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(number: Option<u64>, peer: Option<usize>) -> Call {
        Call {
            group: "experts".into(),
            members: [0, 1, 2].into(),
            key: "experts/[0, 1, 2]".into(),
            number,
            operation: if peer.is_some() { "recv" } else { "all_to_all" },
            peer,
            tensor: String::new(),
            started_s: 0.0,
            ended_s: None,
            began: Instant::now(),
            waited_for: true,
            missing: None,
        }
    }

    fn heartbeat(count: u64, waits: Option<&str>) -> Heartbeat {
        let last_collective = [(
            "experts/[0, 1, 2]".to_string(),
            (count, "all_gather".to_string()),
        )]
        .into();
        Heartbeat {
            beat: 7,
            last_collective,
            waits: waits.map(str::to_string),
        }
    }

    #[test]
    fn a_missing_rank_is_described_by_what_it_last_told() {
        let seven = call(Some(7), None);
        assert_eq!(describe_rank(1, false, heartbeat(7, None), &seven), None);
        assert_eq!(describe_rank(1, false, heartbeat(9, None), &seven), None);
        let waits = Some("recv from rank 2 in group 'pipeline'");
        let text = describe_rank(1, false, heartbeat(6, waits), &seven).unwrap();
        let expected = "rank 1 is missing; its last call here is 6, all_gather, and it waits for recv from rank 2";
        assert!(text.starts_with(expected), "{text}");
        let text = describe_rank(1, true, heartbeat(6, None), &seven).unwrap();
        assert_eq!(
            text,
            "rank 1 has stopped; when last heard of its last call here was 6, all_gather"
        );
        assert_eq!(
            describe_rank(1, true, heartbeat(7, None), &seven).unwrap(),
            "rank 1 has stopped inside this call"
        );
        assert_eq!(
            describe_rank(2, true, Heartbeat::default(), &seven).unwrap(),
            "rank 2 has never been heard of"
        );
        let text = describe_rank(2, false, heartbeat(6, None), &call(None, Some(2))).unwrap();
        assert_eq!(text, "rank 2 is alive");
    }

    #[test]
    fn calls_are_named_as_people_would() {
        assert_eq!(
            call(Some(3), None).name(),
            "call 3, all_to_all in group 'experts'"
        );
        assert_eq!(
            call(None, Some(2)).name(),
            "recv from rank 2 in group 'experts'"
        );
    }
}
