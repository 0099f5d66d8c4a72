//! Loops on libtorch's own threads. Threads of another pool would meet libtorch's, which go on spinning for a while after each
//! of its loops, on the same processors.

use libloading::os::unix::Library;
use std::ffi::{c_int, c_uint, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The functions of the OpenMP runtime that libtorch has loaded (GNU's: libgomp's `GOMP_parallel` is what compilers call).
#[derive(Clone, Copy)]
struct OpenMp {
    parallel: unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint),
    thread: unsafe extern "C" fn() -> c_int,
    threads: unsafe extern "C" fn() -> c_int,
}

fn open_mp() -> Option<OpenMp> {
    static FOUND: OnceLock<Option<OpenMp>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let program = Library::this();
        // SAFETY: the signatures of libgomp's ABI and of OpenMP's specification (3.2.4, 3.2.2).
        unsafe {
            Some(OpenMp {
                parallel: *program.get(b"GOMP_parallel\0").ok()?,
                thread: *program.get(b"omp_get_thread_num\0").ok()?,
                threads: *program.get(b"omp_get_num_threads\0").ok()?,
            })
        }
    })
}

struct ParallelLoop<'a> {
    count: usize,
    body: &'a (dyn Fn(usize, Range<usize>) + Sync),
    runtime: OpenMp,
    panicked: AtomicBool,
}

/// Goes through `0..count` in as many neighbouring ranges as there are threads to do it, which `body` gets with their number;
/// ranges are no smaller than `grain`. The same number of threads makes the same ranges.
///
/// # Panics
/// When `body` does.
pub fn parallel_for(count: usize, grain: usize, body: impl Fn(usize, Range<usize>) + Sync) {
    let threads = count.div_ceil(grain.max(1)).min(max_parallel_ranges());
    match open_mp().filter(|_| threads > 1) {
        None => {
            if count > 0 {
                body(0, 0..count);
            }
        }
        Some(runtime) => {
            let mut all = ParallelLoop {
                count,
                body: &body,
                runtime,
                panicked: AtomicBool::new(false),
            };
            // SAFETY: `run` gets what it expects, which outlives the call: it returns when all threads are done.
            unsafe { (runtime.parallel)(run, (&raw mut all).cast(), threads as c_uint, 0) };
            assert!(
                !all.panicked.load(Ordering::SeqCst),
                "a thread of a loop panicked"
            );
        }
    }
}

/// The most ranges that [`parallel_for`] makes.
pub fn max_parallel_ranges() -> usize {
    (tch::get_num_threads().max(1)) as usize
}

/// # Safety
/// `all` is a [`ParallelLoop`] that outlives the call.
unsafe extern "C" fn run(all: *mut c_void) {
    // SAFETY: as the caller promises; threads only read it.
    let all = unsafe { &*all.cast::<ParallelLoop>() };
    // SAFETY: no arguments. Inside another loop there is one thread, whatever was asked for.
    let (thread, threads) = unsafe {
        (
            (all.runtime.thread)() as usize,
            (all.runtime.threads)().max(1) as usize,
        )
    };
    let start = all.count * thread / threads;
    let end = all.count * (thread + 1) / threads;
    // Nothing unwinds into the runtime.
    if start < end && catch_unwind(AssertUnwindSafe(|| (all.body)(thread, start..end))).is_err() {
        all.panicked.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_index_is_gone_through_once() {
        tch::set_num_threads(3);
        for count in [0, 1, 2, 7, 1000] {
            let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            parallel_for(count, 2, |part, range| {
                assert!(part < max_parallel_ranges());
                for index in range {
                    seen[index].fetch_add(1, Ordering::SeqCst);
                }
            });
            assert!(
                seen.iter().all(|times| times.load(Ordering::SeqCst) == 1),
                "{count}"
            );
        }
    }

    #[test]
    #[should_panic(expected = "a thread of a loop panicked")]
    fn a_panic_comes_back() {
        tch::set_num_threads(2);
        parallel_for(8, 1, |_, range| assert!(range.start > 0));
    }
}
