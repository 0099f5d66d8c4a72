//! NCCL, for tensors on NVIDIA GPUs.
//!
//! The types come from cudarc, but the functions are resolved here: cudarc loads `libnccl.so`,
//! which installations of torch do not have (theirs is `libnccl.so.2`), and panics without it. The
//! signatures are those of nccl.h 2.24. NCCL has not run on hardware yet.

use super::{
    ReduceOp,
    device_comm::{Elements, LaunchTarget, Library, Message, Parts},
};
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::os::unix::Library as DynamicLibrary;
use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::OnceLock,
};
use tch::Kind;

/// `ncclResult_t` as a number, since a newer library returns values that the enum does not have.
type Code = c_int;
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;

type Data = *mut c_void;
type Type = ncclDataType_t;
type Comm = ncclComm_t;
type StreamHandle = cudaStream_t;

/// The functions of the library that moerun calls.
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
    /// Loads the library once; later calls return the first result. A torch with CUDA has loaded
    /// its own already.
    ///
    /// # Errors
    /// If it cannot be loaded; the message has a hint.
    pub(crate) fn load() -> Result<&'static Nccl, String> {
        static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| {
            const HINT: &str = "NCCL is needed for tensors on NVIDIA GPUs: run ./scripts/setup \
                --cuda, or use run.backend: auto";
            let library = torch_ext::load_library("libnccl.so.2", "MOERUN_TORCH_LIB", HINT)
                .map_err(|e| e.to_string())?;
            // SAFETY: the types of the fields are those of nccl.h.
            let nccl = unsafe { Nccl::from_library(library) };
            nccl.map_err(|e| format!("libnccl.so.2 is too old: {e}"))
        });
        loaded.as_ref().map_err(Clone::clone)
    }

    /// # Safety
    /// The library must have the functions of nccl.h.
    unsafe fn from_library(library: &DynamicLibrary) -> Result<Nccl, libloading::Error> {
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

    fn check(&self, code: Code) -> Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        let text = |pointer: *const c_char| {
            if pointer.is_null() {
                String::new()
            } else {
                // SAFETY: a string of the library, which lives until this thread's next error.
                let text = unsafe { CStr::from_ptr(pointer) };
                text.to_string_lossy().into_owned()
            }
        };
        // SAFETY: any code is valid.
        let name = text(unsafe { (self.error_string)(code) });
        // SAFETY: the function takes null, since it does not use the communicator.
        let more = text(unsafe { (self.last_error)(std::ptr::null_mut()) });
        let separator = if more.is_empty() { "" } else { ": " };
        Err(format!("NCCL: {name}{separator}{more}"))
    }

    /// Runs the calls of `body` as one operation.
    fn grouped(&self, body: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        // SAFETY: no arguments; the end follows each start, even after an error.
        self.check(unsafe { (self.group_start)() })?;
        let body = body();
        // SAFETY: as above.
        let end = self.check(unsafe { (self.group_end)() });
        body.and(end)
    }
}

/// A communicator, which an abort destroys.
pub(crate) struct NcclComm(Comm);

// SAFETY: NCCL allows calls from any thread, one at a time, which `AbortableComm` ensures, and an
// abort during a call.
unsafe impl Send for NcclComm {}
// SAFETY: as above.
unsafe impl Sync for NcclComm {}

fn data_type(kind: Kind) -> Result<Type, String> {
    Ok(match kind {
        Kind::Int8 => Type::ncclInt8,
        Kind::Uint8 | Kind::Bool => Type::ncclUint8,
        Kind::Int => Type::ncclInt32,
        Kind::Int64 => Type::ncclInt64,
        Kind::Half => Type::ncclFloat16,
        Kind::Float => Type::ncclFloat32,
        Kind::Double => Type::ncclFloat64,
        Kind::BFloat16 => Type::ncclBfloat16,
        other => return Err(format!("NCCL does not support {other:?}")),
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
        // SAFETY: `id` is an out-parameter.
        self.check(unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id.internal.iter().map(|&byte| byte as u8).collect())
    }

    fn join(&self, id: &[u8], rank: usize, size: usize) -> Result<NcclComm, String> {
        let mut unique = ncclUniqueId { internal: [0; 128] };
        if id.len() != unique.internal.len() {
            let len = id.len();
            return Err(format!("received an id of {len} bytes instead of 128"));
        }
        for (to, &from) in unique.internal.iter_mut().zip(id) {
            *to = from as c_char;
        }
        let mut comm = std::ptr::null_mut();
        // SAFETY: an out-parameter; this thread's current device is the rank's.
        let code = unsafe { (self.init_rank)(&mut comm, size as c_int, unique, rank as c_int) };
        self.check(code)?;
        Ok(NcclComm(comm))
    }

    fn abort(&self, comm: &NcclComm, _stream: *mut c_void) {
        // SAFETY: a live communicator, aborted once; kernels that wait inside it end.
        unsafe { (self.abort)(comm.0) };
    }

    fn failure(&self, comm: &NcclComm) -> Option<String> {
        let mut error = SUCCESS;
        // SAFETY: a live communicator and an out-parameter.
        let code = unsafe { (self.async_error)(comm.0, &mut error) };
        let found = if code == SUCCESS { error } else { code };
        if found == IN_PROGRESS {
            None
        } else {
            self.check(found).err()
        }
    }

    fn supports_reduction(&self, kind: Kind, _operation: &str) -> bool {
        data_type(kind).is_ok()
    }

    unsafe fn all_reduce(
        &self,
        to: &LaunchTarget<Self>,
        data: Data,
        elements: Elements,
        op: ReduceOp,
    ) -> Result<(), String> {
        let count = elements.count;
        let kind = data_type(elements.kind)?;
        let comm = to.comm.0;
        let stream = to.stream.cast();
        // SAFETY: as the caller promises; the operation may be in place.
        self.check(unsafe {
            (self.all_reduce)(data, data, count, kind, reduction(op), comm, stream)
        })
    }

    unsafe fn broadcast(
        &self,
        to: &LaunchTarget<Self>,
        data: Data,
        elements: Elements,
        root: usize,
    ) -> Result<(), String> {
        let count = elements.count;
        let kind = data_type(elements.kind)?;
        let comm = to.comm.0;
        let stream = to.stream.cast();
        // SAFETY: as the caller promises; the operation may be in place.
        self.check(unsafe {
            (self.broadcast)(data, data, count, kind, root as c_int, comm, stream)
        })
    }

    unsafe fn all_gather(
        &self,
        to: &LaunchTarget<Self>,
        out: Data,
        data: Data,
        elements: Elements,
    ) -> Result<(), String> {
        let count = elements.count;
        let kind = data_type(elements.kind)?;
        let comm = to.comm.0;
        let stream = to.stream.cast();
        // SAFETY: as the caller promises.
        self.check(unsafe { (self.all_gather)(data, out, count, kind, comm, stream) })
    }

    unsafe fn reduce_scatter(
        &self,
        to: &LaunchTarget<Self>,
        out: Data,
        data: Data,
        elements: Elements,
        op: ReduceOp,
    ) -> Result<(), String> {
        let count = elements.count;
        let kind = data_type(elements.kind)?;
        let comm = to.comm.0;
        let stream = to.stream.cast();
        // SAFETY: as the caller promises.
        self.check(unsafe {
            (self.reduce_scatter)(data, out, count, kind, reduction(op), comm, stream)
        })
    }

    unsafe fn all_to_all(
        &self,
        to: &LaunchTarget<Self>,
        out: Parts,
        data: Parts,
        kind: Kind,
    ) -> Result<(), String> {
        let mut messages = messages_of(true, data, kind);
        messages.extend(messages_of(false, out, kind));
        // SAFETY: as the caller promises: the parts are inside the two buffers.
        unsafe { self.messages(to, &messages) }
    }

    unsafe fn messages(&self, to: &LaunchTarget<Self>, messages: &[Message]) -> Result<(), String> {
        let comm = to.comm.0;
        let stream = to.stream.cast();
        self.grouped(|| {
            for message in messages {
                let kind = data_type(message.elements.kind)?;
                let count = message.elements.count;
                let peer = message.peer as c_int;
                let call = if message.is_send {
                    self.send
                } else {
                    self.recv
                };
                // SAFETY: as the caller promises.
                let code = unsafe { call(message.data, count, kind, peer, comm, stream) };
                self.check(code)?;
            }
            Ok(())
        })
    }
}

/// Returns one message per part that is not empty.
fn messages_of(is_send: bool, parts: Parts, kind: Kind) -> Vec<Message> {
    let mut messages = Vec::new();
    let mut data = parts.data;
    for (peer, &count) in parts.counts.iter().enumerate() {
        if count > 0 {
            messages.push(Message {
                is_send,
                data,
                elements: Elements { count, kind },
                peer,
            });
        }
        data = data.wrapping_byte_add(count * kind.elt_size_in_bytes());
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_the_error_has_a_hint() {
        if let Err(error) = Nccl::load() {
            assert!(error.contains("libnccl.so.2"), "{error}");
            assert!(error.contains("setup --cuda"), "{error}");
        }
    }
}
