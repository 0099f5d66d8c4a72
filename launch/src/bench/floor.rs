//! What a step's products with weights take by themselves: no step that makes them so can be faster.

use std::time::Instant;
use tch::{Kind, Tensor};
use trainer::Shape;

/// Seconds of all of them.
pub(super) struct Floor {
    /// As libtorch multiplies, which is what other implementations call.
    pub(super) by_libtorch: f64,
    /// As this program multiplies.
    pub(super) by_ours: f64,
}

/// The shortest of a few turns, which alternate. Operands stay in the cache where they fit, which a step's do not.
pub(super) fn measure(shape: Shape, kind: Kind) -> Floor {
    let mut floor = Floor { by_libtorch: 0.0, by_ours: 0.0 };
    for ([rows, inner, outer], times) in shape.products() {
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, tch::Device::Cpu)).to_kind(kind);
        let (x, weight, grad) = (random(&[rows, inner]), random(&[outer, inner]), random(&[rows, outer]));
        let (y, of_x) = (grad.empty_like(), x.empty_like());
        // Gradients are added up in fp32; libtorch's products have the dtype of what they multiply.
        let (of_weight, sum) = (weight.empty_like(), weight.to_kind(Kind::Float));
        let mut fastest = [f64::INFINITY; 2];
        for turn in 0..5 {
            for side in [turn % 2, 1 - turn % 2] {
                let started = Instant::now();
                match side {
                    0 => {
                        let _ = x.mm_out(&y, &weight.tr());
                        let _ = grad.mm_out(&of_x, &weight);
                        let _ = grad.tr().mm_out(&of_weight, &x);
                    }
                    _ => {
                        kernels::product_into(&y, &x, &weight.tr());
                        kernels::product_into(&of_x, &grad, &weight);
                        kernels::add_product(&sum, &grad.tr(), &x);
                    }
                }
                fastest[side] = fastest[side].min(started.elapsed().as_secs_f64());
            }
        }
        floor.by_libtorch += fastest[0] * times as f64;
        floor.by_ours += fastest[1] * times as f64;
    }
    floor
}
