//! Kernel launches: variants, block shapes and arguments.

use std::ffi::{c_uint, c_void};
use tch::{Kind, Tensor};

/// Bytes of shared memory per block that every GPU provides, static and dynamic together.
pub(crate) const MAX_SHARED: usize = 48 << 10;
/// Default number of threads of a block.
pub(crate) const THREADS: usize = 256;
/// Blocks per multiprocessor in launches whose blocks loop over rows.
pub(crate) const BLOCKS_PER_MULTIPROCESSOR: usize = 8;

/// A device that runs kernels.
pub(crate) trait Gpu: Sync {
    /// Queues a kernel on the calling thread's current stream for the device of `like`.
    ///
    /// # Panics
    /// With CUDA's message, as libtorch's operations do.
    fn run(&self, launch: &KernelLaunch, like: &Tensor);

    fn multiprocessors(&self) -> usize;
}

/// The parameters for which the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    /// Dtype of the elements, fp32 or bf16.
    pub(super) kind: Kind,
    /// True if a thread reads and writes 16 bytes at once, so all rows must be aligned to them.
    pub(super) vectors: bool,
}

impl Variant {
    /// Every variant, each of which a step may need: rows of views may be unaligned, and some
    /// tensors of a bf16 model are fp32.
    pub(super) const ALL: [Variant; 4] = [
        Variant::new(Kind::Float, true),
        Variant::new(Kind::Float, false),
        Variant::new(Kind::BFloat16, true),
        Variant::new(Kind::BFloat16, false),
    ];

    const fn new(kind: Kind, vectors: bool) -> Variant {
        Variant { kind, vectors }
    }

    /// Returns the widest variant for rows of `width` elements of tensors that share a dtype.
    pub(super) fn of(tensors: &[&Tensor], width: usize) -> Variant {
        let kind = tensors[0].kind();
        let aligned = |tensor: &&Tensor| (tensor.data_ptr() as usize).is_multiple_of(16);
        let row_bytes = width * kind.elt_size_in_bytes();
        let vectors = row_bytes.is_multiple_of(16) && tensors.iter().all(aligned);
        Variant { kind, vectors }
    }

    /// Returns the number of elements that a thread reads at once.
    pub(super) fn vector(self) -> usize {
        if self.vectors {
            16 / self.kind.elt_size_in_bytes()
        } else {
            1
        }
    }
}

/// The division of a block's threads among rows.
#[derive(Clone, Copy)]
pub(crate) struct BlockShape {
    pub(super) threads_per_row: usize,
    pub(super) rows: usize,
}

/// A kernel with its grid and arguments.
pub(crate) struct KernelLaunch<'a> {
    pub(super) name: &'static str,
    pub(super) variant: Variant,
    /// With zero blocks, nothing is launched.
    pub(super) blocks: usize,
    pub(super) block: BlockShape,
    /// Bytes of dynamic shared memory per block.
    pub(super) shared: usize,
    pub(super) arguments: &'a [Argument],
}

/// The launch dimensions in the types of CUDA's driver.
pub(super) struct Dimensions {
    pub(super) blocks: c_uint,
    pub(super) threads_per_row: c_uint,
    pub(super) rows: c_uint,
    pub(super) shared: c_uint,
}

impl<'a> KernelLaunch<'a> {
    /// Returns the launch of a kernel over independent rows of `width` elements.
    pub(super) fn over_rows(
        name: &'static str,
        gpu: &dyn Gpu,
        variant: Variant,
        rows: usize,
        width: usize,
        arguments: &'a [Argument],
    ) -> KernelLaunch<'a> {
        let threads_per_row = (width / variant.vector())
            .clamp(1, THREADS)
            .next_power_of_two();
        let block = BlockShape {
            threads_per_row,
            rows: THREADS / threads_per_row,
        };
        let most = BLOCKS_PER_MULTIPROCESSOR * gpu.multiprocessors();
        let blocks = if width == 0 {
            0
        } else {
            rows.div_ceil(block.rows).min(most)
        };
        KernelLaunch {
            name,
            variant,
            blocks,
            block,
            shared: 0,
            arguments,
        }
    }

    pub(super) fn dimensions(&self) -> Dimensions {
        Dimensions {
            blocks: self.blocks as c_uint,
            threads_per_row: self.block.threads_per_row as c_uint,
            rows: self.block.rows as c_uint,
            shared: self.shared as c_uint,
        }
    }

    /// Returns the bits of each argument in a word. Kernels get [`pointers`] to the words.
    pub(super) fn words(&self) -> Vec<u64> {
        let word = |argument: &Argument| match *argument {
            Argument::Data(data) => data as u64,
            Argument::Integer(x) => x as u64,
            Argument::Real(x) => u64::from(x.to_bits()),
        };
        self.arguments.iter().map(word).collect()
    }
}

pub(super) fn pointers(words: &mut [u64]) -> Vec<*mut c_void> {
    words
        .iter_mut()
        .map(|word| std::ptr::from_mut(word).cast())
        .collect()
}

/// An argument of a kernel.
pub(crate) enum Argument {
    /// The address of a tensor's data, or null.
    Data(*mut c_void),
    /// A `Long` in the kernels' source.
    Integer(usize),
    /// A `float` in the kernels' source.
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

/// Returns an array of [`Argument`]s.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { [$($crate::cuda::launch::Argument::from($argument)),*] };
}
pub(super) use arguments;

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn unaligned_rows_are_read_by_element() {
        let x = Tensor::zeros([64], (Kind::BFloat16, Device::Cpu));
        let vectors = |x: &Tensor, width: usize| Variant::of(&[x], width).vectors;
        assert!(vectors(&x, 8));
        assert!(vectors(&x.narrow(0, 8, 8), 8));
        assert!(!vectors(&x, 7));
        assert!(!vectors(&x.narrow(0, 1, 8), 8));
    }
}
