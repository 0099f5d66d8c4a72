//! NCCL, for tensors of NVIDIA GPUs. Types come from cudarc; the functions are looked up here, since cudarc asks the loader for
//! `libnccl.so`, which installations of torch do not have (theirs is `libnccl.so.2`), and panics without one. Signatures as in
//! nccl.h 2.24. Not yet run on hardware.

use super::ReduceOp;
use super::device_comm::{Elements, LaunchTarget, Library, Message};
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::os::unix::Library as DynamicLibrary;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::Kind;

/// `ncclResult_t`, as a number: a newer library has values that an older list does not.
type Code = c_int;
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;

type Data = *mut c_void;
type Type = ncclDataType_t;
type Comm = ncclComm_t;
type StreamHandle = cudaStream_t;

/// The functions that are used.
pub(crate) struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> Code,
    init_rank: unsafe extern "C" fn(*mut Comm, c_int, ncclUniqueId, c_int) -> Code,
    abort: unsafe extern "C" fn(Comm) -> Code,
    async_error: unsafe extern "C" fn(Comm, *mut Code) -> Code,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    group_start: unsafe extern "C" fn() -> Code,
    group_end: unsafe extern "C" fn() -> Code,
    all_reduce:
        unsafe extern "C" fn(Data, Data, usize, Type, ncclRedOp_t, Comm, StreamHandle) -> Code,
    broadcast: unsafe extern "C" fn(Data, Data, usize, Type, c_int, Comm, StreamHandle) -> Code,
    all_gather: unsafe extern "C" fn(Data, Data, usize, Type, Comm, StreamHandle) -> Code,
    reduce_scatter:
        unsafe extern "C" fn(Data, Data, usize, Type, ncclRedOp_t, Comm, StreamHandle) -> Code,
    send: unsafe extern "C" fn(Data, usize, Type, c_int, Comm, StreamHandle) -> Code,
    recv: unsafe extern "C" fn(Data, usize, Type, c_int, Comm, StreamHandle) -> Code,
}

impl Nccl {
    /// Loads the library, once; later calls return the first answer. Beside a torch with CUDA its own one is loaded already.
    ///
    /// # Errors
    /// When it cannot be loaded: why, and what to do.
    pub(crate) fn load() -> Result<&'static Nccl, String> {
        static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| {
            const REMEDY: &str = "NCCL carries tensors of NVIDIA GPUs: run ./scripts/setup --cuda, or use \
                                  run.backend: auto";
            let library =
                torch_ext::load_library("libnccl.so.2", "MOERUN_TORCH_LIB", REMEDY).map_err(|e| e.to_string())?;
            // SAFETY: the types of the fields are nccl.h's.
            unsafe { Nccl::of(library) }.map_err(|e| format!("libnccl.so.2 is too old: {e}"))
        });
        loaded.as_ref().map_err(Clone::clone)
    }

    unsafe fn of(library: &DynamicLibrary) -> Result<Nccl, libloading::Error> {
        // SAFETY: as the caller promises.
        unsafe {
            Ok(Nccl {
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                init_rank: *library.get(b"ncclCommInitRank\0")?,
                abort: *library.get(b"ncclCommAbort\0")?,
                async_error: *library.get(b"ncclCommGetAsyncError\0")?,
                error_string: *library.get(b"ncclGetErrorString\0")?,
                last_error: *library.get(b"ncclGetLastError\0")?,
                group_start: *library.get(b"ncclGroupStart\0")?,
                group_end: *library.get(b"ncclGroupEnd\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                broadcast: *library.get(b"ncclBroadcast\0")?,
                all_gather: *library.get(b"ncclAllGather\0")?,
                reduce_scatter: *library.get(b"ncclReduceScatter\0")?,
                send: *library.get(b"ncclSend\0")?,
                recv: *library.get(b"ncclRecv\0")?,
            })
        }
    }

    fn check(&self, code: Code, comm: Comm) -> Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        let text = |pointer: *const c_char| {
            if pointer.is_null() {
                String::new()
            } else {
                // SAFETY: strings of the library, which live until the next error of the communicator.
                unsafe { CStr::from_ptr(pointer) }
                    .to_string_lossy()
                    .into_owned()
            }
        };
        // SAFETY: both take any code and any live communicator, or none.
        let (name, more) = unsafe {
            (
                text((self.error_string)(code)),
                text((self.last_error)(comm)),
            )
        };
        Err(format!(
            "NCCL: {name}{}{more}",
            if more.is_empty() { "" } else { ": " }
        ))
    }

    /// Calls between the two count as one operation.
    fn grouped(&self, comm: Comm, body: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        // SAFETY: no arguments; each start has its end, whatever happens between them.
        self.check(unsafe { (self.group_start)() }, comm)?;
        let body = body();
        // SAFETY: as above.
        let end = self.check(unsafe { (self.group_end)() }, comm);
        body.and(end)
    }
}

/// A communicator, which an abort ends.
pub(crate) struct NcclComm {
    comm: Comm,
    aborted: AtomicBool,
}

// SAFETY: NCCL allows calls from any thread, one at a time (the lane's lock), and an abort beside them.
unsafe impl Send for NcclComm {}
// SAFETY: as above.
unsafe impl Sync for NcclComm {}

fn element(kind: Kind) -> Result<Type, String> {
    Ok(match kind {
        Kind::Int8 => Type::ncclInt8,
        Kind::Uint8 | Kind::Bool => Type::ncclUint8,
        Kind::Int => Type::ncclInt32,
        Kind::Int64 => Type::ncclInt64,
        Kind::Half => Type::ncclFloat16,
        Kind::Float => Type::ncclFloat32,
        Kind::Double => Type::ncclFloat64,
        Kind::BFloat16 => Type::ncclBfloat16,
        other => return Err(format!("NCCL carries no {other:?}")),
    })
}

fn reduction(op: ReduceOp) -> ncclRedOp_t {
    match op {
        ReduceOp::Sum => ncclRedOp_t::ncclSum,
        ReduceOp::Min => ncclRedOp_t::ncclMin,
        ReduceOp::Max => ncclRedOp_t::ncclMax,
    }
}

impl Library for Nccl {
    type Comm = NcclComm;

    const NAME: &'static str = "nccl";

    fn new_id(&self) -> Result<Vec<u8>, String> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: an out-parameter.
        self.check(
            unsafe { (self.get_unique_id)(&mut id) },
            std::ptr::null_mut(),
        )?;
        Ok(id.internal.iter().map(|&byte| byte as u8).collect())
    }

    fn join(&self, id: &[u8], rank: usize, size: usize) -> Result<NcclComm, String> {
        let mut unique = ncclUniqueId { internal: [0; 128] };
        if id.len() != unique.internal.len() {
            return Err(format!("an id of {} bytes came instead of 128", id.len()));
        }
        for (to, &from) in unique.internal.iter_mut().zip(id) {
            *to = from as c_char;
        }
        let mut comm = std::ptr::null_mut();
        // SAFETY: an out-parameter; the thread is on the rank's device.
        let code = unsafe { (self.init_rank)(&mut comm, size as c_int, unique, rank as c_int) };
        self.check(code, std::ptr::null_mut())?;
        Ok(NcclComm {
            comm,
            aborted: AtomicBool::new(false),
        })
    }

    fn abort(&self, comm: &NcclComm, _stream: *mut c_void) {
        if !comm.aborted.swap(true, Ordering::SeqCst) {
            // SAFETY: a live communicator, ended once; kernels that wait inside it end.
            unsafe { (self.abort)(comm.comm) };
        }
    }

    fn failure(&self, comm: &NcclComm) -> Option<String> {
        if comm.aborted.load(Ordering::SeqCst) {
            return None;
        }
        let mut error = SUCCESS;
        // SAFETY: a live communicator and an out-parameter.
        let code = unsafe { (self.async_error)(comm.comm, &mut error) };
        let found = if code == SUCCESS { error } else { code };
        if found == IN_PROGRESS {
            None
        } else {
            self.check(found, comm.comm).err()
        }
    }

    fn supports_reduction(&self, kind: Kind, _operation: &str) -> bool {
        element(kind).is_ok()
    }

    unsafe fn all_reduce(
        &self,
        to: &LaunchTarget<Self>,
        data: Data,
        run: Elements,
        op: ReduceOp,
    ) -> Result<(), String> {
        let kind = element(run.kind)?;
        let comm = to.comm.comm;
        let stream = to.stream.cast();
        // SAFETY: the caller's promise; in place is allowed.
        self.check(
            unsafe { (self.all_reduce)(data, data, run.count, kind, reduction(op), comm, stream) },
            comm,
        )
    }

    unsafe fn broadcast(
        &self,
        to: &LaunchTarget<Self>,
        data: Data,
        run: Elements,
        root: usize,
    ) -> Result<(), String> {
        let kind = element(run.kind)?;
        let comm = to.comm.comm;
        let stream = to.stream.cast();
        // SAFETY: the caller's promise; in place is allowed.
        self.check(
            unsafe { (self.broadcast)(data, data, run.count, kind, root as c_int, comm, stream) },
            comm,
        )
    }

    unsafe fn all_gather(
        &self,
        to: &LaunchTarget<Self>,
        out: Data,
        data: Data,
        run: Elements,
    ) -> Result<(), String> {
        let kind = element(run.kind)?;
        let comm = to.comm.comm;
        let stream = to.stream.cast();
        // SAFETY: the caller's promise.
        self.check(
            unsafe { (self.all_gather)(data, out, run.count, kind, comm, stream) },
            comm,
        )
    }

    unsafe fn reduce_scatter(
        &self,
        to: &LaunchTarget<Self>,
        out: Data,
        data: Data,
        run: Elements,
        op: ReduceOp,
    ) -> Result<(), String> {
        let kind = element(run.kind)?;
        let comm = to.comm.comm;
        let stream = to.stream.cast();
        // SAFETY: the caller's promise.
        self.check(
            unsafe {
                (self.reduce_scatter)(data, out, run.count, kind, reduction(op), comm, stream)
            },
            comm,
        )
    }

    unsafe fn all_to_all(
        &self,
        to: &LaunchTarget<Self>,
        (out, receive): (Data, &[usize]),
        (data, send): (Data, &[usize]),
        kind: Kind,
    ) -> Result<(), String> {
        let runs = |sends: bool, begin: Data, counts: &[usize]| -> Vec<Message> {
            let mut at = 0;
            let part = |(peer, &count): (usize, &usize)| {
                let data = begin.wrapping_byte_add(at * kind.elt_size_in_bytes());
                at += count;
                Message {
                    sends,
                    data,
                    run: Elements { count, kind },
                    peer,
                }
            };
            counts
                .iter()
                .enumerate()
                .map(part)
                .filter(|message| message.run.count > 0)
                .collect()
        };
        let mut all = runs(true, data, send);
        all.extend(runs(false, out, receive));
        // SAFETY: the caller's promise: the runs lie inside the two.
        unsafe { self.messages(to, &all) }
    }

    unsafe fn messages(&self, to: &LaunchTarget<Self>, messages: &[Message]) -> Result<(), String> {
        let comm = to.comm.comm;
        let stream = to.stream.cast();
        self.grouped(comm, || {
            messages.iter().try_for_each(|message| {
                let kind = element(message.run.kind)?;
                let count = message.run.count;
                let peer = message.peer as c_int;
                let call = if message.sends { self.send } else { self.recv };
                // SAFETY: the caller's promise.
                self.check(
                    unsafe { call(message.data, count, kind, peer, comm, stream) },
                    comm,
                )
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_it_says_what_to_do() {
        if let Err(text) = Nccl::load() {
            assert!(
                text.contains("libnccl.so.2") && text.contains("setup --cuda"),
                "{text}"
            );
        }
    }
}
