//! Parallel execution on many ranks: devices, communicators, the mesh, sharded weights and
//! pipelines.
//!
//! A [`World`] is all ranks of a run. It creates the [`Communicator`] of each group of ranks, and a
//! [`Mesh`] tells which ranks form the groups. Each rank computes on an [`Accelerator`]. The
//! [`pipeline`] executes schedules, and [`GradientBuckets`] sums the gradients of replicas.
//!
//! Invariants:
//! - Only [`Mesh`] turns a rank into coordinates and groups; no other code does arithmetic on
//!   ranks.
//! - Only [`Accelerator`] and [`Communicator`] depend on the hardware; no other crate names a
//!   device.
//! - Only [`World`] creates communicators, so that all have the same timeout.
//! - Only [`Weight::add_gradient`] accumulates a weight's gradient; autograd never does.
//! - Collectives inside a model are the differentiable functions of [`collectives`].
//!
//! Two ranks, as threads of this process, sum a tensor:
//!
//! ```
//! use parallel::{CommError, ReduceOp, run_on_threads};
//! use std::time::Duration;
//! use tch::Tensor;
//!
//! let timeout = Duration::from_secs(20);
//! let sums = run_on_threads(2, timeout, |world| -> Result<f64, CommError> {
//!     let group = world.all("example")?;
//!     let x = Tensor::from_slice(&[group.rank() as f64 + 1.0]);
//!     group.all_reduce(&x, ReduceOp::Sum)?.wait()?;
//!     Ok(x.double_value(&[0]))
//! });
//! for sum in sums {
//!     assert_eq!(sum?, 3.0);
//! }
//! # Ok::<(), CommError>(())
//! ```

mod affinity;
pub mod agreement;
mod attention_node;
mod background;
mod bounded_io;
pub mod collectives;
mod comm;
pub mod conformance;
pub mod context;
mod device;
mod gradients;
mod host_groups;
mod machines;
mod mesh;
mod networks;
pub mod pipeline;
mod rank_env;
pub mod recompute;
mod rendezvous;
mod rows;
pub mod sharding;
pub mod start_cost;
mod store;
mod sum;
pub mod tensor;
mod weight;
mod world;

pub use affinity::{CpuAffinity, CpuTopology};
pub use attention_node::{AttentionResult, attention_node};
pub use bounded_io::{within, write_within};
#[cfg(feature = "mpi")]
pub use comm::finalize;
pub use comm::{
    Backend, CommError, Communicator, Local, MemberRanges, MpiLaunch, ReduceOp, Work, mpi_library,
};
pub use device::{
    Accelerator, Copier, Cpu, DiscreteDevice, MemoryUse, accelerator, device_kind, load_ahead,
    peak_resident,
};
pub use gradients::{BucketPlan, GradientBuckets, MAX_REDUCTIONS, Replication, plan_buckets};
pub use mesh::{Coordinates, GroupKind, Mesh, MeshError, MeshShape, NodeSplit};
pub use rank_env::{RankEnv, Rendezvous};
pub use recompute::Activation;
pub use rows::{matrix_shape, own_rows};
pub use secure_link::Secret;
pub use store::{SimulatedClients, StoreAccess, StoreServer, StoreTraffic};
pub use sum::GradientSum;
pub use weight::{
    Contribution, DeferredGradient, Weight, add_bias, add_gradients, linear, linear_f32, linears,
};
pub use world::{World, run_on_threads};
