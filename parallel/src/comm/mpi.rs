//! MPI: the communicator of ranks that mpirun, mpiexec or srun started.
//!
//! Collectives are MPI's non-blocking ones. They get on while some thread is inside MPI: a thread of its own looks in now and
//! then, so that an operation that nobody waits for yet does not stand still (MPI 3.1, section 3.7.4 lets it).

use super::{CommError, Communicator, Membership, ReduceOp, Staged, Work, check_splits};
use crate::background;
use half::{bf16, f16};
use mpi::ffi;
use parking_lot::Mutex;
use std::ffi::{c_int, c_void};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// All ranks that MPI started.
pub(crate) struct Universe {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    reductions: Reductions,
    /// Operations under way in this process.
    in_flight: AtomicUsize,
}

/// Reductions of the two types that MPI does not know, by their bits.
struct Reductions {
    bf16: [ffi::MPI_Op; 3],
    f16: [ffi::MPI_Op; 3],
}

// SAFETY: handles are numbers or pointers that MPI itself guards, since it was begun with MPI_THREAD_MULTIPLE.
unsafe impl Send for Universe {}
// SAFETY: as above.
unsafe impl Sync for Universe {}

/// Begins MPI, once in a process.
///
/// # Errors
/// When it cannot, or the library does not allow several threads.
pub(crate) fn universe() -> Result<&'static Universe, String> {
    static UNIVERSE: OnceLock<Result<Universe, String>> = OnceLock::new();
    let universe = UNIVERSE.get_or_init(|| {
        let begun = mpi::initialize_with_threading(mpi::Threading::Multiple);
        let (universe, threading) = begun.ok_or("MPI was begun already")?;
        // It would end MPI when dropped; `finalize` does.
        std::mem::forget(universe);
        if threading != mpi::Threading::Multiple {
            return Err(format!(
                "the MPI library gives thread level {threading:?}, and moerun needs MPI_THREAD_MULTIPLE: use a library built \
                 with it"
            ));
        }
        let mut rank = 0;
let mut size = 0;
        // SAFETY: MPI is begun; out-parameters live through the calls. Errors are returned instead of ending the process.
        unsafe {
            check(ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN))?;
            check(ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank))?;
            check(ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size))?;
        }
        let reductions = Reductions {
            bf16: [reduction(sum::<bf16>)?, reduction(min::<bf16>)?, reduction(max::<bf16>)?],
            f16: [reduction(sum::<f16>)?, reduction(min::<f16>)?, reduction(max::<f16>)?],
        };
        Ok(Universe { rank: rank as usize, size: size as usize, reductions, in_flight: AtomicUsize::new(0) })
    });
    let universe = universe.as_ref().map_err(Clone::clone)?;
    static PROGRESS: OnceLock<()> = OnceLock::new();
    PROGRESS.get_or_init(|| background::spawn("mpi", || progress_loop(universe)));
    Ok(universe)
}

/// Ends MPI, where it was begun: without that, mpirun takes the end of a rank for a failure. All ranks call it.
pub fn finalize() {
    let mut begun = 0;
    let mut ended = 0;
    // SAFETY: these three may be called at any time; nothing of MPI is used afterwards, since the process ends.
    unsafe {
        if ffi::MPI_Initialized(&mut begun) == 0
            && begun != 0
            && ffi::MPI_Finalized(&mut ended) == 0
            && ended == 0
        {
            FINALIZING.store(true, Ordering::SeqCst);
            let _progress_guard = PROGRESS_LOCK.lock();
            ffi::MPI_Finalize();
        }
    }
}

static FINALIZING: AtomicBool = AtomicBool::new(false);
static PROGRESS_LOCK: Mutex<()> = Mutex::new(());

/// Enters MPI from time to time while operations are under way.
fn progress_loop(universe: &Universe) {
    loop {
        let idle = universe.in_flight.load(Ordering::Relaxed) == 0;
        std::thread::sleep(if idle {
            Duration::from_millis(2)
        } else {
            Duration::from_micros(200)
        });
        let _progress_guard = PROGRESS_LOCK.lock();
        if FINALIZING.load(Ordering::SeqCst) {
            return;
        }
        if !idle {
            let mut flag = 0;
            // SAFETY: asks for messages to this process from itself, of which there are none; MPI gets on meanwhile.
            unsafe {
                let any = (ffi::RSMPI_ANY_SOURCE, ffi::RSMPI_ANY_TAG);
                ffi::MPI_Iprobe(
                    any.0,
                    any.1,
                    ffi::RSMPI_COMM_SELF,
                    &mut flag,
                    ffi::RSMPI_STATUS_IGNORE,
                );
            }
        }
    }
}

/// What the library calls itself, without what it adds about its making.
pub(crate) fn library() -> String {
    let text = mpi::environment::library_version().unwrap_or_default();
    text.split(',')
        .next()
        .unwrap_or_default()
        .trim()
        .to_string()
}

/// Shares `bytes` of rank 0 with every rank.
///
/// # Errors
/// MPI's message.
pub(crate) fn broadcast_bytes(bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    let universe = universe()?;
    let mut length = bytes.len() as u64;
    let mut all = bytes;
    // SAFETY: buffers of the sizes that are named.
    unsafe {
        check(ffi::MPI_Bcast(
            (&raw mut length).cast(),
            1,
            ffi::RSMPI_UINT64_T,
            0,
            ffi::RSMPI_COMM_WORLD,
        ))?;
        if universe.rank != 0 {
            all = vec![0; length as usize];
        }
        check(ffi::MPI_Bcast(
            all.as_mut_ptr().cast(),
            length as c_int,
            ffi::RSMPI_UINT8_T,
            0,
            ffi::RSMPI_COMM_WORLD,
        ))?;
    }
    Ok(all)
}

fn check(code: c_int) -> Result<(), String> {
    if code == 0 {
        return Ok(());
    }
    let mut text = vec![0u8; 1024];
    let mut length = 0;
    // SAFETY: MPI_MAX_ERROR_STRING is at most 512 in the libraries there are.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    text.truncate(length as usize);
    Err(String::from_utf8_lossy(&text).into_owned())
}

/// Two-byte numbers that are combined as fp32 and rounded once.
trait HalfPrecision: Copy {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}
impl HalfPrecision for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
}
impl HalfPrecision for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(value: f32) -> f16 {
        f16::from_f32(value)
    }
}

type Combine = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut c_int, *mut ffi::MPI_Datatype);

/// # Safety
/// MPI calls it with two arrays of `length` numbers.
unsafe fn combine<T: HalfPrecision>(
    from: *mut c_void,
    into: *mut c_void,
    length: *mut c_int,
    with: fn(f32, f32) -> f32,
) {
    // SAFETY: as the caller promises.
    let (from, into) = unsafe {
        let length = *length as usize;
        (
            std::slice::from_raw_parts(from.cast::<T>(), length),
            std::slice::from_raw_parts_mut(into.cast::<T>(), length),
        )
    };
    for (into, from) in into.iter_mut().zip(from) {
        *into = T::narrow(with(into.widen(), from.widen()));
    }
}
unsafe extern "C" fn sum<T: HalfPrecision>(
    a: *mut c_void,
    b: *mut c_void,
    n: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI's promise.
    unsafe { combine::<T>(a, b, n, |x, y| x + y) }
}
unsafe extern "C" fn min<T: HalfPrecision>(
    a: *mut c_void,
    b: *mut c_void,
    n: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI's promise.
    unsafe { combine::<T>(a, b, n, f32::min) }
}
unsafe extern "C" fn max<T: HalfPrecision>(
    a: *mut c_void,
    b: *mut c_void,
    n: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI's promise.
    unsafe { combine::<T>(a, b, n, f32::max) }
}

fn reduction(combine: Combine) -> Result<ffi::MPI_Op, String> {
    let mut op = MaybeUninit::uninit();
    // SAFETY: the function has MPI's signature and lives as long as the program.
    unsafe {
        check(ffi::MPI_Op_create(Some(combine), 1, op.as_mut_ptr()))?;
        Ok(op.assume_init())
    }
}

/// A group of ranks with an MPI communicator of its own.
pub(crate) struct Mpi {
    shared: Arc<MpiState>,
}

struct MpiState {
    comm: ffi::MPI_Comm,
    membership: Membership,
    timeout: Duration,
    aborted: AtomicBool,
    universe: &'static Universe,
}

// SAFETY: see `Universe`.
unsafe impl Send for MpiState {}
// SAFETY: see `Universe`.
unsafe impl Sync for MpiState {}

/// A request under way, with all that MPI reads and writes meanwhile: where it is given up, that stays for as long as the
/// process lives.
struct Request {
    request: ffi::MPI_Request,
    kept: ManuallyDrop<(Staged, Option<AlltoallvArguments>)>,
}

// SAFETY: see `Universe`; tensors may be sent.
unsafe impl Send for Request {}

/// What an uneven operation points to besides tensors: its rows' type, and numbers and beginnings of rows.
struct AlltoallvArguments {
    row: RowType,
    sent: (Vec<c_int>, Vec<c_int>),
    received: (Vec<c_int>, Vec<c_int>),
}

/// The type of one row of a tensor.
struct RowType(ffi::MPI_Datatype);

impl Drop for RowType {
    fn drop(&mut self) {
        // SAFETY: a type that this made; operations under way keep what they need of it (MPI 3.1, section 4.1.9).
        unsafe { ffi::MPI_Type_free(&mut self.0) };
    }
}

impl Mpi {
    /// Joins the group `name` of the ranks `members`. Only they call it.
    ///
    /// # Errors
    /// When MPI was not begun or refuses.
    pub(crate) fn join(name: &str, members: &[usize], timeout: Duration) -> Result<Mpi, CommError> {
        let universe = universe();
        let rank = universe
            .as_ref()
            .map_or(members[0], |universe| universe.rank);
        let membership = Membership::new(name, members, rank)?;
        let failed = |reason: String| membership.error("joining", reason);
        let universe = universe.map_err(failed)?;
        let ranks: Vec<c_int> = members.iter().map(|&rank| rank as c_int).collect();
        // Groups that are made at the same time are told apart by their names.
        let digest = name.bytes().fold(0u32, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u32::from(byte))
        });
        let tag = (digest % 32000) as c_int;
        let mut comm = MaybeUninit::uninit();
        // SAFETY: handles are made here and freed here; arrays have the lengths that are named.
        let made = unsafe {
            let mut all = MaybeUninit::uninit();
            let mut group = MaybeUninit::uninit();
            check(ffi::MPI_Comm_group(ffi::RSMPI_COMM_WORLD, all.as_mut_ptr())).and_then(|()| {
                check(ffi::MPI_Group_incl(
                    all.assume_init(),
                    ranks.len() as c_int,
                    ranks.as_ptr(),
                    group.as_mut_ptr(),
                ))?;
                check(ffi::MPI_Comm_create_group(
                    ffi::RSMPI_COMM_WORLD,
                    group.assume_init(),
                    tag,
                    comm.as_mut_ptr(),
                ))?;
                check(ffi::MPI_Comm_set_errhandler(
                    comm.assume_init(),
                    ffi::RSMPI_ERRORS_RETURN,
                ))?;
                ffi::MPI_Group_free(group.as_mut_ptr());
                ffi::MPI_Group_free(all.as_mut_ptr());
                Ok(comm.assume_init())
            })
        };
        let shared = MpiState {
            comm: made.map_err(failed)?,
            membership,
            timeout,
            aborted: AtomicBool::new(false),
            universe,
        };
        Ok(Mpi {
            shared: Arc::new(shared),
        })
    }

    /// Starts an operation on host memory. `tensors[0]` is what it writes, if anything.
    fn run(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        writes: bool,
        start: impl FnOnce(
            &MpiState,
            &[Tensor],
            *mut ffi::MPI_Request,
        ) -> Result<Option<AlltoallvArguments>, String>,
    ) -> Result<Work, CommError> {
        let shared = self.shared.clone();
        if shared.aborted.load(Ordering::SeqCst) {
            return Err(shared.error(operation, "the group was aborted"));
        }
        if let Some(tensor) = tensors.iter().find(|tensor| !tensor.is_contiguous()) {
            return Err(shared.error(
                operation,
                format!("a tensor of shape {:?} is not contiguous", tensor.size()),
            ));
        }
        let staged = Staged::new(tensors, writes);
        let mut request = MaybeUninit::uninit();
        let more = start(&shared, &staged.host, request.as_mut_ptr());
        let more = more.map_err(|reason| shared.error(operation, reason))?;
        // SAFETY: MPI has set it, since the call succeeded.
        let request = Request {
            request: unsafe { request.assume_init() },
            kept: ManuallyDrop::new((staged, more)),
        };
        shared.universe.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(Work::new(move || {
            shared.finish(operation, request)?.finish();
            Ok(())
        }))
    }
}

impl MpiState {
    fn error(&self, operation: &'static str, reason: impl ToString) -> CommError {
        self.membership.error(operation, reason)
    }

    /// Waits for a request: its tensors.
    fn finish(&self, operation: &'static str, mut request: Request) -> Result<Staged, CommError> {
        let began = Instant::now();
        let result = loop {
            let mut done = 0;
            // SAFETY: a live request.
            let tested =
                unsafe { ffi::MPI_Test(&mut request.request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            let waited = began.elapsed();
            match check(tested) {
                Err(reason) => break Err(reason),
                Ok(()) if done != 0 => break Ok(()),
                Ok(()) if self.aborted.load(Ordering::SeqCst) => {
                    break Err("the group was aborted".into());
                }
                Ok(()) if waited > self.timeout => {
                    break Err(format!("not done after {:.1?}", self.timeout));
                }
                // Others may need the processor to get here.
                Ok(()) if waited < Duration::from_millis(2) => std::thread::yield_now(),
                Ok(()) => std::thread::sleep(Duration::from_micros(50)),
            }
        };
        self.universe.in_flight.fetch_sub(1, Ordering::Relaxed);
        result.map_err(|reason| self.error(operation, reason))?;
        Ok(ManuallyDrop::into_inner(request.kept).0)
    }

    /// MPI's type of an element, and its reduction.
    fn element(
        &self,
        kind: Kind,
        op: ReduceOp,
    ) -> Result<(ffi::MPI_Datatype, ffi::MPI_Op), String> {
        let index = match op {
            ReduceOp::Sum => 0,
            ReduceOp::Min => 1,
            ReduceOp::Max => 2,
        };
        // SAFETY: constants of the library, set when it was loaded.
        unsafe {
            let op = [ffi::RSMPI_SUM, ffi::RSMPI_MIN, ffi::RSMPI_MAX][index];
            Ok(match kind {
                Kind::Float => (ffi::RSMPI_FLOAT, op),
                Kind::Double => (ffi::RSMPI_DOUBLE, op),
                Kind::Int64 => (ffi::RSMPI_INT64_T, op),
                Kind::Int => (ffi::RSMPI_INT32_T, op),
                Kind::Int16 => (ffi::RSMPI_INT16_T, op),
                Kind::Int8 => (ffi::RSMPI_INT8_T, op),
                Kind::Uint8 | Kind::Bool => (ffi::RSMPI_UINT8_T, op),
                Kind::BFloat16 => (ffi::RSMPI_UINT16_T, self.universe.reductions.bf16[index]),
                Kind::Half => (ffi::RSMPI_UINT16_T, self.universe.reductions.f16[index]),
                other => return Err(format!("MPI carries no {other:?}")),
            })
        }
    }
}

/// A number of elements as MPI 3 takes it.
fn count(elements: usize) -> Result<c_int, String> {
    c_int::try_from(elements).map_err(|_| {
        format!("{elements} elements are more than MPI takes in one call (2^31 - 1): split the tensor, or use gloo")
    })
}

/// A type for one row of `tensor`, so that counts are rows.
fn row_type(tensor: &Tensor) -> Result<RowType, String> {
    let bytes =
        tensor.size().iter().skip(1).product::<i64>() as usize * tensor.kind().elt_size_in_bytes();
    let mut row = MaybeUninit::uninit();
    // SAFETY: a type made of bytes, committed before use.
    unsafe {
        check(ffi::MPI_Type_contiguous(
            count(bytes)?,
            ffi::RSMPI_UINT8_T,
            row.as_mut_ptr(),
        ))?;
        let mut row = row.assume_init();
        check(ffi::MPI_Type_commit(&mut row))?;
        Ok(RowType(row))
    }
}

/// Rows for each rank, and where they begin.
fn counts(splits: &[i64]) -> Result<(Vec<c_int>, Vec<c_int>), String> {
    let rows: Vec<c_int> = splits
        .iter()
        .map(|&rows| count(rows as usize))
        .collect::<Result<_, _>>()?;
    count(splits.iter().sum::<i64>() as usize)?;
    let begins = rows.iter().scan(0, |begin, rows| {
        Some(std::mem::replace(begin, *begin + rows))
    });
    let begins = begins.collect();
    Ok((rows, begins))
}

impl Communicator for Mpi {
    fn backend(&self) -> &'static str {
        "mpi"
    }
    fn rank(&self) -> usize {
        self.shared.membership.position
    }
    fn size(&self) -> usize {
        self.shared.membership.members.len()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        // A copy, since MPI_IN_PLACE is a macro that bindings do not have.
        let input = tch::no_grad(|| tensor.copy());
        self.run(
            "all_reduce",
            &[tensor, &input],
            true,
            |shared, host, request| {
                let (kind, op) = shared.element(host[0].kind(), op)?;
                let input = host[1].data_ptr();
                let output = host[0].data_ptr();
                let number = count(host[0].numel())?;
                // SAFETY: both tensors are contiguous, have as many elements, and live until the request is done.
                check(unsafe {
                    ffi::MPI_Iallreduce(input, output, number, kind, op, shared.comm, request)
                })?;
                Ok(None)
            },
        )
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.run("broadcast", &[tensor], true, |shared, host, request| {
            let (kind, _) = shared.element(host[0].kind(), ReduceOp::Sum)?;
            let data = host[0].data_ptr();
            let number = count(host[0].numel())?;
            // SAFETY: the tensor lives until the request is done.
            check(unsafe {
                ffi::MPI_Ibcast(data, number, kind, root as c_int, shared.comm, request)
            })?;
            Ok(None)
        })
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        let fits = output.numel() == input.numel() * self.size() && output.kind() == input.kind();
        if !fits {
            let shapes = format!(
                "{:?} does not hold {:?} of {} ranks",
                output.size(),
                input.size(),
                self.size()
            );
            return Err(self.shared.error("all_gather", shapes));
        }
        self.run(
            "all_gather",
            &[output, input],
            true,
            |shared, host, request| {
                let (kind, _) = shared.element(host[0].kind(), ReduceOp::Sum)?;
                let input = host[1].data_ptr();
                let output = host[0].data_ptr();
                let number = count(host[1].numel())?;
                // SAFETY: contiguous tensors of fitting sizes, which live until the request is done.
                check(unsafe {
                    ffi::MPI_Iallgather(
                        input,
                        number,
                        kind,
                        output,
                        number,
                        kind,
                        shared.comm,
                        request,
                    )
                })?;
                Ok(None)
            },
        )
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        let fits = input.numel() == output.numel() * self.size() && output.kind() == input.kind();
        if !fits {
            let shapes = format!(
                "{:?} of {} ranks is not {:?}",
                output.size(),
                self.size(),
                input.size()
            );
            return Err(self.shared.error("reduce_scatter", shapes));
        }
        self.run(
            "reduce_scatter",
            &[output, input],
            true,
            |shared, host, request| {
                let (kind, op) = shared.element(host[0].kind(), op)?;
                let input = host[1].data_ptr();
                let output = host[0].data_ptr();
                let number = count(host[0].numel())?;
                // SAFETY: contiguous tensors of fitting sizes, which live until the request is done.
                check(unsafe {
                    ffi::MPI_Ireduce_scatter_block(
                        input,
                        output,
                        number,
                        kind,
                        op,
                        shared.comm,
                        request,
                    )
                })?;
                Ok(None)
            },
        )
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        check_splits(output, input, output_splits, input_splits, self.size())
            .map_err(|e| self.shared.error("all_to_all", e))?;
        self.run(
            "all_to_all",
            &[output, input],
            true,
            |shared, host, request| {
                let sent = counts(input_splits)?;
                let received = counts(output_splits)?;
                let arguments = AlltoallvArguments {
                    row: row_type(&host[1])?,
                    sent,
                    received,
                };
                let AlltoallvArguments {
                    row,
                    sent,
                    received,
                } = &arguments;
                // SAFETY: the splits were checked against the tensors; both, and the arguments (whose vectors do not move with
                // them), live until the request is done.
                check(unsafe {
                    ffi::MPI_Ialltoallv(
                        host[1].data_ptr(),
                        sent.0.as_ptr(),
                        sent.1.as_ptr(),
                        row.0,
                        host[0].data_ptr(),
                        received.0.as_ptr(),
                        received.1.as_ptr(),
                        row.0,
                        shared.comm,
                        request,
                    )
                })?;
                Ok(Some(arguments))
            },
        )
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.run("send", &[tensor], false, |shared, host, request| {
            let (kind, _) = shared.element(host[0].kind(), ReduceOp::Sum)?;
            let data = host[0].data_ptr();
            let number = count(host[0].numel())?;
            // SAFETY: the tensor lives until the request is done.
            check(unsafe {
                ffi::MPI_Isend(data, number, kind, to as c_int, tag, shared.comm, request)
            })?;
            Ok(None)
        })
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.run("recv", &[tensor], true, |shared, host, request| {
            let (kind, _) = shared.element(host[0].kind(), ReduceOp::Sum)?;
            let data = host[0].data_ptr();
            let number = count(host[0].numel())?;
            // SAFETY: the tensor lives until the request is done.
            check(unsafe {
                ffi::MPI_Irecv(data, number, kind, from as c_int, tag, shared.comm, request)
            })?;
            Ok(None)
        })
    }
    fn barrier(&self) -> Result<Work, CommError> {
        self.run("barrier", &[], false, |shared, _, request| {
            // SAFETY: a live communicator.
            check(unsafe { ffi::MPI_Ibarrier(shared.comm, request) })?;
            Ok(None)
        })
    }
    fn abort(&self) {
        self.shared.aborted.store(true, Ordering::SeqCst);
    }
}
