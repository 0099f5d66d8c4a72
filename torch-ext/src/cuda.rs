//! NVIDIA GPUs, through libtorch's CUDA library.

use crate::{Error, load_library};
use libloading::os::unix::Library;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

/// Registers libtorch's CUDA kernels in this process, once; later calls return the first answer.
///
/// `libtorch_cuda.so` of the same torch version is looked for in the folder `MOERUN_TORCH_LIB`, beside the
/// libtorch this program runs on, and on the loader's path, in that order.
///
/// # Errors
/// Every place that was tried, with the loader's reason.
pub fn load_cuda() -> Result<(), Error> {
    static LOADED: OnceLock<Result<(), Error>> = OnceLock::new();
    const REMEDY: &str = "Point MOERUN_TORCH_LIB at the torch/lib folder of a torch 2.11.0 installed with CUDA, or run \
                          ./scripts/setup --cuda";
    LOADED
        .get_or_init(|| load_library("libtorch_cuda.so", "MOERUN_TORCH_LIB", REMEDY).map(|_| ()))
        .clone()
}

/// Where GPU `index` sits on the machine's bus, such as `0000:3b:00.0`. Not yet run on hardware.
///
/// # Errors
/// When the CUDA library is not loaded, or knows no such GPU.
pub fn pci_bus_id(index: usize) -> Result<String, Error> {
    type GetPciBusId = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    load_cuda()?;
    let mut text = [0u8; 32];
    // SAFETY: the signature of cudaDeviceGetPCIBusId in cuda_runtime_api.h; it writes at most 32 bytes, a NUL at their end.
    let failed = unsafe {
        let function = Library::this().get::<GetPciBusId>(b"cudaDeviceGetPCIBusId\0");
        let function = function.map_err(|error| Error::new(format!("CUDA's runtime: {error}")))?;
        function(
            text.as_mut_ptr().cast(),
            text.len() as c_int,
            index as c_int,
        ) != 0
    };
    if failed {
        return Err(Error::new(format!(
            "the driver does not know where GPU {index} is"
        )));
    }
    let end = text
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// The compute capability of GPU `index`, such as `(9, 0)`, asked for once. Not yet run on hardware.
///
/// # Errors
/// As [`pci_bus_id`].
pub fn compute_capability(index: usize) -> Result<(i32, i32), Error> {
    type GetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
    // `cudaDeviceAttr`: major, minor.
    const ATTRIBUTES: [c_int; 2] = [75, 76];
    static KNOWN: Mutex<BTreeMap<usize, (i32, i32)>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock();
    if let Some(capability) = known.get(&index) {
        return Ok(*capability);
    }
    load_cuda()?;
    let mut numbers = [0; 2];
    // SAFETY: the signature of cudaDeviceGetAttribute in cuda_runtime_api.h, and out-parameters.
    let failed = unsafe {
        let function = Library::this().get::<GetAttribute>(b"cudaDeviceGetAttribute\0");
        let function = function.map_err(|error| Error::new(format!("CUDA's runtime: {error}")))?;
        let ask = |(number, attribute): (&mut c_int, c_int)| {
            function(number, attribute, index as c_int) != 0
        };
        numbers.iter_mut().zip(ATTRIBUTES).any(ask)
    };
    if failed {
        return Err(Error::new(format!(
            "the driver does not know what GPU {index} is"
        )));
    }
    known.insert(index, (numbers[0], numbers[1]));
    Ok((numbers[0], numbers[1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_the_places_and_the_remedy() {
        if let Err(error) = load_cuda() {
            let text = error.to_string();
            assert!(
                text.contains("libtorch_cuda.so") && text.contains("setup --cuda"),
                "{text}"
            );
        }
    }
}
