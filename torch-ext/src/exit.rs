//! The end of a process.

use crate::ffi;
use crate::library::any_loaded;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

/// Lets this process end without libtorch's tables of operators being taken down entry by entry, which takes a quarter of a short
/// command's time, and frees what the kernel frees anyway. What was printed is written out first.
///
/// Where a device's library was loaded everything is taken down as ever: profilers write what they have seen at the end.
pub fn skip_teardown_at_exit() {
    // SAFETY: the handler takes no argument, and may run at any time.
    unsafe { ffi::on_exit(end, null_mut()) };
}

/// Runs before the destructors of the libraries that `main` found loaded, as handlers run in the reverse of their order.
unsafe extern "C" fn end(status: c_int, _: *mut c_void) {
    if !any_loaded() {
        // SAFETY: null stands for every stream; the second does not return.
        unsafe {
            ffi::fflush(null_mut());
            ffi::_exit(status);
        }
    }
}
