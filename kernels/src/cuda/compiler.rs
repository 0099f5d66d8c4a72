//! NVRTC, NVIDIA's runtime compiler, which is part of torch's CUDA build.
//!
//! Types come from cudarc. The functions are looked up here, because cudarc expects the names of
//! one CUDA version and panics if the library is missing.

use super::launch::Variant;
use cudarc::nvrtc::sys::nvrtcProgram;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::{
    ffi::{CStr, CString, c_char, c_int},
    path::PathBuf,
};
use tch::Kind;

/// An `nvrtcResult` as an integer: newer libraries return values that cudarc's enum lacks.
type Code = c_int;

/// Functions of the compiler, with the signatures of nvrtc.h 13.0.
pub(crate) struct Compiler {
    create: unsafe extern "C" fn(
        *mut nvrtcProgram,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    compile: unsafe extern "C" fn(nvrtcProgram, c_int, *const *const c_char) -> Code,
    cubin_size: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> Code,
    cubin: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> Code,
    log_size: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> Code,
    log: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> Code,
    destroy: unsafe extern "C" fn(*mut nvrtcProgram) -> Code,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code,
}

/// Machine code, and what the compiler reported.
pub(super) struct Compiled {
    pub(super) code: Vec<u8>,
    #[cfg(test)]
    log: String,
}

/// Returns the source of all kernels as one translation unit.
pub(super) fn source() -> String {
    let parts = [
        ("common.cuh", include_str!("source/common.cuh")),
        ("norm.cu", include_str!("source/norm.cu")),
        ("swiglu.cu", include_str!("source/swiglu.cu")),
        ("clamped_glu.cu", include_str!("source/clamped_glu.cu")),
        ("rotary.cu", include_str!("source/rotary.cu")),
        ("combine.cu", include_str!("source/combine.cu")),
        ("cross_entropy.cu", include_str!("source/cross_entropy.cu")),
        ("adamw.cu", include_str!("source/adamw.cu")),
        ("router.cu", include_str!("source/router.cu")),
        ("add_rows.cu", include_str!("source/add_rows.cu")),
        ("quantize.cu", include_str!("source/quantize.cu")),
    ];
    parts
        .iter()
        .map(|(name, text)| format!("#line 1 \"{name}\"\n{text}\n"))
        .collect()
}

/// Returns the names of all kernels in the source.
pub(super) fn kernel_names() -> Vec<String> {
    let source = source();
    let kernels = source.split("KERNEL void ").skip(1);
    let name = |text: &str| text.split('(').next().unwrap_or_default().to_owned();
    kernels.map(name).collect()
}

/// Returns the macro definitions of a variant.
pub(super) fn definitions(variant: Variant) -> [String; 2] {
    let number = if variant.kind == Kind::Float {
        "float"
    } else {
        "bf16"
    };
    [
        format!("-DNUMBER={number}"),
        format!("-DVECTOR={}", variant.vector()),
    ]
}

/// Returns the compiler's options for a variant.
pub(super) fn options(variant: Variant, gpu_architecture: &str) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={gpu_architecture}"),
        "--std=c++17".to_owned(),
        // Reports registers, stack frames and spills in the log.
        "--ptxas-options=-v".to_owned(),
    ];
    options.extend(definitions(variant));
    options
}

impl Compiler {
    /// Looks the functions up in a library and its dependencies.
    ///
    /// # Errors
    /// If a function is missing.
    pub(super) fn of(library: &'static Library) -> Result<Compiler, String> {
        preload_builtins();
        // SAFETY: the types of the fields are nvrtc.h's.
        let functions = unsafe {
            let found = || -> Result<Compiler, libloading::Error> {
                Ok(Compiler {
                    create: *library.get(b"nvrtcCreateProgram\0")?,
                    compile: *library.get(b"nvrtcCompileProgram\0")?,
                    cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                    cubin: *library.get(b"nvrtcGetCUBIN\0")?,
                    log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                    log: *library.get(b"nvrtcGetProgramLog\0")?,
                    destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                    error_string: *library.get(b"nvrtcGetErrorString\0")?,
                    version: *library.get(b"nvrtcVersion\0")?,
                })
            };
            found()
        };
        functions.map_err(|error| format!("NVRTC: {error}"))
    }

    /// Compiles all kernels to machine code for an architecture, such as `sm_90`.
    ///
    /// # Errors
    /// The compiler's message.
    pub(super) fn compile(
        &self,
        variant: Variant,
        gpu_architecture: &str,
    ) -> Result<Compiled, String> {
        let source = CString::new(source()).expect("source has no NUL");
        let options: Vec<CString> = options(variant, gpu_architecture)
            .into_iter()
            .map(|option| CString::new(option).expect("options have no NUL"))
            .collect();
        let options = options
            .iter()
            .map(|option| option.as_ptr())
            .collect::<Vec<*const c_char>>();
        let mut program = std::ptr::null_mut();
        // SAFETY: `program` is an out-parameter, and NVRTC copies the texts.
        self.check(unsafe {
            let no_headers = std::ptr::null();
            (self.create)(
                &mut program,
                source.as_ptr(),
                c"kernels".as_ptr(),
                0,
                no_headers,
                no_headers,
            )
        })?;
        let count = options.len() as c_int;
        // SAFETY: `program` is live, and the options live through the call.
        let compiled = self.check(unsafe { (self.compile)(program, count, options.as_ptr()) });
        let result = match compiled {
            Ok(()) => {
                let code = self.text(program, self.cubin_size, self.cubin);
                code.map(|code| Compiled {
                    code,
                    #[cfg(test)]
                    log: self.log(program),
                })
            }
            Err(error) => Err(format!("{error}: {}", self.log(program))),
        };
        // SAFETY: `program` is live and destroyed once.
        unsafe { (self.destroy)(&mut program) };
        result
    }

    /// Returns the compiler's version, such as `13.0`.
    ///
    /// # Errors
    /// The compiler's message.
    pub(super) fn version(&self) -> Result<String, String> {
        let [mut major, mut minor] = [0; 2];
        // SAFETY: the pointers are out-parameters.
        self.check(unsafe { (self.version)(&mut major, &mut minor) })?;
        Ok(format!("{major}.{minor}"))
    }

    fn log(&self, program: nvrtcProgram) -> String {
        let log = self
            .text(program, self.log_size, self.log)
            .unwrap_or_default();
        String::from_utf8_lossy(&log)
            .trim_end_matches('\0')
            .to_owned()
    }

    /// Returns the text whose size `size` and whose bytes `get` write.
    fn text(
        &self,
        program: nvrtcProgram,
        size: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> Code,
        get: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> Code,
    ) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: `program` is live, and `bytes` is an out-parameter.
        self.check(unsafe { size(program, &mut bytes) })?;
        let mut text = vec![0u8; bytes];
        // SAFETY: `program` is live, and the buffer has the requested size.
        self.check(unsafe { get(program, text.as_mut_ptr().cast()) })?;
        Ok(text)
    }

    fn check(&self, code: Code) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the function accepts any code and returns text that is never freed.
        let text = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(format!("NVRTC: {}", text.to_string_lossy()))
    }
}

/// Loads the built-ins library from NVRTC's own folder.
///
/// NVRTC opens it by name only, so the loader would not find it there.
fn preload_builtins() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(line) = maps.lines().find(|line| line.contains("/libnvrtc")) else {
        return;
    };
    let Some(start) = line.find('/') else {
        return;
    };
    let library = PathBuf::from(&line[start..]);
    let files = library.parent().and_then(|folder| folder.read_dir().ok());
    for file in files.into_iter().flatten().flatten() {
        let name = file.file_name();
        if name.to_string_lossy().starts_with("libnvrtc-builtins.so") {
            // SAFETY: NVIDIA's library has no initializers of consequence and stays loaded. If
            // loading fails, NVRTC reports it.
            let library = unsafe { Library::open(Some(file.path()), RTLD_NOW | RTLD_GLOBAL) };
            std::mem::forget(library);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cuda::launch::MAX_SHARED;

    /// Registers of a multiprocessor, on every GPU since compute capability 3.
    const REGISTERS: usize = 64 << 10;
    /// Threads of a multiprocessor that must fit its registers. Fewer could not hide the time that
    /// memory takes.
    const RESIDENT_THREADS: usize = 1024;

    /// Returns the path of NVRTC.
    pub(in crate::cuda) fn nvrtc() -> PathBuf {
        let path = std::env::var_os("MOERUN_NVRTC");
        path.expect("MOERUN_NVRTC is not set: run ./scripts/setup --nvrtc")
            .into()
    }

    /// Returns the numbers before a unit in the compiler's reports, such as `registers`.
    fn reported(log: &str, unit: &str) -> Vec<usize> {
        let number = |text: &str| text.rsplit(' ').next()?.parse().ok();
        let before_unit = log.split(&format!(" {unit}")).collect::<Vec<_>>();
        let (_, before_unit) = before_unit.split_last().expect("at least one part");
        before_unit.iter().filter_map(|text| number(text)).collect()
    }

    /// Fails if the registers or the shared memory of a multiprocessor are too few for
    /// [`RESIDENT_THREADS`] of a kernel.
    fn assert_occupancy(log: &str) {
        let registers = reported(log, "registers");
        assert_eq!(registers.len(), kernel_names().len(), "{log}");
        let most = registers.iter().max().unwrap();
        assert!(most * RESIDENT_THREADS <= REGISTERS, "{log}");
        let shared = reported(log, "bytes smem");
        assert!(!shared.is_empty(), "{log}");
        assert!(shared.iter().all(|&bytes| bytes < MAX_SHARED / 8), "{log}");
    }

    /// Fails if a kernel keeps variables in memory instead of registers.
    fn assert_no_spills(log: &str) {
        let reports: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("bytes stack frame"))
            .collect();
        let kernels = kernel_names().len();
        assert!(reports.len() >= kernels, "{} reports: {log}", reports.len());
        for report in reports {
            let nothing = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
            let report = report
                .trim_start_matches("ptxas")
                .trim_matches([' ', '.', ':']);
            assert_eq!(report, nothing, "{log}");
        }
    }

    #[test]
    fn kernels_compile_for_recent_gpus() {
        // SAFETY: NVIDIA's compiler, which stays loaded.
        let library = unsafe { Library::open(Some(nvrtc()), RTLD_NOW | RTLD_GLOBAL) }.unwrap();
        let compiler = Compiler::of(Box::leak(Box::new(library))).unwrap();
        assert!(compiler.version().unwrap().contains('.'));
        for architecture in ["sm_80", "sm_90", "sm_100"] {
            for variant in Variant::ALL {
                let Compiled { code, log } = compiler.compile(variant, architecture).unwrap();
                assert_eq!(&code[..4], b"\x7fELF");
                assert_no_spills(&log);
                assert_occupancy(&log);
                for name in kernel_names() {
                    let entry = format!("entry function '{name}'");
                    assert!(log.contains(&entry), "{name}: {log}");
                }
            }
        }
        let variant = Variant {
            kind: Kind::Float,
            vectors: true,
        };
        let refused = compiler.compile(variant, "sm_1");
        let error = refused.map(|_| ()).unwrap_err();
        assert!(
            error.contains("NVRTC") && error.contains("architecture"),
            "{error}"
        );
    }
}
