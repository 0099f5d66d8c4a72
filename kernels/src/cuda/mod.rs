//! What layers do to their activations, in kernels of our own on NVIDIA GPUs, one pass over memory each: `source/` has them, NVRTC
//! compiles them when they are first used (`compiler.rs`), CUDA's driver queues them on libtorch's streams (`driver.rs`). Without either
//! library libtorch's operations do the same. Tests run them on the host (`emulator.rs`). Not yet run on hardware.

mod adamw;
mod compiler;
mod cross_entropy;
mod driver;
#[cfg(test)]
mod emulator;
mod norm;
mod rotary;
mod router;
mod rows;
mod swiglu;

pub(crate) use adamw::adamw;
pub(crate) use cross_entropy::{cross_entropy, softmax, softmax_gradient};
pub(crate) use norm::{MAX_NORM_WIDTH, rms_norm, rms_norm_backward};
pub(crate) use rotary::apply_rotary;
pub(crate) use router::{MAX_EXPERTS, router, router_backward, select_experts};
pub(crate) use rows::{combine, combine_backward};
pub(crate) use swiglu::{swiglu, swiglu_backward};

use std::ffi::{c_uint, c_void};
use tch::{Device, Kind, Tensor};

/// Threads of a block, where nothing else decides.
const THREADS: usize = 256;
/// Blocks that go through rows in turns, for each multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: usize = 8;

/// What runs kernels.
pub(crate) trait Gpu: Sync {
    /// Queues one where the calling thread queues work for `like`.
    ///
    /// # Panics
    /// With CUDA's message, as operations of libtorch's.
    fn run(&self, call: &KernelLaunch, like: &Tensor);

    /// How many multiprocessors it has.
    fn multiprocessors(&self) -> usize;
}

/// For which numbers kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    /// fp32, or bf16.
    kind: Kind,
    /// Whether 16 bytes are read and written together, so that everything has to be aligned to them.
    vectors: bool,
}

impl Variant {
    /// The widest for rows of `width` numbers of these tensors of one dtype.
    fn of(tensors: &[&Tensor], width: usize) -> Variant {
        let kind = tensors[0].kind();
        let aligned = |tensor: &&Tensor| (tensor.data_ptr() as usize).is_multiple_of(16);
        let vectors =
            (width * kind.elt_size_in_bytes()).is_multiple_of(16) && tensors.iter().all(aligned);
        Variant { kind, vectors }
    }

    /// Numbers that are read together.
    fn vector(self) -> usize {
        if self.vectors {
            16 / self.kind.elt_size_in_bytes()
        } else {
            1
        }
    }
}

/// A kernel with its arguments.
pub(crate) struct KernelLaunch<'a> {
    name: &'static str,
    variant: Variant,
    /// None: nothing happens.
    blocks: usize,
    /// Threads of a row, and rows of a block.
    block: (usize, usize),
    /// Bytes that a block has for itself, beside what its kernel asks for.
    shared: usize,
    arguments: &'a [Argument],
}

impl<'a> KernelLaunch<'a> {
    /// Of a kernel that goes through `rows` of `width` numbers, each independent of the others.
    fn over_rows(
        name: &'static str,
        gpu: &dyn Gpu,
        variant: Variant,
        (rows, width): (usize, usize),
        arguments: &'a [Argument],
    ) -> KernelLaunch<'a> {
        let threads = (width / variant.vector())
            .clamp(1, THREADS)
            .next_power_of_two();
        let rows_per_block = THREADS / threads;
        let blocks = if width == 0 {
            0
        } else {
            rows.div_ceil(rows_per_block)
                .min(BLOCKS_PER_MULTIPROCESSOR * gpu.multiprocessors())
        };
        KernelLaunch {
            name,
            variant,
            blocks,
            block: (threads, rows_per_block),
            shared: 0,
            arguments,
        }
    }

    /// Blocks, threads of a row, rows of a block, and bytes that a block has for itself.
    fn sizes(&self) -> [c_uint; 4] {
        [self.blocks, self.block.0, self.block.1, self.shared].map(|size| size as c_uint)
    }

    /// The bits of the arguments, each in a word: kernels get [`pointers`] to them.
    fn words(&self) -> Vec<u64> {
        let word = |argument: &Argument| match *argument {
            Argument::Data(data) => data as u64,
            Argument::Integer(x) => x as u64,
            Argument::Real(x) => u64::from(x.to_bits()),
        };
        self.arguments.iter().map(word).collect()
    }
}

fn pointers(words: &mut [u64]) -> Vec<*mut c_void> {
    words
        .iter_mut()
        .map(|word| std::ptr::from_mut(word).cast())
        .collect()
}

/// An argument of a kernel.
pub(crate) enum Argument {
    /// A tensor's memory, or nothing.
    Data(*mut c_void),
    /// `Long`.
    Integer(usize),
    /// `float`.
    Real(f32),
}

impl From<&Tensor> for Argument {
    fn from(tensor: &Tensor) -> Argument {
        Argument::Data(tensor.data_ptr())
    }
}

impl From<Option<&Tensor>> for Argument {
    fn from(tensor: Option<&Tensor>) -> Argument {
        tensor.map_or(Argument::Data(std::ptr::null_mut()), Argument::from)
    }
}

impl From<usize> for Argument {
    fn from(x: usize) -> Argument {
        Argument::Integer(x)
    }
}

impl From<f32> for Argument {
    fn from(x: f32) -> Argument {
        Argument::Real(x)
    }
}

/// A list of arguments.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { [$($crate::cuda::Argument::from($argument)),*] };
}
use arguments;

/// What runs kernels for such tensors: all on one GPU, without gaps, and of one dtype, fp32 or bf16. Nothing, where there are none.
pub(crate) fn gpu(tensors: &[&Tensor]) -> Option<&'static dyn Gpu> {
    let device = tensors[0].device();
    let kind = tensors[0].kind();
    let Device::Cuda(index) = device else {
        return None;
    };
    let fits = |tensor: &&Tensor| {
        tensor.device() == device && tensor.kind() == kind && tensor.is_contiguous()
    };
    if !matches!(kind, Kind::Float | Kind::BFloat16) || !tensors.iter().all(fits) {
        return None;
    }
    let gpu = driver::ready(index, kind).ok()?;
    Some(gpu)
}

/// Whether `tensor` lies where `like` does, without gaps, and holds `kind`.
pub(crate) fn same_device_contiguous(like: &Tensor, tensor: &Tensor, kind: Kind) -> bool {
    tensor.device() == like.device() && tensor.kind() == kind && tensor.is_contiguous()
}

/// Compiles the kernels for a GPU, unless they are: what they were compiled for, such as `sm_90`.
///
/// # Errors
/// Why libtorch's operations are used there instead.
pub fn compile_gpu_kernels(index: usize) -> Result<String, String> {
    driver::ready(index, Kind::BFloat16).map(|gpu| gpu.architecture().to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::TestCaseError;

    /// Which numbers a test draws.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Numbers {
        pub(crate) bf16: bool,
        /// Whether they begin where vectors do not.
        shifted: bool,
    }

    impl Arbitrary for Numbers {
        type Parameters = ();
        type Strategy = BoxedStrategy<Numbers>;

        fn arbitrary_with((): ()) -> BoxedStrategy<Numbers> {
            let drawn = (any::<bool>(), proptest::bool::weighted(0.2));
            drawn
                .prop_map(|(bf16, shifted)| Numbers { bf16, shifted })
                .boxed()
        }
    }

    impl Numbers {
        /// Normally distributed ones, where kernels of tests find them.
        pub(crate) fn random(&self, shape: &[i64]) -> Tensor {
            let kind = if self.bf16 {
                Kind::BFloat16
            } else {
                Kind::Float
            };
            let count: i64 = shape.iter().product();
            let all = Tensor::randn([count + 1], (Kind::Float, test_gpu().1)).to_kind(kind);
            all.narrow(0, i64::from(self.shifted), count).view(shape)
        }
    }

    /// Whether `ours` is `plain` up to a tolerance, relative and absolute.
    pub(crate) fn close(
        ours: &Tensor,
        plain: &Tensor,
        tolerance: f64,
    ) -> Result<(), TestCaseError> {
        let [ours, plain] = [ours, plain].map(|x| x.detach().to_kind(Kind::Double));
        prop_assert_eq!(ours.size(), plain.size());
        let off = ((&ours - &plain).abs() - plain.abs() * tolerance).flatten(0, -1);
        let most = if off.numel() == 0 {
            0.0
        } else {
            off.max().double_value(&[])
        };
        prop_assert!(
            most <= tolerance,
            "off by {} where {} is allowed",
            most,
            tolerance
        );
        Ok(())
    }

    /// What tests run kernels on, and where their tensors are: the host, or with MOERUN_TEST_DEVICE=cuda the first GPU.
    pub(crate) fn test_gpu() -> (&'static dyn Gpu, Device) {
        if std::env::var("MOERUN_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
            torch_ext::load_cuda().unwrap();
            return (driver::ready(0, Kind::BFloat16).unwrap(), Device::Cuda(0));
        }
        (&emulator::Host, Device::Cpu)
    }

    #[test]
    fn what_is_not_there_or_not_alike_is_not_run() {
        let x = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu));
        assert!(gpu(&[&x]).is_none());
        assert!(
            compile_gpu_kernels(99)
                .unwrap_err()
                .contains("setup --cuda")
        );
    }

    #[test]
    fn rows_that_are_not_aligned_go_one_by_one() {
        let x = Tensor::zeros([64], (Kind::BFloat16, Device::Cpu));
        let vectors = |x: &Tensor, width: usize| Variant::of(&[x], width).vectors;
        assert!(vectors(&x, 8) && vectors(&x.narrow(0, 8, 8), 8));
        assert!(!vectors(&x, 7) && !vectors(&x.narrow(0, 1, 8), 8));
    }
}
