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
mod gate;
mod grouped;
mod matrix;
#[cfg(target_arch = "x86_64")]
mod multiply;
mod norm;
mod number;
mod product;
pub mod profile;
mod rotary;
mod rows;
mod softmax;
mod squares;
mod swiglu;

pub use adamw::{Update, adamw};
pub use attention::{attention, attention_backward, join_heads, repeat_heads};
pub use combine::{combine, combine_backward};
pub use cross_entropy::cross_entropy;
pub use cuda::gpu_kernels;
pub use gate::{Gate, Gated, choose, gate, gate_backward, gates};
pub use norm::{rms_norm, rms_norm_backward};
pub use product::{
    add_grouped_product, add_product, grouped_product, product, product_into, set_grouped_product,
    set_product,
};
pub use rotary::rotate;
pub use softmax::{softmax, softmax_gradient};
pub use squares::sum_of_squares;
pub use swiglu::{swiglu, swiglu_backward};
