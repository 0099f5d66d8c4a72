//! Loading libtorch's CUDA library into a program that was linked against the CPU libraries only.

use crate::Error;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{c_char, c_int, c_void};
use std::path::PathBuf;
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
    LOADED.get_or_init(load).clone()
}

fn load() -> Result<(), Error> {
    let file = "libtorch_cuda.so";
    let mut candidates: Vec<PathBuf> = Vec::new();
    candidates.extend(std::env::var_os("MOERUN_TORCH_LIB").map(|folder| PathBuf::from(folder).join(file)));
    candidates.extend(folder_of_libtorch().map(|folder| folder.join(file)));
    candidates.push(file.into());
    let mut tried = Vec::new();
    for candidate in candidates {
        // SAFETY: loading runs the library's initialisers, which register kernels with the dispatcher; the handle
        // is leaked on purpose, since registered kernels must stay.
        match unsafe { Library::open(Some(&candidate), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                std::mem::forget(library);
                return Ok(());
            }
            Err(error) => tried.push(format!("{}: {error}", candidate.display())),
        }
    }
    Err(Error::new(format!(
        "libtorch's CUDA library could not be loaded ({}). Point MOERUN_TORCH_LIB at the torch/lib folder of a torch \
         2.11.0 installed with CUDA, or run ./scripts/setup --cuda",
        tried.join("; ")
    )))
}

/// Makes the work that this thread queues on GPU `index` from here on go beside that of other threads: on a stream of its
/// own, from libtorch's pool. Not yet run on hardware.
///
/// # Errors
/// When the CUDA library is not loaded, or refuses.
pub fn use_side_stream(index: usize) -> Result<(), Error> {
    type FromPool = unsafe extern "C" fn(bool, i32, *mut *mut c_void) -> i32;
    type SetCurrent = unsafe extern "C" fn(*mut c_void, i32) -> i32;
    load_cuda()?;
    let program = Library::this();
    let missing = |error: libloading::Error| Error::new(format!("libtorch's CUDA library: {error}"));
    let mut stream = std::ptr::null_mut();
    // SAFETY: signatures as in torch/csrc/stable/c/shim.h of the libtorch that is checked at build; the stream is the pool's
    // and lives as long as the process.
    let failed = unsafe {
        let from_pool = program.get::<FromPool>(b"torch_get_cuda_stream_from_pool\0").map_err(missing)?;
        let set_current = program.get::<SetCurrent>(b"torch_set_current_cuda_stream\0").map_err(missing)?;
        from_pool(false, index as i32, &mut stream) != 0 || set_current(stream, index as i32) != 0
    };
    if failed { Err(Error::new(format!("GPU {index} gave no stream"))) } else { Ok(()) }
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
        function(text.as_mut_ptr().cast(), text.len() as c_int, index as c_int) != 0
    };
    if failed {
        return Err(Error::new(format!("the driver does not know where GPU {index} is")));
    }
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// The real folder of the libtorch_cpu this process runs on, links resolved.
fn folder_of_libtorch() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let path = PathBuf::from(&line[line.find('/')?..]);
    Some(path.canonicalize().ok()?.parent()?.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_the_places_and_the_remedy() {
        if let Err(error) = load_cuda() {
            let text = error.to_string();
            assert!(text.contains("libtorch_cuda.so") && text.contains("setup --cuda"), "{text}");
        }
        assert!(folder_of_libtorch().is_some_and(|folder| folder.join("libtorch_cpu.so").exists()));
    }
}
