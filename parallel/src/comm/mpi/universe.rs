//! The start and end of MPI in this process, and the thread that keeps its operations going.

use super::{check, ffi, reductions::Reductions};
use crate::background;
use parking_lot::Mutex;
use std::{
    ffi::c_int,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

/// All ranks that MPI started.
pub(crate) struct Universe {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(super) reductions: Reductions,
    /// The number of this process's operations in progress.
    pub(super) in_flight: AtomicUsize,
}

// SAFETY: handles are numbers or pointers that MPI itself guards: it runs with MPI_THREAD_MULTIPLE.
unsafe impl Send for Universe {}
// SAFETY: as above.
unsafe impl Sync for Universe {}

/// Initializes MPI, once per process.
///
/// # Errors
/// If that fails, or the library does not support several threads.
pub(crate) fn universe() -> Result<&'static Universe, String> {
    static UNIVERSE: OnceLock<Result<Universe, String>> = OnceLock::new();
    static PROGRESS: OnceLock<()> = OnceLock::new();
    let universe = UNIVERSE.get_or_init(initialize);
    let universe = universe.as_ref().map_err(Clone::clone)?;
    PROGRESS.get_or_init(|| background::spawn("mpi", || progress_loop(universe)));
    Ok(universe)
}

fn initialize() -> Result<Universe, String> {
    let initialized = mpi::initialize_with_threading(mpi::Threading::Multiple);
    let (universe, threading) = initialized.ok_or("MPI was initialized already")?;
    // Dropping it would finalize MPI, which `finalize` does.
    std::mem::forget(universe);
    if threading != mpi::Threading::Multiple {
        return Err(format!(
            "the MPI library supports thread level {threading:?}, but moerun needs \
             MPI_THREAD_MULTIPLE: use a library that was built with it"
        ));
    }
    let mut rank = 0;
    let mut size = 0;
    // SAFETY: MPI is initialized, and the out-parameters outlive the calls. From here on, MPI
    // returns errors instead of ending the process.
    unsafe {
        let world = ffi::RSMPI_COMM_WORLD;
        check(ffi::MPI_Comm_set_errhandler(
            world,
            ffi::RSMPI_ERRORS_RETURN,
        ))?;
        check(ffi::MPI_Comm_rank(world, &mut rank))?;
        check(ffi::MPI_Comm_size(world, &mut size))?;
    }
    Ok(Universe {
        rank: rank as usize,
        size: size as usize,
        reductions: Reductions::create()?,
        in_flight: AtomicUsize::new(0),
    })
}

/// Finalizes MPI if it was initialized. Without this, mpirun takes the exit of a rank for a
/// failure.
///
/// # Collective
/// All ranks that MPI started.
pub fn finalize() {
    let mut initialized = 0;
    let mut finalized = 0;
    // SAFETY: these three may be called at any time. The process exits, so nothing uses MPI after.
    unsafe {
        if ffi::MPI_Initialized(&mut initialized) == 0
            && initialized != 0
            && ffi::MPI_Finalized(&mut finalized) == 0
            && finalized == 0
        {
            FINALIZING.store(true, Ordering::SeqCst);
            let _progress_guard = PROGRESS_LOCK.lock();
            ffi::MPI_Finalize();
        }
    }
}

static FINALIZING: AtomicBool = AtomicBool::new(false);
static PROGRESS_LOCK: Mutex<()> = Mutex::new(());

/// Enters MPI from time to time while operations are in progress.
fn progress_loop(universe: &Universe) {
    loop {
        let is_idle = universe.in_flight.load(Ordering::Relaxed) == 0;
        std::thread::sleep(if is_idle {
            Duration::from_millis(2)
        } else {
            Duration::from_micros(200)
        });
        let _progress_guard = PROGRESS_LOCK.lock();
        if FINALIZING.load(Ordering::SeqCst) {
            return;
        }
        if !is_idle {
            let mut flag = 0;
            // SAFETY: a probe for messages of this process to itself. There are none, but MPI makes
            // progress on all operations meanwhile.
            unsafe {
                ffi::MPI_Iprobe(
                    ffi::RSMPI_ANY_SOURCE,
                    ffi::RSMPI_ANY_TAG,
                    ffi::RSMPI_COMM_SELF,
                    &mut flag,
                    ffi::RSMPI_STATUS_IGNORE,
                );
            }
        }
    }
}

/// Returns the library's name and version, without its build information.
pub(crate) fn library() -> String {
    let text = mpi::environment::library_version().unwrap_or_default();
    let name = text.split(',').next().unwrap_or_default();
    name.trim().to_string()
}

/// Sends `bytes` of rank 0 to every rank.
///
/// # Collective
/// All ranks that MPI started.
///
/// # Errors
/// MPI's message.
pub(crate) fn broadcast_bytes(bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    let universe = universe()?;
    let mut bytes = bytes;
    let mut length = bytes.len() as u64;
    // SAFETY: the buffers have the sizes that are passed.
    unsafe {
        let world = ffi::RSMPI_COMM_WORLD;
        let data = (&raw mut length).cast();
        check(ffi::MPI_Bcast(data, 1, ffi::RSMPI_UINT64_T, 0, world))?;
        if universe.rank != 0 {
            bytes = vec![0; length as usize];
        }
        let data = bytes.as_mut_ptr().cast();
        let count = length as c_int;
        check(ffi::MPI_Bcast(data, count, ffi::RSMPI_UINT8_T, 0, world))?;
    }
    Ok(bytes)
}
