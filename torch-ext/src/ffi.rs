//! Declarations of the functions in `cpp/`, and the conversion of their return codes.

use crate::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use torch_sys::C_tensor;

pub(crate) type Handle = *mut c_void;
pub(crate) type Backward = unsafe extern "C" fn(
    Handle,
    *const *mut C_tensor,
    usize,
    *mut *mut C_tensor,
    usize,
) -> *mut c_char;
pub(crate) type Drop = unsafe extern "C" fn(Handle);
pub(crate) type StoreCall =
    unsafe extern "C" fn(Handle, *const StoreRequest, *mut i64, Handle) -> *mut c_char;
pub(crate) type StoreClone = unsafe extern "C" fn(Handle, *mut Handle) -> *mut c_char;

/// Bytes of C++, as `cpp/custom_store.cpp` declares them.
#[repr(C)]
pub(crate) struct Bytes {
    pub(crate) data: *const u8,
    pub(crate) size: usize,
}

/// An operation of a store, as `cpp/custom_store.cpp` declares it.
#[repr(C)]
pub(crate) struct StoreRequest {
    pub(crate) operation: u8,
    pub(crate) keys: *const Bytes,
    pub(crate) num_keys: usize,
    pub(crate) values: *const Bytes,
    pub(crate) num_values: usize,
    pub(crate) number: i64,
    pub(crate) timeout_ms: i64,
}

/// A network, as `cpp/gloo_device.cpp` declares it.
#[repr(C)]
pub(crate) struct PeerNetwork {
    pub(crate) address: [u8; 16],
    pub(crate) prefix: u8,
}

/// The socket of Gloo, as `cpp/gloo_device.cpp` declares it.
#[repr(C)]
pub(crate) struct GlooDevice {
    pub(crate) address: *const c_char,
    pub(crate) interface: *const c_char,
    pub(crate) key: *const c_char,
    pub(crate) certificate: *const c_char,
    pub(crate) authority: *const c_char,
    pub(crate) peers: *const PeerNetwork,
    pub(crate) num_peers: usize,
}

/// Receives a value of the store.
pub(crate) type TakeValue = unsafe extern "C" fn(*mut c_void, *const u8, usize);

unsafe extern "C" {
    fn mtx_last_error() -> *const c_char;
    pub(crate) fn mtx_attach_backward(
        inputs: *const *mut C_tensor,
        num_inputs: usize,
        outputs: *const *mut C_tensor,
        num_outputs: usize,
        state: Handle,
        backward: Backward,
        drop: Drop,
    ) -> c_int;
    pub(crate) fn mtx_grad_enabled() -> bool;

    pub(crate) fn mtx_fused_adamw(
        params: *const *mut C_tensor,
        grads: *const *mut C_tensor,
        exp_avgs: *const *mut C_tensor,
        exp_avg_sqs: *const *mut C_tensor,
        steps: *const *mut C_tensor,
        count: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        grad_scale: *mut C_tensor,
    ) -> c_int;
    pub(crate) fn mtx_generator_state(
        device_type: c_int,
        index: c_int,
        out: *mut *mut C_tensor,
    ) -> c_int;
    pub(crate) fn mtx_set_generator_state(
        device_type: c_int,
        index: c_int,
        state: *mut C_tensor,
    ) -> c_int;
    pub(crate) fn mtx_synchronize(device_type: c_int, index: c_int) -> c_int;
    pub(crate) fn mtx_set_deterministic(deterministic: bool) -> c_int;
    pub(crate) fn mtx_uses_deterministic() -> bool;
    pub(crate) fn mtx_count_host_memory() -> c_int;
    pub(crate) fn mtx_reset_peak(device_type: c_int, index: c_int) -> c_int;
    pub(crate) fn mtx_allocator_bytes(
        device_type: c_int,
        index: c_int,
        current: *mut i64,
        peak: *mut i64,
    ) -> c_int;

    pub(crate) fn mtx_store_connect(
        host: *const c_char,
        port: u16,
        timeout_ms: i64,
        out: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_store_serve(
        fd: c_int,
        host: *const c_char,
        port: u16,
        timeout_ms: i64,
        out: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_store_custom(
        state: Handle,
        call: StoreCall,
        clone: StoreClone,
        drop: Drop,
        timeout_ms: i64,
        out: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_push_value(values: Handle, data: *const u8, size: usize);
    pub(crate) fn mtx_store_prefix(store: Handle, prefix: *const c_char, out: *mut Handle)
    -> c_int;
    pub(crate) fn mtx_store_port(store: Handle, out: *mut u16) -> c_int;
    pub(crate) fn mtx_store_set(
        store: Handle,
        key: *const c_char,
        data: *const u8,
        size: usize,
    ) -> c_int;
    pub(crate) fn mtx_store_get(
        store: Handle,
        key: *const c_char,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> c_int;
    pub(crate) fn mtx_store_add(
        store: Handle,
        key: *const c_char,
        amount: i64,
        out: *mut i64,
    ) -> c_int;
    pub(crate) fn mtx_store_append(
        store: Handle,
        key: *const c_char,
        data: *const u8,
        size: usize,
    ) -> c_int;
    pub(crate) fn mtx_store_check(store: Handle, key: *const c_char, out: *mut bool) -> c_int;
    pub(crate) fn mtx_store_wait(store: Handle, key: *const c_char, timeout_ms: i64) -> c_int;
    pub(crate) fn mtx_store_multi_get(
        store: Handle,
        keys: *const *const c_char,
        count: usize,
        take: TakeValue,
        state: *mut c_void,
    ) -> c_int;
    pub(crate) fn mtx_store_free(store: Handle);
    pub(crate) fn mtx_free(data: *mut u8);

    pub(crate) fn mtx_gloo_new(
        store: Handle,
        rank: c_int,
        size: c_int,
        timeout_ms: i64,
        device: *const GlooDevice,
        out: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_gloo_free(group: Handle);
    pub(crate) fn mtx_gloo_all_reduce(
        group: Handle,
        tensor: *mut C_tensor,
        op: u8,
        work: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_gloo_broadcast(
        group: Handle,
        tensor: *mut C_tensor,
        root: i64,
        work: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_gloo_all_gather(
        group: Handle,
        output: *mut C_tensor,
        input: *mut C_tensor,
        work: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_gloo_reduce_scatter(
        group: Handle,
        output: *mut C_tensor,
        input: *mut C_tensor,
        op: u8,
        work: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_gloo_all_to_all(
        group: Handle,
        output: *mut C_tensor,
        input: *mut C_tensor,
        output_splits: *const i64,
        input_splits: *const i64,
        count: usize,
        work: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_gloo_send(
        group: Handle,
        tensor: *mut C_tensor,
        to: c_int,
        tag: c_int,
        work: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_gloo_recv(
        group: Handle,
        tensor: *mut C_tensor,
        from: c_int,
        tag: c_int,
        work: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_gloo_barrier(group: Handle, work: *mut Handle) -> c_int;
    pub(crate) fn mtx_work_is_completed(work: Handle, out: *mut bool) -> c_int;
    pub(crate) fn mtx_work_wait(work: Handle, timeout_ms: i64) -> c_int;
    pub(crate) fn mtx_work_abort(work: Handle) -> c_int;
    pub(crate) fn mtx_work_free(work: Handle);

    pub(crate) fn mtx_use_device(kind: c_int, index: c_int) -> c_int;
    pub(crate) fn mtx_stream_current(like: *mut C_tensor, out: *mut Handle) -> c_int;
    pub(crate) fn mtx_stream_from_pool(
        like: *mut C_tensor,
        high_priority: bool,
        out: *mut Handle,
    ) -> c_int;
    pub(crate) fn mtx_stream_make_current(stream: Handle) -> c_int;
    pub(crate) fn mtx_stream_record_tensor(stream: Handle, tensor: *mut C_tensor) -> c_int;
    pub(crate) fn mtx_stream_handle(stream: Handle, out: *mut *mut c_void) -> c_int;
    pub(crate) fn mtx_stream_free(stream: Handle);
    pub(crate) fn mtx_event_record(stream: Handle, out: *mut Handle) -> c_int;
    pub(crate) fn mtx_event_block(event: Handle, stream: Handle) -> c_int;
    pub(crate) fn mtx_event_query(event: Handle, out: *mut bool) -> c_int;
    pub(crate) fn mtx_event_synchronize(event: Handle) -> c_int;
    pub(crate) fn mtx_event_free(event: Handle);
    pub(crate) fn mtx_pinned(bytes: i64, out: *mut *mut C_tensor) -> c_int;
    pub(crate) fn mtx_serve_as_mps() -> c_int;
    pub(crate) fn mtx_private_device_count(out: *mut c_int) -> c_int;

    pub(crate) fn malloc(size: usize) -> *mut c_void;
    // Functions of the C library. `mallopt` is glibc's, which libtorch's Linux builds need.
    pub(crate) fn fflush(stream: *mut c_void) -> c_int;
    pub(crate) fn _exit(status: c_int) -> !;
    pub(crate) fn fork() -> c_int;
    pub(crate) fn on_exit(
        handler: unsafe extern "C" fn(c_int, *mut c_void),
        argument: *mut c_void,
    ) -> c_int;
    #[cfg(target_env = "gnu")]
    pub(crate) fn mallopt(parameter: c_int, value: c_int) -> c_int;
}

/// Converts a return code to a result with the message of the exception.
pub(crate) fn check(code: c_int) -> Result<(), Error> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the function returns a thread-local C++ string, which stays unchanged until this
    // thread calls another function of `cpp/`.
    let message = unsafe { CStr::from_ptr(mtx_last_error()) };
    Err(Error::from_cpp(&message.to_string_lossy()))
}

/// Converts text to a C string; an interior NUL byte is an error.
pub(crate) fn c_string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::new(format!("{text:?} contains a NUL byte")))
}
