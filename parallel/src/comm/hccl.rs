//! HCCL, for tensors on Ascend NPUs.
//!
//! Signatures and numbers are those of hccl.h and hccl_types.h of CANN (github.com/Ascend/pytorch,
//! third_party/hccl/inc/hccl), and for AscendCL those of acl_rt.h (third_party/acl/inc/acl). HCCL
//! has not run on hardware yet: the tests use a library that implements its interface in host
//! memory.

use super::{
    ReduceOp,
    device_comm::{Elements, LaunchTarget, Library, Message, Parts},
};
use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::OnceLock,
};
use tch::Kind;

/// `HcclResult`; `HCCL_SUCCESS` is 0.
type Code = c_int;
/// A communicator handle: `HcclComm`.
type Comm = *mut c_void;
/// The number of an `HcclDataType`.
type Type = c_int;
/// The number of an `HcclReduceOp`.
type Op = c_int;
/// A stream handle: `aclrtStream`.
type StreamHandle = *mut c_void;
type Data = *mut c_void;

/// The value of `HCCL_ROOT_INFO_BYTES`.
const ROOT_INFO: usize = 4108;

/// A message: the layout of `HcclSendRecvItem`.
#[repr(C)]
struct Item {
    /// `HCCL_SEND` is 0, `HCCL_RECV` 1.
    direction: c_int,
    data: Data,
    count: u64,
    kind: Type,
    peer: u32,
}

/// The functions of the library that moerun calls.
pub(crate) struct Hccl {
    get_root_info: unsafe extern "C" fn(*mut c_char) -> Code,
    init_root_info: unsafe extern "C" fn(u32, *const c_char, u32, *mut Comm) -> Code,
    async_error: unsafe extern "C" fn(Comm, *mut Code) -> Code,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    all_reduce: unsafe extern "C" fn(Data, Data, u64, Type, Op, Comm, StreamHandle) -> Code,
    broadcast: unsafe extern "C" fn(Data, u64, Type, u32, Comm, StreamHandle) -> Code,
    all_gather: unsafe extern "C" fn(Data, Data, u64, Type, Comm, StreamHandle) -> Code,
    reduce_scatter: unsafe extern "C" fn(Data, Data, u64, Type, Op, Comm, StreamHandle) -> Code,
    all_to_all_v: unsafe extern "C" fn(
        Data,
        *const u64,
        *const u64,
        Type,
        Data,
        *const u64,
        *const u64,
        Type,
        Comm,
        StreamHandle,
    ) -> Code,
    send: unsafe extern "C" fn(Data, u64, Type, u32, Comm, StreamHandle) -> Code,
    recv: unsafe extern "C" fn(Data, u64, Type, u32, Comm, StreamHandle) -> Code,
    batch: unsafe extern "C" fn(*mut Item, u32, Comm, StreamHandle) -> Code,
    /// `aclGetRecentErrMsg` (acl_rt.h): this thread's last error.
    recent_error: unsafe extern "C" fn() -> *const c_char,
    /// `aclrtStreamAbort` (acl_rt.h): aborts the operations on a stream. CANN has it since 8.2.
    stream_abort: Option<unsafe extern "C" fn(StreamHandle) -> c_int>,
}

/// `HCCL_DETERMINISTIC` of `HcclConfig`: every run sums in the same order.
const DETERMINISTIC: c_int = 0;

impl Hccl {
    /// Loads AscendCL and HCCL once; later calls return the first result.
    ///
    /// # Errors
    /// If one cannot be loaded; the message has a hint.
    pub(crate) fn load() -> Result<&'static Hccl, String> {
        static LOADED: OnceLock<Result<Hccl, String>> = OnceLock::new();
        LOADED
            .get_or_init(Hccl::resolve_symbols)
            .as_ref()
            .map_err(Clone::clone)
    }

    fn resolve_symbols() -> Result<Hccl, String> {
        const HINT: &str = "HCCL is needed for tensors on Ascend NPUs: source CANN's set_env.sh, \
            or use run.backend: auto";
        let open = |file| {
            let library = torch_ext::load_library(file, torch_ext::ASCEND_FOLDER, HINT);
            library.map_err(|e| e.to_string())
        };
        let acl = open("libascendcl.so")?;
        let hccl = open("libhccl.so")?;
        let old = |e: libloading::Error| format!("CANN is too old: {e}");
        type SetConfig = unsafe extern "C" fn(c_int, i32) -> Code;
        // SAFETY: the types of the fields are those of the headers named above. `HcclConfigValue`
        // is a union of one int32.
        unsafe {
            let set_config = hccl.get::<SetConfig>(b"HcclSetConfig\0").map_err(old)?;
            set_config(DETERMINISTIC, 1);
            Ok(Hccl {
                get_root_info: *hccl.get(b"HcclGetRootInfo\0").map_err(old)?,
                init_root_info: *hccl.get(b"HcclCommInitRootInfo\0").map_err(old)?,
                async_error: *hccl.get(b"HcclGetCommAsyncError\0").map_err(old)?,
                error_string: *hccl.get(b"HcclGetErrorString\0").map_err(old)?,
                all_reduce: *hccl.get(b"HcclAllReduce\0").map_err(old)?,
                broadcast: *hccl.get(b"HcclBroadcast\0").map_err(old)?,
                all_gather: *hccl.get(b"HcclAllGather\0").map_err(old)?,
                reduce_scatter: *hccl.get(b"HcclReduceScatter\0").map_err(old)?,
                all_to_all_v: *hccl.get(b"HcclAlltoAllV\0").map_err(old)?,
                send: *hccl.get(b"HcclSend\0").map_err(old)?,
                recv: *hccl.get(b"HcclRecv\0").map_err(old)?,
                batch: *hccl.get(b"HcclBatchSendRecv\0").map_err(old)?,
                recent_error: *acl.get(b"aclGetRecentErrMsg\0").map_err(old)?,
                stream_abort: acl.get(b"aclrtStreamAbort\0").ok().map(|symbol| *symbol),
            })
        }
    }

    fn check(&self, code: Code) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let text = |pointer: *const c_char| {
            if pointer.is_null() {
                String::new()
            } else {
                // SAFETY: a string of the library, which lives until this thread's next error.
                let text = unsafe { CStr::from_ptr(pointer) }.to_string_lossy();
                text.trim().to_string()
            }
        };
        // SAFETY: may be called at any time with any code.
        let name = text(unsafe { (self.error_string)(code) });
        // SAFETY: may be called at any time.
        let more = text(unsafe { (self.recent_error)() });
        let separator = if more.is_empty() { "" } else { ": " };
        Err(format!("HCCL: error {code}, {name}{separator}{more}"))
    }
}

/// A communicator. It lives as long as the process: destroying it may wait for peers that have
/// exited.
pub(crate) struct HcclComm(Comm);

// SAFETY: `AbortableComm` serializes all calls but an abort, which concerns only the stream.
unsafe impl Send for HcclComm {}
// SAFETY: as above.
unsafe impl Sync for HcclComm {}

fn data_type(kind: Kind) -> Result<Type, String> {
    Ok(match kind {
        Kind::Int8 => 0,
        Kind::Int16 => 1,
        Kind::Int => 2,
        Kind::Half => 3,
        Kind::Float => 4,
        Kind::Int64 => 5,
        Kind::Uint8 | Kind::Bool => 7,
        Kind::Double => 10,
        Kind::BFloat16 => 11,
        other => return Err(format!("HCCL does not support {other:?}")),
    })
}

fn reduction(op: ReduceOp) -> Op {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
    }
}

/// Returns the offset of each rank's part.
fn offsets(counts: &[u64]) -> Vec<u64> {
    let mut end = 0;
    let offset = |count: &u64| {
        end += count;
        end - count
    };
    counts.iter().map(offset).collect()
}

impl Library for Hccl {
    type Comm = HcclComm;

    const NAME: &'static str = "hccl";

    fn new_id(&self) -> Result<Vec<u8>, String> {
        let mut info = vec![0u8; ROOT_INFO];
        // SAFETY: the buffer has room for the whole structure.
        self.check(unsafe { (self.get_root_info)(info.as_mut_ptr().cast()) })?;
        Ok(info)
    }

    fn join(&self, id: &[u8], rank: usize, size: usize) -> Result<HcclComm, String> {
        if id.len() != ROOT_INFO {
            let len = id.len();
            return Err(format!(
                "received an id of {len} bytes instead of {ROOT_INFO}"
            ));
        }
        let mut comm = std::ptr::null_mut();
        // SAFETY: a structure of the right size and an out-parameter; this thread's current device
        // is the rank's.
        self.check(unsafe {
            (self.init_root_info)(size as u32, id.as_ptr().cast(), rank as u32, &mut comm)
        })?;
        Ok(HcclComm(comm))
    }

    fn abort(&self, _comm: &HcclComm, stream: *mut c_void) {
        if let Some(stream_abort) = self.stream_abort {
            // SAFETY: a stream of libtorch, which lives as long as the process.
            unsafe { stream_abort(stream) };
        }
    }

    fn failure(&self, comm: &HcclComm) -> Option<String> {
        let mut error = 0;
        // SAFETY: a live communicator and an out-parameter.
        let code = unsafe { (self.async_error)(comm.0, &mut error) };
        self.check(if code == 0 { error } else { code }).err()
    }

    /// The kinds that hccl.h lists for `HcclAllReduce` and `HcclReduceScatter`.
    fn supports_reduction(&self, kind: Kind, operation: &str) -> bool {
        match kind {
            Kind::Int8 | Kind::Int | Kind::Half | Kind::Float | Kind::BFloat16 => true,
            Kind::Int16 => operation == "all_reduce",
            _ => false,
        }
    }

    unsafe fn all_reduce(
        &self,
        to: &LaunchTarget<Self>,
        data: Data,
        elements: Elements,
        op: ReduceOp,
    ) -> Result<(), String> {
        let count = elements.count as u64;
        let kind = data_type(elements.kind)?;
        // SAFETY: as the caller promises; the operation may be in place.
        self.check(unsafe {
            (self.all_reduce)(data, data, count, kind, reduction(op), to.comm.0, to.stream)
        })
    }

    unsafe fn broadcast(
        &self,
        to: &LaunchTarget<Self>,
        data: Data,
        elements: Elements,
        root: usize,
    ) -> Result<(), String> {
        let count = elements.count as u64;
        let kind = data_type(elements.kind)?;
        // SAFETY: as the caller promises.
        self.check(unsafe {
            (self.broadcast)(data, count, kind, root as u32, to.comm.0, to.stream)
        })
    }

    unsafe fn all_gather(
        &self,
        to: &LaunchTarget<Self>,
        out: Data,
        data: Data,
        elements: Elements,
    ) -> Result<(), String> {
        let count = elements.count as u64;
        let kind = data_type(elements.kind)?;
        // SAFETY: as the caller promises.
        self.check(unsafe { (self.all_gather)(data, out, count, kind, to.comm.0, to.stream) })
    }

    unsafe fn reduce_scatter(
        &self,
        to: &LaunchTarget<Self>,
        out: Data,
        data: Data,
        elements: Elements,
        op: ReduceOp,
    ) -> Result<(), String> {
        let count = elements.count as u64;
        let kind = data_type(elements.kind)?;
        // SAFETY: as the caller promises.
        self.check(unsafe {
            (self.reduce_scatter)(data, out, count, kind, reduction(op), to.comm.0, to.stream)
        })
    }

    unsafe fn all_to_all(
        &self,
        to: &LaunchTarget<Self>,
        out: Parts,
        data: Parts,
        kind: Kind,
    ) -> Result<(), String> {
        let counts = |parts: Parts| -> Vec<u64> {
            let counts = parts.counts.iter();
            counts.map(|&count| count as u64).collect()
        };
        let receive = counts(out);
        let send = counts(data);
        let kind = data_type(kind)?;
        let receive_offsets = offsets(&receive);
        let send_offsets = offsets(&send);
        // SAFETY: as the caller promises; the call reads the four lists before it returns.
        self.check(unsafe {
            (self.all_to_all_v)(
                data.data,
                send.as_ptr(),
                send_offsets.as_ptr(),
                kind,
                out.data,
                receive.as_ptr(),
                receive_offsets.as_ptr(),
                kind,
                to.comm.0,
                to.stream,
            )
        })
    }

    unsafe fn messages(&self, to: &LaunchTarget<Self>, messages: &[Message]) -> Result<(), String> {
        let comm = to.comm.0;
        let stream = to.stream;
        if let [message] = messages {
            let call = if message.is_send {
                self.send
            } else {
                self.recv
            };
            let count = message.elements.count as u64;
            let kind = data_type(message.elements.kind)?;
            let peer = message.peer as u32;
            // SAFETY: as the caller promises.
            return self.check(unsafe { call(message.data, count, kind, peer, comm, stream) });
        }
        let mut items = Vec::with_capacity(messages.len());
        for message in messages {
            items.push(Item {
                direction: c_int::from(!message.is_send),
                data: message.data,
                count: message.elements.count as u64,
                kind: data_type(message.elements.kind)?,
                peer: message.peer as u32,
            });
        }
        // SAFETY: as the caller promises; the call reads the list before it returns.
        self.check(unsafe { (self.batch)(items.as_mut_ptr(), items.len() as u32, comm, stream) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_the_error_has_a_hint() {
        if std::env::var_os(torch_ext::ASCEND_FOLDER).is_none() {
            let error = Hccl::load().err().unwrap();
            assert!(error.contains("libascendcl.so"), "{error}");
            assert!(error.contains("set_env.sh"), "{error}");
        }
    }

    #[test]
    fn offsets_are_those_of_adjacent_parts() {
        assert_eq!(offsets(&[2, 0, 3]), [0, 2, 2]);
    }
}
