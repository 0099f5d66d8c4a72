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

/// Faults of kernels that a GPU does not report, found by the sanitizer.
const SANITIZED: &str = "-fsanitize=alignment,bounds,integer-divide-by-zero,shift,\
                         signed-integer-overflow";

/// Compiles the kernels of a variant for the host.
fn compile(variant: Variant) -> Library {
    let folder = tempfile::tempdir().unwrap();
    let [program, emulator, object, library] =
        ["program.cu", "emulator.cpp", "emulator.o", "emulator.so"]
            .map(|name| folder.path().join(name));
    std::fs::write(&program, source()).unwrap();
    std::fs::write(&emulator, include_str!("emulator.cpp")).unwrap();
    let compiler = || Command::new(std::env::var("CXX").unwrap_or("c++".into()));
    let mut compile = compiler();
    compile
        .args(["-std=c++20", "-O1", "-c", "-fPIC", SANITIZED])
        .args(["-fno-sanitize-recover=all", "-o"])
        .arg(&object)
        .arg(&emulator)
        .args(definitions(variant));
    // A link with the sanitizer's option would add its runtime library.
    let mut link = compiler();
    link.args(["-shared", "-o"]).arg(&library).arg(&object);
    for mut command in [compile, link] {
        let status = command.status().unwrap();
        assert!(status.success(), "the C++ compiler refuses the kernels");
    }
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
    use crate::cuda::launch::{Argument, BlockShape, MAX_SHARED, arguments};
    use tch::{Device, Kind, kind::FLOAT_CPU};

    /// Launches one block of a kernel for fp32 with packs.
    fn launch(name: &'static str, block: BlockShape, shared: usize, arguments: &[Argument]) {
        let launch = KernelLaunch {
            name,
            variant: Variant {
                kind: Kind::Float,
                vectors: true,
            },
            blocks: 1,
            block,
            shared,
            arguments,
        };
        Host.run(&launch, &zeros(0));
    }

    fn zeros(count: i64) -> Tensor {
        Tensor::zeros([count], FLOAT_CPU)
    }

    /// Launches `swiglu`, which has no shuffles, on one row.
    fn launch_swiglu(block: BlockShape, shared: usize) {
        let [hidden, out] = [64, 64].map(zeros);
        launch("swiglu", block, shared, &arguments![&hidden, &out, 1, 32]);
    }

    /// Launches `rms_norm`, which has shuffles, on one row.
    fn launch_norm(block: BlockShape, shared: usize) {
        let [x, out, scale] = [64, 64, 1].map(zeros);
        launch(
            "rms_norm",
            block,
            shared,
            &arguments![&x, &x, 0.0f32, 1, &out, &scale, 1, 64, 1e-5f32],
        );
    }

    fn block(threads_per_row: usize, rows: usize) -> BlockShape {
        BlockShape {
            threads_per_row,
            rows,
        }
    }

    #[test]
    fn the_largest_launch_runs() {
        launch_swiglu(block(32, 32), MAX_SHARED);
        launch_norm(block(32, 32), MAX_SHARED - 128);
    }

    #[test]
    #[should_panic(expected = "1024 threads")]
    fn too_many_threads_are_refused() {
        launch_swiglu(block(64, 32), 0);
    }

    #[test]
    #[should_panic(expected = "48 KB")]
    fn static_shared_memory_counts() {
        launch_norm(block(32, 1), MAX_SHARED - 124);
    }

    #[test]
    #[should_panic(expected = "fewer than 32 threads")]
    fn part_of_a_warp_cannot_shuffle() {
        launch_norm(block(16, 1), 0);
    }

    #[test]
    #[should_panic(expected = "misaligned address at common.cuh")]
    fn a_pack_that_is_not_aligned_is_refused() {
        let [hidden, out] = [65, 64].map(zeros);
        let hidden = hidden.narrow(0, 1, 64);
        launch("swiglu", block(32, 1), 0, &arguments![&hidden, &out, 1, 32]);
    }

    #[test]
    #[should_panic(expected = "overflow of a signed integer at combine.cu")]
    fn an_index_beyond_64_bits_is_refused() {
        let [rows, out] = [64, 128].map(zeros);
        let row_ids = Tensor::zeros([1], (Kind::Int, Device::Cpu));
        let none = None::<&Tensor>;
        // The first of two tokens has no rows, the rows of the second one begin at -2^63 and would
        // end at -2^64.
        let arguments = arguments![&rows, &row_ids, none, &out, 1, 2, 1 << 63, 64];
        launch("combine", block(16, 2), 0, &arguments);
    }

    #[test]
    #[should_panic(expected = "shift beyond the width of a number at router.cu")]
    fn a_shift_beyond_32_bits_is_refused() {
        // A thread marks its experts in 32 bits, and this is the 33rd of the first one.
        let experts = crate::cuda::MAX_EXPERTS + 1;
        let logits = zeros(experts as i64);
        let chosen = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
        let none = None::<&Tensor>;
        let arguments = arguments![&logits, none, &chosen, 1, experts, 1, 0];
        launch("select_experts", block(32, 1), 4 * experts, &arguments);
    }

    #[test]
    #[should_panic(expected = "division by zero or overflow at rotary.cu")]
    fn a_division_by_zero_is_refused() {
        let [x, table, out] = [64, 32, 64].map(zeros);
        let none = None::<&Tensor>;
        let arguments = arguments![&x, &table, &table, none, &out, 1, 32, 64, 0, 1, 64];
        launch("apply_rotary", block(32, 1), 0, &arguments);
    }
}
