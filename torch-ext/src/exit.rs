//! The exit of a process without libtorch's teardown.

use crate::ffi;
use crate::library::any_loaded;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

/// Makes this process exit without destroying libtorch's operator tables.
///
/// That takes a quarter of the time of a short command and frees memory that the kernel frees
/// anyway. Output streams are flushed first. If a device library is loaded, the normal teardown
/// runs, because profilers write their results at exit.
pub fn skip_teardown_at_exit() {
    // SAFETY: the handler takes no argument and may run at any time.
    unsafe { ffi::on_exit(exit_without_teardown, null_mut()) };
}

/// Exits before the destructors of the libraries that were loaded before `main`: handlers run in
/// reverse order of registration.
unsafe extern "C" fn exit_without_teardown(status: c_int, _: *mut c_void) {
    if !any_loaded() {
        // SAFETY: null stands for all streams, and `_exit` does not return.
        unsafe {
            ffi::fflush(null_mut());
            ffi::_exit(status);
        }
    }
}
