//! HCCL, for tensors of Ascend NPUs. Signatures and numbers as in hccl.h and hccl_types.h of CANN (github.com/Ascend/pytorch,
//! third_party/hccl/inc/hccl), those of AscendCL as in acl_rt.h (third_party/acl/inc/acl). Not yet run on hardware: the tests
//! run it against a library that has the same interface on host memory.

use super::ReduceOp;
use super::device_comm::{Elements, LaunchTarget, Library, Message};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use tch::Kind;

/// `HcclResult`; `HCCL_SUCCESS` is 0.
type Code = c_int;
/// `HcclComm`.
type Comm = *mut c_void;
/// `HcclDataType`.
type Type = c_int;
/// `HcclReduceOp`.
type Op = c_int;
/// `aclrtStream`.
type StreamHandle = *mut c_void;
type Data = *mut c_void;

/// `HCCL_ROOT_INFO_BYTES`.
const ROOT_INFO: usize = 4108;

/// `HcclSendRecvItem`.
#[repr(C)]
struct Item {
    /// `HCCL_SEND` is 0, `HCCL_RECV` 1.
    direction: c_int,
    data: Data,
    count: u64,
    kind: Type,
    peer: u32,
}

/// The functions that are used.
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
    /// `aclGetRecentErrMsg` (acl_rt.h): what went wrong last in this thread.
    recent_error: unsafe extern "C" fn() -> *const c_char,
    /// `aclrtStreamAbort` (acl_rt.h): ends what is device_comm on a stream. Versions of CANN before 8.2 do not have it.
    stream_abort: Option<unsafe extern "C" fn(StreamHandle) -> c_int>,
}

/// `HCCL_DETERMINISTIC` of `HcclConfig`: sums in an order that does not change from one time to the next.
const DETERMINISTIC: c_int = 0;

impl Hccl {
    /// Loads the two libraries, once; later calls return the first answer.
    ///
    /// # Errors
    /// When one cannot be loaded: why, and what to do.
    pub(crate) fn load() -> Result<&'static Hccl, String> {
        static LOADED: OnceLock<Result<Hccl, String>> = OnceLock::new();
        LOADED
            .get_or_init(Hccl::resolve_symbols)
            .as_ref()
            .map_err(Clone::clone)
    }

    fn resolve_symbols() -> Result<Hccl, String> {
        const REMEDY: &str = "HCCL carries tensors of Ascend NPUs: source CANN's set_env.sh, or use run.backend: auto";
        let open = |file| {
            torch_ext::load_library(file, torch_ext::ASCEND_FOLDER, REMEDY)
                .map_err(|e| e.to_string())
        };
        let acl = open("libascendcl.so")?;
        let hccl = open("libhccl.so")?;
        let old = |e: libloading::Error| format!("CANN is too old: {e}");
        // SAFETY: the types of the fields are those of the headers above; HcclConfigValue is a union of one int32.
        unsafe {
            let set_config = hccl
                .get::<unsafe extern "C" fn(c_int, i32) -> Code>(b"HcclSetConfig\0")
                .map_err(old)?;
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
                stream_abort: acl
                    .get(b"aclrtStreamAbort\0")
                    .ok()
                    .map(|function| *function),
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
                // SAFETY: strings of the library, which live until this thread's next error.
                unsafe { CStr::from_ptr(pointer) }
                    .to_string_lossy()
                    .trim()
                    .to_string()
            }
        };
        // SAFETY: both may be called at any time.
        let (name, more) =
            unsafe { (text((self.error_string)(code)), text((self.recent_error)())) };
        Err(format!(
            "HCCL: error {code}, {name}{}{more}",
            if more.is_empty() { "" } else { ": " }
        ))
    }
}

/// A communicator, which lives as long as the process: ending one whose peers are gone may wait for them.
pub(crate) struct HcclComm(Comm);

// SAFETY: calls come one at a time (the lane's lock).
unsafe impl Send for HcclComm {}
// SAFETY: as above.
unsafe impl Sync for HcclComm {}

fn element(kind: Kind) -> Result<Type, String> {
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
        other => return Err(format!("HCCL carries no {other:?}")),
    })
}

fn reduction(op: ReduceOp) -> Op {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
    }
}

/// Where each rank's part offsets.
fn offsets(counts: &[u64]) -> Vec<u64> {
    counts
        .iter()
        .scan(0, |begin, count| {
            Some(std::mem::replace(begin, *begin + count))
        })
        .collect()
}

impl Library for Hccl {
    type Comm = HcclComm;

    const NAME: &'static str = "hccl";

    fn new_id(&self) -> Result<Vec<u8>, String> {
        let mut info = vec![0u8; ROOT_INFO];
        // SAFETY: room for the whole structure.
        self.check(unsafe { (self.get_root_info)(info.as_mut_ptr().cast()) })?;
        Ok(info)
    }

    fn join(&self, id: &[u8], rank: usize, size: usize) -> Result<HcclComm, String> {
        if id.len() != ROOT_INFO {
            return Err(format!(
                "an id of {} bytes came instead of {ROOT_INFO}",
                id.len()
            ));
        }
        let mut comm = std::ptr::null_mut();
        // SAFETY: a structure of the right size and an out-parameter; the thread is on the rank's device.
        self.check(unsafe {
            (self.init_root_info)(size as u32, id.as_ptr().cast(), rank as u32, &mut comm)
        })?;
        Ok(HcclComm(comm))
    }

    fn abort(&self, _comm: &HcclComm, stream: *mut c_void) {
        if let Some(stream_abort) = self.stream_abort {
            // SAFETY: a stream of libtorch's, which lives as long as the process.
            unsafe { stream_abort(stream) };
        }
    }

    fn failure(&self, comm: &HcclComm) -> Option<String> {
        let mut error = 0;
        // SAFETY: a live communicator and an out-parameter.
        let code = unsafe { (self.async_error)(comm.0, &mut error) };
        self.check(if code == 0 { error } else { code }).err()
    }

    /// As hccl.h lists them for `HcclAllReduce` and `HcclReduceScatter`.
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
        run: Elements,
        op: ReduceOp,
    ) -> Result<(), String> {
        let count = run.count as u64;
        let kind = element(run.kind)?;
        // SAFETY: the caller's promise; in place is allowed.
        self.check(unsafe {
            (self.all_reduce)(data, data, count, kind, reduction(op), to.comm.0, to.stream)
        })
    }

    unsafe fn broadcast(
        &self,
        to: &LaunchTarget<Self>,
        data: Data,
        run: Elements,
        root: usize,
    ) -> Result<(), String> {
        let count = run.count as u64;
        let kind = element(run.kind)?;
        // SAFETY: the caller's promise.
        self.check(unsafe {
            (self.broadcast)(data, count, kind, root as u32, to.comm.0, to.stream)
        })
    }

    unsafe fn all_gather(
        &self,
        to: &LaunchTarget<Self>,
        out: Data,
        data: Data,
        run: Elements,
    ) -> Result<(), String> {
        let count = run.count as u64;
        let kind = element(run.kind)?;
        // SAFETY: the caller's promise.
        self.check(unsafe { (self.all_gather)(data, out, count, kind, to.comm.0, to.stream) })
    }

    unsafe fn reduce_scatter(
        &self,
        to: &LaunchTarget<Self>,
        out: Data,
        data: Data,
        run: Elements,
        op: ReduceOp,
    ) -> Result<(), String> {
        let count = run.count as u64;
        let kind = element(run.kind)?;
        // SAFETY: the caller's promise.
        self.check(unsafe {
            (self.reduce_scatter)(data, out, count, kind, reduction(op), to.comm.0, to.stream)
        })
    }

    unsafe fn all_to_all(
        &self,
        to: &LaunchTarget<Self>,
        (out, receive): (Data, &[usize]),
        (data, send): (Data, &[usize]),
        kind: Kind,
    ) -> Result<(), String> {
        let counts = |of: &[usize]| -> Vec<u64> { of.iter().map(|&count| count as u64).collect() };
        let receive = counts(receive);
        let send = counts(send);
        let kind = element(kind)?;
        let receive_at = offsets(&receive);
        let send_at = offsets(&send);
        // SAFETY: the caller's promise; the four lists are read before the call returns.
        self.check(unsafe {
            (self.all_to_all_v)(
                data,
                send.as_ptr(),
                send_at.as_ptr(),
                kind,
                out,
                receive.as_ptr(),
                receive_at.as_ptr(),
                kind,
                to.comm.0,
                to.stream,
            )
        })
    }

    unsafe fn messages(&self, to: &LaunchTarget<Self>, messages: &[Message]) -> Result<(), String> {
        let comm = to.comm.0;
        let stream = to.stream;
        if let [
            Message {
                sends,
                data,
                run,
                peer,
            },
        ] = messages
        {
            let call = if *sends { self.send } else { self.recv };
            // SAFETY: the caller's promise.
            return self.check(unsafe {
                call(
                    *data,
                    run.count as u64,
                    element(run.kind)?,
                    *peer as u32,
                    comm,
                    stream,
                )
            });
        }
        let item = |message: &Message| {
            let Message {
                sends,
                data,
                run,
                peer,
            } = *message;
            Ok(Item {
                direction: c_int::from(!sends),
                data,
                count: run.count as u64,
                kind: element(run.kind)?,
                peer: peer as u32,
            })
        };
        let mut items = messages
            .iter()
            .map(item)
            .collect::<Result<Vec<Item>, String>>()?;
        // SAFETY: the caller's promise; the list is read before the call returns.
        self.check(unsafe { (self.batch)(items.as_mut_ptr(), items.len() as u32, comm, stream) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_it_says_what_to_do() {
        if std::env::var_os(torch_ext::ASCEND_FOLDER).is_none() {
            let text = Hccl::load().err().unwrap();
            assert!(
                text.contains("libascendcl.so") && text.contains("set_env.sh"),
                "{text}"
            );
        }
    }

    #[test]
    fn parts_lie_behind_one_another() {
        assert_eq!(offsets(&[2, 0, 3]), [0, 2, 2]);
    }
}
