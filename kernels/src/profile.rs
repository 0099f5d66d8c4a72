//! A profiler of named spans, with their operations and bytes, on every thread.
//!
//! [`write`] saves the spans as a Chrome trace, which <https://ui.perfetto.dev> opens. While the
//! profiler is off, a span costs one read of a flag. While it is on, spans wait for the device that
//! [`wait_for_device_of`] names, so that their times are the device's and nothing overlaps.

use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};
use tch::{Device, Tensor};
use torch_ext::{Error, Stream};

static ON: AtomicBool = AtomicBool::new(false);
static RECORDING: Mutex<Option<Recording>> = Mutex::new(None);
static THREADS: AtomicU64 = AtomicU64::new(0);
/// Waits for what the calling thread has queued.
static WAIT: Mutex<Option<Arc<dyn Fn() + Send + Sync>>> = Mutex::new(None);

thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
}

struct Recording {
    started: Instant,
    events: Vec<Event>,
}

/// The work of a span.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Number of floating-point operations.
    pub flops: f64,
    /// Lower bound of the bytes read and written.
    pub bytes: f64,
}

impl Cost {
    /// Returns the cost of `times` passes over the memory of `x`.
    pub fn passes(times: f64, x: &Tensor) -> Cost {
        let size = x.numel() * x.kind().elt_size_in_bytes();
        Cost {
            flops: 0.0,
            bytes: times * size as f64,
        }
    }

    /// Returns the sum of both costs.
    pub fn plus(self, other: Cost) -> Cost {
        Cost {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// A completed span of a thread.
#[derive(Debug, Clone)]
pub struct Event {
    /// Category, such as `gemm` or `communication`.
    pub kind: &'static str,
    pub name: &'static str,
    /// Number of the calling thread, from 0.
    pub thread: u64,
    /// Start in seconds since [`start`].
    pub start: f64,
    /// End in seconds since [`start`].
    pub end: f64,
    pub cost: Cost,
}

/// The sum of all spans with one kind and name.
#[derive(Debug, Clone, Copy, Default)]
pub struct Total {
    pub calls: usize,
    /// Seconds without those of nested spans.
    pub seconds: f64,
    pub cost: Cost,
}

/// Starts recording spans, without those of an earlier recording.
pub fn start() {
    *RECORDING.lock() = Some(Recording {
        started: Instant::now(),
        events: Vec::new(),
    });
    ON.store(true, Ordering::SeqCst);
}

/// Stops recording and returns the spans since [`start`].
pub fn stop() -> Vec<Event> {
    ON.store(false, Ordering::SeqCst);
    let recording = RECORDING.lock().take();
    recording.map_or(Vec::new(), |recording| recording.events)
}

/// Makes spans of a recording wait, at both ends, for what their thread has queued on the device of
/// `like`. Processors queue nothing.
pub fn wait_for_device_of(like: &Tensor) {
    if like.device() == Device::Cpu {
        return;
    }
    let like = Mutex::new(like.detach());
    let wait = move || {
        let like = like.lock().shallow_clone();
        // A failure of the device appears at the next operation, with its name.
        let _ = wait_for_current_stream(&like);
    };
    *WAIT.lock() = Some(Arc::new(wait));
}

/// Waits for the calling thread's stream alone: other streams may wait for other ranks.
fn wait_for_current_stream(like: &Tensor) -> Result<(), Error> {
    let end = Stream::current(like)?.record()?;
    while !end.is_done()? {
        std::thread::yield_now();
    }
    Ok(())
}

/// Returns the time once the device has done what this thread has queued.
fn device_time() -> Instant {
    let wait = WAIT.lock().clone();
    if let Some(wait) = wait {
        wait();
    }
    Instant::now()
}

/// Calls `body` and records it as a span.
pub fn span<T>(
    kind: &'static str,
    name: &'static str,
    cost: impl FnOnce() -> Cost,
    body: impl FnOnce() -> T,
) -> T {
    if !ON.load(Ordering::Relaxed) {
        return body();
    }
    let started = device_time();
    let result = body();
    let ended = device_time();
    if let Some(recording) = RECORDING.lock().as_mut() {
        let origin = recording.started;
        let since = |at: Instant| at.saturating_duration_since(origin).as_secs_f64();
        let thread = THREAD.with(|thread| *thread);
        recording.events.push(Event {
            kind,
            name,
            thread,
            start: since(started),
            end: since(ended),
            cost: cost(),
        });
    }
    result
}

/// Returns each span's seconds without those of nested spans on the same thread.
fn self_seconds(events: &[Event]) -> Vec<f64> {
    let length = |event: &Event| event.end - event.start;
    let mut own: Vec<f64> = events.iter().map(length).collect();
    for event in events {
        let encloses = |other: &Event| {
            other.thread == event.thread
                && other.start <= event.start
                && other.end >= event.end
                && length(other) > length(event)
        };
        let enclosing = (0..events.len()).filter(|&other| encloses(&events[other]));
        let by_length = |&a: &usize, &b: &usize| {
            let [a, b] = [a, b].map(|index| length(&events[index]));
            a.total_cmp(&b)
        };
        if let Some(parent) = enclosing.min_by(by_length) {
            own[parent] -= length(event);
        }
    }
    own
}

/// Sums the spans by kind and name; the time of a nested span counts only for itself.
pub fn totals(events: &[Event]) -> BTreeMap<(&'static str, &'static str), Total> {
    let mut totals: BTreeMap<_, Total> = BTreeMap::new();
    for (event, seconds) in events.iter().zip(self_seconds(events)) {
        let total = totals.entry((event.kind, event.name)).or_default();
        total.calls += 1;
        total.seconds += seconds;
        total.cost = total.cost.plus(event.cost);
    }
    totals
}

/// Writes the spans as a Chrome trace whose process number is `rank`.
///
/// # Errors
/// If the file cannot be written.
pub fn write(events: &[Event], rank: usize, path: &Path) -> std::io::Result<()> {
    let mut text = String::from("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n");
    for (number, (event, own)) in events.iter().zip(self_seconds(events)).enumerate() {
        let separator = if number == 0 { "" } else { ",\n" };
        // Kinds and names are literals of this program and need no escaping.
        text += &format!(
            "{separator}{{\"ph\":\"X\",\"pid\":{rank},\"tid\":{},\
             \"cat\":\"{}\",\"name\":\"{}\",\"ts\":{:.3},\"dur\":{:.3},\
             \"args\":{{\"self_ms\":{:.4},\"gflop\":{:.4},\"mb\":{:.3}}}}}",
            event.thread,
            event.kind,
            event.name,
            event.start * 1e6,
            (event.end - event.start) * 1e6,
            own * 1e3,
            event.cost.flops * 1e-9,
            event.cost.bytes * 1e-6,
        );
    }
    text += "\n]}\n";
    std::fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_wait_at_both_ends_while_recording() {
        static WAITS: AtomicU64 = AtomicU64::new(0);
        let count = || {
            WAITS.fetch_add(1, Ordering::SeqCst);
        };
        *WAIT.lock() = Some(Arc::new(count));
        let waits_of_a_span = || {
            let before = WAITS.load(Ordering::SeqCst);
            let inside = span("test", "waiting", Cost::default, || {
                WAITS.load(Ordering::SeqCst)
            });
            (inside - before, WAITS.load(Ordering::SeqCst) - inside)
        };
        assert_eq!(waits_of_a_span(), (0, 0));
        start();
        // Other tests may record spans at the same time.
        let (before, after) = waits_of_a_span();
        assert!(before >= 1 && after >= 1, "{before} {after}");
        assert!(stop().iter().any(|event| event.name == "waiting"));
        *WAIT.lock() = None;
    }

    #[test]
    fn processors_are_not_waited_for() {
        wait_for_device_of(&Tensor::zeros([1], tch::kind::FLOAT_CPU));
        assert!(wait_for_current_stream(&Tensor::zeros([1], tch::kind::FLOAT_CPU)).is_err());
    }

    #[test]
    fn nested_spans_count_once() {
        let event = |name, thread, start, end| Event {
            kind: "test",
            name,
            thread,
            start,
            end,
            cost: Cost {
                flops: 2.0,
                bytes: 1.0,
            },
        };
        let events = [
            event("inner", 0, 1.0, 2.0),
            event("innermost", 0, 3.2, 3.5),
            event("inner", 0, 3.0, 4.0),
            event("outer", 0, 0.0, 5.0),
            event("inner", 1, 1.0, 2.0),
        ];
        let totals = totals(&events);
        let of = |name| totals[&("test", name)];
        assert!((of("outer").seconds - 3.0).abs() < 1e-9);
        assert!((of("inner").seconds - 2.7).abs() < 1e-9);
        assert_eq!((of("inner").calls, of("inner").cost.flops), (3, 6.0));
    }
}
