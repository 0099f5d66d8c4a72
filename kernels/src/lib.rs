//! Matrix products by the fastest road there is, and what a layer does to its activations between them, in one pass over memory
//! where libtorch makes many: on the CPU loops of our own over rows, with the widest vectors that the processor has, on libtorch's
//! threads; on NVIDIA GPUs kernels of our own (`cuda/`); elsewhere libtorch's operations. All compute in fp32 and round once to the
//! tensors' dtype, so each is the others' test.
//!
//! Nothing here is differentiable: layers call forward and backward inside nodes of their own.

mod adamw;
mod attention;
mod combine;
mod cross_entropy;
mod cuda;
mod exponential;
#[cfg(target_arch = "x86_64")]
mod gemm;
mod grouped;
mod matmul;
mod matrix;
mod norm;
mod number;
pub mod profile;
mod rotary;
mod router;
mod rows;
mod softmax;
mod squares;
mod swiglu;

pub use adamw::{AdamWUpdate, adamw};
pub use attention::{attention, attention_backward, repeat_heads, sum_repeated_heads};
pub use combine::{combine, combine_backward};
pub use cross_entropy::cross_entropy;
pub use cuda::compile_gpu_kernels;
pub use matmul::{
    gemm, gemm_accumulate, gemm_into, gemm_overwrite, grouped_gemm, grouped_gemm_accumulate,
    grouped_gemm_overwrite,
};
pub use norm::{rms_norm, rms_norm_backward};
pub use rotary::apply_rotary;
pub use router::{
    RouterOutput, RouterScoring, router, router_backward, select_experts, supports_router,
};
pub use softmax::{softmax, softmax_gradient};
pub use squares::sum_of_squares;
pub use swiglu::{swiglu, swiglu_backward};
