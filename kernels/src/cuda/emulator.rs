//! Kernels on the host, for tests: see emulator.cpp.

use super::compiler::{definitions, source};
use super::{Gpu, KernelLaunch, Variant, pointers};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_uint, c_void};
use std::process::Command;
use std::sync::OnceLock;
use tch::Tensor;

/// The processor that runs the tests.
pub(super) struct Host;

type Emulate = unsafe extern "C" fn(
    *const c_char,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    *mut *mut c_void,
) -> *const c_char;

/// Compiles the kernels of a variant for the host.
fn compiled(variant: Variant) -> Library {
    let folder = tempfile::tempdir().unwrap();
    let [program, emulator, library] =
        ["program.cu", "emulator.cpp", "emulator.so"].map(|name| folder.path().join(name));
    std::fs::write(&program, source()).unwrap();
    std::fs::write(&emulator, include_str!("emulator.cpp")).unwrap();
    let mut command = Command::new(std::env::var("CXX").unwrap_or("c++".into()));
    command
        .args(["-std=c++20", "-O1", "-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&emulator);
    let status = command.args(definitions(variant)).status().unwrap();
    assert!(
        status.success(),
        "the C++ compiler does not take the kernels"
    );
    // SAFETY: the library has been made for this.
    unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_LOCAL) }.unwrap()
}

impl Gpu for Host {
    fn run(&self, call: &KernelLaunch, _like: &Tensor) {
        static LIBRARIES: OnceLock<Mutex<(HashMap<Variant, Library>, u32)>> = OnceLock::new();
        // One kernel at a time: what a block's threads share is static.
        let mut all = LIBRARIES.get_or_init(Mutex::default).lock();
        let (libraries, seed) = &mut *all;
        *seed += 1;
        let library = libraries
            .entry(call.variant)
            .or_insert_with(|| compiled(call.variant));
        let name = CString::new(call.name).unwrap();
        let mut words = call.words();
        let mut arguments = pointers(&mut words);
        let [blocks, width, height, shared] = call.sizes();
        // SAFETY: the signature is emulator.cpp's; the arguments are the kernel's, as each call says beside it.
        let failed = unsafe {
            let emulate = library.get::<Emulate>(b"emulate\0").unwrap();
            let failed = emulate(
                name.as_ptr(),
                blocks,
                width,
                height,
                shared,
                *seed,
                arguments.as_mut_ptr(),
            );
            (!failed.is_null()).then(|| CStr::from_ptr(failed).to_string_lossy().into_owned())
        };
        assert!(
            failed.is_none(),
            "kernel {}: {}",
            call.name,
            failed.unwrap_or_default()
        );
    }

    fn multiprocessors(&self) -> usize {
        // So few that blocks take turns in small tests, too.
        1
    }
}
