//! The one C++ edge: what libtorch 2.11 has and `tch` does not expose.
//!
//! - [`Store`] and [`Gloo`]: c10d's rendezvous store and CPU process group, with asynchronous [`Work`];
//! - [`attach_backward`]: a custom autograd node whose backward is a Rust closure;
//! - [`fused_adamw`]: the optimizer step in one pass over memory;
//! - [`generator_state`], [`allocator_bytes`], [`synchronize`], [`keep_freed_memory`]: per-device state;
//! - [`Stream`] and [`Event`]: queues of work on devices that have them;
//! - [`skip_teardown_at_exit`]: a process that ends soon;
//! - [`parallel_for`]: loops on libtorch's own threads;
//! - [`load_cuda`], [`load_npu`]: bring libtorch's kernels for a device into the running program.
//!
//! Invariant: C++ exceptions become [`Error`] with their message, Rust panics inside callbacks become C++
//! exceptions, and nothing unwinds across the edge. `unsafe` for libtorch lives here and in the backends of
//! `parallel` alone.

mod autograd;
mod c10d;
mod cuda;
mod device;
mod error;
mod exit;
mod ffi;
mod library;
mod npu;
mod optim;
mod stream;
mod threads;

pub use autograd::attach_backward;
pub use c10d::{Gloo, GlooAddress, ReduceOp, Store, Work};
pub use cuda::{compute_capability, load_cuda, pci_bus_id};
pub use device::{
    allocator_bytes, count_host_memory, generator_state, keep_freed_memory, pinned, reset_peak,
    set_generator_state, synchronize,
};
pub use error::Error;
pub use exit::skip_teardown_at_exit;
pub use library::load_library;
pub use npu::{ASCEND_FOLDER, load_npu, use_npu};
pub use optim::{AdamW, fused_adamw};
pub use stream::{Event, Stream, set_device};
pub use threads::{max_parallel_ranges, parallel_for};
