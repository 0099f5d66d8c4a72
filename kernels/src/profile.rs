//! Where a step's time goes: named parts with their operations and bytes, of every thread that calls them, while somebody asks for
//! it; written as a Chrome trace, too (<https://ui.perfetto.dev> opens it). When nobody asks, a part costs one read of a flag.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use tch::Tensor;

static ON: AtomicBool = AtomicBool::new(false);
static EVENTS: Mutex<Option<(Instant, Vec<Event>)>> = Mutex::new(None);
static THREADS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
}

/// What a part has to do.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes that have to be read or written at least.
    pub bytes: f64,
}

impl Cost {
    /// Of going through `x`, or as much memory, so many times.
    pub fn passes(times: f64, x: &Tensor) -> Cost {
        Cost {
            flops: 0.0,
            bytes: times * (x.numel() * x.kind().elt_size_in_bytes()) as f64,
        }
    }

    /// Both together.
    pub fn and(self, other: Cost) -> Cost {
        Cost {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// A part that was done.
#[derive(Debug, Clone)]
pub struct Event {
    /// `product`, `waiting`, ...
    pub kind: &'static str,
    /// Which one.
    pub name: &'static str,
    /// The calling thread, counted from 0.
    pub thread: u64,
    /// Seconds since [`begin`].
    pub start: f64,
    /// Seconds since [`begin`].
    pub end: f64,
    /// What was done.
    pub cost: Cost,
}

/// Parts of one name, added up.
#[derive(Debug, Clone, Copy, Default)]
pub struct Total {
    /// How often.
    pub calls: usize,
    /// Seconds without those of parts inside of it.
    pub seconds: f64,
    /// What was done.
    pub cost: Cost,
}

/// Begins to write parts down.
pub fn begin() {
    *EVENTS.lock() = Some((Instant::now(), Vec::new()));
    ON.store(true, Ordering::SeqCst);
}

/// Ends it: what was done since.
pub fn end() -> Vec<Event> {
    ON.store(false, Ordering::SeqCst);
    EVENTS
        .lock()
        .take()
        .map_or(Vec::new(), |(_, events)| events)
}

/// Calls `body`, which is a part of the step.
pub fn part<T>(
    kind: &'static str,
    name: &'static str,
    cost: impl FnOnce() -> Cost,
    body: impl FnOnce() -> T,
) -> T {
    if !ON.load(Ordering::Relaxed) {
        return body();
    }
    let started = Instant::now();
    let result = body();
    let ended = Instant::now();
    if let Some((began, events)) = EVENTS.lock().as_mut() {
        let since = |at: Instant| at.saturating_duration_since(*began).as_secs_f64();
        let thread = THREAD.with(|thread| *thread);
        events.push(Event {
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

/// Seconds of each part without those of parts of its thread inside of it.
fn self_seconds(events: &[Event]) -> Vec<f64> {
    let length = |event: &Event| event.end - event.start;
    let mut own: Vec<f64> = events.iter().map(length).collect();
    for event in events {
        let around = |other: &Event| {
            other.thread == event.thread
                && other.start <= event.start
                && other.end >= event.end
                && length(other) > length(event)
        };
        // The shortest one around it.
        let parent = (0..events.len()).filter(|&other| around(&events[other]));
        if let Some(parent) =
            parent.min_by(|&a, &b| length(&events[a]).total_cmp(&length(&events[b])))
        {
            own[parent] -= length(event);
        }
    }
    own
}

/// Parts of one kind and name added up; each counts for itself, without parts inside of it.
pub fn totals(events: &[Event]) -> BTreeMap<(&'static str, &'static str), Total> {
    let mut totals: BTreeMap<_, Total> = BTreeMap::new();
    for (event, seconds) in events.iter().zip(self_seconds(events)) {
        let total = totals.entry((event.kind, event.name)).or_default();
        total.calls += 1;
        total.seconds += seconds;
        total.cost.flops += event.cost.flops;
        total.cost.bytes += event.cost.bytes;
    }
    totals
}

/// Writes parts as a Chrome trace, whose process is `rank`.
///
/// # Errors
/// When the file cannot be written.
pub fn write(events: &[Event], rank: usize, path: &Path) -> std::io::Result<()> {
    let mut text = String::from("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n");
    for (number, (event, own)) in events.iter().zip(self_seconds(events)).enumerate() {
        // Names are words of this program: nothing in them has to be escaped.
        text += &format!(
            "{}{{\"ph\":\"X\",\"pid\":{rank},\"tid\":{},\"cat\":\"{}\",\"name\":\"{}\",\"ts\":{:.3},\"dur\":{:.3},\
             \"args\":{{\"self_ms\":{:.4},\"gflop\":{:.4},\"mb\":{:.3}}}}}",
            if number == 0 { "" } else { ",\n" },
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
    fn parts_count_for_themselves_alone() {
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
