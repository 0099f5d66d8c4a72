//! CUDA kernels of our own for norms, routers, losses and other memory-bound operations.
//!
//! The kernels are in `source/`. NVRTC compiles them (`compiler.rs`), which a cache on disk
//! remembers (`code_cache.rs`), and CUDA's driver loads all of them at first use and queues them on
//! libtorch's streams (`driver.rs`). If either library is missing, libtorch's operations run
//! instead. Tests run the kernels on the host (`emulator.rs`), and queue them with a stand-in for
//! the driver (`stand_in_driver.cpp`). Not yet run on hardware.

mod adamw;
mod add_rows;
mod clamped_glu;
mod code_cache;
mod combine;
mod compiler;
mod cross_entropy;
mod driver;
#[cfg(test)]
mod emulator;
mod launch;
mod norm;
#[cfg(test)]
mod on_gpu;
mod quantize;
mod rotary;
mod router;
mod swiglu;

pub(crate) use adamw::adamw;
pub(crate) use add_rows::add_rows;
pub(crate) use clamped_glu::{clamped_glu, clamped_glu_backward};
pub(crate) use combine::{combine, combine_backward};
pub(crate) use cross_entropy::{cross_entropy, softmax, softmax_gradient};
pub(crate) use launch::Gpu;
pub(crate) use norm::{MAX_NORM_WIDTH, rms_norm, rms_norm_backward};
pub(crate) use quantize::quantize_rows;
pub(crate) use rotary::apply_rotary;
pub(crate) use router::{MAX_EXPERTS, router, router_backward, select_experts};
pub(crate) use swiglu::{swiglu, swiglu_backward};

use tch::{Device, Kind, Tensor};

/// Returns the GPU on which our kernels can process these tensors.
///
/// That needs contiguous tensors on one GPU that share a dtype, fp32 or bf16.
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
    let gpu = driver::ready(index).ok()?;
    Some(gpu)
}

/// True if `tensor` is contiguous, on the device of `like`, and of dtype `kind`.
pub(crate) fn same_device_contiguous(like: &Tensor, tensor: &Tensor, kind: Kind) -> bool {
    tensor.device() == like.device() && tensor.kind() == kind && tensor.is_contiguous()
}

/// Compiles and loads all kernels for a GPU at the first call, and returns its architecture, such
/// as `sm_90`.
///
/// # Errors
/// The reason why libtorch's operations run on that GPU instead.
pub fn load_gpu_kernels(index: usize) -> Result<String, String> {
    driver::ready(index).map(|gpu| gpu.architecture().to_owned())
}

/// Compiles the kernels for all GPUs of this machine into the cache on disk, without using a GPU.
///
/// # Errors
/// The first failure.
pub fn compile_gpu_kernels() -> Result<(), String> {
    driver::compile_ahead()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tensors::tests::TestTensor;
    use proptest::{prelude::*, test_runner::TestCaseError};
    use tch::kind::FLOAT_CPU;

    /// The dtype and alignment of a test's random tensors.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct TestInput {
        pub(crate) bf16: bool,
        /// True if the data starts at an address that is not aligned to vectors.
        shifted: bool,
    }

    impl Arbitrary for TestInput {
        type Parameters = ();
        type Strategy = BoxedStrategy<TestInput>;

        fn arbitrary_with(_: ()) -> BoxedStrategy<TestInput> {
            let drawn = (any::<bool>(), proptest::bool::weighted(0.2));
            drawn
                .prop_map(|(bf16, shifted)| TestInput { bf16, shifted })
                .boxed()
        }
    }

    impl TestInput {
        /// Returns normally distributed elements on the test device.
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

    /// Returns the configuration of a property test with `number` cases, or with the number in
    /// MOERUN_TEST_CASES: a memory checker makes each case slow.
    pub(crate) fn with_cases(number: u32) -> ProptestConfig {
        let given = std::env::var("MOERUN_TEST_CASES").ok();
        let number = given.map_or(number, |given| given.parse().expect("a number of cases"));
        ProptestConfig::with_cases(number)
    }

    /// Fails unless `ours` is `plain` within a relative and absolute tolerance.
    pub(crate) fn close(
        ours: &Tensor,
        plain: &Tensor,
        tolerance: f64,
    ) -> Result<(), TestCaseError> {
        let [ours, plain] = [ours, plain].map(|x| x.detach().to_f64());
        prop_assert_eq!(ours.size(), plain.size());
        let off = ((&ours - &plain).abs() - plain.abs() * tolerance).flatten(0, -1);
        let most = if off.numel() == 0 {
            0.0
        } else {
            off.max().double_value(&[])
        };
        let allowed = most <= tolerance;
        prop_assert!(allowed, "off by {most} where {tolerance} is allowed");
        Ok(())
    }

    /// Returns the device of the tests: the first GPU if MOERUN_TEST_DEVICE is `cuda`, else the
    /// emulator.
    pub(crate) fn test_gpu() -> (&'static dyn Gpu, Device) {
        if std::env::var("MOERUN_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
            torch_ext::load_cuda().unwrap();
            return (driver::ready(0).unwrap(), Device::Cuda(0));
        }
        (&emulator::Host, Device::Cpu)
    }

    #[test]
    fn host_tensors_and_missing_gpus_are_refused() {
        let x = Tensor::zeros([4, 4], FLOAT_CPU);
        assert!(gpu(&[&x]).is_none());
        let error = load_gpu_kernels(99).unwrap_err();
        // Without CUDA's libraries the error says how to get them, with them that this GPU is
        // missing.
        let expected = ["setup --cuda", "GPU 99", "CUDA's driver"];
        assert!(expected.iter().any(|text| error.contains(text)), "{error}");
    }
}
