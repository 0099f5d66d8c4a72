//! A host emulator of the kernels for tests, with its fibers in `emulator.cpp`.

use super::{
    compiler::{definitions, source},
    launch::{Gpu, KernelLaunch, Variant, pointers},
};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    ffi::{CStr, CString, c_char, c_uint, c_void},
    process::Command,
    sync::OnceLock,
};
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::{BlockShape, MAX_SHARED, arguments};
    use tch::kind::FLOAT_CPU;

    /// Launches one block of `swiglu`, which has no shuffles, or of `rms_norm`, which has.
    fn launch(name: &'static str, block: BlockShape, shared: usize, shift: i64) {
        let x = Tensor::zeros([64 + shift], FLOAT_CPU).narrow(0, shift, 64);
        let out = Tensor::zeros([64], FLOAT_CPU);
        let of_swiglu = arguments![&x, &out, 1, 32];
        let scale = Tensor::zeros([1], FLOAT_CPU);
        let of_norm = arguments![&x, &x, &out, &scale, 1, 64, 1e-5f32];
        let launch = KernelLaunch {
            name,
            variant: Variant {
                kind: tch::Kind::Float,
                vectors: true,
            },
            blocks: 1,
            block,
            shared,
            arguments: if name == "swiglu" {
                &of_swiglu
            } else {
                &of_norm
            },
        };
        Host.run(&launch, &x);
    }

    fn block(threads_per_row: usize, rows: usize) -> BlockShape {
        BlockShape {
            threads_per_row,
            rows,
        }
    }

    #[test]
    fn the_largest_launch_runs() {
        launch("swiglu", block(32, 32), MAX_SHARED, 0);
        launch("rms_norm", block(32, 32), MAX_SHARED - 128, 0);
    }

    #[test]
    #[should_panic(expected = "1024 threads")]
    fn too_many_threads_are_refused() {
        launch("swiglu", block(64, 32), 0, 0);
    }

    #[test]
    #[should_panic(expected = "48 KB")]
    fn static_shared_memory_counts() {
        launch("rms_norm", block(32, 1), MAX_SHARED - 124, 0);
    }

    #[test]
    #[should_panic(expected = "fewer than 32 threads")]
    fn part_of_a_warp_cannot_shuffle() {
        launch("rms_norm", block(16, 1), 0, 0);
    }

    #[test]
    #[should_panic(expected = "misaligned")]
    fn a_pack_that_is_not_aligned_is_refused() {
        launch("swiglu", block(32, 1), 0, 1);
    }
}
