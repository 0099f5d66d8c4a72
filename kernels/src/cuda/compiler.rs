//! NVRTC, NVIDIA's compiler in a library, which torch brings. Types come from cudarc; the functions are looked up here, since cudarc
//! asks for names of one version of CUDA, and panics without the library.

use super::Variant;
use cudarc::nvrtc::sys::nvrtcProgram;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;
use tch::Kind;

/// `nvrtcResult`, as a number: a newer library has values that an older list does not.
type Code = c_int;

/// The functions that are used; signatures as in nvrtc.h 13.0.
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
}

/// All kernels, in the order in which they are compiled.
pub(super) fn source() -> String {
    let parts = [
        ("common.cuh", include_str!("source/common.cuh")),
        ("norm.cu", include_str!("source/norm.cu")),
        ("swiglu.cu", include_str!("source/swiglu.cu")),
        ("rotary.cu", include_str!("source/rotary.cu")),
        ("rows.cu", include_str!("source/rows.cu")),
        ("cross_entropy.cu", include_str!("source/cross_entropy.cu")),
        ("adamw.cu", include_str!("source/adamw.cu")),
        ("router.cu", include_str!("source/router.cu")),
    ];
    parts
        .iter()
        .map(|(name, text)| format!("#line 1 \"{name}\"\n{text}\n"))
        .collect()
}

/// What the source is told of a variant.
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

impl Compiler {
    /// That of a library, or of what it is linked with.
    ///
    /// # Errors
    /// When it has no such functions.
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
                })
            };
            found()
        };
        functions.map_err(|error| format!("NVRTC: {error}"))
    }

    /// The machine code of all kernels for an architecture, such as `sm_90`.
    ///
    /// # Errors
    /// What the compiler says.
    pub(super) fn compile(&self, variant: Variant, architecture: &str) -> Result<Vec<u8>, String> {
        let source = CString::new(source()).expect("source has no NUL");
        let mut options = vec![
            format!("--gpu-architecture={architecture}"),
            "--std=c++17".to_owned(),
        ];
        options.extend(definitions(variant));
        let options: Vec<CString> = options
            .into_iter()
            .map(|option| CString::new(option).expect("options have no NUL"))
            .collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: an out-parameter, and text that lives through the call, of which it keeps a copy.
        self.check(unsafe {
            let none = std::ptr::null();
            (self.create)(
                &mut program,
                source.as_ptr(),
                c"kernels".as_ptr(),
                0,
                none,
                none,
            )
        })?;
        // SAFETY: a live program, and options that live through the call.
        let compiled = self
            .check(unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) });
        let result = match compiled {
            Ok(()) => self.text(program, self.cubin_size, self.cubin),
            Err(error) => {
                let log = self
                    .text(program, self.log_size, self.log)
                    .unwrap_or_default();
                Err(format!(
                    "{error}: {}",
                    String::from_utf8_lossy(&log).trim_end_matches('\0')
                ))
            }
        };
        // SAFETY: a live program, ended once.
        unsafe { (self.destroy)(&mut program) };
        result
    }

    fn text(
        &self,
        program: nvrtcProgram,
        size: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> Code,
        get: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> Code,
    ) -> Result<Vec<u8>, String> {
        let mut bytes = 0;
        // SAFETY: a live program and an out-parameter.
        self.check(unsafe { size(program, &mut bytes) })?;
        let mut text = vec![0u8; bytes];
        // SAFETY: a live program, and as much room as it asked for.
        self.check(unsafe { get(program, text.as_mut_ptr().cast()) })?;
        Ok(text)
    }

    fn check(&self, code: Code) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: it takes any code, and gives text that is never freed.
        let text = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(format!("NVRTC: {}", text.to_string_lossy()))
    }
}

/// NVRTC loads a library of its own by name, though nothing says where it is: beside it.
fn preload_builtins() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(line) = maps.lines().find(|line| line.contains("/libnvrtc")) else {
        return;
    };
    let folder = line
        .find('/')
        .map(|at| PathBuf::from(&line[at..]))
        .and_then(|path| Some(path.parent()?.to_owned()));
    for file in folder
        .into_iter()
        .flat_map(std::fs::read_dir)
        .flatten()
        .flatten()
    {
        if file
            .file_name()
            .to_string_lossy()
            .starts_with("libnvrtc-builtins.so")
        {
            // SAFETY: a library of NVIDIA's, without initialisers of consequence; it stays. Where it fails, NVRTC says so.
            let library = unsafe { Library::open(Some(file.path()), RTLD_NOW | RTLD_GLOBAL) };
            std::mem::forget(library);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_compile_for_gpus_of_the_last_years() {
        let path = std::env::var_os("MOERUN_NVRTC")
            .expect("MOERUN_NVRTC is not set: run ./scripts/setup --nvrtc");
        // SAFETY: NVIDIA's compiler, which stays.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.unwrap();
        let compiler = Compiler::of(Box::leak(Box::new(library))).unwrap();
        for architecture in ["sm_80", "sm_90", "sm_100"] {
            for (kind, vectors) in [
                (Kind::Float, true),
                (Kind::BFloat16, true),
                (Kind::BFloat16, false),
            ] {
                let code = compiler
                    .compile(Variant { kind, vectors }, architecture)
                    .unwrap();
                assert_eq!(&code[..4], b"\x7fELF");
            }
        }
        let error = compiler
            .compile(
                Variant {
                    kind: Kind::Float,
                    vectors: true,
                },
                "sm_1",
            )
            .unwrap_err();
        assert!(
            error.contains("NVRTC") && error.contains("architecture"),
            "{error}"
        );
    }
}
