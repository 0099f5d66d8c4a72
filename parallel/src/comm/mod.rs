//! Communicators: the collectives of a group of ranks, on any transport.

mod arrival;
mod backend;
mod communicator;
mod deferred;
mod device_comm;
mod echo;
mod flight;
mod gloo;
mod hccl;
mod hybrid;
mod lazy;
mod local;
mod member_ranges;
mod membership;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod shm;
mod staged;
mod tree;

pub use backend::{Backend, MpiLaunch, mpi_library};
pub(crate) use backend::{DeviceTransport, HostTransport, Transports};
pub use communicator::{CommError, Communicator, Work};
pub(crate) use communicator::{Progress, check_splits};
pub(crate) use device_comm::{DeviceComm, StreamBudget};
pub(crate) use echo::EchoComm;
pub(crate) use flight::{FlightRecorder, Timeouts};
pub(crate) use gloo::{Gloo, MAX_MESH_SIZE};
pub(crate) use hccl::Hccl;
pub(crate) use hybrid::HybridComm;
pub(crate) use lazy::LazyComm;
pub use local::Local;
pub use member_ranges::MemberRanges;
pub(crate) use membership::Membership;
#[cfg(feature = "mpi")]
pub use mpi::finalize;
#[cfg(feature = "mpi")]
pub(crate) use mpi::{Mpi, broadcast_bytes, universe};
pub(crate) use nccl::Nccl;
pub(crate) use shm::Shm;
pub(crate) use staged::Staged;
pub use torch_ext::ReduceOp;
pub(crate) use tree::{JoinLevel, TreeComm};
