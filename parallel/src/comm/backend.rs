//! Which library carries what ranks tell each other.

use crate::MpiLaunch;
use crate::device::NPU;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Device;

/// What a person asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// NCCL for tensors of GPUs, HCCL for those of NPUs; for others the memory that ranks of one machine share, and between
    /// machines MPI where mpirun started the ranks, else Gloo.
    #[default]
    Auto,
    /// Gloo, over TCP, by way of the host's memory.
    Gloo,
    /// MPI: only for ranks that mpirun or its like started; by way of the host's memory.
    Mpi,
    /// NCCL, for ranks with GPUs.
    Nccl,
    /// HCCL, for ranks with NPUs.
    Hccl,
}

impl Backend {
    /// The name, as people write it.
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
        let found = all.into_iter().find(|backend| backend.name() == text);
        found.ok_or_else(|| {
            format!("there is no backend {text:?}: use auto, gloo, mpi, nccl or hccl")
        })
    }
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transports {
    pub(crate) host: HostTransport,
    /// Whether groups on one machine use its memory instead.
    pub(crate) shared_memory: bool,
    /// For tensors that are not the host's; None where those go by way of its memory.
    pub(crate) device: Option<DeviceTransport>,
}

/// What carries tensors in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostTransport {
    /// Gloo, over TCP.
    Gloo,
    /// MPI.
    Mpi,
}

/// What carries a device's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceTransport {
    /// NCCL.
    Nccl,
    /// HCCL.
    Hccl,
}

impl Transports {
    /// The name, in messages.
    pub(crate) fn name(self) -> &'static str {
        match (self.device, self.host, self.shared_memory) {
            (Some(DeviceTransport::Nccl), ..) => "nccl",
            (Some(DeviceTransport::Hccl), ..) => "hccl",
            (None, HostTransport::Gloo, false) => "gloo",
            (None, HostTransport::Mpi, false) => "mpi",
            (None, HostTransport::Gloo, true) => "gloo (in a machine its memory)",
            (None, HostTransport::Mpi, true) => "mpi (in a machine its memory)",
        }
    }
}

impl Backend {
    /// Decides, for ranks that MPI may have started, with tensors on `device`, in a program that has MPI in it or not.
    ///
    /// # Errors
    /// When the wish cannot be fulfilled: why, and what to do.
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
                return Err(
                    "this moerun was built without MPI: run ./scripts/setup --mpi and build with \
                            --features mpi, or use run.backend: gloo"
                        .into(),
                );
            }
            (Backend::Mpi, MpiLaunch::No, true) => {
                return Err(
                    "run.backend is mpi and these ranks were not started by MPI: start \
                            'mpirun -n N moerun train ...', or use run.backend: auto"
                        .into(),
                );
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
                    "run.backend is {name}, which carries tensors of {device} alone, and these ranks have none: use \
                     run.device: {device}, or run.backend: auto"
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

/// The MPI library that is built in, as it calls itself; None where none is.
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
    fn mpi_is_taken_where_it_started_the_ranks() {
        let resolve = |backend: Backend, mpi_launch, has_mpi| {
            backend.resolve(mpi_launch, Device::Cpu, has_mpi)
        };
        let of = |host, shared_memory| {
            Ok(Transports {
                host,
                shared_memory,
                device: None,
            })
        };
        assert_eq!(
            resolve(Backend::Auto, MpiLaunch::Yes, true),
            of(HostTransport::Mpi, true)
        );
        assert_eq!(
            resolve(Backend::Auto, MpiLaunch::Yes, false),
            of(HostTransport::Gloo, true)
        );
        assert_eq!(
            resolve(Backend::Auto, MpiLaunch::Possible, true),
            of(HostTransport::Gloo, true)
        );
        assert_eq!(
            resolve(Backend::Mpi, MpiLaunch::Possible, true),
            of(HostTransport::Mpi, false)
        );
        assert_eq!(
            resolve(Backend::Auto, MpiLaunch::No, true),
            of(HostTransport::Gloo, true)
        );
        assert_eq!(
            resolve(Backend::Gloo, MpiLaunch::Yes, true),
            of(HostTransport::Gloo, false)
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
        let of = |device| {
            Ok(Transports {
                host: HostTransport::Gloo,
                shared_memory: true,
                device,
            })
        };
        assert_eq!(
            resolve(Backend::Auto, Device::Cuda(3)),
            of(Some(DeviceTransport::Nccl))
        );
        assert_eq!(
            resolve(Backend::Nccl, Device::Cuda(3)),
            of(Some(DeviceTransport::Nccl))
        );
        let gloo = Transports {
            host: HostTransport::Gloo,
            shared_memory: false,
            device: None,
        };
        assert_eq!(resolve(Backend::Gloo, Device::Cuda(3)), Ok(gloo));
        assert_eq!(resolve(Backend::Auto, NPU), of(Some(DeviceTransport::Hccl)));
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
