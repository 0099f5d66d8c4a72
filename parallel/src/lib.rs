//! Where work runs: devices, communicators, the mesh of ranks, and gradients summed over replicas.
//!
//! Invariants:
//! - [`Mesh`] alone turns a rank into coordinates and groups; nobody else does arithmetic on ranks.
//! - [`Accelerator`] and [`Communicator`] alone know what they run on; no other crate names a device.
//! - Communicators are made in one place, [`World::group`], so every one has the same timeout.
//! - A weight's gradient is added up by [`Weight::add_gradient`] alone, never by autograd.
//! - Collectives inside a model are the differentiable functions of [`collectives`].

mod affinity;
pub mod agreement;
mod background;
pub mod collectives;
mod comm;
pub mod conformance;
pub mod context;
mod device;
mod gradients;
mod mesh;
pub mod pipeline;
pub mod recompute;
pub mod sharding;
mod sum;
pub mod tensor;
mod weight;
mod world;

pub use affinity::{CpuAffinity, CpuTopology};
#[cfg(feature = "mpi")]
pub use comm::finalize;
pub use comm::{Backend, CommError, Communicator, Gloo, Local, ReduceOp, Work, mpi_library};
pub use device::{
    Accelerator, Copier, Cpu, DiscreteDevice, MemoryUse, accelerator, device_kind, peak_resident,
};
pub use gradients::{
    BucketPlan, DeferredGradient, GradientBuckets, Replication, matrix_shape, plan_buckets,
};
pub use mesh::{Coordinates, GroupKind, Mesh, MeshError, MeshShape};
pub use recompute::Activation;
pub use sum::GradientSum;
pub use weight::{Contribution, Weight, add_gradients, linear, linears};
pub use world::{MpiLaunch, RankEnv, Rendezvous, World, run_on_threads};
