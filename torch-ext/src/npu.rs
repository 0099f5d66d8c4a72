//! Ascend NPUs, which torch_npu's C++ library registers as libtorch's PrivateUse1 device.
//!
//! `tch` cannot name such a device, so we borrow [`Device::Mps`](tch::Device::Mps): after
//! [`load_npu`], tensors for MPS are created on the NPU. Not yet run on hardware.

use crate::{Error, ffi, load_library};
use libloading::os::unix::Library;
use std::{ffi::c_int, sync::OnceLock};

/// Environment variable with the folder of `libtorch_npu.so`, unless that is on the loader's path.
pub const ASCEND_FOLDER: &str = "MOERUN_ASCEND_LIB";

static DEVICE: OnceLock<Result<c_int, Error>> = OnceLock::new();

/// Loads `libtorch_npu.so` and selects NPU `index` for this process; later calls return the first
/// result. Each thread names it by [`use_device`](crate::use_device).
///
/// The library is built without Python, by `build_libtorch_npu.py` of github.com/Ascend/pytorch.
///
/// # Errors
/// If the library cannot be loaded, or the NPU does not exist.
pub fn load_npu(index: usize) -> Result<(), Error> {
    DEVICE
        .get_or_init(|| load(index as c_int).map(|()| index as c_int))
        .clone()
        .map(|_| ())
}

/// Returns the index of this process's NPU, if one is loaded.
pub(crate) fn npu_index() -> Option<c_int> {
    DEVICE.get()?.as_ref().ok().copied()
}

/// Loads `libtorch_npu.so` without using an NPU. It stays loaded.
///
/// # Errors
/// If the library cannot be loaded.
pub fn load_npu_library() -> Result<&'static Library, Error> {
    load_library("libtorch_npu.so", ASCEND_FOLDER, &hint())
}

fn hint() -> String {
    format!(
        "source CANN's set_env.sh, and point {ASCEND_FOLDER} at the folder of a libtorch_npu.so \
         built for libtorch 2.11.0 (build_libtorch_npu.py of github.com/Ascend/pytorch)"
    )
}

fn load(index: c_int) -> Result<(), Error> {
    let library = load_npu_library()?;
    // The signature of torch_npu::init_npu(c10::DeviceIndex) in torch_npu/csrc/libs/init_npu.h.
    type Init = unsafe extern "C" fn(i8);
    let number =
        i8::try_from(index).map_err(|_| Error::new(format!("NPU {index}: does not exist")))?;
    // SAFETY: the signature is that above. The function only logs failures, so the devices are
    // counted afterwards.
    unsafe {
        let init = library.get::<Init>(b"_ZN9torch_npu8init_npuEa\0");
        let missing = |error| format!("libtorch_npu.so: no init_npu: {error}; hint: {}", hint());
        init.map_err(|error| Error::new(missing(error)))?(number);
    }
    let mut devices = 0;
    // SAFETY: the pointer is an out-parameter.
    ffi::check(unsafe { ffi::mtx_private_device_count(&mut devices) })?;
    if index >= devices {
        return Err(Error::new(format!(
            "NPU {index}: does not exist, this machine has {devices}; \
             hint: start at most {devices} ranks on this machine, or use device: cpu"
        )));
    }
    // SAFETY: the function registers kernels that live as long as the process.
    ffi::check(unsafe { ffi::mtx_serve_as_mps() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_the_candidates_and_a_hint() {
        if std::env::var_os(ASCEND_FOLDER).is_none() {
            let text = load_npu(0).unwrap_err().to_string();
            assert!(
                text.contains("libtorch_npu.so") && text.contains("set_env.sh"),
                "{text}"
            );
        }
    }
}
