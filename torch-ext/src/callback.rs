//! Errors and panics of Rust functions that C++ calls.

use crate::{Error, ffi};
use std::{
    any::Any,
    ffi::c_char,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Runs a callback and returns null, or the message of its error or panic, allocated with malloc.
pub(crate) fn guarded(body: impl FnOnce() -> Result<(), Error>) -> *mut c_char {
    let message = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return std::ptr::null_mut(),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic_message(&*panic),
    };
    let bytes = message.as_bytes();
    // SAFETY: the buffer has room for the message and a NUL, and C++ frees it with `free`.
    unsafe {
        let buffer = ffi::malloc(bytes.len() + 1) as *mut u8;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len());
        *buffer.add(bytes.len()) = 0;
        buffer as *mut c_char
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<String>() {
        return text.clone();
    }
    match panic.downcast_ref::<&str>() {
        Some(text) => text.to_string(),
        None => "panic in a callback".to_string(),
    }
}
