//! The time of a step's GEMMs alone, below which no step can be.

use std::time::Instant;
use tch::{Device, Kind, Tensor};
use trainer::{GemmShape, ReferenceShape};

/// The time of all GEMMs of a step.
pub(super) struct GemmFloor {
    /// Time with libtorch's GEMM, which other implementations call.
    pub(super) libtorch_seconds: f64,
    pub(super) own_seconds: f64,
}

/// Seconds after which measuring a shape stops: on processors without a bf16 kernel libtorch takes
/// minutes.
const MAX_SECONDS_PER_SHAPE: f64 = 2.0;

/// Measures the GEMMs of a step, as the fastest of a few alternating rounds.
///
/// Operands that fit stay in the cache, unlike in a step.
pub(super) fn measure(shape: ReferenceShape, kind: Kind) -> GemmFloor {
    let mut floor = GemmFloor {
        libtorch_seconds: 0.0,
        own_seconds: 0.0,
    };
    for gemm in shape.gemms() {
        let times = gemm.times as f64;
        let fastest = measure_gemm(gemm, kind);
        floor.libtorch_seconds += fastest.libtorch_seconds * times;
        floor.own_seconds += fastest.own_seconds * times;
    }
    floor
}

/// Measures forward and both gradients of one matrix.
fn measure_gemm(gemm: GemmShape, kind: Kind) -> GemmFloor {
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
    let x = random(&[gemm.rows, gemm.inner]);
    let weight = random(&[gemm.outer, gemm.inner]);
    let grad_y = random(&[gemm.rows, gemm.outer]);
    let y = grad_y.empty_like();
    let grad_x = x.empty_like();
    // moerun accumulates gradients in fp32; libtorch's product has the dtype of its operands.
    let grad_weight = weight.empty_like();
    let sum = weight.to_kind(Kind::Float);
    let mut fastest = [f64::INFINITY; 2];
    let began = Instant::now();
    for round in 0..5 {
        if began.elapsed().as_secs_f64() > MAX_SECONDS_PER_SHAPE {
            break;
        }
        for side in [round % 2, 1 - round % 2] {
            let started = Instant::now();
            match side {
                0 => {
                    let _ = x.mm_out(&y, &weight.tr());
                    let _ = grad_y.mm_out(&grad_x, &weight);
                    let _ = grad_y.tr().mm_out(&grad_weight, &x);
                }
                _ => {
                    kernels::gemm_into(&y, &x, &weight.tr());
                    kernels::gemm_into(&grad_x, &grad_y, &weight);
                    kernels::gemm_accumulate(&sum, &grad_y.tr(), &x);
                }
            }
            fastest[side] = fastest[side].min(started.elapsed().as_secs_f64());
        }
    }
    GemmFloor {
        libtorch_seconds: fastest[0],
        own_seconds: fastest[1],
    }
}

/// Rows and columns of the GEMM that measures the peak of a processor, and of other devices.
const PEAK_SIZE: [i64; 2] = [1024, 8192];
/// Repetitions of that GEMM: other processes may be using the machine.
const PEAK_ROUNDS: usize = 20;

/// Measures the FLOP/s of the fastest large GEMM of a dtype, the peak in model FLOPs utilization.
///
/// It is measured because most processors have no published peak.
pub(super) fn peak(kind: Kind, device: Device) -> f64 {
    let size = PEAK_SIZE[usize::from(device != Device::Cpu)];
    let random = || Tensor::randn([size, size], (Kind::Float, device)).to_kind(kind);
    let left = random();
    let right = random();
    let out = random();
    // Reading a number waits for the device.
    let wait = || {
        out.narrow(0, 0, 1)
            .narrow(1, 0, 1)
            .to_kind(Kind::Double)
            .double_value(&[0, 0])
    };
    let mut fastest = f64::INFINITY;
    for _ in 0..PEAK_ROUNDS {
        wait();
        let started = Instant::now();
        kernels::gemm_into(&out, &left, &right);
        wait();
        fastest = fastest.min(started.elapsed().as_secs_f64());
    }
    2.0 * (size as f64).powi(3) / fastest
}
