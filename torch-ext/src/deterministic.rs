//! libtorch's choice between fast kernels and those that repeat their bits.

use crate::{Error, ffi};

/// Requests kernels that give equal bits for equal inputs, or if `false` the fastest ones.
///
/// An operation of libtorch that has no such kernel for its device then fails. cuBLAS also needs
/// `CUBLAS_WORKSPACE_CONFIG` in the environment, before libtorch's CUDA library is loaded.
///
/// # Errors
/// libtorch's message.
pub fn set_deterministic(deterministic: bool) -> Result<(), Error> {
    // SAFETY: the argument is a flag.
    ffi::check(unsafe { ffi::mtx_set_deterministic(deterministic) })
}

/// True if [`set_deterministic`] has requested kernels that repeat their bits.
pub fn uses_deterministic() -> bool {
    // SAFETY: the function has no arguments and cannot fail.
    unsafe { ffi::mtx_uses_deterministic() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_can_be_taken_back() {
        for deterministic in [true, false] {
            set_deterministic(deterministic).unwrap();
            assert_eq!(uses_deterministic(), deterministic);
        }
    }
}
