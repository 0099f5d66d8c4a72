//! Parallel loops on libtorch's own threads.
//!
//! libtorch's threads keep spinning for a while after each loop, so a second pool would compete
//! with them for the processors.

use libloading::os::unix::Library;
use std::ffi::{c_int, c_uint, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Functions of the OpenMP runtime that libtorch has loaded, GNU's libgomp.
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
        // SAFETY: the signatures are those of libgomp's ABI, in which compilers call
        // `GOMP_parallel`, and of the OpenMP specification (3.2.4, 3.2.2).
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

/// Divides `0..count` into one consecutive range per thread and calls `body` with the index and the
/// range, in parallel.
///
/// There are fewer ranges if they would be smaller than `grain`. The same number of threads gives
/// the same ranges.
///
/// # Panics
/// If `body` panics.
pub fn parallel_for(count: usize, grain: usize, body: impl Fn(usize, Range<usize>) + Sync) {
    let threads = count.div_ceil(grain.max(1)).min(max_parallel_ranges());
    match open_mp().filter(|_| threads > 1) {
        None => {
            if count > 0 {
                body(0, 0..count);
            }
        }
        Some(runtime) => {
            let mut parallel_loop = ParallelLoop {
                count,
                body: &body,
                runtime,
                panicked: AtomicBool::new(false),
            };
            let argument = (&raw mut parallel_loop).cast();
            // SAFETY: `run` expects this type, and the call returns after all threads are done.
            unsafe { (runtime.parallel)(run, argument, threads as c_uint, 0) };
            assert!(
                !parallel_loop.panicked.load(Ordering::SeqCst),
                "a thread of a loop panicked"
            );
        }
    }
}

/// Returns the largest number of ranges of [`parallel_for`].
pub fn max_parallel_ranges() -> usize {
    (tch::get_num_threads().max(1)) as usize
}

/// # Safety
/// `argument` is a [`ParallelLoop`] that outlives the call.
unsafe extern "C" fn run(argument: *mut c_void) {
    // SAFETY: as the caller promises; threads only read it.
    let parallel_loop = unsafe { &*argument.cast::<ParallelLoop>() };
    let runtime = parallel_loop.runtime;
    // SAFETY: the function has no arguments.
    let thread = unsafe { (runtime.thread)() as usize };
    // SAFETY: as above. A nested loop has one thread, whatever number it requests.
    let threads = unsafe { (runtime.threads)().max(1) as usize };
    let start = parallel_loop.count * thread / threads;
    let end = parallel_loop.count * (thread + 1) / threads;
    if start < end {
        // A panic must not unwind into the runtime.
        let call = AssertUnwindSafe(|| (parallel_loop.body)(thread, start..end));
        if catch_unwind(call).is_err() {
            parallel_loop.panicked.store(true, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_index_is_visited_once() {
        tch::set_num_threads(3);
        for count in [0, 1, 2, 7, 1000] {
            let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            parallel_for(count, 2, |thread, range| {
                assert!(thread < max_parallel_ranges());
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
    fn a_panic_reaches_the_caller() {
        tch::set_num_threads(2);
        parallel_for(8, 1, |_, range| assert!(range.start > 0));
    }
}
