//! Loading of libtorch's CUDA library, and properties of NVIDIA GPUs.

use crate::{Error, load_library};
use libloading::os::unix::Library;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

/// Registers libtorch's CUDA kernels in this process; later calls return the first result.
///
/// The search for `libtorch_cuda.so` of the same torch version tries the folder `MOERUN_TORCH_LIB`,
/// the folder of the running libtorch, and the loader's path, in that order.
///
/// # Errors
/// All candidates, with the loader's reason for each.
pub fn load_cuda() -> Result<(), Error> {
    static LOADED: OnceLock<Result<(), Error>> = OnceLock::new();
    const HINT: &str = "point MOERUN_TORCH_LIB at the torch/lib folder of a torch 2.11.0 \
                        installed with CUDA, or run ./scripts/setup --cuda";
    LOADED
        .get_or_init(|| load_library("libtorch_cuda.so", "MOERUN_TORCH_LIB", HINT).map(|_| ()))
        .clone()
}

/// Returns the PCI address of GPU `index`, such as `0000:3b:00.0`. Not yet run on hardware.
///
/// # Errors
/// If the CUDA library cannot be loaded or knows no such GPU.
pub fn pci_bus_id(index: usize) -> Result<String, Error> {
    type GetPciBusId = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    load_cuda()?;
    let mut text = [0u8; 32];
    // SAFETY: the signature is that of cudaDeviceGetPCIBusId in cuda_runtime_api.h, which writes at
    // most 32 bytes with a NUL at the end.
    let failed = unsafe {
        let function = Library::this().get::<GetPciBusId>(b"cudaDeviceGetPCIBusId\0");
        let function = function.map_err(|error| Error::new(format!("CUDA runtime: {error}")))?;
        function(
            text.as_mut_ptr().cast(),
            text.len() as c_int,
            index as c_int,
        ) != 0
    };
    if failed {
        return Err(Error::new(format!(
            "CUDA runtime: no PCI address for GPU {index}"
        )));
    }
    let end = text
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// Returns the compute capability of GPU `index`, such as `(9, 0)`, from a cache after the first
/// call. Not yet run on hardware.
///
/// # Errors
/// As [`pci_bus_id`].
pub fn compute_capability(index: usize) -> Result<(i32, i32), Error> {
    type GetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
    // Values of `cudaDeviceAttr` for the major and minor number.
    const ATTRIBUTES: [c_int; 2] = [75, 76];
    static KNOWN: Mutex<BTreeMap<usize, (i32, i32)>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock();
    if let Some(capability) = known.get(&index) {
        return Ok(*capability);
    }
    load_cuda()?;
    let mut numbers = [0; 2];
    // SAFETY: the signature is that of cudaDeviceGetAttribute in cuda_runtime_api.h, and the
    // pointers are out-parameters.
    let failed = unsafe {
        let function = Library::this().get::<GetAttribute>(b"cudaDeviceGetAttribute\0");
        let function = function.map_err(|error| Error::new(format!("CUDA runtime: {error}")))?;
        let fails = |(number, attribute): (&mut c_int, c_int)| {
            function(number, attribute, index as c_int) != 0
        };
        numbers.iter_mut().zip(ATTRIBUTES).any(fails)
    };
    if failed {
        return Err(Error::new(format!(
            "CUDA runtime: no compute capability for GPU {index}"
        )));
    }
    known.insert(index, (numbers[0], numbers[1]));
    Ok((numbers[0], numbers[1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_the_candidates_and_a_hint() {
        if let Err(error) = load_cuda() {
            let text = error.to_string();
            assert!(
                text.contains("libtorch_cuda.so") && text.contains("setup --cuda"),
                "{text}"
            );
        }
    }
}
