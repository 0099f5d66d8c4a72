//! A host emulator of the kernels for tests, with its fibers in `emulator.cpp`.

use super::compiler::{definitions, source};
use super::launch::{Gpu, KernelLaunch, Variant, pointers};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_uint, c_void};
use std::process::Command;
use std::sync::OnceLock;
use tch::Tensor;

/// The host, in the role of a GPU.
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
fn compile(variant: Variant) -> Library {
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
    assert!(status.success(), "the C++ compiler refuses the kernels");
    // SAFETY: the library was compiled for this process.
    unsafe { Library::open(Some(&library), RTLD_NOW | RTLD_LOCAL) }.unwrap()
}

#[derive(Default)]
struct Emulator {
    libraries: HashMap<Variant, Library>,
    /// Seed of the next kernel's thread order.
    seed: u32,
}

impl Gpu for Host {
    fn run(&self, launch: &KernelLaunch, _like: &Tensor) {
        static EMULATOR: OnceLock<Mutex<Emulator>> = OnceLock::new();
        // One kernel at a time: the shared memory of a block is static in C++.
        let mut emulator = EMULATOR.get_or_init(Mutex::default).lock();
        emulator.seed += 1;
        let seed = emulator.seed;
        let library = emulator
            .libraries
            .entry(launch.variant)
            .or_insert_with(|| compile(launch.variant));
        let name = CString::new(launch.name).unwrap();
        let mut words = launch.words();
        let mut arguments = pointers(&mut words);
        let size = launch.dimensions();
        // SAFETY: the signature is that of emulator.cpp, and each launch lists the arguments of
        // its kernel.
        let failure = unsafe {
            let emulate = library.get::<Emulate>(b"emulate\0").unwrap();
            let failure = emulate(
                name.as_ptr(),
                size.blocks,
                size.threads_per_row,
                size.rows,
                size.shared,
                seed,
                arguments.as_mut_ptr(),
            );
            (!failure.is_null()).then(|| CStr::from_ptr(failure).to_string_lossy().into_owned())
        };
        if let Some(failure) = failure {
            panic!("kernel {}: {failure}", launch.name);
        }
    }

    fn multiprocessors(&self) -> usize {
        // So few that blocks loop over rows even in small tests.
        1
    }
}
