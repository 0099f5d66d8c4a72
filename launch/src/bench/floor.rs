//! What a step's products with weights take by themselves: no step that makes them so can be faster.

use std::time::Instant;
use tch::{Device, Kind, Tensor};
use trainer::{GemmShape, ReferenceShape};

/// Seconds of all of them.
pub(super) struct GemmFloor {
    /// As libtorch multiplies, which is what other implementations call.
    pub(super) libtorch_seconds: f64,
    /// As this program multiplies.
    pub(super) own_seconds: f64,
}

/// Seconds after which a shape has been measured enough: libtorch has no kernels of some processors for bf16, and takes minutes.
const ENOUGH: f64 = 2.0;

/// The shortest of a few turns, which alternate. Operands stay in the cache where they fit, which a step's do not.
pub(super) fn measure(shape: ReferenceShape, kind: Kind) -> GemmFloor {
    let mut floor = GemmFloor {
        libtorch_seconds: 0.0,
        own_seconds: 0.0,
    };
    for GemmShape { rows, inner, outer, times } in shape.gemms() {
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
        let x = random(&[rows, inner]);
        let weight = random(&[outer, inner]);
        let grad = random(&[rows, outer]);
        let y = grad.empty_like();
        let of_x = x.empty_like();
        // Gradients are added up in fp32; libtorch's products have the dtype of what they multiply.
        let of_weight = weight.empty_like();
        let sum = weight.to_kind(Kind::Float);
        let mut fastest = [f64::INFINITY; 2];
        let began = Instant::now();
        for turn in 0..5 {
            if began.elapsed().as_secs_f64() > ENOUGH {
                break;
            }
            for side in [turn % 2, 1 - turn % 2] {
                let started = Instant::now();
                match side {
                    0 => {
                        let _ = x.mm_out(&y, &weight.tr());
                        let _ = grad.mm_out(&of_x, &weight);
                        let _ = grad.tr().mm_out(&of_weight, &x);
                    }
                    _ => {
                        kernels::gemm_into(&y, &x, &weight.tr());
                        kernels::gemm_into(&of_x, &grad, &weight);
                        kernels::gemm_accumulate(&sum, &grad.tr(), &x);
                    }
                }
                fastest[side] = fastest[side].min(started.elapsed().as_secs_f64());
            }
        }
        floor.libtorch_seconds += fastest[0] * times as f64;
        floor.own_seconds += fastest[1] * times as f64;
    }
    floor
}

/// Rows and columns of the products that a processor, and any other device, is measured with.
const SQUARE: [i64; 2] = [1024, 8192];
/// How often: others may be using the machine.
const TURNS: usize = 20;

/// Floating-point operations a second of the fastest large product of this dtype: the peak in "model FLOPs utilization", which is
/// measured, as makers promise none for most processors.
pub(super) fn peak(kind: Kind, device: Device) -> f64 {
    let size = SQUARE[usize::from(device != Device::Cpu)];
    let random = || Tensor::randn([size, size], (Kind::Float, device)).to_kind(kind);
    let left = random();
    let right = random();
    let out = random();
    // A number that comes back says that the device has ended.
    let wait = || {
        out.narrow(0, 0, 1)
            .narrow(1, 0, 1)
            .to_kind(Kind::Double)
            .double_value(&[0, 0])
    };
    let mut fastest = f64::INFINITY;
    for _ in 0..TURNS {
        wait();
        let started = Instant::now();
        kernels::gemm_into(&out, &left, &right);
        wait();
        fastest = fastest.min(started.elapsed().as_secs_f64());
    }
    2.0 * (size as f64).powi(3) / fastest
}
