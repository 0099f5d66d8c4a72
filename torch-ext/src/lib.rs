//! Bindings to parts of libtorch 2.11 and c10d that `tch` does not expose.
//!
//! - [`Store`] and [`Gloo`]: c10d's rendezvous store and CPU process group, with asynchronous
//!   [`Work`].
//! - [`StoreBackend`]: a store whose operations Rust carries out.
//! - [`attach_backward`]: a custom autograd node whose backward is a Rust closure.
//! - [`fused_adamw`]: an optimizer step in one pass over memory.
//! - [`generator_state`], [`allocator_bytes`], [`synchronize`], [`keep_freed_memory`]: the state of
//!   devices and allocators.
//! - [`Stream`] and [`Event`]: queues of work on devices that have them.
//! - [`set_deterministic`], [`set_variables`]: settings of the process.
//! - [`skip_teardown_at_exit`]: a faster process exit.
//! - [`fork_orphan`]: copies of a process that has loaded libtorch.
//! - [`parallel_for`]: loops on libtorch's own threads.
//! - [`load_cuda`], [`load_npu`]: load libtorch's kernels for a device into the running program.
//!
//! # Invariants
//! - A C++ exception becomes an [`Error`] with its message, and a Rust panic inside a callback
//!   becomes a C++ exception. Nothing unwinds across the language boundary.
//! - `unsafe` code for libtorch is only in this crate, in `kernels` and in the backends of
//!   `parallel`.
//!
//! # Example
//! ```
//! use tch::{Kind, Tensor};
//! use torch_ext::attach_backward;
//!
//! # fn main() -> Result<(), torch_ext::Error> {
//! let x = Tensor::from_slice(&[1f32, 2.]).set_requires_grad(true);
//! let doubled = tch::no_grad(|| &x * 2.0);
//! let outputs = attach_backward(&[&x], vec![doubled], |grads| {
//!     Ok(vec![grads[0].as_ref().map(|grad| grad * 2.0)])
//! })?;
//! outputs[0].sum(Kind::Float).backward();
//! assert_eq!(x.grad(), Tensor::from_slice(&[2f32, 2.]));
//! # Ok(())
//! # }
//! ```

mod autograd;
mod c10d;
mod callback;
mod cuda;
mod custom_store;
mod deterministic;
mod device;
mod error;
mod exit;
mod ffi;
mod fork;
mod library;
mod npu;
mod optim;
mod stream;
mod threads;
mod variables;

pub use autograd::attach_backward;
pub use c10d::{
    Gloo, GlooAddress, GlooDevice, GlooTls, PeerNetwork, ReduceOp, Store, Work, check_tls,
};
pub use cuda::{compute_capability, load_cuda, pci_bus_id};
pub use custom_store::{StoreBackend, StoreOperation, StoreReply, StoreRequest};
pub use deterministic::{set_deterministic, uses_deterministic};
pub use device::{
    allocator_bytes, count_host_memory, generator_state, keep_freed_memory, pinned, reset_peak,
    set_generator_state, synchronize, use_device,
};
pub use error::Error;
pub use exit::skip_teardown_at_exit;
pub use fork::{Forked, fork_orphan};
pub use library::load_library;
pub use npu::{ASCEND_FOLDER, load_npu, load_npu_library};
pub use optim::{AdamW, fused_adamw};
pub use stream::{Event, Priority, Stream};
pub use threads::{max_parallel_ranges, parallel_for};
pub use variables::set_variables;
