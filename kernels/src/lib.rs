//! GEMMs, attention and fused elementwise kernels for transformers with MoE layers.
//!
//! Every operation has up to three paths. On the CPU, loops of our own use the widest vectors of
//! the processor and run on libtorch's threads. On NVIDIA GPUs, CUDA kernels of our own make one
//! pass over memory where libtorch makes several. On any other device, libtorch's operations run.
//!
//! The main entry points are [`gemm`] and [`grouped_gemm`], [`attention`], [`router`] and
//! [`combine`], [`cross_entropy`] and [`adamw`]. Module [`profile`] records where time goes.
//!
//! # Invariants
//! - All paths compute in fp32 and round once to the dtype of the tensors, so each path is a test
//!   of the others.
//! - The number of threads changes no bit of a result, except that of [`rms_norm_backward`].
//! - Nothing is differentiable: layers call forward and backward inside autograd nodes of their
//!   own.
//!
//! # Example
//! ```
//! use tch::Tensor;
//!
//! // The first row belongs to expert 0, the other two to expert 1.
//! let rows = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]).view([3, 2]);
//! let experts = Tensor::from_slice(&[1f32, 1., 2., 0.]).view([2, 2, 1]);
//! let groups = kernels::RowGroups::new(vec![1, 2]);
//! let out = kernels::grouped_gemm(&rows, &[experts], &groups);
//! assert_eq!(out, Tensor::from_slice(&[3f32, 6., 10.]).view([3, 1]));
//! ```

mod adamw;
mod adamw_update;
mod add_rows;
mod attention;
mod clamped_glu;
mod combine;
mod cross_entropy;
mod cuda;
mod exponential;
mod gain;
#[cfg(target_arch = "x86_64")]
mod gemm;
mod glu;
mod group_bias;
mod grouped;
mod matmul;
mod matrix;
mod norm;
mod number;
mod orthogonalize;
mod positions;
pub mod profile;
mod quantize;
mod rotary;
mod rotary_tables;
mod router;
mod routing;
mod row_groups;
mod rows;
mod softmax;
mod squares;
mod stochastic;
mod swiglu;
mod tensors;
mod upload;

pub use adamw::adamw;
pub use adamw_update::AdamWUpdate;
pub use add_rows::add_rows;
pub use attention::{
    AttentionOptions, HEAD_MULTIPLE, QUERY_TILE, ScoreMask, add_sinks, added_mask, attention,
    attention_backward, block_attention, block_attention_backward, causal_part,
    raise_to_largest_scores, repeat_heads, sinks_gradient, sum_repeated_heads,
};
pub use clamped_glu::ClampedGlu;
pub use combine::{combine, combine_backward};
pub use cross_entropy::cross_entropy;
pub use cuda::{compile_gpu_kernels, load_gpu_kernels};
pub use gain::Gain;
pub use glu::Glu;
pub use group_bias::{add_group_bias, sum_groups};
pub use matmul::{
    gemm, gemm_accumulate, gemm_f32, gemm_into, gemm_overwrite, grouped_gemm,
    grouped_gemm_accumulate, grouped_gemm_overwrite,
};
pub use norm::{rms_norm, rms_norm_backward};
pub use orthogonalize::{orthogonalization_flops, orthogonalize};
pub use quantize::quantize_rows;
pub use rotary::apply_rotary;
pub use router::{router, router_backward, select_experts, supports_router};
pub use routing::{RouterGradients, RouterOutput, RouterScoring};
pub use row_groups::RowGroups;
pub use softmax::{softmax, softmax_gradient};
pub use squares::sum_of_squares;
pub use stochastic::{GlobalRows, round_stochastically};
pub use upload::upload;
