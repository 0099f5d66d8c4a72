//! The communication backends, and the transports that each of them uses.

use crate::device::NPU;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Device;

/// The communication backend of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// NCCL for tensors on GPUs and HCCL for those on NPUs. For host tensors: shared memory within
    /// a machine, and between machines MPI if mpirun started the ranks, else Gloo.
    #[default]
    Auto,
    /// Gloo over TCP; device tensors are staged in host memory.
    Gloo,
    /// MPI, for ranks that an MPI launcher such as mpirun started; device tensors are staged in
    /// host memory.
    Mpi,
    /// NCCL, for ranks that have a GPU.
    Nccl,
    /// HCCL, for ranks that have an NPU.
    Hccl,
}

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Backend::Auto => "auto",
            Backend::Gloo => "gloo",
            Backend::Mpi => "mpi",
            Backend::Nccl => "nccl",
            Backend::Hccl => "hccl",
        }
    }
}

impl std::str::FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Backend, String> {
        let all = [
            Backend::Auto,
            Backend::Gloo,
            Backend::Mpi,
            Backend::Nccl,
            Backend::Hccl,
        ];
        all.into_iter()
            .find(|backend| backend.name() == text)
            .ok_or_else(|| format!("unknown backend {text:?}: use auto, gloo, mpi, nccl or hccl"))
    }
}

/// The relation of the ranks to an MPI launcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MpiLaunch {
    No,
    /// Slurm started the ranks, which fits some MPI libraries; MPI is used only on request.
    Possible,
    Yes,
}

/// The transports that a backend resolves to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transports {
    pub(crate) host: HostTransport,
    /// True if groups within one machine use shared memory instead of `host`.
    pub(crate) shared_memory: bool,
    /// For device tensors; `None` if they are staged in host memory.
    pub(crate) device: Option<DeviceTransport>,
}

/// The transport of tensors in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostTransport {
    Gloo,
    Mpi,
}

/// The transport of tensors on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceTransport {
    Nccl,
    Hccl,
}

impl Transports {
    /// Returns the name for messages.
    pub(crate) fn name(self) -> &'static str {
        match (self.device, self.host, self.shared_memory) {
            (Some(DeviceTransport::Nccl), ..) => "nccl",
            (Some(DeviceTransport::Hccl), ..) => "hccl",
            (None, HostTransport::Gloo, false) => "gloo",
            (None, HostTransport::Mpi, false) => "mpi",
            (None, HostTransport::Gloo, true) => "gloo + shared memory",
            (None, HostTransport::Mpi, true) => "mpi + shared memory",
        }
    }
}

impl Backend {
    /// Chooses the transports for tensors on `device`; `has_mpi` is true if MPI is built in.
    ///
    /// # Errors
    /// If the backend cannot be used; the message has a hint.
    pub(crate) fn resolve(
        self,
        mpi_launch: MpiLaunch,
        device: Device,
        has_mpi: bool,
    ) -> Result<Transports, String> {
        let host = match (self, mpi_launch, has_mpi) {
            (Backend::Gloo, ..) => HostTransport::Gloo,
            (Backend::Mpi, MpiLaunch::Yes | MpiLaunch::Possible, true) => HostTransport::Mpi,
            (Backend::Mpi, _, false) => {
                return Err(NOT_BUILT_IN.into());
            }
            (Backend::Mpi, MpiLaunch::No, true) => {
                return Err(NOT_STARTED_BY_MPI.into());
            }
            (_, MpiLaunch::Yes, true) => HostTransport::Mpi,
            _ => HostTransport::Gloo,
        };
        let device = match (self, device) {
            (Backend::Gloo | Backend::Mpi, _) | (Backend::Auto, Device::Cpu) => None,
            (Backend::Auto | Backend::Nccl, Device::Cuda(_)) => Some(DeviceTransport::Nccl),
            (Backend::Auto | Backend::Hccl, NPU) => Some(DeviceTransport::Hccl),
            (Backend::Auto, _) => None,
            (Backend::Nccl | Backend::Hccl, _) => {
                let (name, device) = if self == Backend::Nccl {
                    ("nccl", "cuda")
                } else {
                    ("hccl", "npu")
                };
                return Err(format!(
                    "run.backend is {name}, which needs {device} devices, and these ranks have \
                     none: use run.device: {device}, or run.backend: auto"
                ));
            }
        };
        Ok(Transports {
            host,
            shared_memory: !matches!(self, Backend::Gloo | Backend::Mpi),
            device,
        })
    }
}

const NOT_BUILT_IN: &str = "this moerun was built without MPI: run \
    ./scripts/setup --mpi and build with --features mpi, or use run.backend: gloo";

const NOT_STARTED_BY_MPI: &str = "run.backend is mpi, but these ranks were not started by MPI: run \
    'mpirun -n N moerun train ...', or use run.backend: auto";

/// Returns the name and version of the MPI library that is built in, if one is.
pub fn mpi_library() -> Option<String> {
    #[cfg(feature = "mpi")]
    return Some(super::mpi::library());
    #[cfg(not(feature = "mpi"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mpi_is_used_if_it_started_the_ranks() {
        let resolve = |backend: Backend, mpi_launch, has_mpi| {
            backend.resolve(mpi_launch, Device::Cpu, has_mpi)
        };
        let host_only = |host, shared_memory| {
            Ok(Transports {
                host,
                shared_memory,
                device: None,
            })
        };
        assert_eq!(
            resolve(Backend::Auto, MpiLaunch::Yes, true),
            host_only(HostTransport::Mpi, true)
        );
        assert_eq!(
            resolve(Backend::Auto, MpiLaunch::Yes, false),
            host_only(HostTransport::Gloo, true)
        );
        assert_eq!(
            resolve(Backend::Auto, MpiLaunch::Possible, true),
            host_only(HostTransport::Gloo, true)
        );
        assert_eq!(
            resolve(Backend::Mpi, MpiLaunch::Possible, true),
            host_only(HostTransport::Mpi, false)
        );
        assert_eq!(
            resolve(Backend::Auto, MpiLaunch::No, true),
            host_only(HostTransport::Gloo, true)
        );
        assert_eq!(
            resolve(Backend::Gloo, MpiLaunch::Yes, true),
            host_only(HostTransport::Gloo, false)
        );
        assert!(
            resolve(Backend::Mpi, MpiLaunch::No, true)
                .unwrap_err()
                .contains("mpirun -n N")
        );
        assert!(
            resolve(Backend::Mpi, MpiLaunch::Yes, false)
                .unwrap_err()
                .contains("setup --mpi")
        );
    }

    #[test]
    fn a_device_has_its_vendors_library() {
        let resolve = |backend: Backend, device| backend.resolve(MpiLaunch::No, device, false);
        let with_device = |device| {
            Ok(Transports {
                host: HostTransport::Gloo,
                shared_memory: true,
                device,
            })
        };
        assert_eq!(
            resolve(Backend::Auto, Device::Cuda(3)),
            with_device(Some(DeviceTransport::Nccl))
        );
        assert_eq!(
            resolve(Backend::Nccl, Device::Cuda(3)),
            with_device(Some(DeviceTransport::Nccl))
        );
        let gloo = Transports {
            host: HostTransport::Gloo,
            shared_memory: false,
            device: None,
        };
        assert_eq!(resolve(Backend::Gloo, Device::Cuda(3)), Ok(gloo));
        assert_eq!(
            resolve(Backend::Auto, NPU),
            with_device(Some(DeviceTransport::Hccl))
        );
        assert!(
            resolve(Backend::Nccl, Device::Cpu)
                .unwrap_err()
                .contains("run.device: cuda")
        );
        assert!(
            resolve(Backend::Hccl, Device::Cuda(0))
                .unwrap_err()
                .contains("run.device: npu")
        );
        assert!(
            "rccl"
                .parse::<Backend>()
                .unwrap_err()
                .contains("nccl or hccl")
        );
    }
}
