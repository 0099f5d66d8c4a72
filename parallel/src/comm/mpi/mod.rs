//! The MPI communicator, for ranks that mpirun, mpiexec or srun started.
//!
//! Collectives are MPI's non-blocking ones. They make progress while a thread is inside MPI. A
//! background thread therefore enters it regularly, so that operations that no thread waits for do
//! not stall, as MPI 3.1, section 3.7.4, allows.

mod reductions;
mod universe;

use super::{CommError, Communicator, Membership, ReduceOp, Staged, Work, check_splits};
use mpi::ffi;
use std::{
    ffi::c_int,
    mem::{ManuallyDrop, MaybeUninit},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tch::{Kind, Tensor};
use universe::Universe;
pub use universe::finalize;
pub(crate) use universe::{broadcast_bytes, library, universe};

fn check(code: c_int) -> Result<(), String> {
    if code == 0 {
        return Ok(());
    }
    let mut text = vec![0u8; 1024];
    let mut length = 0;
    // SAFETY: MPI_MAX_ERROR_STRING is at most 512 in existing libraries.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    text.truncate(length as usize);
    Err(String::from_utf8_lossy(&text).into_owned())
}

/// A group of ranks with its own MPI communicator.
pub(crate) struct Mpi {
    state: Arc<MpiState>,
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

/// A request in progress, with the memory that MPI accesses: after an abort, that stays allocated
/// until the process exits.
struct Request {
    request: ffi::MPI_Request,
    kept: ManuallyDrop<Kept>,
}

struct Kept {
    staged: Staged,
    /// MPI reads it during an uneven operation.
    _arguments: Option<AlltoallvArguments>,
}

// SAFETY: see `Universe`; tensors may be sent.
unsafe impl Send for Request {}

struct AlltoallvArguments {
    row: RowType,
    sent: RowCounts,
    received: RowCounts,
}

/// The rows for each rank.
struct RowCounts {
    counts: Vec<c_int>,
    offsets: Vec<c_int>,
}

/// The MPI type of one row of a tensor.
struct RowType(ffi::MPI_Datatype);

impl Drop for RowType {
    fn drop(&mut self) {
        // SAFETY: a type created by `row_type`; operations in progress keep what they need of it
        // (MPI 3.1, section 4.1.9).
        unsafe { ffi::MPI_Type_free(&mut self.0) };
    }
}

/// The MPI type of an element, and a reduction of it.
struct ElementType {
    data_type: ffi::MPI_Datatype,
    reduction: ffi::MPI_Op,
}

impl Mpi {
    /// Joins a group; only its members call it.
    ///
    /// # Errors
    /// If MPI was not initialized, or refuses.
    pub(crate) fn join(membership: Membership, timeout: Duration) -> Result<Mpi, CommError> {
        let failed = |reason: String| membership.error("joining", reason);
        let universe = universe().map_err(failed)?;
        let comm = create_comm(&membership).map_err(failed)?;
        let state = MpiState {
            comm,
            membership,
            timeout,
            aborted: AtomicBool::new(false),
            universe,
        };
        Ok(Mpi {
            state: Arc::new(state),
        })
    }

    /// Starts an operation on host memory; `writes` is true if it writes the first of `tensors`.
    fn start(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        writes: bool,
        call: impl FnOnce(
            &MpiState,
            &[Tensor],
            *mut ffi::MPI_Request,
        ) -> Result<Option<AlltoallvArguments>, String>,
    ) -> Result<Work, CommError> {
        let state = self.state.clone();
        if state.aborted.load(Ordering::SeqCst) {
            return Err(state.error(operation, "the group was aborted"));
        }
        if let Some(tensor) = tensors.iter().find(|tensor| !tensor.is_contiguous()) {
            let shape = tensor.size();
            let reason = format!("a tensor of shape {shape:?} is not contiguous");
            return Err(state.error(operation, reason));
        }
        let staged = Staged::new(tensors, writes);
        let mut request = MaybeUninit::uninit();
        let arguments = call(&state, &staged.host, request.as_mut_ptr());
        let arguments = arguments.map_err(|reason| state.error(operation, reason))?;
        let request = Request {
            // SAFETY: MPI has initialized it, since the call succeeded.
            request: unsafe { request.assume_init() },
            kept: ManuallyDrop::new(Kept {
                staged,
                _arguments: arguments,
            }),
        };
        state.universe.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(Work::new(move || {
            let staged = state.finish(operation, request)?;
            staged.finish();
            Ok(())
        }))
    }
}

/// Creates the MPI communicator of a group.
fn create_comm(membership: &Membership) -> Result<ffi::MPI_Comm, String> {
    let ranks: Vec<c_int> = membership
        .members
        .iter()
        .map(|&rank| rank as c_int)
        .collect();
    // The tag distinguishes groups that are created at the same time.
    let digest = membership.name().bytes().fold(0u32, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(u32::from(byte))
    });
    let tag = (digest % 32000) as c_int;
    let mut all = MaybeUninit::uninit();
    let mut group = MaybeUninit::uninit();
    let mut comm = MaybeUninit::uninit();
    // SAFETY: each handle is used only after the call that creates it; the array has the length
    // that is passed.
    unsafe {
        let world = ffi::RSMPI_COMM_WORLD;
        check(ffi::MPI_Comm_group(world, all.as_mut_ptr()))?;
        let count = ranks.len() as c_int;
        check(ffi::MPI_Group_incl(
            all.assume_init(),
            count,
            ranks.as_ptr(),
            group.as_mut_ptr(),
        ))?;
        check(ffi::MPI_Comm_create_group(
            world,
            group.assume_init(),
            tag,
            comm.as_mut_ptr(),
        ))?;
        let comm = comm.assume_init();
        check(ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
        ffi::MPI_Group_free(group.as_mut_ptr());
        ffi::MPI_Group_free(all.as_mut_ptr());
        Ok(comm)
    }
}

impl MpiState {
    fn error(&self, operation: &'static str, reason: impl ToString) -> CommError {
        self.membership.error(operation, reason)
    }

    /// Waits for a request and returns its tensors.
    fn finish(&self, operation: &'static str, mut request: Request) -> Result<Staged, CommError> {
        let start = Instant::now();
        let result = loop {
            let mut done = 0;
            // SAFETY: a live request.
            let tested =
                unsafe { ffi::MPI_Test(&mut request.request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            let waited = start.elapsed();
            match check(tested) {
                Err(reason) => break Err(reason),
                Ok(()) if done != 0 => break Ok(()),
                Ok(()) if self.aborted.load(Ordering::SeqCst) => {
                    break Err("the group was aborted".into());
                }
                Ok(()) if waited > self.timeout => {
                    break Err(format!("not done after {:.1?}", self.timeout));
                }
                // Other ranks may need the processor to make this call.
                Ok(()) if waited < Duration::from_millis(2) => std::thread::yield_now(),
                Ok(()) => std::thread::sleep(Duration::from_micros(50)),
            }
        };
        self.universe.in_flight.fetch_sub(1, Ordering::Relaxed);
        result.map_err(|reason| self.error(operation, reason))?;
        Ok(ManuallyDrop::into_inner(request.kept).staged)
    }

    fn element_type(&self, kind: Kind, op: ReduceOp) -> Result<ElementType, String> {
        let index = match op {
            ReduceOp::Sum => 0,
            ReduceOp::Min => 1,
            ReduceOp::Max => 2,
        };
        // SAFETY: constants of the library, set when it was loaded.
        let (built_in, data_type) = unsafe {
            let built_in = [ffi::RSMPI_SUM, ffi::RSMPI_MIN, ffi::RSMPI_MAX][index];
            let data_type = match kind {
                Kind::Float => ffi::RSMPI_FLOAT,
                Kind::Double => ffi::RSMPI_DOUBLE,
                Kind::Int64 => ffi::RSMPI_INT64_T,
                Kind::Int => ffi::RSMPI_INT32_T,
                Kind::Int16 => ffi::RSMPI_INT16_T,
                Kind::Int8 => ffi::RSMPI_INT8_T,
                Kind::Uint8 | Kind::Bool => ffi::RSMPI_UINT8_T,
                Kind::BFloat16 | Kind::Half => ffi::RSMPI_UINT16_T,
                other => return Err(format!("MPI does not support {other:?}")),
            };
            (built_in, data_type)
        };
        let reduction = match kind {
            Kind::BFloat16 => self.universe.reductions.bf16[index],
            Kind::Half => self.universe.reductions.f16[index],
            _ => built_in,
        };
        Ok(ElementType {
            data_type,
            reduction,
        })
    }

    fn data_type(&self, kind: Kind) -> Result<ffi::MPI_Datatype, String> {
        Ok(self.element_type(kind, ReduceOp::Sum)?.data_type)
    }
}

/// Converts a number of elements to MPI 3's type.
fn count(elements: usize) -> Result<c_int, String> {
    c_int::try_from(elements).map_err(|_| {
        format!(
            "{elements} elements are more than MPI supports in one call (2^31 - 1): split the \
             tensor, or use run.backend: gloo"
        )
    })
}

/// Returns a type for one row of `tensor`, so that counts are rows.
fn row_type(tensor: &Tensor) -> Result<RowType, String> {
    let elements = tensor.size().iter().skip(1).product::<i64>() as usize;
    let bytes = count(elements * tensor.kind().elt_size_in_bytes())?;
    let mut row = MaybeUninit::uninit();
    // SAFETY: a type made of bytes, committed before use.
    unsafe {
        check(ffi::MPI_Type_contiguous(
            bytes,
            ffi::RSMPI_UINT8_T,
            row.as_mut_ptr(),
        ))?;
        let mut row = row.assume_init();
        check(ffi::MPI_Type_commit(&mut row))?;
        Ok(RowType(row))
    }
}

fn row_counts(splits: &[i64]) -> Result<RowCounts, String> {
    count(splits.iter().sum::<i64>() as usize)?;
    let mut counts = Vec::with_capacity(splits.len());
    let mut offsets = Vec::with_capacity(splits.len());
    let mut end = 0;
    for &rows in splits {
        let rows = count(rows as usize)?;
        offsets.push(end);
        counts.push(rows);
        end += rows;
    }
    Ok(RowCounts { counts, offsets })
}

impl Communicator for Mpi {
    fn backend(&self) -> &'static str {
        "mpi"
    }
    fn rank(&self) -> usize {
        self.state.membership.position
    }
    fn size(&self) -> usize {
        self.state.membership.members.len()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        // A copy, since the bindings lack the macro MPI_IN_PLACE.
        let input = tch::no_grad(|| tensor.copy());
        let tensors = [tensor, &input];
        self.start("all_reduce", &tensors, true, |state, host, request| {
            let element = state.element_type(host[0].kind(), op)?;
            let input = host[1].data_ptr();
            let output = host[0].data_ptr();
            let elements = count(host[0].numel())?;
            // SAFETY: both tensors are contiguous and of equal size, and live until the request is
            // complete.
            check(unsafe {
                ffi::MPI_Iallreduce(
                    input,
                    output,
                    elements,
                    element.data_type,
                    element.reduction,
                    state.comm,
                    request,
                )
            })?;
            Ok(None)
        })
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.start("broadcast", &[tensor], true, |state, host, request| {
            let data_type = state.data_type(host[0].kind())?;
            let data = host[0].data_ptr();
            let elements = count(host[0].numel())?;
            let root = root as c_int;
            // SAFETY: the tensor lives until the request is complete.
            check(unsafe {
                ffi::MPI_Ibcast(data, elements, data_type, root, state.comm, request)
            })?;
            Ok(None)
        })
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        let size = self.size();
        if output.numel() != input.numel() * size || output.kind() != input.kind() {
            let output = output.size();
            let input = input.size();
            let reason = format!("{output:?} does not hold {input:?} of {size} ranks");
            return Err(self.state.error("all_gather", reason));
        }
        let tensors = [output, input];
        self.start("all_gather", &tensors, true, |state, host, request| {
            let data_type = state.data_type(host[0].kind())?;
            let input = host[1].data_ptr();
            let output = host[0].data_ptr();
            let elements = count(host[1].numel())?;
            // SAFETY: contiguous tensors of matching sizes, which live until the request is
            // complete.
            check(unsafe {
                ffi::MPI_Iallgather(
                    input, elements, data_type, output, elements, data_type, state.comm, request,
                )
            })?;
            Ok(None)
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        let size = self.size();
        if input.numel() != output.numel() * size || output.kind() != input.kind() {
            let output = output.size();
            let input = input.size();
            let reason = format!("{input:?} does not hold {output:?} for {size} ranks");
            return Err(self.state.error("reduce_scatter", reason));
        }
        let tensors = [output, input];
        self.start("reduce_scatter", &tensors, true, |state, host, request| {
            let element = state.element_type(host[0].kind(), op)?;
            let input = host[1].data_ptr();
            let output = host[0].data_ptr();
            let elements = count(host[0].numel())?;
            // SAFETY: contiguous tensors of matching sizes, which live until the request is
            // complete.
            check(unsafe {
                ffi::MPI_Ireduce_scatter_block(
                    input,
                    output,
                    elements,
                    element.data_type,
                    element.reduction,
                    state.comm,
                    request,
                )
            })?;
            Ok(None)
        })
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        check_splits(output, input, output_splits, input_splits, self.size())
            .map_err(|e| self.state.error("all_to_all", e))?;
        let tensors = [output, input];
        self.start("all_to_all", &tensors, true, |state, host, request| {
            let arguments = AlltoallvArguments {
                row: row_type(&host[1])?,
                sent: row_counts(input_splits)?,
                received: row_counts(output_splits)?,
            };
            let AlltoallvArguments {
                row,
                sent,
                received,
            } = &arguments;
            // SAFETY: the splits match the tensors. Tensors and arguments live until the request is
            // complete; moving the arguments does not move the contents of their vectors.
            check(unsafe {
                ffi::MPI_Ialltoallv(
                    host[1].data_ptr(),
                    sent.counts.as_ptr(),
                    sent.offsets.as_ptr(),
                    row.0,
                    host[0].data_ptr(),
                    received.counts.as_ptr(),
                    received.offsets.as_ptr(),
                    row.0,
                    state.comm,
                    request,
                )
            })?;
            Ok(Some(arguments))
        })
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.start("send", &[tensor], false, |state, host, request| {
            let data_type = state.data_type(host[0].kind())?;
            let data = host[0].data_ptr();
            let elements = count(host[0].numel())?;
            let to = to as c_int;
            // SAFETY: the tensor lives until the request is complete.
            check(unsafe {
                ffi::MPI_Isend(data, elements, data_type, to, tag, state.comm, request)
            })?;
            Ok(None)
        })
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.start("recv", &[tensor], true, |state, host, request| {
            let data_type = state.data_type(host[0].kind())?;
            let data = host[0].data_ptr();
            let elements = count(host[0].numel())?;
            let from = from as c_int;
            // SAFETY: the tensor lives until the request is complete.
            check(unsafe {
                ffi::MPI_Irecv(data, elements, data_type, from, tag, state.comm, request)
            })?;
            Ok(None)
        })
    }
    fn barrier(&self) -> Result<Work, CommError> {
        self.start("barrier", &[], false, |state, _, request| {
            // SAFETY: a live communicator.
            check(unsafe { ffi::MPI_Ibarrier(state.comm, request) })?;
            Ok(None)
        })
    }
    fn abort(&self) {
        self.state.aborted.store(true, Ordering::SeqCst);
    }
}
