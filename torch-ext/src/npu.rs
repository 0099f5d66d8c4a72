//! Ascend NPUs, through the C++ library of torch_npu, which registers them as libtorch's PrivateUse1 device.
//!
//! `tch` has no name for such a device: it reads as [`Device::Mps`](tch::Device::Mps), and after [`load_npu`] a tensor that is
//! asked for there is made on the NPU. Not yet run on hardware.

use crate::{Error, ffi, load_library};
use std::ffi::c_int;
use std::sync::OnceLock;

/// The variable that names the folder of `libtorch_npu.so`, where it is not on the loader's path.
pub const ASCEND_FOLDER: &str = "MOERUN_ASCEND_LIB";

static DEVICE: OnceLock<Result<c_int, Error>> = OnceLock::new();

/// Loads `libtorch_npu.so` (built without Python: `build_libtorch_npu.py` of github.com/Ascend/pytorch) and takes NPU `index` for
/// this process, once; later calls return the first answer.
///
/// # Errors
/// When the library cannot be loaded, or there is no such NPU.
pub fn load_npu(index: usize) -> Result<(), Error> {
    DEVICE
        .get_or_init(|| load(index as c_int).map(|()| index as c_int))
        .clone()
        .map(|_| ())
}

/// The NPU of this process.
pub(crate) fn npu_index() -> Option<c_int> {
    DEVICE.get()?.as_ref().ok().copied()
}

/// Makes the calling thread work on this process's NPU: the NPU runtime keeps one for each thread.
///
/// # Errors
/// The backend's message.
pub fn use_npu() -> Result<(), Error> {
    let index = npu_index().ok_or_else(|| Error::new("no NPU was loaded"))?;
    // SAFETY: a plain number.
    ffi::check(unsafe { ffi::mtx_set_private_device(index) })
}

fn load(index: c_int) -> Result<(), Error> {
    let remedy = format!(
        "Source CANN's set_env.sh, and point {ASCEND_FOLDER} at the folder of a libtorch_npu.so built for libtorch 2.11.0 \
         (build_libtorch_npu.py of github.com/Ascend/pytorch)"
    );
    let library = load_library("libtorch_npu.so", ASCEND_FOLDER, &remedy)?;
    // torch_npu::init_npu(c10::DeviceIndex), torch_npu/csrc/libs/init_npu.h.
    type Init = unsafe extern "C" fn(i8);
    let number = i8::try_from(index).map_err(|_| Error::new(format!("there is no NPU {index}")))?;
    // SAFETY: the signature above; it reports what goes wrong on the log only, so the devices are counted after it.
    unsafe {
        let init = library.get::<Init>(b"_ZN9torch_npu8init_npuEa\0");
        init.map_err(|error| {
            Error::new(format!(
                "libtorch_npu.so has no init_npu ({error}). {remedy}"
            ))
        })?(number);
    }
    let mut devices = 0;
    // SAFETY: an out-parameter.
    ffi::check(unsafe { ffi::mtx_private_device_count(&mut devices) })?;
    if index >= devices {
        return Err(Error::new(format!(
            "NPU {index} was asked for and there are {devices}: start at most {devices} ranks on this machine, or use device: cpu"
        )));
    }
    // SAFETY: registers kernels that live as long as the process.
    ffi::check(unsafe { ffi::mtx_serve_as_mps() })?;
    // SAFETY: a plain number.
    ffi::check(unsafe { ffi::mtx_set_private_device(index) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_the_places_and_the_remedy() {
        if std::env::var_os(ASCEND_FOLDER).is_none() {
            let text = load_npu(0).unwrap_err().to_string();
            assert!(
                text.contains("libtorch_npu.so") && text.contains("set_env.sh"),
                "{text}"
            );
            assert!(use_npu().is_err());
        }
    }
}
