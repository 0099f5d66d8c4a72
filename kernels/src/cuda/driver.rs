//! CUDA's driver: loads compiled kernels and queues them.
//!
//! Types come from cudarc. The functions are looked up here, for the reason given in `compiler.rs`.

use super::{
    code_cache::CodeCache,
    compiler::{Compiler, kernel_names, options, source},
    launch::{Gpu, KernelLaunch, Variant, pointers},
};
use cudarc::driver::sys::{CUcontext, CUfunction, CUmodule, CUstream};
use libloading::os::unix::Library;
use parking_lot::Mutex;
use std::{
    collections::{BTreeSet, HashMap},
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    sync::OnceLock,
};
use tch::Tensor;
use torch_ext::Stream;

/// A `CUresult` as an integer: newer libraries return values that cudarc's enum lacks.
type Code = c_int;

const CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: c_int = 16;

/// Functions of the driver, with the signatures of cuda.h 13.0.
struct Driver {
    init: unsafe extern "C" fn(c_uint) -> Code,
    device: unsafe extern "C" fn(*mut c_int, c_int) -> Code,
    attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Code,
    primary_context: unsafe extern "C" fn(*mut CUcontext, c_int) -> Code,
    current_context: unsafe extern "C" fn(*mut CUcontext) -> Code,
    set_context: unsafe extern "C" fn(CUcontext) -> Code,
    load: unsafe extern "C" fn(*mut CUmodule, *const c_void) -> Code,
    function: unsafe extern "C" fn(*mut CUfunction, CUmodule, *const c_char) -> Code,
    #[allow(clippy::type_complexity)]
    launch: unsafe extern "C" fn(
        CUfunction,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        CUstream,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> Code,
    error_string: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
}

impl Driver {
    fn of(library: &'static Library) -> Result<Driver, String> {
        // SAFETY: the types of the fields are cuda.h's.
        let functions = unsafe {
            let found = || -> Result<Driver, libloading::Error> {
                Ok(Driver {
                    init: *library.get(b"cuInit\0")?,
                    device: *library.get(b"cuDeviceGet\0")?,
                    attribute: *library.get(b"cuDeviceGetAttribute\0")?,
                    primary_context: *library.get(b"cuDevicePrimaryCtxRetain\0")?,
                    current_context: *library.get(b"cuCtxGetCurrent\0")?,
                    set_context: *library.get(b"cuCtxSetCurrent\0")?,
                    load: *library.get(b"cuModuleLoadData\0")?,
                    function: *library.get(b"cuModuleGetFunction\0")?,
                    launch: *library.get(b"cuLaunchKernel\0")?,
                    error_string: *library.get(b"cuGetErrorString\0")?,
                })
            };
            found()
        };
        functions.map_err(|error| format!("CUDA's driver: {error}"))
    }

    fn check(&self, code: Code) -> Result<(), String> {
        match code {
            0 => Ok(()),
            code => Err(format!("CUDA's driver: {}", self.text(code))),
        }
    }

    /// Returns the driver's text for an error, with its number.
    fn text(&self, code: Code) -> String {
        let mut text = std::ptr::null();
        // SAFETY: `text` is an out-parameter.
        let found = unsafe { (self.error_string)(code, &mut text) };
        let text = if found == 0 && !text.is_null() {
            // SAFETY: the driver never frees the text.
            unsafe { CStr::from_ptr(text) }.to_string_lossy()
        } else {
            "unknown error".into()
        };
        format!("{text} ({code})")
    }
}

/// A GPU with its compiled kernels.
pub(crate) struct Device {
    driver: Driver,
    /// The primary context, which libtorch uses too.
    context: CUcontext,
    architecture: String,
    multiprocessors: usize,
    functions: HashMap<Variant, HashMap<String, CUfunction>>,
}

// SAFETY: the handles are the driver's, which any thread may use.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Returns GPU `index` with all kernels compiled and loaded.
///
/// The first failure is logged; later calls return the same error. CUDA may load a kernel only once
/// everything that is queued has ended, which may wait for another rank. So nothing is loaded
/// later.
pub(super) fn ready(index: usize) -> Result<&'static Device, String> {
    type Ready = HashMap<usize, Result<&'static Device, String>>;
    static READY: OnceLock<Mutex<Ready>> = OnceLock::new();
    let mut ready = READY.get_or_init(Mutex::default).lock();
    if let Some(gpu) = ready.get(&index) {
        return gpu.clone();
    }
    let gpu = Device::open(index).map(|device| &*Box::leak(Box::new(device)));
    if let Err(error) = &gpu {
        tracing::warn!(
            "GPU {index} runs libtorch's operations instead of our own kernels, which are faster: \
             {error}"
        );
    }
    ready.insert(index, gpu.clone());
    gpu
}

/// Compiles the kernels for all GPUs of this machine into the cache on disk, without using a GPU.
///
/// # Errors
/// The first failure.
pub(super) fn compile_ahead() -> Result<(), String> {
    let compiler = Compiler::of(library()?)?;
    let gpus = 0..tch::Cuda::device_count().max(0) as usize;
    let architectures: BTreeSet<String> = gpus.map(architecture).collect::<Result<_, _>>()?;
    for architecture in &architectures {
        compile_variants(&compiler, architecture, &CodeCache::of_user())?;
    }
    Ok(())
}

/// Returns libtorch's stub library, which is linked with the driver and NVRTC, whatever their
/// version.
fn library() -> Result<&'static Library, String> {
    const HINT: &str = "point MOERUN_TORCH_LIB at the torch/lib folder of a torch 2.11.0 \
                        installed with CUDA, or run ./scripts/setup --cuda";
    torch_ext::load_library("libcaffe2_nvrtc.so", "MOERUN_TORCH_LIB", HINT)
        .map_err(|error| error.to_string())
}

/// Returns the name that the compiler gives to GPU `index`, such as `sm_90`.
fn architecture(index: usize) -> Result<String, String> {
    let capability = torch_ext::compute_capability(index);
    let (major, minor) = capability.map_err(|error| error.to_string())?;
    Ok(format!("sm_{major}{minor}"))
}

/// The machine code of all kernels for one variant.
struct VariantCode {
    variant: Variant,
    code: Vec<u8>,
}

/// Returns the machine code of every variant, compiled in parallel unless the cache on disk has it.
fn compile_variants(
    compiler: &Compiler,
    architecture: &str,
    cache: &CodeCache,
) -> Result<Vec<VariantCode>, String> {
    let version = compiler.version()?;
    let code = |variant: Variant| {
        let options = options(variant, architecture).join(" ");
        let source = source();
        let inputs = [source.as_str(), options.as_str(), version.as_str()];
        let code = cache.get_or_compile(&inputs, || {
            let compiled = compiler.compile(variant, architecture)?;
            Ok(compiled.code)
        });
        code.map(|code| VariantCode { variant, code })
    };
    let code = &code;
    std::thread::scope(|scope| {
        let compiling = Variant::ALL.map(|variant| scope.spawn(move || code(variant)));
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        compiling.into_iter().map(join).collect()
    })
}

impl Device {
    fn open(index: usize) -> Result<Device, String> {
        let cache = CodeCache::of_user();
        Device::of_library(library()?, index, architecture(index)?, &cache)
    }

    /// Opens GPU `index` by the driver and the compiler of a library and its dependencies.
    fn of_library(
        library: &'static Library,
        index: usize,
        architecture: String,
        cache: &CodeCache,
    ) -> Result<Device, String> {
        let driver = Driver::of(library)?;
        let compiler = Compiler::of(library)?;
        let mut device = 0;
        let mut context = std::ptr::null_mut();
        let mut multiprocessors = 0;
        // SAFETY: all pointers are out-parameters; the context is never released.
        unsafe {
            driver.check((driver.init)(0))?;
            driver.check((driver.device)(&mut device, index as c_int))?;
            driver.check((driver.primary_context)(&mut context, device))?;
            driver.check((driver.attribute)(
                &mut multiprocessors,
                CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                device,
            ))?;
        }
        let variants = compile_variants(&compiler, &architecture, cache)?;
        let mut device = Device {
            driver,
            context,
            architecture,
            multiprocessors: multiprocessors as usize,
            functions: HashMap::new(),
        };
        device.enter()?;
        for VariantCode { variant, code } in variants {
            device.load(variant, &code)?;
        }
        Ok(device)
    }

    pub(super) fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Loads the kernels of a variant. With lazy loading, the driver loads a kernel when its
    /// function is looked up.
    fn load(&mut self, variant: Variant, code: &[u8]) -> Result<(), String> {
        let mut module: CUmodule = std::ptr::null_mut();
        // SAFETY: `module` is an out-parameter, and the driver copies the machine code.
        let status = unsafe { (self.driver.load)(&mut module, code.as_ptr().cast()) };
        self.driver.check(status)?;
        let functions = self.functions.entry(variant).or_default();
        for name in kernel_names() {
            let symbol = CString::new(name.as_str()).expect("names have no NUL");
            let mut function = std::ptr::null_mut();
            // SAFETY: `function` is an out-parameter, `module` and `symbol` live through the call.
            let status = unsafe { (self.driver.function)(&mut function, module, symbol.as_ptr()) };
            self.driver.check(status)?;
            functions.insert(name, function);
        }
        Ok(())
    }

    fn function(&self, variant: Variant, name: &str) -> Result<CUfunction, String> {
        let functions = self.functions.get(&variant);
        let function = functions.and_then(|functions| functions.get(name));
        function
            .copied()
            .ok_or_else(|| format!("there is no kernel {name}"))
    }

    /// Makes the device's context current on the calling thread.
    ///
    /// A thread that has only taken memory from libtorch's cache has no context yet.
    fn enter(&self) -> Result<(), String> {
        let mut current = std::ptr::null_mut();
        // SAFETY: `current` is an out-parameter; our context lives as long as the process.
        unsafe {
            self.driver
                .check((self.driver.current_context)(&mut current))?;
            if current == self.context {
                Ok(())
            } else {
                self.driver.check((self.driver.set_context)(self.context))
            }
        }
    }

    fn queue(&self, launch: &KernelLaunch, stream: CUstream) -> Result<(), String> {
        self.enter()?;
        let function = self.function(launch.variant, launch.name)?;
        let mut words = launch.words();
        let mut arguments = pointers(&mut words);
        let size = launch.dimensions();
        // SAFETY: each launch lists the arguments of its kernel. libtorch reuses their memory on
        // this stream only.
        let code = unsafe {
            (self.driver.launch)(
                function,
                size.blocks,
                1,
                1,
                size.threads_per_row,
                size.rows,
                1,
                size.shared,
                stream,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        match code {
            0 => Ok(()),
            code => Err(launch_error(code, &self.driver.text(code))),
        }
    }
}

impl Gpu for Device {
    fn run(&self, launch: &KernelLaunch, like: &Tensor) {
        if launch.blocks == 0 {
            return;
        }
        let stream = Stream::current(like).and_then(|stream| stream.handle());
        stream
            .map_err(|error| error.to_string())
            .and_then(|stream| self.queue(launch, stream.cast()))
            .unwrap_or_else(|error| panic!("kernel {}: {error}", launch.name));
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }
}

/// Returns the message for a launch that failed with `code`, whose text is `text`.
///
/// The driver reports a kernel's failure at whatever call comes next.
fn launch_error(code: Code, text: &str) -> String {
    /// Values of `CUresult` that describe the launch itself: an invalid value, no memory, no
    /// machine code for this GPU, and too many registers, threads or shared memory.
    const OWN: [Code; 5] = [1, 2, 209, 701, 1013];
    if OWN.contains(&code) {
        return format!("CUDA's driver: {text}");
    }
    format!(
        "CUDA's driver: {text}. An earlier kernel may have failed, of moerun or of libtorch. To \
         find it, run one rank with CUDA_LAUNCH_BLOCKING=1 (with NCCL and several ranks, that may \
         hang)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{
        compiler::tests::nvrtc,
        launch::{BlockShape, arguments},
    };
    use libloading::os::unix::{RTLD_LOCAL, RTLD_NOW};
    use std::{path::Path, process::Command};
    use tch::{Kind, kind::FLOAT_CPU};

    const FP32: Variant = Variant {
        kind: Kind::Float,
        vectors: true,
    };

    /// The last launch of the calling thread, as the stand-in has seen it.
    #[repr(C)]
    #[derive(Debug, PartialEq, Eq)]
    struct Seen {
        blocks: c_uint,
        threads_per_row: c_uint,
        rows: c_uint,
        shared: c_uint,
        stream: *mut c_void,
    }

    /// Returns the stand-in for the driver, linked with NVRTC as libtorch's library is.
    fn library() -> &'static Library {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        LIBRARY.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let [source, library] =
                ["driver.cpp", "libdriver.so"].map(|name| folder.path().join(name));
            std::fs::write(&source, include_str!("stand_in_driver.cpp")).unwrap();
            let nvrtc = nvrtc();
            let nvrtc_folder = Path::new(&nvrtc).parent().unwrap();
            let mut command = Command::new(std::env::var("CXX").unwrap_or("c++".into()));
            command
                .args(["-std=c++17", "-shared", "-fPIC", "-Wl,--no-as-needed", "-o"])
                .args([&library, &source])
                .arg(&nvrtc)
                .arg(format!("-Wl,-rpath,{}", nvrtc_folder.display()));
            assert!(command.status().unwrap().success());
            // SAFETY: the libraries were compiled for this process, and stay loaded.
            unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_LOCAL) }.unwrap()
        })
    }

    /// Returns both GPUs of the stand-in, which share a cache of machine code.
    fn devices() -> &'static [Device; 2] {
        static DEVICES: OnceLock<[Device; 2]> = OnceLock::new();
        DEVICES.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap().keep();
            [0, 1].map(|index| {
                let cache = CodeCache(Some(folder.clone()));
                Device::of_library(library(), index, "sm_90".into(), &cache).unwrap()
            })
        })
    }

    fn seen() -> Seen {
        // SAFETY: the signature is that of stand_in_driver.cpp.
        unsafe {
            let last = library().get::<unsafe extern "C" fn() -> Seen>(b"stand_in_last_launch\0");
            last.unwrap()()
        }
    }

    /// Queues `swiglu` in blocks of 32 threads for each of `rows` rows.
    fn queue(device: &Device, rows: usize) -> Result<(), String> {
        let x = Tensor::zeros([64], FLOAT_CPU);
        let launch = KernelLaunch {
            name: "swiglu",
            variant: FP32,
            blocks: 3,
            block: BlockShape {
                threads_per_row: 32,
                rows,
            },
            shared: 40,
            arguments: &arguments![&x, &x, 1, 32],
        };
        device.queue(&launch, std::ptr::without_provenance_mut(7))
    }

    #[test]
    fn each_kernel_of_each_dtype_is_found() {
        for variant in Variant::ALL {
            for name in kernel_names() {
                devices()[0].function(variant, &name).unwrap();
            }
        }
        let missing = devices()[0].function(FP32, "no_such_kernel").unwrap_err();
        assert_eq!(missing, "there is no kernel no_such_kernel");
    }

    #[test]
    fn each_thread_launches_in_the_context_of_the_gpu() {
        let [first, second] = devices();
        // Without a context the driver refuses, and with that of another GPU, too.
        for device in [first, second, first] {
            std::thread::scope(|scope| {
                let here = scope.spawn(|| queue(device, 1));
                here.join().unwrap().unwrap();
            });
            queue(device, 1).unwrap();
        }
    }

    #[test]
    fn a_launch_reaches_the_driver_as_it_is() {
        queue(&devices()[0], 2).unwrap();
        let expected = Seen {
            blocks: 3,
            threads_per_row: 32,
            rows: 2,
            shared: 40,
            stream: std::ptr::without_provenance_mut(7),
        };
        assert_eq!(seen(), expected);
        let nothing = KernelLaunch {
            name: "swiglu",
            variant: FP32,
            blocks: 0,
            block: BlockShape {
                threads_per_row: 32,
                rows: 1,
            },
            shared: 0,
            arguments: &[],
        };
        // A tensor on the host has no stream, so that a launch would panic.
        devices()[0].run(&nothing, &Tensor::zeros([1], FLOAT_CPU));
    }

    #[test]
    fn what_the_driver_refuses_is_an_error() {
        let error = queue(&devices()[0], 64).unwrap_err();
        assert_eq!(error, "CUDA's driver: invalid argument (1)");
        let missing = Device::of_library(library(), 2, "sm_90".into(), &CodeCache(None));
        let error = missing.map(|_| ()).unwrap_err();
        assert_eq!(error, "CUDA's driver: invalid device ordinal (101)");
    }

    #[test]
    fn a_failure_that_may_be_another_kernels_is_said_to_be_so() {
        // An illegal address and a trap stay with the context.
        for sticky in [700, 719] {
            let error = launch_error(sticky, "unspecified launch failure (719)");
            assert!(error.contains("earlier kernel"), "{error}");
            assert!(error.contains("CUDA_LAUNCH_BLOCKING=1"), "{error}");
        }
        assert_eq!(
            launch_error(701, "too many resources requested for launch (701)"),
            "CUDA's driver: too many resources requested for launch (701)"
        );
    }
}
