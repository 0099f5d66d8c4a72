//! CUDA's driver: it holds compiled kernels, and queues them. Types come from cudarc; the functions are looked up here, as NVRTC's.

use super::compiler::Compiler;
use super::{Gpu, KernelLaunch, Variant, pointers};
use cudarc::driver::sys::{CUcontext, CUfunction, CUmodule, CUstream};
use libloading::os::unix::Library;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;
use tch::{Kind, Tensor};
use torch_ext::Stream;

/// `CUresult`, as a number: a newer library has values that an older list does not.
type Code = c_int;

/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`.
const MULTIPROCESSORS: c_int = 16;

/// The functions that are used; signatures as in cuda.h 13.0.
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
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: an out-parameter; the text is never freed.
        let known = unsafe { (self.error_string)(code, &mut text) } == 0 && !text.is_null();
        // SAFETY: as above.
        let text = if known {
            unsafe { CStr::from_ptr(text) }.to_string_lossy()
        } else {
            "an unknown error".into()
        };
        Err(format!("CUDA's driver: {text} ({code})"))
    }
}

/// A GPU that kernels run on.
pub(crate) struct Device {
    driver: Driver,
    compiler: Compiler,
    /// The one that libtorch works in.
    context: CUcontext,
    architecture: String,
    multiprocessors: usize,
    functions: Mutex<HashMap<(Variant, &'static str), CUfunction>>,
    modules: Mutex<HashMap<Variant, CUmodule>>,
}

// SAFETY: handles of the driver's, which may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// The GPU of that number, with the kernels for `kind` compiled. It says once why there is none.
pub(super) fn ready(index: usize, kind: Kind) -> Result<&'static Device, String> {
    type Ready = HashMap<(usize, Kind), Result<&'static Device, String>>;
    static READY: OnceLock<Mutex<Ready>> = OnceLock::new();
    let mut ready = READY.get_or_init(Mutex::default).lock();
    let of_device = |ready: &Ready| {
        ready
            .iter()
            .find(|((other, _), _)| *other == index)
            .map(|(_, gpu)| gpu.clone())
    };
    if let Some(gpu) = ready.get(&(index, kind)) {
        return gpu.clone();
    }
    let gpu = of_device(&ready)
        .unwrap_or_else(|| Device::open(index).map(|device| &*Box::leak(Box::new(device))));
    let gpu = gpu.and_then(|gpu| {
        gpu.module(Variant {
            kind,
            vectors: true,
        })
        .map(|_| gpu)
    });
    if let Err(error) = &gpu {
        tracing::warn!(
            "GPU {index} gets libtorch's operations instead of kernels of our own, which are faster: {error}"
        );
    }
    ready.insert((index, kind), gpu.clone());
    gpu
}

impl Device {
    fn open(index: usize) -> Result<Device, String> {
        const REMEDY: &str = "It comes with a torch 2.11.0 for CUDA: point MOERUN_TORCH_LIB at its torch/lib folder, or \
                              run ./scripts/setup --cuda";
        // libtorch's own way to both libraries: it is linked with them, whatever their version.
        let library = torch_ext::load_library("libcaffe2_nvrtc.so", "MOERUN_TORCH_LIB", REMEDY);
        let library = library.map_err(|error| error.to_string())?;
        let driver = Driver::of(library)?;
        let compiler = Compiler::of(library)?;
        let (major, minor) = torch_ext::capability(index).map_err(|error| error.to_string())?;
        let mut device = 0;
        let mut context = std::ptr::null_mut();
        let mut multiprocessors = 0;
        // SAFETY: out-parameters; the context that libtorch uses is held for good.
        unsafe {
            driver.check((driver.init)(0))?;
            driver.check((driver.device)(&mut device, index as c_int))?;
            driver.check((driver.primary_context)(&mut context, device))?;
            driver.check((driver.attribute)(
                &mut multiprocessors,
                MULTIPROCESSORS,
                device,
            ))?;
        }
        Ok(Device {
            driver,
            compiler,
            context,
            architecture: format!("sm_{major}{minor}"),
            multiprocessors: multiprocessors as usize,
            functions: Mutex::default(),
            modules: Mutex::default(),
        })
    }

    pub(super) fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The compiled kernels of a variant.
    fn module(&self, variant: Variant) -> Result<CUmodule, String> {
        let mut modules = self.modules.lock();
        if let Some(module) = modules.get(&variant) {
            return Ok(*module);
        }
        let code = self.compiler.compile(variant, &self.architecture)?;
        self.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: an out-parameter, and machine code that is copied.
        self.driver
            .check(unsafe { (self.driver.load)(&mut module, code.as_ptr().cast()) })?;
        modules.insert(variant, module);
        Ok(module)
    }

    fn function(&self, variant: Variant, name: &'static str) -> Result<CUfunction, String> {
        let mut functions = self.functions.lock();
        if let Some(function) = functions.get(&(variant, name)) {
            return Ok(*function);
        }
        let module = self.module(variant)?;
        let symbol = CString::new(name).expect("names have no NUL");
        let mut function = std::ptr::null_mut();
        // SAFETY: an out-parameter, a live module, and text that lives through the call.
        self.driver
            .check(unsafe { (self.driver.function)(&mut function, module, symbol.as_ptr()) })?;
        functions.insert((variant, name), function);
        Ok(function)
    }

    /// Makes the calling thread work in the context of the device. A thread that only took memory out of libtorch's cache has none yet.
    fn enter(&self) -> Result<(), String> {
        let mut current = std::ptr::null_mut();
        // SAFETY: an out-parameter, and a context that lives as long as the process.
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

    fn queue(&self, call: &KernelLaunch, like: &Tensor) -> Result<(), String> {
        self.enter()?;
        let function = self.function(call.variant, call.name)?;
        let stream = Stream::current(like)
            .and_then(|stream| stream.handle())
            .map_err(|error| error.to_string())?;
        let mut words = call.words();
        let mut arguments = pointers(&mut words);
        let [blocks, width, height, shared] = call.sizes();
        // SAFETY: the arguments are the kernel's, as each call says beside it; their memory is libtorch's, which gives it to others on
        // this stream alone.
        self.driver.check(unsafe {
            let none = std::ptr::null_mut();
            let arguments = arguments.as_mut_ptr();
            (self.driver.launch)(
                function,
                blocks,
                1,
                1,
                width,
                height,
                1,
                shared,
                stream.cast(),
                arguments,
                none,
            )
        })
    }
}

impl Gpu for Device {
    fn run(&self, call: &KernelLaunch, like: &Tensor) {
        if call.blocks > 0 {
            self.queue(call, like)
                .unwrap_or_else(|error| panic!("kernel {}: {error}", call.name));
        }
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }
}
